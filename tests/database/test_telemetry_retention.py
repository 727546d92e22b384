"""Retention of events: never before a stored consumer, never before the archive is proven."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from orbit.clock import DatabaseClock, new_id
from orbit.database.pool import Database
from orbit.errors import VerificationImpossible
from orbit.telemetry.catalogue import EventType
from orbit.telemetry.emission import SQL, Event, emit
from orbit.telemetry.retention import Retention, archive, read_chunk, retain
from orbit.telemetry.sequencing import sequence

WEEK = "2026-01-05"  # a Monday long ago


@pytest.fixture
async def old(database: Database, owner_dsn: str, clock: DatabaseClock) -> int:
    """Twelve events in a week of long ago, numbered; the last position."""
    at = datetime(2026, 1, 7, tzinfo=UTC)
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        for fact in ("telemetry_event", "telemetry_batch"):
            partition = f"{fact}_p20260105"
            owner.execute(f"CREATE TABLE {partition} (LIKE {fact} INCLUDING ALL)".encode())
            owner.execute(
                f"ALTER TABLE {fact} ATTACH PARTITION {partition} FOR VALUES FROM"
                " (orbit_first_id('2026-01-05Z')) TO (orbit_first_id('2026-01-12Z'))".encode()
            )
        for number in range(4):
            batch_id = new_id(at + timedelta(seconds=number))
            owner.execute(
                "INSERT INTO telemetry_event (namespace, batch_id, ordinal, event_type, metadata)"
                " SELECT 'ns', %s, n, 'requeued', jsonb_build_object('n', n)"
                " FROM generate_series(1, 3) n",
                (batch_id,),
            )
            owner.execute(
                "INSERT INTO telemetry_pending (batch_id, namespace, events) VALUES (%s, 'ns', 3)",
                (batch_id,),
            )
    assert (await sequence(database, new_id(clock.now()))).events == 12
    return 12


async def weeks(database: Database) -> list[str]:
    """The old weeks that are there."""
    rows = await database.fetch_all(SQL.weeks, {"days": 30, "hard_days": 0})
    return [row["week"] for row in rows]


async def test_what_a_consumer_has_not_read_stays(database: Database, old: int) -> None:
    """A week goes when the last stored consumer has passed it, and not before."""
    await database.execute(SQL.move_consumer, {"name": "bi", "position": old - 1})
    assert await retain(database, Retention(30)) == []
    assert await weeks(database) == [WEEK]
    with pytest.raises(psycopg.errors.ObjectInUse):
        await database.execute(SQL.drop_week, {"week": WEEK, "is_forced": False})
    await database.execute(SQL.move_consumer, {"name": "bi", "position": old})
    assert await retain(database, Retention(30)) == [WEEK]
    assert await weeks(database) == []


async def test_a_hard_limit_is_told(database: Database, old: int, clock: DatabaseClock) -> None:
    """What is dropped unread leaves an event that names who had not read it."""
    await database.execute(SQL.move_consumer, {"name": "bi", "position": 1})
    assert await retain(database, Retention(30, hard_days=60)) == [WEEK]
    row = await database.fetch_one(b"SELECT event_type, namespace, metadata FROM telemetry_event")
    assert row == {
        "event_type": "telemetry_dropped",
        "namespace": "*",
        "metadata": {"week": WEEK, "lastPosition": old, "consumers": ["bi"]},
    }


async def test_an_archive_has_every_event(database: Database, old: int) -> None:
    """With the archive on a dropped week can be read, line by line, in order of position."""
    assert await retain(database, Retention(30, is_archiving=True)) == [WEEK]
    lines = [json.loads(line) for line in await read_chunk(database, WEEK, 1)]
    assert [line["position"] for line in lines] == list(range(1, old + 1))
    assert [line["metadata"]["n"] for line in lines] == [1, 2, 3] * 4


async def test_a_changed_archive_stops_the_drop(
    database: Database, old: int, owner_dsn: str
) -> None:
    """Nothing is dropped while the archive does not read back as it was written."""
    assert await archive(database, WEEK) == old
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        owner.execute("ALTER TABLE telemetry_archive DISABLE TRIGGER append_only")
        owner.execute("UPDATE telemetry_archive SET sha256 = sha256('x')")
    with pytest.raises(VerificationImpossible):
        await retain(database, Retention(30, is_archiving=True))
    assert await weeks(database) == [WEEK]


async def test_numbering_goes_on_after_a_drop(
    database: Database, old: int, clock: DatabaseClock
) -> None:
    """Positions are never given again, though the rows that had them are gone."""
    await retain(database, Retention(30))
    async with database.transaction() as connection:
        await emit(connection, Event("ns", EventType.REQUEUED))
    while not (await sequence(database, new_id(clock.now()), lease_seconds=0.01)).events:
        pass
    row = await database.fetch_one(b"SELECT position FROM telemetry_stream")
    assert row == {"position": old + 1}
