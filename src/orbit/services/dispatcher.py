"""The dispatcher: claims due jobs lane by lane, sends them, settles what became of them.

Each lane (namespace and endpoint) has its own room, so that a slow endpoint never holds up
another. An attempt is sent only while its lease is certainly ours by this machine's monotonic
clock; otherwise it is left to whoever takes it over.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping

from orbit.clock import Clock
from orbit.database.pool import Database
from orbit.errors import SecretUnreadable
from orbit.execution.dispatch import ClaimedJob, DispatchQueue, Snapshot, Snapshots
from orbit.execution.memory import PayloadMemory
from orbit.execution.wire import Outcome, Outgoing, Wire, WireResult, request_headers
from orbit.services.base import Service

_DEFAULT_LANE_ROOM = 16
_RECOVERY_SHARE = 6  # expired attempts are looked for this many times in a lease length


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
        self._sending: dict[str, tuple[ClaimedJob, asyncio.Task[None]]] = {}
        self._expires: dict[str, float] = {}
        self._begun: set[str] = set()
        self._lanes: Counter[tuple[str, str]] = Counter()
        self._recover_at = 0.0

    async def run_once(self) -> float:
        """Claims what there is room for, lane by lane; rests until the next job is due."""
        await self._recover()
        if len(self._sending) >= self._concurrency:
            return self._poll_seconds
        lanes = await self._queue.lanes()
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
        jobs = [job for job, _ in self._sending.values()]
        if not jobs:
            return
        asked_at = self._clock.monotonic()
        held = await self._queue.renew(jobs)
        for job in jobs:
            if job.job_id in held and job.job_id in self._expires:
                self._expires[job.job_id] = asked_at + self._lease_seconds

    async def drain(self, seconds: float) -> None:
        """Lets attempts end for so long; gives back what has not begun.

        An attempt that is cut off is settled as unknown.
        """
        await self.stop()
        unbegun = [entry for entry in self._sending.values() if entry[0].job_id not in self._begun]
        for _, task in unbegun:
            task.cancel()
        await asyncio.gather(*(task for _, task in unbegun), return_exceptions=True)
        if unbegun:
            await self._queue.release([job for job, _ in unbegun])
        tasks = [task for _, task in self._sending.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=max(seconds, 0.01))
        for _, task in list(self._sending.values()):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._queue.drained()

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
            self._expires[job.job_id] = asked_at + self._lease_seconds
            self._lanes[job.namespace, job.endpoint_key] += 1
            task = asyncio.create_task(self._deliver(job), name=f"job-{job.job_id}")
            self._sending[job.job_id] = job, task
        return len(jobs)

    async def _recover(self) -> None:
        now = self._clock.monotonic()
        if now >= self._recover_at:
            self._recover_at = now + self._lease_seconds / _RECOVERY_SHARE
            count = await self._queue.recover(self._clock.now())
            if count:
                self._log.warning("attempts_unknown", count=count, reason="worker lost")

    async def _deliver(self, job: ClaimedJob) -> None:
        log = self._log.bind(
            namespace=job.namespace, cycle=job.cycle_id, job=job.job_id, trace=job.traceparent
        )
        try:
            async with self._memory.reserve(job.size):
                started_at = self._clock.now()
                result, snapshot = await self._attempt(job)
            if result is not None:
                await self._queue.settle(
                    job,
                    result,
                    snapshot.permanent_statuses if snapshot else (),
                    started_at,
                    self._clock.now(),
                )
                log.info(
                    f"attempt_{result.outcome}",
                    attempt=job.attempt,
                    status=result.status,
                    cause=result.cause,
                )
        except Exception:
            # The lease runs out, and the attempt is then settled as unknown.
            log.exception("attempt_interrupted")
        finally:
            self._forget(job)

    async def _attempt(self, job: ClaimedJob) -> tuple[WireResult | None, Snapshot | None]:
        """Sends once; no result if the lease may be over, so that nothing was sent."""
        try:
            snapshot = await self._snapshots.read(job.namespace, job.snapshot_id)
        except SecretUnreadable as error:
            return WireResult(Outcome.NOT_SENT, cause="secret unreadable", error=str(error)), None
        content = await self._queue.content(job)
        outgoing = _outgoing(job, snapshot, content)
        if self._clock.monotonic() >= self._expires[job.job_id]:
            return None, snapshot
        self._begun.add(job.job_id)
        return await self._wire.send(outgoing), snapshot

    def _forget(self, job: ClaimedJob) -> None:
        self._sending.pop(job.job_id, None)
        self._expires.pop(job.job_id, None)
        self._begun.discard(job.job_id)
        self._lanes[job.namespace, job.endpoint_key] -= 1
        if not self._lanes[job.namespace, job.endpoint_key]:
            del self._lanes[job.namespace, job.endpoint_key]
        self.wake()


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
    return Outgoing(snapshot.method, snapshot.url, headers, content, snapshot.timeout_seconds)
