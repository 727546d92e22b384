"""The heartbeat: says that this node lives, prolongs its leases, and keeps its clock true.

It also keeps the planner's idea of the lease tables true, in seconds instead of autovacuum's
minute: a queue that was drained and fills up again would be read whole meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from orbit.clock import DatabaseClock
from orbit.database.pool import Database
from orbit.database.queries import load
from orbit.profiles.revision import Configuration
from orbit.services.base import Service

SQL = load("node")
_BEATS_PER_LEASE = 6


class Heartbeat(Service):
    """Beats six times in a lease length.

    Args:
        register: writes the node's row; called when the row is gone.
        beats: what else beats: the holders of leases.
    """

    name = "heartbeat"

    def __init__(
        self,
        database: Database,
        clock: DatabaseClock,
        configuration: Configuration,
        node_id: str,
        *,
        lease_seconds: float,
        register: Callable[[], Awaitable[None]],
        beats: Sequence[Callable[[], Awaitable[None]]],
    ) -> None:
        super().__init__(database)
        self._clock, self._configuration, self._node_id = clock, configuration, node_id
        self._register, self._beats = register, beats
        self._rest_seconds = lease_seconds / _BEATS_PER_LEASE
        self.is_draining = False

    async def run_once(self) -> float:
        """One beat. All holders of leases prolong theirs, even if one fails or waits."""
        failed = await asyncio.gather(*[beat() for beat in self._beats], return_exceptions=True)
        proposed = self._configuration.proposed
        row = await self._database.fetch_one(
            SQL.see_node,
            {
                "node_id": self._node_id,
                "is_draining": self.is_draining,
                "files_revision": proposed.revision if proposed else None,
            },
        )
        if row is None:
            await self._register()
        else:
            self._clock.anchor(row["now"])
        await self._configuration.refresh()
        await self._database.execute(SQL.refresh_statistics)
        for error in failed:
            if error is not None:
                raise error
        return self._rest_seconds
