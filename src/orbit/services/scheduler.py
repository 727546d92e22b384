"""The scheduler: decides every slot of every schedule, exactly once among all nodes.

Design note. A schedule's row says up to when its slots are decided. Whoever locks it decides the
next ones by the database's clock: the slot's row, the cycle it starts and the schedule's new
place commit together. So two nodes cannot fire a slot twice, a crash cannot lose one, and a
node's own clock plays no part. A backlog is decided page by page. The rows are leases: once a
minute each node looks whether they are still there and as its own settings want them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from orbit import metrics
from orbit.clock import Clock, new_id
from orbit.cron import in_zone
from orbit.database.pool import Connection, Database
from orbit.database.queries import array, load
from orbit.errors import NamespaceHalted
from orbit.execution.initiation import Accepted, CycleRequest, RevisionReplaced, accept
from orbit.profiles.bridge import RAW_NAMESPACE, cycle_request, why_not_runnable
from orbit.profiles.model import RunProfile
from orbit.profiles.revision import Configuration, Revision
from orbit.profiles.schedule import (
    Misfire,
    Overlap,
    Schedule,
    SlotDecision,
    SlotOutcome,
    Verdict,
    decide,
    slots_between,
)
from orbit.services.base import Service
from orbit.services.schedule_rows import Key, definition_of, due_at, jitter_of, place_of
from orbit.settings import Settings

SQL = load("slots")
HALT_SQL = load("halt")
_SCHEDULES_PER_PASS = 100
_SLOTS_PER_PAGE = 200
_MILLISECOND = timedelta(milliseconds=1)
_SYNC_INTERVAL = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class Planned:
    """A schedule with the run profile it is for; None is the raw phase 1 cycle."""

    schedule: Schedule
    run_profile: RunProfile | None


@dataclass(slots=True)
class _Page:
    """The slots of one schedule that a pass decides, and what became of each."""

    key: Key
    planned: Planned
    decisions: list[SlotDecision]
    decided_until: datetime
    late_before: datetime
    rows: list[tuple[SlotDecision, SlotOutcome, str, CycleRequest | None]] = field(
        default_factory=list
    )


def planned_schedules(revision: Revision, settings: Settings) -> dict[Key, Planned]:
    """Every schedule of a configuration, by namespace and run profile ('' for raw cycles)."""
    planned: dict[Key, Planned] = {}
    for run_profile in revision.documents.run_profiles:
        schedule = _schedule(run_profile, settings)
        if schedule.expressions:
            key = run_profile.namespace, run_profile.run_profile_id
            planned[key] = Planned(schedule, run_profile)
    if settings.cron_schedule:
        raw = Schedule((settings.cron_schedule,), settings.timezone)
        planned[RAW_NAMESPACE, ""] = Planned(raw, None)
    return planned


def _schedule(run_profile: RunProfile, settings: Settings) -> Schedule:
    policy = run_profile.execution_policy
    common = settings.run_profile_cron_schedule
    expressions = [policy.schedule] if policy.schedule else []
    if common:
        expressions.append(in_zone(common, settings.timezone))
    limit = policy.catch_up_limit
    return Schedule(
        tuple(expressions),
        policy.timezone,
        Misfire(policy.misfire),
        settings.catch_up_limit if limit is None else limit,
        Overlap(policy.overlap),
        policy.jitter_seconds,
    )


class Scheduler(Service):
    """Decides due slots and starts their cycles."""

    name = "scheduler"

    def __init__(
        self,
        database: Database,
        configuration: Configuration,
        clock: Clock,
        settings: Settings,
        node_id: str,
        on_fired: Callable[[], None],
    ) -> None:
        super().__init__(database)
        self._on_fired = on_fired
        self._configuration, self._clock = configuration, clock
        self._settings, self._node_id = settings, node_id
        self._planned: dict[Key, Planned] = {}
        self._definitions: dict[Key, str] = {}
        self._places: dict[Key, datetime] = {}  # up to when each was decided at the last sync
        self._synced: str | None = None
        self._synced_at = datetime.min.replace(tzinfo=UTC)
        self._last_id_at = clock.now()

    async def run_once(self) -> float:
        """Decides what is due; rests until the next slot, or for one poll."""
        row = await self._database.fetch_one(SQL.next_due)
        assert row is not None
        poll, due_in = self._settings.poll_seconds, row["due_in_seconds"]
        now = row["now"].astimezone(UTC)
        if row["revision"] != self._synced:
            await self._configuration.refresh()
            await self._sync(now)
            return 0 if row["revision"] == self._synced else poll
        is_recent = timedelta(0) <= now - self._synced_at < _SYNC_INTERVAL
        if not is_recent or (due_in is None and self._planned):
            await self._sync(now)
        if due_in is None:
            return poll
        if due_in > 0:
            return min(poll, float(due_in))
        return 0 if await self._decide_due() else poll

    async def _sync(self, now: datetime) -> None:
        """Makes the schedules in the database those of the configuration in force.

        What is new to this node, by its start or by a revision, begins with its next slot. What
        it knows keeps its place: a row that is gone comes back where it was, and one that a node
        with other settings wrote is taken over as far as it is decided. No slot is passed over.
        """
        active = self._configuration.active
        is_new = active.revision != self._synced
        planned, definitions = self._planned, self._definitions
        if is_new:
            planned = planned_schedules(active, self._settings)
            definitions = {key: definition_of(one.schedule) for key, one in planned.items()}
        known = {
            key: at
            for key, at in self._places.items()
            if self._definitions[key] == definitions.get(key)
        }
        rows = await self._database.fetch_all(SQL.schedules)
        stored = {(row["namespace"], row["run_profile_id"]): row for row in rows}
        places = {
            key: place_of(stored.get(key), definition, known.get(key), now)
            for key, definition in definitions.items()
        }
        is_amiss = self._is_amiss(known, definitions, stored)
        if is_new or is_amiss:
            await self._database.execute(
                SQL.sync_schedules, _rows(planned, definitions, places, is_new=is_new)
            )
            self._log.info("schedules_synced", count=len(planned), revision=active.revision[:12])
        self._planned, self._definitions, self._places = planned, definitions, places
        self._synced, self._synced_at = active.revision, now

    def _is_amiss(
        self,
        known: Iterable[Key],
        definitions: Mapping[Key, str],
        stored: Mapping[Key, Mapping[str, Any]],
    ) -> bool:
        """Whether rows that this node knew are gone or another's, or some belong to nobody."""
        lost = [key for key in known if key not in stored]
        foreign = [
            key for key in known if key in stored and stored[key]["definition"] != definitions[key]
        ]
        for event, keys in (("schedule_lost", lost), ("schedule_foreign", foreign)):
            if keys:
                first = {"namespace": keys[0][0], "run_profile_id": keys[0][1]}
                self._log.warning(event, count=len(keys), **first)
        is_forsaken = any(
            row["is_overdue"] for key, row in stored.items() if key not in definitions
        )
        return bool(lost or foreign or is_forsaken)

    async def _decide_due(self) -> int:
        """One transaction over a number of due schedules; how many there were."""
        try:
            async with self._database.transaction() as connection:
                pages = await self._decide(connection)
        except RevisionReplaced:
            await self._configuration.refresh()
            return 1
        except NamespaceHalted:  # just now: the next pass sees it
            return 1
        fired = sum(request is not None for page in pages for *_, request in page.rows)
        for _, outcome, *_ in (row for page in pages for row in page.rows):
            metrics.slots_decided.labels(outcome.value).inc()
        metrics.cycles_accepted.labels("schedule").inc(fired)
        if fired:
            self._on_fired()
        if pages:
            self._log.info("slots_decided", schedules=len(pages), fired=fired)
        return len(pages)

    async def _decide(self, connection: Connection) -> list[_Page]:
        cursor = await connection.execute(SQL.claim_schedules, {"limit": _SCHEDULES_PER_PASS})
        rows = await cursor.fetchall()
        pages = [
            self._page((row["namespace"], row["run_profile_id"]), planned, row)
            for row in rows
            if (planned := self._ours(row)) is not None
        ]
        if pages:
            busy = await self._busy(connection, pages)
            halted = await self._halted(connection, pages)
            for page in pages:
                self._judge(page, busy.get(page.key), halted.get(page.key[0], ()))
            await self._write(connection, pages)
        return pages

    def _ours(self, row: Mapping[str, str]) -> Planned | None:
        """The schedule as configured; None if another definition is stored, until the next sync."""
        key = row["namespace"], row["run_profile_id"]
        return self._planned[key] if self._definitions.get(key) == row["definition"] else None

    def _page(self, key: Key, planned: Planned, row: Mapping[str, datetime]) -> _Page:
        """The slots that are due, the oldest first, up to a bound."""
        now, schedule = row["now"].astimezone(UTC), planned.schedule
        found = slots_between(schedule, row["decided_until"], now, _SLOTS_PER_PAGE + 1)
        due = []
        for slot_at in found[:_SLOTS_PER_PAGE]:
            if slot_at + jitter_of(key, slot_at, schedule) > now:
                break
            due.append(slot_at)
        grace = timedelta(seconds=self._settings.misfire_grace_seconds)
        decisions = decide(schedule, due, now, grace, more=len(found) > len(due))
        until = due[-1] if due else row["decided_until"]
        late_before = now - grace - timedelta(seconds=schedule.jitter_seconds)
        return _Page(key, planned, decisions, until, late_before)

    async def _busy(self, connection: Connection, pages: Sequence[_Page]) -> dict[Key, str]:
        cursor = await connection.execute(
            SQL.busy_run_profiles,
            {
                "namespace": array(page.key[0] for page in pages),
                "run_profile_id": array(page.key[1] for page in pages),
            },
        )
        rows = await cursor.fetchall()
        return {(row["namespace"], row["run_profile_id"]): row["cycle_id"] for row in rows}

    async def _halted(
        self, connection: Connection, pages: Sequence[_Page]
    ) -> dict[str, list[Mapping[str, Any]]]:
        """The halts that the pages' slots may fall into, by namespace."""
        slots = [decision.slot_at for page in pages for decision in page.decisions]
        if not slots:
            return {}
        namespaces = sorted({page.key[0] for page in pages})
        cursor = await connection.execute(
            HALT_SQL.halts_since, {"namespaces": namespaces, "since": min(slots)}
        )
        found: dict[str, list[Mapping[str, Any]]] = {}
        for row in await cursor.fetchall():
            found.setdefault(row["namespace"], []).append(row)
        return found

    def _judge(self, page: _Page, active: str | None, halts: Collection[Mapping[str, Any]]) -> None:
        """What becomes of each slot: a halt, the misfire policy's verdict, what may stop a start.

        A slot that passed while its namespace was halted is never caught up on.
        """
        for decision in page.decisions:
            if (halt := _halt_of(decision.slot_at, halts)) is not None:
                page.rows.append((decision, SlotOutcome.HALTED, halt, None))
            elif decision.outcome is not Verdict.FIRE:
                outcome = SlotOutcome(decision.outcome.value)
                page.rows.append((decision, outcome, decision.reason, None))
            elif (stopped := self._stopped(page, decision, active)) is not None:
                page.rows.append((decision, *stopped, None))
            else:
                request = self._request(page, decision, active)
                page.rows.append((decision, SlotOutcome.FIRED, decision.reason, request))
                active = request.cycle_id

    def _stopped(
        self, page: _Page, decision: SlotDecision, active: str | None
    ) -> tuple[SlotOutcome, str] | None:
        if self._settings.global_pause:
            return SlotOutcome.PAUSED, "ORBIT_GLOBAL_PAUSE is set"
        if page.planned.run_profile is not None:
            documents = self._configuration.active.documents
            reason = why_not_runnable(documents, page.planned.run_profile)
            if reason is not None:
                return SlotOutcome.DISABLED, reason
        schedule = page.planned.schedule
        # What catches up would only ever overlap itself: it queues instead.
        is_catching_up = (
            schedule.misfire is Misfire.CATCH_UP and decision.slot_at < page.late_before
        )
        if active is not None and schedule.overlap is Overlap.SKIP and not is_catching_up:
            return SlotOutcome.OVERLAPPED, f"cycle {active} is still active"
        return None

    def _request(self, page: _Page, decision: SlotDecision, active: str | None) -> CycleRequest:
        is_waiting = active is not None and page.planned.schedule.overlap is not Overlap.ALLOW
        cycle_id = self._next_id()
        if page.planned.run_profile is None:
            request = CycleRequest(
                cycle_id=cycle_id,
                namespace=page.key[0],
                trigger="schedule",
                slot_at=decision.slot_at,
            )
        else:
            request = cycle_request(
                self._configuration.active,
                page.planned.run_profile,
                self._clock,
                "schedule",
                slot_at=decision.slot_at,
            )
        return replace(request, cycle_id=cycle_id, is_waiting=is_waiting)

    def _next_id(self) -> str:
        """An id above the last, since cycles that wait for each other begin in their ids' order."""
        self._last_id_at = max(self._clock.now(), self._last_id_at + _MILLISECOND)
        return new_id(self._last_id_at)

    async def _write(self, connection: Connection, pages: Sequence[_Page]) -> None:
        """Cycles, slots and the schedules' new place.

        Raises RevisionReplaced, before anything is kept, if the configuration has changed.
        """
        requests = [request for page in pages for *_, request in page.rows if request is not None]
        cycle_ids: dict[str, str] = {}
        answers = await accept(connection, self._node_id, requests) if requests else []
        for request, answer in zip(requests, answers, strict=True):
            if not isinstance(answer, Accepted):
                raise answer
            cycle_ids[request.cycle_id] = answer.cycle_id
        await connection.execute(SQL.insert_slots, self._slot_rows(pages, cycle_ids))
        await connection.execute(SQL.move_schedules, self._place_rows(pages))

    def _slot_rows(self, pages: Sequence[_Page], cycle_ids: Mapping[str, str]) -> dict[str, str]:
        rows = [(page.key, *row) for page in pages for row in page.rows]
        return {
            "node_id": self._node_id,
            "namespace": array(key[0] for key, *_ in rows),
            "run_profile_id": array(key[1] for key, *_ in rows),
            "slot_at": array(decision.slot_at for _, decision, *_ in rows),
            "outcome": array(outcome.value for _, _, outcome, *_ in rows),
            "reason": array(reason for *_, reason, _ in rows),
            "cycle_id": array(request and cycle_ids[request.cycle_id] for *_, request in rows),
        }

    def _place_rows(self, pages: Sequence[_Page]) -> dict[str, str]:
        return {
            "namespace": array(page.key[0] for page in pages),
            "run_profile_id": array(page.key[1] for page in pages),
            "decided_until": array(page.decided_until for page in pages),
            "due_at": array(
                due_at(page.key, page.planned.schedule, page.decided_until) for page in pages
            ),
        }


def _halt_of(slot_at: datetime, halts: Iterable[Mapping[str, Any]]) -> str | None:
    """Why a slot does not fire: its namespace is halted now, or was when the slot passed."""
    for halt in halts:
        is_within = halt["halted_at"] <= slot_at and (
            halt["ended_at"] is None or slot_at < halt["ended_at"]
        )
        if halt["is_in_force"] or is_within:
            verb = "is" if halt["is_in_force"] else "was"
            return f"namespace {halt['namespace']} {verb} halted (epoch {halt['epoch']})"
    return None


def _rows(
    planned: Mapping[Key, Planned],
    definitions: Mapping[Key, str],
    places: Mapping[Key, datetime],
    *,
    is_new: bool,
) -> dict[str, Any]:
    return {
        "is_new": is_new,
        "namespace": array(namespace for namespace, _ in planned),
        "run_profile_id": array(run_profile_id for _, run_profile_id in planned),
        "definition": array(definitions[key] for key in planned),
        "decided_until": array(places[key] for key in planned),
        "due_at": array(due_at(key, one.schedule, places[key]) for key, one in planned.items()),
    }
