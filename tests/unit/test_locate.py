"""Lines of JSON pointers, for JSON in any layout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from orbit.profiles.locate import lines_of, pointer_of

_TEXT = """{
  "profiles": [
    {"profile_id": "a",
     "label": "A"},
    {
      "a/b~c": [1,
        2]
    }
  ]
}
"""

_LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
_VALUES = st.recursive(
    _LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=25
)
_SPACES = st.text(alphabet=" \t\r\n", max_size=3)


def test_a_member_stands_at_its_key_and_an_element_at_its_beginning() -> None:
    """The documented places, on a text laid out by hand."""
    expected = {
        "": 1,
        "/profiles": 2,
        "/profiles/0": 3,
        "/profiles/0/profile_id": 3,
        "/profiles/0/label": 4,
        "/profiles/1": 5,
        "/profiles/1/a~1b~0c": 6,
        "/profiles/1/a~1b~0c/1": 7,
    }
    assert lines_of(_TEXT, expected) == expected


def test_a_pointer_to_nothing_has_no_line() -> None:
    """Keys, indexes and members of scalars that are not there are left out."""
    assert lines_of(_TEXT, ["/nothing", "/profiles/9", "/profiles/0/label/x", "/profiles/-"]) == {}


def test_of_a_repeated_key_the_last_counts() -> None:
    """The parser keeps the last value, so its line is the one to name; nested ones too."""
    text = '{"a": {"x": 1},\n "b": 0,\n "a": {\n"x": 2}}'
    assert lines_of(text, ["/a", "/a/x"]) == {"/a": 3, "/a/x": 4}


def test_a_deep_pointer_needs_no_recursion() -> None:
    """A hundred levels, each on a line of its own."""
    text = "[\n" * 100 + "0" + "]" * 100
    assert lines_of(text, ["/0" * 100]) == {"/0" * 100: 101}


@given(value=_VALUES, data=st.data())
def test_every_pointer_is_found_on_its_line_in_any_layout(value: Any, data: st.DataObject) -> None:
    """A writer that lays JSON out at random and notes where it is agrees with the finder."""
    written, expected = _laid_out(value, data)
    assert json.loads(written) == value
    assert lines_of(written, expected) == expected


def _laid_out(value: Any, data: st.DataObject) -> tuple[str, dict[str, int]]:
    parts: list[str] = []
    lines: dict[str, int] = {}

    def space() -> None:
        parts.append(data.draw(_SPACES))

    def mark(path: tuple[str | int, ...]) -> None:
        lines[pointer_of(path)] = 1 + sum(part.count("\n") for part in parts)

    def write(value: Any, path: tuple[str | int, ...]) -> None:
        if not isinstance(value, (dict, list)):
            parts.append(json.dumps(value, ensure_ascii=data.draw(st.booleans())))
            return
        parts.append("{" if isinstance(value, dict) else "[")
        space()
        for number, (name, child) in enumerate(_children(value)):
            if number:
                parts.append(",")
                space()
            mark((*path, name))
            if isinstance(value, dict):
                parts.append(json.dumps(name))
                space()
                parts.append(":")
                space()
            write(child, (*path, name))
            space()
        parts.append("}" if isinstance(value, dict) else "]")

    space()
    mark(())
    write(value, ())
    space()
    return "".join(parts), lines


def _children(value: dict[str, Any] | list[Any]) -> Iterator[tuple[str | int, Any]]:
    yield from value.items() if isinstance(value, dict) else enumerate(value)
