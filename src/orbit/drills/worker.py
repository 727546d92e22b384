"""A worker bound to the namespace of a drill: a node's own runner and dispatcher, and no others.

It claims, carries on and sends by the classes and statements of every node, under a node's id of
its own, and takes nothing of another namespace; other nodes take nothing of this one. So a drill
sends to its own loopback port, and no other machine to its own. What the drill's end finds undone
is not sent: it ends as a dead letter, which is discarded at once.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

from orbit.app import Node
from orbit.clock import new_id
from orbit.database.queries import load
from orbit.endpoints import Endpoint
from orbit.execution.cycle import Orchestrator
from orbit.execution.dispatch import DispatchQueue, RetryPolicy
from orbit.execution.http1 import Client
from orbit.execution.memory import PayloadMemory
from orbit.execution.normalization import Normalizer
from orbit.execution.recorder import Recorder
from orbit.execution.retry import Backoff
from orbit.execution.snapshots import Snapshots
from orbit.execution.tenure import Tenure
from orbit.execution.transformation import Transformer
from orbit.execution.wire import Wire
from orbit.profiles.bridge import Bridge
from orbit.services.dispatcher import Dispatcher
from orbit.services.runner import Runner
from orbit.vocabulary import DRILL_ENDPOINT

SQL = load("drills")
IN_FLIGHT = 16  # requests at once, and half as many cycles
_MEMORY_BYTES = 1 << 20
_MAX_ATTEMPTS = 1  # what fails once fails the drill
_BEATS_IN_LEASE = 6
_DRAIN_SECONDS = 2.0
_LOOK_SECONDS = 0.02


class DrillWorker:
    """Runs beside a node's own services, on its database; `url` is the drill's receiver."""

    def __init__(self, node: Node, namespace: str, url: str) -> None:
        self._node, self._namespace = node, namespace
        self.node_id = new_id(node.clock.now())
        self._endpoint = Endpoint(DRILL_ENDPOINT, url, max_concurrency=IN_FLIGHT, breaker=None)
        self._http = Client(idle_connections=IN_FLIGHT)
        self._memory = PayloadMemory(_MEMORY_BYTES)
        self._snapshots = Snapshots(
            node.database, node.store.vault, (self._endpoint,), max_attempts=_MAX_ATTEMPTS
        )
        self._queue = DispatchQueue(
            node.database,
            self.node_id,
            node.settings.lease_seconds,
            RetryPolicy(Backoff(0.0, 1.0, 0.0), random.random),
            {DRILL_ENDPOINT: self._endpoint},
            only=namespace,
        )
        self._dispatcher = self._new_dispatcher()
        self._runner = self._new_runner()

    async def run_until(self, is_over: asyncio.Event) -> None:
        """Works until told to end, and gives back what it holds."""
        self._runner.start()
        self._dispatcher.start()
        beat_seconds = self._node.settings.lease_seconds / _BEATS_IN_LEASE
        try:
            while not is_over.is_set():
                await self._runner.beat()
                await self._dispatcher.beat()
                with suppress(TimeoutError):
                    async with asyncio.timeout(beat_seconds):
                        await is_over.wait()
        finally:
            await self._runner.drain(_DRAIN_SECONDS)
            await self._dispatcher.drain(_DRAIN_SECONDS)
            await self._http.close()

    def wake(self) -> None:
        """There is new work, or the namespace goes on."""
        self._runner.wake()
        self._dispatcher.wake()

    async def until_idle(self, seconds: float) -> None:
        """Waits so long for all of the namespace to end."""
        asked = {"namespace": self._namespace}
        deadline = self._node.clock.monotonic() + seconds
        while self._node.clock.monotonic() < deadline:
            if await self._node.database.fetch_one(SQL.open_work, asked) is None:
                return
            await asyncio.sleep(_LOOK_SECONDS)

    async def clear(self) -> None:
        """Ends what was not sent. To follow the end."""
        await self._node.leftovers().end(self._namespace)

    def _new_dispatcher(self) -> Dispatcher:
        node = self._node
        return Dispatcher(
            node.database,
            self._queue,
            self._snapshots,
            Wire(self._http),
            self._memory,
            node.clock,
            node.fences,
            concurrency=IN_FLIGHT,
            lease_seconds=node.settings.lease_seconds,
            poll_seconds=node.settings.poll_seconds,
        )

    def _new_runner(self) -> Runner:
        node = self._node
        tenure = Tenure(node.fences, node.clock, node.settings.lease_seconds)
        transformer = Transformer(self._http, _MEMORY_BYTES, tenure=tenure)
        orchestrator = Orchestrator(
            node.database,
            Recorder(node.database, self.node_id),
            Bridge(node.configuration, self._snapshots.keys),
            transformer,
            Normalizer(transformer, 1, _MEMORY_BYTES),
            self._snapshots,
            self._memory,
            node.settings.max_cycle_recoveries,
        )
        return Runner(
            node.database,
            orchestrator,
            self.node_id,
            tenure,
            node.clock,
            concurrency=IN_FLIGHT // 2,
            lease_seconds=node.settings.lease_seconds,
            poll_seconds=node.settings.poll_seconds,
            on_enqueued=self._dispatcher.wake,
            only=self._namespace,
        )
