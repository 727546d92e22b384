"""Shadow mode: what autonomy would have done, written down before a person decides.

Of each pending proposal of a profile in shadow mode it says once whether it would have applied it,
had it been approved, or why not. How often persons decided the same is then counted, not told by
anybody. It changes no profile, so it needs the first of the two switches only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orbit.audit.trail import Act, append
from orbit.autonomy.bounds import Why
from orbit.autonomy.changes import Changes
from orbit.autonomy.guard import Function, Guard, fences
from orbit.autonomy.modes import Mode
from orbit.database.pool import Connection, Database
from orbit.database.queries import array, load
from orbit.profiles.overlays import Target, namespaces_of
from orbit.profiles.revision import Configuration
from orbit.telemetry.catalogue import EventType
from orbit.telemetry.emission import Event, emit

SQL = load("autonomy")


class Shadows:
    """Shadows the proposals of all profiles in shadow mode, for one node."""

    def __init__(
        self, database: Database, configuration: Configuration, guard: Guard, changes: Changes
    ) -> None:
        self._database, self._configuration = database, configuration
        self._guard, self._changes = guard, changes

    async def shadow_all(self) -> list[str]:
        """Writes down what there is to say; the ids of the proposals."""
        modes = await self._database.fetch_all(SQL.modes)
        profiles = [row["profile_id"] for row in modes if row["mode"] == Mode.SHADOW]
        if not profiles:
            return []
        found = []
        for row in await self._database.fetch_all(SQL.undecided, {"profile_id": array(profiles)}):
            if not self._guard.switches.is_enabled:
                await self._skip(row)
            elif await self._shadow(row):
                found.append(row["proposal_id"])
        return found

    async def _shadow(self, row: Mapping[str, Any]) -> bool:
        await self._configuration.refresh()
        plan = await self._changes.planned(row, is_shadow=True)
        why = plan if isinstance(plan, Why) else await self._why_halted(row["profile_id"])
        async with self._database.transaction() as connection:
            acts = await self._write(connection, row, why)
            await append(connection, *acts)
        return bool(acts)

    async def _write(
        self, connection: Connection, row: Mapping[str, Any], why: Why | None
    ) -> list[Act]:
        by, namespace, proposal_id = self._guard.orbit, row["namespace"], row["proposal_id"]
        given = {
            "namespace": namespace,
            "proposal_id": proposal_id,
            "profile_id": row["profile_id"],
            "why": None if why is None else why.value,
            "node_id": by.node_id,
        }
        cursor = await connection.execute(SQL.add_shadow, given)
        if await cursor.fetchone() is None:
            return []
        told = {"proposalId": proposal_id, "wouldApply": why is None, "why": given["why"]}
        event = Event(namespace, EventType.AUTONOMY_SHADOWED, told, row["profile_id"])
        await emit(connection, event)
        return [Act(namespace, "autonomy.shadowed", by.actor, None, proposal_id, told)]

    async def _why_halted(self, profile_id: str) -> Why | None:
        documents = self._configuration.active.documents
        namespaces = namespaces_of(documents, Target.PROFILE, profile_id)
        async with self._database.connection() as connection:
            known = await fences(connection, namespaces)
        return Why.HALTED if any(row["is_halted"] for row in known.values()) else None

    async def _skip(self, row: Mapping[str, Any]) -> None:
        profile_id, why = row["profile_id"], Why.DISABLED
        if self._guard.is_said(Function.SHADOW, profile_id, why):
            return
        documents = self._configuration.active.documents
        namespaces = namespaces_of(documents, Target.PROFILE, profile_id)
        async with self._database.transaction() as connection:
            acts = await self._guard.skip(connection, Function.SHADOW, profile_id, namespaces, why)
            await append(connection, *acts)
