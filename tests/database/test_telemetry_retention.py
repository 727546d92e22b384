"""Retention of events: never before a stored consumer, never before the archive is proven."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from orbit.clock import DatabaseClock, new_id
from orbit.database.pool import Database
from orbit.errors import ConsumerExists, NotFound, RequestInvalid, VerificationImpossible
from orbit.telemetry.catalogue import EventType
from orbit.telemetry.consumers import add, commit, remove
from orbit.telemetry.emission import SQL, Event, emit
from orbit.telemetry.retention import Retained, Retention, archive, read_chunk, retain
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


async def stored(database: Database, name: str, position: int) -> None:
    """A consumer at a position."""
    async with database.transaction() as connection:
        await add(connection, name, after=position)


async def test_what_a_consumer_has_not_read_stays(database: Database, old: int) -> None:
    """A week goes when the last stored consumer has passed it, and not before."""
    await stored(database, "bi", old - 1)
    await stored(database, "dwh", old)
    assert await retain(database, Retention(30)) == Retained([], ["bi"])
    assert await weeks(database) == [WEEK]
    with pytest.raises(psycopg.errors.ObjectInUse):
        await database.execute(SQL.drop_week, {"week": WEEK, "is_forced": False})
    async with database.transaction() as connection:
        await commit(connection, "bi", old)
    assert await retain(database, Retention(30)) == Retained([WEEK], [])
    assert await weeks(database) == []


async def test_what_signals_have_not_taken_in_stays(database: Database, old: int) -> None:
    """The detector's own place counts as a consumer's, as far as there is something for it."""
    feed = b"INSERT INTO signal_feed VALUES (%s, 2, %s, NULL)"
    await database.execute(feed, ["another", 0])
    await database.execute(feed, ["ns", old - 3])
    assert await retain(database, Retention(30)) == Retained([], ["signals of ns"])
    await database.execute(b"UPDATE signal_feed SET position = %s WHERE namespace = 'ns'", [old])
    assert await retain(database, Retention(30)) == Retained([WEEK], [])


async def test_a_consumer_that_is_being_stored_is_waited_for(database: Database, old: int) -> None:
    """While its transaction is open no week is dropped; after it, none that it needs."""
    async with database.transaction() as connection:
        await add(connection, "bi")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            await retain(database, Retention(30))
    assert await retain(database, Retention(30)) == Retained([], ["bi"])


async def test_a_place_only_goes_on(database: Database, old: int) -> None:
    """It begins at what is kept, never goes back, and is nowhere that was not given yet."""
    async with database.transaction() as connection:
        await add(connection, "bi")
        assert await commit(connection, "bi", 5) == 5
        assert await commit(connection, "bi", 3) == 5
    for refused in (commit(connection, "bi", old + 1), add(connection, "dwh", after=old + 1)):
        with pytest.raises(RequestInvalid, match=f"the last one is {old}"):
            async with database.transaction() as connection:
                await refused
    await retain(database, Retention(30, hard_days=60))
    async with database.transaction() as connection:
        await add(connection, "dwh", after=2)
        with pytest.raises(ConsumerExists):
            await add(connection, "bi")
        await remove(connection, "bi")
        for gone in (commit(connection, "bi", 1), remove(connection, "bi")):
            with pytest.raises(NotFound):
                await gone
    rows = await database.fetch_all(b"SELECT name, position FROM telemetry_consumer")
    assert rows == [{"name": "dwh", "position": old}]


async def test_a_hard_limit_is_told(database: Database, old: int, clock: DatabaseClock) -> None:
    """What is dropped unread leaves an event that names who had not read it."""
    await stored(database, "bi", 1)
    assert await retain(database, Retention(30, hard_days=60)) == Retained([WEEK], [])
    row = await database.fetch_one(b"SELECT event_type, namespace, metadata FROM telemetry_event")
    assert row == {
        "event_type": "telemetry_dropped",
        "namespace": "*",
        "metadata": {"week": WEEK, "lastPosition": old, "consumers": ["bi"]},
    }


async def test_an_archive_has_every_event(database: Database, old: int) -> None:
    """With the archive on a dropped week can be read, line by line, in order of position."""
    assert await retain(database, Retention(30, is_archiving=True)) == Retained([WEEK], [])
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
