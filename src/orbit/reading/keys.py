"""Access keys as people read them: what they may do, and what became of them; never a secret."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from orbit.errors import NotFound
from orbit.governance.keys import Keys
from orbit.reading.view import Page, Position, Row, View, position_of, read_page


@dataclass(frozen=True, slots=True)
class KeyView(View):
    """A key without its secret; `state` is `good`, `expired`, `rotated` or `revoked`.

    `root_id` is the first of the keys that were rotated into this one; `created_by_key` the key
    that made it, if one did; `last_used_at` is kept to the minute.
    """

    key_id: str
    root_id: str
    name: str
    scopes: list[str]
    namespaces: list[str]
    state: str
    expires_at: datetime | None
    replaces: str | None
    rotated_until: datetime | None
    revoked_at: datetime | None
    revoked_reason: str | None
    last_used_at: datetime | None
    created_by: str
    created_by_key: str | None
    created_at: datetime


async def access_keys(
    keys: Keys,
    *,
    limit: int = 50,
    cursor: str | None = None,
    within: Sequence[str] | None = None,
) -> Page[KeyView]:
    """Keys newest first, none that reaches out of `within`.

    Raises RequestInvalid for a cursor that is none.
    """

    async def scan(after: Position | None, count: int) -> Sequence[Row]:
        place = None if after is None else (after[0], after[1])
        return await keys.listed(within, after=place, count=count)

    async def choose(rows: Sequence[Row]) -> Mapping[Position, KeyView]:
        return {_place(row): _view(row) for row in rows}

    return await read_page(
        scan,
        _place,
        choose,
        after=position_of(cursor, datetime.fromisoformat, str),
        limit=limit,
        is_filtered=False,
    )


async def access_key(keys: Keys, key_id: str) -> KeyView:
    """One key. Raises NotFound."""
    rows = await keys.listed(key_id=key_id)
    if not rows:
        raise NotFound(f"there is no key {key_id}")
    return _view(rows[0])


def _place(row: Row) -> Position:
    return row["created_at"].isoformat(), row["key_id"]


def _view(row: Row) -> KeyView:
    given: dict[str, Any] = {
        name: value.astimezone(UTC) if isinstance(value, datetime) else value
        for name, value in row.items()
        if name != "is_good"
    }
    return KeyView(**given, state=_state(row))


def _state(row: Row) -> str:
    if row["is_good"]:
        return "good"
    if row["revoked_at"] is not None:
        return "revoked"
    return "expired" if row["rotated_until"] is None else "rotated"
