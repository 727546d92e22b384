"""The strategist: has rules suggest changes of profiles, and ends proposals that hold no longer.

What it suggests waits for a person; it applies nothing. It runs on every node, and works on the
one that numbers events. A namespace that cannot be looked at holds up no other.
"""

from __future__ import annotations

from orbit.database.pool import TRANSIENT, Database
from orbit.insight.proposals import Proposals
from orbit.services.base import Service

_POLL_SECONDS = 30.0


class Strategist(Service):
    """Runs on every node."""

    name = "strategist"

    def __init__(self, database: Database, proposals: Proposals, node_id: str) -> None:
        super().__init__(database)
        self._proposals, self._node_id = proposals, node_id

    async def run_once(self) -> float:
        """Looks at each namespace once."""
        for namespace in await self._proposals.namespaces(self._node_id):
            if self.is_stopping:
                break
            try:
                made = await self._proposals.generate(namespace)
            except TRANSIENT:
                raise
            except Exception:  # noqa: BLE001 - the other namespaces are looked at nonetheless
                self._log.exception("proposing_failed", namespace=namespace)
            else:
                for proposal_id in made.made:
                    self._log.info("proposal_made", namespace=namespace, proposal=proposal_id)
        return _POLL_SECONDS
