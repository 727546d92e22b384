"""Modes: what autonomy may do with a profile, as persons say, and what takes it away from it.

A profile is `disarmed`, in `shadow`, or `armed`. Only a person arms, for the namespaces in which
the profile runs at that time, and with a say in all of them. Armed ends with the first halt of any
of these, at once: the epochs of that time are kept with it, and a higher one counts. It ends with
a rollback or a revert, and where the profile comes to run elsewhere. That is written down too, by
whichever node notices. A person may disarm whatever the switches say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from orbit.audit.trail import Act, append
from orbit.autonomy.bounds import Why
from orbit.autonomy.guard import Function, Guard, fences
from orbit.database.pool import Connection, Database
from orbit.database.queries import array, load
from orbit.errors import RequestInvalid
from orbit.governance.actor import Actor
from orbit.governance.fence import halted
from orbit.profiles.adjustments import By
from orbit.profiles.overlays import Target, namespaces_of
from orbit.profiles.revision import Configuration, Force
from orbit.profiles.switching import check_reach
from orbit.telemetry.catalogue import EventType
from orbit.telemetry.emission import Event, emit

SQL = load("autonomy")
_NEVER_HALTED: Mapping[str, Any] = {"epoch": 0, "is_halted": False}


class Mode(StrEnum):
    """What autonomy may do with a profile."""

    ARMED = "armed"
    SHADOW = "shadow"
    DISARMED = "disarmed"


class Cause(StrEnum):
    """What a mode came of."""

    PERSON = "person"
    HALT = "halt"
    ROLLBACK = "rollback"
    REVERT = "revert"
    REACH = "reach"


@dataclass(frozen=True, slots=True)
class ModeSet:
    """What was asked for: the mode in force now, whether it is another, or why it was skipped."""

    mode: Mode
    is_changed: bool
    why: Why | None = None


def in_force(
    row: Mapping[str, Any] | None,
    namespaces: Sequence[str],
    known: Mapping[str, Mapping[str, Any]],
) -> tuple[Mode, Cause | None]:
    """The mode in force of what was said last, and what disarmed it since.

    `namespaces`: where the profile runs now; `known`: their fences, and those of the row's.
    """
    mode = Mode.DISARMED if row is None else Mode(row["mode"])
    if row is None or mode is not Mode.ARMED:
        return mode, None
    then = dict(zip(row["namespaces"], row["epochs"], strict=True))
    for name, epoch in then.items():
        fence = known.get(name, _NEVER_HALTED)
        if fence["is_halted"] or fence["epoch"] != epoch:
            return Mode.DISARMED, Cause.HALT
    return (mode, None) if set(namespaces) <= then.keys() else (Mode.DISARMED, Cause.REACH)


class Modes:
    """The modes of all profiles, for one node."""

    def __init__(self, database: Database, configuration: Configuration, guard: Guard) -> None:
        self._database, self._configuration, self._guard = database, configuration, guard

    async def set(self, profile_id: str, mode: Mode, actor: Actor, by: By) -> ModeSet:
        """A person says what autonomy may do. Without the switches only disarming has an effect.

        Raises NotFound, NotEntitled, NamespaceHalted, and RequestInvalid where nothing of the
        profile may move, or arming has no reason.
        """
        async with self._database.transaction() as connection:
            held = await self._configuration.hold(connection)
            check_reach(held.active.documents, Target.PROFILE, profile_id, actor)
            namespaces = namespaces_of(held.active.documents, Target.PROFILE, profile_id)
            why = await self._why_not(connection, held, profile_id, mode, by)
            before = await self.of(connection, profile_id, namespaces)
            if why is not None:
                function = Function.ARM if mode is Mode.ARMED else Function.SHADOW
                acts = await self._guard.skip(connection, function, profile_id, namespaces, why, by)
                await append(connection, *acts)
                return ModeSet(before, False, why)
            row = await _last(connection, profile_id)
            is_changed = before is not mode or (row is not None and row["mode"] != mode)
            if is_changed:
                acts = await self.write(connection, profile_id, namespaces, mode, Cause.PERSON, by)
                await append(connection, *acts)
        return ModeSet(mode, is_changed)

    async def of(self, connection: Connection, profile_id: str, namespaces: Sequence[str]) -> Mode:
        """The mode in force of a profile that runs in these namespaces."""
        row = await _last(connection, profile_id)
        then = [] if row is None else row["namespaces"]
        known = await fences(connection, [*namespaces, *then])
        return in_force(row, namespaces, known)[0]

    async def disarm(
        self,
        connection: Connection,
        profile_id: str,
        namespaces: Sequence[str],
        cause: Cause,
        by: By | None = None,
    ) -> list[Act]:
        """Disarms a profile, if it was armed; the acts to append."""
        row = await _last(connection, profile_id)
        if row is None or row["mode"] != Mode.ARMED:
            return []
        by = by or self._guard.orbit
        return await self.write(connection, profile_id, namespaces, Mode.DISARMED, cause, by)

    async def note_ends(self) -> list[str]:
        """Writes down which profiles are armed no longer since a halt, or elsewhere; their ids."""
        rows = await self._database.fetch_all(SQL.modes)
        armed = [row for row in rows if row["mode"] == Mode.ARMED]
        if not armed:
            return []
        documents, found = self._configuration.active.documents, []
        places = {
            row["profile_id"]: namespaces_of(documents, Target.PROFILE, row["profile_id"])
            for row in armed
        }
        concerned = {name for row in armed for name in row["namespaces"]}.union(*places.values())
        async with self._database.connection() as connection:
            known = await fences(connection, sorted(concerned))
        for row in armed:
            profile_id = row["profile_id"]
            cause = in_force(row, places[profile_id], known)[1]
            if cause is not None:
                await self._note_end(profile_id, cause)
                found.append(profile_id)
        return found

    async def write(
        self,
        connection: Connection,
        profile_id: str,
        namespaces: Sequence[str],
        mode: Mode,
        cause: Cause,
        by: By,
    ) -> list[Act]:
        """Says what autonomy may do from now on; the acts to append."""
        known = await fences(connection, namespaces)
        row = {
            "profile_id": profile_id,
            "mode": mode.value,
            "cause": cause.value,
            "namespaces": array(namespaces),
            "epochs": array(known.get(one, _NEVER_HALTED)["epoch"] for one in namespaces),
            "reason": by.reason,
            "actor": by.actor,
            "actor_id": by.actor_id,
            "node_id": by.node_id,
        }
        made = await (await connection.execute(SQL.add_mode, row)).fetchone()
        assert made is not None
        told = {"mode": mode.value, "cause": cause.value}
        events = [Event(one, EventType.AUTONOMY_SET, told, profile_id) for one in namespaces]
        await emit(connection, *events)
        subject = f"{profile_id}/{made['sequence']}"
        detail = {"profileId": profile_id, **told}
        return [
            Act(one, "autonomy.set", by.actor, by.reason, subject, detail) for one in namespaces
        ]

    async def _why_not(
        self, connection: Connection, held: Force, profile_id: str, mode: Mode, by: By
    ) -> Why | None:
        """Why the switches do not let this be said; raises what is refused to anybody."""
        switches = self._guard.switches
        if mode is Mode.DISARMED:
            return None
        profile = held.active.documents.profile(profile_id)
        if profile is None or not profile.allowances:
            raise RequestInvalid(
                f"profile {profile_id} lets nothing move: add autonomy.allow to it in profiles.json"
            )
        if mode is Mode.SHADOW:
            return None if switches.is_enabled else Why.DISABLED
        if by.reason is None:
            raise RequestInvalid("reason: expected 1 to 1000 characters that say why")
        if switches.why_off in (Why.DISABLED, Why.NO_MUTATION):
            return switches.why_off
        namespaces = namespaces_of(held.active.documents, Target.PROFILE, profile_id)
        if (name := await self._guard.halted_among(connection, namespaces)) is not None:
            raise halted(name)
        return None

    async def _note_end(self, profile_id: str, cause: Cause) -> None:
        async with self._database.transaction() as connection:
            held = await self._configuration.hold(connection)
            namespaces = namespaces_of(held.active.documents, Target.PROFILE, profile_id)
            row = await _last(connection, profile_id)
            then = [] if row is None else row["namespaces"]
            known = await fences(connection, [*namespaces, *then])
            if in_force(row, namespaces, known)[1] is not None:  # nobody was quicker
                await append(
                    connection, *await self.disarm(connection, profile_id, namespaces, cause)
                )


async def _last(connection: Connection, profile_id: str) -> Mapping[str, Any] | None:
    return await (await connection.execute(SQL.mode, {"profile_id": profile_id})).fetchone()
