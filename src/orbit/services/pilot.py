"""The pilot: lets controlled autonomy look once at all that it may have to do.

First what disarms, then what is on probation, then shadows, and only then what persons approved.
What any of it does, and that it does nothing without its switches, stands in `autonomy`. It runs on
every node, and works on the one that numbers events; which node it is makes no difference, since
every change is one transaction under the configuration's lock.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from orbit.autonomy.changes import Changes
from orbit.autonomy.modes import Modes
from orbit.autonomy.shadowing import Shadows
from orbit.database.pool import TRANSIENT, Database
from orbit.database.queries import load
from orbit.services.base import Service

SQL = load("proposals")
_POLL_SECONDS = 10.0


class Pilot(Service):
    """Runs on every node."""

    name = "pilot"

    def __init__(
        self, database: Database, modes: Modes, changes: Changes, shadows: Shadows, node_id: str
    ) -> None:
        super().__init__(database)
        self._node_id = node_id
        self._parts: dict[str, Callable[[], Awaitable[Any]]] = {
            "disarmed": modes.note_ends,
            "judged": changes.judge_all,
            "shadowed": shadows.shadow_all,
            "applied": changes.apply_approved,
        }

    async def run_once(self) -> float:
        """One look; a part that fails keeps no other from its own."""
        row = await self._database.fetch_one(SQL.leader)
        if row is not None and row["node_id"] == self._node_id:
            for name, part in self._parts.items():
                if self.is_stopping:
                    break
                await self._do(name, part)
        return _POLL_SECONDS

    async def _do(self, name: str, part: Callable[[], Awaitable[Any]]) -> None:
        try:
            found = await part()
        except TRANSIENT:
            raise
        except Exception:  # noqa: BLE001 - the other parts are done nonetheless
            self._log.exception("autonomy_failed", part=name)
        else:
            for one in found:
                self._log.info(f"autonomy_{name}", what=str(one))
