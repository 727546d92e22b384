"""The dispatcher: claims due jobs lane by lane, sends them, settles what became of them.

Each endpoint has its own room, over all namespaces, so that a slow one does not hold up the
others. An attempt is sent only while its lease is certainly ours by this machine's monotonic
clock. One that has not begun is given back, and its number with it.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from orbit.clock import Clock
from orbit.database.pool import TRANSIENT, Database, first_line
from orbit.errors import SecretUnreadable
from orbit.execution.dispatch import ClaimedJob, DispatchQueue, Lane, Snapshot, Snapshots
from orbit.execution.memory import PayloadMemory
from orbit.execution.wire import Outcome, Outgoing, Wire, WireResult, request_headers
from orbit.services.base import LAST_WORDS_SECONDS, Service, within

_DEFAULT_ROOM = 16
_RECOVERY_SHARE = 6  # expired attempts are looked for this many times in a lease length


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
    """Sends jobs, up to a number in flight in all and per endpoint.

    An endpoint has its `max_concurrency` on this node, whatever the number of namespaces, and at
    most half of all places (at least one) while other endpoints have jobs due or in flight. So
    one endpoint that hangs holds up no other, unless it had filled the node before they had work.
    It cannot, nor can several, where what they are allowed together is less than all there is.
    Free places go first to the endpoint, then to the namespace, that has the fewest.
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
        rooms: Mapping[str, int],
        lease_seconds: float,
        poll_seconds: float,
    ) -> None:
        super().__init__(database)
        self._queue, self._snapshots, self._wire = queue, snapshots, wire
        self._memory, self._clock = memory, clock
        self._concurrency, self._endpoint_rooms = concurrency, rooms
        self._lease_seconds, self._poll_seconds = lease_seconds, poll_seconds
        self._sending: dict[tuple[str, int], _Sending] = {}
        self._lanes: Counter[tuple[str, str]] = Counter()
        self._endpoints: Counter[str] = Counter()
        self._recover_at = 0.0

    async def run_once(self) -> float:
        """Claims what there is room for, lane by lane; rests until the next job is due."""
        await self._recover()
        if len(self._sending) >= self._concurrency:
            return self._poll_seconds
        lanes = await self._queue.lanes()
        later = [lane.due_in_seconds for lane in lanes if lane.due_in_seconds > 0]
        rest = min(later, default=self._poll_seconds)
        rooms = self._shared([lane for lane in lanes if lane.due_in_seconds <= 0])
        return 0 if rooms and await self._claim(rooms) else min(rest, self._poll_seconds)

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
        unbegun = [one for one in self._sending.values() if not (one.is_begun or one.is_over)]
        giving_back = asyncio.create_task(self._cancel_and_give_back(unbegun))
        tasks = {giving_back, *_tasks(self._sending.values())}
        await asyncio.wait(tasks, timeout=max(deadline - self._clock.monotonic(), 0))
        if not await within(LAST_WORDS_SECONDS, self._last_words(giving_back)):
            self._log.warning("settlements_abandoned")  # their leases run out

    @property
    def in_flight(self) -> int:
        """Attempts under way."""
        return len(self._sending)

    def _room(self, endpoint_key: str, others: Collection[str]) -> int:
        room = self._endpoint_rooms.get(endpoint_key, _DEFAULT_ROOM)
        if others:
            room = min(room, max(1, self._concurrency // 2))
        return room - self._endpoints[endpoint_key]

    def _shared(self, due: Sequence[Lane]) -> dict[tuple[str, str], int]:
        """The node's free places, dealt out one by one among the lanes with jobs due."""
        busy = {lane.endpoint_key for lane in due} | set(self._endpoints)
        rooms = {
            lane.endpoint_key: self._room(lane.endpoint_key, busy - {lane.endpoint_key})
            for lane in due
        }
        turns = deque((one.namespace, one.endpoint_key) for one in sorted(due, key=self._load))
        shares: Counter[tuple[str, str]] = Counter()
        free = self._concurrency - len(self._sending)
        while turns and free > 0:
            lane = turns.popleft()
            if rooms[lane[1]] > 0:
                shares[lane] += 1
                rooms[lane[1]] -= 1
                free -= 1
                turns.append(lane)
        return dict(shares)

    def _load(self, lane: Lane) -> tuple[int, int, float]:
        held = self._lanes[lane.namespace, lane.endpoint_key]
        return self._endpoints[lane.endpoint_key], held, lane.due_in_seconds

    async def _claim(self, rooms: Mapping[tuple[str, str], int]) -> int:
        asked_at = self._clock.monotonic()
        jobs = await self._queue.claim(rooms)
        for job in jobs:
            sending = _Sending(job, asked_at + self._lease_seconds, self._clock.now())
            self._lanes[job.namespace, job.endpoint_key] += 1
            self._endpoints[job.endpoint_key] += 1
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
            if result is None:
                await within(self._lease_seconds, self._give_back([job]))
                return
            permanent = snapshot.permanent_statuses if snapshot else ()
            await self._queue.settle(job, result, permanent, sending.started_at, self._clock.now())
            self._tell(job, result)
        except Exception:  # noqa: BLE001 - whatever it is, the lease runs out
            # The attempt is then settled as unknown.
            self._log.exception("attempt_interrupted", **_named(job))
        finally:
            self._forget(sending)

    async def _give_back(self, jobs: Sequence[ClaimedJob]) -> None:
        await self._database.persist(lambda: self._queue.release(jobs))

    async def _cancel_and_give_back(self, unbegun: Collection[_Sending]) -> None:
        tasks = _cancelled(unbegun)
        if tasks:
            await asyncio.wait(tasks, timeout=LAST_WORDS_SECONDS)
            await self._give_back([sending.job for sending in unbegun])

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
        """Sends once; no result if nothing was sent, for want of the database or of the lease."""
        job = sending.job
        try:
            snapshot = await self._snapshots.read(job.namespace, job.snapshot_id)
            content = await self._queue.content(job)
        except SecretUnreadable as error:
            return WireResult(Outcome.NOT_SENT, cause="secret unreadable", error=str(error)), None
        except TRANSIENT as error:
            self._log.warning("attempt_not_begun", error=first_line(error), **_named(job))
            await asyncio.sleep(self._poll_seconds)  # given back, it is due at once
            return None, None
        outgoing = _outgoing(job, snapshot, content)
        if self._clock.monotonic() >= sending.expires:
            return None, snapshot
        sending.is_begun = True
        return await self._wire.send(outgoing), snapshot

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
        result = WireResult(Outcome.UNKNOWN, cause="cut off", error=error)
        await self._queue.settle(sending.job, result, (), sending.started_at, self._clock.now())

    def _forget(self, sending: _Sending) -> None:
        job = sending.job
        self._sending.pop(sending.key, None)
        self._lanes[job.namespace, job.endpoint_key] -= 1
        if not self._lanes[job.namespace, job.endpoint_key]:
            del self._lanes[job.namespace, job.endpoint_key]
        self._endpoints[job.endpoint_key] -= 1
        if not self._endpoints[job.endpoint_key]:
            del self._endpoints[job.endpoint_key]
        self.wake()


def _tasks(attempts: Collection[_Sending]) -> list[asyncio.Task[None]]:
    return [sending.task for sending in attempts if sending.task is not None]


def _cancelled(attempts: Collection[_Sending]) -> list[asyncio.Task[None]]:
    tasks = _tasks(attempts)
    for task in tasks:
        task.cancel()
    return tasks


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
