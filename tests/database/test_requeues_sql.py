"""sql/requeues.sql and the steps of a bulk requeue: canaries, rate, stop, cancel, lost leases."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from cryptography.fernet import Fernet

from orbit.clock import DatabaseClock, new_id
from orbit.database.pool import Database
from orbit.database.repair import repair
from orbit.endpoints import Endpoint
from orbit.errors import NotFound, Refused, RequestInvalid
from orbit.execution.dead_letters import DeadLetters, Selection
from orbit.execution.dispatch import ClaimedJob
from orbit.execution.requeues import Pace, Requeues
from orbit.execution.snapshots import Snapshots
from orbit.reading.requeues import bulk_requeue, bulk_requeues
from orbit.services.requeuer import Requeuer
from orbit.vault import Vault
from tests.database.engine import (
    DELIVERED,
    FAILED,
    SNAPSHOT_ID,
    Worker,
    add_snapshot,
    count,
    expire,
    only,
)

LETTERS = Selection("brand-a")
OPEN = (
    "NOT EXISTS (SELECT FROM dead_letter_decision decision"
    " WHERE decision.job_id = dead_letter_dispatch.job_id)"
)


@dataclass(frozen=True, slots=True)
class Desk:
    """A namespace with dead letters, and nodes that carry bulk requeues on."""

    worker: Worker
    vault: Vault

    @property
    def database(self) -> Database:
        return self.worker.database

    def node(self, *, has_endpoint: bool = True) -> Requeues:
        """A node of its own, which may lack the endpoint."""
        endpoints = [Endpoint("one", "http://127.0.0.1:9/")] if has_endpoint else []
        snapshots = Snapshots(self.database, self.vault, endpoints, 1)
        letters = DeadLetters(self.database, snapshots, 1, lambda: None)
        clock = self.worker.clock
        return Requeues(self.database, clock, letters, new_id(clock.now()), 30.0)

    async def die(self, letters: int) -> None:
        """So many jobs become dead letters."""
        for _ in range(letters):
            await self.worker.begin_dispatch(max_attempts=1)
        for job in await self.worker.take("one", room=1000):
            await self.worker.settle(job, FAILED)

    async def take(self) -> list[ClaimedJob]:
        """The jobs that were requeued and are not out yet."""
        return await self.worker.take("one", room=1000)

    async def deliver(self) -> int:
        """Delivers what was requeued; how many those were."""
        jobs = await self.take()
        for job in jobs:
            await self.worker.settle(job, DELIVERED)
        return len(jobs)

    async def tick(self, seconds: float = 1.0) -> None:
        """Lets time go by for every batch."""
        await self.database.execute(
            b"UPDATE requeue_lease SET due_at = due_at - %(by)s * interval '1 second',"
            b" stepped_at = stepped_at - %(by)s * interval '1 second' WHERE batch_id IN"
            b" (SELECT batch_id FROM requeue_lease FOR UPDATE SKIP LOCKED)",
            {"by": seconds},
        )

    async def open(self) -> int:
        """How many dead letters nobody has touched."""
        return await count(self.database, "dead_letter_dispatch", OPEN)

    async def end(self) -> dict[str, Any]:
        """How the one batch ended."""
        return await only(
            self.database,
            "SELECT state, requeued, delivered, failed, pending, why, job_id"
            " FROM requeue_batch_end",
        )


async def begun(node: Requeues, reason: str, pace: Pace) -> str:
    """The id of a batch that found something."""
    batch_id, _ = await node.begin(LETTERS, reason, pace)
    assert batch_id is not None
    return batch_id


@pytest.fixture
async def desk(database: Database, clock: DatabaseClock) -> Desk:
    """Five dead letters."""
    await add_snapshot(database)
    made = Desk(Worker.new(database, clock), Vault([Fernet.generate_key().decode()]))
    await made.die(5)
    assert await made.open() == 5
    return made


async def test_canaries_go_first_and_the_rest_when_all_are_delivered(desk: Desk) -> None:
    """While a canary is out nothing else is requeued; the end counts every job."""
    node = desk.node()
    batch_id, found = await node.begin(LETTERS, "mended", Pace(canary=2))
    assert found.matching == 5
    assert await node.step()
    canaries = await desk.take()
    assert len(canaries) == 2
    await desk.worker.settle(canaries[0], DELIVERED)
    for _ in range(3):
        await desk.tick()
        assert await node.step()
    assert await desk.open() == 3
    await desk.worker.settle(canaries[1], DELIVERED)
    await desk.tick()
    assert await node.step()
    assert await desk.open() == 0
    assert await desk.deliver() == 3
    while await node.next_due() is not None:
        await desk.tick()
        await node.step()
    counts = {"requeued": 5, "delivered": 5, "failed": 0, "pending": 0}
    assert (await desk.end()).items() >= {"state": "finished", "job_id": None, **counts}.items()
    assert await count(desk.database, "dead_letter_decision", f"batch_id = '{batch_id}'") == 5


async def test_nothing_that_matches_is_no_batch(desk: Desk) -> None:
    """A selection without a dead letter leaves no batch and no lease behind."""
    node = desk.node()
    batch_id, found = await node.begin(Selection("brand-b"), "mended", Pace(canary=2))
    assert (batch_id, found.matching) == (None, 0)
    assert await count(desk.database, "requeue_batch") == 0
    assert await node.next_due() is None


async def test_a_failed_canary_stops_the_batch(desk: Desk) -> None:
    """The end names the job and its attempt; the others stay untouched dead letters."""
    node = desk.node()
    await node.begin(LETTERS, "mended", Pace(canary=1))
    await node.step()
    (job,) = await desk.take()
    await desk.worker.settle(job, FAILED)
    await desk.tick()
    await node.step()
    end = await desk.end()
    assert (end["state"], end["job_id"]) == ("stopped", job.job_id)
    assert end["why"] == f"attempt 1 of job {job.job_id}: status 500"
    assert await count(desk.database, "dead_letter_decision") == 1
    assert await desk.open() == 5, "four untouched, and the canary's own"
    await desk.tick(60)
    assert not await node.step()


@pytest.mark.parametrize(
    ("rate", "passes"),
    [(2.0, [2, 2, 1]), (0.5, [1, 0, 1, 0, 1]), (1000.0, [5])],
)
async def test_the_rate_is_kept_from_tick_to_tick(
    desk: Desk, rate: float, passes: list[int]
) -> None:
    """Each tick of a second gives what the rate allows and no more, however often one looks."""
    node = desk.node()
    await node.begin(LETTERS, "mended", Pace(rate=rate))
    found = []
    for _ in passes:
        while await node.step():
            pass
        found.append(await desk.deliver())
        await desk.tick()
    assert found == passes


async def test_a_worker_that_comes_late_does_not_make_up_for_it(desk: Desk) -> None:
    """After an outage the rate holds: an hour without a node is no burst."""
    node = desk.node()
    await node.begin(LETTERS, "mended", Pace(rate=2.0))
    await node.step()
    await desk.tick(3600)
    await node.step()
    assert await desk.deliver() == 4


@pytest.mark.parametrize("is_stopping", [True, False])
async def test_a_failure_stops_unless_told_otherwise(desk: Desk, is_stopping: bool) -> None:
    """The first failed attempt after the canaries stops the batch, or is counted."""
    node = desk.node()
    await node.begin(LETTERS, "mended", Pace(rate=1.0, is_stopping=is_stopping))
    await node.step()
    (job,) = await desk.take()
    await desk.worker.settle(job, FAILED)
    for _ in range(9):
        await desk.tick()
        await node.step()
        await desk.deliver()
    end = await desk.end()
    expected = ("stopped", 1, 0, 1) if is_stopping else ("finished", 5, 4, 1)
    assert (end["state"], end["requeued"], end["delivered"], end["failed"]) == expected


async def test_a_dead_canary_stops_in_any_case(desk: Desk) -> None:
    """To wait for a delivery that cannot come would be to wait for ever."""
    node = desk.node()
    await node.begin(LETTERS, "mended", Pace(canary=1, is_stopping=False))
    await node.step()
    (job,) = await desk.take()
    await desk.worker.settle(job, FAILED)
    await desk.tick()
    await node.step()
    assert (await desk.end())["state"] == "stopped"


async def test_another_node_goes_on_where_a_lost_one_ended(desk: Desk) -> None:
    """A node that lost its lease amid a step requeues nothing; the next does, and once."""
    first, second = desk.node(), desk.node()
    await first.begin(LETTERS, "mended", Pace(rate=2.0))
    claimed = await first.claim()
    assert claimed is not None
    assert not await second.step(), "the lease is the first's"
    await expire(desk.database, "requeue_lease")
    assert await second.step()
    await first.carry_on(claimed)
    assert await desk.open() == 3
    await desk.tick()
    assert await second.step()
    assert await desk.deliver() == 4
    assert await count(desk.database, "dead_letter_decision") == 4


async def test_a_worker_killed_amid_its_commit_leaves_nothing_half_done(
    desk: Desk, owner_dsn: str
) -> None:
    """Its jobs, decisions and cursor go together; the next node does the whole step."""
    first, second = desk.node(), desk.node()
    await first.begin(LETTERS, "mended", Pace(rate=2.0))
    async with await psycopg.AsyncConnection.connect(owner_dsn) as other:
        # Somebody decides on the second letter and has not committed: the step waits amid its work.
        await other.execute(
            "INSERT INTO dead_letter_decision (namespace, job_id, sequence, decision, reason)"
            " SELECT namespace, job_id, 1, 'discarded', 'x' FROM dead_letter_dispatch"
            " ORDER BY job_id OFFSET 1 LIMIT 1"
        )
        step = asyncio.create_task(first.step())
        assert await _killed(owner_dsn)
        with pytest.raises(psycopg.OperationalError):
            await step
        await other.rollback()
    assert await desk.open() == 5
    await expire(desk.database, "requeue_lease")
    assert await second.step()
    assert await desk.deliver() == 2
    assert await count(desk.database, "dead_letter_decision") == 2


async def _killed(owner_dsn: str) -> bool:
    """Ends the session that waits for another's lock, as soon as there is one."""
    deadline = time.monotonic() + 60
    async with await psycopg.AsyncConnection.connect(owner_dsn, autocommit=True) as owner:
        while time.monotonic() < deadline:
            cursor = await owner.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname ="
                " current_database() AND cardinality(pg_blocking_pids(pid)) > 0"
            )
            if await cursor.fetchone():
                return True
            await asyncio.sleep(0.01)
    return False


async def test_a_step_done_twice_counts_once(desk: Desk) -> None:
    """A step whose commit was not heard of and is repeated finds its lease moved."""
    node = desk.node()
    await node.begin(LETTERS, "mended", Pace(rate=2.0))
    claimed = await node.claim()
    assert claimed is not None
    await asyncio.gather(*(node.carry_on(claimed) for _ in range(3)))
    assert await desk.deliver() == 2


async def test_batches_over_the_same_letters_never_double(desk: Desk) -> None:
    """Several nodes work on several batches at once: each dead letter comes back once."""
    await desk.die(25)
    nodes = [desk.node() for _ in range(4)]
    for node in nodes[:3]:
        await node.begin(LETTERS, "mended", Pace(rate=7.0))

    async def work(node: Requeues) -> None:
        while await node.next_due() is not None:
            await desk.tick()
            await node.step()

    async def receive() -> None:
        while await count(desk.database, "requeue_lease"):
            await desk.deliver()

    await asyncio.gather(receive(), *map(work, nodes))
    assert await desk.open() == 0
    assert await count(desk.database, "dead_letter_decision") == 30
    assert await count(desk.database, "dispatch_job", "requeued_from IS NOT NULL") == 30
    ended = await desk.database.fetch_all(b"SELECT state, requeued FROM requeue_batch_end")
    assert {one["state"] for one in ended} == {"finished"}
    assert sum(one["requeued"] for one in ended) == 30


async def test_a_cancelled_batch_leaves_the_rest_alone(desk: Desk) -> None:
    """It ends at once, for the node amid a step too; it cannot end again."""
    node = desk.node()
    batch_id = await begun(node, "mended", Pace(rate=2.0))
    await node.step()
    await desk.tick()
    claimed = await node.claim()
    assert claimed is not None
    with pytest.raises(RequestInvalid):
        await node.cancel(batch_id, " ")
    await node.cancel(batch_id, "not now")
    await node.carry_on(claimed)
    end = await desk.end()
    assert (end["state"], end["why"], end["pending"]) == ("cancelled", "not now", 2)
    assert await desk.open() == 3
    with pytest.raises(Refused, match="cancelled before"):
        await node.cancel(batch_id, "once more")
    with pytest.raises(NotFound):
        await node.cancel(new_id(desk.worker.clock.now()), "which?")


async def test_what_dies_later_is_not_the_batch_s(desk: Desk) -> None:
    """What it brings back and what dies meanwhile is no food for it."""
    node = desk.node()
    await node.begin(LETTERS, "mended", Pace(rate=3.0, is_stopping=False))
    await desk.die(2)
    await node.step()
    for job in await desk.take():
        await desk.worker.settle(job, FAILED)
    while await node.next_due() is not None:
        await desk.tick()
        await node.step()
        await desk.deliver()
    end = await desk.end()
    assert (end["requeued"], end["failed"], end["delivered"]) == (5, 3, 2)
    assert await desk.open() == 5


async def test_a_node_without_the_endpoint_leaves_it_to_another(desk: Desk) -> None:
    """The step is given back with the reason; a node that knows the endpoint does it."""
    able, unable = desk.node(), desk.node(has_endpoint=False)
    with pytest.raises(Refused, match="not configured"):
        await unable.begin(LETTERS, "mended", Pace(rate=2.0))
    await able.begin(LETTERS, "mended", Pace(rate=2.0))
    assert await unable.step()
    lease = await only(desk.database, "SELECT last_error, node_id FROM requeue_lease")
    assert "endpoint one is not configured" in lease["last_error"]
    assert lease["node_id"] is None
    await desk.tick(10)
    assert await able.step()
    assert await desk.deliver() == 2


async def test_the_limit_bounds_canaries_and_the_rest(desk: Desk) -> None:
    """Not one more than was asked for comes back."""
    node = desk.node()
    await node.begin(LETTERS, "mended", Pace(canary=2, size_limit=3))
    while await node.next_due() is not None:
        await desk.tick()
        await node.step()
        await desk.deliver()
    assert await desk.open() == 2
    assert (await desk.end())["requeued"] == 3


async def test_a_lost_lease_is_rebuilt_from_what_was_asked(desk: Desk) -> None:
    """A batch whose lease is gone goes on after a repair, without doubling."""
    node = desk.node()
    await node.begin(LETTERS, "mended", Pace(canary=1, rate=2.0))
    await node.step()
    await desk.deliver()
    await desk.database.execute(b"DELETE FROM requeue_lease")
    assert (await repair(desk.database))["requeues"] == 1
    assert (await repair(desk.database))["requeues"] == 0
    while await node.next_due() is not None:
        await desk.tick()
        await node.step()
        await desk.deliver()
    assert (await desk.end())["requeued"] == 5
    assert (await repair(desk.database))["requeues"] == 0


async def test_a_selection_counts_what_it_takes_and_what_it_leaves(desk: Desk) -> None:
    """By endpoint, cause and time; what has no payload any more is counted apart."""
    await desk.database.execute(
        b"INSERT INTO dispatch_job (namespace, job_id, cycle_id, item_index, endpoint_key,"
        b" snapshot_id, digest, content_type, size, max_attempts) SELECT namespace, %s, cycle_id,"
        b" 1, endpoint_key, %s, 'gone', content_type, size, 1 FROM dispatch_job LIMIT 1",
        (new_id(desk.worker.clock.now()), SNAPSHOT_ID),
    )
    await desk.database.execute(
        b"INSERT INTO dead_letter_dispatch (namespace, job_id, cycle_id, endpoint_key, cause,"
        b" attempts) SELECT namespace, job_id, cycle_id, endpoint_key, 'status 410', 1"
        b" FROM dispatch_job WHERE digest = 'gone'"
    )
    times = await only(
        desk.database,
        "SELECT max(created_at) AS last, min(created_at) AS first FROM dead_letter_dispatch"
        " WHERE cause = 'status 500'",
    )
    letters = desk.node()._letters
    for selection, matching, without_payload in (
        (LETTERS, 5, 1),
        (Selection("brand-a", "one", "status 500"), 5, 0),
        (Selection("brand-a", cause="status 410"), 0, 1),
        (Selection("brand-a", "two"), 0, 0),
        (Selection("brand-b"), 0, 0),
        (Selection("brand-a", run_profile_id="daily"), 0, 0),
        (Selection("brand-a", "one", "status 500", since=times["last"]), 1, 0),
        (Selection("brand-a", until=times["first"]), 0, 0),
        (Selection("brand-a", "one", "status 500", None, times["first"], times["last"]), 4, 0),
    ):
        found = await letters.count(selection)
        counts = (found.matching, found.without_payload, found.may_have_arrived)
        assert counts == (matching, without_payload, 0), selection
        assert len(await letters.open(selection, 100)) == matching, selection


@pytest.mark.parametrize("has_batch", [False, True])
async def test_a_pass_with_nothing_due_takes_no_lock(
    desk: Desk, owner_dsn: str, has_batch: bool
) -> None:
    """With every lease locked against writers it still answers, and rests for a poll at most."""
    node = desk.node()
    requeuer = Requeuer(desk.database, node)
    if has_batch:
        await node.begin(LETTERS, "mended", Pace(rate=0.001))
        await requeuer.run_once()
        assert await count(desk.database, "dead_letter_decision") == 1
    async with await psycopg.AsyncConnection.connect(owner_dsn) as other:
        await other.execute("LOCK TABLE requeue_lease IN EXCLUSIVE MODE")
        async with asyncio.timeout(20):
            assert 0 < await requeuer.run_once() <= 1.0


async def test_a_pass_leaves_a_step_that_another_node_is_taking(desk: Desk, owner_dsn: str) -> None:
    """It neither waits for the other's lock nor asks without a rest; then the step is its own."""
    node = desk.node()
    requeuer = Requeuer(desk.database, node)
    await node.begin(LETTERS, "mended", Pace())
    async with await psycopg.AsyncConnection.connect(owner_dsn) as other:
        await other.execute("SELECT FROM requeue_lease FOR UPDATE")
        async with asyncio.timeout(20):
            assert await requeuer.run_once() > 0
        assert await count(desk.database, "dead_letter_decision") == 0
    await requeuer.run_once()
    assert await count(desk.database, "dead_letter_decision") == 5


async def test_a_resting_node_finds_what_another_began(desk: Desk) -> None:
    """A batch begun elsewhere is carried on without a wake; so is the next one after a rest."""
    other, requeuer = desk.node(), Requeuer(desk.database, desk.node())
    assert await requeuer.run_once() > 0
    requeuer.start()
    try:
        for requeued in (2, 5):
            await other.begin(LETTERS, "mended", Pace(size_limit=requeued))
            assert await _are_requeued(desk, requeued)
    finally:
        await requeuer.stop()


async def _are_requeued(desk: Desk, expected: int) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if await count(desk.database, "dead_letter_decision") == expected:
            return True
        await asyncio.sleep(0.01)
    return False


async def test_a_list_counts_each_batch_s_own_jobs_as_they_are_now(desk: Desk) -> None:
    """Running, ended with a job out and ended for good side by side, as each is shown alone."""
    node, database = desk.node(), desk.database
    done = await begun(node, "one", Pace(size_limit=1))
    await node.step()
    await desk.deliver()
    await desk.tick()
    await node.step()
    cancelled = await begun(node, "two", Pace(rate=2.0))
    await node.step()
    await node.cancel(cancelled, "not now")
    running = await begun(node, "three", Pace(canary=1))
    await node.step()

    async def shown() -> dict[str, tuple[object, ...]]:
        found = (await bulk_requeues(database)).items
        assert found == [await bulk_requeue(database, one.batch_id) for one in found]
        return {
            one.batch_id: (one.state, one.requeued, one.delivered, one.failed, one.pending)
            for one in found
        }

    assert list((await shown()).items()) == [
        (running, ("running", 1, 0, 0, 1)),
        (cancelled, ("cancelled", 2, 0, 0, 2)),
        (done, ("finished", 1, 1, 0, 0)),
    ]
    canary = await only(
        database, f"SELECT new_job_id FROM dead_letter_decision WHERE batch_id = '{running}'"
    )
    for job in await desk.take():
        is_canary = job.job_id == canary["new_job_id"]
        await desk.worker.settle(job, FAILED if is_canary else DELIVERED)
    assert await shown() == {
        running: ("running", 1, 0, 1, 0),
        cancelled: ("cancelled", 2, 2, 0, 0),
        done: ("finished", 1, 1, 0, 0),
    }
