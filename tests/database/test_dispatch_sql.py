"""sql/dispatch.sql: jobs claimed lane by lane, settled once, recovered from dead workers."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from psycopg.rows import DictRow

from orbit.clock import DatabaseClock
from orbit.database.pool import Database
from orbit.database.queries import array
from orbit.execution.context import Stage
from orbit.execution.dispatch import SQL, ClaimedJob
from orbit.execution.wire import Outcome, WireResult
from tests.database.engine import (
    CYCLE,
    DELIVERED,
    FAILED,
    Worker,
    add_snapshot,
    count,
    expire,
    only,
)

NOT_SENT = WireResult(Outcome.NOT_SENT, cause="connection refused")


@pytest.fixture
async def worker(database: Database, clock: DatabaseClock) -> Worker:
    """A worker on the fresh database, with an endpoint."""
    await add_snapshot(database)
    return Worker.new(database, clock)


@pytest.fixture
def other(database: Database, clock: DatabaseClock) -> Worker:
    """Another node's worker."""
    return Worker.new(database, clock)


async def outcomes(database: Database, job: ClaimedJob) -> list[str]:
    """What became of a job's attempts, in order; every number up to the last must be there."""
    rows = await database.fetch_all(
        b"SELECT attempt, outcome FROM delivery_receipt WHERE job_id = %s ORDER BY attempt",
        (job.job_id,),
    )
    assert [row["attempt"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["outcome"] for row in rows]


class Cut(Database):
    """A pool whose connections the server ends just before what was claimed is read."""

    owner_dsn = ""

    async def fetch_one(self, query: bytes, params: Any = None) -> DictRow | None:
        """Cuts once."""
        if query == SQL.claimed_jobs and self.owner_dsn:
            with psycopg.connect(self.owner_dsn, autocommit=True) as connection:
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name = 'orbit' AND datname = current_database()"
                )
            self.owner_dsn = ""
        return await super().fetch_one(query, params)


# ---- lanes and claims


async def test_a_claim_outlives_the_connection_that_it_was_made_on(
    worker: Worker, dsn: str, owner_dsn: str, clock: DatabaseClock
) -> None:
    """What is claimed is also known: else it would end as unknown, though no byte has left."""
    await worker.begin_dispatch()
    cut = Cut(dsn, minimum=1, maximum=4)
    await cut.open()
    node = Worker.new(cut, clock)
    await node.queue.lanes()
    cut.owner_dsn = owner_dsn
    (job,) = await node.take("one")
    assert not cut.owner_dsn, "it was cut"
    await node.settle(job)
    assert await outcomes(cut, job) == ["delivered"]
    await cut.close()


async def test_lanes_are_what_has_a_job_to_send(worker: Worker) -> None:
    """Every lane with a job due now or later is listed; one whose jobs are all out is not."""
    await worker.begin_dispatch(lanes=["one", "two"])
    await worker.begin_dispatch("brand-b", lanes=["one"])
    (job,) = await worker.take("two")
    found = await worker.queue.lanes()
    assert [(lane.namespace, lane.endpoint_key) for lane in found] == [
        ("brand-a", "one"),
        ("brand-b", "one"),
    ]
    assert all(lane.due_in_seconds <= 0 for lane in found)
    await worker.settle(job, WireResult(Outcome.FAILED, status=503, retry_after="60"))
    two = next(lane for lane in await worker.queue.lanes() if lane.endpoint_key == "two")
    assert two.due_in_seconds > -1


async def test_a_claim_opens_the_next_attempt(worker: Worker) -> None:
    """A claimed job has its number committed, its bytes and its headers' facts at hand."""
    cycle = await worker.begin_dispatch()
    (job,) = await worker.take("one")
    assert (job.cycle_id, job.attempt, job.lease_number) == (cycle.cycle_id, 1, 1)
    assert (job.content, job.content_type, job.max_attempts) == (b"an item", "text/plain", 4)
    row = await only(worker.database, "SELECT attempt, node_id FROM dispatch_lease")
    assert row == {"attempt": 1, "node_id": worker.node_id}


async def test_each_lane_has_its_own_room(worker: Worker) -> None:
    """As many of each lane as the caller can take, and of no lane it did not name."""
    for _ in range(5):
        await worker.begin_dispatch(lanes=["fast", "slow", "halted"])
    await worker.queue.lanes()
    jobs = await worker.queue.claim({("brand-a", "fast"): 4, ("brand-a", "slow"): 1}, 64)
    assert sorted(job.endpoint_key for job in jobs) == ["fast"] * 4 + ["slow"]


async def test_two_workers_never_open_the_same_attempt(worker: Worker, other: Worker) -> None:
    """Claims at once divide the jobs among them."""
    for _ in range(12):
        await worker.begin_dispatch()
    claimed = await asyncio.gather(
        *[node.take("one", room=4) for node in (worker, other) for _ in range(3)]
    )
    ids = [job.job_id for jobs in claimed for job in jobs]
    assert len(ids) == len(set(ids))
    rest = await worker.take("one", room=20)
    assert len(ids) + len(rest) == 12


async def test_a_released_job_gives_its_number_back(worker: Worker, other: Worker) -> None:
    """No byte left, so the attempt did not happen; the job is due at once."""
    await worker.begin_dispatch()
    (job,) = await worker.take("one")
    await worker.queue.release([job])
    (again,) = await other.take("one")
    assert (again.attempt, again.lease_number) == (1, 2)
    await worker.queue.release([job])
    row = await only(worker.database, "SELECT attempt, node_id FROM dispatch_lease")
    assert row == {"attempt": 1, "node_id": other.node_id}


async def test_a_renewal_prolongs_what_is_ours(worker: Worker, other: Worker) -> None:
    """The heartbeat names the jobs whose lease it prolonged; a lost one is not among them."""
    await worker.begin_dispatch(lanes=["one", "two"])
    lost, kept = sorted(await worker.take("one", "two"), key=lambda job: job.endpoint_key)
    await worker.database.execute(
        b"UPDATE dispatch_lease SET lease_number = 7 WHERE job_id = %s", (lost.job_id,)
    )
    assert await worker.queue.renew([lost, kept]) == {(kept.job_id, 1)}
    assert await other.queue.renew([kept]) == set()


# ---- settling


async def test_a_delivered_job_ends_its_cycle(worker: Worker) -> None:
    """Receipt, lease, counters, checkpoints and ledger go in together with the last job."""
    cycle = await worker.begin(profile_id="nova", run_profile_id="daily", value_tags={"c": "a"})
    await worker.enqueue(cycle, ["one"])
    (job,) = await worker.take("one")
    await worker.settle(job)
    assert await outcomes(worker.database, job) == ["delivered"]
    assert await count(worker.database, "dispatch_lease") == 0
    assert await count(worker.database, "cycle_lease") == 0
    stages = await worker.database.fetch_all(
        b"SELECT stage, detail ->> 'delivered' AS delivered FROM cycle_checkpoint"
        b" WHERE stage IN ('dispatch_complete', 'cycle_finished') ORDER BY stage"
    )
    assert [(row["stage"], row["delivered"]) for row in stages] == [
        (Stage.CYCLE_FINISHED, "1"),
        (Stage.DISPATCH_COMPLETE, "1"),
    ]
    row = await only(
        worker.database,
        "SELECT state, items, jobs, delivered, dead_lettered, attempts, bytes"
        " FROM value_ledger_entry",
    )
    assert list(row.values()) == ["finished", 1, 1, 1, 0, 1, 7]


async def test_a_failed_job_waits_for_its_next_attempt(worker: Worker) -> None:
    """It keeps its lease, without an owner, and its cycle goes on waiting."""
    await worker.begin_dispatch()
    (first,) = await worker.take("one")
    await worker.settle(first, FAILED)
    row = await only(worker.database, "SELECT outstanding, attempts FROM cycle_lease")
    assert row == {"outstanding": 1, "attempts": 0}
    (second,) = await worker.take("one")
    assert (second.job_id, second.attempt) == (first.job_id, 2)
    await worker.settle(second)
    assert await outcomes(worker.database, first) == ["failed", "delivered"]


async def test_a_job_out_of_retries_is_dead_and_its_cycle_finishes(worker: Worker) -> None:
    """The dead letter has the cause and the number of attempts; the cycle says how many died."""
    await worker.begin_dispatch(lanes=["one", "two"], max_attempts=2)
    (fine,) = await worker.take("two")
    await worker.settle(fine)
    (job,) = await worker.take("one")
    await worker.settle(job, NOT_SENT)
    (job,) = await worker.take("one")
    await worker.settle(job, FAILED)
    row = await only(worker.database, "SELECT job_id, cause, attempts FROM dead_letter_dispatch")
    assert row == {"job_id": job.job_id, "cause": "status 500", "attempts": 2}
    row = await only(worker.database, "SELECT state, dead_lettered FROM cycle_status")
    assert row == {"state": "finished", "dead_lettered": 1}


async def test_a_permanent_status_is_dead_at_once(worker: Worker) -> None:
    """An endpoint may say which answers no retry can mend."""
    await worker.begin_dispatch()
    (job,) = await worker.take("one")
    now = worker.clock.now()
    gone = WireResult(Outcome.FAILED, status=410, cause="status 410")
    await worker.queue.settle(job, gone, now, now, permanent_statuses={410})
    assert await count(worker.database, "dead_letter_dispatch", "attempts = 1") == 1


async def test_a_late_worker_tells_the_truth_and_moves_nothing(
    worker: Worker, other: Worker
) -> None:
    """Who lost the lease cannot settle the job; the attempt stands as unknown already."""
    await worker.begin_dispatch()
    (late,) = await worker.take("one")
    await expire(worker.database, "dispatch_lease")
    assert await other.queue.recover(other.clock.now()) == 1
    (again,) = await other.take("one")
    await worker.settle(late)
    assert await outcomes(worker.database, late) == ["unknown"]
    row = await only(worker.database, "SELECT node_id, attempt FROM dispatch_lease")
    assert row == {"node_id": other.node_id, "attempt": 2}
    await other.settle(again)
    assert await outcomes(worker.database, late) == ["unknown", "delivered"]
    assert await count(worker.database, "cycle_lease") == 0


async def test_a_receipt_without_the_lease_is_still_written(worker: Worker) -> None:
    """If the lease was lost but the attempt has no end yet, what the wire said is recorded."""
    await worker.begin_dispatch()
    (job,) = await worker.take("one")
    await worker.database.execute(b"DELETE FROM dispatch_lease")
    await worker.settle(job)
    assert await outcomes(worker.database, job) == ["delivered"]
    assert (await only(worker.database, "SELECT outstanding FROM cycle_lease"))["outstanding"] == 1


async def test_a_requeued_job_does_not_count_in_its_cycle(worker: Worker) -> None:
    """The cycle has ended for the job, or still waits for others: its counters stay."""
    await worker.begin_dispatch(lanes=["one", "two"])
    await worker.database.execute(
        b"UPDATE dispatch_lease SET is_requeued = true WHERE endpoint_key = 'one'"
    )
    (job,) = await worker.take("one")
    await worker.settle(job)
    row = await only(worker.database, "SELECT outstanding, delivered, attempts FROM cycle_lease")
    assert row == {"outstanding": 2, "delivered": 0, "attempts": 0}


async def test_a_repeated_flush_counts_nothing_twice(worker: Worker) -> None:
    """A batch whose answer was lost is flushed again: no second receipt, no second count."""
    await worker.begin_dispatch(lanes=["one", "two"])
    (job,) = await worker.take("one")
    now = worker.clock.now()
    batches = []
    flush = worker.queue._settlements._flush

    async def twice(entries: object) -> object:
        batches.append(await flush(entries))  # type: ignore[arg-type]  # handed on as it came
        return await flush(entries)  # type: ignore[arg-type]

    worker.queue._settlements._flush = twice  # type: ignore[assignment]
    await worker.queue.settle(job, DELIVERED, now, now)
    assert batches
    row = await only(worker.database, "SELECT outstanding, delivered, attempts FROM cycle_lease")
    assert row == {"outstanding": 1, "delivered": 1, "attempts": 1}
    assert await outcomes(worker.database, job) == ["delivered"]


async def test_exactly_one_of_two_completers_ends_the_cycle(worker: Worker, other: Worker) -> None:
    """The last two jobs of a cycle, settled at once by two nodes, end it once."""
    for _ in range(10):
        cycle = await worker.begin(profile_id="nova", run_profile_id="daily")
        await worker.enqueue(cycle, ["one", "two"])
        (first,) = await worker.take("one")
        (second,) = await other.take("two")
        await asyncio.gather(worker.settle(first), other.settle(second))
    assert await count(worker.database, "cycle_lease") == 0
    assert await count(worker.database, "value_ledger_entry", "delivered = 2") == 10
    assert await count(worker.database, "cycle_checkpoint", "stage = 'cycle_finished'") == 10


async def test_a_cycle_with_jobs_out_is_not_ended(worker: Worker) -> None:
    """Touching a cycle whose jobs are not all done ends nothing."""
    cycle = await worker.begin_dispatch()
    touched = {
        "namespace": array([cycle.namespace]),
        "cycle_id": array([cycle.cycle_id]),
        "first": cycle.cycle_id,
        "last": cycle.cycle_id,
        "node_id": worker.node_id,
    }
    assert await worker.database.fetch_all(CYCLE.end_dispatched, touched) == []
    assert await count(worker.database, "cycle_lease") == 1


# ---- recovery


async def test_an_expired_attempt_becomes_unknown_and_is_sent_again(
    worker: Worker, other: Worker
) -> None:
    """A dead worker's open attempt is accounted for before the next one begins."""
    await worker.begin_dispatch()
    (job,) = await worker.take("one")
    assert await other.queue.recover(other.clock.now()) == 0
    await expire(worker.database, "dispatch_lease")
    assert await other.take("one") == []
    assert await other.queue.recover(other.clock.now()) == 1
    assert await other.queue.recover(other.clock.now()) == 0
    (again,) = await other.take("one")
    assert (again.job_id, again.attempt) == (job.job_id, 2)
    row = await only(worker.database, "SELECT node_id, error FROM delivery_receipt")
    assert row == {"node_id": worker.node_id, "error": "the worker's lease ran out"}


async def test_the_last_attempts_loss_makes_a_dead_letter(worker: Worker, other: Worker) -> None:
    """A worker that dies in the last attempt leaves a dead letter, and a cycle that finishes."""
    await worker.begin_dispatch(max_attempts=1)
    await worker.take("one")
    await expire(worker.database, "dispatch_lease")
    await other.queue.recover(other.clock.now() + timedelta(seconds=1))
    row = await only(worker.database, "SELECT cause, attempts FROM dead_letter_dispatch")
    assert row == {"cause": "worker lost", "attempts": 1}
    assert await count(worker.database, "cycle_lease") == 0


async def test_recoveries_at_once_divide_the_work(worker: Worker, other: Worker) -> None:
    """Each expired attempt is settled by one of them, and none waits for another."""
    for _ in range(10):
        await worker.begin_dispatch()
    assert len(await worker.take("one")) == 10
    await expire(worker.database, "dispatch_lease")
    now = other.clock.now()
    counts = await asyncio.gather(*[other.queue.recover(now, limit=4) for _ in range(3)])
    counts += [await other.queue.recover(now)]
    assert sum(counts) == 10
    assert await count(worker.database, "delivery_receipt") == 10
