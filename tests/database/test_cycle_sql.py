"""sql/cycle.sql: cycles accepted once, claimed fairly, fenced by their lease, ended once."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from orbit.clock import DatabaseClock, new_id
from orbit.database.pool import Database
from orbit.database.queries import load
from orbit.errors import IdempotencyKeyReused, LeaseLost
from orbit.execution.context import ClaimedCycle, Stage
from orbit.execution.initiation import Accepted, Intake, RevisionReplaced
from orbit.execution.recorder import Checkpoint, StageResult, StepRecord, release, renew
from orbit.payload import Payload
from orbit.profiles.model import Documents
from orbit.profiles.revision import Configuration
from tests.database.engine import Worker, count, enqueued, expire, only

SQL = load("cycle")


@pytest.fixture
def worker(database: Database, clock: DatabaseClock) -> Worker:
    """A worker on the fresh database."""
    return Worker.new(database, clock)


@pytest.fixture
def other(database: Database, clock: DatabaseClock) -> Worker:
    """Another node's worker."""
    return Worker.new(database, clock)


def tier_done(cycle: ClaimedCycle, content: bytes = b"draft") -> StageResult:
    """The first tier's result, with one record."""
    checkpoint = Checkpoint(Stage.TIER1_COMPLETE, Payload(content, "text/plain"))
    record = StepRecord(Stage.TIER1_COMPLETE, 0, 1, "mod:step", None, 0.1, 3, 5)
    return StageResult(cycle, [checkpoint], [record])


# ---- acceptance


async def test_an_accepted_cycle_has_all_its_rows(database: Database, worker: Worker) -> None:
    """Run, initiation, first payload, first checkpoint and lease exist together."""
    request = worker.request(payload=Payload(b"hello", "text/plain"), endpoint_keys=("one", "two"))
    assert await worker.accept(request) == [Accepted(request.cycle_id, True)]
    row = await only(
        database,
        "SELECT run.endpoint_keys, payload.content, done.stage, lease.lease_number,"
        " lease.due_at <= orbit_now() AS is_due FROM cycle_run run"
        " JOIN initiation USING (namespace, cycle_id) JOIN payload USING (namespace, cycle_id)"
        " JOIN cycle_checkpoint done USING (namespace, cycle_id)"
        " JOIN cycle_lease lease USING (namespace, cycle_id)",
    )
    assert row == {
        "endpoint_keys": ["one", "two"],
        "content": b"hello",
        "stage": "cycle_started",
        "lease_number": 0,
        "is_due": True,
    }


async def test_the_same_key_gets_the_first_cycle(database: Database, worker: Worker) -> None:
    """A repeated Idempotency-Key starts nothing and answers with the first one's id."""
    first = worker.request(idempotency_key="order-7")
    again = worker.request(idempotency_key="order-7")
    assert await worker.accept(first) == [Accepted(first.cycle_id, True)]
    assert await worker.accept(again) == [Accepted(first.cycle_id, False)]
    for table in ("cycle_run", "initiation", "cycle_checkpoint", "payload", "cycle_lease"):
        assert await count(database, table) == 1, table


async def test_the_same_key_twice_in_a_batch_is_one_cycle(
    database: Database, worker: Worker
) -> None:
    """Requests that share a commit are told apart by their initiation as well."""
    requests = [worker.request(idempotency_key=key) for key in ("a", "b", "a")]
    answers = await worker.accept(*requests)
    assert answers == [
        Accepted(requests[0].cycle_id, True),
        Accepted(requests[1].cycle_id, True),
        Accepted(requests[0].cycle_id, False),
    ]
    assert await count(database, "cycle_lease") == 2


async def test_a_key_used_for_something_else_is_refused(worker: Worker) -> None:
    """The same key with another payload is a mistake of the caller, told with the first id."""
    first = worker.request(idempotency_key="k", payload=Payload(b"one"))
    (_, refused) = await worker.accept(
        first, worker.request(idempotency_key="k", payload=Payload(b"two"))
    )
    assert isinstance(refused, IdempotencyKeyReused)
    assert refused.details["cycleRunId"] == first.cycle_id


async def test_the_key_of_another_namespace_is_another_key(worker: Worker) -> None:
    """An Idempotency-Key means nothing beyond its namespace and run profile."""
    requests = [
        worker.request("brand-a", idempotency_key="k"),
        worker.request("brand-b", idempotency_key="k"),
        worker.request("brand-a", idempotency_key="k", run_profile_id="daily", profile_id="nova"),
    ]
    assert all(answer.is_new for answer in await worker.accept(*requests))


async def test_a_repeated_commit_accepts_nothing_twice(database: Database, worker: Worker) -> None:
    """A batch whose answer was lost is sent again, and gets the same answer."""
    requests = [worker.request(payload=Payload(b"x")) for _ in range(3)]
    first = await worker.accept(*requests)
    await worker.claim()
    assert await worker.accept(*requests) == first
    assert await count(database, "cycle_run") == 3


async def test_two_connections_accept_a_key_once(
    database: Database, worker: Worker, other: Worker
) -> None:
    """Of batches that overlap, in opposite order and at once, each key starts one cycle."""
    keys = [f"key-{number}" for number in range(40)]
    batches = [
        [node.request(idempotency_key=key) for key in order]
        for node, order in ((worker, keys), (other, keys[::-1]))
    ]
    answers = await asyncio.gather(worker.accept(*batches[0]), other.accept(*batches[1]))
    assert [a.cycle_id for a in answers[0]] == [a.cycle_id for a in answers[1][::-1]]
    assert sum(answer.is_new for batch in answers for answer in batch) == 40
    assert await count(database, "cycle_run") == 40


async def test_a_cycle_of_a_replaced_revision_is_not_accepted(
    database: Database, worker: Worker, clock: DatabaseClock
) -> None:
    """What was prepared from an old configuration is made anew, and leaves nothing behind."""
    configuration = Configuration(database, worker.node_id, clock)
    await configuration.propose(Documents())
    active = configuration.active.revision
    requests = [worker.request(revision=revision) for revision in ("f" * 64, active, None)]
    answers = await worker.accept(*requests)
    assert isinstance(answers[0], RevisionReplaced)
    assert [answer.is_new for answer in answers[1:]] == [True, True]
    assert await count(database, "initiation_key") == 2


async def test_the_intake_answers_each_caller(database: Database, worker: Worker) -> None:
    """Callers that share a commit each get their own cycle, or their own refusal."""
    woken: list[int] = []
    intake = Intake(database, worker.node_id, lambda: woken.append(1))
    requests = [worker.request(idempotency_key=f"k{n % 5}") for n in range(20)]
    answers = await asyncio.gather(*map(intake.accept, requests))
    assert {a.cycle_id for a in answers} == {r.cycle_id for r in requests[:5]}
    assert woken
    with pytest.raises(IdempotencyKeyReused):
        await intake.accept(worker.request(idempotency_key="k0", payload=Payload(b"other")))


async def test_a_slot_is_accepted_once(worker: Worker, other: Worker) -> None:
    """Two nodes that fire the same slot get the same cycle."""
    slot_at = datetime(2026, 3, 29, 6, tzinfo=UTC)
    slot: dict[str, Any] = {
        "slot_at": slot_at,
        "trigger": "schedule",
        "run_profile_id": "daily",
        "profile_id": "n",
    }
    (first,) = await worker.accept(worker.request(**slot))
    (second,) = await other.accept(other.request(**slot))
    assert second == Accepted(first.cycle_id, False)


# ---- claims


async def test_a_claim_brings_the_cycle_as_it_stands(worker: Worker) -> None:
    """The claimed cycle has its last stage and that stage's output."""
    cycle = await worker.begin(payload=Payload(b"hello", "text/plain"))
    assert (cycle.lease_number, cycle.recoveries, cycle.stage) == (1, 0, Stage.CYCLE_STARTED)
    assert (cycle.content, cycle.content_type) == (b"hello", "text/plain")
    assert cycle.initiation["trigger"] == {"kind": "api", "cycleRunId": cycle.cycle_id}
    await worker.recorder.record(tier_done(cycle))
    await expire(worker.database, "cycle_lease")
    (again,) = await worker.claim()
    assert (again.stage, again.content, again.recoveries) == (Stage.TIER1_COMPLETE, b"draft", 1)


async def test_a_large_payload_does_not_come_with_the_claim(worker: Worker) -> None:
    """What is large is fetched when it is needed, so that a claim stays small."""
    cycle = await worker.begin(payload=Payload(b"x" * 70_000))
    assert (cycle.content, cycle.size) == (None, 70_000)


async def test_a_claim_is_shared_out_among_namespaces(worker: Worker) -> None:
    """A namespace with a long queue does not keep the others waiting."""
    await worker.accept(*[worker.request("busy") for _ in range(50)])
    await worker.accept(*[worker.request(f"calm-{n}") for n in range(3)])
    claimed = await worker.claim(room=8)
    share = [cycle.namespace for cycle in claimed]
    assert sorted(set(share)) == ["busy", "calm-0", "calm-1", "calm-2"]
    assert len(claimed) == 5
    assert share.count("busy") == 2


async def test_a_claim_takes_no_more_than_it_has_room_for(worker: Worker) -> None:
    """With more namespaces than room, the longest due go first."""
    requests = [worker.request(f"n-{n}") for n in range(9)]
    for request in requests:
        await worker.accept(request)
    claimed = await worker.claim(room=4)
    assert sorted(c.cycle_id for c in claimed) == sorted(r.cycle_id for r in requests[:4])


async def test_a_held_cycle_is_claimed_by_nobody_else(worker: Worker, other: Worker) -> None:
    """Only when its lease is over does a cycle go to another, under the next number."""
    cycle = await worker.begin()
    assert await other.claim() == []
    await expire(worker.database, "cycle_lease")
    (taken,) = await other.claim()
    assert (taken.lease_number, taken.recoveries) == (cycle.lease_number + 1, 1)


async def test_a_released_cycle_goes_on_at_once(worker: Worker, other: Worker) -> None:
    """A node that drains gives its cycles back; that does not count as a lost worker."""
    cycle = await worker.begin()
    async with worker.database.connection() as connection:
        await release(connection, worker.node_id, [cycle])
    (taken,) = await other.claim()
    assert (taken.lease_number, taken.recoveries) == (2, 0)
    with pytest.raises(LeaseLost):
        await worker.recorder.record(tier_done(cycle))


async def test_the_heartbeat_tells_what_is_still_held(worker: Worker, other: Worker) -> None:
    """A renewal prolongs our own leases and leaves out those that are lost."""
    await worker.accept(worker.request("a"), worker.request("b"))
    lost, kept = await worker.claim()
    await worker.database.execute(
        b"UPDATE cycle_lease SET due_at = orbit_now() WHERE cycle_id = %s", (lost.cycle_id,)
    )
    await other.claim()
    async with worker.database.connection() as connection:
        assert await renew(connection, worker.node_id, [lost, kept], 900) == {kept.cycle_id}
    row = await only(
        worker.database,
        "SELECT count(*)::int AS n FROM cycle_lease"
        " WHERE due_at > orbit_now() + interval '800 seconds'",
    )
    assert row["n"] == 1


# ---- the fence


@pytest.mark.parametrize("change", ["number", "node", "gone"])
async def test_a_worker_without_the_lease_writes_nothing(worker: Worker, change: str) -> None:
    """Under another number or node, or with no lease at all, a stage leaves no trace."""
    cycle = await worker.begin()
    if change == "number":
        cycle = replace(cycle, lease_number=cycle.lease_number + 1)
    elif change == "node":
        await worker.database.execute(b"UPDATE cycle_lease SET node_id = gen_random_uuid()")
    else:
        await worker.database.execute(b"DELETE FROM cycle_lease")
    for result in (tier_done(cycle), enqueued(cycle, ["one"]), failed(cycle)):
        with pytest.raises(LeaseLost):
            await worker.recorder.record(result)
    for table in ("execution_record", "normalized_item", "dispatch_job", "dispatch_lease"):
        assert await count(worker.database, table) == 0, table
    assert await count(worker.database, "cycle_checkpoint") == 1
    assert await count(worker.database, "payload") == 1


async def test_one_lost_lease_does_not_touch_the_rest_of_a_batch(
    worker: Worker, other: Worker
) -> None:
    """In a shared commit each cycle stands for itself."""
    await worker.accept(worker.request("a"), worker.request("b"))
    lost, kept = await worker.claim()
    await worker.database.execute(
        b"UPDATE cycle_lease SET lease_number = 9 WHERE cycle_id = %s", (lost.cycle_id,)
    )
    assert await worker.recorder._flush([tier_done(lost), tier_done(kept)]) == [False, True]
    assert await count(worker.database, "cycle_checkpoint", "stage = 'tier1_complete'") == 1


async def test_a_repeated_stage_changes_nothing(worker: Worker) -> None:
    """A batch whose answer was lost is flushed again: the first result stays."""
    cycle = await worker.begin()
    for content in (b"first", b"second"):
        assert await worker.recorder._flush([tier_done(cycle, content)]) == [True]
    row = await only(
        worker.database,
        "SELECT done.digest FROM cycle_checkpoint done WHERE stage = 'tier1_complete'",
    )
    assert row["digest"] == Payload(b"first").digest
    assert await count(worker.database, "execution_record") == 1


async def test_repeated_jobs_are_not_queued_again(worker: Worker) -> None:
    """A batch whose answer was lost is still ours; a repetition revives none of its jobs."""
    cycle = await worker.begin()
    result = enqueued(cycle, ["one", "two"])
    assert await worker.recorder._flush([result]) == [True]
    await worker.database.execute(b"DELETE FROM dispatch_lease WHERE endpoint_key = 'one'")
    assert await worker.recorder._flush([result]) == [True]
    assert await count(worker.database, "dispatch_job") == 2
    assert await count(worker.database, "dispatch_lease") == 1


async def test_a_repeated_end_is_still_ours_and_nobody_elses(worker: Worker, other: Worker) -> None:
    """Whose lease ended the cycle is told so again; another number or node lost it."""
    cycle = await worker.begin()
    result = StageResult(cycle, [Checkpoint(Stage.CYCLE_FAILED)], is_end=True)
    assert await worker.recorder._flush([result]) == [True]
    assert await worker.recorder._flush([result]) == [True]
    assert await other.recorder._flush([result]) == [False]
    late = replace(cycle, lease_number=cycle.lease_number + 1)
    assert await worker.recorder._flush([replace(result, cycle=late)]) == [False]


async def test_progress_begins_the_count_of_takeovers_anew(worker: Worker) -> None:
    """Only takeovers without a new checkpoint between them add up."""
    cycle = await worker.begin()
    for expected in (1, 2):
        await expire(worker.database, "cycle_lease")
        (cycle,) = await worker.claim()
        assert cycle.recoveries == expected
    await worker.recorder.record(tier_done(cycle))
    await expire(worker.database, "cycle_lease")
    (cycle,) = await worker.claim()
    assert cycle.recoveries == 1


# ---- the end


def failed(cycle: ClaimedCycle) -> StageResult:
    """The end of a cycle that failed."""
    return StageResult(cycle, [Checkpoint(Stage.CYCLE_FAILED, None, {"reason": "no"})], is_end=True)


async def test_a_cycle_that_waits_for_its_jobs_is_nobodys(worker: Worker) -> None:
    """Once its jobs are out the lease has no owner, is due never, and knows how many are out."""
    await worker.begin_dispatch(lanes=["one", "two"])
    row = await only(
        worker.database,
        "SELECT items, jobs, outstanding, node_id, due_at = 'infinity' AS is_resting"
        " FROM cycle_lease",
    )
    expected = {"items": 1, "jobs": 2, "outstanding": 2, "node_id": None, "is_resting": True}
    assert row == expected
    assert await worker.claim() == []


@pytest.mark.parametrize("stage", [Stage.CYCLE_FINISHED, Stage.CYCLE_FAILED])
async def test_an_ended_cycle_has_a_ledger_entry_and_no_lease(worker: Worker, stage: Stage) -> None:
    """A run profile's execution is metered once, with its tags and its state."""
    cycle = await worker.begin(
        profile_id="nova", run_profile_id="daily", value_tags={"cost_center": "a"}
    )
    await worker.recorder.record(StageResult(cycle, [Checkpoint(stage)], is_end=True))
    row = await only(
        worker.database,
        "SELECT status.state, ledger.state AS ledger_state, tags FROM value_ledger_entry ledger"
        " JOIN cycle_status status USING (namespace, cycle_id)",
    )
    state = stage.value.removeprefix("cycle_")
    assert row == {"state": state, "ledger_state": state, "tags": {"cost_center": "a"}}
    assert await count(worker.database, "cycle_lease") == 0


async def test_a_raw_cycle_is_not_metered(worker: Worker) -> None:
    """The value ledger is of run profiles; a raw cycle has none."""
    await worker.recorder.record(failed(await worker.begin()))
    assert await count(worker.database, "value_ledger_entry") == 0
    assert await count(worker.database, "cycle_lease") == 0


# ---- waiting


async def test_waiting_cycles_begin_one_after_the_other(worker: Worker) -> None:
    """A queued cycle begins when its predecessors are over, the oldest first."""
    profile = {"profile_id": "nova", "run_profile_id": "daily"}
    active = await worker.begin(**profile)
    waiting = [worker.request(**profile, is_waiting=True) for _ in range(2)]
    await worker.accept(*waiting)
    assert await worker.claim() == []
    await worker.recorder.record(failed(active))
    (next_one,) = await worker.claim()
    assert next_one.cycle_id == min(request.cycle_id for request in waiting)
    assert await worker.claim() == []
    await worker.recorder.record(failed(next_one))
    assert len(await worker.claim()) == 1


async def test_waiting_for_dispatch_counts_as_active(worker: Worker) -> None:
    """A cycle is active until its jobs are done, so its successor waits for them too."""
    profile = {"profile_id": "nova", "run_profile_id": "daily"}
    cycle = await worker.begin(**profile)
    await worker.accept(worker.request(**profile, is_waiting=True))
    await worker.enqueue(cycle, ["one"])
    assert await worker.claim() == []
    (job,) = await worker.take("one")
    await worker.settle(job)
    assert len(await worker.claim()) == 1


async def test_a_waiting_cycle_waits_for_its_own_run_profile_only(worker: Worker) -> None:
    """Another run profile's cycles, or another namespace's, hold nothing up."""
    await worker.begin(profile_id="nova", run_profile_id="other")
    await worker.begin("brand-b", profile_id="nova", run_profile_id="daily")
    await worker.accept(worker.request(profile_id="nova", run_profile_id="daily", is_waiting=True))
    assert len(await worker.claim()) == 1


async def test_an_id_of_no_partition_is_refused_alone(database: Database, worker: Worker) -> None:
    """A request that the database refuses fails by itself; the others in its batch go in."""
    intake = Intake(database, worker.node_id, lambda: None)
    bad = worker.request(cycle_id=new_id(datetime(2090, 1, 1, tzinfo=UTC)))
    good = [worker.request() for _ in range(3)]
    answers = await asyncio.gather(*map(intake.accept, [*good, bad]), return_exceptions=True)
    assert [isinstance(answer, Accepted) for answer in answers] == [True, True, True, False]
    assert "no partition" in str(answers[3])
    assert await count(database, "cycle_run") == 3
