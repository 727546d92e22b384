"""The sealer: gives high-rate facts their place in the audit trail, a batch at a time.

What a pass is, and why nothing is missed or numbered twice, stands in `audit/sealing`. It runs on
every node; the database lets one at a time do it, and whoever comes next goes on where the last
commit ended. It signs checkpoints of what its node's folder has to hold, if it has one.
"""

from __future__ import annotations

import asyncio

from orbit.audit.sealing import seal
from orbit.audit.signing import Signer
from orbit.clock import Clock
from orbit.database.pool import TRANSIENT, Database, first_line
from orbit.errors import OrbitError
from orbit.services.base import Service

_POLL_SECONDS = 1.0


class Sealer(Service):
    """Runs on every node.

    Args:
        signer: signs checkpoints; None where nothing says where to put them.
        checkpoint_seconds: how often it does.
    """

    name = "sealer"

    def __init__(
        self,
        database: Database,
        clock: Clock,
        node_id: str,
        *,
        signer: Signer | None,
        checkpoint_seconds: float,
    ) -> None:
        super().__init__(database)
        self._clock, self._node_id, self._signer = clock, node_id, signer
        self._checkpoint_seconds = checkpoint_seconds
        self._due = clock.monotonic()

    async def run_once(self) -> float:
        """Seals what there is, then signs if that is due; rests for a poll if nothing is left."""
        done = await seal(self._database, self._node_id)
        if self._signer is not None and self._clock.monotonic() >= self._due:
            self._due = self._clock.monotonic() + self._checkpoint_seconds
            await self._sign(self._signer)
        return 0.0 if done.is_more else _POLL_SECONDS

    async def _sign(self, signer: Signer) -> None:
        """What cannot be signed now is the next time; sealing goes on meanwhile."""
        try:
            await asyncio.to_thread(signer.sign_all)
        except (OSError, OrbitError, *TRANSIENT) as error:
            self._log.error("checkpoint_failed", error=first_line(error))
