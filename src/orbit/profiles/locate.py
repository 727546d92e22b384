"""Finds the lines of a JSON text on which given JSON pointers (RFC 6901) stand.

A member of an object stands where its key begins, an element of an array where it begins. Of a
key that is there twice the last counts, as it does for the parser. Only what lies on the way
to a wanted pointer is walked; the rest is skipped by the standard library's scanner. The text
must have been parsed before: broken JSON is not diagnosed here.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(slots=True)
class _Wanted:
    """A node of the tree of wanted pointers."""

    is_asked: bool = False
    children: dict[str, _Wanted] = field(default_factory=dict)


def pointer_of(parts: Iterable[str | int]) -> str:
    """The JSON pointer of a path: `("a/b", 0)` is `/a~1b/0`."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


def lines_of(text: str, pointers: Iterable[str]) -> dict[str, int]:
    """The line (from 1) of each pointer; a pointer to nothing is left out."""
    newlines = [match.start() for match in re.finditer("\n", text)]
    return {
        pointer: bisect_left(newlines, offset) + 1
        for pointer, offset in _offsets(text, _tree(pointers))
    }


def _tree(pointers: Iterable[str]) -> _Wanted:
    root = _Wanted()
    for pointer in pointers:
        node = root
        for part in pointer.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            node = node.children.setdefault(key, _Wanted())
        node.is_asked = True
    return root


def _offsets(text: str, wanted: _Wanted) -> Iterator[tuple[str, int]]:
    start = _skip_space(text, 0)
    if wanted.is_asked:
        yield "", start
    waiting = deque([("", start, wanted)])  # a queue, so that of two equal keys the last wins
    while waiting:
        pointer, at, node = waiting.popleft()
        for name, place, value in _members(text, at) if node.children else ():
            if name in node.children:
                child, path = node.children[name], pointer + pointer_of((name,))
                waiting.append((path, value, child))
                if child.is_asked:
                    yield path, place


def _members(text: str, at: int) -> Iterator[tuple[str, int, int]]:
    """Name, place and value's offset of each member of the container at `at`, if it is one."""
    opening = text[at]
    if opening not in "{[":
        return
    at, index = _skip_space(text, at + 1), 0
    while text[at] not in "}]":
        name, place = str(index), at
        if opening == "{":
            name, at = _DECODER.raw_decode(text, at)
            at = _skip_space(text, _skip_space(text, at) + 1)
        yield name, place, at
        _, at = _DECODER.raw_decode(text, at)
        at, index = _skip_space(text, at), index + 1
        if text[at] == ",":
            at = _skip_space(text, at + 1)


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at
