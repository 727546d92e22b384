"""The guard: what has to hold, inside the transaction that mutates, or nothing is done.

Both switches are on, all is not paused, and no namespace of the profile is halted. The flags of
halts are read behind the namespaces' fences, taken shared as claims take them: a halt that has
said so is not followed by a change. Whoever comes here has locked the configuration before.

What does nothing says so: the first of a day for each profile, function and reason is a fact with
its event and its entry in the trail; the others are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from orbit.audit.trail import Act
from orbit.autonomy.bounds import Why
from orbit.clock import Clock
from orbit.database.pool import Connection
from orbit.database.queries import array, load
from orbit.profiles.adjustments import By
from orbit.settings import Settings
from orbit.telemetry.catalogue import EventType
from orbit.telemetry.emission import Event, emit

SQL = load("autonomy")


class Function(StrEnum):
    """What may be skipped."""

    ARM = "arm"
    SHADOW = "shadow"
    APPLY = "apply"
    JUDGE = "judge"


@dataclass(frozen=True, slots=True)
class Switches:
    """The settings that say whether autonomy may do anything."""

    is_enabled: bool
    may_mutate: bool
    is_paused: bool

    @classmethod
    def of(cls, settings: Settings) -> Switches:
        """As a node's settings say."""
        return cls(settings.phase4_enabled, settings.phase4_allow_mutation, settings.global_pause)

    @property
    def why_off(self) -> Why | None:
        """Why nothing may be applied or taken back; None where it may."""
        if not self.is_enabled:
            return Why.DISABLED
        if not self.may_mutate:
            return Why.NO_MUTATION
        return Why.PAUSED if self.is_paused else None


class Guard:
    """Looks at the switches anew each time, and keeps skips from flooding."""

    def __init__(self, node_id: str, clock: Clock, switches: Callable[[], Switches]) -> None:
        self._node_id, self._clock, self._switches = node_id, clock, switches
        self._said: dict[tuple[str, ...], str] = {}

    @property
    def switches(self) -> Switches:
        """As they are now."""
        return self._switches()

    @property
    def orbit(self) -> By:
        """Orbit itself, on this node."""
        return By("orbit", "orbit", self._node_id)

    async def why_not_now(self, connection: Connection, namespaces: Sequence[str]) -> Why | None:
        """Why nothing may be changed in these namespaces; None: it may, until the transaction ends.

        To be asked with the configuration locked.
        """
        name = await self.halted_among(connection, namespaces)
        return self.switches.why_off or (Why.HALTED if name is not None else None)

    async def halted_among(self, connection: Connection, namespaces: Sequence[str]) -> str | None:
        """One of the namespaces that is halted; None: none will be until the transaction ends."""
        await connection.execute(SQL.bound_fences)
        await connection.execute(SQL.share_fences, {"namespaces": array(namespaces)})
        rows = await fences(connection, namespaces)
        return next((name for name, row in rows.items() if row["is_halted"]), None)

    def is_said(self, function: Function, profile_id: str, why: Why) -> bool:
        """Whether this node knows that this is written down for today."""
        return self._said.get((profile_id, function, why)) == self._today()

    async def skip(
        self,
        connection: Connection,
        function: Function,
        profile_id: str,
        namespaces: Sequence[str],
        why: Why,
        by: By | None = None,
        proposal_id: str | None = None,
    ) -> list[Act]:
        """Writes down that a function did nothing, unless that is known; the acts to append."""
        by = by or self.orbit
        row = {
            "profile_id": profile_id,
            "function": function.value,
            "why": why.value,
            "namespaces": array(namespaces),
            "proposal_id": proposal_id,
            "actor": by.actor,
            "actor_id": by.actor_id,
            "node_id": by.node_id,
        }
        made = await (await connection.execute(SQL.add_skip, row)).fetchone()
        if made is None:  # of a transaction that is committed, which this one may never be
            self._said[profile_id, function, why] = self._today()
            return []
        told = {"function": function.value, "why": why.value}
        events = [Event(one, EventType.AUTONOMY_SKIPPED, told, profile_id) for one in namespaces]
        await emit(connection, *events)
        subject = f"{profile_id}/{function.value}/{why.value}/{made['day']}"
        detail = {"profileId": profile_id, "why": why.words}
        return [
            Act(one, "autonomy.skipped", by.actor, by.reason, subject, detail) for one in namespaces
        ]

    def _today(self) -> str:
        return self._clock.now().date().isoformat()


async def fences(
    connection: Connection, namespaces: Sequence[str]
) -> Mapping[str, Mapping[str, Any]]:
    """The fences of those of the namespaces that were ever halted."""
    cursor = await connection.execute(SQL.fences, {"namespaces": array(namespaces)})
    return {row["namespace"]: row for row in await cursor.fetchall()}
