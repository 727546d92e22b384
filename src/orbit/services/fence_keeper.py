"""The fence keeper: hears of halts, and ends those whose time is over.

Every node that works looks once a poll length, at the halted namespaces only, and five times a
second while it has work in hand, which a halt on another node may be waiting for. What it hears is
handed on at once: what was claimed before a halt and has not begun is given back. The proof of a
halt does not rest on it (`governance/halt`). That a halt ends at its time does: while no node is
up, nobody ends it, and nothing is sent either.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from psycopg.errors import LockNotAvailable

from orbit.database.pool import Database
from orbit.database.queries import load
from orbit.governance.fence import Fences
from orbit.governance.halt import Brake
from orbit.services.base import Service

SQL = load("halt")
_BUSY_SECONDS = 0.2


class FenceKeeper(Service):
    """Keeps a node's fences; `on_halted` is called when a halt was heard of.

    `is_busy`: whether the node has work in hand.
    """

    name = "fence_keeper"

    def __init__(
        self,
        database: Database,
        fences: Fences,
        brake: Brake,
        *,
        poll_seconds: float,
        on_halted: Callable[[], Awaitable[None]],
        is_busy: Callable[[], bool],
    ) -> None:
        super().__init__(database)
        self._fences, self._brake = fences, brake
        self._poll_seconds, self._on_halted, self._is_busy = poll_seconds, on_halted, is_busy
        self._recalling: set[asyncio.Task[None]] = set()

    async def run_once(self) -> float:
        """One look; rests until the next, or until woken by a change made here."""
        rows = await self._database.fetch_all(SQL.halted)
        if self._fences.learn(rows):
            # Beside the loop: giving jobs back may take a while, and another halt may come.
            recall = asyncio.create_task(self._recall())
            self._recalling.add(recall)
            recall.add_done_callback(self._recalling.discard)
        for row in rows:
            if row["is_over"]:
                await self._end(row["namespace"])
        return min(self._poll_seconds, _BUSY_SECONDS) if self._is_busy() else self._poll_seconds

    async def _recall(self) -> None:
        try:
            await self._on_halted()
        except Exception:  # noqa: BLE001 - what is not given back lapses with its lease, unsent
            self._log.exception("recall_failed")

    async def _end(self, namespace: str) -> None:
        """One that cannot be ended now keeps no other from its end."""
        try:
            await self._brake.resume_by_time(namespace)
        except LockNotAvailable:
            self._log.warning("halt_not_ended", namespace=namespace, reason="another is at it")
