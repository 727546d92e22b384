"""Switching: a person turns a profile or run profile off or on, at once and without a file.

It is an overlay on the file's `state`, audited, for new cycles; no running cycle is changed, so
none is waited for. Asked for what the file says anyway, it takes the overlay away again. Refused
to who has no say in all the namespaces that it reaches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from orbit.audit.trail import Act, append
from orbit.clock import Clock, new_id
from orbit.database.pool import Connection, Database
from orbit.errors import NotEntitled, NotFound
from orbit.governance.actor import EVERYWHERE, Actor
from orbit.profiles.adjustments import By, Ending, add, end
from orbit.profiles.model import Documents, State
from orbit.profiles.overlays import (
    STATE,
    Move,
    Origin,
    Overlay,
    Target,
    namespaces_of,
    target_of,
)
from orbit.profiles.revision import Configuration, Force


@dataclass(frozen=True, slots=True)
class Switched:
    """The state in force, what the file says, and whether anything was changed."""

    state: str
    declared: str
    is_changed: bool
    revision: str


class Switch:
    """Turns profiles and run profiles off and on, for one node."""

    def __init__(
        self, database: Database, configuration: Configuration, clock: Clock, node_id: str
    ) -> None:
        self._database, self._configuration = database, configuration
        self._clock, self._node_id = clock, node_id

    async def turn(
        self, target: Target, target_id: str, state: State, actor: Actor, reason: str | None
    ) -> Switched:
        """Puts a state into force. Raises NotFound and NotEntitled."""
        by = By(actor.name, actor.id, self._node_id, reason)
        async with self._database.transaction() as connection:
            held = await self._configuration.hold(connection)
            check_reach(held.active.documents, target, target_id, actor)
            found = target_of(held.active.documents, target, target_id)
            assert found is not None, "check_reach has looked"
            is_changed = found.state != state
            if is_changed:
                acts = await self._turn(connection, held, target, target_id, state, by)
                await append(connection, *acts)
        await self._configuration.refresh()
        declared = target_of(held.declared.documents, target, target_id)
        assert declared is not None, "an overlay adds nothing"
        revision = self._configuration.active.revision
        return Switched(state, declared.state, is_changed, revision)

    async def _turn(
        self,
        connection: Connection,
        held: Force,
        target: Target,
        target_id: str,
        state: State,
        by: By,
    ) -> list[Act]:
        """There are two states: the other one is the file's, or an overlay's that goes."""
        laid = [
            one
            for one in held.overlays
            if (one.target, one.target_id) == (target, target_id) and one.moves[0].path == STATE
        ]
        if laid:
            acts = await end(connection, laid, Ending.UNDONE, by)
            overlays = [one for one in held.overlays if one not in laid]
        else:
            old = "disabled" if state == "enabled" else "enabled"
            overlay = Overlay(
                new_id(self._clock.now()),
                target,
                target_id,
                Origin.PERSON,
                (Move(STATE, old, state),),
                namespaces_of(held.active.documents, target, target_id),
                by.actor,
                by.reason,
            )
            acts = await add(connection, overlay, by)
            overlays = [*held.overlays, overlay]
        why = by.reason or f"{target_id} {state} by {by.actor}"
        activated = await self._configuration.adjust(
            connection, held, overlays, replace(by, reason=why)
        )
        return [*activated, *acts]


def check_reach(documents: Documents, target: Target, target_id: str, actor: Actor) -> None:
    """Raises NotFound where it is not there for the actor, NotEntitled where it reaches further."""
    namespaces = namespaces_of(documents, target, target_id)
    is_there = target_of(documents, target, target_id) is not None
    if not is_there or not any(map(actor.sees, namespaces)):
        raise NotFound(f"there is no {target.value.replace('_', ' ')} {target_id}")
    if EVERYWHERE not in namespaces and not actor.contains(namespaces):
        raise NotEntitled(
            "the profile runs elsewhere too; this needs somebody with a say in all of it"
        )
