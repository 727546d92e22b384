"""Retention: a week of events goes as a whole, once all stored consumers have read it, and signals.

With the cold archive on, a week is first written to `telemetry_archive` in chunks, each read back
and compared with its digest, and their count with the week's; only then is it dropped. A pass
that dies goes on at the chunk where it was. A hard limit drops what a consumer has not read; that
is itself an event, in the transaction that drops, and names who was passed over.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from orbit.database.pool import Database
from orbit.database.queries import load
from orbit.errors import NotFound, VerificationImpossible
from orbit.telemetry.catalogue import INSTALLATION, EventType
from orbit.telemetry.emission import Event, emit

SQL = load("telemetry")
_CHUNK_EVENTS = 5000


@dataclass(frozen=True, slots=True)
class Retention:
    """For how many days events are kept (0: for ever); `hard_days`: whoever has not read them."""

    days: int
    hard_days: int = 0
    is_archiving: bool = False


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
        needed_by = await _drop(database, row, is_archiving=retention.is_archiving)
        if needed_by:
            return Retained(dropped, needed_by)
        dropped.append(row["week"])
    return Retained(dropped, [])


async def _drop(database: Database, row: dict[str, Any], *, is_archiving: bool) -> list[str]:
    """Drops a week, unless somebody needs it: then who does."""
    week = row["week"]
    size = await database.fetch_one(SQL.week_size, {"week": week})
    assert size is not None
    rows = await database.fetch_all(SQL.behind, {"position": size["last_position"]})
    behind = [one["name"] for one in rows]
    if behind and not row["is_over_limit"]:
        return behind
    if is_archiving and size["events"]:
        await archive(database, week)
    async with database.transaction() as connection:
        if behind:
            told = {
                "week": week,
                "lastPosition": size["last_position"],
                "consumers": behind,
            }
            await emit(connection, Event(INSTALLATION, EventType.TELEMETRY_DROPPED, told))
        await connection.execute(SQL.drop_week, {"week": week, "is_forced": bool(behind)})
    return []


async def archive(database: Database, week: str) -> int:
    """Writes a week to the archive and reads it back; how many events it has there.

    Raises VerificationImpossible if what is read is not what was written.
    """
    while True:
        size = await database.fetch_one(SQL.week_size, {"week": week})
        assert size is not None
        asked = {"week": week, "after": size["archived_until"], "count": _CHUNK_EVENTS}
        found = await database.fetch_one(SQL.week_lines, asked)
        assert found is not None
        if not found["events"]:
            break
        lines = found["text"].encode() + b"\n"
        chunk = {
            "week": week,
            "chunk": size["chunks"] + 1,
            "first_position": found["first_position"],
            "last_position": found["last_position"],
            "events": found["events"],
            "sha256": sha256(lines).digest(),
            "content": gzip.compress(lines, mtime=0),
        }
        await database.execute(SQL.insert_archive, chunk)
    archived = 0
    for number in range(1, size["chunks"] + 1):
        archived += len(await read_chunk(database, week, number))
    if archived != size["events"]:
        raise VerificationImpossible(
            f"the archive of {week} has {archived} events, the week {size['events']}"
        )
    return archived


async def read_chunk(database: Database, week: str, chunk: int) -> list[bytes]:
    """The lines of a chunk. Raises NotFound, and VerificationImpossible if they were changed."""
    row = await database.fetch_one(SQL.archive_chunk, {"week": week, "chunk": chunk})
    if row is None:
        raise NotFound(f"there is no chunk {chunk} of {week} in the archive")
    lines = gzip.decompress(bytes(row["content"]))
    found = list(_lines(lines))
    if sha256(lines).digest() != bytes(row["sha256"]) or len(found) != row["events"]:
        raise VerificationImpossible(f"chunk {chunk} of {week} is not what was archived")
    return found


def _lines(content: bytes) -> Iterator[bytes]:
    yield from content.splitlines()
