"""One configuration file on its way to be accepted: its text, its values, what is wrong with it.

Reads UTF-8 JSON and refuses what the parser would let pass and later floors cannot carry:
repeated keys, NaN and infinities, integers that lose digits, text that PostgreSQL cannot store,
bottomless nesting, huge files. Problems are collected by place and get their lines at the end.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orbit.errors import Problem
from orbit.profiles.locate import lines_of, pointer_of
from orbit.vocabulary import printable

MAX_FILE_BYTES = 16 << 20
MAX_DEPTH = 64
LARGEST_INTEGER = 2**53 - 1  # the largest that every JSON reader keeps exactly (RFC 8785)

_QUICK = 1 << 32
_SURROGATE = re.compile("[\ud800-\udfff]")

Place = tuple[str | int, ...]


class _Unacceptable(Exception):
    """The file as a whole cannot be looked into."""


class _Repeating(dict[str, Any]):
    """An object in whose text keys are there more than once; the last value counts."""

    repeated: tuple[str, ...] = ()


@dataclass(slots=True)
class SourceFile:
    """A file whose one top-level list is called `list_key`; `tree` is None until it is JSON."""

    path: Path
    list_key: str
    text: str = ""
    tree: Any = None
    _found: list[tuple[Place, str]] = field(default_factory=list)
    _fatal: Problem | None = None
    _is_portable: bool = True

    def read(self) -> bool:
        """Whether the file is JSON that can be looked into further."""
        content = b""
        try:
            content = self._content()
            self.text = content.decode("utf-8-sig")
            self.tree = json.loads(self.text, object_pairs_hook=_object)
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            what = f"byte {error.start} of the file (0x{content[error.start]:02x}) is not"
            self._fail(f"expected UTF-8; {what}", line)
        except json.JSONDecodeError as error:
            self._fail(f"broken JSON: {error.msg} (column {error.colno})", error.lineno)
        except RecursionError:
            self._fail(f"expected at most {MAX_DEPTH} levels of nesting")
        except OSError as error:
            self._fail(f"the file cannot be read: {error.strerror}")
        except _Unacceptable as error:
            self._fail(str(error))
        except ValueError:  # Python's own limit, which keeps parsing linear
            self._fail("expected numbers of at most 4300 digits")
        else:
            self._check_values()
        return self._fatal is None and self._is_portable

    def report(self, place: Place, message: str) -> None:
        """Adds a problem at a path of keys and indexes."""
        self._found.append((place, message))

    def entries(self) -> list[tuple[int, Mapping[str, Any]]]:
        """The list's entries with their index; what is no object is complained of elsewhere."""
        entries = self.tree.get(self.list_key) if isinstance(self.tree, dict) else None
        if not isinstance(entries, list):
            return []
        return [(index, one) for index, one in enumerate(entries) if isinstance(one, dict)]

    def lines(self, places: list[Place]) -> dict[Place, int | None]:
        """The lines of some places, None for what has none."""
        lines = lines_of(self.text, map(pointer_of, places))
        return {place: lines.get(pointer_of(place)) for place in places}

    def problems(self) -> list[Problem]:
        """All problems, each once, in the order of the file."""
        if self._fatal:
            return [self._fatal]
        if not self._found:
            return []
        lines = self.lines([place for place, _ in self._found])
        problems = dict.fromkeys(
            Problem(printable(message), str(self.path), lines[place], printable(pointer_of(place)))
            for place, message in self._found
        )
        return sorted(problems, key=lambda problem: problem.line or 0)

    def _content(self) -> bytes:
        try:
            with self.path.open("rb") as stream:
                content = stream.read(MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            expected = f'{{"{self.list_key}": []}}'
            raise _Unacceptable(f"the file is missing; expected at least {expected}") from None
        if len(content) > MAX_FILE_BYTES:
            raise _Unacceptable(f"the file is larger than {MAX_FILE_BYTES >> 20} MiB")
        return content

    def _fail(self, message: str, line: int | None = None) -> None:
        self._fatal = Problem(message, str(self.path), line)

    def _check_values(self) -> None:
        waiting: list[tuple[Place, Any]] = [((), self.tree)]
        while waiting:
            place, value = waiting.pop()
            self._check_value(place, value)
            has_room = len(place) < MAX_DEPTH
            for key, child in _children(value):
                if not has_room:
                    self.report(place, f"expected at most {MAX_DEPTH} levels of nesting")
                    self._is_portable = False
                    break
                if not _is_plain(child):
                    waiting.append(((*place, key), child))

    def _check_value(self, place: Place, value: Any) -> None:
        for message in _value_problems(value):
            self.report(place, message)
        if _has_surrogate(value):
            self.report(place, "expected text without half a surrogate pair")
            self._is_portable = False
        for key in value.repeated if isinstance(value, _Repeating) else ():
            self.report((*place, key), "the key is there more than once in its object")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        made = _Repeating(made)
        counts = Counter(key for key, _ in pairs)
        made.repeated = tuple(key for key, count in counts.items() if count > 1)
    return made


def _children(value: Any) -> Iterator[tuple[str | int, Any]]:
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list):
        yield from enumerate(value)


def _is_plain(value: Any) -> bool:
    """The quick way past nearly every value; whatever else there is gets a closer look."""
    kind = type(value)
    if kind is str:
        return value.isascii() and "\x00" not in value
    return kind is bool or value is None or (kind is int and -_QUICK < value < _QUICK)


def _value_problems(value: Any) -> Iterator[str]:
    if any("\x00" in text for text in _texts(value)):
        yield "expected text without the character U+0000"
    if isinstance(value, float) and not math.isfinite(value):
        yield "expected a finite number; JSON has no NaN or Infinity"
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        yield f"expected an integer up to {LARGEST_INTEGER}; write a larger one as a string"


def _has_surrogate(value: Any) -> bool:
    return any(not text.isascii() and _SURROGATE.search(text) for text in _texts(value))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
