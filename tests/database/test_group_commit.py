"""Group commit: batches form by themselves, an entry fails alone, a lost answer doubles nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orbit.clock import DatabaseClock
from orbit.database.group_commit import GroupCommit
from orbit.database.pool import Database
from orbit.execution.context import Stage
from orbit.execution.recorder import Checkpoint, NewJob, StageResult, StepRecord
from orbit.payload import Payload
from tests.chaos.harness import eventually
from tests.database.engine import SNAPSHOT_ID, Worker, count, enqueued, expire


class Ledger:
    """A flush that writes numbers into a table; 13 is refused by it."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.batches: list[list[int]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.entered = asyncio.Event()

    async def flush(self, entries: Sequence[int]) -> Sequence[int]:
        """One transaction; answers each number with its square."""
        self.batches.append(list(entries))
        self.entered.set()
        await self.gate.wait()
        async with self.database.transaction() as connection, connection.pipeline():
            for entry in entries:
                await connection.execute(
                    "INSERT INTO number VALUES (%s) ON CONFLICT DO NOTHING", (entry,)
                )
        return [entry * entry for entry in entries]


@pytest.fixture
async def ledger(database: Database, owner_dsn: str) -> Ledger:
    """A flush with a table of its own."""
    async with await psycopg.AsyncConnection.connect(owner_dsn, autocommit=True) as owner:
        await owner.execute("CREATE TABLE number (n int PRIMARY KEY CHECK (n <> 13))")
        await owner.execute("GRANT ALL ON number TO PUBLIC")
    return Ledger(database)


async def numbers(database: Database) -> list[int]:
    """What was committed."""
    return [row["n"] for row in await database.fetch_all(b"SELECT n FROM number ORDER BY n")]


async def test_what_arrives_during_a_flush_shares_the_next(ledger: Ledger) -> None:
    """Alone an entry goes at once; those that come meanwhile go together, in their order."""
    group = GroupCommit(ledger.database, ledger.flush)
    ledger.gate.clear()
    first = asyncio.create_task(group.commit(1))
    await ledger.entered.wait()
    rest = [asyncio.create_task(group.commit(n)) for n in range(2, 9)]
    await asyncio.sleep(0)  # lets them queue up behind the flush that is held
    ledger.gate.set()
    assert await asyncio.gather(first, *rest) == [n * n for n in range(1, 9)]
    assert ledger.batches == [[1], [2, 3, 4, 5, 6, 7, 8]]


async def test_a_batch_has_a_bound(ledger: Ledger) -> None:
    """By number of entries and by their weight; one that is too heavy goes alone."""
    group = GroupCommit(ledger.database, ledger.flush, batch_size=3)
    await asyncio.gather(*map(group.commit, range(1, 8)))
    assert [len(batch) for batch in ledger.batches] == [3, 3, 1]
    ledger.batches.clear()
    heavy = GroupCommit(ledger.database, ledger.flush, batch_bytes=10, weigh=lambda entry: entry)
    await asyncio.gather(*map(heavy.commit, [4, 5, 6, 50, 1]))
    assert ledger.batches == [[4, 5], [6], [50], [1]]


async def test_a_refused_entry_fails_alone(ledger: Ledger) -> None:
    """The database's refusal is its caller's; the others are committed."""
    group = GroupCommit(ledger.database, ledger.flush)
    answers = await asyncio.gather(*map(group.commit, [11, 12, 13, 14]), return_exceptions=True)
    assert answers[:2] == [121, 144]
    assert isinstance(answers[2], psycopg.errors.CheckViolation)
    assert answers[3] == 196
    assert await numbers(ledger.database) == [11, 12, 14]


async def test_an_entry_that_the_database_gives_up_again_and_again_fails_alone(
    ledger: Ledger,
) -> None:
    """A batch that always times out is not repeated for ever: the others of it are committed."""

    async def slow(entries: Sequence[int]) -> Sequence[int]:
        async with ledger.database.transaction() as connection:
            if 7 in entries:
                await connection.execute("SET LOCAL statement_timeout = '50ms'")
                await connection.execute("SELECT pg_sleep(5)")
        return await ledger.flush(entries)

    group = GroupCommit(ledger.database, slow)
    answers = await asyncio.gather(*map(group.commit, [6, 7, 8]), return_exceptions=True)
    assert [answers[0], answers[2]] == [36, 64]
    assert isinstance(answers[1], psycopg.errors.QueryCanceled)
    assert ledger.batches == [[6], [8]]


async def test_nobody_is_stranded_when_two_flushes_end_at_once(database: Database) -> None:
    """Who commits again in the very step in which all lanes end is taken along, not forgotten."""
    gate, both = asyncio.Event(), asyncio.Event()
    entered: list[int] = []

    async def flush(entries: Sequence[int]) -> Sequence[int]:
        entered.extend(entries)
        if len(entered) == 2:
            both.set()
        await gate.wait()
        return entries

    group = GroupCommit(database, flush, lanes=2, batch_size=1)

    async def commit_twice() -> int:
        return await group.commit(1) + await group.commit(3)

    async with asyncio.timeout(60):
        tasks = [asyncio.create_task(commit_twice()), asyncio.create_task(group.commit(2))]
        await both.wait()
        gate.set()
        assert await asyncio.gather(*tasks) == [4, 2]


async def test_a_cancelled_caller_leaves_the_others_alone(ledger: Ledger) -> None:
    """Who no longer waits, even for a refusal, does not take the batch with it."""
    group = GroupCommit(ledger.database, ledger.flush)
    ledger.gate.clear()
    tasks = [asyncio.create_task(group.commit(n)) for n in (12, 13, 14, 15)]
    await ledger.entered.wait()
    tasks[0].cancel()
    tasks[1].cancel()
    ledger.gate.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(answer, asyncio.CancelledError) for answer in answers[:2]] == [True, True]
    assert answers[2:] == [196, 225]
    await group.drained()
    assert await group.commit(16) == 256
    assert await numbers(ledger.database) == [12, 14, 15, 16]


async def test_drained_waits_for_what_is_under_way(ledger: Ledger) -> None:
    """A node that ends leaves nothing in its committers."""
    group = GroupCommit(ledger.database, ledger.flush)
    await group.drained()
    tasks = [asyncio.create_task(group.commit(n)) for n in (1, 2)]
    await asyncio.sleep(0)  # lets them queue up
    await group.drained()
    assert await numbers(ledger.database) == [1, 2]
    assert await asyncio.gather(*tasks) == [1, 4]


async def test_an_error_of_the_program_is_its_callers(ledger: Ledger) -> None:
    """A flush that breaks tells those who wait for it, and the next one works."""

    async def broken(entries: Sequence[int]) -> Sequence[int]:
        if 0 in entries:
            raise ZeroDivisionError
        return await ledger.flush(entries)

    group = GroupCommit(ledger.database, broken)
    with pytest.raises(ZeroDivisionError):
        await group.commit(0)
    assert await group.commit(3) == 9


async def test_a_backend_killed_in_mid_flush_doubles_nothing(
    database: Database, clock: DatabaseClock, owner_dsn: str
) -> None:
    """Stages in a transaction whose session is ended are flushed again, once each."""
    worker = Worker.new(database, clock)
    await worker.accept(*[worker.request() for _ in range(20)])
    cycles = await worker.claim()
    async with (
        await psycopg.AsyncConnection.connect(owner_dsn) as blocker,
        await psycopg.AsyncConnection.connect(owner_dsn, autocommit=True) as owner,
    ):
        await blocker.execute("LOCK TABLE normalized_item IN ACCESS EXCLUSIVE MODE")
        flushes = [
            asyncio.create_task(worker.recorder.record(enqueued(cycle, ["one"])))
            for cycle in cycles
        ]
        killed = 0
        while not killed:
            cursor = await owner.execute(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE"
                " datname = current_database() AND usename = 'orbit' AND wait_event_type = 'Lock'"
            )
            ((killed,),) = await cursor.fetchall()
        await blocker.rollback()
    await asyncio.gather(*flushes)
    for table in ("normalized_item", "dispatch_job", "dispatch_lease"):
        assert await count(database, table) == 20, table
    assert await count(database, "cycle_lease", "outstanding = 1") == 20


async def test_settlements_survive_sessions_that_are_ended(
    database: Database, clock: DatabaseClock, owner_dsn: str
) -> None:
    """While sessions are killed at random, every job is settled and counted exactly once."""
    worker = Worker.new(database, clock)
    await worker.accept(*[worker.request() for _ in range(60)])
    await asyncio.gather(*[worker.enqueue(c, ["one"]) for c in await worker.claim()])
    jobs = await worker.take("one", room=100)
    assert len(jobs) == 60
    settled = killed = 0

    async def kill() -> None:
        """Ends up to five sessions that are at work, one at a time."""
        nonlocal killed
        async with await psycopg.AsyncConnection.connect(owner_dsn, autocommit=True) as owner:
            while killed < 5 and settled < 60:
                cursor = await owner.execute(
                    "SELECT count(pg_terminate_backend(pid)) FROM (SELECT pid FROM"
                    " pg_stat_activity WHERE datname = current_database() AND usename = 'orbit'"
                    " AND state <> 'idle' LIMIT 1) AS one"
                )
                ((found,),) = await cursor.fetchall()
                killed += found

    async def has_killed() -> bool:
        return killed > 0

    async with await psycopg.AsyncConnection.connect(owner_dsn) as blocker:
        await blocker.execute("LOCK TABLE delivery_receipt IN EXCLUSIVE MODE")
        first = asyncio.gather(*map(worker.settle, jobs[:6]))
        killer = asyncio.create_task(kill())
        await eventually(has_killed, "the end of a session at work")
        await blocker.rollback()
    await first
    for start in range(6, 60, 6):
        await asyncio.gather(*map(worker.settle, jobs[start : start + 6]))
        settled = start
    settled = 60
    await killer
    assert await count(database, "delivery_receipt") == 60
    assert await count(database, "cycle_checkpoint", "stage = 'cycle_finished'") == 60
    assert await count(database, "cycle_lease") + await count(database, "dispatch_lease") == 0


async def test_a_stage_that_the_database_refuses_fails_alone(
    database: Database, clock: DatabaseClock
) -> None:
    """A bad value in one cycle's rows is that cycle's error, wherever in the batch it is."""
    worker = Worker.new(database, clock)
    await worker.accept(*[worker.request() for _ in range(4)])
    results = [enqueued(cycle, ["one"]) for cycle in await worker.claim()]
    bad = results[2]
    bad.jobs = [NewJob(bad.jobs[0].job_id, 0, "one", SNAPSHOT_ID, max_attempts=0)]
    answers = await asyncio.gather(*map(worker.recorder.record, results), return_exceptions=True)
    assert [type(answer) for answer in answers[:2]] == [type(None)] * 2
    assert isinstance(answers[2], psycopg.errors.CheckViolation)
    assert answers[3] is None
    assert await count(database, "dispatch_job") == 3
    assert await count(database, "cycle_checkpoint") == 4 + 2 * 3


_STAGES = [Stage.TIER1_COMPLETE, Stage.TIER2_COMPLETE, Stage.TIER3_COMPLETE]


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    moves=st.lists(
        st.tuples(st.integers(0, 1), st.sampled_from(["stage", "lose", "repeat"])), max_size=12
    )
)
async def test_a_stage_takes_effect_once_whoever_tries(
    database: Database, clock: DatabaseClock, moves: list[tuple[int, str]]
) -> None:
    """Two workers, leases lost and batches repeated in any order: each stage has one result."""
    workers = [Worker.new(database, clock) for _ in range(2)]
    cycle = await workers[0].begin()
    holders = [cycle, None]
    done = 0
    for who, move in moves:
        mine = holders[who]
        if move == "lose":
            await expire(database, "cycle_lease")
            holders[who] = next(
                (c for c in await workers[who].claim() if c.cycle_id == cycle.cycle_id), mine
            )
        elif mine is not None and done < len(_STAGES):
            stage = _STAGES[done]
            result = StageResult(
                mine,
                [Checkpoint(stage, Payload(f"{who} {done}".encode()))],
                [StepRecord(stage, 0, 1, "mod:step", None, 0.1, 1, 1)],
            )
            row = await database.fetch_one(
                b"SELECT node_id, lease_number FROM cycle_lease WHERE cycle_id = %s",
                (cycle.cycle_id,),
            )
            assert row is not None
            is_held = row["node_id"] == workers[who].node_id
            is_held &= row["lease_number"] == mine.lease_number
            for _ in range(2 if move == "repeat" else 1):
                assert await workers[who].recorder._flush([result]) == [is_held]
            done += is_held
    rows = await database.fetch_all(
        b"SELECT stage FROM cycle_checkpoint WHERE cycle_id = %s AND stage LIKE 'tier%%'"
        b" ORDER BY stage",
        (cycle.cycle_id,),
    )
    assert [row["stage"] for row in rows] == _STAGES[:done]
    where = f"cycle_id = '{cycle.cycle_id}'"
    assert await count(database, "execution_record", where) == done
