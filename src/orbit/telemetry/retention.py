"""Retention: a week of events goes as a whole, once all stored consumers have read it, and signals.

With the cold archive on, a week is first archived, and read back; only then is it dropped. A hard
limit drops what a consumer has not read; that is itself an event, in the transaction that drops,
and names who was passed over. What gets its position while a week is archived is dropped the next
time. Several nodes at it at once do no harm: one drops, the others find that it is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psycopg import Rollback

from orbit.database.pool import Database
from orbit.database.queries import load
from orbit.telemetry.archive import archive
from orbit.telemetry.catalogue import INSTALLATION, EventType
from orbit.telemetry.emission import Event, emit
from orbit.telemetry.parquet import write_parquet

SQL = load("telemetry")


@dataclass(frozen=True, slots=True)
class Retention:
    """For how many days events are kept (0: for ever); `hard_days`: whoever has not read them.

    With `is_archiving` they go to the archive, and to `parquet_folder` if there is one.
    """

    days: int
    hard_days: int = 0
    is_archiving: bool = False
    parquet_folder: Path | None = None


@dataclass(frozen=True, slots=True)
class Retained:
    """The weeks that were dropped, and who has yet to read the next one that is over."""

    dropped: list[str]
    waiting_for: list[str]


async def retain(database: Database, retention: Retention) -> Retained:
    """Drops what is over, the oldest week first, up to one that somebody needs."""
    dropped: list[str] = []
    if not retention.days:
        return Retained(dropped, [])
    asked = {"days": max(retention.days, 1), "hard_days": retention.hard_days}
    for row in await database.fetch_all(SQL.weeks, asked):
        needed_by = await _drop(database, row, retention)
        if needed_by:
            return Retained(dropped, needed_by)
        dropped.append(row["week"])
    return Retained(dropped, [])


async def _drop(database: Database, row: dict[str, Any], retention: Retention) -> list[str]:
    """Drops a week, unless somebody needs it: then who does."""
    week = row["week"]
    size = await database.fetch_one(SQL.week_size, {"week": week})
    assert size is not None
    seen = size["last_position"]
    behind = _names(await database.fetch_all(SQL.behind, {"position": seen}))
    if behind and not row["is_over_limit"]:
        return behind
    if retention.is_archiving and size["events"]:
        chunks, seen = await archive(database, week)
        if retention.parquet_folder is not None:
            await write_parquet(database, week, chunks, retention.parquet_folder)
    async with database.transaction() as connection:
        await connection.execute(SQL.bound_waiting)
        await connection.execute(SQL.lock_weeks)
        found = await connection.execute(SQL.behind, {"position": seen})
        behind = _names(await found.fetchall())
        if behind and not row["is_over_limit"]:
            return behind
        asked = {"week": week, "is_forced": bool(behind)}
        gone = await (await connection.execute(SQL.drop_week, asked)).fetchone()
        assert gone is not None
        last = gone["last_position"]
        if last is not None and last > seen:
            raise Rollback
        if behind and last is not None:
            told = {"week": week, "lastPosition": last, "consumers": behind}
            await emit(connection, Event(INSTALLATION, EventType.TELEMETRY_DROPPED, told))
        return []
    return ["events that were numbered meanwhile"]


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [one["name"] for one in rows]
