"""The drill of a halt: real claims, real requests, a halt amid them, its proof, and the rest.

It works in a namespace of its own, whose name no run profile and no trigger may have, against
the database and the brake of the running installation. It passes only if the halt came amid the
requests and said quiesced, nothing arrived from that answer until the resumption, a trigger was
refused meanwhile, and then each request that was held arrived. What it came to is a fact, with
its entry in the audit trail; of one that broke off only an entry tells. It ends by itself within a
bounded time, and so does its halt.

What it does not prove: how other nodes and receivers behave. They take part in the proof by the
same statements, but none of their requests is stopped here.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

import structlog

from orbit.app import Node
from orbit.audit import trail
from orbit.audit.trail import Act
from orbit.clock import new_id
from orbit.database.pool import TRANSIENT, first_line
from orbit.database.queries import array, load
from orbit.drills.receiver import DrillReceiver, listening
from orbit.drills.worker import DrillWorker
from orbit.errors import DrillUnderWay, NamespaceHalted, NotHalted
from orbit.execution.initiation import CycleRequest, accept
from orbit.governance.halt import Halted, Order
from orbit.vocabulary import DRILL_ENDPOINT, DRILL_LIFE_SECONDS, DRILL_PREFIX

SQL = load("drills")
HALT_SQL = load("halt")
REQUESTS = 200
_ANSWER_SECONDS = 0.05
_AMID = REQUESTS // 10  # so many have arrived when the second half is triggered, and halted
_ARRIVE_SECONDS = 30.0  # for what is to arrive, before and after the halt
_HALT_SECONDS = 10.0
_END_SECONDS = 5.0  # for what a drill that failed has left
_WHY = "a drill"

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Drilled:
    """What a drill came to; `arrived_before` the halt's answer, while halted, and after."""

    namespace: str
    epoch: int
    has_passed: bool
    requests: int
    arrived_before: int
    in_flight: int
    is_quiesced: bool
    quiesced_seconds: float
    watched_seconds: float
    arrived_halted: int
    is_refused: bool
    arrived_after: int
    arrived_twice: int


class HaltDrill:
    """Rehearses halts with one node's parts, one at a time."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._is_under_way = False

    async def run(self, actor: str, actor_id: str, *, watch_seconds: float = 2.0) -> Drilled:
        """One drill; `watch_seconds` is how long nothing may arrive after the halt's answer.

        Raises DrillUnderWay, TimeoutError after two minutes, and what the database raises.
        """
        if self._is_under_way:
            raise DrillUnderWay("a drill is under way on this node: wait for its end")
        self._is_under_way = True
        order = Order(_namespace(self._node), actor, actor_id, _WHY)
        try:
            async with asyncio.timeout(DRILL_LIFE_SECONDS), listening(_ANSWER_SECONDS) as receiver:
                async with self._worker(order, receiver) as worker:
                    found = await self._rehearse(order, worker, receiver, watch_seconds)
                await self._record(order, found)
                return found
        except Exception as error:
            await self._tell_failure(order, error)
            raise
        finally:
            self._is_under_way = False

    @asynccontextmanager
    async def _worker(self, order: Order, receiver: DrillReceiver) -> AsyncIterator[DrillWorker]:
        """The drill's worker; at the end the namespace goes on, and has nothing to do."""
        worker, is_over = DrillWorker(self._node, order.namespace, receiver.url), asyncio.Event()
        working = asyncio.create_task(worker.run_until(is_over))
        try:
            yield worker
        finally:
            try:
                await self._resume(order, worker)
                await worker.until_idle(_END_SECONDS)
            finally:
                is_over.set()
                try:
                    await working
                finally:
                    await worker.clear()

    async def _rehearse(
        self, order: Order, worker: DrillWorker, receiver: DrillReceiver, watch_seconds: float
    ) -> Drilled:
        await self._trigger(order.namespace, REQUESTS // 2)
        worker.wake()
        await receiver.until(_AMID, _ARRIVE_SECONDS)
        await self._trigger(order.namespace, REQUESTS - REQUESTS // 2)
        worker.wake()
        until = self._node.clock.now() + timedelta(seconds=DRILL_LIFE_SECONDS)
        halted = await self._node.brake.halt(order, until=until, wait_seconds=_HALT_SECONDS)
        before = list(receiver.jobs)
        worker.wake()  # it is to find nothing that it may take
        is_refused = not await self._trigger(order.namespace, 1)
        await asyncio.sleep(watch_seconds)
        late = len(receiver.jobs) - len(before)
        await self._resume(order, worker)
        await receiver.until(REQUESTS, _ARRIVE_SECONDS)
        return _judged(
            halted,
            receiver,
            before=len(set(before)),
            late=late,
            is_refused=is_refused,
            watched_seconds=watch_seconds,
        )

    async def _resume(self, order: Order, worker: DrillWorker) -> None:
        """Lets the namespace go on if it does not; a halt that did not hold is seen elsewhere."""
        asked = {"namespaces": array([order.namespace])}
        if await self._node.database.fetch_all(HALT_SQL.halted_among, asked):
            with suppress(NotHalted):
                await self._node.brake.resume(order)
        worker.wake()

    async def _trigger(self, namespace: str, count: int) -> bool:
        """Starts so many cycles of one request each; False if the namespace is halted."""
        at = self._node.clock.now()
        requests = [
            CycleRequest(new_id(at), namespace, "api", endpoint_keys=(DRILL_ENDPOINT,))
            for _ in range(count)
        ]
        async with self._node.database.transaction() as connection:
            answers = await accept(connection, self._node.node_id, requests)
        return not any(isinstance(answer, NamespaceHalted) for answer in answers)

    async def _record(self, order: Order, found: Drilled) -> None:
        row = asdict(found) | {
            "actor": order.actor,
            "actor_id": order.actor_id,
            "node_id": self._node.node_id,
        }
        detail = {"epoch": found.epoch, "passed": found.has_passed}
        act = Act("*", "drill.halt", order.actor, order.reason, order.namespace, detail)
        async with self._node.database.transaction() as connection:
            await connection.execute(SQL.insert_drill, row)
            await trail.append(connection, act)
        log.info("halt_drilled", namespace=found.namespace, passed=found.has_passed)

    async def _tell_failure(self, order: Order, error: Exception) -> None:
        """A drill that broke off came to nothing that a row could say; the trail has it."""
        detail = {"why": type(error).__name__}
        act = Act("*", "drill.failed", order.actor, order.reason, order.namespace, detail)
        try:
            async with self._node.database.transaction() as connection:
                await trail.append(connection, act)
        except TRANSIENT as lost:
            log.warning("drill_failure_not_noted", error=first_line(lost))


def _judged(
    halted: Halted,
    receiver: DrillReceiver,
    *,
    before: int,
    late: int,
    is_refused: bool,
    watched_seconds: float,
) -> Drilled:
    has_passed = (
        halted.is_quiesced
        and 0 < before < REQUESTS
        and late == 0
        and is_refused
        and receiver.distinct == REQUESTS
    )
    return Drilled(
        namespace=halted.namespace,
        epoch=halted.epoch,
        has_passed=has_passed,
        requests=REQUESTS,
        arrived_before=before,
        in_flight=len(halted.in_flight),
        is_quiesced=halted.is_quiesced,
        quiesced_seconds=halted.waited_seconds,
        watched_seconds=watched_seconds,
        arrived_halted=late,
        is_refused=is_refused,
        arrived_after=receiver.distinct - before - late,
        arrived_twice=len(receiver.jobs) - receiver.distinct,
    )


def _namespace(node: Node) -> str:
    """A name that no other drill has: its time, and chance."""
    at = new_id(node.clock.now()).replace("-", "")[:12]
    return f"{DRILL_PREFIX}{at}{os.urandom(2).hex()}"
