"""Controlled autonomy as people read it: what it may do, what it did, would have done, and did not.

Of a profile that runs elsewhere too, who asks sees the namespaces that there are for them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

from orbit.autonomy.guard import Switches
from orbit.autonomy.modes import in_force
from orbit.database.pool import Database
from orbit.database.queries import array, load
from orbit.errors import NotFound
from orbit.profiles.model import Documents
from orbit.profiles.overlays import Target, moves_of, namespaces_of
from orbit.reading.configured import Adjusted, visible
from orbit.reading.view import Row, View, is_within, narrowed, read_all

SQL = load("autonomy")
_SHOWN = 50


@dataclass(frozen=True, slots=True)
class SwitchesView(View):
    """The settings of the node that was asked."""

    enabled: bool
    mutation_allowed: bool
    paused: bool


@dataclass(frozen=True, slots=True)
class ChangeView(View):
    """A change that autonomy made; without `verdict` and `ending` it is on probation.

    `evidence` has, by namespace, how it stands or stood; null in lists of one on probation.
    """

    overlay_id: str
    proposal_id: str
    changes: list[Adjusted]
    created_at: datetime
    expires_at: datetime
    verdict: str | None
    judged_at: datetime | None
    ending: str | None
    ended_at: datetime | None
    ended_by: str | None
    evidence: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class AgreementView(View):
    """Proposals that were shadowed, how many a person decided, and how many of them alike."""

    recorded: int
    decided: int
    agreed: int


@dataclass(frozen=True, slots=True)
class SkipView(View):
    """A function that did nothing, and why; the first of its day."""

    function: str
    why: str
    day: date
    proposal_id: str | None
    actor: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class ShadowView(View):
    """What autonomy would have done with a proposal, and what became of it."""

    namespace: str
    proposal_id: str
    would_apply: bool
    why: str | None
    state: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class AutonomyView(View):
    """What autonomy may do with a profile: `armed`, `shadow` or `disarmed`.

    `cause` says what that came of: `person`, `halt`, `rollback`, `revert`, `reach`; null where
    nobody ever said anything. `in_flight` is the change on probation.
    """

    profile_id: str
    namespaces: list[str]
    allow: list[dict[str, Any]]
    mode: str
    cause: str | None
    reason: str | None
    actor: str | None
    set_at: datetime | None
    in_flight: ChangeView | None
    shadowed: AgreementView


@dataclass(frozen=True, slots=True)
class AutonomyPage(View):
    """The switches, and every profile that lets anything move or of which a mode was said."""

    switches: SwitchesView
    items: list[AutonomyView]


@dataclass(frozen=True, slots=True)
class AutonomyDetail(View):
    """All of one profile: the newest 50 changes, skips and shadows."""

    switches: SwitchesView
    profile: AutonomyView
    changes: list[ChangeView]
    skips: list[SkipView]
    shadows: list[ShadowView]


async def autonomy(
    database: Database,
    documents: Documents,
    switches: Switches,
    within: Sequence[str] | None,
) -> AutonomyPage:
    """What autonomy may do, with the profiles that there are for who asks."""
    modes = {row["profile_id"]: row for row in await read_all(database, SQL.modes)}
    flights = {row["target_id"] for row in await _flights(database)}
    tallies = await _tallies(database, within)
    shown = [
        one
        for one in visible(documents, within).profiles
        if one.allowances or one.profile_id in modes
    ]
    names = {one.profile_id: _places(documents, one.profile_id) for one in shown}
    known = await _fences(database, names, modes)
    items = []
    for one in shown:
        name = one.profile_id
        changes = await _changes(database, name, within) if name in flights else []
        flight = next((c for c in changes if c.verdict is None and c.ending is None), None)
        mode = modes.get(name)
        items.append(_view(documents, name, mode, known, within, flight, tallies.get(name)))
    return AutonomyPage(switches_view(switches), items)


async def autonomy_of(
    database: Database,
    documents: Documents,
    switches: Switches,
    profile_id: str,
    within: Sequence[str] | None,
) -> AutonomyDetail:
    """All of one profile. Raises NotFound, also where it is not there for who asks."""
    if visible(documents, within).profile(profile_id) is None:
        raise NotFound(f"there is no profile {profile_id}")
    rows = await read_all(database, SQL.mode, {"profile_id": profile_id})
    modes = {row["profile_id"]: row for row in rows}
    known = await _fences(database, {profile_id: _places(documents, profile_id)}, modes)
    changes = await _changes(database, profile_id, within)
    flight = next((c for c in changes if c.verdict is None and c.ending is None), None)
    tally = (await _tallies(database, within)).get(profile_id)
    asked = {"profile_id": profile_id, "count": _SHOWN}
    skips = await read_all(database, SQL.skips, asked)
    shadows = await read_all(database, SQL.shadows, {**asked, "namespaces": narrowed(None, within)})
    mode = modes.get(profile_id)
    return AutonomyDetail(
        switches_view(switches),
        _view(documents, profile_id, mode, known, within, flight, tally),
        changes,
        [SkipView(**row) for row in skips],
        [ShadowView(**row) for row in shadows],
    )


def switches_view(switches: Switches) -> SwitchesView:
    """The switches, as they are shown."""
    return SwitchesView(switches.is_enabled, switches.may_mutate, switches.is_paused)


async def flight_of(database: Database, profile_id: str) -> Row | None:
    """The row of a profile's change on probation."""
    rows = await read_all(database, SQL.flights, {"profile_id": profile_id})
    return rows[0] if rows else None


def _places(documents: Documents, profile_id: str) -> tuple[str, ...]:
    return namespaces_of(documents, Target.PROFILE, profile_id)


async def _flights(database: Database) -> list[dict[str, Any]]:
    return await read_all(database, SQL.flights, {"profile_id": None})


async def _fences(
    database: Database, places: Mapping[str, Sequence[str]], modes: Mapping[str, Row]
) -> dict[str, Row]:
    names = {one for found in places.values() for one in found}
    names |= {one for row in modes.values() for one in row["namespaces"]}
    rows = await read_all(database, SQL.fences, {"namespaces": array(sorted(names))})
    return {row["namespace"]: row for row in rows}


async def _tallies(database: Database, within: Sequence[str] | None) -> dict[str, AgreementView]:
    rows = await read_all(database, SQL.agreements, {"namespaces": narrowed(None, within)})
    return {row.pop("profile_id"): AgreementView(**row) for row in rows}


async def _changes(
    database: Database, profile_id: str, within: Sequence[str] | None
) -> list[ChangeView]:
    rows = await read_all(database, SQL.changes, {"profile_id": profile_id, "count": _SHOWN})
    return [_change(row, within) for row in rows]


def _change(row: Row, within: Sequence[str] | None) -> ChangeView:
    evidence = None if row["evidence"] is None else json.loads(row["evidence"])
    names = ChangeView.__dataclass_fields__
    given = {name: value for name, value in row.items() if name in names}
    moves = moves_of(json.loads(row["patch"]))
    given["changes"] = [Adjusted(one.path, one.old, one.new) for one in moves]
    given["evidence"] = evidence and {
        name: one for name, one in evidence.items() if is_within(name, within)
    }
    return ChangeView(**given)


def _view(
    documents: Documents,
    profile_id: str,
    row: Row | None,
    known: Mapping[str, Row],
    within: Sequence[str] | None,
    flight: ChangeView | None,
    tally: AgreementView | None,
) -> AutonomyView:
    places = _places(documents, profile_id)
    mode, cause = in_force(row, places, known)
    is_as_said = row is not None and cause is None
    profile = documents.profile(profile_id)
    return AutonomyView(
        profile_id=profile_id,
        namespaces=[one for one in places if one != "*" and is_within(one, within)],
        allow=[] if profile is None else [dict(one) for one in profile.autonomy.get("allow", ())],
        mode=mode.value,
        cause=row["cause"] if is_as_said and row is not None else cause and cause.value,
        reason=row["reason"] if is_as_said and row is not None else None,
        actor=row["actor"] if is_as_said and row is not None else None,
        set_at=row["created_at"] if is_as_said and row is not None else None,
        in_flight=flight,
        shadowed=tally or AgreementView(0, 0, 0),
    )
