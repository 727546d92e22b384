"""The dispatcher: claims due jobs lane by lane, sends them, settles what became of them.

A lane is a namespace's queue for an endpoint, and has its own room, so that a slow one does not
hold up the others. The first byte leaves only while the attempt's lease is certainly ours by this
machine's monotonic clock, and no halt is known that came after its claim; each further piece only
while the lease lasts. An attempt that has not begun is given back, and its number with it. A place
is free again as soon as its attempt is over; the settlement is committed beside the next.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from psycopg.errors import LockNotAvailable

from orbit import tracing
from orbit.clock import Clock
from orbit.database.pool import TRANSIENT, Database, first_line
from orbit.errors import SecretUnreadable
from orbit.execution.cycle import MOST_FENCES
from orbit.execution.dispatch import (
    CUT_OFF,
    NOT_PREPARED,
    SECRET_UNREADABLE,
    ClaimedJob,
    DispatchQueue,
    LaneKey,
    grain,
)
from orbit.execution.http1 import WITHHELD
from orbit.execution.lapse import Hold
from orbit.execution.memory import PayloadMemory
from orbit.execution.snapshots import Snapshot, Snapshots
from orbit.execution.wire import Outcome, Outgoing, Wire, WireResult, request_headers
from orbit.governance.fence import Fences
from orbit.services.base import LAST_WORDS_SECONDS, Service, within
from orbit.services.places import Places
from orbit.webhooks import sign

_RECOVERY_SHARE = 6  # expired attempts are looked for this many times in a lease length
_GATHER_SECONDS = 0.01  # a few free places wait so long for more, so that a claim is worth it
_UNSETTLED_PER_PLACE = 16  # what may be in hand, ahead or unsettled, before nothing more is claimed


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


class Dispatcher(Service):
    """Sends jobs, up to `concurrency` at once."""

    name = "dispatcher"

    def __init__(
        self,
        database: Database,
        queue: DispatchQueue,
        snapshots: Snapshots,
        wire: Wire,
        memory: PayloadMemory,
        clock: Clock,
        fences: Fences,
        *,
        concurrency: int,
        lease_seconds: float,
        poll_seconds: float,
    ) -> None:
        super().__init__(database)
        self._queue, self._snapshots, self._wire = queue, snapshots, wire
        self._memory, self._clock, self._fences = memory, clock, fences
        self._lease_seconds, self._poll_seconds = lease_seconds, poll_seconds
        self._sending: dict[tuple[str, int], _Sending] = {}
        self._traced = tracing.traced(self._deliver, _span_of)
        self._places: Places[_Sending] = Places(concurrency, queue.endpoint, clock)
        self._ready_at: dict[LaneKey, float] = {}  # by the monotonic clock, as of the last look
        self._retry_at: dict[LaneKey, float] = {}  # the first of those scheduled here
        self._look_at = self._recover_at = self._unsure_until = 0.0
        self._is_telling_all = self._log.is_enabled_for(logging.DEBUG)
        self._is_short = False  # jobs are due that there was no place for
        self._withdrawn: list[_Sending] = []  # to be given back: their lane is held
        queue.on_held = self._withdraw

    async def run_once(self) -> float:
        """Claims what there is room for, lane by lane; rests until the next job is due.

        Which lanes have jobs is looked up once in a poll length, or when told of new ones.
        """
        try:
            return await self._pass()
        except TRANSIENT:  # other nodes are to write what they know, when the database is back
            self._recover_at = self._clock.monotonic() + self._lease_seconds / 2
            raise

    async def _pass(self) -> float:
        await self._recover()
        if withdrawn := self._withdrawn:
            self._withdrawn = []
            await self._cancel_unbegun(withdrawn)
        if len(self._sending) >= self._places.count * _UNSETTLED_PER_PLACE:
            self._is_short = True
            return self._poll_seconds
        if self._clock.monotonic() >= self._look_at:
            await self._look()
        now = self._clock.monotonic()
        self._begin()  # as lanes come and go, so does what each may take
        rooms = self._places.shares(self._due(now))
        few = _of_few_namespaces(rooms)
        if rooms and (await self._claim(few) or len(few) < len(rooms)):
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

    async def _look(self) -> None:
        """Which lanes have jobs, and when each is ready for a claim."""
        asked_at = self._clock.monotonic()
        self._look_at = asked_at + self._poll_seconds
        lanes = await self._queue.lanes()
        self._ready_at = {
            lane.key: asked_at + lane.ready_in_seconds(self._queue.endpoint(lane.endpoint_key))
            for lane in lanes
        }
        self._withdraw({lane.key for lane in lanes if self._queue.is_held(lane)})
        for key, at in self._retry_at.items():  # it may have been scheduled meanwhile
            self._ready_at[key] = min(at, self._ready_at.get(key, at))

    async def _claim(self, rooms: dict[LaneKey, int]) -> int:
        asked_at = self._clock.monotonic()
        try:
            jobs = await self._queue.claim(rooms, self._places.count)
        except LockNotAvailable:  # another's claim, or a halt, has stopped in its middle
            return 0
        except TRANSIENT:  # it may have been committed all the same
            await self._give_back_unseen(rooms)
            raise
        self._expect(rooms, {(job.namespace, job.endpoint_key) for job in jobs}, asked_at)
        now = self._clock.now()
        for job in jobs:
            sending = _Sending(job, asked_at + self._lease_seconds, now)
            self._sending[sending.key] = sending
            self._places.add(sending.lane, sending)
        self._begin()
        return len(jobs)

    def _begin(self) -> None:
        """Lets claimed jobs begin, as far as there are places for their lanes."""
        if self.is_stopping:
            return
        for sending in self._places.take(self._due(self._clock.monotonic())):
            sending.has_place = True
            sending.task = asyncio.create_task(self._traced(sending))

    def _withdraw(self, lanes: Collection[LaneKey]) -> None:
        """What was claimed ahead for lanes that are held now waits in the database."""
        if not lanes:  # as after nearly every settlement
            return
        ahead = {
            one
            for one in self._sending.values()
            if one.lane in lanes and one.task is None and not one.job.is_probe
        }
        if ahead:
            self._places.withdraw(ahead)
            self._withdrawn += ahead
            super().wake()

    def _due(self, now: float) -> list[LaneKey]:
        """Lanes with jobs to claim, as far as is known."""
        return [lane for lane, at in self._ready_at.items() if at <= now]

    def _expect(self, asked: Collection[LaneKey], fruitful: Collection[LaneKey], at: float) -> None:
        """A lane that gave nothing waits for a retry or the next look; a rate lets it wait."""
        self._places.served(asked, at)
        for lane in asked:
            rate = self._queue.endpoint(lane[1]).rate_per_second
            if lane not in fruitful:
                self._ready_at.pop(lane, None)
                if (retry_at := self._retry_at.pop(lane, 0.0)) > at:
                    self._ready_at[lane] = retry_at
            elif rate is not None:
                self._ready_at[lane] = at + grain(rate) / rate

    async def _recover(self) -> None:
        """Ends what others let run out, never what this node holds: that it knows better."""
        now = self._clock.monotonic()
        if now >= self._recover_at:
            self._recover_at = now + self._lease_seconds / _RECOVERY_SHARE
            if any(one.expires <= now for one in self._sending.values()):
                await self.beat()
            count = await self._queue.recover(self._clock.now())
            if count:
                self._log.warning("attempts_unknown", count=count, reason="worker lost")

    async def _deliver(self, sending: _Sending) -> None:
        job = sending.job
        try:
            if job.content is not None:
                result = await self._attempt(sending)
            else:
                async with self._memory.reserve(job.size, owner=sending.lane):
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
            self._unsure_until = self._clock.monotonic() + 2 * self._lease_seconds
            self._log.exception("attempt_interrupted", **_named(job))
        finally:
            self._vacate(sending)
            self._forget(sending)

    def _vacate(self, sending: _Sending) -> None:
        """Frees the attempt's place on this node, once."""
        if sending.has_place:
            sending.has_place = False
            self._places.leave(sending.lane)
            self._begin()
            self._offer()

    def _forget(self, sending: _Sending) -> None:
        """Frees its place in the lane: it is settled, or given back, or lost."""
        if self._sending.pop(sending.key, None) is not None:
            self._places.settle(sending.lane)
            self._offer()

    def _offer(self) -> None:
        """Room for many jobs is worth a claim at once; for a few it waits a little."""
        if self._wake.is_set():
            return
        if self._places.is_worth_a_claim:
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
            self._await_retry(sending.lane, move.retry_seconds)

    def _await_retry(self, lane: LaneKey, seconds: float) -> None:
        now = self._clock.monotonic()
        at, first = now + seconds, self._retry_at.get(lane, 0.0)
        self._retry_at[lane] = min(at, first) if first > now else at
        if at < self._ready_at.get(lane, math.inf):
            self._ready_at[lane] = at
            super().wake()  # its rest may be longer

    async def _give_back(self, jobs: Sequence[ClaimedJob]) -> None:
        await self._database.persist(lambda: self._queue.release(jobs))

    async def _give_back_unseen(self, lanes: Collection[LaneKey]) -> None:
        """Gives back what this node holds without knowing of it, so nothing of it can have begun.

        Not after an attempt that began was lost sight of, until its lease is over.
        """
        if self._clock.monotonic() >= self._unsure_until:
            known = [sending.job for sending in self._sending.values()]
            await self._database.persist(lambda: self._queue.release_unseen(lanes, known))

    async def recall(self) -> None:
        """Gives back at once what was claimed before a halt and has not begun."""
        overtaken = {
            one
            for one in self._sending.values()
            if not (one.is_begun or one.is_over)
            and not self._fences.may_send(one.job.namespace, one.job.epoch)
        }
        self._places.withdraw(overtaken)
        await self._cancel_unbegun(overtaken)

    async def _cancel_and_give_back(self) -> None:
        self._places.clear()
        await self._cancel_unbegun(
            [one for one in self._sending.values() if not (one.is_begun or one.is_over)]
        )

    async def _cancel_unbegun(self, unbegun: Collection[_Sending]) -> None:
        tasks = _cancelled(unbegun)
        if tasks:
            await asyncio.wait(tasks, timeout=LAST_WORDS_SECONDS)
        try:
            if unbegun:
                await self._give_back([sending.job for sending in unbegun])
        finally:  # what cannot be given back lapses with its lease
            for sending in unbegun:
                self._vacate(sending)  # a task cancelled before its first step does nothing
                self._forget(sending)

    def _tell(self, job: ClaimedJob, result: WireResult) -> None:
        """Successes are in the facts, and in the log for who looks closely."""
        is_failed = result.outcome is not Outcome.DELIVERED
        tracing.note(
            is_failed=is_failed,
            outcome=result.outcome.value,
            status=result.status,
            cause=result.cause,
            wire_seconds=result.total_seconds,
        )
        if result.outcome is not Outcome.DELIVERED:
            tell = self._log.warning
        elif self._is_telling_all:
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
        job, sending.started_at = sending.job, self._clock.now()
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
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this job's alone
            self._log.exception("attempt_not_prepared", **_named(job))
            return WireResult(Outcome.NOT_SENT, cause=NOT_PREPARED, error=first_line(error))
        outgoing = _outgoing(job, snapshot, content, int(self._clock.now().timestamp()))

        def may_send() -> bool:
            is_ours = self._clock.monotonic() < sending.expires
            sending.is_begun = is_ours and self._fences.may_send(job.namespace, job.epoch)
            return sending.is_begun

        hold = Hold(may_send, lambda: sending.expires - self._clock.monotonic())
        result = await self._wire.send(outgoing, hold)
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


def _of_few_namespaces(rooms: Mapping[LaneKey, int]) -> dict[LaneKey, int]:
    """The lanes of so many namespaces as one claim may take the fences of, the first ones."""
    few = set(itertools.islice(dict.fromkeys(namespace for namespace, _ in rooms), MOST_FENCES))
    return {lane: room for lane, room in rooms.items() if lane[0] in few}


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
    headers["Orbit-Epoch"] = str(job.epoch)
    headers["traceparent"] = tracing.traceparent(job.traceparent)
    return Outgoing(
        snapshot.method,
        snapshot.url,
        headers,
        content,
        snapshot.timeout_seconds,
        snapshot.secrets,
        snapshot.proxy,
    )


def _span_of(sending: _Sending) -> tuple[str, str, tracing.Attributes]:
    job = sending.job
    attributes: tracing.Attributes = {
        "orbit.namespace": job.namespace,
        "orbit.cycle.id": job.cycle_id,
        "orbit.job.id": job.job_id,
        "orbit.attempt": job.attempt,
    }
    return f"send {job.endpoint_key}", job.traceparent, attributes


def _named(job: ClaimedJob) -> dict[str, str]:
    return {
        "namespace": job.namespace,
        "cycle": job.cycle_id,
        "job": job.job_id,
        "trace": job.traceparent,
    }
