"""sql/dead_letters.sql: a dead letter is decided on once, and comes back as a new job."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from orbit.clock import DatabaseClock, derived_id
from orbit.database.pool import Database
from orbit.database.queries import array, load
from orbit.execution.wire import Outcome, WireResult
from tests.database.engine import FAILED, SNAPSHOT_ID, Worker, add_snapshot, count, only

SQL = load("dead_letters")


@pytest.fixture
async def worker(database: Database, clock: DatabaseClock) -> Worker:
    """A worker with one dead letter."""
    await add_snapshot(database)
    made = Worker.new(database, clock)
    await made.begin_dispatch(max_attempts=1)
    (job,) = await made.take("one")
    await made.settle(job, FAILED)
    return made


async def dead(database: Database) -> dict[str, Any]:
    """The one dead letter."""
    job = await only(database, "SELECT job_id FROM dead_letter_dispatch")
    row = await database.fetch_one(SQL.dead_letter, job)
    assert row is not None
    return row


def asked(row: dict[str, Any]) -> dict[str, Any]:
    """A requeue of the dead letter as it was last seen."""
    number = row["sequence"] + 1
    return {
        "namespace": array([row["namespace"]]),
        "job_id": array([row["job_id"]]),
        "sequence": array([number]),
        "new_job_id": array([derived_id(row["cycle_id"], "requeue", row["job_id"], str(number))]),
        "snapshot_id": array([SNAPSHOT_ID]),
        "reason": "mended",
        "max_attempts": 4,
        "batch_id": None,
    }


def selection(**narrow: Any) -> dict[str, Any]:
    """Open dead letters of the namespace."""
    names = ("endpoint_key", "cause", "run_profile_id", "since", "until")
    return {"namespace": "brand-a", **dict.fromkeys(names), **narrow}


def window(**narrow: Any) -> dict[str, Any]:
    """The first of a selection."""
    return {**selection(**narrow), "after_job_id": None, "limit": 9}


async def test_a_requeued_dead_letter_is_a_new_job(worker: Worker) -> None:
    """With the same bytes, naming the old one, and due at once."""
    row = await dead(worker.database)
    assert (row["sequence"], row["has_payload"]) == (0, True)
    assert len(await worker.database.fetch_all(SQL.requeue, asked(row))) == 1
    (job,) = await worker.take("one")
    assert (job.content, job.attempt, job.max_attempts) == (b"an item", 1, 4)
    await worker.settle(job)
    found = await only(
        worker.database, "SELECT requeued_from FROM dispatch_job WHERE requeued_from IS NOT NULL"
    )
    assert found["requeued_from"] == row["job_id"]
    assert await count(worker.database, "cycle_checkpoint", "stage = 'cycle_finished'") == 1


async def test_two_people_cannot_both_decide_first(worker: Worker) -> None:
    """Of requeues and discards at once, exactly one is done."""
    row = await dead(worker.database)
    discard = {"namespace": row["namespace"], "job_id": row["job_id"], "reason": "no use"}
    results = await asyncio.gather(
        *[worker.database.fetch_all(SQL.requeue, asked(row)) for _ in range(2)],
        worker.database.fetch_all(SQL.discard, discard),
    )
    assert sum(map(len, results)) == 1
    assert await count(worker.database, "dead_letter_decision") == 1
    assert await count(worker.database, "dispatch_lease") <= 1


async def test_only_open_dead_letters_of_the_namespace_are_found(worker: Worker) -> None:
    """Narrowed by endpoint and cause; one that was decided on is not open."""
    narrowings: list[tuple[dict[str, Any], int]] = [
        ({}, 1),
        ({"endpoint_key": "one", "cause": "status 500"}, 1),
        ({"endpoint_key": "two"}, 0),
        ({"cause": "timeout"}, 0),
        ({"namespace": "brand-b"}, 0),
        ({"run_profile_id": "daily"}, 0),
        ({"after_job_id": (await dead(worker.database))["job_id"]}, 0),
    ]
    for narrow, expected in narrowings:
        found = await worker.database.fetch_all(SQL.open_dead_letters, {**window(), **narrow})
        assert len(found) == expected, narrow
    await worker.database.fetch_all(SQL.requeue, asked(await dead(worker.database)))
    assert await worker.database.fetch_all(SQL.open_dead_letters, window()) == []
    assert (await dead(worker.database))["decision"] == "requeued"


async def test_what_may_have_arrived_is_left_out(database: Database, clock: DatabaseClock) -> None:
    """An unknown attempt keeps a dead letter out of a bulk requeue, and is counted apart."""
    await add_snapshot(database)
    made = Worker.new(database, clock)
    await made.begin_dispatch(max_attempts=2)
    (first,) = await made.take("one")
    await made.settle(first, WireResult(Outcome.UNKNOWN, cause="worker lost"))
    await database.execute(b"UPDATE dispatch_lease SET due_at = orbit_now()")
    (second,) = await made.take("one")
    await made.settle(second, FAILED)
    assert (await dead(database))["unknown_attempt"] == 1
    assert await database.fetch_all(SQL.open_dead_letters, window()) == []
    found = await database.fetch_one(SQL.count_open_dead_letters, selection())
    counts = {"matching": 0, "may_have_arrived": 1, "without_payload": 0}
    assert found == {**counts, "endpoint_keys": []}
