"""The dispatcher: claims due jobs lane by lane, sends them, settles what became of them.

Each lane (namespace and endpoint) has its own room, so that a slow endpoint never holds up
another. An attempt is sent only while its lease is certainly ours by this machine's monotonic
clock; otherwise it is left to whoever takes it over.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime

from orbit.clock import Clock
from orbit.database.pool import Database
from orbit.errors import SecretUnreadable
from orbit.execution.dispatch import ClaimedJob, DispatchQueue, Snapshot, Snapshots
from orbit.execution.memory import PayloadMemory
from orbit.execution.wire import Outcome, Outgoing, Wire, WireResult, request_headers
from orbit.services.base import Service

_DEFAULT_LANE_ROOM = 16
_RECOVERY_SHARE = 6  # expired attempts are looked for this many times in a lease length
_LAST_WORDS_SECONDS = 5.0  # for settling at the very end, if the database is slow or gone


@dataclass(slots=True, eq=False)
class _Sending:
    """An attempt in hand: until when it is certainly ours, and how far it has come."""

    job: ClaimedJob
    expires: float
    started_at: datetime
    is_begun: bool = False
    is_over: bool = False
    task: asyncio.Task[None] | None = None

    @property
    def key(self) -> tuple[str, int]:
        """A job may be in hand twice, if its lease ran out and came back to this node."""
        return self.job.job_id, self.job.lease_number


class Dispatcher(Service):
    """Sends jobs, up to a number in flight in all and per lane."""

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
        lane_rooms: Mapping[str, int],
        lease_seconds: float,
        poll_seconds: float,
    ) -> None:
        super().__init__(database)
        self._queue, self._snapshots, self._wire = queue, snapshots, wire
        self._memory, self._clock = memory, clock
        self._concurrency, self._lane_rooms = concurrency, lane_rooms
        self._lease_seconds, self._poll_seconds = lease_seconds, poll_seconds
        self._sending: dict[tuple[str, int], _Sending] = {}
        self._lanes: Counter[tuple[str, str]] = Counter()
        self._recover_at = 0.0

    async def run_once(self) -> float:
        """Claims what there is room for, lane by lane; rests until the next job is due."""
        await self._recover()
        if len(self._sending) >= self._concurrency:
            return self._poll_seconds
        lanes = sorted(await self._queue.lanes(), key=lambda lane: lane.due_in_seconds)
        rooms = {}
        rest = self._poll_seconds
        for lane in lanes:
            room = self._room((lane.namespace, lane.endpoint_key))
            if lane.due_in_seconds > 0:
                rest = min(rest, lane.due_in_seconds)
            elif room > 0:
                rooms[lane.namespace, lane.endpoint_key] = room
        if not rooms:
            return rest
        return 0 if await self._claim(self._shared(rooms)) else rest

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
        await self.stop()
        unbegun = [one for one in self._sending.values() if not (one.is_begun or one.is_over)]
        await _cancel(unbegun)
        if unbegun:
            await self._queue.release([sending.job for sending in unbegun])
        if tasks := _tasks(self._sending.values()):
            await asyncio.wait(tasks, timeout=max(seconds, 0.01))
        rest = list(self._sending.values())
        cut_off = [sending for sending in rest if not sending.is_over]
        await _cancel(rest)
        try:
            async with asyncio.timeout(_LAST_WORDS_SECONDS):
                await asyncio.gather(*map(self._settle_cut_off, cut_off))
                await self._queue.drained()
        except TimeoutError:
            self._log.warning("settlements_abandoned")  # their leases run out

    @property
    def in_flight(self) -> int:
        """Attempts under way."""
        return len(self._sending)

    def _room(self, lane: tuple[str, str]) -> int:
        return self._lane_rooms.get(lane[1], _DEFAULT_LANE_ROOM) - self._lanes[lane]

    def _shared(self, rooms: dict[tuple[str, str], int]) -> dict[tuple[str, str], int]:
        """The node's free places shared out among the lanes, evenly, none left without."""
        free = self._concurrency - len(self._sending)
        share = max(1, free // len(rooms))
        return {lane: min(room, share) for lane, room in list(rooms.items())[:free]}

    async def _claim(self, rooms: dict[tuple[str, str], int]) -> int:
        asked_at = self._clock.monotonic()
        jobs = await self._queue.claim(rooms)
        for job in jobs:
            sending = _Sending(job, asked_at + self._lease_seconds, self._clock.now())
            self._lanes[job.namespace, job.endpoint_key] += 1
            self._sending[sending.key] = sending
            sending.task = asyncio.create_task(self._deliver(sending), name=f"job-{job.job_id}")
        return len(jobs)

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
                result, snapshot = await self._attempt(sending)
            sending.is_over = True
            if result is not None:
                await self._queue.settle(
                    job,
                    result,
                    snapshot.permanent_statuses if snapshot else (),
                    sending.started_at,
                    self._clock.now(),
                )
                self._tell(job, result)
        except Exception:  # noqa: BLE001 - whatever it is, the lease runs out
            # The attempt is then settled as unknown.
            self._log.exception("attempt_interrupted", **_named(job))
        finally:
            self._forget(sending)

    def _tell(self, job: ClaimedJob, result: WireResult) -> None:
        """Successes are for who looks closely; the facts have them all."""
        is_delivered = result.outcome is Outcome.DELIVERED
        (self._log.debug if is_delivered else self._log.warning)(
            "attempt_ended",
            outcome=result.outcome.value,
            attempt=job.attempt,
            status=result.status,
            cause=result.cause,
            **_named(job),
        )

    async def _attempt(self, sending: _Sending) -> tuple[WireResult | None, Snapshot | None]:
        """Sends once; no result if the lease may be over, so that nothing was sent."""
        job = sending.job
        try:
            snapshot = await self._snapshots.read(job.namespace, job.snapshot_id)
        except SecretUnreadable as error:
            return WireResult(Outcome.NOT_SENT, cause="secret unreadable", error=str(error)), None
        content = await self._queue.content(job)
        outgoing = _outgoing(job, snapshot, content)
        if self._clock.monotonic() >= sending.expires:
            return None, snapshot
        sending.is_begun = True
        return await self._wire.send(outgoing), snapshot

    async def _settle_cut_off(self, sending: _Sending) -> None:
        error = "the node was told to stop before an answer was seen"
        result = WireResult(Outcome.UNKNOWN, cause="cut off", error=error)
        await self._queue.settle(sending.job, result, (), sending.started_at, self._clock.now())

    def _forget(self, sending: _Sending) -> None:
        job = sending.job
        self._sending.pop(sending.key, None)
        self._lanes[job.namespace, job.endpoint_key] -= 1
        if not self._lanes[job.namespace, job.endpoint_key]:
            del self._lanes[job.namespace, job.endpoint_key]
        self.wake()


def _tasks(attempts: Collection[_Sending]) -> list[asyncio.Task[None]]:
    return [sending.task for sending in attempts if sending.task is not None]


async def _cancel(attempts: Collection[_Sending]) -> None:
    tasks = _tasks(attempts)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _outgoing(job: ClaimedJob, snapshot: Snapshot, content: bytes) -> Outgoing:
    headers = request_headers(
        content_type=job.content_type,
        digest=job.digest,
        job_id=job.job_id,
        token=snapshot.token,
        given=snapshot.headers,
    )
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
    )


def _named(job: ClaimedJob) -> dict[str, str]:
    return {
        "namespace": job.namespace,
        "cycle": job.cycle_id,
        "job": job.job_id,
        "trace": job.traceparent,
    }
