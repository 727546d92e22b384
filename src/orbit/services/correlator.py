"""The correlator: feeds each namespace's new events to its detector, which says what they mean.

How a batch is fed, and why nothing is fed twice, stands in `insight/keeping`. It runs on every
node, and works on the one that numbers events: another takes over with the numbering. Namespaces
take turns, a batch each, so that a large one holds up no other; nor does one that cannot be fed.
"""

from __future__ import annotations

from orbit.database.pool import TRANSIENT, Database
from orbit.insight.keeping import SignalKeeper
from orbit.services.base import Service

_POLL_SECONDS, _FAILED_SECONDS = 1.0, 5.0


class Correlator(Service):
    """Runs on every node."""

    name = "correlator"

    def __init__(self, database: Database, keeper: SignalKeeper, node_id: str) -> None:
        super().__init__(database)
        self._keeper, self._node_id = keeper, node_id

    async def run_once(self) -> float:
        """Feeds a batch of each namespace that is behind; goes on at once where one is yet."""
        is_behind = has_failed = False
        for namespace in await self._keeper.behind(self._node_id):
            if self.is_stopping:
                break
            try:
                fed = await self._keeper.feed_batch(namespace, is_leader=True)
            except TRANSIENT:
                raise
            except Exception:  # noqa: BLE001 - the other namespaces are fed nonetheless
                self._log.exception("feed_failed", namespace=namespace)
                has_failed = True
            else:
                is_behind |= not fed.is_up_to_date
        if is_behind:
            return 0.0
        return _FAILED_SECONDS if has_failed else _POLL_SECONDS
