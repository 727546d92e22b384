"""Refused attempts in the audit trail: who was refused what, and not without bound.

An entry says who asked, for what, and how it was answered; it never repeats what was sent but the
reason. The trail is not to be flooded: of the same refusal of the same actor five are noted at
once, then one per growing pause of a minute at most; and a node notes 60 a minute in all, and 60 of
strangers. How many were left out stands in the next entry of their kind. An actor's other refusals
are counted apart, so that a flood of one does not hide another, and no stranger's hides an actor's.

A refusal that cannot be noted, because the database does not answer, stays one and is logged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from orbit.audit import trail
from orbit.audit.trail import Act
from orbit.clock import Clock
from orbit.database.pool import TRANSIENT, Database
from orbit.governance.actor import EVERYWHERE, Actor
from orbit.governance.slowing import Ration, Slowing

MOST_A_MINUTE = 60
_MOST_SUBJECT, _MOST_ANSWER = 200, 500
log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Refusal:
    """What was refused: the request's method and declared path, and the answer to it.

    `namespace` is the one that the path names; `is_act` is false for who may not, or whom the
    thing is not there for, and true for what may not be.
    """

    what: str
    code: str
    answer: str
    is_act: bool
    namespace: str | None = None
    reason: str | None = None


class Refusals:
    """Notes refusals for one node."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._slowing = Slowing(clock)
        self._ration = Ration(clock, MOST_A_MINUTE)
        self._strangers = Ration(clock, MOST_A_MINUTE)

    async def note(self, actor: Actor, refusal: Refusal) -> None:
        """Notes that an actor was refused, in the trail of the namespace that is concerned.

        Of one that is not there for the actor its own namespaces' trails tell, and that of all.
        """
        seen = refusal.namespace
        if seen is not None and actor.sees(seen):
            logs = [seen]
        else:
            logs = [*([] if seen is None else [EVERYWHERE]), *(actor.within or [EVERYWHERE])]
        action = "act.refused" if refusal.is_act else "access.refused"
        await self._note(self._ration, actor.id, logs, action, actor.name, refusal)

    async def note_stranger(self, source: str, refusal: Refusal) -> None:
        """Notes a refusal of who was not asked who it is; in the installation's trail."""
        await self._note(self._strangers, source, [EVERYWHERE], "access.refused", source, refusal)

    async def _note(
        self,
        ration: Ration,
        who: str,
        logs: Sequence[str],
        action: str,
        name: str,
        refusal: Refusal,
    ) -> None:
        what = refusal.what[:_MOST_SUBJECT]
        kind = f"{who} {what} {refusal.code}"
        if self._slowing.wait_seconds(kind) > 0:
            return
        left_out = ration.take()
        if left_out is None:
            return
        detail = {
            "code": refusal.code,
            "answer": refusal.answer[:_MOST_ANSWER],
            "leftOut": self._slowing.failed(kind),
            "leftOutOfAll": left_out,
        }
        acts = [Act(one, action, name, refusal.reason, what, detail) for one in logs]
        try:
            async with self._database.transaction() as connection:
                await trail.append(connection, *acts)
        except TRANSIENT as error:
            log.warning("refusal_not_noted", error=type(error).__name__, what=what)
