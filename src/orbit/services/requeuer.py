"""The requeuer: carries bulk requeues on, step by step, because a person began them.

A pass does every step that is due. What a step is, and why several nodes may do this at once,
stands in `execution/requeues`. It begins no batch and brings nothing back by itself.
"""

from __future__ import annotations

from orbit.database.pool import Database
from orbit.execution.requeues import Requeues
from orbit.services.base import Service

_REST_SECONDS = 1.0


class Requeuer(Service):
    """Runs on every node that works; `wake` it when a batch has begun."""

    name = "requeuer"

    def __init__(self, database: Database, requeues: Requeues) -> None:
        super().__init__(database)
        self._requeues = requeues

    async def run_once(self) -> float:
        """The steps that are due; rests until the next is, or a second."""
        while not self.is_stopping and await self._requeues.step():
            pass
        due = await self._requeues.next_due()
        return _REST_SECONDS if due is None else min(max(due, 0.01), _REST_SECONDS)
