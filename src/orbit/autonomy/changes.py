"""Changes: an approved proposal applied as an overlay, on probation, and taken back.

Design note. A change is one transaction: it locks the configuration, finds the revision that it
was thought out for still in force, takes the fences and asks the guard, and then writes the
overlay with its inverse and what it is held against, the new revision, events and acts. So is its
end: verdict, the overlay's end, the revision without it, and the profile's disarming. Nothing of
either is kept in memory that facts do not say: whichever node looks next goes on from them, and a
node that dies within has done nothing. Two that come at once wait for the lock, and the second
finds it done.

It applies only what a person approved, nobody applied and the rules still suggest, within the
profile's bounds, and one change of a profile at a time. A breach is rolled back at once; what stays
inconclusive is held until its time is over and then reverted; only what is shown to be no worse is
kept, as an overlay, while the profile is armed. Nothing is ever written into a file.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from orbit import metrics
from orbit.audit.trail import Act, append
from orbit.autonomy.bounds import Why, moves_in, why_not
from orbit.autonomy.guard import Function, Guard, fences
from orbit.autonomy.modes import Cause, Mode, Modes
from orbit.autonomy.probation import Trial, Verdict, trials_of, verdict_of, written
from orbit.canonical import canonical_json
from orbit.clock import Clock, new_id
from orbit.database.pool import TRANSIENT, Connection, Database
from orbit.database.queries import load
from orbit.errors import DatabaseUnavailable
from orbit.governance.actor import Actor
from orbit.insight.keeping import BATCH_EVENTS, SignalKeeper
from orbit.insight.proposals import Proposals
from orbit.insight.source import profile_revisions
from orbit.insight.strategy import profile_digest
from orbit.profiles.adjustments import (
    By,
    Ending,
    Probation,
    add,
    end,
    overlay_of,
)
from orbit.profiles.model import Profile, document_body
from orbit.profiles.overlays import (
    Move,
    Origin,
    Overlay,
    Target,
    lay,
    moves_of,
    namespaces_of,
)
from orbit.profiles.revision import Configuration, Force, Revision
from orbit.profiles.switching import check_reach
from orbit.telemetry.catalogue import EventType
from orbit.telemetry.emission import Event, emit

SQL = load("autonomy")
log = structlog.get_logger(__name__)
Result = TypeVar("Result")
_NAMES = ("profile_id", "proposal_id", "target_id", "overlay_id")
_TRIES = 3
_ASKED_BATCHES = 20
_ENDINGS = {Verdict.BREACHED: Ending.ROLLED_BACK, Verdict.INCONCLUSIVE: Ending.REVERTED}
_CAUSES = {Verdict.BREACHED: Cause.ROLLBACK, Verdict.INCONCLUSIVE: Cause.REVERT}


@dataclass(frozen=True, slots=True)
class Plan:
    """A change thought out for a revision: what it moves, and what it will be held against."""

    revision: str
    profile: Profile
    overlay: Overlay
    trial: Mapping[str, Any]


class Changes:
    """Applies and takes back, for one node."""

    def __init__(
        self,
        database: Database,
        configuration: Configuration,
        clock: Clock,
        guard: Guard,
        modes: Modes,
        keeper: SignalKeeper,
        proposals: Proposals,
        *,
        probation_hours: int,
    ) -> None:
        self._database, self._configuration, self._clock = database, configuration, clock
        self._guard, self._modes, self._keeper, self._proposals = guard, modes, keeper, proposals
        self._hours = probation_hours
        self._trials: dict[str, dict[str, Trial]] = {}
        self._weighing = asyncio.Lock()

    # ---- applying

    async def apply_approved(self) -> list[str]:
        """Applies what may be of what persons approved; the ids of the proposals."""
        rows = await self._database.fetch_all(SQL.candidates, {"proposal_id": None})
        found = [(row["proposal_id"], await _tried(self.apply, row)) for row in rows]
        return [proposal_id for proposal_id, is_applied in found if is_applied]

    async def apply(self, row: Mapping[str, Any]) -> bool:
        """Applies an approved proposal; whether it did. Why not is written down."""
        for _ in range(_TRIES):
            await self._configuration.refresh()
            plan = await self.planned(row)
            if isinstance(plan, Why) and self._guard.is_said(
                Function.APPLY, row["profile_id"], plan
            ):
                return False
            async with self._database.transaction() as connection:
                held = await self._configuration.hold(connection)
                asked = {"proposal_id": row["proposal_id"]}
                if await (await connection.execute(SQL.candidates, asked)).fetchone() is None:
                    return False  # another was quicker
                if isinstance(plan, Plan):
                    if held.active.revision != plan.revision:
                        continue
                    plan = await self._why_not_now(connection, held, plan) or plan
                if isinstance(plan, Why):
                    acts = await self._skip(connection, held, row, plan)
                else:
                    acts = await self._lay(connection, held, row, plan)
                await append(connection, *acts)
            await self._configuration.refresh()
            if isinstance(plan, Plan):
                metrics.autonomy_changes.labels("applied").inc()
            return isinstance(plan, Plan)
        raise DatabaseUnavailable("the configuration is changing; it is looked at again")

    async def planned(self, row: Mapping[str, Any], *, is_shadow: bool = False) -> Plan | Why:
        """What a proposal comes to now, or why it cannot be applied, as far as one sees unlocked.

        A shadow needs no switch for mutation, and is not armed.
        """
        switches, active = self._guard.switches, self._configuration.active
        off = switches.why_off
        if off is not None and not (is_shadow and off is Why.NO_MUTATION):
            return off
        profile_id = row["profile_id"]
        profile = active.documents.profile(profile_id)
        namespaces = namespaces_of(active.documents, Target.PROFILE, profile_id)
        if profile is None or not profile.is_enabled or "*" in namespaces:
            return Why.NOT_RUNNING
        if profile_digest(profile) != row["profile_digest"]:
            return Why.CHANGED
        async with self._database.connection() as connection:
            why = await self._why_not_ready(connection, profile_id, namespaces, is_shadow=is_shadow)
            moves = moves_in(profile, json.loads(row["patch"]))
            if isinstance(moves, Why):
                return why or moves
            why = why or why_not(profile, moves, await _of_today(connection, profile_id))
        if why is None and not await self._proposals.is_suggested(row):
            why = Why.UNFOUNDED
        if why is not None:
            return why
        overlay = Overlay(
            new_id(self._clock.now()),
            Target.PROFILE,
            profile_id,
            Origin.AUTONOMY,
            moves,
            namespaces,
            self._guard.orbit.actor,
            None,
        )
        trial = await self._trial(active, overlay)
        return trial if isinstance(trial, Why) else Plan(active.revision, profile, overlay, trial)

    async def _why_not_ready(
        self,
        connection: Connection,
        profile_id: str,
        namespaces: tuple[str, ...],
        *,
        is_shadow: bool = False,
    ) -> Why | None:
        why = None if is_shadow else await self._why_not_armed(connection, profile_id, namespaces)
        if why is not None:
            return why
        cursor = await connection.execute(SQL.flights, {"profile_id": profile_id})
        return Why.IN_FLIGHT if await cursor.fetchone() is not None else None

    async def _why_not_now(self, connection: Connection, held: Force, plan: Plan) -> Why | None:
        """The same with the configuration and the fences held: from here on nothing changes."""
        overlay = plan.overlay
        return (
            await self._guard.why_not_now(connection, overlay.namespaces)
            or await self._why_not_ready(connection, overlay.target_id, overlay.namespaces)
            or why_not(plan.profile, overlay.moves, await _of_today(connection, overlay.target_id))
        )

    async def _trial(self, active: Revision, overlay: Overlay) -> Mapping[str, Any] | Why:
        """What a change is to be held against, in every namespace in which it takes effect."""
        documents, profile_id = active.documents, overlay.target_id
        before = profile_revisions(document_body(documents))[profile_id]
        after = profile_revisions(document_body(lay(documents, [overlay]).documents))[profile_id]
        parts = {}
        for namespace in overlay.namespaces:
            position, bases = await self._keeper.bases(namespace, profile_id, before)
            if not bases:
                return Why.NO_BASELINE
            parts[namespace] = written(position, bases)
        return {"revision": after, "namespaces": parts}

    async def _skip(
        self, connection: Connection, held: Force, row: Mapping[str, Any], why: Why
    ) -> list[Act]:
        profile_id = row["profile_id"]
        namespaces = namespaces_of(held.active.documents, Target.PROFILE, profile_id)
        proposal_id = row["proposal_id"]
        return await self._guard.skip(
            connection, Function.APPLY, profile_id, namespaces, why, proposal_id=proposal_id
        )

    async def _lay(
        self, connection: Connection, held: Force, row: Mapping[str, Any], plan: Plan
    ) -> list[Act]:
        by = self._by(f"proposal {row['proposal_id']}: {row['rule']}")
        trial = canonical_json(dict(plan.trial)).decode()
        probation = Probation(row["namespace"], row["proposal_id"], trial, self._hours)
        acts = await add(connection, plan.overlay, by, probation)
        overlays = [*held.overlays, plan.overlay]
        return [*await self._configuration.adjust(connection, held, overlays, by), *acts]

    # ---- taking back

    async def judge_all(self) -> list[tuple[str, Verdict]]:
        """Looks at every change on probation; those whose probation has ended, and how."""
        rows = await self._database.fetch_all(SQL.flights, {"profile_id": None})
        gone = self._trials.keys() - {row["overlay_id"] for row in rows}
        for overlay_id in gone:
            del self._trials[overlay_id]
        found = [(row["overlay_id"], await _tried(self.judge, row)) for row in rows]
        return [(overlay_id, verdict) for overlay_id, verdict in found if verdict is not None]

    async def judge(self, row: Mapping[str, Any]) -> Verdict | None:
        """Ends a probation that can be ended; None where it is held, or was skipped."""
        verdict, evidence = await self._weighed(row)
        body = canonical_json(evidence).decode()
        is_held = verdict is Verdict.INCONCLUSIVE and not row["is_over"]
        if is_held and await self._is_watched(row):
            return None
        why = await self._why_held(overlay_of(row), verdict)
        if verdict is Verdict.KEPT and row["is_over"] and why is Why.NOT_ARMED:
            verdict, why = Verdict.INCONCLUSIVE, None
        if why is not None and self._guard.is_said(Function.JUDGE, row["target_id"], why):
            return None
        async with self._database.transaction() as connection:
            done = await self._end(connection, overlay_of(row), verdict, body)
        await self._configuration.refresh()
        if done is not None:
            metrics.autonomy_changes.labels(_ENDINGS.get(done, done).value).inc()
        return done

    async def _is_watched(self, row: Mapping[str, Any]) -> bool:
        """Whether the profile is as the change left it: no other one's cycles are weighed."""
        await self._configuration.refresh()
        revisions = profile_revisions(document_body(self._configuration.active.documents))
        watched: str = json.loads(row["trial"])["revision"]
        return revisions.get(row["target_id"]) == watched

    async def weigh(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """How a change on probation stands, by namespace; as of a position, in bounded time."""
        _, evidence = await self._weighed(row, most_batches=_ASKED_BATCHES)
        return evidence

    async def take_back(self, profile_id: str, actor: Actor, by: By) -> list[Overlay]:
        """A person takes back all that autonomy changed of a profile, whatever the switches say.

        The profile is disarmed. Raises NotFound and NotEntitled.
        """
        async with self._database.transaction() as connection:
            held = await self._configuration.hold(connection)
            documents = held.active.documents
            check_reach(documents, Target.PROFILE, profile_id, actor)
            laid = [
                one
                for one in held.overlays
                if one.origin is Origin.AUTONOMY and one.target_id == profile_id
            ]
            acts: list[Act] = []
            if laid:
                acts = await self._without(connection, held, laid, Ending.UNDONE, by)
            places = namespaces_of(documents, Target.PROFILE, profile_id)
            acts += await self._modes.disarm(connection, profile_id, places, Cause.REVERT, by)
            await append(connection, *acts)
        await self._configuration.refresh()
        metrics.autonomy_changes.labels(Ending.UNDONE.value).inc(len(laid))
        return laid

    async def _end(
        self, connection: Connection, overlay: Overlay, verdict: Verdict, body: str
    ) -> Verdict | None:
        """All of a probation's end, in the caller's transaction, or nothing."""
        held = await self._configuration.hold(connection)
        profile_id = overlay.target_id
        now = namespaces_of(held.active.documents, Target.PROFILE, profile_id)
        namespaces = tuple(sorted({*overlay.namespaces, *now} - {"*"}))
        if overlay.overlay_id not in {one.overlay_id for one in held.overlays}:
            return None
        why = await self._guard.why_not_now(connection, namespaces)
        if why is None and verdict is Verdict.KEPT:
            why = await self._why_not_armed(connection, profile_id, now)
        if why is not None:
            skipped = await self._guard.skip(
                connection, Function.JUDGE, profile_id, namespaces, why
            )
            await append(connection, *skipped)
            return None
        acts = await self._pronounce(connection, overlay, verdict, body)
        if acts and verdict is not Verdict.KEPT:
            by = self._by(f"probation: {verdict}")
            acts += await self._without(connection, held, [overlay], _ENDINGS[verdict], by)
            acts += await self._modes.disarm(connection, profile_id, namespaces, _CAUSES[verdict])
        await append(connection, *acts)
        return verdict if acts else None

    async def _why_held(self, overlay: Overlay, verdict: Verdict) -> Why | None:
        """Why a probation would not be ended, as far as one sees unlocked."""
        profile_id, documents = overlay.target_id, self._configuration.active.documents
        async with self._database.connection() as connection:
            known = await fences(connection, overlay.namespaces)
            if any(row["is_halted"] for row in known.values()):
                return self._guard.switches.why_off or Why.HALTED
            if verdict is not Verdict.KEPT:
                return self._guard.switches.why_off
            now = namespaces_of(documents, Target.PROFILE, profile_id)
            why = await self._why_not_armed(connection, profile_id, now)
            return self._guard.switches.why_off or why

    async def _why_not_armed(
        self, connection: Connection, profile_id: str, namespaces: tuple[str, ...]
    ) -> Why | None:
        mode = await self._modes.of(connection, profile_id, namespaces)
        return None if mode is Mode.ARMED else Why.NOT_ARMED

    async def _pronounce(
        self, connection: Connection, overlay: Overlay, verdict: Verdict, body: str
    ) -> list[Act]:
        by = self._guard.orbit
        row = {"overlay_id": overlay.overlay_id, "verdict": verdict.value, "body": body}
        cursor = await connection.execute(SQL.add_verdict, {**row, "node_id": by.node_id})
        if await cursor.fetchone() is None:
            return []
        told = {"overlayId": overlay.overlay_id, "verdict": verdict.value}
        kind, profile_id = EventType.AUTONOMY_JUDGED, overlay.target_id
        await emit(connection, *(Event(one, kind, told, profile_id) for one in overlay.namespaces))
        detail = {"profileId": profile_id, "verdict": verdict.value}
        return [
            Act(one, "autonomy.judged", by.actor, None, overlay.overlay_id, detail)
            for one in overlay.namespaces
        ]

    async def _without(
        self,
        connection: Connection,
        held: Force,
        overlays: list[Overlay],
        ending: Ending,
        by: By,
    ) -> list[Act]:
        """Ends overlays and puts what is left into force."""
        gone = {one.overlay_id for one in overlays}
        rest = [one for one in held.overlays if one.overlay_id not in gone]
        acts = await end(connection, overlays, ending, by)
        return [*await self._configuration.adjust(connection, held, rest, by), *acts]

    async def _weighed(
        self, row: Mapping[str, Any], most_batches: int | None = None
    ) -> tuple[Verdict, dict[str, Any]]:
        """What comes of a change with all events that there are, and from what, by namespace.

        A node that has no trials of it begins anew.
        """
        trials = self._trials.get(row["overlay_id"])
        if trials is None:
            trials = trials_of(row["target_id"], json.loads(row["trial"]))
            self._trials[row["overlay_id"]] = trials
        for namespace, trial in trials.items():
            await self._move_on(namespace, trial, most_batches)
        async with self._weighing:  # a verdict and its evidence as of the same events
            return verdict_of(trials), {name: one.told() for name, one in trials.items()}

    async def _move_on(self, namespace: str, trial: Trial, most_batches: int | None) -> None:
        """Takes a namespace's events in; whoever asks meanwhile has their turn after each batch."""
        is_last, batches = trial.is_breached, 0
        while not is_last and batches != most_batches:
            batches += 1
            async with self._weighing:
                async with self._database.connection() as connection:
                    found = await self._keeper.source.read(
                        connection, namespace, trial.position, BATCH_EVENTS
                    )
                await asyncio.to_thread(trial.take, found.events, found.last_position)
                is_last = found.is_last or trial.is_breached

    def _by(self, reason: str) -> By:
        orbit = self._guard.orbit
        return By(orbit.actor, orbit.actor_id, orbit.node_id, reason)


async def _tried(
    work: Callable[[Mapping[str, Any]], Awaitable[Result]], row: Mapping[str, Any]
) -> Result | None:
    """What the work gives; what goes wrong with one row keeps no other from its own."""
    try:
        return await work(row)
    except TRANSIENT:
        raise
    except Exception:
        log.exception("autonomy_failed", row={name: row[name] for name in _NAMES if name in row})
        return None


async def _of_today(connection: Connection, profile_id: str) -> list[tuple[Move, ...]]:
    cursor = await connection.execute(SQL.changes_of_day, {"profile_id": profile_id})
    return [moves_of(json.loads(row["patch"])) for row in await cursor.fetchall()]
