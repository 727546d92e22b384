"""Profiles, run profiles, their schedules' slots, and the configuration that says what they are."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request
from pydantic import Field

from orbit.api.access import actor_of, require, sees_payloads
from orbit.api.bodies import Bodies, Body, Key, PageFilter, Reason, body_schema, idempotency_key
from orbit.api.routes_cycles import answered, trigger_kind
from orbit.app import Node
from orbit.profiles.orchestration import TriggerAnswer
from orbit.profiles.revision import revision_of
from orbit.reading.configured import (
    Activation,
    ProfileView,
    RunProfileView,
    last_activation,
    profiles,
    run_profiles,
    visible,
)
from orbit.reading.slots import Slot, slots
from orbit.reading.view import Page, View


class RunProfilesBody(Body):
    """Which run profiles are started; without names every one that is enabled."""

    run_profile_ids: list[Key] | None = Field(None, max_length=10_000)


class ReloadBody(Body):
    """Why other files are put into force."""

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
class ConfigurationView(View):
    """The revision in force, and that of this node's files as they were last read."""

    revision: str
    activated_at: datetime | None
    reason: str | None
    files_revision: str | None
    is_in_step: bool


def configuration_router(node: Node, bodies: Bodies) -> APIRouter:
    """The routes, for one node."""
    router = APIRouter(tags=["configuration"])
    read_body = Depends(bodies.of(RunProfilesBody))

    @router.get(
        "/profiles",
        dependencies=[Depends(require("viewer"))],
        summary="Profiles as configured",
    )
    async def listed_profiles(request: Request) -> Page[ProfileView]:
        """Who is bound to namespaces sees those that are used there."""
        await node.configuration.refresh()
        documents = node.configuration.active.documents
        actor = actor_of(request)
        return Page(profiles(visible(documents, actor.within), is_whole=sees_payloads(actor)))

    @router.get(
        "/run-profiles",
        dependencies=[Depends(require("viewer"))],
        summary="Run profiles as configured, and whether they run",
    )
    async def listed_run_profiles(request: Request) -> Page[RunProfileView]:
        await node.configuration.refresh()
        documents = node.configuration.active.documents
        actor = actor_of(request)
        shown, is_whole = visible(documents, actor.within), sees_payloads(actor)
        return Page(await run_profiles(node.database, shown, is_whole=is_whole))

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

    _add_configuration(router, node, bodies)
    return router


def _add_configuration(router: APIRouter, node: Node, bodies: Bodies) -> None:
    read_reload = Depends(bodies.of(ReloadBody))

    @router.get(
        "/config",
        dependencies=[Depends(require("viewer"))],
        summary="The configuration in force",
    )
    async def configuration() -> ConfigurationView:
        await node.configuration.refresh()
        found = node.configuration
        activation = await last_activation(node.database) or Activation(None, None)
        return ConfigurationView(
            revision=found.active.revision,
            activated_at=activation.activated_at,
            reason=activation.reason,
            files_revision=found.proposed.revision if found.proposed else None,
            is_in_step=found.is_in_step,
        )

    @router.post(
        "/config/validate",
        dependencies=[Depends(require("admin", is_everywhere=True))],
        summary="Check this node's configuration files",
    )
    async def validate() -> Valid:
        """422 with every problem at once where they cannot be used."""
        documents = await asyncio.to_thread(node.orchestration.read_files)
        return Valid(True, revision_of(documents).revision)

    @router.post(
        "/config/reload",
        dependencies=[Depends(require("admin", is_everywhere=True))],
        summary="Put this node's configuration files into force",
        openapi_extra=body_schema(ReloadBody, is_required=False),
    )
    async def reload(request: Request, body: ReloadBody = read_reload) -> Reloaded:
        """409 with the active cycles named while any is active."""
        asker = actor_of(request).name
        revision, is_changed = await node.orchestration.reload(asker, body.reason)
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
