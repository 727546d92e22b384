"""Profiles and run profiles as configured, and what they come to: do they run, and if not, why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import UTC, datetime
from typing import Any, TypeVar

from orbit.database.pool import Database
from orbit.database.queries import array, load
from orbit.profiles.bridge import why_not_runnable
from orbit.profiles.model import Documents, Profile, RunProfile
from orbit.profiles.overlays import STATE, Move, Overlay, Target
from orbit.profiles.revision import Force
from orbit.reading.cycles import CycleSummary, summaries
from orbit.reading.receipts import safe_url
from orbit.reading.slots import Slot
from orbit.reading.view import View, camel_case, read_all

SQL = load("reading")
SLOTS_SQL = load("slots")
WITHHELD = "(withheld)"
_OF_PROFILE = ("style_vector", "asset_bindings", "execution_rules", "distribution_map")
_OF_RUN_PROFILE = ("asset_bundle",)


@dataclass(frozen=True, slots=True)
class Adjusted(View):
    """One place (a JSON Pointer), the value there without the overlay, and with it."""

    path: str
    before: Any
    value: Any


@dataclass(frozen=True, slots=True)
class OverlayView(View):
    """What lies over the files: by a person or by autonomy (`origin`), on a profile or run profile.

    `before` of its changes is what the file says, or an earlier overlay.
    """

    overlay_id: str
    target: str
    target_id: str
    origin: str
    changes: list[Adjusted]
    actor: str
    reason: str | None
    created_at: datetime | None


@dataclass(frozen=True, slots=True)
class ProfileView(View):
    """A profile as it is in force: as the file has it, with the overlays on it.

    To who may only look a text in its free objects is `(withheld)`: it may be a token, or say what
    is sent.
    """

    profile_id: str
    label: str
    state: str
    style_vector: dict[str, Any]
    asset_bindings: dict[str, Any]
    execution_rules: dict[str, Any]
    distribution_map: dict[str, Any]
    value_tags: dict[str, Any]
    autonomy: dict[str, Any]
    run_profile_ids: list[str]
    overlays: list[OverlayView]


@dataclass(frozen=True, slots=True)
class RunProfileView(View):
    """A run profile as it is in force, and whether it runs.

    `effective_state` is `disabled` also where its profile is; `reason` then says why.
    `last_cycle` is looked for among the newest 1,000 cycles of its namespace; `active_cycle` is the
    oldest that is active, one that does not wait if there is one. Steps' addresses have no query,
    and for who may only look steps no `options` (null), and a text in the free `asset_bundle` is
    `(withheld)`: they may hold secrets.
    """

    run_profile_id: str
    profile_id: str
    namespace: str
    state: str
    effective_state: str
    reason: str | None
    execution_policy: dict[str, Any]
    asset_bundle: dict[str, Any]
    distribution_targets: list[str]
    value_tags: dict[str, Any]
    overlays: list[OverlayView]
    next_due_at: datetime | None
    last_slot: Slot | None
    last_cycle: CycleSummary | None
    active_cycle: CycleSummary | None


Shown = TypeVar("Shown", ProfileView, RunProfileView)


def visible(documents: Documents, within: Sequence[str] | None) -> Documents:
    """What there is of a configuration for who asks: run profiles by namespace, and theirs."""
    if within is None:
        return documents
    shown = tuple(one for one in documents.run_profiles if one.namespace in within)
    used = {one.profile_id for one in shown}
    profiles = tuple(one for one in documents.profiles if one.profile_id in used)
    return Documents(profiles, shown)


def overlays(force: Force, within: Sequence[str] | None) -> list[OverlayView]:
    """The overlays on what there is for who asks."""
    shown = visible(force.active.documents, within)
    there = {(Target.PROFILE, one.profile_id) for one in shown.profiles}
    there |= {(Target.RUN_PROFILE, one.run_profile_id) for one in shown.run_profiles}
    return [_overlay(one) for one in force.overlays if (one.target, one.target_id) in there]


def profiles(force: Force, within: Sequence[str] | None, *, is_whole: bool) -> list[ProfileView]:
    """The profiles that there are for who asks; unless `is_whole`, without what may be a secret."""
    documents = visible(force.active.documents, within)
    found = [_profile(force, documents, profile) for profile in documents.profiles]
    return found if is_whole else [_without_texts(one, _OF_PROFILE) for one in found]


async def run_profiles(
    database: Database, force: Force, within: Sequence[str] | None, *, is_whole: bool
) -> list[RunProfileView]:
    """The run profiles that there are for who asks, with next slot, last slot and cycles.

    Unless `is_whole`, without what may be a secret.
    """
    documents = visible(force.active.documents, within)
    due = await _due(database, documents)
    slots = await _last_slots(database, documents)
    last = await database.fetch_all(SQL.recent_cycles_of_run_profiles, _keys(documents))
    recent = await summaries(database, last)
    cycles = {(one.namespace, one.run_profile_id): one for one in recent}
    found = await database.fetch_all(SLOTS_SQL.busy_run_profiles, _keys(documents))
    active = {(one.namespace, one.run_profile_id): one for one in await summaries(database, found)}
    views = []
    for one in documents.run_profiles:
        key = one.namespace, one.run_profile_id
        view = _run_profile(
            documents, one, due.get(key), slots.get(key), cycles.get(key), active.get(key)
        )
        policy = _without_secrets(view.execution_policy, has_options=is_whole)
        laid = _laid(force, Target.RUN_PROFILE, one.run_profile_id)
        reason = _with_overlay(force, one, view.reason)
        views.append(replace(view, execution_policy=policy, overlays=laid, reason=reason))
    return views if is_whole else [_without_texts(one, _OF_RUN_PROFILE) for one in views]


def _without_texts(view: Shown, names: Sequence[str]) -> Shown:
    return replace(view, **{name: _withheld(getattr(view, name)) for name in names})


def _withheld(value: Any) -> Any:
    """A JSON value with its shape, its numbers, and none of its texts."""
    if isinstance(value, str):
        return WITHHELD
    if isinstance(value, Mapping):
        return {name: _withheld(one) for name, one in value.items()}
    return [_withheld(one) for one in value] if isinstance(value, list | tuple) else value


def _without_secrets(policy: dict[str, Any], *, has_options: bool) -> dict[str, Any]:
    def shown(step: dict[str, Any]) -> dict[str, Any]:
        url = step.get("url")
        known = {**step, "url": safe_url(url)} if url else step
        return known if has_options else {**known, "options": None}

    initiation = policy["initiation"]
    return {
        **policy,
        "initiation": initiation and shown(initiation),
        "tiers": {name: list(map(shown, steps)) for name, steps in policy["tiers"].items()},
        "normalization": shown(policy["normalization"]),
    }


async def _due(database: Database, documents: Documents) -> dict[tuple[str, str], datetime | None]:
    """When the next slot of each is to be decided."""
    rows = await read_all(database, SQL.schedules_of_run_profiles, _keys(documents))
    return {(row["namespace"], row["run_profile_id"]): row["due_at"] for row in rows}


async def _last_slots(database: Database, documents: Documents) -> dict[tuple[str, str], Slot]:
    rows = await read_all(database, SQL.last_slots, _keys(documents))
    return {(row["namespace"], row["run_profile_id"]): Slot(**row) for row in rows}


def _keys(documents: Documents) -> dict[str, Any]:
    return {
        "namespace": array(one.namespace for one in documents.run_profiles),
        "run_profile_id": array(one.run_profile_id for one in documents.run_profiles),
    }


def _laid(force: Force, target: Target, target_id: str) -> list[OverlayView]:
    key = target, target_id
    return [_overlay(one) for one in force.overlays if (one.target, one.target_id) == key]


def _with_overlay(force: Force, run_profile: RunProfile, reason: str | None) -> str | None:
    """Why it does not run, with who turned it off where a person did."""
    if reason is None:
        return None
    for target, target_id in (
        (Target.RUN_PROFILE, run_profile.run_profile_id),
        (Target.PROFILE, run_profile.profile_id),
    ):
        for one in force.overlays:
            is_it = (one.target, one.target_id) == (target, target_id)
            if is_it and one.moves[0] == Move(STATE, "enabled", "disabled"):
                why = f": {one.reason}" if one.reason else ""
                return f"{reason} (by {one.actor}{why})"
    return reason


def _overlay(overlay: Overlay) -> OverlayView:
    return OverlayView(
        overlay.overlay_id,
        overlay.target.value,
        overlay.target_id,
        overlay.origin.value,
        [Adjusted(one.path, one.old, one.new) for one in overlay.moves],
        overlay.actor,
        overlay.reason,
        None if overlay.created_at is None else overlay.created_at.astimezone(UTC),
    )


def _profile(force: Force, documents: Documents, profile: Profile) -> ProfileView:
    return ProfileView(
        profile_id=profile.profile_id,
        label=profile.label,
        state=profile.state,
        style_vector=dict(profile.style_vector),
        asset_bindings=dict(profile.asset_bindings),
        execution_rules=dict(profile.execution_rules),
        distribution_map=dict(profile.distribution_map),
        value_tags=dict(profile.value_tags),
        autonomy=dict(profile.autonomy),
        overlays=_laid(force, Target.PROFILE, profile.profile_id),
        run_profile_ids=[
            one.run_profile_id
            for one in documents.run_profiles
            if one.profile_id == profile.profile_id
        ],
    )


def _run_profile(
    documents: Documents,
    run_profile: RunProfile,
    due_at: datetime | None,
    slot: Slot | None,
    cycle: CycleSummary | None,
    active: CycleSummary | None,
) -> RunProfileView:
    reason = why_not_runnable(documents, run_profile)
    policy = _wire(run_profile.execution_policy)
    assert isinstance(policy, dict)
    return RunProfileView(
        run_profile_id=run_profile.run_profile_id,
        profile_id=run_profile.profile_id,
        namespace=run_profile.namespace,
        state=run_profile.state,
        effective_state="enabled" if reason is None else "disabled",
        reason=reason,
        execution_policy=policy,
        asset_bundle=dict(run_profile.asset_bundle),
        distribution_targets=list(run_profile.distribution_targets),
        value_tags=dict(run_profile.value_tags),
        overlays=[],
        next_due_at=due_at if reason is None else None,
        last_slot=slot,
        last_cycle=cycle,
        active_cycle=active,
    )


def _wire(value: Any) -> Any:
    """A configuration object with its own keys in camelCase; free objects as they are."""
    if is_dataclass(value):
        return {camel_case(one.name): _wire(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple):
        return [_wire(item) for item in value]
    return value


@dataclass(frozen=True, slots=True)
class Activation(View):
    """When a configuration came into force, and why."""

    activated_at: datetime | None
    reason: str | None


async def last_activation(database: Database) -> Activation | None:
    """The activation of the configuration in force; None before the first."""
    rows = await read_all(database, SQL.last_activation)
    return Activation(rows[0]["activated_at"], rows[0]["reason"]) if rows else None
