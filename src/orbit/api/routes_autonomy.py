"""Controlled autonomy: what it may do with profiles, armed and disarmed, and what it did.

What a function is asked for while the switches are off is answered as `skipped`, with the reason;
it has no effect but that this is written down, the first time of a day.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request

from orbit.api.access import actor_of, require
from orbit.api.bodies import Bodies, Body, Reason, body_schema
from orbit.app import Node
from orbit.autonomy.guard import Switches
from orbit.autonomy.modes import Mode
from orbit.errors import NotFound
from orbit.profiles.adjustments import By
from orbit.reading.autonomy import (
    AutonomyDetail,
    AutonomyPage,
    autonomy,
    autonomy_of,
    flight_of,
)
from orbit.reading.view import View, is_within

ProfileId = Annotated[str, Path(alias="profileId")]


class ArmBody(Body):
    """Why autonomy may apply what is approved of a profile."""

    reason: Reason


class ModeBody(Body):
    """Why, if there is something to say."""

    reason: Reason | None = None


@dataclass(frozen=True, slots=True)
class ModeView(View):
    """The mode in force. `outcome` is `set`, `unchanged`, or `skipped` with `why` and `detail`."""

    profile_id: str
    mode: str
    outcome: str
    why: str | None
    detail: str | None


@dataclass(frozen=True, slots=True)
class TakenBack(View):
    """The changes that were taken back; the profile is disarmed."""

    profile_id: str
    overlay_ids: list[str]


def autonomy_router(node: Node, bodies: Bodies) -> APIRouter:
    """The routes, for one node."""
    router = APIRouter(tags=["autonomy"], prefix="/autonomy")

    @router.get("", dependencies=[Depends(require("viewer"))], summary="What autonomy may do")
    async def listed(request: Request) -> AutonomyPage:
        """The node's switches, and the profiles that let anything move."""
        await node.configuration.refresh()
        documents, switches = node.configuration.active.documents, Switches.of(node.settings)
        return await autonomy(node.database, documents, switches, actor_of(request).within)

    @router.get(
        "/{profileId}",
        dependencies=[Depends(require("viewer"))],
        summary="What autonomy may do with a profile, did, would have done, and did not",
    )
    async def shown(request: Request, profile_id: ProfileId) -> AutonomyDetail:
        """Of the change on probation also how it stands."""
        return await _detail(node, _known(profile_id), actor_of(request).within)

    _add_modes(router, node, bodies)
    return router


def _add_modes(router: APIRouter, node: Node, bodies: Bodies) -> None:
    read_arm = Depends(bodies.of(ArmBody))
    read_mode = Depends(bodies.of(ModeBody))
    optional: dict[str, Any] = {
        "dependencies": [Depends(require("operator"))],
        "openapi_extra": body_schema(ModeBody, is_required=False),
    }

    @router.post(
        "/{profileId}/arm",
        dependencies=[Depends(require("admin"))],
        summary="Let autonomy apply what is approved of a profile",
        openapi_extra=body_schema(ArmBody, is_required=True),
    )
    async def armed(request: Request, profile_id: ProfileId, body: ArmBody = read_arm) -> ModeView:
        """Until a rollback, a revert, a halt of a namespace of it, or a person disarms it."""
        return await _set(node, request, profile_id, Mode.ARMED, body.reason)

    @router.post(
        "/{profileId}/shadow",
        summary="Have autonomy write down what it would do with a profile",
        **optional,
    )
    async def shadowed(
        request: Request, profile_id: ProfileId, body: ModeBody = read_mode
    ) -> ModeView:
        """It applies nothing."""
        return await _set(node, request, profile_id, Mode.SHADOW, body.reason)

    @router.post(
        "/{profileId}/disarm", summary="Let autonomy do nothing with a profile", **optional
    )
    async def disarmed(
        request: Request, profile_id: ProfileId, body: ModeBody = read_mode
    ) -> ModeView:
        """Whatever the switches say. A change on probation is still rolled back or reverted."""
        return await _set(node, request, profile_id, Mode.DISARMED, body.reason)

    @router.post(
        "/{profileId}/revert",
        summary="Take back all that autonomy changed of a profile",
        **optional,
    )
    async def reverted(
        request: Request, profile_id: ProfileId, body: ModeBody = read_mode
    ) -> TakenBack:
        """At once, for new cycles, whatever the switches say."""
        actor = actor_of(request)
        by = By(actor.name, actor.id, node.node_id, body.reason)
        taken = await node.changes.take_back(_known(profile_id), actor, by)
        return TakenBack(profile_id, [one.overlay_id for one in taken])


async def _set(
    node: Node, request: Request, profile_id: str, mode: Mode, reason: str | None
) -> ModeView:
    actor = actor_of(request)
    by = By(actor.name, actor.id, node.node_id, reason)
    found = await node.modes.set(_known(profile_id), mode, actor, by)
    outcome = "set" if found.is_changed else "unchanged"
    if found.why is not None:
        return ModeView(profile_id, found.mode.value, "skipped", found.why.value, found.why.words)
    return ModeView(profile_id, found.mode.value, outcome, None, None)


async def _detail(node: Node, profile_id: str, within: list[str] | None) -> AutonomyDetail:
    await node.configuration.refresh()
    documents, switches = node.configuration.active.documents, Switches.of(node.settings)
    detail = await autonomy_of(node.database, documents, switches, profile_id, within)
    flight = await flight_of(node.database, profile_id)
    if flight is None or detail.profile.in_flight is None:
        return detail
    evidence = {
        name: one
        for name, one in (await node.changes.weigh(flight)).items()
        if is_within(name, within)
    }
    change = replace(detail.profile.in_flight, evidence=evidence)
    return replace(detail, profile=replace(detail.profile, in_flight=change))


def _known(profile_id: str) -> str:
    if "\x00" in profile_id:
        raise NotFound("there is no such profile")
    return profile_id
