"""The runner: claims due cycles and carries many of them on at once.

It holds what it has claimed until the cycle needs no worker, its lease is lost, or the node
drains: then it gives the leases back, so that any node goes on at once. So it does with a cycle
of a halted namespace, before its next step. A cycle that cannot go on here, for want of its code
or for an error that nobody expected, is given back with a delay.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from typing import Any

from orbit import tracing
from orbit.clock import Clock
from orbit.database.pool import TRANSIENT, Database, first_line
from orbit.errors import LeaseLost, NamespaceHalted, NotHere, OrbitError, StepFailed
from orbit.execution.context import ClaimedCycle, Stage
from orbit.execution.cycle import Orchestrator, claim
from orbit.execution.recorder import release, renew
from orbit.execution.tenure import Tenure
from orbit.services.base import LAST_WORDS_SECONDS, Service, within
from orbit.vocabulary import printable

_FIRST_DELAY_SECONDS = 0.1
_ERROR_CHARACTERS = 500


class Runner(Service):
    """Claims cycles up to its concurrency; a drill's, and nothing else, if `only` names it.

    `on_enqueued` is called when a cycle's jobs are queued, so that dispatch begins at once. While
    `is_paused` what waits for another cycle goes on waiting.
    """

    name = "runner"

    def __init__(
        self,
        database: Database,
        orchestrator: Orchestrator,
        node_id: str,
        tenure: Tenure,
        clock: Clock,
        *,
        concurrency: int,
        lease_seconds: float,
        poll_seconds: float,
        on_enqueued: Callable[[], None],
        only: str | None = None,
        is_paused: bool = False,
    ) -> None:
        super().__init__(database)
        self._orchestrator, self._node_id = orchestrator, node_id
        self._tenure, self._clock = tenure, clock
        self._concurrency, self._lease_seconds = concurrency, lease_seconds
        self._poll_seconds, self._on_enqueued = poll_seconds, on_enqueued
        self._only, self._is_paused = only, is_paused
        self._running: dict[str, tuple[ClaimedCycle, asyncio.Task[None]]] = {}
        self._traced = tracing.traced(self._carry, _span_of)

    async def run_once(self) -> float:
        """Claims what there is room for; rests until woken if nothing more was due."""
        room = self._concurrency - len(self._running)
        if room <= 0:
            return self._poll_seconds
        if any(self._tenure.seconds_left(cycle.cycle_id) <= 0 for cycle in self.running):
            await self.beat()  # the database was away: what is in hand is not begun anew
        asked_at = self._clock.monotonic()
        claimed = await claim(
            self._database,
            self._node_id,
            room,
            self._lease_seconds,
            only=self._only,
            is_paused=self._is_paused,
        )
        self._tenure.hold([cycle.cycle_id for cycle in claimed], asked_at)
        for cycle in claimed:
            if cycle.is_taken_over:
                self._log.warning("cycle_taken_over", recoveries=cycle.recoveries, **_named(cycle))
            if (outlived := self._running.get(cycle.cycle_id)) is not None:
                outlived[1].cancel()  # its lease ran out, and now we hold the next one
            task = asyncio.create_task(self._traced(cycle), name=f"cycle-{cycle.cycle_id}")
            self._running[cycle.cycle_id] = cycle, task
        return 0 if claimed else self._poll_seconds

    @property
    def running(self) -> Collection[ClaimedCycle]:
        """The cycles in hand."""
        return [cycle for cycle, _ in self._running.values()]

    async def beat(self) -> None:
        """Prolongs the leases in hand; lets go of cycles whose lease is lost."""
        entries = list(self._running.values())
        if not entries:
            return
        cycles = [cycle for cycle, _ in entries]
        asked_at = self._clock.monotonic()
        async with self._database.connection() as connection:
            held = await renew(connection, self._node_id, cycles, self._lease_seconds)
        self._tenure.hold(held & self._running.keys(), asked_at)
        for cycle, task in entries:
            if cycle.cycle_id not in held:
                task.cancel()

    async def drain(self, seconds: float) -> None:
        """Lets cycles go on for so long, then gives back the leases of the rest."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        await self.stop(seconds)
        if tasks := [task for _, task in self._running.values()]:
            await asyncio.wait(tasks, timeout=max(deadline - loop.time(), 0))
        rest = [(cycle, task) for cycle, task in self._running.values() if not task.done()]
        if rest and not await within(LAST_WORDS_SECONDS, self._give_back_all(rest)):
            self._log.warning("cycles_abandoned", count=len(rest))  # their leases run out

    async def _give_back_all(self, rest: Sequence[tuple[ClaimedCycle, asyncio.Task[None]]]) -> None:
        for _, task in rest:
            task.cancel()
        await asyncio.wait([task for _, task in rest], timeout=LAST_WORDS_SECONDS / 3)
        cycles = [cycle for cycle, _ in rest]
        await self._database.persist(lambda: self._release(cycles))
        self._log.info("cycles_released", count=len(rest))

    async def _release(self, cycles: Sequence[ClaimedCycle]) -> None:
        async with self._database.connection() as connection:
            await release(connection, self._node_id, cycles)

    async def _carry(self, cycle: ClaimedCycle) -> None:
        try:
            outcome = await self._orchestrator.run(cycle)
            if outcome is Stage.DISPATCH_ENQUEUED:
                self._on_enqueued()
            if isinstance(outcome, StepFailed):
                tracing.note(is_failed=True, error=_where(outcome))
                self._log.warning("cycle_failed", **_why(cycle, outcome), **_named(cycle))
            else:
                self._log.debug("cycle_advanced", stage=outcome.value, **_named(cycle))
        except LeaseLost:
            self._log.warning("lease_lost", **_named(cycle))
        except NamespaceHalted:
            self._log.info("cycle_halted", **_named(cycle))
            await self._database.persist(lambda: self._release([cycle]))
        except TRANSIENT:
            self._log.warning("cycle_interrupted", exc_info=True, **_named(cycle))
        except NotHere as error:
            self._log.warning("cycle_unavailable_here", error=str(error), **_named(cycle))
            await self._give_back(cycle, error, self._lease_seconds / 6)
        except Exception as error:  # noqa: BLE001 - whatever it is, the cycle fails at a bound
            self._log.exception("cycle_interrupted", **_named(cycle))
            delay = _FIRST_DELAY_SECONDS * 2 ** min(cycle.recoveries, 30)
            await self._give_back(cycle, error, min(delay, self._lease_seconds))
        finally:
            entry = self._running.get(cycle.cycle_id)
            if entry is not None and entry[0] is cycle:
                del self._running[cycle.cycle_id]
                self._tenure.drop(cycle.cycle_id)
            self.wake()

    async def _give_back(self, cycle: ClaimedCycle, error: Exception, delay_seconds: float) -> None:
        text = first_line(error)
        if not isinstance(error, OrbitError):
            text = f"{type(error).__name__}: {text}"
        reason = printable(text[:_ERROR_CHARACTERS])
        try:
            async with self._database.connection() as connection:
                await release(
                    connection, self._node_id, [cycle], delay_seconds=delay_seconds, error=reason
                )
        except TRANSIENT:
            self._log.warning("lease_not_given_back", exc_info=True, **_named(cycle))


def _span_of(cycle: ClaimedCycle) -> tuple[str, str, tracing.Attributes]:
    attributes: tracing.Attributes = {
        "orbit.namespace": cycle.namespace,
        "orbit.cycle.id": cycle.cycle_id,
        "orbit.run_profile.id": cycle.run_profile_id,
        "orbit.lease.number": cycle.lease_number,
    }
    return "cycle", cycle.traceparent, attributes


def _why(cycle: ClaimedCycle, failure: StepFailed) -> dict[str, Any]:
    return {
        "run_profile": cycle.run_profile_id or None,
        "stage": failure.details.get("stage"),
        "step": failure.details.get("step"),
        "reason": str(failure),
    }


def _where(failure: StepFailed) -> str:
    """Without the step's own text, which may hold a payload."""
    return f"{failure.code}: {failure.details.get('stage')}, step {failure.details.get('step')}"


def _named(cycle: ClaimedCycle) -> dict[str, str]:
    return {
        "namespace": cycle.namespace,
        "cycle": cycle.cycle_id,
        "trace": cycle.traceparent,
    }
