"""The requeuer: carries bulk requeues on, step by step, because a person began them.

A pass looks, without a lock, when the next step is due, and claims only what is due: an idle node
reads a row at most a second. What a step is, and why several nodes may do this at once, stands in
`execution/requeues`. It begins no batch and brings nothing back by itself.
"""

from __future__ import annotations

from orbit.database.pool import Database
from orbit.execution.requeues import Requeues
from orbit.services.base import Service

_POLL_SECONDS = 1.0  # how long a batch that another node began may go unnoticed
_SHORTEST_REST_SECONDS = 0.01


class Requeuer(Service):
    """Runs on every node that works; `wake` it when a batch has begun."""

    name = "requeuer"

    def __init__(self, database: Database, requeues: Requeues) -> None:
        super().__init__(database)
        self._requeues = requeues

    async def run_once(self) -> float:
        """The steps that are due; rests until the next is, or for one poll."""
        while not self.is_stopping:
            due = await self._requeues.next_due()
            if due is None:
                return _POLL_SECONDS
            if due > 0:
                return min(max(due, _SHORTEST_REST_SECONDS), _POLL_SECONDS)
            if not await self._requeues.step():  # another node is just taking it
                return _SHORTEST_REST_SECONDS
        return 0
