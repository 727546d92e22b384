"""Lanes: listed, and one with its limits and what its breaker did.

Reads only: what a lane may do is said by ORBIT_DISPATCH_ENDPOINTS, and a breaker closes by a
probe that is delivered.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request

from orbit.api.access import actor_of, require
from orbit.api.bodies import Key, PageFilter
from orbit.app import Node
from orbit.reading.lanes import LaneDetail, LaneView, lane, lanes
from orbit.reading.view import Page

EndpointKey = Annotated[str, Path(alias="endpointKey")]


class LaneFilter(PageFilter):
    """Which lanes are listed."""

    namespace: Key | None = None
    endpoint_key: Key | None = None


def lanes_router(node: Node) -> APIRouter:
    """The routes, for one node."""
    router = APIRouter(prefix="/lanes", tags=["lanes"])
    endpoints = {one.key: one for one in node.settings.dispatch_endpoints}

    @router.get(
        "",
        dependencies=[Depends(require("viewer"))],
        summary="Lanes: a namespace's queue for an endpoint",
    )
    async def listed(request: Request, asked: Annotated[LaneFilter, Query()]) -> Page[LaneView]:
        """In the order of their key; a lane is listed once a worker has seen a job of it."""
        return await lanes(node.database, **asked.model_dump(), within=actor_of(request).within)

    @router.get(
        "/{namespace}/{endpointKey}",
        dependencies=[Depends(require("viewer"))],
        summary="A lane with limits and last changes",
    )
    async def shown(request: Request, namespace: str, endpoint_key: EndpointKey) -> LaneDetail:
        """The limits are those of this node; `changes` are the last 50, newest first."""
        within = actor_of(request).within
        return await lane(
            node.database, namespace, endpoint_key, endpoints.get(endpoint_key), within
        )

    return router
