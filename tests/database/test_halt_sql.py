"""The halt of a namespace at the database: fence, epoch, proof, resumption, rules."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import timedelta

import psycopg
import pytest
from psycopg.errors import LockNotAvailable

from orbit.clock import DatabaseClock
from orbit.database.pool import Database
from orbit.database.queries import load
from orbit.database.repair import repair
from orbit.errors import (
    HaltedAnew,
    NamespaceHalted,
    NotHalted,
    RequestInvalid,
    SecondPersonRequired,
)
from orbit.execution.cycle import MOST_FENCES
from orbit.execution.dispatch import ClaimedJob
from orbit.governance.fence import Fences
from orbit.governance.halt import Brake, Halted, Order
from orbit.governance.rules import set_two_persons
from orbit.services.dispatcher import _of_few_namespaces
from orbit.services.fence_keeper import FenceKeeper
from tests.chaos.harness import eventually
from tests.database.engine import Worker, add_snapshot, count, expire, only

REPAIR_SQL = load("repair")
SPACE, OTHER = "brand-a", "brand-b"
ANN, BEN = ("ann", "key-1"), ("ben", "key-2")
CLAIMERS, HALTS = 24, 40


def order(who: tuple[str, str] = ANN, reason: str | None = "a test", space: str = SPACE) -> Order:
    """What somebody wants of the namespace."""
    return Order(space, who[0], who[1], reason)


def brake_of(worker: Worker) -> Brake:
    """A brake that settles what is lost with the worker's queue."""

    async def recover(namespace: str) -> None:
        await worker.queue.recover(worker.clock.now(), of=namespace)

    return Brake(worker.database, worker.node_id, recover=recover, on_changed=lambda: None)


@pytest.fixture
async def pool(dsn: str) -> AsyncIterator[Database]:
    """A pool for many claimers at once."""
    found = Database(dsn, minimum=CLAIMERS, maximum=CLAIMERS)
    await found.open()
    yield found
    await found.close()


@pytest.fixture
def worker(database: Database, clock: DatabaseClock) -> Worker:
    """One node's hands."""
    return Worker.new(database, clock)


@pytest.fixture
def brake(worker: Worker) -> Brake:
    """Its brake."""
    return brake_of(worker)


async def test_no_claim_is_committed_after_a_halt_has_answered(
    pool: Database, clock: DatabaseClock
) -> None:
    """24 claimers against 40 halts: every attempt that was claimed is known to the halt."""
    workers = [Worker.new(pool, clock) for _ in range(CLAIMERS)]
    brake, chance = brake_of(workers[0]), random.Random(7)
    for space in (SPACE, OTHER):
        await add_snapshot(pool, space)
        cycle = await workers[0].begin(space)
        await workers[0].enqueue(cycle, [f"lane-{number}" for number in range(8)], 100_000)
    rooms = {(space, f"lane-{number}"): 1 for space in (SPACE, OTHER) for number in range(8)}
    await workers[0].queue.lanes()
    is_over = False
    claims = {SPACE: 0, OTHER: 0}

    async def claim(worker: Worker) -> None:
        while not is_over:
            jobs: list[ClaimedJob] = []
            with suppress(LockNotAvailable):  # behind several who wait for the fence
                jobs = await worker.queue.claim(rooms, 64)
            for job in jobs:
                claims[job.namespace] += 1
            if jobs:
                await worker.queue.release(jobs)

    numbers = "SELECT sum(lease_number)::int AS n FROM dispatch_lease WHERE namespace = 'brand-a'"
    claimers = [asyncio.create_task(claim(worker)) for worker in workers]
    late = 0
    for _ in range(HALTS):
        await asyncio.sleep(chance.random() * 0.02)
        answer = await brake.halt(order(), wait_seconds=60)
        assert answer.is_quiesced, answer
        before, others = (await only(pool, numbers))["n"], claims[OTHER]
        deadline = asyncio.get_running_loop().time() + 60
        while claims[OTHER] < others + CLAIMERS:  # each of them has claimed since, or could have
            assert asyncio.get_running_loop().time() < deadline, "others were held up"
            await asyncio.sleep(0)
        late += (await only(pool, numbers))["n"] - before
        await brake.resume(order())
    is_over = True
    await asyncio.gather(*claimers)
    assert late == 0
    assert claims[SPACE] > HALTS


AMID_A_CLAIM = """
CREATE FUNCTION wait_for_the_test() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    WHILE NOT pg_try_advisory_xact_lock_shared(42) LOOP PERFORM pg_sleep(0.01); END LOOP;
    RETURN NEW;
END $$;
CREATE TRIGGER wait_for_the_test BEFORE UPDATE ON dispatch_lease
    FOR EACH ROW EXECUTE FUNCTION wait_for_the_test();
"""
FENCE_WAITS = "locktype = 'advisory' AND NOT granted"


async def test_a_claim_that_has_read_the_flag_is_waited_for(
    worker: Worker, brake: Brake, dsn: str, owner_dsn: str
) -> None:
    """It finds no halt, and commits after the halt did: what it took is in flight, and told."""
    await add_snapshot(worker.database)
    await worker.begin_dispatch()
    await worker.queue.lanes()
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        owner.execute(AMID_A_CLAIM)
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as gate:
        await gate.execute("SELECT pg_advisory_lock(42)")
        claiming = asyncio.create_task(worker.take("one"))

        async def is_amid_it() -> bool:
            return await count(worker.database, "pg_stat_activity", "wait_event = 'PgSleep'") > 0

        await eventually(is_amid_it, "a claim that has read the flag")
        halting = asyncio.create_task(brake.halt(order(), wait_seconds=5))
        await raised(worker)

        async def is_waited_for() -> bool:
            return halting.done() or await count(worker.database, "pg_locks", FENCE_WAITS) > 0

        await eventually(is_waited_for, "the halt at the fence")
        assert not halting.done()
        await gate.execute("SELECT pg_advisory_unlock(42)")
    (job,) = await claiming
    answer = await halting
    assert (answer.is_fenced, answer.is_quiesced) == (True, False)
    assert [one.job_id for one in answer.in_flight] == [job.job_id]


async def test_cycles_of_a_halted_namespace_are_not_claimed(worker: Worker, brake: Brake) -> None:
    """Nor accepted; another namespace's are; all go on after the resumption."""
    await worker.accept(worker.request(SPACE), worker.request(OTHER))
    answer = await brake.halt(order())
    assert (answer.epoch, answer.is_quiesced, answer.in_flight) == (1, True, ())
    refused, accepted = await worker.accept(worker.request(SPACE), worker.request(OTHER))
    assert isinstance(refused, NamespaceHalted)
    assert accepted.is_new
    assert {cycle.namespace for cycle in await worker.claim()} == {OTHER}
    await brake.resume(order())
    assert [cycle.namespace for cycle in await worker.claim()] == [SPACE]


async def test_a_repeated_trigger_gets_its_cycle_while_halted(worker: Worker, brake: Brake) -> None:
    """It starts nothing, and tells what was started before."""
    first = worker.request(SPACE, idempotency_key="k")
    await worker.accept(first)
    await brake.halt(order())
    (again,) = await worker.accept(worker.request(SPACE, idempotency_key="k"))
    assert (again.cycle_id, again.is_new) == (first.cycle_id, False)


async def raised(worker: Worker) -> None:
    """Waits until a halt is committed."""

    async def is_raised() -> bool:
        return await count(worker.database, "namespace_fence", "is_halted") > 0

    await eventually(is_raised, "a halt")


async def in_flight(worker: Worker) -> None:
    """One attempt on the wire, and one cycle in hand."""
    await add_snapshot(worker.database)
    await worker.begin_dispatch(max_attempts=2)
    (job,) = await worker.take("one")
    assert job.epoch == 0
    await worker.begin()


async def test_a_halt_names_what_is_still_out_and_on_which_node(
    worker: Worker, brake: Brake
) -> None:
    """Attempts and cycles in hand keep it from being quiesced; the time is bounded."""
    await in_flight(worker)
    answer = await brake.halt(order(), wait_seconds=2)
    assert (answer.is_quiesced, answer.is_fenced) == (False, True)
    assert [(one.endpoint_key, one.attempt, one.outcome) for one in answer.in_flight] == [
        ("one", 1, None),
        (None, None, None),
    ]
    assert {one.node_id for one in answer.in_flight} == {worker.node_id}


async def test_what_was_in_flight_is_told_with_its_outcome(worker: Worker, brake: Brake) -> None:
    """The receipt's, for what was sent; withheld, for what was given back."""
    await add_snapshot(worker.database)
    await worker.begin_dispatch(lanes=("one", "two"))
    sent, unsent = await worker.take("one", "two")
    halting = asyncio.create_task(brake.halt(order()))
    await raised(worker)
    await worker.settle(sent)
    await worker.queue.release([unsent])
    answer = await halting
    assert answer.is_quiesced
    known = {one.endpoint_key: one.outcome for one in answer.in_flight}
    assert known.items() <= {("one", "delivered"), ("two", "withheld")}
    assert await worker.take("one", "two") == []


async def test_what_a_lost_worker_held_ends_with_its_lease(worker: Worker, brake: Brake) -> None:
    """The halt settles it as unknown; the worker's late heartbeat prolongs nothing."""
    await in_flight(worker)
    (lease,) = await worker.database.fetch_all(b"SELECT * FROM dispatch_lease")
    await expire(worker.database, "dispatch_lease")
    await expire(worker.database, "cycle_lease")
    answer = await brake.halt(order())
    assert answer.is_quiesced
    assert [one.outcome for one in answer.in_flight] == ["unknown", "released"]
    assert await count(worker.database, "dispatch_lease", "node_id IS NOT NULL") == 0
    assert await count(worker.database, "cycle_lease", "node_id IS NOT NULL") == 0
    assert lease["attempt"] == 1


async def test_a_halt_settles_what_is_lost_of_its_own_namespace_only(
    worker: Worker, brake: Brake
) -> None:
    """What other namespaces' workers have lost is not its to write, nor does it wait behind it."""
    spaces = ("brand", SPACE, OTHER)
    for space in spaces:
        await add_snapshot(worker.database, space)
        await worker.begin_dispatch(space)
        assert len(await worker.take("one", namespace=space)) == 1
    await expire(worker.database, "dispatch_lease")
    answer = await brake.halt(order())
    assert [one.outcome for one in answer.in_flight] == ["unknown"]
    found = await worker.database.fetch_all(b"SELECT namespace FROM delivery_receipt")
    assert [row["namespace"] for row in found] == [SPACE]
    assert await worker.queue.recover(worker.clock.now(), of="nobody") == 0
    assert await worker.queue.recover(worker.clock.now()) == len(spaces) - 1


async def test_a_claim_that_does_not_end_is_told_honestly(
    worker: Worker, brake: Brake, dsn: str
) -> None:
    """While a claim from before is under way nothing is quiesced, and other claims go on."""
    await add_snapshot(worker.database, OTHER)
    await worker.begin_dispatch(OTHER)
    async with await psycopg.AsyncConnection.connect(dsn) as frozen:
        await frozen.execute("SELECT pg_advisory_xact_lock_shared(orbit_fence_key(%s))", [SPACE])
        halting = asyncio.create_task(brake.halt(order(), wait_seconds=0.3))
        await raised(worker)
        assert len(await worker.take("one", namespace=OTHER)) == 1
        answer = await halting
    assert (answer.is_quiesced, answer.is_fenced) == (False, False)
    assert (await brake.halt(order())).is_quiesced


async def test_a_frozen_claim_keeps_no_other_namespaces_halt_from_its_proof(
    worker: Worker, brake: Brake, dsn: str
) -> None:
    """Who waits for a lane of one namespace soon lets go of the fences of the others."""
    for space in (SPACE, OTHER):
        await add_snapshot(worker.database, space)
        await worker.begin_dispatch(space)
    await worker.queue.lanes()
    refused, is_over = 0, False

    async def claim() -> None:
        nonlocal refused
        while not is_over:
            try:
                await worker.queue.claim({(SPACE, "one"): 1, (OTHER, "one"): 1}, 64)
            except LockNotAvailable:
                refused += 1

    async def is_waiting() -> bool:
        return await count(worker.database, "pg_locks", "NOT granted") > 0

    async with await psycopg.AsyncConnection.connect(dsn) as frozen:
        hold = "SELECT FROM lane WHERE namespace = %s FOR NO KEY UPDATE"
        await frozen.execute(hold, [SPACE])
        claiming = asyncio.create_task(claim())
        await eventually(is_waiting, "a claim that waits")
        answer = await brake.halt(order(space=OTHER), wait_seconds=60)
        is_over = True
        await claiming
    assert answer.is_quiesced
    assert refused > 0


async def test_cycles_of_a_fence_that_is_not_to_be_had_hold_up_no_other_halt(
    worker: Worker, brake: Brake, dsn: str
) -> None:
    """The claim takes nothing then, and lets go of what it has."""
    await worker.accept(worker.request(SPACE), worker.request(OTHER))
    async with await psycopg.AsyncConnection.connect(dsn) as frozen:
        await frozen.execute("SELECT pg_advisory_xact_lock(orbit_fence_key(%s))", [OTHER])
        claiming = asyncio.create_task(worker.claim())
        assert (await brake.halt(order(), wait_seconds=60)).is_quiesced
        assert await claiming == []
    assert {cycle.namespace for cycle in await worker.claim()} == {OTHER}


async def test_a_claim_takes_so_many_fences_at_most(worker: Worker) -> None:
    """The server's memory for locks is everybody's; the rest comes with the next claim."""
    spaces = {f"space-{number:03}" for number in range(MOST_FENCES + 10)}
    await worker.accept(*map(worker.request, sorted(spaces)))
    first = {cycle.namespace for cycle in await worker.claim(1000)}
    assert len(first) == MOST_FENCES
    assert first | {cycle.namespace for cycle in await worker.claim(1000)} == spaces
    lanes = {(space, key): 1 for space in sorted(spaces) for key in ("one", "two")}
    few = _of_few_namespaces(lanes)
    assert list(few) == list(lanes)[: 2 * MOST_FENCES]


async def test_a_halt_works_while_the_pool_is_taken(worker: Worker, brake: Brake) -> None:
    """It has a connection of its own."""
    async with asyncio.TaskGroup() as group:
        taken, done = asyncio.Semaphore(0), asyncio.Event()

        async def hold() -> None:
            async with worker.database.connection():
                taken.release()
                await done.wait()

        for _ in range(4):
            group.create_task(hold())
        for _ in range(4):
            await taken.acquire()
        answer = await brake.halt(order(), wait_seconds=60)
        done.set()
    assert answer.is_quiesced


async def one_on_the_wire(worker: Worker) -> ClaimedJob:
    """A job of the namespace that is out."""
    await add_snapshot(worker.database)
    await worker.begin_dispatch()
    (job,) = await worker.take("one")
    return job


async def test_a_second_halt_is_no_end_of_the_first(worker: Worker, brake: Brake) -> None:
    """Both are in force, and both are proved."""
    job = await one_on_the_wire(worker)
    first = asyncio.create_task(brake.halt(order()))
    await raised(worker)
    second = await brake.halt(order(BEN), wait_seconds=0)
    assert (second.epoch, second.is_quiesced, second.is_in_force) == (2, False, True)
    await worker.queue.release([job])
    answer = await first
    assert (answer.epoch, answer.is_quiesced, answer.is_in_force) == (1, True, True)


async def test_a_halt_that_was_resumed_is_not_proved_by_the_next(
    worker: Worker, brake: Brake
) -> None:
    """In between, something may have been claimed."""
    await one_on_the_wire(worker)
    first = asyncio.create_task(brake.halt(order()))
    await raised(worker)
    await brake.resume(order())
    await brake.halt(order(), wait_seconds=0)
    answer = await first
    assert (answer.is_quiesced, answer.is_in_force) == (False, False)


async def end_halts_connection(owner_dsn: str, what: str) -> None:
    """The server ends the connection of a halt that is just at this."""
    end = """SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
        WHERE application_name = 'orbit apart' AND datname = current_database() AND """
    async with await psycopg.AsyncConnection.connect(owner_dsn, autocommit=True) as owner:

        async def has_ended() -> bool:
            row = await (await owner.execute((end + what).encode())).fetchone()
            return row is not None and row[0] > 0

        await eventually(has_ended, "a halt at work")


async def test_a_halt_whose_connection_is_lost_is_answered_honestly(
    worker: Worker, brake: Brake, owner_dsn: str
) -> None:
    """It is halted, under this epoch; what is out is not known."""
    await one_on_the_wire(worker)
    halting = asyncio.create_task(brake.halt(order()))
    await raised(worker)
    await end_halts_connection(owner_dsn, "true")
    answer = await halting
    assert (answer.epoch, answer.is_quiesced, answer.is_seen) == (1, False, False)
    assert await worker.take("one") == []


async def test_a_halt_that_could_not_be_written_is_written_again(
    worker: Worker, brake: Brake, dsn: str, owner_dsn: str
) -> None:
    """After a fail-over, say, over a new connection."""
    await brake.halt(order())
    await brake.resume(order())
    async with await psycopg.AsyncConnection.connect(dsn) as holder:
        await holder.execute("SELECT FROM namespace_fence FOR UPDATE")
        halting = asyncio.create_task(brake.halt(order()))
        await end_halts_connection(owner_dsn, "wait_event_type = 'Lock'")
    assert (await halting).is_quiesced


async def test_halts_of_one_namespace_leave_connections_to_others(
    worker: Worker, brake: Brake
) -> None:
    """Two wait, the others look once and are answered; another namespace is halted at once."""
    job = await one_on_the_wire(worker)
    halts = [asyncio.create_task(brake.halt(order(), wait_seconds=60)) for _ in range(8)]
    assert (await brake.halt(order(space=OTHER), wait_seconds=60)).is_quiesced

    async def have_most_ended() -> bool:
        return sum(halt.done() for halt in halts) == 6

    async def have_two_connections() -> bool:
        held = "application_name = 'orbit apart' AND datname = current_database()"
        return await count(worker.database, "pg_stat_activity", held) == 2

    await eventually(have_most_ended, "answers")
    await eventually(have_two_connections, "the end of the answered halts' connections")
    await worker.queue.release([job])
    answers = await asyncio.gather(*halts)
    assert sorted(answer.is_quiesced for answer in answers) == [False] * 6 + [True] * 2
    assert {answer.epoch for answer in answers} == set(range(1, 9))


async def test_a_namespace_is_halted_while_leases_are_rebuilt(
    worker: Worker, brake: Brake, owner_dsn: str
) -> None:
    """That may take minutes."""
    async with await psycopg.AsyncConnection.connect(owner_dsn) as owner:
        await owner.execute(REPAIR_SQL.lock_leases)
        answer = await brake.halt(order(), wait_seconds=60)
    assert answer.is_quiesced


async def test_a_halt_that_cannot_be_ended_now_keeps_no_other_from_its_end(
    worker: Worker, brake: Brake, dsn: str
) -> None:
    """Somebody froze amid its resumption; the others' time is over too."""
    for space in (SPACE, OTHER):
        await brake.halt(order(space=space), until=worker.clock.now() + timedelta(hours=1))
    await let_end(worker.database)
    fences = Fences()
    keeper = keeper_of(worker, fences, brake)

    async def is_ended() -> bool:
        await keeper.run_once()
        return await count(worker.database, "namespace_fence", "is_halted") == 1

    async with await psycopg.AsyncConnection.connect(dsn) as frozen:
        await frozen.execute("SELECT FROM namespace_fence WHERE namespace = %s FOR UPDATE", [SPACE])
        await eventually(is_ended, "the end of the other's halt")
    await keeper.run_once()
    assert await count(worker.database, "namespace_fence", "is_halted") == 0


async def test_a_node_with_work_in_hand_looks_more_often(worker: Worker, brake: Brake) -> None:
    """A halt on another node waits for it; one that has none rests for a poll length."""
    assert await keeper_of(worker, Fences(), brake).run_once() == 1.0
    assert await keeper_of(worker, Fences(), brake, is_busy=True).run_once() == 0.2


async def let_end(database: Database) -> None:
    """The time of every halt is over."""
    await database.execute(
        b"UPDATE namespace_fence SET until_at = orbit_now() - interval '1 second'"
    )


def keeper_of(
    worker: Worker, fences: Fences, brake: Brake, *, is_busy: bool = False
) -> FenceKeeper:
    """A keeper of a node that has nothing to give back."""
    return FenceKeeper(
        worker.database,
        fences,
        brake,
        poll_seconds=1.0,
        on_halted=_nothing_to_recall,
        is_busy=lambda: is_busy,
    )


async def _nothing_to_recall() -> None:
    """Nothing is in hand."""


async def test_only_the_halt_that_was_meant_is_ended(worker: Worker, brake: Brake) -> None:
    """Somebody else's, for another reason, came after it."""
    first = await brake.halt(order())
    second = await brake.halt(order(BEN, "a leak"))
    with pytest.raises(HaltedAnew):
        await brake.resume(order(), epoch=first.epoch)
    assert not (await brake.resume(order(), epoch=second.epoch)).is_halted


async def test_a_second_halt_raises_the_epoch_and_shortens_nothing(
    worker: Worker, brake: Brake
) -> None:
    """A halt without an end stays one; the later of two ends counts."""
    soon = worker.clock.now() + timedelta(hours=1)
    later = soon + timedelta(hours=1)
    assert (await brake.halt(order(), until=later)).until_at == later
    assert (await brake.halt(order(), until=soon)).until_at == later
    last = await brake.halt(order())
    assert (last.epoch, last.until_at) == (3, None)
    assert (await brake.halt(order(), until=later)).until_at is None
    with pytest.raises(RequestInvalid, match="has passed"):
        await brake.halt(order(), until=soon - timedelta(hours=2))
    assert await count(worker.database, "namespace_halt") == 4


async def test_a_halt_ends_by_itself_at_its_time(worker: Worker, brake: Brake) -> None:
    """Recorded as such, in the name of whoever halted; once, whoever notices."""
    await brake.halt(order(), until=worker.clock.now() + timedelta(hours=1))
    assert not await brake.resume_by_time(SPACE)
    await let_end(worker.database)
    ended = await asyncio.gather(*[brake.resume_by_time(SPACE) for _ in range(4)])
    assert sorted(ended) == [False, False, False, True]
    row = await only(worker.database, "SELECT cause, actor, step FROM namespace_resume")
    assert row == {"cause": "until", "actor": "ann", "step": "resumed"}


async def test_two_persons_resume_where_two_are_wanted(worker: Worker, brake: Brake) -> None:
    """The first one's word is kept; twice the same person is refused; a new halt forgets it."""
    await set_two_persons(worker.database, worker.node_id, order(space="*"), is_wanted=True)
    await brake.halt(order())
    with pytest.raises(RequestInvalid, match="reason"):
        await brake.resume(order(reason=" "))
    assert (await brake.resume(order())).is_halted
    with pytest.raises(SecondPersonRequired, match="ann has asked"):
        await brake.resume(order())
    await brake.halt(order())
    assert (await brake.resume(order(BEN))).is_halted
    answer = await brake.resume(order(ANN))
    assert (answer.is_halted, answer.asked_by) == (False, "ben")
    with pytest.raises(NotHalted):
        await brake.resume(order(BEN))


async def test_the_rule_is_not_loosened_under_a_halt(worker: Worker, brake: Brake) -> None:
    """Neither the namespace's own nor that of all; it may be made stricter."""
    set_rule = set_two_persons
    await set_rule(worker.database, worker.node_id, order(), is_wanted=True)
    await brake.halt(order())
    for space in (SPACE, "*"):
        with pytest.raises(NamespaceHalted):
            await set_rule(worker.database, worker.node_id, order(space=space), is_wanted=False)
    await set_rule(worker.database, worker.node_id, order(space="*"), is_wanted=True)
    await brake.resume(order())
    await brake.resume(order(BEN))
    for space in (SPACE, "*"):
        await set_rule(worker.database, worker.node_id, order(space=space), is_wanted=False)
    await brake.halt(order())
    assert not (await brake.resume(order())).is_halted


async def test_a_lost_fence_is_rebuilt_from_the_facts(worker: Worker, brake: Brake) -> None:
    """Halted is halted, with its end; a halt raises the epoch above all that is known."""
    until = worker.clock.now() + timedelta(hours=1)
    await brake.halt(order(), until=until)
    await brake.halt(order(space=OTHER))
    await brake.resume(order(space=OTHER))
    query = b"SELECT namespace, epoch, is_halted, until_at FROM namespace_fence ORDER BY namespace"
    before = await worker.database.fetch_all(query)
    await worker.database.execute(b"DELETE FROM namespace_fence")
    assert (await repair(worker.database))["fences"] == 2
    assert await worker.database.fetch_all(query) == before
    await worker.database.execute(b"DELETE FROM namespace_fence")
    assert (await brake.halt(order())).epoch == 2


async def test_halts_at_once_each_have_an_epoch(worker: Worker, brake: Brake) -> None:
    """The last one is in force; the others say that they are not."""
    answers: list[Halted] = await asyncio.gather(*[brake.halt(order()) for _ in range(8)])
    assert sorted(answer.epoch for answer in answers) == list(range(1, 9))
    assert max(answers, key=lambda one: one.epoch).is_quiesced
