"""The dispatcher: claims due jobs lane by lane, sends them, settles what became of them.

A lane is a namespace's queue for an endpoint, and has its own room, so that a slow one does not
hold up the others. The first byte leaves only while the attempt's lease is certainly ours by this
machine's monotonic clock. An attempt that has not begun is given back, and its number with it. A
place is free again as soon as its attempt is over; the settlement is committed beside the next.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import math
from collections import Counter, deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from operator import itemgetter

from orbit.clock import Clock
from orbit.database.pool import TRANSIENT, Database, first_line
from orbit.errors import SecretUnreadable
from orbit.execution.dispatch import (
    CUT_OFF,
    SECRET_UNREADABLE,
    ClaimedJob,
    DispatchQueue,
    LaneKey,
    grain,
)
from orbit.execution.http1 import WITHHELD
from orbit.execution.memory import PayloadMemory
from orbit.execution.snapshots import Snapshot, Snapshots
from orbit.execution.wire import Outcome, Outgoing, Wire, WireResult, request_headers
from orbit.services.base import LAST_WORDS_SECONDS, Service, within
from orbit.webhooks import sign

_RECOVERY_SHARE = 6  # expired attempts are looked for this many times in a lease length
_GATHER_SECONDS = 0.01  # a few free places wait so long for more, so that a claim is worth it
_AHEAD_SECONDS = 0.03  # what a lane ended in such a time, it will have places for in the next
_UNSETTLED_PER_PLACE = 8  # what may wait for its commit, before nothing more is claimed


@dataclass(slots=True, eq=False)
class _Sending:
    """An attempt in hand: until when it is certainly ours, and how far it has come."""

    job: ClaimedJob
    expires: float
    started_at: datetime
    has_place: bool = False
    is_begun: bool = False
    is_over: bool = False
    snapshot: Snapshot | None = None
    task: asyncio.Task[None] | None = None

    @property
    def key(self) -> tuple[str, int]:
        """A job may be in hand twice, if its lease ran out and came back to this node."""
        return self.job.job_id, self.job.lease_number

    @property
    def lane(self) -> LaneKey:
        """The lane that it takes a place of."""
        return self.job.namespace, self.job.endpoint_key


class _Pace:
    """How many attempts each lane ended in the last stretch of time."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._until = clock, 0.0
        self._now: Counter[LaneKey] = Counter()
        self._before: Counter[LaneKey] = Counter()
        self._sum = 0

    def count(self, lane: LaneKey) -> None:
        """One more ended."""
        self._turn()
        self._now[lane] += 1

    def ended(self, lane: LaneKey) -> int:
        """In the last whole stretch."""
        self._turn()
        return self._before[lane]

    def total(self) -> int:
        """All lanes' together."""
        self._turn()
        return self._sum

    def _turn(self) -> None:
        at = self._clock.monotonic()
        if at >= self._until:
            is_next = at < self._until + _AHEAD_SECONDS
            self._before = self._now if is_next else Counter()
            self._sum = self._before.total()
            self._now, self._until = Counter(), at + _AHEAD_SECONDS


class Dispatcher(Service):
    """Sends jobs, up to a number in flight in all and per lane.

    A lane takes places up to its endpoint's `max_concurrency`. While other lanes have jobs due or
    in flight it also leaves at least as many free as it holds: one that hangs can take half of
    the places, two a third each, and there are always some for a lane that is well. Free places
    go first to the lane that has the fewest, among these to the one that has waited longest.

    A lane that ends many attempts is given jobs ahead, at most twice as many as it ended in the
    last 30 ms: they begin without waiting for the database. Not so where an unknown outcome is
    left to a person, since what is lost with its worker counts as unknown.
    """

    name = "dispatcher"

    def __init__(
        self,
        database: Database,
        queue: DispatchQueue,
        snapshots: Snapshots,
        wire: Wire,
        memory: PayloadMemory,
        clock: Clock,
        *,
        concurrency: int,
        lease_seconds: float,
        poll_seconds: float,
    ) -> None:
        super().__init__(database)
        self._queue, self._snapshots, self._wire = queue, snapshots, wire
        self._memory, self._clock = memory, clock
        self._concurrency = concurrency
        self._lease_seconds, self._poll_seconds = lease_seconds, poll_seconds
        self._sending: dict[tuple[str, int], _Sending] = {}
        self._on_wire: Counter[LaneKey] = Counter()  # each takes a place of this node
        self._taken = 0  # their sum
        self._held: Counter[LaneKey] = Counter()  # each takes a place of its lane, until settled
        self._claimed: deque[_Sending] = deque()  # wait for a place
        self._pace = _Pace(clock)
        self._served_at: dict[LaneKey, float] = {}
        self._ready_at: dict[LaneKey, float] = {}  # by the monotonic clock, as of the last look
        self._retry_at: dict[LaneKey, float] = {}  # the first of those scheduled here
        self._look_at = self._recover_at = 0.0
        self._is_short = False  # jobs are due that there was no place for

    async def run_once(self) -> float:
        """Claims what there is room for, lane by lane; rests until the next job is due.

        Which lanes have jobs is looked up once in a poll length, or when told of new ones.
        """
        await self._recover()
        if len(self._sending) >= self._concurrency * _UNSETTLED_PER_PLACE:
            self._is_short = True
            return self._poll_seconds
        if self._clock.monotonic() >= self._look_at:
            await self._look()
        now = self._clock.monotonic()
        rooms = self._shared([lane for lane, at in self._ready_at.items() if at <= now])
        if rooms and await self._claim(rooms):
            return _GATHER_SECONDS
        later = [at for at in self._ready_at.values() if at > now]
        self._is_short = len(later) < len(self._ready_at)
        return max(min([self._look_at, *later]) - self._clock.monotonic(), 0.0)

    def wake(self) -> None:
        """There are new jobs: looks at all lanes before the next claim."""
        self._look_at = 0.0
        super().wake()

    async def beat(self) -> None:
        """Prolongs the leases of attempts under way."""
        under_way = list(self._sending.values())
        if not under_way:
            return
        asked_at = self._clock.monotonic()
        held = await self._queue.renew([sending.job for sending in under_way])
        for sending in under_way:
            if sending.key in held:
                sending.expires = asked_at + self._lease_seconds

    async def drain(self, seconds: float) -> None:
        """Lets attempts end for so long; gives back what has not begun.

        An attempt that is cut off is settled as unknown.
        """
        deadline = self._clock.monotonic() + seconds
        await self.stop(seconds)
        giving_back = asyncio.create_task(self._cancel_and_give_back())
        tasks = {giving_back, *_tasks(self._sending.values())}
        await asyncio.wait(tasks, timeout=max(deadline - self._clock.monotonic(), 0))
        if not await within(LAST_WORDS_SECONDS, self._last_words(giving_back)):
            self._log.warning("settlements_abandoned")  # their leases run out

    @property
    def in_flight(self) -> int:
        """Attempts under way."""
        return len(self._sending)

    @property
    def _free(self) -> int:
        return self._concurrency - self._taken

    async def _look(self) -> None:
        """Which lanes have jobs, and when each is ready for a claim."""
        asked_at = self._clock.monotonic()
        self._look_at = asked_at + self._poll_seconds
        self._ready_at = {
            lane.key: asked_at + lane.ready_in_seconds(self._queue.endpoint(lane.endpoint_key))
            for lane in await self._queue.lanes()
        }
        for key, at in self._retry_at.items():  # it may have been scheduled meanwhile
            self._ready_at[key] = min(at, self._ready_at.get(key, at))

    def _room(self, lane: LaneKey) -> int:
        return self._queue.endpoint(lane[1]).max_concurrency - self._held[lane]

    def _shared(self, due: Sequence[LaneKey]) -> dict[LaneKey, int]:
        """The node's free places, dealt out one by one among the lanes with jobs due.

        Then what may be claimed ahead, to lanes that end attempts; none gets more than twice of
        what it ended.
        """
        waiting = Counter(sending.lane for sending in self._claimed)
        free, shares = self._free - waiting.total(), Counter[LaneKey]()
        ahead = min(self._pace.total(), 2 * self._concurrency) + min(free, 0)
        is_alone = len({*due, *self._on_wire}) == 1
        turns = [(self._held[lane], self._served_at.get(lane, 0.0), lane) for lane in due]
        heapq.heapify(turns)
        while turns and free + ahead > 0:
            held, served_at, lane = heapq.heappop(turns)
            if shares[lane] >= self._room(lane):
                continue
            if free > 0 and (is_alone or self._on_wire[lane] + shares[lane] < free):
                free -= 1
            elif ahead > 0 and waiting[lane] < self._ahead(lane):
                waiting[lane] += 1
                ahead -= 1
            else:
                continue
            shares[lane] += 1
            heapq.heappush(turns, (held + 1, served_at, lane))
        return +shares

    def _ahead(self, lane: LaneKey) -> int:
        is_held = self._queue.endpoint(lane[1]).on_unknown == "hold"
        return 0 if is_held else 2 * self._pace.ended(lane)

    async def _claim(self, rooms: dict[LaneKey, int]) -> int:
        asked_at = self._clock.monotonic()
        jobs = await self._queue.claim(rooms)
        self._expect(rooms, {(job.namespace, job.endpoint_key) for job in jobs}, asked_at)
        now, turns = self._clock.now(), Counter[LaneKey]()
        claimed = []
        for job in jobs:
            sending = _Sending(job, asked_at + self._lease_seconds, now)
            self._held[sending.lane] += 1
            self._sending[sending.key] = sending
            turns[sending.lane] += 1
            claimed.append((turns[sending.lane], sending))
        claimed.sort(key=itemgetter(0))  # the lanes take turns
        self._claimed.extend(sending for _, sending in claimed)
        self._begin()
        return len(jobs)

    def _begin(self) -> None:
        """Lets claimed jobs begin, as far as there are places."""
        while self._claimed and self._free > 0 and not self.is_stopping:
            sending = self._claimed.popleft()
            sending.has_place = True
            self._taken += 1
            self._on_wire[sending.lane] += 1
            sending.task = asyncio.create_task(self._deliver(sending))

    def _expect(self, asked: Iterable[LaneKey], fruitful: Collection[LaneKey], at: float) -> None:
        """A lane that gave nothing waits for a retry or the next look; a rate lets it wait."""
        for lane in asked:
            self._served_at[lane] = at
            rate = self._queue.endpoint(lane[1]).rate_per_second
            if lane not in fruitful:
                self._ready_at.pop(lane, None)
                if (retry_at := self._retry_at.pop(lane, 0.0)) > at:
                    self._ready_at[lane] = retry_at
            elif rate is not None:
                self._ready_at[lane] = at + grain(rate) / rate

    async def _recover(self) -> None:
        now = self._clock.monotonic()
        if now >= self._recover_at:
            self._recover_at = now + self._lease_seconds / _RECOVERY_SHARE
            count = await self._queue.recover(self._clock.now())
            if count:
                self._log.warning("attempts_unknown", count=count, reason="worker lost")

    async def _deliver(self, sending: _Sending) -> None:
        job = sending.job
        try:
            async with self._memory.reserve(job.size):
                sending.started_at = self._clock.now()
                result = await self._attempt(sending)
            sending.is_over = True
            self._vacate(sending)
            if result is None:
                await within(self._lease_seconds, self._give_back([job]))
            else:
                await self._settle(sending, result)
                self._tell(job, result)
        except Exception:  # noqa: BLE001 - whatever it is, the lease runs out
            # The attempt is then settled as unknown.
            self._log.exception("attempt_interrupted", **_named(job))
        finally:
            self._vacate(sending)
            self._forget(sending)

    def _vacate(self, sending: _Sending) -> None:
        """Frees the attempt's place on this node, once."""
        if sending.has_place:
            sending.has_place = False
            self._taken -= 1
            _take_one(self._on_wire, sending.lane)
            self._pace.count(sending.lane)
            self._begin()
            self._offer()

    def _forget(self, sending: _Sending) -> None:
        """Frees its place in the lane: it is settled, or given back, or lost."""
        if self._sending.pop(sending.key, None) is not None:
            _take_one(self._held, sending.lane)
            self._offer()

    def _offer(self) -> None:
        """Room for many jobs is worth a claim at once; for a few it waits a little."""
        room = self._free + self._pace.total() - len(self._claimed)
        if room * 2 >= self._concurrency + self._pace.total():
            super().wake()
        elif self._is_short:
            self._is_short = False
            asyncio.get_running_loop().call_later(_GATHER_SECONDS, super().wake)

    async def _settle(self, sending: _Sending, result: WireResult) -> None:
        snapshot = sending.snapshot
        move = await self._queue.settle(
            sending.job,
            result,
            sending.started_at,
            self._clock.now(),
            permanent_statuses=snapshot.permanent_statuses if snapshot else (),
            on_unknown=snapshot.on_unknown if snapshot else "retry",
        )
        if move.retry_seconds is not None:
            at = self._clock.monotonic() + move.retry_seconds
            self._retry_at[sending.lane] = min(at, self._retry_at.get(sending.lane, at))
            if at < self._ready_at.get(sending.lane, math.inf):
                self._ready_at[sending.lane] = at
                super().wake()  # its rest may be longer

    async def _give_back(self, jobs: Sequence[ClaimedJob]) -> None:
        await self._database.persist(lambda: self._queue.release(jobs))

    async def _cancel_and_give_back(self) -> None:
        self._claimed.clear()
        unbegun = [one for one in self._sending.values() if not (one.is_begun or one.is_over)]
        tasks = _cancelled(unbegun)
        if tasks:
            await asyncio.wait(tasks, timeout=LAST_WORDS_SECONDS)
        if unbegun:
            await self._give_back([sending.job for sending in unbegun])
        for sending in unbegun:
            self._forget(sending)

    def _tell(self, job: ClaimedJob, result: WireResult) -> None:
        """Successes are in the facts, and in the log for who looks closely."""
        if result.outcome is not Outcome.DELIVERED:
            tell = self._log.warning
        elif self._log.is_enabled_for(logging.DEBUG):
            tell = self._log.debug
        else:
            return
        tell(
            "attempt_ended",
            outcome=result.outcome.value,
            attempt=job.attempt,
            status=result.status,
            cause=result.cause,
            **_named(job),
        )

    async def _attempt(self, sending: _Sending) -> WireResult | None:
        """Sends once; no result if it did not begin, for want of the database or of the lease."""
        job = sending.job
        try:
            snapshot = await self._snapshots.read(job.namespace, job.snapshot_id)
            sending.snapshot = snapshot
            content = await self._queue.content(job)
        except SecretUnreadable as error:
            return WireResult(Outcome.NOT_SENT, cause=SECRET_UNREADABLE, error=str(error))
        except TRANSIENT as error:
            self._log.warning("attempt_not_begun", error=first_line(error), **_named(job))
            await asyncio.sleep(self._poll_seconds)  # given back, it is due at once
            return None
        outgoing = _outgoing(job, snapshot, content, int(self._clock.now().timestamp()))

        def may_send() -> bool:
            sending.is_begun = self._clock.monotonic() < sending.expires
            return sending.is_begun

        result = await self._wire.send(outgoing, may_send)
        return None if result.cause == WITHHELD else result

    async def _last_words(self, giving_back: asyncio.Task[None]) -> None:
        """Settles what is cut off; waits for what is over and only has to be committed."""
        under_way = list(self._sending.values())
        cut_off = [one for one in under_way if one.is_begun and not one.is_over]
        _cancelled(cut_off)
        ends = [giving_back, *_tasks(under_way), *map(self._settle_cut_off, cut_off)]
        for result in await asyncio.gather(*ends, return_exceptions=True):
            if isinstance(result, Exception):
                self._log.error("settlement_failed", exc_info=result)
        await self._queue.drained()

    async def _settle_cut_off(self, sending: _Sending) -> None:
        error = "the node was told to stop before an answer was seen"
        result = WireResult(Outcome.UNKNOWN, cause=CUT_OFF, error=error)
        await self._settle(sending, result)


def _take_one(places: Counter[LaneKey], lane: LaneKey) -> None:
    places[lane] -= 1
    if not places[lane]:
        del places[lane]


def _tasks(attempts: Collection[_Sending]) -> list[asyncio.Task[None]]:
    return [sending.task for sending in attempts if sending.task is not None]


def _cancelled(attempts: Collection[_Sending]) -> list[asyncio.Task[None]]:
    tasks = _tasks(attempts)
    for task in tasks:
        task.cancel()
    return tasks


def _outgoing(job: ClaimedJob, snapshot: Snapshot, content: bytes, now: int) -> Outgoing:
    """The request; `now` in Unix seconds is what its signature vouches for."""
    headers = request_headers(
        content_type=job.content_type,
        digest=job.digest,
        job_id=job.job_id,
        token=snapshot.token,
        given=snapshot.headers,
    )
    if snapshot.signing_keys is not None:
        headers["webhook-timestamp"] = str(now)
        headers["webhook-signature"] = sign(snapshot.signing_keys, job.job_id, now, content)
    headers["Orbit-Namespace"] = job.namespace
    if job.profile_id:
        headers["Orbit-Profile-Id"] = job.profile_id
        headers["Orbit-Run-Profile-Id"] = job.run_profile_id
    headers["Orbit-Cycle-Run-Id"] = job.cycle_id
    headers["Orbit-Job-Id"] = job.job_id
    headers["Orbit-Attempt"] = str(job.attempt)
    headers["traceparent"] = job.traceparent
    return Outgoing(
        snapshot.method,
        snapshot.url,
        headers,
        content,
        snapshot.timeout_seconds,
        snapshot.secrets,
        snapshot.proxy,
    )


def _named(job: ClaimedJob) -> dict[str, str]:
    return {
        "namespace": job.namespace,
        "cycle": job.cycle_id,
        "job": job.job_id,
        "trace": job.traceparent,
    }
