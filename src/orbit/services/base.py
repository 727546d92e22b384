"""The one loop. A service supplies what one pass does; the loop repeats it until told to stop.

A pass answers how long the loop may rest; `wake()` ends the rest early. A pass that fails is
logged and repeated after a growing pause: a service never dies of an error. Stopping is bounded,
whatever the database does. Tests call `run_once()` and need no loop.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from typing import Any

import structlog

from orbit.database.pool import TRANSIENT, Database, first_line

_FIRST_PAUSE, _LAST_PAUSE = 0.1, 5.0
LAST_WORDS_SECONDS = 1.5  # after a drain's time: for giving leases back and for last settlements


class Service(ABC):
    """A loop over `run_once`."""

    name: str

    def __init__(self, database: Database) -> None:
        self._database = database
        self._wake = asyncio.Event()
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._log = structlog.get_logger(f"orbit.{self.name}")

    @abstractmethod
    async def run_once(self) -> float:
        """One pass; how many seconds the loop may rest before the next."""

    def start(self) -> None:
        """Begins the loop."""
        self._task = asyncio.create_task(self._run(), name=f"orbit-{self.name}")

    def wake(self) -> None:
        """Ends the loop's rest: there is something to do."""
        self._wake.set()

    def halt(self) -> None:
        """Lets no further pass begin."""
        self._stopping.set()
        self._wake.set()

    async def stop(self, seconds: float = LAST_WORDS_SECONDS) -> None:
        """Ends the loop after the pass that is under way; one that takes longer is cancelled."""
        self.halt()
        if self._task is None:
            return
        _, late = await asyncio.wait({self._task}, timeout=max(seconds, 0))
        if late:
            self._log.warning("pass_given_up", service=self.name)
            self._task.cancel()

    @property
    def is_stopping(self) -> bool:
        """Whether the loop has been told to stop."""
        return self._stopping.is_set()

    async def _run(self) -> None:
        pause = _FIRST_PAUSE
        while not self.is_stopping:
            self._wake.clear()
            try:
                rest, pause = await self.run_once(), _FIRST_PAUSE
            except TRANSIENT as error:
                self._log.warning("database_unavailable", error=first_line(error))
                await self._database.revive()
                rest, pause = pause, min(pause * 2, _LAST_PAUSE)
            except Exception:  # noqa: BLE001 - a service never dies of an error
                self._log.exception("pass_failed", service=self.name)
                rest, pause = pause, min(pause * 2, _LAST_PAUSE)
            if rest > 0:
                await self._rest(rest)

    async def _rest(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass


async def within(seconds: float, work: Coroutine[Any, Any, object]) -> bool:
    """Whether the work ended in time; raises what it raised.

    Late work is cancelled and not waited for: a database that hangs holds up even the
    cancellation of a statement.
    """
    task = asyncio.create_task(work)
    _, late = await asyncio.wait({task}, timeout=max(seconds, 0))
    if late:
        task.cancel()
        return False
    task.result()
    return True
