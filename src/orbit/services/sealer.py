"""The sealer: gives high-rate facts their place in the audit trail, a batch at a time.

What a pass is, and why nothing is missed or numbered twice, stands in `audit/sealing`. It runs on
every node; the database lets one at a time do it, and whoever comes next goes on where the last
commit ended.
"""

from __future__ import annotations

from orbit.audit.sealing import seal
from orbit.database.pool import Database
from orbit.services.base import Service

_POLL_SECONDS = 1.0


class Sealer(Service):
    """Runs on every node."""

    name = "sealer"

    def __init__(self, database: Database, node_id: str) -> None:
        super().__init__(database)
        self._node_id = node_id

    async def run_once(self) -> float:
        """Seals what there is; rests for a poll if nothing is left."""
        done = await seal(self._database, self._node_id)
        return 0.0 if done.is_more else _POLL_SECONDS
