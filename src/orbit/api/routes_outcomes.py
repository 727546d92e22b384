"""Outcomes: a receiving engine, or anyone who may, says later what work was worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from pydantic import Field

from orbit.api.access import actor_of, check_namespace, require
from orbit.api.bodies import Bodies, Body, Key, body_schema
from orbit.app import Node
from orbit.reading.view import View, known_id
from orbit.telemetry.outcomes import Outcome, report

Finite = Annotated[float, Field(allow_inf_nan=False)]


class OutcomeBody(Body):
    """A metric's value for a cycle (`runId`, or one item of it) or a job.

    Without a unit it is a score from 0 to 1. `outcomeId` is the reporter's: the same again changes
    nothing.
    """

    namespace: Key
    outcome_id: Key
    metric: Key
    value: Finite
    unit: Annotated[str, Field(pattern=r"^[!-~]{1,32}$")] | None = None
    run_id: str | None = None
    item_index: int | None = Field(None, ge=0, le=2**31 - 1)
    job_id: str | None = None


@dataclass(frozen=True, slots=True)
class Reported(View):
    """Whether the outcome was new."""

    outcome_id: str
    is_new: bool


def outcomes_router(node: Node, bodies: Bodies) -> APIRouter:
    """The routes, for one node."""
    router = APIRouter(prefix="/outcomes", tags=["telemetry"])
    read = Depends(bodies.of(OutcomeBody))

    @router.post(
        "",
        dependencies=[Depends(require("operator"))],
        summary="Report what a cycle, item or job was worth",
        openapi_extra=body_schema(OutcomeBody, is_required=True),
    )
    async def reported(request: Request, body: OutcomeBody = read) -> Reported:
        """It becomes telemetry. 404 where what it is of is not kept here (any more)."""
        actor = actor_of(request)
        check_namespace(actor, body.namespace)
        given = body.model_dump()
        for name, what in (("run_id", "cycle"), ("job_id", "job")):
            if given[name] is not None:
                given[name] = known_id(given[name], what)
        async with node.database.transaction() as connection:
            is_new = await report(connection, Outcome(**given), actor.id)
        return Reported(body.outcome_id, is_new)

    return router
