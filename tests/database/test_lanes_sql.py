"""sql/dispatch.sql: lanes share their cap, rate, breaker and places among all nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import psycopg
import pytest

from orbit.clock import DatabaseClock, SystemClock
from orbit.database.pool import Database
from orbit.endpoints import Breaker, Endpoint
from orbit.execution.dispatch import (
    SECRET_UNREADABLE,
    ClaimedJob,
    DispatchQueue,
    Lane,
    RetryPolicy,
    Settlement,
)
from orbit.execution.retry import Backoff
from orbit.execution.wire import Outcome, WireResult
from tests.database.engine import DELIVERED, FAILED, Worker, count, expire, only

LANE = ("brand-a", "one")
LOST = WireResult(Outcome.UNKNOWN, cause="timeout")
BREAKER = Breaker(failures=3, least=5, share=0.5, hold_seconds=60.0, longest_hold_seconds=200.0)


def endpoint(cap: int = 100, rate: float | None = None, breaker: Breaker | None = None) -> Endpoint:
    """An endpoint with limits."""
    return Endpoint(
        "one", "http://127.0.0.1:9/", "POST", None, {}, 30.0, cap, rate, breaker=breaker
    )


async def queued(worker: Worker, number: int, max_attempts: int = 4) -> None:
    """So many jobs in the lane."""
    for _ in range(number):
        await worker.begin_dispatch(max_attempts=max_attempts)


async def take(worker: Worker, room: int = 50) -> list[ClaimedJob]:
    """What the lane gives."""
    return await worker.take("one", room=room)


async def settle_all(
    worker: Worker, jobs: list[ClaimedJob], result: WireResult = DELIVERED
) -> None:
    """Ends attempts one after the other."""
    for job in jobs:
        await worker.settle(job, result)


async def lane(worker: Worker) -> Lane:
    """The lane as a node's look finds it."""
    (found,) = await worker.queue.lanes()
    return found


async def let_pass(database: Database, seconds: float) -> None:
    """Lets time go by for the lane."""
    await database.execute(
        b"UPDATE lane SET tokens_at = tokens_at - %(by)s * interval '1 second',"
        b" probe_at = probe_at - %(by)s * interval '1 second',"
        b" window_at = window_at - %(by)s * interval '1 second'",
        {"by": seconds},
    )


async def breaker(database: Database) -> str:
    """The lane's breaker, as users see it."""
    return str((await only(database, "SELECT breaker FROM lane_status"))["breaker"])


async def changes(database: Database) -> list[str]:
    """What the breaker did, in order."""
    rows = await database.fetch_all(b"SELECT change FROM lane_change ORDER BY created_at")
    return [row["change"] for row in rows]


# ---- cap


async def test_the_cap_holds_over_all_nodes(database: Database, clock: DatabaseClock) -> None:
    """Two nodes that claim at once have no more under way than the lane's cap."""
    nodes = [Worker.new(database, clock, endpoint=endpoint(cap=5)) for _ in range(2)]
    await queued(nodes[0], 12)
    claims = await asyncio.gather(*[take(node, 4) for node in nodes for _ in range(3)])
    assert sum(map(len, claims)) == 5
    assert await take(nodes[0]) == []
    (first, *_) = [job for jobs in claims for job in jobs]
    for node in nodes:
        await node.settle(first)  # only its holder gives the place back
    assert len(await take(nodes[1])) == 1


# ---- first attempts and later ones


async def test_a_storm_of_retries_leaves_places_for_first_attempts(
    database: Database, clock: DatabaseClock
) -> None:
    """Retries that fill the lane give way: each place that comes free goes to a first attempt."""
    worker = Worker.new(database, clock, endpoint=endpoint(cap=8))
    await queued(worker, 20)
    for _ in range(3):
        await settle_all(worker, await take(worker), FAILED)
    held = await take(worker)
    assert [job.attempt > 1 for job in held] == [True] * 8
    await queued(worker, 4)
    await settle_all(worker, held[:4])
    assert [job.attempt for job in await take(worker)] == [1] * 4


async def test_first_attempts_leave_retries_their_share(
    database: Database, clock: DatabaseClock
) -> None:
    """A quarter of the lane's places is for later attempts, while both wait."""
    worker = Worker.new(database, clock, endpoint=endpoint(cap=8))
    await queued(worker, 4)
    await settle_all(worker, await take(worker), FAILED)
    await queued(worker, 20)
    attempts = sorted(job.attempt for job in await take(worker))
    assert attempts == [1] * 6 + [2] * 2


async def test_retries_have_a_share_of_the_node_if_the_lane_has_more_places(
    database: Database, clock: DatabaseClock
) -> None:
    """A lane without a cap to speak of: a quarter of the node's places, which are 64."""
    worker = Worker.new(database, clock, endpoint=endpoint(cap=10_000))
    await queued(worker, 30)
    await settle_all(worker, await take(worker), FAILED)
    await queued(worker, 20)
    attempts = sorted(job.attempt for job in await take(worker, 20))
    assert attempts == [1] * 4 + [2] * 16


async def test_a_lane_of_one_place_serves_both_by_chance(
    database: Database, clock: DatabaseClock
) -> None:
    """With one place the share is a matter of the draw."""
    unlucky = Worker.new(database, clock, endpoint=endpoint(cap=1), chance=0.0)
    lucky = Worker.new(database, clock, endpoint=endpoint(cap=1), chance=0.8)
    await queued(unlucky, 1)
    await settle_all(unlucky, await take(unlucky), FAILED)
    await queued(unlucky, 2)
    (job,) = await take(unlucky)
    assert job.attempt == 1
    await unlucky.settle(job)
    (job,) = await take(lucky)
    assert job.attempt == 2


# ---- rate


@pytest.fixture
def still(owner_dsn: str) -> None:
    """The database's time stands still: no token comes but by `let_pass`."""
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        owner.execute(
            "CREATE OR REPLACE FUNCTION orbit_now() RETURNS timestamptz LANGUAGE sql STABLE"
            f" PARALLEL SAFE RETURN '{SystemClock().now().isoformat()}'::timestamptz"
        )


@pytest.mark.usefixtures("still")
async def test_the_rate_is_one_bucket_for_all_nodes(
    database: Database, clock: DatabaseClock
) -> None:
    """A second's tokens at most, filled up by time that goes by, spent by whoever claims."""
    nodes = [Worker.new(database, clock, endpoint=endpoint(rate=10.0)) for _ in range(2)]
    await queued(nodes[0], 40)
    assert len(await take(nodes[0], 6)) == 6
    assert len(await take(nodes[1])) == 4
    assert await take(nodes[0]) == []
    await let_pass(database, 0.5)
    assert len(await take(nodes[0])) == 5
    await let_pass(database, 60)
    assert len(await take(nodes[0])) == 10


@pytest.mark.usefixtures("still")
async def test_a_slow_rate_still_sends(database: Database, clock: DatabaseClock) -> None:
    """Less than one job a second: one at once, the next when its token is whole."""
    worker = Worker.new(database, clock, endpoint=endpoint(rate=0.1))
    await queued(worker, 3)
    assert len(await take(worker)) == 1
    assert await take(worker) == []
    found = await lane(worker)
    assert found.ready_in_seconds(endpoint(rate=0.1)) == pytest.approx(10)
    await let_pass(database, 10)
    assert len(await take(worker)) == 1


# ---- the breaker


async def test_a_run_of_failures_opens_the_breaker(
    database: Database, clock: DatabaseClock
) -> None:
    """From then on the lane is held: no attempt is made, none is spent."""
    worker = Worker.new(database, clock, endpoint=endpoint(breaker=BREAKER))
    await queued(worker, 6)
    await settle_all(worker, await take(worker, 3), FAILED)
    assert await breaker(database) == "open"
    assert await take(worker) == []
    assert (await lane(worker)).probe_in_seconds == pytest.approx(60, abs=25)
    assert await count(database, "delivery_receipt") == 3


async def test_failures_from_without_a_breaker_open_none_by_themselves(
    database: Database, clock: DatabaseClock
) -> None:
    """A breaker that is switched on waits for the next failure before it judges."""
    without = Worker.new(database, clock, endpoint=endpoint())
    worker = Worker.new(database, clock, endpoint=endpoint(breaker=BREAKER))
    await queued(without, 6)
    jobs = await take(without)
    await settle_all(without, jobs[:4], FAILED)
    neither = WireResult(Outcome.NOT_SENT, cause=SECRET_UNREADABLE)
    await settle_all(worker, jobs[4:5], neither)
    assert await breaker(database) == "closed"
    await settle_all(without, jobs[5:], FAILED)
    assert await breaker(database) == "closed"


def flushed_twice(worker: Worker) -> None:
    """From now on no answer to a settlement arrives, so each is flushed again."""
    flush = worker.queue._settlements._flush

    async def twice(entries: Sequence[Settlement]) -> Sequence[None]:
        await flush(entries)
        return await flush(entries)

    worker.queue._settlements._flush = twice


async def test_a_settlement_whose_answer_was_lost_is_judged_once(
    database: Database, clock: DatabaseClock
) -> None:
    """It is flushed again, and its failures are still as many as were seen."""
    worker = Worker.new(database, clock, endpoint=endpoint(breaker=BREAKER))
    await queued(worker, 3)
    flushed_twice(worker)
    await settle_all(worker, await take(worker, 2), FAILED)
    counted = "SELECT failures, window_attempts, window_failures FROM lane"
    assert await only(database, counted) == {
        "failures": 2,
        "window_attempts": 2,
        "window_failures": 2,
    }
    assert await breaker(database) == "closed"
    await settle_all(worker, await take(worker, 1), FAILED)
    assert await changes(database) == ["opened"]


async def test_a_late_success_closes_no_breaker(database: Database, clock: DatabaseClock) -> None:
    """It was sent before the breaker opened; only a probe shows that the receiver is back."""
    worker = Worker.new(database, clock, endpoint=endpoint(breaker=BREAKER))
    await queued(worker, 5)
    *failing, late = await take(worker, 4)
    await settle_all(worker, failing, FAILED)
    await worker.settle(late)
    assert await breaker(database) == "open"
    assert await changes(database) == ["opened"]
    await let_pass(database, 60)
    (probe,) = await take(worker)
    await worker.settle(probe)
    assert await changes(database) == ["opened", "closed"]


async def test_the_share_is_of_what_tells_of_the_lane(
    database: Database, clock: DatabaseClock
) -> None:
    """Payloads that are refused for good are no part of it."""
    share = Breaker(failures=1000, least=10, share=0.6, hold_seconds=60.0)
    worker = Worker.new(database, clock, endpoint=endpoint(breaker=share))
    await queued(worker, 20)
    jobs = await take(worker)
    now = clock.now()
    await settle_all(worker, jobs[:5], FAILED)
    for job in jobs[5:15]:
        refused = WireResult(Outcome.FAILED, status=422, cause="status 422")
        await worker.queue.settle(job, refused, now, now, permanent_statuses={422})
    await settle_all(worker, jobs[15:19])
    assert await breaker(database) == "closed"
    await settle_all(worker, jobs[19:], FAILED)
    assert await breaker(database) == "open"


async def test_a_success_ends_a_run(database: Database, clock: DatabaseClock) -> None:
    """Failures in a row are what counts; with one success between them there are none."""
    rare = Breaker(failures=3, least=1000)
    worker = Worker.new(database, clock, endpoint=endpoint(breaker=rare))
    await queued(worker, 8)
    jobs = await take(worker)
    await settle_all(worker, jobs[:2], FAILED)
    await settle_all(worker, jobs[2:3])
    await settle_all(worker, jobs[3:5], FAILED)
    assert await breaker(database) == "closed"
    await settle_all(worker, jobs[5:6], FAILED)
    assert await breaker(database) == "open"


async def test_a_share_of_failures_opens_the_breaker(
    database: Database, clock: DatabaseClock
) -> None:
    """Half of at least five in the window, though never three in a row."""
    worker = Worker.new(database, clock, endpoint=endpoint(breaker=BREAKER))
    await queued(worker, 6)
    jobs = await take(worker)
    for number, job in enumerate(jobs[:4]):
        await worker.settle(job, DELIVERED if number % 2 else FAILED)
    assert await breaker(database) == "closed"
    await worker.settle(jobs[4], FAILED)
    assert await breaker(database) == "open"


async def test_failures_before_the_window_are_forgotten(
    database: Database, clock: DatabaseClock
) -> None:
    """A lane that failed now and then for hours is not held."""
    worker = Worker.new(database, clock, endpoint=endpoint(breaker=BREAKER))
    await queued(worker, 8)
    for number, job in enumerate(await take(worker)):
        await worker.settle(job, DELIVERED if number % 2 else FAILED)
        await let_pass(database, 70)
    assert await changes(database) == []


async def test_one_probe_at_a_time_and_it_is_not_counted(
    database: Database, clock: DatabaseClock
) -> None:
    """However long the outage, no job dies of it; each failed probe doubles the hold."""
    worker = Worker.new(database, clock, endpoint=endpoint(breaker=BREAKER))
    other = Worker.new(database, clock, endpoint=endpoint(breaker=BREAKER))
    await queued(worker, 3, max_attempts=2)
    await settle_all(worker, await take(worker), FAILED)
    for hold in (120, 200, 200, 200, 200):
        await let_pass(database, 200)
        (probe,) = await take(worker)
        assert probe.is_probe
        assert await take(other) == []
        await worker.settle(probe, FAILED)
        assert (await lane(worker)).probe_in_seconds == pytest.approx(hold, abs=25)
    assert await count(database, "dead_letter_dispatch") == 0
    assert await count(database, "delivery_receipt", "is_probe") == 5
    assert await changes(database) == ["opened"] + ["held"] * 5


async def test_a_probe_that_arrives_closes_the_breaker(
    database: Database, clock: DatabaseClock
) -> None:
    """The lane flows again, and the jobs have the attempts that they had before."""
    worker = Worker.new(database, clock, endpoint=endpoint(breaker=BREAKER))
    await queued(worker, 5, max_attempts=2)
    await settle_all(worker, await take(worker, 3), FAILED)
    await let_pass(database, 60)
    (probe,) = await take(worker)
    await worker.settle(probe)
    assert await breaker(database) == "closed"
    jobs = await take(worker)
    assert sorted(job.attempt for job in jobs) == [1, 2, 2, 2]
    await settle_all(worker, jobs)
    assert await changes(database) == ["opened", "closed"]
    assert await count(database, "dead_letter_dispatch") == 0


async def test_jobs_that_always_fail_do_not_keep_others_from_being_tried(
    database: Database, clock: DatabaseClock
) -> None:
    """One probe in four is a later attempt, while first ones wait."""
    worker = Worker.new(database, clock, endpoint=endpoint(cap=8, breaker=BREAKER))
    lucky = Worker.new(database, clock, endpoint=endpoint(cap=8, breaker=BREAKER), chance=0.8)
    await queued(worker, 3)
    await settle_all(worker, await take(worker), FAILED)
    await queued(worker, 1)
    await let_pass(database, 60)
    (probe,) = await take(lucky)
    assert (probe.attempt, probe.is_probe) == (2, True)
    await worker.queue.release([probe])
    await lucky.settle(probe, FAILED)
    await let_pass(database, 200)
    (probe,) = await take(worker)
    assert (probe.attempt, probe.is_probe) == (1, True)


async def test_a_probe_that_cannot_be_read_counts(database: Database, clock: DatabaseClock) -> None:
    """A lane whose jobs are all unreadable comes to an end: nobody was tried, so none is spared."""
    worker = Worker.new(database, clock, endpoint=endpoint(breaker=BREAKER))
    await queued(worker, 3, max_attempts=3)
    await settle_all(worker, await take(worker, 3), FAILED)
    await let_pass(database, 60)
    unreadable = WireResult(Outcome.NOT_SENT, cause=SECRET_UNREADABLE)
    for _ in range(3 * 2):
        (probe,) = await take(worker)
        assert (probe.is_probe, probe.spared) == (True, 1)
        await worker.settle(probe, unreadable)
    assert await take(worker) == []
    assert await count(database, "dead_letter_dispatch") == 3
    assert await count(database, "delivery_receipt") == 3 * 3


async def test_a_probe_that_cannot_be_read_counts_once(
    database: Database, clock: DatabaseClock
) -> None:
    """Also if the answer to its settlement was lost."""
    worker = Worker.new(database, clock, endpoint=endpoint(breaker=BREAKER))
    await queued(worker, 3)
    await settle_all(worker, await take(worker, 3), FAILED)
    await let_pass(database, 60)
    (probe,) = await take(worker)
    flushed_twice(worker)
    await worker.settle(probe, WireResult(Outcome.NOT_SENT, cause=SECRET_UNREADABLE))
    spared = await database.fetch_all(b"SELECT spared FROM dispatch_lease")
    assert [row["spared"] for row in spared] == [0, 0, 0]


async def test_a_lane_that_nobody_has_configured_is_gone_about_carefully(
    database: Database, clock: DatabaseClock
) -> None:
    """One job at a time and one a second: nobody says what its receiver bears."""
    worker = Worker.new(
        database,
        clock,
        endpoint=DispatchQueue(
            database, "", 1.0, RetryPolicy(Backoff(1.0, 1.0, 1.0), lambda: 0.0), {}
        ).endpoint("gone"),
    )
    await queued(worker, 5)
    (job,) = await take(worker)
    assert await take(worker) == []
    await worker.settle(job)
    assert await take(worker) == []
    await let_pass(database, 1)
    assert len(await take(worker)) == 1


async def test_a_probe_whose_worker_dies_says_nothing_of_the_lane(
    database: Database, clock: DatabaseClock
) -> None:
    """It is settled as unknown and spares its job; the next probe may go at once."""
    worker = Worker.new(database, clock, endpoint=endpoint(breaker=BREAKER))
    other = Worker.new(database, clock, endpoint=endpoint(breaker=BREAKER))
    await queued(worker, 3, max_attempts=2)
    await settle_all(worker, await take(worker), FAILED)
    await let_pass(database, 60)
    (lost,) = await take(worker)
    assert await take(other) == []
    await expire(database, "dispatch_lease")
    assert await other.queue.recover(clock.now()) == 1
    (probe,) = await take(other)
    assert (probe.is_probe, lost.is_probe) == (True, True)
    assert await changes(database) == ["opened"]
    assert await count(database, "dead_letter_dispatch") == 0


async def test_workers_that_die_do_not_open_the_breaker(
    database: Database, clock: DatabaseClock
) -> None:
    """A node that crashes again and again must not hold a lane that is well."""
    worker = Worker.new(database, clock, endpoint=endpoint(breaker=BREAKER))
    await queued(worker, 8)
    await take(worker)
    await expire(database, "dispatch_lease")
    assert await worker.queue.recover(clock.now()) == 8
    assert await breaker(database) == "closed"


async def test_a_probe_given_back_is_tried_again(database: Database, clock: DatabaseClock) -> None:
    """A node that stops before it sent takes neither the probe nor an attempt away."""
    worker = Worker.new(database, clock, endpoint=endpoint(breaker=BREAKER))
    await queued(worker, 3)
    await settle_all(worker, await take(worker), FAILED)
    await let_pass(database, 60)
    (probe,) = await take(worker)
    await worker.queue.release([probe])
    (again,) = await take(worker)
    assert (again.is_probe, again.attempt, again.spared) == (True, 2, 1)


async def test_what_the_receiver_refuses_for_good_does_not_open_it(
    database: Database, clock: DatabaseClock
) -> None:
    """A permanent status is a verdict on the payload, not on the lane."""
    worker = Worker.new(database, clock, endpoint=endpoint(breaker=BREAKER))
    await queued(worker, 6)
    now = clock.now()
    for job in await take(worker):
        result = WireResult(Outcome.FAILED, status=422, cause="status 422")
        await worker.queue.settle(job, result, now, now, permanent_statuses={422})
    assert await breaker(database) == "closed"
    assert await count(database, "dead_letter_dispatch") == 6


async def test_a_probe_that_is_refused_for_good_closes_the_breaker(
    database: Database, clock: DatabaseClock
) -> None:
    """The receiver is there again, and judges payloads."""
    worker = Worker.new(database, clock, endpoint=endpoint(breaker=BREAKER))
    await queued(worker, 4)
    await settle_all(worker, await take(worker, 3), FAILED)
    await let_pass(database, 60)
    (probe,) = await take(worker)
    result = WireResult(Outcome.FAILED, status=422, cause="status 422")
    now = clock.now()
    await worker.queue.settle(probe, result, now, now, permanent_statuses={422})
    assert await breaker(database) == "closed"


async def test_a_breaker_switched_off_holds_nothing(
    database: Database, clock: DatabaseClock
) -> None:
    """A lane that was held when its breaker was taken away flows at once, and counts attempts."""
    worker = Worker.new(database, clock, endpoint=endpoint(breaker=BREAKER))
    without = Worker.new(database, clock, endpoint=endpoint())
    await queued(worker, 5)
    await settle_all(worker, await take(worker, 3), FAILED)
    assert (await lane(without)).ready_in_seconds(endpoint()) <= 0
    jobs = await take(without)
    assert [job.is_probe for job in jobs] == [False] * 5
    await settle_all(without, jobs[:1], FAILED)
    assert await breaker(database) == "open"
    await settle_all(without, jobs[1:])
    assert await breaker(database) == "closed"


# ---- unknown, tallies


async def test_an_unknown_outcome_may_be_left_to_a_person(
    database: Database, clock: DatabaseClock
) -> None:
    """With `on_unknown: hold` what may have arrived is never sent again by itself."""
    worker = Worker.new(database, clock, endpoint=endpoint())
    await queued(worker, 1)
    (job,) = await take(worker)
    now = clock.now()
    await worker.queue.settle(job, LOST, now, now, on_unknown="hold")
    row = await only(database, "SELECT cause, attempts FROM dead_letter_dispatch")
    assert row == {"cause": "unknown, left to a person: timeout", "attempts": 1}


async def test_tallies_are_the_receipts(database: Database, clock: DatabaseClock) -> None:
    """Each receipt is counted once, also by a flush that is repeated."""
    worker = Worker.new(database, clock, endpoint=endpoint())
    other = Worker.new(database, clock, endpoint=endpoint())
    await queued(worker, 6)
    jobs = await take(worker)
    await settle_all(worker, jobs[:3])
    await settle_all(worker, jobs[:1])
    await settle_all(worker, jobs[3:4], FAILED)
    await settle_all(worker, jobs[4:5], LOST)
    await expire(database, "dispatch_lease")
    await other.queue.recover(clock.now())
    row = await only(database, "SELECT delivered, failed, not_sent, unknown FROM lane_status")
    assert row == {"delivered": 3, "failed": 1, "not_sent": 0, "unknown": 2}
