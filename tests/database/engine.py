"""What tests of the engine's SQL share: requests, claims, stages and settlements, made for real.

Everything here goes through the engine's own functions, so a test says what happens and not how
the rows look. Only `expire` moves a lease by hand: it stands for time that went by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orbit.clock import DatabaseClock, derived_id, new_id
from orbit.database.pool import Database
from orbit.database.queries import load
from orbit.endpoints import Endpoint
from orbit.execution import cycle as orchestrator
from orbit.execution.context import ClaimedCycle, Stage
from orbit.execution.dispatch import ClaimedJob, DispatchQueue, RetryPolicy
from orbit.execution.initiation import Accepted, CycleRequest, accept
from orbit.execution.recorder import Checkpoint, NewJob, Recorder, StageResult
from orbit.execution.retry import Backoff
from orbit.execution.wire import Outcome, WireResult
from orbit.payload import Payload
from orbit.profiles.model import Documents, Profile

CYCLE = load("cycle")
DISPATCH = load("dispatch")
SNAPSHOT_ID = "0" * 64
DELIVERED = WireResult(Outcome.DELIVERED, status=200)
FAILED = WireResult(Outcome.FAILED, status=500, cause="status 500")
NO_BREAKER = Endpoint("any", "http://127.0.0.1:9/", max_concurrency=1000, breaker=None)
NO_DELAY = RetryPolicy(Backoff(0.001, 1.0, 0.001), lambda: 0.0)


class _Everywhere(dict[str, Endpoint]):
    """One endpoint under every key."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__()
        self._endpoint = endpoint

    def get(self, _key: str, _default: object = None) -> Endpoint:
        return self._endpoint


@dataclass(frozen=True, slots=True)
class Worker:
    """One node's hands: it claims, records and settles under its own id."""

    database: Database
    clock: DatabaseClock
    node_id: str
    recorder: Recorder
    queue: DispatchQueue

    @classmethod
    def new(
        cls,
        database: Database,
        clock: DatabaseClock,
        lease_seconds: float = 30.0,
        endpoint: Endpoint = NO_BREAKER,
        chance: float = 0.0,
    ) -> Worker:
        """A worker with an id of its own, for which every endpoint has the limits of `endpoint`."""
        node_id = new_id(clock.now())
        policy = RetryPolicy(NO_DELAY.backoff, lambda: chance)
        queue = DispatchQueue(database, node_id, lease_seconds, policy, _Everywhere(endpoint))
        return cls(database, clock, node_id, Recorder(database, node_id), queue)

    def request(self, namespace: str = "brand-a", **given: Any) -> CycleRequest:
        """A trigger, raw and by the API unless said otherwise."""
        values: dict[str, Any] = {"trigger": "api", **given}
        values.setdefault("cycle_id", new_id(self.clock.now()))
        return CycleRequest(namespace=namespace, **values)

    async def accept(self, *requests: CycleRequest) -> list[Any]:
        """Accepts requests in one batch; the answers."""
        async with self.database.transaction() as connection:
            return list(await accept(connection, self.node_id, requests))

    async def begin(self, namespace: str = "brand-a", **given: Any) -> ClaimedCycle:
        """A cycle, accepted and claimed."""
        request = self.request(namespace, **given)
        (answer,) = await self.accept(request)
        assert isinstance(answer, Accepted), answer
        claimed = await self.claim()
        return next(cycle for cycle in claimed if cycle.cycle_id == answer.cycle_id)

    async def claim(self, room: int = 100) -> list[ClaimedCycle]:
        """Claims due cycles."""
        return await orchestrator.claim(self.database, self.node_id, room, 30.0)

    async def enqueue(
        self, cycle: ClaimedCycle, lanes: Sequence[str], max_attempts: int = 4
    ) -> None:
        """Carries a cycle to where its one item waits for dispatch to each endpoint."""
        await self.recorder.record(enqueued(cycle, lanes, max_attempts))

    async def begin_dispatch(
        self, namespace: str = "brand-a", lanes: Sequence[str] = ("one",), max_attempts: int = 4
    ) -> ClaimedCycle:
        """A cycle whose jobs are queued."""
        cycle = await self.begin(namespace)
        await self.enqueue(cycle, lanes, max_attempts)
        return cycle

    async def take(
        self, *lanes: str, namespace: str = "brand-a", room: int = 10
    ) -> list[ClaimedJob]:
        """Opens the next attempt of the jobs due in lanes."""
        await self.queue.lanes()
        return await self.queue.claim({(namespace, lane): room for lane in lanes}, 64)

    async def settle(self, job: ClaimedJob, result: WireResult = DELIVERED) -> None:
        """Ends an attempt that this worker holds."""
        now = self.clock.now()
        await self.queue.settle(job, result, now, now)


def documents(name: str) -> Documents:
    """A configuration that differs from others by a label."""
    return Documents(profiles=(Profile("nova", name, "enabled"),))


def enqueued(cycle: ClaimedCycle, lanes: Sequence[str], max_attempts: int = 4) -> StageResult:
    """The stages of a cycle up to its jobs: one item, one job per endpoint."""
    item = Payload(b"an item", "text/plain")
    jobs = [
        NewJob(derived_id(cycle.cycle_id, "job", "0", lane), 0, lane, SNAPSHOT_ID, max_attempts)
        for lane in lanes
    ]
    stages = (Stage.NORMALIZATION_COMPLETE, Stage.DISPATCH_ENQUEUED)
    return StageResult(cycle, [Checkpoint(stage) for stage in stages], items=[item], jobs=jobs)


async def add_snapshot(database: Database, namespace: str = "brand-a", lane: str = "one") -> None:
    """The endpoint's snapshot that the jobs made here name."""
    await database.execute(
        DISPATCH.insert_snapshot,
        {
            "namespace": namespace,
            "snapshot_id": SNAPSHOT_ID,
            "endpoint_key": lane,
            "url": "http://127.0.0.1:9/",
            "method": "POST",
            "secrets_encrypted": b"",
            "token_fingerprint": None,
            "timeout_seconds": 1.0,
            "permanent_statuses": "{}",
            "on_unknown": "retry",
        },
    )


async def expire(database: Database, lease: str) -> None:
    """Lets a lease length go by for every lease that somebody holds."""
    await database.execute(
        f"UPDATE {lease} SET due_at = orbit_now() - interval '1 second'"
        " WHERE node_id IS NOT NULL".encode()
    )


async def count(database: Database, table: str, where: str = "true") -> int:
    """How many rows a table has."""
    row = await database.fetch_one(f"SELECT count(*)::int AS n FROM {table} WHERE {where}".encode())
    assert row is not None
    return int(row["n"])


async def only(database: Database, query: str) -> dict[str, Any]:
    """The one row of a query."""
    (row,) = await database.fetch_all(query.encode())
    return row
