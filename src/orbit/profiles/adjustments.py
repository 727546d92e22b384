"""Adjustments: overlays as facts, laid and taken away in the transaction of their activation.

The caller holds the configuration, and appends the acts that it gets back with its other ones, as
its last statement. Each namespace in which the overlay's target runs is told, and has its entry.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from orbit.audit.trail import Act
from orbit.canonical import canonical_json
from orbit.database.pool import Connection
from orbit.database.queries import array, load
from orbit.profiles.overlays import (
    Origin,
    Overlay,
    Target,
    inverse_of,
    json_patch,
    moves_of,
)
from orbit.telemetry.catalogue import EventType
from orbit.telemetry.emission import Event, emit

SQL = load("overlays")
ORBIT = "orbit"


class Ending(StrEnum):
    """How an overlay ends."""

    UNDONE = "undone"
    ADOPTED = "adopted"
    DROPPED = "dropped"
    ROLLED_BACK = "rolled_back"
    REVERTED = "reverted"


@dataclass(frozen=True, slots=True)
class By:
    """Who does it, on which node, and why."""

    actor: str
    actor_id: str
    node_id: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Probation:
    """Of a change by autonomy: its proposal, what it is held against, and for how many hours."""

    namespace: str
    proposal_id: str
    trial: str
    hours: int


async def in_force(connection: Connection) -> tuple[Overlay, ...]:
    """The overlays that have not ended, in the order in which they were laid."""
    rows = await (await connection.execute(SQL.in_force)).fetchall()
    return tuple(map(overlay_of, rows))


def overlay_of(row: Mapping[str, Any]) -> Overlay:
    """An overlay from its row."""
    return Overlay(
        row["overlay_id"],
        Target(row["target"]),
        row["target_id"],
        Origin(row["origin"]),
        moves_of(json.loads(row["patch"])),
        tuple(row["namespaces"]),
        row["actor"],
        row["reason"],
        row["created_at"],
    )


async def add(
    connection: Connection, overlay: Overlay, by: By, probation: Probation | None = None
) -> list[Act]:
    """Lays an overlay, its inverse with it; the acts to append."""
    patch = json_patch(overlay.moves)
    row = {
        "overlay_id": overlay.overlay_id,
        "target": overlay.target.value,
        "target_id": overlay.target_id,
        "origin": overlay.origin.value,
        "patch": canonical_json(patch).decode(),
        "inverse": canonical_json(json_patch(inverse_of(overlay.moves))).decode(),
        "namespaces": array(overlay.namespaces),
        "proposal_namespace": probation and probation.namespace,
        "proposal_id": probation and probation.proposal_id,
        "trial": probation and probation.trial,
        "hours": probation and probation.hours,
        "reason": by.reason,
        "actor": by.actor,
        "actor_id": by.actor_id,
        "node_id": by.node_id,
    }
    await connection.execute(SQL.add_overlay, row)
    told = {**_told(overlay), "origin": overlay.origin.value}
    await emit(connection, *_events(overlay, EventType.OVERLAY_ADDED, told))
    detail = {"target": overlay.target.value, "targetId": overlay.target_id, "patch": patch}
    if probation:
        detail["proposalId"] = probation.proposal_id
    return _acts(overlay, "overlay.added", by, detail)


async def end(
    connection: Connection, overlays: Sequence[Overlay], ending: Ending, by: By
) -> list[Act]:
    """Takes overlays away; the acts to append, none for those that had ended."""
    if not overlays:
        return []
    row = {
        "overlay_id": array(one.overlay_id for one in overlays),
        "ending": ending.value,
        "reason": by.reason,
        "actor": by.actor,
        "actor_id": by.actor_id,
        "node_id": by.node_id,
    }
    rows = await (await connection.execute(SQL.end_overlays, row)).fetchall()
    ended = {one["overlay_id"] for one in rows}
    acts: list[Act] = []
    for one in overlays:
        if one.overlay_id in ended:
            told = {**_told(one), "ending": ending.value}
            await emit(connection, *_events(one, EventType.OVERLAY_ENDED, told))
            acts += _acts(one, "overlay.ended", by, {"ending": ending.value})
    return acts


def _told(overlay: Overlay) -> dict[str, str]:
    return {
        "overlayId": overlay.overlay_id,
        "target": overlay.target.value,
        "targetId": overlay.target_id,
    }


def _events(overlay: Overlay, event_type: EventType, told: Mapping[str, Any]) -> list[Event]:
    profile_id = overlay.target_id if overlay.target is Target.PROFILE else None
    run_profile_id = overlay.target_id if overlay.target is Target.RUN_PROFILE else None
    return [Event(one, event_type, told, profile_id, run_profile_id) for one in overlay.namespaces]


def _acts(overlay: Overlay, action: str, by: By, detail: Mapping[str, Any]) -> list[Act]:
    return [
        Act(one, action, by.actor, by.reason, overlay.overlay_id, detail)
        for one in overlay.namespaces
    ]
