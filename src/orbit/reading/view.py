"""What reading hands out, and how lists are paged.

A view is a frozen dataclass whose fields go over the wire in camelCase. A list is read window by
window along an index: each page goes on where the last one ended (keyset paging), and a filter
that matches little gives short or empty pages with a cursor rather than a long scan.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar, Generic, TypeVar

from orbit.database.pool import Database
from orbit.database.queries import array
from orbit.errors import NotFound, RequestInvalid

LARGEST_ID = "ffffffff-ffff-ffff-ffff-ffffffffffff"
MAX_PAGE = 200

_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_WINDOW, _WINDOWS = 500, 10

Item = TypeVar("Item")
Row = Mapping[str, Any]
Position = tuple[str, ...]


def camel_case(name: str) -> str:
    """`cycle_run_id` as `cycleRunId`."""
    first, *others = name.split("_")
    return first + "".join(word.capitalize() for word in others)


@dataclass(frozen=True, slots=True)
class View:
    """Base of everything that reading hands out."""

    # Read by pydantic where a view crosses the wire; nothing here depends on it.
    __pydantic_config__: ClassVar[Mapping[str, Any]] = {
        "alias_generator": camel_case,
        "validate_by_name": True,
        "validate_by_alias": True,
    }


@dataclass(frozen=True, slots=True)
class Page(View, Generic[Item]):
    """A part of a list; `next_cursor` None means that nothing follows."""

    items: list[Item]
    next_cursor: str | None = None


def known_id(text: str, what: str) -> str:
    """An id in its canonical form. Raises NotFound: what is no id is nothing's id."""
    lowered = text.lower()
    if not _ID.fullmatch(lowered):
        raise NotFound(f"there is no such {what}")
    return lowered


def narrowed(namespace: str | None, within: Sequence[str] | None) -> str | None:
    """The namespaces to read, for a `namespaces` parameter: None is all of them.

    `within` are those that exist for who asks; any other is one in which there is nothing.
    """
    if namespace is None:
        return None if within is None else array(within)
    return array([namespace] if within is None or namespace in within else [])


def is_within(namespace: str, within: Sequence[str] | None) -> bool:
    """Whether the namespace is one of those that there are for who asks; None: all."""
    return within is None or namespace in within


async def read_all(
    database: Database, query: bytes, params: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """The rows of a statement, with instants in UTC."""
    return [
        {
            name: value.astimezone(UTC) if isinstance(value, datetime) else value
            for name, value in row.items()
        }
        for row in await database.fetch_all(query, params)
    ]


async def read_page(
    scan: Callable[[Position | None, int], Awaitable[Sequence[Row]]],
    place: Callable[[Row], Position],
    choose: Callable[[Sequence[Row]], Awaitable[Mapping[Position, Item]]],
    *,
    after: Position | None,
    limit: int,
    is_filtered: bool,
) -> Page[Item]:
    """One page of a list.

    Args:
        scan: reads so many rows after a position, in the list's order.
        place: the position of a row.
        choose: which of some rows belong to the list, as items by position.
    """
    count = _WINDOW if is_filtered else limit + 1
    items: list[Item] = []
    for _ in range(_WINDOWS):
        rows = await scan(after, count)
        chosen = await choose(rows)
        for number, row in enumerate(rows, 1):
            after = place(row)
            if after in chosen:
                items.append(chosen[after])
            if len(items) == limit:
                is_last = number == len(rows) < count
                return Page(items, None if is_last else cursor_of(after))
        if len(rows) < count:
            return Page(items)
    return Page(items, cursor_of(after) if after else None)


def cursor_of(position: Position) -> str:
    """An opaque cursor for a position in a list."""
    text = json.dumps(position, separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def position_of(cursor: str | None, *checks: Callable[[str], object]) -> Position | None:
    """The position that a cursor stands for; raises RequestInvalid for what is none of ours."""
    if cursor is None:
        return None
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        parts = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
        if not isinstance(parts, list) or len(parts) != len(checks):
            raise ValueError
        for part, check in zip(parts, checks, strict=True):
            if not isinstance(part, str) or "\x00" in part:
                raise ValueError
            check(part)
    except (ValueError, RecursionError, NotFound):
        raise RequestInvalid("cursor: expected a nextCursor of this list") from None
    return tuple(parts)


def check_cursor_number(text: str) -> object:
    """Checks a cursor's part that is a number of up to 18 digits."""
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ValueError(text)
    return text


def check_cursor_id(text: str) -> object:
    """Checks a cursor's part that is an id."""
    if not _ID.fullmatch(text):
        raise ValueError(text)
    return text
