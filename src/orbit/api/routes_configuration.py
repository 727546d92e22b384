"""Profiles, run profiles, their schedules' slots, and the configuration that says what they are."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import Field

from orbit.api.access import actor_of, require, sees_payloads
from orbit.api.bodies import Bodies, Body, Key, PageFilter, Reason, body_schema, idempotency_key
from orbit.api.routes_cycles import answered, trigger_kind
from orbit.app import Node
from orbit.errors import NotFound
from orbit.profiles.model import State
from orbit.profiles.orchestration import TriggerAnswer
from orbit.profiles.overlays import Target
from orbit.reading.configured import (
    Activation,
    OverlayView,
    ProfileView,
    RunProfileView,
    last_activation,
    overlays,
    profiles,
    run_profiles,
)
from orbit.reading.slots import Slot, slots
from orbit.reading.view import Page, View

ProfileId = Annotated[str, Path(alias="profileId")]
RunProfileId = Annotated[str, Path(alias="runProfileId")]


class RunProfilesBody(Body):
    """Which run profiles are started; without names every one that is enabled."""

    run_profile_ids: list[Key] | None = Field(None, max_length=10_000)


class ValidateBody(Body):
    """Whether overlays that the files do not fit may be dropped."""

    drop_overlays: bool = False


class ReloadBody(ValidateBody):
    """Why other files are put into force, and whether overlays that do not fit may be dropped."""

    reason: Reason | None = None


class SwitchBody(Body):
    """Why something is turned off or on."""

    reason: Reason | None = None


class SlotFilter(PageFilter):
    """Which slots are listed."""

    namespace: Key | None = None
    run_profile_id: Key | None = None
    outcome: (
        Literal["fired", "missed", "coalesced", "paused", "halted", "overlapped", "disabled"] | None
    ) = None


@dataclass(frozen=True, slots=True)
class TriggeredRunProfile(View):
    """What became of one run profile: `started` with its cycle, or `skipped` with the reason."""

    run_profile_id: str
    namespace: str | None
    state: str
    cycle_run_id: str | None
    is_new: bool
    reason: str | None


@dataclass(frozen=True, slots=True)
class Valid(View):
    """The node's files are valid; the revision that they would be."""

    valid: bool
    revision: str


@dataclass(frozen=True, slots=True)
class Reloaded(View):
    """The revision in force, and whether it is another than before."""

    revision: str
    is_changed: bool


@dataclass(frozen=True, slots=True)
class SwitchView(View):
    """The state in force, what the file says, and whether anything was changed."""

    id: str
    state: str
    declared_state: str
    is_changed: bool
    revision: str


@dataclass(frozen=True, slots=True)
class ConfigurationView(View):
    """What is in force, and the revision of this node's files as they were last read.

    `declared_revision` is that of the files in force, without the overlays on them.
    """

    revision: str
    declared_revision: str
    activated_at: datetime | None
    reason: str | None
    files_revision: str | None
    is_in_step: bool
    overlays: list[OverlayView]


def configuration_router(node: Node, bodies: Bodies) -> APIRouter:
    """The routes, for one node."""
    router = APIRouter(tags=["configuration"])
    read_body = Depends(bodies.of(RunProfilesBody))

    @router.get(
        "/profiles",
        dependencies=[Depends(require("viewer"))],
        summary="Profiles as they are in force",
    )
    async def listed_profiles(request: Request) -> Page[ProfileView]:
        """Who is bound to namespaces sees those that are used there."""
        await node.configuration.refresh()
        actor = actor_of(request)
        found = profiles(node.configuration.force, actor.within, is_whole=sees_payloads(actor))
        return Page(found)

    @router.get(
        "/run-profiles",
        dependencies=[Depends(require("viewer"))],
        summary="Run profiles as they are in force, and whether they run",
    )
    async def listed_run_profiles(request: Request) -> Page[RunProfileView]:
        await node.configuration.refresh()
        actor, force = actor_of(request), node.configuration.force
        is_whole = sees_payloads(actor)
        return Page(await run_profiles(node.database, force, actor.within, is_whole=is_whole))

    @router.post(
        "/run-profiles/trigger",
        dependencies=[Depends(require("operator"))],
        status_code=202,
        summary="Start run profiles once",
        openapi_extra=body_schema(RunProfilesBody, is_required=False),
    )
    async def trigger(
        request: Request, body: RunProfilesBody = read_body
    ) -> Page[TriggeredRunProfile]:
        """An answer for each; an unknown name is refused before anything starts."""
        answers = await answered(
            node.orchestration.trigger_run_profiles(
                body.run_profile_ids,
                idempotency_key=idempotency_key(request),
                trigger=trigger_kind(request),
                asked_by=actor_of(request).name,
                within=actor_of(request).within,
            )
        )
        return Page([_triggered(one) for one in answers])

    @router.get(
        "/slots",
        dependencies=[Depends(require("viewer"))],
        summary="Schedule slots, newest first",
    )
    async def listed_slots(request: Request, asked: Annotated[SlotFilter, Query()]) -> Page[Slot]:
        """One row for every slot of every schedule, also those that did not fire."""
        return await slots(node.database, **asked.model_dump(), within=actor_of(request).within)

    _add_switches(router, node, bodies)
    _add_configuration(router, node, bodies)
    return router


def _add_switches(router: APIRouter, node: Node, bodies: Bodies) -> None:
    read_switch = Depends(bodies.of(SwitchBody))
    given: dict[str, Any] = {
        "dependencies": [Depends(require("operator"))],
        "openapi_extra": body_schema(SwitchBody, is_required=False),
    }

    async def turned(
        request: Request, target: Target, target_id: str, state: State, body: SwitchBody
    ) -> SwitchView:
        if "\x00" in target_id:
            raise NotFound("there is no such profile")
        actor = actor_of(request)
        found = await node.switch.turn(target, target_id, state, actor, body.reason)
        return SwitchView(target_id, found.state, found.declared, found.is_changed, found.revision)

    @router.post("/profiles/{profileId}/disable", summary="Turn a profile off at once", **given)
    async def profile_disabled(
        request: Request, profile_id: ProfileId, body: SwitchBody = read_switch
    ) -> SwitchView:
        """For new cycles, by an overlay: neither its file nor a running cycle is changed."""
        return await turned(request, Target.PROFILE, profile_id, "disabled", body)

    @router.post("/profiles/{profileId}/enable", summary="Turn a profile on at once", **given)
    async def profile_enabled(
        request: Request, profile_id: ProfileId, body: SwitchBody = read_switch
    ) -> SwitchView:
        """For new cycles, whatever its file says."""
        return await turned(request, Target.PROFILE, profile_id, "enabled", body)

    @router.post(
        "/run-profiles/{runProfileId}/disable", summary="Turn a run profile off at once", **given
    )
    async def run_profile_disabled(
        request: Request, run_profile_id: RunProfileId, body: SwitchBody = read_switch
    ) -> SwitchView:
        """For new cycles, by an overlay: neither its file nor a running cycle is changed."""
        return await turned(request, Target.RUN_PROFILE, run_profile_id, "disabled", body)

    @router.post(
        "/run-profiles/{runProfileId}/enable", summary="Turn a run profile on at once", **given
    )
    async def run_profile_enabled(
        request: Request, run_profile_id: RunProfileId, body: SwitchBody = read_switch
    ) -> SwitchView:
        """For new cycles, whatever its file says; its profile must be enabled too."""
        return await turned(request, Target.RUN_PROFILE, run_profile_id, "enabled", body)


def _add_configuration(router: APIRouter, node: Node, bodies: Bodies) -> None:
    read_reload = Depends(bodies.of(ReloadBody))
    read_validate = Depends(bodies.of(ValidateBody))

    @router.get(
        "/config",
        dependencies=[Depends(require("viewer"))],
        summary="The configuration in force",
    )
    async def configuration(request: Request) -> ConfigurationView:
        """Overlays on what there is for who asks; the reason, if that is who is everywhere."""
        await node.configuration.refresh()
        found, actor = node.configuration, actor_of(request)
        activation = await last_activation(node.database) or Activation(None, None)
        return ConfigurationView(
            revision=found.active.revision,
            declared_revision=found.force.declared.revision,
            overlays=overlays(found.force, actor.within),
            activated_at=activation.activated_at,
            reason=activation.reason if actor.within is None else None,
            files_revision=found.proposed.revision if found.proposed else None,
            is_in_step=found.is_in_step,
        )

    @router.post(
        "/config/validate",
        dependencies=[Depends(require("admin", is_everywhere=True))],
        summary="Check this node's configuration files",
        openapi_extra=body_schema(ValidateBody, is_required=False),
    )
    async def validate(body: ValidateBody = read_validate) -> Valid:
        """422 with every problem at once where they cannot be used, 409 if overlays do not fit."""
        revision = await node.orchestration.validate(is_dropping=body.drop_overlays)
        return Valid(True, revision.revision)

    @router.post(
        "/config/reload",
        dependencies=[Depends(require("admin", is_everywhere=True))],
        summary="Put this node's configuration files into force",
        openapi_extra=body_schema(ReloadBody, is_required=False),
    )
    async def reload(request: Request, body: ReloadBody = read_reload) -> Reloaded:
        """409 with the active cycles named while any is active, or if overlays do not fit."""
        asker = actor_of(request).name
        revision, is_changed = await node.orchestration.reload(
            asker, body.reason, is_dropping=body.drop_overlays
        )
        return Reloaded(revision.revision, is_changed)


def _triggered(answer: TriggerAnswer) -> TriggeredRunProfile:
    return TriggeredRunProfile(
        run_profile_id=answer.run_profile_id,
        namespace=answer.namespace,
        state="skipped" if answer.cycle_id is None else "started",
        cycle_run_id=answer.cycle_id,
        is_new=answer.is_new,
        reason=answer.reason,
    )
