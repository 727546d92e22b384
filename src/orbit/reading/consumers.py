"""Consumers of telemetry as people see them: how far each is, and what it has yet to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from orbit.database.pool import Database
from orbit.database.queries import load
from orbit.reading.view import Page, Position, Row, View, narrowed, position_of, read_all, read_page
from orbit.telemetry.consumers import no_consumer
from orbit.vocabulary import check_key

SQL = load("telemetry")


@dataclass(frozen=True, slots=True)
class ConsumerView(View):
    """A consumer that has read up to `position`, and has `behind` positions to go.

    `lost` of them were dropped before it read them. `namespaces`: keys bounded to these may move
    it; null: only keys of all.
    """

    name: str
    namespaces: list[str] | None
    position: int
    behind: int
    lost: int
    moved_at: datetime


async def consumers(
    database: Database,
    *,
    limit: int = 50,
    cursor: str | None = None,
    within: Sequence[str] | None = None,
) -> Page[ConsumerView]:
    """Consumers by name. Raises RequestInvalid for a cursor that is none."""

    async def scan(after: Position | None, count: int) -> Sequence[Row]:
        (name,) = after or ("",)
        return await read_all(database, SQL.consumers, _asked(within, after=name, count=count))

    async def choose(rows: Sequence[Row]) -> Mapping[Position, ConsumerView]:
        return {_place(row): ConsumerView(**row) for row in rows}

    after = position_of(cursor, check_key)
    return await read_page(scan, _place, choose, after=after, limit=limit, is_filtered=False)


async def consumer(
    database: Database, name: str, within: Sequence[str] | None = None
) -> ConsumerView:
    """One consumer. Raises NotFound where there is none for who asks."""
    try:
        asked = _asked(within, name=check_key(name))
    except ValueError:  # what is no key is nobody's name
        raise no_consumer(name) from None
    row = await database.fetch_one(SQL.consumers, asked)
    if row is None:
        raise no_consumer(name)
    return ConsumerView(**row)


async def most_behind(database: Database) -> dict[str, int]:
    """`consumer_behind`: how much the consumer that is furthest behind has yet to read."""
    (row,) = await read_all(database, SQL.most_behind)
    return row


def _asked(
    within: Sequence[str] | None, *, after: str = "", name: str | None = None, count: int = 1
) -> dict[str, object]:
    return {"after": after, "name": name, "count": count, "within": narrowed(None, within)}


def _place(row: Row) -> Position:
    return (row["name"],)
