"""Locks: whatever nodes do at once, nobody waits in a circle, and claims wait for nobody."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable

import psycopg
import pytest
from psycopg import AsyncConnection

from orbit.clock import DatabaseClock
from orbit.database.pool import Database
from orbit.endpoints import Breaker, Endpoint
from orbit.execution.context import ClaimedCycle
from orbit.execution.dispatch import ClaimedJob
from orbit.execution.recorder import renew
from orbit.payload import Payload
from tests.database.engine import (
    DELIVERED,
    FAILED,
    Worker,
    count,
    enqueued,
)

LANES = ("one", "two", "three")
CYCLES = 240
_TOUCHY = Breaker(failures=4, hold_seconds=0.05, longest_hold_seconds=0.1)


@pytest.fixture
async def owner(owner_dsn: str, database_name: str) -> AsyncIterator[AsyncConnection]:
    """A superuser's session; every session from here on notices a deadlock within 5 ms."""
    async with await AsyncConnection.connect(owner_dsn, autocommit=True) as connection:
        for setting in ("deadlock_timeout = '5ms'", "log_lock_waits = off"):
            await connection.execute(f"ALTER DATABASE {database_name} SET {setting}".encode())
        yield connection


@pytest.fixture
async def workers(
    owner: AsyncConnection, dsn: str, clock: DatabaseClock
) -> AsyncIterator[list[Worker]]:
    """Three nodes, each with a pool of its own."""
    pools = [Database(dsn, minimum=3, maximum=6) for _ in range(3)]
    for pool in pools:
        await pool.open()
    yield [Worker.new(pool, clock) for pool in pools]
    for pool in pools:
        await pool.close()


async def deadlocks(owner: AsyncConnection) -> int:
    """How many deadlocks this database has had."""
    await owner.execute("SELECT pg_stat_clear_snapshot()")
    cursor = await owner.execute(
        "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    )
    ((found,),) = await cursor.fetchall()
    return int(found)


class Node:
    """What one node does at random, over and over, until the work is done."""

    def __init__(self, worker: Worker, chance: random.Random, errors: list[str]) -> None:
        self.worker, self.chance, self.errors = worker, chance, errors
        self.cycles: list[ClaimedCycle] = []
        self.jobs: list[ClaimedJob] = []

    async def run(self, is_done: asyncio.Event) -> None:
        """Several things at once, as a node's loops do them."""
        moves: list[Callable[[], Awaitable[object]]] = [
            self.claim,
            self.record,
            self.beat,
            self.take,
            self.settle,
            self.recover,
            self.forget,
        ]
        await asyncio.gather(*[self.loop(move, is_done) for move in moves])

    async def loop(self, move: Callable[[], Awaitable[object]], is_done: asyncio.Event) -> None:
        """One loop; a deadlock would be an error here."""
        while not is_done.is_set():
            try:
                await move()
            except psycopg.Error as error:
                self.errors.append(f"{move.__name__}: {error}")
            await asyncio.sleep(self.chance.random() / 500)

    async def claim(self) -> None:
        self.cycles += await self.worker.claim(room=60)

    async def record(self) -> None:
        batch, self.cycles = self.cycles, []
        self.chance.shuffle(batch)
        if batch:
            await self.worker.recorder._flush([enqueued(cycle, LANES) for cycle in batch])

    async def beat(self) -> None:
        cycles, jobs = list(self.cycles), list(self.jobs)
        self.chance.shuffle(cycles)
        self.chance.shuffle(jobs)
        async with self.worker.database.connection() as connection:
            await renew(connection, self.worker.node_id, cycles, 30.0)
        await self.worker.queue.renew(jobs)

    async def take(self) -> None:
        jobs = await self.worker.take(*LANES, room=30)
        self.jobs += jobs

    async def settle(self) -> None:
        batch = list(self.jobs)
        self.chance.shuffle(batch)
        await asyncio.gather(
            *[self.worker.settle(job, self.chance.choice([DELIVERED, FAILED])) for job in batch]
        )
        self.jobs = [job for job in self.jobs if job not in batch]

    async def recover(self) -> None:
        await self.worker.queue.recover(self.worker.clock.now(), limit=50)

    async def forget(self) -> None:
        """Lets leases run out under their holders, who go on as if nothing had happened."""
        for lease, share in (("cycle_lease", 0.1), ("dispatch_lease", 0.2)):
            await self.worker.database.execute(
                f"UPDATE {lease} SET due_at = orbit_now() WHERE ctid IN (SELECT ctid FROM {lease}"
                f" WHERE node_id IS NOT NULL AND random() < {share}"
                " FOR UPDATE SKIP LOCKED)".encode()
            )


async def test_nobody_waits_in_a_circle(workers: list[Worker], owner: AsyncConnection) -> None:
    """All loops of three nodes at random, with leases that run out under them: no deadlock.

    The lanes' breakers open and close all the time.
    """
    touchy = Endpoint("any", "http://127.0.0.1:9/", max_concurrency=50, breaker=_TOUCHY)
    workers = [Worker.new(one.database, one.clock, endpoint=touchy) for one in workers]
    for worker in workers:
        await worker.accept(
            *[worker.request(payload=Payload(b"x")) for _ in range(CYCLES // len(workers))]
        )
    before = await deadlocks(owner)
    chance, errors, is_done = random.Random(7), list[str](), asyncio.Event()
    nodes = [Node(worker, random.Random(chance.random()), errors) for worker in workers]
    running = [asyncio.create_task(node.run(is_done)) for node in nodes]
    async with asyncio.timeout(300):
        while await count(workers[0].database, "cycle_lease"):  # noqa: ASYNC110 - nodes say nothing
            await asyncio.sleep(0.05)  # looks again; the work itself is what is waited for
    is_done.set()
    await asyncio.gather(*running)
    assert errors == []
    assert await deadlocks(owner) == before
    database = workers[0].database
    assert await count(database, "cycle_status", "state = 'finished'") == CYCLES
    assert await count(database, "dispatch_lease") == 0
    doubled = await database.fetch_all(
        b"SELECT job_id FROM delivery_receipt GROUP BY job_id"
        b" HAVING count(*) FILTER (WHERE outcome = 'delivered') > 1 OR count(*) <> max(attempt)"
    )
    assert doubled == []
    jobs = await count(database, "delivery_receipt", "outcome = 'delivered'")
    dead = await count(database, "dead_letter_dispatch")
    assert jobs + dead == CYCLES * len(LANES)
    assert await count(database, "delivery_receipt", "outcome = 'unknown'") > 0


async def test_claims_wait_for_nobody(workers: list[Worker], owner_dsn: str) -> None:
    """With every lease locked by somebody, claims and recoveries come back empty at once."""
    worker = workers[0]
    await worker.accept(*[worker.request() for _ in range(10)])
    await asyncio.gather(*[worker.enqueue(cycle, ["one"]) for cycle in await worker.claim()])
    await worker.accept(*[worker.request() for _ in range(5)])
    async with await AsyncConnection.connect(owner_dsn) as holder:
        await holder.execute("SELECT FROM cycle_lease FOR UPDATE")
        await holder.execute("SELECT FROM dispatch_lease FOR UPDATE")
        async with asyncio.timeout(60):
            assert await worker.claim() == []
            assert await worker.take("one") == []
            assert await worker.queue.recover(worker.clock.now()) == 0
        await holder.rollback()
    assert len(await worker.claim()) == 5
    assert len(await worker.take("one")) == 10


async def test_a_heartbeat_does_not_wait_for_a_settlement(
    workers: list[Worker], owner_dsn: str
) -> None:
    """A job that is being settled needs no longer lease: the others' are prolonged at once."""
    worker = workers[0]
    await worker.begin_dispatch(lanes=LANES)
    jobs = await worker.take(*LANES)
    async with await AsyncConnection.connect(owner_dsn) as settling:
        await settling.execute("DELETE FROM dispatch_lease WHERE job_id = %s", (jobs[0].job_id,))
        async with asyncio.timeout(60):
            assert await worker.queue.renew(jobs) == {
                (job.job_id, job.lease_number) for job in jobs[1:]
            }


async def test_a_late_settlement_and_a_recovery_do_not_lock_each_other_out(
    workers: list[Worker], owner: AsyncConnection
) -> None:
    """Leases that run out just as their workers finish: each attempt ends once, no deadlock."""
    late, other = workers[0], workers[1]
    before = await deadlocks(owner)
    for _ in range(15):
        await late.accept(*[late.request() for _ in range(12)])
        await asyncio.gather(*[late.enqueue(c, LANES) for c in await late.claim()])
        jobs = await late.take(*LANES, room=40)
        await late.database.execute(b"UPDATE dispatch_lease SET due_at = orbit_now()")
        now = other.clock.now()
        await asyncio.gather(
            *[late.settle(job) for job in jobs[::-1]],
            *[other.queue.recover(now, limit=9) for _ in range(4)],
        )
        await late.database.execute(b"UPDATE dispatch_lease SET due_at = orbit_now()")
        await other.queue.recover(now)
        rest = await other.take(*LANES, room=40)
        await asyncio.gather(*[other.settle(job) for job in rest])
    assert await deadlocks(owner) == before
    assert await count(late.database, "cycle_lease") == 0
    assert await count(late.database, "cycle_status", "state = 'finished'") == 15 * 12
