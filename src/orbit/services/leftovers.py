"""Ends what a drill has left undone: nobody else takes it, and nothing of it is to be sent.

A drill ends so itself. What one has left whose node was killed ends here once its time, and that of
its halt, is over: its cycles fail, its jobs end as dead letters that are discarded at once. Its
lanes go with it, or the list of lanes would name every drill there was; its facts stay. Several
nodes at it do no harm: each works on what it has claimed.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from datetime import timedelta

from orbit.clock import Clock, new_id
from orbit.database.pool import Database
from orbit.database.queries import load
from orbit.endpoints import Endpoint
from orbit.errors import Refused
from orbit.execution.context import ClaimedCycle, Stage
from orbit.execution.cycle import claim
from orbit.execution.dead_letters import DeadLetters
from orbit.execution.dispatch import DispatchQueue, RetryPolicy
from orbit.execution.recorder import Checkpoint, Recorder, StageResult
from orbit.execution.retry import Backoff
from orbit.execution.wire import Outcome, WireResult
from orbit.vocabulary import DRILL_ENDPOINT, DRILL_LIFE_SECONDS, DRILL_PREFIX

SQL = load("drills")
_AT_ONCE = 100
_WHY = "the drill ended before it was sent"
_UNLIMITED = {DRILL_ENDPOINT: Endpoint(DRILL_ENDPOINT, "", max_concurrency=_AT_ONCE, breaker=None)}


class Leftovers:
    """Ends them under a node's id."""

    def __init__(
        self,
        database: Database,
        node_id: str,
        clock: Clock,
        dead_letters: DeadLetters,
        lease_seconds: float,
    ) -> None:
        self._database, self._node_id, self._clock = database, node_id, clock
        self._dead_letters, self._lease_seconds = dead_letters, lease_seconds

    async def end_old(self) -> int:
        """Ends those of drills that can't be under way any more; how many drills they were."""
        oldest = self._clock.now() - timedelta(seconds=2 * DRILL_LIFE_SECONDS)
        asked = {"drills": DRILL_PREFIX, "before": new_id(oldest)}
        rows = await self._database.fetch_all(SQL.left_over, asked)
        for row in rows:
            await self.end(row["namespace"])
        return len(rows)

    async def end(self, namespace: str) -> None:
        """Ends all that nobody has in hand. Does nothing while the namespace is halted."""
        while cycles := await claim(
            self._database, self._node_id, _AT_ONCE, self._lease_seconds, only=namespace
        ):
            for cycle in cycles:
                await self._fail(cycle)
        await self._end_jobs(namespace)
        asked = {"namespace": namespace}
        for row in await self._database.fetch_all(SQL.undecided_dead_letters, asked):
            with suppress(Refused):
                await self._dead_letters.discard(row["job_id"], _WHY)
        async with self._database.transaction() as connection:
            await connection.execute(SQL.forget_tallies, asked)
            await connection.execute(SQL.forget_lanes, asked)

    async def _fail(self, cycle: ClaimedCycle) -> None:
        result = StageResult(cycle, is_end=True)
        result.checkpoints.append(Checkpoint(Stage.CYCLE_FAILED, None, {"reason": _WHY}))
        await Recorder(self._database, self._node_id).record(result)

    async def _end_jobs(self, namespace: str) -> None:
        policy = RetryPolicy(Backoff(0.0, 1.0, 0.0), random.random)
        queue = DispatchQueue(
            self._database, self._node_id, self._lease_seconds, policy, _UNLIMITED, only=namespace
        )
        unsent = WireResult(Outcome.NOT_SENT, cause=_WHY)
        await queue.lanes()
        while jobs := await queue.claim({(namespace, DRILL_ENDPOINT): _AT_ONCE}, _AT_ONCE):
            now = self._clock.now()
            await asyncio.gather(*(queue.settle(job, unsent, now, now) for job in jobs))
