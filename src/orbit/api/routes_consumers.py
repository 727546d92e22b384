"""Consumers of telemetry: readers whose place is stored, so that retention waits for them.

Making and removing one is of the whole installation, since it keeps events of all namespaces, and
audited. Moving one is for whoever reads: often, and not audited.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import Field

from orbit.api.access import actor_of, require
from orbit.api.bodies import Bodies, Body, Key, PageFilter, Reason, body_schema
from orbit.app import Node
from orbit.audit.trail import INSTALLATION, Act, append
from orbit.reading.consumers import ConsumerView, consumer, consumers
from orbit.reading.view import Page
from orbit.telemetry.consumers import add, commit, remove

Place = Annotated[int, Field(ge=0, le=2**63 - 1)]
Name = Annotated[str, Path(alias="name")]


class AddBody(Body):
    """A consumer's name, and after which position it begins: else with the first that is kept.

    Keys bounded to all of the `namespaces` may see and move it; else only keys of all.
    """

    name: Key
    after: Place | None = None
    namespaces: list[Key] | None = Field(None, min_length=1, max_length=1000)
    reason: Reason | None = None


class CommitBody(Body):
    """Up to which position the consumer has read."""

    position: Place


class RemoveBody(Body):
    """Why a consumer is let go."""

    reason: Reason | None = None


def consumers_router(node: Node, bodies: Bodies) -> APIRouter:
    """The routes, for one node."""
    router = APIRouter(prefix="/telemetry/consumers", tags=["telemetry"])
    everywhere = [Depends(require("operator", is_everywhere=True))]
    read_add, read_commit, read_remove = (
        Depends(bodies.of(model)) for model in (AddBody, CommitBody, RemoveBody)
    )

    @router.get("", dependencies=[Depends(require("viewer"))], summary="Stored consumers, by name")
    async def listed(request: Request, asked: Annotated[PageFilter, Query()]) -> Page[ConsumerView]:
        """How far each has read. Retention drops nothing that one of them has yet to read."""
        within = actor_of(request).within
        return await consumers(node.database, **asked.model_dump(), within=within)

    @router.get("/{name}", dependencies=[Depends(require("viewer"))], summary="A stored consumer")
    async def shown(request: Request, name: Name) -> ConsumerView:
        """Its `position` is to be given as `after`."""
        return await consumer(node.database, name, actor_of(request).within)

    @router.post(
        "",
        status_code=201,
        dependencies=everywhere,
        summary="Store a consumer's place from now on",
        openapi_extra=body_schema(AddBody, is_required=True),
    )
    async def added(request: Request, body: AddBody = read_add) -> ConsumerView:
        """409 `consumer_exists` where the name is taken."""
        act = Act(
            INSTALLATION,
            "consumer.added",
            actor_of(request).name,
            body.reason,
            body.name,
            {"namespaces": body.namespaces, "after": body.after},
        )
        async with node.database.transaction() as connection:
            await add(connection, body.name, after=body.after, namespaces=body.namespaces)
            await append(connection, act)
        return await consumer(node.database, body.name)

    @router.post(
        "/{name}/commit",
        dependencies=[Depends(require("operator"))],
        summary="Say up to where a consumer has read",
        openapi_extra=body_schema(CommitBody, is_required=True),
    )
    async def committed(
        request: Request, name: Name, body: CommitBody = read_commit
    ) -> ConsumerView:
        """A place never goes back: an older position changes nothing."""
        within = actor_of(request).within
        await consumer(node.database, name, within)
        async with node.database.transaction() as connection:
            await commit(connection, name, body.position)
        return await consumer(node.database, name, within)

    @router.post(
        "/{name}/remove",
        dependencies=everywhere,
        summary="Let a consumer go",
        openapi_extra=body_schema(RemoveBody, is_required=False),
    )
    async def removed(request: Request, name: Name, body: RemoveBody = read_remove) -> ConsumerView:
        """As it was. Retention waits for it no longer."""
        act = Act(INSTALLATION, "consumer.removed", actor_of(request).name, body.reason, name)
        was = await consumer(node.database, name)
        async with node.database.transaction() as connection:
            await remove(connection, name)
            await append(connection, act)
        return was

    return router
