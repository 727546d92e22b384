"""The lease protocol of dispatch, driven at random beside a small pure model of it.

Three nodes share four lanes on a real database. Hypothesis chooses who claims, sends, dies, comes
too late, halts, resumes, or loses what is disposable. After every step the database must say what
the model says: who holds which attempt, which receipts there are, what the lanes' tallies and the
cycles' counters add up to. At the end all is let run: every job is delivered or dead, every cycle
done.

One database serves all runs, each in a namespace of its own. Time is moved for the leases, by
steps that stay seconds away from the length of a lease and of a hold.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from orbit.clock import DatabaseClock, derived_id, new_id
from orbit.database.pool import Database
from orbit.database.repair import repair
from orbit.endpoints import Breaker, Endpoint
from orbit.execution.dispatch import ClaimedJob, DispatchQueue, RetryPolicy
from orbit.execution.recorder import Recorder
from orbit.execution.wire import Outcome, WireResult
from orbit.governance.halt import Brake, Order
from tests.database.engine import DELIVERED, FAILED, NO_DELAY, Worker
from tests.database.lease_model import Job, Model

LEASE_SECONDS = 35.0
PERMANENT = 422
RUN = Breaker(failures=3, least=10_000, hold_seconds=64.0, longest_hold_seconds=256.0)
SHARE = Breaker(failures=10_000, least=4, share=0.5, hold_seconds=64.0, longest_hold_seconds=256.0)
URL = "http://127.0.0.1:9/"
LANES = {
    "narrow": Endpoint("narrow", URL, max_concurrency=2, breaker=None),
    "rated": Endpoint("rated", URL, max_concurrency=5, rate_per_second=3.0, breaker=None),
    "brittle": Endpoint("brittle", URL, max_concurrency=3, breaker=RUN),
    "fragile": Endpoint("fragile", URL, max_concurrency=4, rate_per_second=4.0, breaker=SHARE),
}
REFUSED = WireResult(Outcome.FAILED, status=PERMANENT, cause="status 422")
LOST = WireResult(Outcome.UNKNOWN, cause="timeout")
RESULT = st.sampled_from([DELIVERED, FAILED, FAILED, LOST, REFUSED])
CHANCES = (0.0, 0.5, 0.95)  # what each node draws
Result = TypeVar("Result")
_namespaces = itertools.count(1)

SIGHT = b"""
SELECT lane.endpoint_key AS lane, lane.probe_at IS NOT NULL AS is_open,
    COALESCE(lane.probe_at <= orbit_now(), false) AS is_probe_due, count(lease.node_id) AS flying,
    count(*) FILTER (WHERE lease.node_id IS NULL AND lease.due_at <= orbit_now()) AS due
FROM lane LEFT JOIN dispatch_lease lease
    ON lease.namespace = lane.namespace AND lease.endpoint_key = lane.endpoint_key
WHERE lane.namespace = %s GROUP BY lane.namespace, lane.endpoint_key"""
EXPIRED = b"""SELECT job_id FROM dispatch_lease
WHERE namespace = %s AND node_id IS NOT NULL AND due_at <= orbit_now()"""
LEASES = b"""SELECT job_id, endpoint_key AS lane, attempt, node_id, lease_number, spared, is_retry,
    is_probe FROM dispatch_lease WHERE namespace = %s"""
RECEIPTS = b"SELECT job_id, attempt, outcome FROM delivery_receipt WHERE namespace = %s"
DEAD = b"SELECT job_id, attempts FROM dead_letter_dispatch WHERE namespace = %s"
TALLIES = b"""SELECT endpoint_key AS lane, sum(delivered) AS delivered, sum(failed) AS failed,
    sum(not_sent) AS not_sent, sum(unknown) AS unknown
FROM lane_tally WHERE namespace = %s GROUP BY endpoint_key"""
WAITING = b"""SELECT cycle_id, jobs, outstanding, delivered, dead_lettered, attempts
FROM cycle_lease WHERE namespace = %s"""
ENDED = b"""SELECT cycle_id, (detail ->> 'jobs')::int AS jobs, 0 AS outstanding,
    (detail ->> 'delivered')::int AS delivered, (detail ->> 'deadLettered')::int AS dead_lettered,
    (detail ->> 'attempts')::int AS attempts
FROM cycle_checkpoint WHERE namespace = %s AND stage = 'cycle_finished'"""
BREAKERS = b"SELECT endpoint_key AS lane, failures, probe_at FROM lane WHERE namespace = %s"
PASS = (
    b"UPDATE dispatch_lease SET due_at = due_at - %s * interval '1 second'",
    b"""UPDATE lane SET tokens_at = tokens_at - %s * interval '1 second',
    probe_at = probe_at - %s * interval '1 second',
    window_at = window_at - %s * interval '1 second'""",
)


@dataclass(slots=True, eq=False)
class Hand:
    """An attempt that a node believes to be its own."""

    node: Worker
    job: ClaimedJob
    result: WireResult | None = None

    @property
    def holder(self) -> tuple[str, int]:
        return self.node.node_id, self.job.lease_number


class LeaseProtocol(RuleBasedStateMachine):
    """Nodes at work in one namespace; `begun` attempts have bytes on the wire."""

    def __init__(self, loop: asyncio.AbstractEventLoop, database: Database) -> None:
        super().__init__()
        self.loop, self.database = loop, database
        self.namespace = f"space-{next(_namespaces)}"
        self.run(self._wipe("dispatch_lease", "cycle_lease", "lane", "lane_tally"))
        row = self.run(database.fetch_one(b"SELECT orbit_now() AS now"))
        assert row is not None
        self.clock = DatabaseClock(row["now"])
        self.nodes = [self._node(chance) for chance in CHANCES]
        self.model = Model()
        self.brake = self._brake(self.nodes[0])
        self.unbegun: list[Hand] = []
        self.begun: list[Hand] = []
        self.settled: list[Hand] = []
        self.moved_seconds = 0.0
        self.tokens = dict.fromkeys(LANES, (math.inf, 0.0))  # at most so many, at that time
        self.has_lost_leases = False

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Runs one step of the asynchronous engine."""
        return self.loop.run_until_complete(work)

    def _node(self, chance: float) -> Worker:
        node_id, policy = new_id(self.clock.now()), RetryPolicy(NO_DELAY.backoff, lambda: chance)
        queue = DispatchQueue(self.database, node_id, LEASE_SECONDS, policy, LANES)
        return Worker(self.database, self.clock, node_id, Recorder(self.database, node_id), queue)

    def _brake(self, node: Worker) -> Brake:
        async def recover(_namespace: str) -> None:
            raise AssertionError("a halt that waits for nothing recovers nothing")

        return Brake(self.database, node.node_id, recover=recover, on_changed=lambda: None)

    async def _wipe(self, *tables: str) -> None:
        for table in tables:
            await self.database.execute(f"DELETE FROM {table}".encode())

    async def _rows(self, query: bytes) -> list[dict[str, Any]]:
        return await self.database.fetch_all(query, [self.namespace])

    # ---- what may happen

    @initialize(count=st.integers(1, 4))
    def fill(self, count: int) -> None:
        """There is something to do in every lane."""
        for _ in range(count):
            self.enqueue(set(LANES), 3)

    @precondition(lambda self: not self.model.is_halted)
    @rule(lanes=st.sets(st.sampled_from(sorted(LANES)), min_size=1), attempts=st.integers(1, 3))
    def enqueue(self, lanes: set[str], attempts: int) -> None:
        """A cycle with a job in each of some lanes."""
        begun = self.nodes[0].begin_dispatch(self.namespace, sorted(lanes), attempts)
        cycle = self.run(begun).cycle_id
        for lane in lanes:
            self.model.jobs[derived_id(cycle, "job", "0", lane)] = Job(cycle, lane, attempts)

    @precondition(lambda self: self.model.jobs)
    @rule(nodes=st.sets(st.integers(0, 2), min_size=1), room=st.integers(1, 4))
    def claim(self, nodes: set[int], room: int) -> None:
        """Some nodes at once ask every lane for jobs."""
        self._claim([self.nodes[number] for number in sorted(nodes)], room)

    @rule(
        number=st.integers(0, 2), seconds=st.sampled_from([0, 10, 300]), result=RESULT | st.none()
    )
    def serve(self, number: int, seconds: int, result: WireResult | None) -> None:
        """A node's whole round: all it can claim ends alike, or is given back (no result)."""
        self.let_pass(seconds)
        under_way = {id(hand) for hand in self.unbegun}
        self._claim([self.nodes[number]], 4)
        for hand in [hand for hand in self.unbegun if id(hand) not in under_way]:
            self.unbegun.remove(hand)
            if result is None:
                self._release(hand)
            else:
                self._finish(hand, result)

    @precondition(lambda self: self.unbegun)
    @rule(pick=st.integers(0, 99), share=st.sampled_from([1, 2, 3]))
    def begin(self, pick: int, share: int) -> None:
        """Attempts go out on the wire."""
        for _ in range(math.ceil(len(self.unbegun) / share)):
            self.begun.append(self.unbegun.pop(pick % len(self.unbegun)))

    @precondition(lambda self: self.begun)
    @rule(pick=st.integers(0, 99), count=st.integers(1, 4), result=RESULT)
    def finish(self, pick: int, count: int, result: WireResult) -> None:
        """Attempts end, in time or after their lease was lost."""
        for _ in range(min(count, len(self.begun))):
            self._finish(self.begun.pop(pick % len(self.begun)), result)

    @precondition(lambda self: self.settled)
    @rule(pick=st.integers(0, 99))
    def finish_again(self, pick: int) -> None:
        """The answer to a settlement was lost, so it is flushed once more."""
        hand = self.settled[pick % len(self.settled)]
        assert hand.result is not None
        self._settle(hand, hand.result)

    @precondition(lambda self: self.unbegun)
    @rule(pick=st.integers(0, 99))
    def release(self, pick: int) -> None:
        """A node gives an attempt back that it has not begun."""
        self._release(self.unbegun.pop(pick % len(self.unbegun)))

    @rule(number=st.integers(0, 2))
    def renew(self, number: int) -> None:
        """A heartbeat prolongs what is the node's, and says what is not any more."""
        node = self.nodes[number]
        hands = [hand for hand in (*self.unbegun, *self.begun) if hand.node is node]
        held = {
            (hand.job.job_id, hand.job.lease_number)
            for hand in hands
            if self.model.jobs[hand.job.job_id].holder == hand.holder
        }
        assert self.run(node.queue.renew([hand.job for hand in hands])) == held

    @rule(seconds=st.sampled_from([10, 40, 300]))
    def let_pass(self, seconds: int) -> None:
        """Time goes by: less than a lease, more than one, longer than any hold."""
        self.moved_seconds += seconds
        for statement in PASS:
            given = [seconds] * statement.count(b"%s")
            self.run(self.database.execute(statement, given))

    @rule(number=st.integers(0, 2), seconds=st.sampled_from([0, 40]))
    def recover(self, number: int, seconds: int = 0) -> None:
        """A node settles the attempts whose lease is over, now or a lease length later."""
        self.let_pass(seconds)
        expired = [row["job_id"] for row in self.run(self._rows(EXPIRED))]
        assert self.run(self.nodes[number].queue.recover(self.clock.now())) == len(expired)
        for job_id in expired:
            self.model.recover(job_id)

    @rule()
    def halt(self) -> None:
        """The namespace is halted, perhaps again; what is in flight is known, on which node too."""
        order = Order(self.namespace, "model", "model")
        answer = self.run(self.brake.halt(order, wait_seconds=0))
        self.model.halt(answer.epoch)
        assert answer.is_fenced
        assert answer.is_quiesced == (not self.model.in_flight())
        found = {one.job_id: (one.node_id, one.number) for one in answer.in_flight}
        assert found == self.model.in_flight()

    @precondition(lambda self: self.model.is_halted)
    @rule()
    def resume(self) -> None:
        """It goes on."""
        self.run(self.brake.resume(Order(self.namespace, "model", "model", "enough")))
        self.model.resume()

    @rule()
    def forget_lanes(self) -> None:
        """Lanes and tallies are lost, and with them the breakers and the tokens."""
        self.run(self._wipe("lane", "lane_tally"))
        self.model.tallies.clear()
        self.tokens = dict.fromkeys(LANES, (math.inf, 0.0))

    @precondition(lambda self: self.model.jobs)
    @rule(is_lost=st.booleans())
    def repair(self, is_lost: bool) -> None:
        """The leases are rebuilt from the facts, once after they were all lost."""
        if is_lost and not self.has_lost_leases:
            self.has_lost_leases = True
            self.run(self._wipe("dispatch_lease", "cycle_lease", "namespace_fence"))
            self.model.rebuild()
        self.run(repair(self.database))

    def teardown(self) -> None:
        """Whatever has happened: with time and a receiver that is well, all comes to an end."""
        if self.model.is_halted:
            self.resume()
        for _ in range(200):
            if all(job.end for job in self.model.jobs.values()):
                break
            self.let_pass(300)
            self.recover(0)
            self._claim(self.nodes[:1], 20)
            if self.unbegun:
                self.begin(0, 1)
            while self.begun:
                self.finish(0, 4, DELIVERED)
        self.agrees()
        assert all(job.end for job in self.model.jobs.values())
        assert self.run(self._rows(WAITING)) == []

    # ---- how it is done

    def _claim(self, nodes: Sequence[Worker], room: int) -> None:
        self.run(nodes[0].queue.lanes())
        sight = {row["lane"]: row for row in self.run(self._rows(SIGHT))}
        rooms = {(self.namespace, lane): room for lane in LANES}

        async def at_once() -> list[list[ClaimedJob]]:
            return await asyncio.gather(*[node.queue.claim(rooms, 64) for node in nodes])

        given: Counter[str] = Counter()
        begun = time.monotonic()
        for node, jobs in zip(nodes, self.run(at_once()), strict=True):
            for job in jobs:
                self.model.claim(job, node.node_id)
                self.unbegun.append(Hand(node, job))
                seen = sight[job.endpoint_key]
                assert job.is_probe == seen["is_open"], "only an open breaker makes a probe"
                given[job.endpoint_key] += 1
        for lane, seen in sight.items():
            self._check_claim(LANES[lane], seen, given[lane], room * len(nodes))
            self._spend(LANES[lane], given[lane], begun)

    def _check_claim(self, lane: Endpoint, seen: dict[str, Any], given: int, room: int) -> None:
        """Not more than the lane allows; without a rate, never nothing: no lane starves."""
        if self.model.is_halted:
            assert given == 0
            return
        if seen["is_open"]:
            most = int(seen["flying"] == 0)
            least = most if seen["is_probe_due"] else 0
        else:
            most = least = min(room, lane.max_concurrency - seen["flying"])
        assert given <= most
        if lane.rate_per_second is None:
            assert given >= min(least, seen["due"])

    def _spend(self, lane: Endpoint, given: int, begun: float) -> None:
        """Takes tokens from a bucket that is never emptier than the lane's.

        It was filled until now, and is filled on from when the claim began.
        """
        if (rate := lane.rate_per_second) is not None:
            now = time.monotonic() + self.moved_seconds
            tokens, at = self.tokens[lane.key]
            tokens = min(rate, tokens + (now - at) * rate) if at else rate
            assert given <= tokens + 1e-6 + 0.01 * rate, "faster than its rate"
            if given or not at:
                self.tokens[lane.key] = tokens - given, begun + self.moved_seconds

    def _release(self, hand: Hand) -> None:
        self.run(hand.node.queue.release([hand.job]))
        self.model.release(hand.job.job_id, hand.holder)

    def _finish(self, hand: Hand, result: WireResult) -> None:
        hand.result = result
        self._settle(hand, result)
        self.settled.append(hand)

    def _settle(self, hand: Hand, result: WireResult) -> None:
        now, is_final = self.clock.now(), result.status == PERMANENT
        queue = hand.node.queue
        is_new = (hand.job.job_id, hand.job.attempt) not in self.model.receipts
        self.run(queue.settle(hand.job, result, now, now, permanent_statuses={PERMANENT}))
        self.model.settle(hand.job, hand.holder, result.outcome, is_final=is_final)
        if is_new and result.outcome is Outcome.DELIVERED:
            lanes = {row["lane"]: row for row in self.run(self._rows(BREAKERS))}
            if (lane := lanes.get(hand.job.endpoint_key)) is not None:
                assert (lane["failures"], lane["probe_at"]) == (0, None)

    # ---- what must hold

    @invariant()
    def agrees(self) -> None:
        """The database says what the model says."""
        self._check_leases(self.run(self._rows(LEASES)))
        self._check_facts(self.run(self._rows(RECEIPTS)), self.run(self._rows(DEAD)))
        tallies = {
            (row["lane"], outcome.value): row[outcome.value]
            for row in self.run(self._rows(TALLIES))
            for outcome in Outcome
            if row[outcome.value]
        }
        assert tallies == self.model.tallies
        cycles = [*self.run(self._rows(WAITING)), *self.run(self._rows(ENDED))]
        assert len(cycles) == len({row["cycle_id"] for row in cycles})
        counters = {row.pop("cycle_id"): tuple(row.values()) for row in cycles}
        assert counters == self.model.counters()
        for row in self.run(self._rows(BREAKERS)):
            breaker = LANES[row["lane"]].breaker
            is_run = breaker is not None and row["failures"] >= breaker.failures
            assert row["probe_at"] is not None or not is_run
            assert row["probe_at"] is None or breaker is not None

    def _check_leases(self, rows: list[dict[str, Any]]) -> None:
        """Each job that is not over has one lease; lanes keep their cap and their one probe."""
        leases = {
            row["job_id"]: (
                row["attempt"],
                row["spared"],
                row["is_retry"],
                (row["node_id"], row["lease_number"]) if row["node_id"] else None,
            )
            for row in rows
        }
        assert leases == {
            job_id: (job.attempt, job.spared, job.is_retry, job.holder)
            for job_id, job in self.model.jobs.items()
            if job.end is None
        }
        flying = Counter(row["lane"] for row in rows if row["node_id"])
        assert all(count <= LANES[lane].max_concurrency for lane, count in flying.items())
        probes = Counter(row["lane"] for row in rows if row["node_id"] and row["is_probe"])
        assert all(count == 1 for count in probes.values())

    def _check_facts(self, receipts: list[dict[str, Any]], dead: list[dict[str, Any]]) -> None:
        """One receipt an attempt, without a gap; nobody is dead who had an attempt left."""
        found = {(row["job_id"], row["attempt"]): Outcome(row["outcome"]) for row in receipts}
        assert found == self.model.receipts
        last = Counter(row["job_id"] for row in receipts)
        assert all(attempt <= last[job_id] for job_id, attempt in found)
        for job_id, job in self.model.jobs.items():
            assert last[job_id] >= job.attempt - (job.holder is not None)
        over = {job_id: job for job_id, job in self.model.jobs.items() if job.end == "dead"}
        assert {row["job_id"]: row["attempts"] for row in dead} == {
            job_id: job.attempt for job_id, job in over.items()
        }


def test_the_lease_protocol_agrees_with_its_model(dsn: str) -> None:
    """However claims, ends, deaths and losses follow each other, the promises hold."""
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        database = Database(dsn, minimum=1, maximum=4)
        loop.run_until_complete(database.open())
        try:
            run_state_machine_as_test(
                partial(LeaseProtocol, loop, database),  # type: ignore[arg-type]
                settings=settings(
                    derandomize=True,
                    deadline=None,
                    database=None,
                    max_examples=40,
                    stateful_step_count=40,
                    suppress_health_check=list(HealthCheck),
                ),
            )
        finally:
            loop.run_until_complete(database.close())
