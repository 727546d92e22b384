"""Drills: a halt rehearsed by this node, in a namespace of its own.

The answer comes when the drill is over, some seconds later. One drill at a time on a node.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from fastapi import APIRouter, Depends, Request
from pydantic import Field

from orbit.api.access import actor_of, require
from orbit.api.bodies import Bodies, Body, body_schema
from orbit.app import Node
from orbit.drills.halt import HaltDrill
from orbit.reading.view import View


class DrillBody(Body):
    """For how many seconds nothing may arrive after the halt has answered."""

    watch_seconds: float = Field(2.0, ge=0.1, le=60)


@dataclass(frozen=True, slots=True)
class DrillAnswer(View):
    """What a drill came to.

    Of `requests`, `arrived_before` came until the halt's answer, `arrived_halted` in the
    `watched_seconds` after it (0, or the drill failed), and `arrived_after` the resumption.
    `in_flight` is what the halt found under way, and waited for.
    """

    namespace: str
    epoch: int
    has_passed: bool
    requests: int
    arrived_before: int
    in_flight: int
    is_quiesced: bool
    quiesced_seconds: float
    watched_seconds: float
    arrived_halted: int
    is_refused: bool
    arrived_after: int
    arrived_twice: int


def drills_router(node: Node, bodies: Bodies) -> APIRouter:
    """The routes, for one node."""
    router = APIRouter(prefix="/governance/drills", tags=["governance"])
    drill = HaltDrill(node)
    read = Depends(bodies.of(DrillBody))

    @router.post(
        "/halt",
        summary="Rehearse a halt in a scratch namespace",
        dependencies=[Depends(require("operator", is_everywhere=True))],
        openapi_extra=body_schema(DrillBody, is_required=False),
    )
    async def drill_halt(request: Request, body: DrillBody = read) -> DrillAnswer:
        """409 `drill_under_way` while this node rehearses already."""
        actor = actor_of(request)
        found = await drill.run(actor.name, actor.id, watch_seconds=body.watch_seconds)
        return DrillAnswer(**asdict(found))

    return router
