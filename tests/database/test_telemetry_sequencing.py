"""Telemetry's promise: each committed event has one position, and no reader misses or doubles one.

Writers here hold transactions open, commit out of order and roll back, while sequencers, each a
process of its own, lose their sessions, are killed in the middle of their work and replaced.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

import pytest

from orbit.clock import DatabaseClock, new_id
from orbit.database.pool import Database
from orbit.telemetry import emission
from orbit.telemetry.catalogue import CATALOGUE, EventType
from orbit.telemetry.emission import SQL, Event, emit
from orbit.telemetry.sequencing import sequence
from tests.database.engine import FAILED, Worker, add_snapshot

_DEADLINE_SECONDS = 300.0
_SEQUENCER = """
import asyncio, sys
from orbit.database.pool import TRANSIENT, Database
from orbit.telemetry.sequencing import sequence

async def main(dsn, node_id):
    database = Database(dsn, minimum=1, maximum=1)
    await database.open()
    while True:
        try:
            await sequence(database, node_id, lease_seconds=0.2, count=3)
        except TRANSIENT:
            pass

asyncio.run(main(*sys.argv[1:]))
"""

_END_SEQUENCERS = b"""SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
    AND query LIKE '%telemetry_sequencer%'
    AND query NOT LIKE '%first_position%'"""


async def page(
    database: Database, after: int, count: int = 7, namespaces: str | None = None
) -> list[dict[str, object]]:
    """The events after a position."""
    asked = {"after": after, "count": count, "is_stream": False, "namespaces": namespaces}
    query = SQL.window if namespaces is None else SQL.window_of_namespaces
    row = await database.fetch_one(query, asked)
    assert row is not None
    return json.loads(row["text"] or "[]")  # type: ignore[no-any-return]


async def drained(database: Database, node_id: str) -> list[dict[str, object]]:
    """All events, numbered and read from the first."""
    while (await sequence(database, node_id)).events:
        pass
    return await page(database, 0, 10_000)


@pytest.fixture
async def writers(dsn: str) -> AsyncIterator[Database]:
    """Connections for writers of their own."""
    pool = Database(dsn, minimum=8, maximum=8)
    await pool.open()
    yield pool
    await pool.close()


@dataclass
class Course:
    """Writers, a reader and killed sequencers at once, and what they saw."""

    database: Database
    writers: Database
    dsn: str
    chance: random.Random = field(default_factory=lambda: random.Random(7))
    committed: list[int] = field(default_factory=list)
    read: list[tuple[int, int]] = field(default_factory=list)
    is_written: bool = False
    kills: int = 0
    ended: int = 0

    async def write(self, first: int) -> None:
        """One writer: quick and long transactions, a fifth of them rolled back; till four died."""
        number = first
        while number < first + 120 or (self.kills < 4 and number < first + 900):
            is_kept = self.chance.random() > 0.2
            async with self.writers.connection() as connection:
                await connection.execute("BEGIN")
                told = Event(f"ns{number % 3}", EventType.OUTCOME_REPORTED, {"n": number})
                await emit(connection, told)
                seconds = self.chance.random() ** 6 * 0.5
                await connection.execute("SELECT pg_sleep(%s)", (seconds,))
                await connection.execute("COMMIT" if is_kept else "ROLLBACK")
            if is_kept:
                self.committed.append(number)
            number += 1

    async def follow(self) -> None:
        """A reader that keeps nothing but its position."""
        position, deadline = 0, time.monotonic() + _DEADLINE_SECONDS
        while time.monotonic() < deadline:
            if self.is_written and len(self.read) >= len(self.committed):
                break
            for event in await page(self.database, position):
                position = int(str(event["position"]))
                data = event["data"]
                assert isinstance(data, dict)
                self.read.append((position, data["n"]))

    async def kill(self, clock: DatabaseClock) -> None:
        """Has two sequencers at a time, each a process; ends their sessions, then kills them."""
        while not self.is_written:
            pair = [
                await asyncio.create_subprocess_exec(
                    sys.executable, "-c", _SEQUENCER, self.dsn, new_id(clock.now())
                )
                for _ in range(2)
            ]
            for _ in range(2):
                await self._progress(len(self.read) + 15)
                self.ended += len(await self.database.fetch_all(_END_SEQUENCERS))
            await self._progress(len(self.read) + 15)
            for process in pair:
                process.send_signal(signal.SIGKILL)
                await process.wait()
                self.kills += 1

    async def _progress(self, count: int) -> None:
        while len(self.read) < count and not self.is_written:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_no_event_is_missed_or_doubled(
    database: Database, writers: Database, dsn: str, clock: DatabaseClock
) -> None:
    """Long transactions, rollbacks, sequencers that lose sessions and lives: each is read once."""
    course = Course(database, writers, dsn)
    reader = asyncio.create_task(course.follow())
    killer = asyncio.create_task(course.kill(clock))
    await asyncio.gather(*(course.write(1000 * number) for number in range(8)))
    course.is_written = True
    await killer
    replacement = new_id(clock.now())
    while not reader.done():
        await sequence(database, replacement)
    await reader
    assert course.kills >= 4
    assert course.ended >= 2
    assert sorted(number for _, number in course.read) == sorted(course.committed)
    assert [position for position, _ in course.read] == list(range(1, len(course.committed) + 1))


async def test_a_long_transaction_holds_nobody_up(
    database: Database, writers: Database, node_id: str
) -> None:
    """What commits is numbered while an older transaction is open, whose events come after."""
    async with writers.transaction() as slow:
        await emit(slow, Event("ns", EventType.OUTCOME_REPORTED, {"n": "slow"}))
        async with writers.transaction() as quick:
            await emit(quick, Event("ns", EventType.OUTCOME_REPORTED, {"n": "quick"}))
        before = await drained(database, node_id)
    after = await drained(database, node_id)
    assert [one["data"]["n"] for one in before] == ["quick"]  # type: ignore[index]
    assert [one["data"]["n"] for one in after] == ["quick", "slow"]  # type: ignore[index]


async def test_only_one_numbers(database: Database, clock: DatabaseClock) -> None:
    """While a leader's lease is good another node waits; the leader's restart goes on densely."""
    first, second = new_id(clock.now()), new_id(clock.now())
    assert (await sequence(database, first, lease_seconds=600)).wait_seconds == 0
    assert (await sequence(database, second)).wait_seconds > 0
    async with database.transaction() as connection:
        await emit(connection, *[Event("ns", EventType.OUTCOME_REPORTED)] * 3)
    assert (await sequence(database, second)).events == 0
    assert (await sequence(database, first)).events == 3


async def test_a_reader_gets_its_namespaces_only(database: Database, node_id: str) -> None:
    """Positions of other namespaces are gaps to a bounded reader, and pages go on over them."""
    async with database.transaction() as connection:
        events = [Event(f"ns{number % 3}", EventType.OUTCOME_REPORTED) for number in range(30)]
        await emit(connection, *events)
    everything = await drained(database, node_id)
    expected = [one["position"] for one in everything if one["source"] == "/namespaces/ns1"]
    found: list[object] = []
    while some := await page(database, int(str(found[-1] if found else 0)), 4, "{ns1}"):
        found += [one["position"] for one in some]
    assert found == expected
    assert len(found) == 10


async def test_the_engine_tells_what_it_does(database: Database, clock: DatabaseClock) -> None:
    """A cycle's whole life is told in its order, under types and fields of the catalogue."""
    worker = Worker.new(database, clock)
    await add_snapshot(database)
    cycle = await worker.begin_dispatch(lanes=("one",), max_attempts=2)
    for _ in range(2):
        jobs: list[object] = []
        deadline = time.monotonic() + _DEADLINE_SECONDS
        while not jobs and time.monotonic() < deadline:
            for job in await worker.take("one"):
                jobs.append(job)
                await worker.settle(job, FAILED)
    told = await drained(database, worker.node_id)
    names = [str(one["type"]).removeprefix("orbit.").removesuffix(".v1") for one in told]
    assert names == [
        "execution_started",
        "stage_completed",
        "stage_completed",
        "delivery_failed",
        "dead_lettered",
        "delivery_failed",
        "execution_finished",
    ]
    added = {"namespace", "profileId", "runProfileId", "runId"}
    for name, one in zip(names, told, strict=True):
        data = one["data"]
        assert isinstance(data, dict)
        assert data.keys() - added == CATALOGUE[EventType(name)].fields.keys()
        assert data["runId"] == cycle.cycle_id
    last = told[-1]["data"]
    assert isinstance(last, dict)
    assert (last["jobs"], last["dead"], last["attempts"], last["unknown"]) == (1, 1, 2, 0)


async def test_an_event_keeps_the_version_it_was_written_with(
    database: Database, clock: DatabaseClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A raised version goes out with what is written from then on; what is stored stays."""
    one = Event("ns", EventType.REQUEUED)
    async with database.transaction() as connection:
        await emit(connection, one)
    raised = replace(CATALOGUE[EventType.REQUEUED], version=2)
    monkeypatch.setattr(emission, "CATALOGUE", {**CATALOGUE, EventType.REQUEUED: raised})
    async with database.transaction() as connection:
        await emit(connection, one)
    events = await drained(database, new_id(clock.now()))
    assert [event["type"] for event in events] == ["orbit.requeued.v1", "orbit.requeued.v2"]
    assert await page(database, 0, namespaces="{ns}") == events
