"""The sequencer: gives committed events their positions, on one node at a time.

Why nothing is missed or numbered twice stands in `telemetry/sequencing`. It runs on every node;
those that do not lead look again when the leader's lease would be over.
"""

from __future__ import annotations

from orbit import metrics
from orbit.database.pool import Database
from orbit.services.base import Service
from orbit.telemetry.sequencing import sequence

_BUSY_SECONDS, _IDLE_SECONDS = 0.01, 0.05


class Sequencer(Service):
    """Runs on every node."""

    name = "sequencer"

    def __init__(self, database: Database, node_id: str) -> None:
        super().__init__(database)
        self._node_id = node_id

    async def run_once(self) -> float:
        """Numbers what there is; looks again soon, or when another's lease is over."""
        done = await sequence(self._database, self._node_id)
        if done.wait_seconds:
            return done.wait_seconds
        if done.events:
            metrics.events_sequenced.inc(done.events)
            metrics.sequencing_lag_seconds.observe(done.lag_seconds)
        if done.is_more:
            return 0.0
        return _BUSY_SECONDS if done.events else _IDLE_SECONDS
