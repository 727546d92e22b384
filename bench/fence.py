"""What the fence costs: jobs claimed and settled as the program does, with it and without, in turn.

Of a claim the fence is one more statement in the same round trip, which locks and looks up each
namespace, and the look at the flags. Batches with and without alternate, so that the machine's
moods fall on both. Nothing is sent: in a real drain the wire has its part, and the fence's is less.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from typing import Any

from bench.program import Bench
from bench.queues import SPLITTING, until
from bench.steps import ITEMS
from orbit.clock import SystemClock, new_id
from orbit.database.pool import Database
from orbit.endpoints import Endpoint
from orbit.execution import dispatch
from orbit.execution.dispatch import DispatchQueue, LaneKey, RetryPolicy
from orbit.execution.retry import Backoff
from orbit.execution.wire import Outcome, WireResult

_SPACES, _BATCH = 50, 50
_WAITING = "SELECT count(*)::int FROM dispatch_lease"
_HOLD = "INSERT INTO lane (namespace, endpoint_key, probe_at) VALUES (%s, 'sink', 'infinity')"
_FLAG = b"""WHERE NOT EXISTS (SELECT FROM namespace_fence fence
        WHERE fence.namespace = asked.namespace AND fence.is_halted)
"""
_SHARE = b"""SELECT DISTINCT namespace, 0::bigint AS epoch
FROM unnest(%(namespace)s::text[]) AS lane (namespace);"""


class _Unfenced:
    """The statements of dispatch, but a claim takes no fence and reads no flag."""

    def __init__(self, fenced: Any) -> None:
        self._fenced = fenced
        assert fenced.claim_jobs.count(_FLAG) == 1, "a claim reads the flag in other words now"
        self.share_fences = _SHARE
        self.claim_jobs = fenced.claim_jobs.replace(_FLAG, b"")

    def __getattr__(self, name: str) -> bytes:
        return getattr(self._fenced, name)  # type: ignore[no-any-return]


def fence(pairs: int = 100) -> dict[str, Any]:
    """Milliseconds for a batch of 50 jobs, of one namespace and of fifty, by the median.

    `costs_percent` is how many jobs the fence keeps from being done in the same time, of a hundred.
    """
    bench = Bench(run_profiles=_SPACES, policy=SPLITTING)
    with bench.database() as database:
        with bench.node() as node:
            for number in range(_SPACES):
                database.execute(_HOLD, (f"space-{number}",))
            asked = {f"bench-{number}": 1 + 2 * pairs // ITEMS for number in range(_SPACES)}
            asked["bench-0"] += 2 * pairs * _BATCH // ITEMS
            for name, times in asked.items():
                for part in range(times):
                    body, key = {"runProfileIds": [name]}, {"Idempotency-Key": f"{name}-{part}"}
                    node.http.post("/run-profiles/trigger", json=body, headers=key)
            until(database, _WAITING, sum(asked.values()) * ITEMS)
        database.execute("UPDATE lane SET probe_at = NULL")
        database.execute("VACUUM ANALYZE")
        found = asyncio.run(_compared(database.info.dsn, pairs))
    bench.close()
    return found


async def _compared(dsn: str, pairs: int) -> dict[str, Any]:
    database = Database(dsn, minimum=2, maximum=2)
    await database.open()
    endpoints = {"sink": Endpoint("sink", "", max_concurrency=10_000)}
    policy = RetryPolicy(Backoff(1, 2, 3), random.random)
    queue = DispatchQueue(database, new_id(SystemClock().now()), 30, policy, endpoints)
    found = {}
    for name, spaces in (("one_namespace", 1), ("fifty_namespaces", _SPACES)):
        rooms = {(f"space-{number}", "sink"): _BATCH // spaces for number in range(spaces)}
        found[name] = await _paired(queue, rooms, pairs)
    await database.close()
    return found


async def _paired(queue: DispatchQueue, rooms: dict[LaneKey, int], pairs: int) -> dict[str, float]:
    fenced = dispatch.SQL
    programs: dict[str, Any] = {"fenced": fenced, "unfenced": _Unfenced(fenced)}
    taken: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(pairs):
        for name in sorted(programs, reverse=number % 2 == 1):
            dispatch.SQL = programs[name]
            taken[name].append(await _batch(queue, rooms))
    dispatch.SQL = fenced
    each = {name: statistics.median(times) for name, times in taken.items()}
    cost = (1 - each["unfenced"] / each["fenced"]) * 100
    millis = {f"{name}_ms": round(seconds * 1000, 2) for name, seconds in each.items()}
    return {**millis, "costs_percent": round(cost, 1)}


async def _batch(queue: DispatchQueue, rooms: dict[LaneKey, int]) -> float:
    """Seconds to claim a batch and to settle it as delivered."""
    began = time.monotonic()
    jobs = await queue.claim(rooms, 10_000)
    assert len(jobs) == _BATCH, "the backlog is used up"
    now = SystemClock().now()
    result = WireResult(Outcome.DELIVERED, status=200)
    await asyncio.gather(*(queue.settle(job, result, now, now) for job in jobs))
    return time.monotonic() - began
