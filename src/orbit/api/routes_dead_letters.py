"""Dead letters: listed, shown, requeued, discarded. Only a person decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import Field

from orbit.api.bodies import Bodies, Body, Key, PageFilter, Reason, body_schema
from orbit.app import Node
from orbit.execution.dead_letters import Requeued, Selection, SnapshotChoice
from orbit.reading.dead_letters import DeadLetter, DeadLetterDetail, dead_letter, dead_letters
from orbit.reading.view import Page, View, known_id

Cause = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00]+$")]
Snapshot = Literal["current", "old"]


class RequeueBody(Body):
    """Why a dead letter is sent again; `force` even if that was decided, or it may have arrived.

    `snapshot`: to the endpoint as it is now, or as it stood for the old job.
    """

    reason: Reason
    force: bool = False
    snapshot: Snapshot = "current"


class RequeueManyBody(Body):
    """Which open dead letters of a namespace are sent again, the oldest first.

    With `dryRun` nothing is: the answer says how many there are.
    """

    namespace: Key
    endpoint_key: Key | None = None
    cause: Cause | None = None
    limit: int = Field(100, ge=1, le=10_000)
    dry_run: bool = False
    reason: Reason | None = None
    snapshot: Snapshot = "current"


class DiscardBody(Body):
    """Why a dead letter is let be."""

    reason: Reason


class DeadLetterFilter(PageFilter):
    """Which dead letters are listed."""

    namespace: Key | None = None
    endpoint_key: Key | None = None
    cause: Cause | None = None
    state: Literal["open", "decided"] | None = None


@dataclass(frozen=True, slots=True)
class RequeuedView(View):
    """The job that a dead letter came back as, and the dead letter."""

    job_id: str
    requeued_from: str


@dataclass(frozen=True, slots=True)
class RequeuedMany(View):
    """How many open dead letters matched, and the jobs that came of them.

    `may_have_arrived`: how many were left out, since an attempt ended unknown.
    """

    is_dry_run: bool
    matching: int
    may_have_arrived: int
    items: list[RequeuedView]


@dataclass(frozen=True, slots=True)
class Discarded(View):
    """The dead letter that was let be."""

    job_id: str
    decision: str


def dead_letters_router(node: Node, bodies: Bodies) -> APIRouter:
    """The routes, for one node."""
    router = APIRouter(prefix="/dead-letters", tags=["dead letters"])
    read_many = Depends(bodies.of(RequeueManyBody))

    @router.get("", summary="Dead letters, newest first")
    async def listed(asked: Annotated[DeadLetterFilter, Query()]) -> Page[DeadLetter]:
        """A filter that matches little may give short or empty pages with a cursor."""
        return await dead_letters(node.database, **asked.model_dump())

    @router.post(
        "/requeue",
        status_code=202,
        summary="Requeue the open dead letters of a namespace",
        openapi_extra=body_schema(RequeueManyBody, is_required=True),
    )
    async def requeue_many(body: RequeueManyBody = read_many) -> RequeuedMany:
        """All or none of those selected; `matching` counts before the limit."""
        desk = node.dead_letters
        selection = Selection(body.namespace, body.endpoint_key, body.cause)
        found = await desk.count(selection)
        if body.dry_run:
            return RequeuedMany(True, found.matching, found.may_have_arrived, [])
        requeued = await desk.requeue_many(
            selection,
            body.reason or "",
            limit=body.limit,
            snapshot=SnapshotChoice(body.snapshot),
        )
        items = [_requeued(one) for one in requeued]
        return RequeuedMany(False, found.matching, found.may_have_arrived, items)

    _add_single(router, node, bodies)
    return router


def _add_single(router: APIRouter, node: Node, bodies: Bodies) -> None:
    read_requeue, read_discard = Depends(bodies.of(RequeueBody)), Depends(bodies.of(DiscardBody))

    @router.get("/{jobId}", summary="A dead letter with its receipts and decisions")
    async def shown(jobId: str) -> DeadLetterDetail:  # noqa: N803 - the name that OpenAPI shows
        return await dead_letter(node.database, jobId)

    @router.post(
        "/{jobId}/requeue",
        status_code=202,
        summary="Requeue a dead letter as a new job",
        openapi_extra=body_schema(RequeueBody, is_required=True),
    )
    async def requeue(
        jobId: str,  # noqa: N803 - as above
        body: RequeueBody = read_requeue,
    ) -> RequeuedView:
        """409 `already_requeued` or `may_have_arrived`, unless forced."""
        requeued = await node.dead_letters.requeue(
            known_id(jobId, "dead letter"),
            body.reason,
            is_forced=body.force,
            snapshot=SnapshotChoice(body.snapshot),
        )
        return _requeued(requeued)

    @router.post(
        "/{jobId}/discard",
        summary="Let a dead letter be",
        openapi_extra=body_schema(DiscardBody, is_required=True),
    )
    async def discard(
        jobId: str,  # noqa: N803 - as above
        body: DiscardBody = read_discard,
    ) -> Discarded:
        asked = known_id(jobId, "dead letter")
        await node.dead_letters.discard(asked, body.reason)
        return Discarded(asked, "discarded")


def _requeued(requeued: Requeued) -> RequeuedView:
    return RequeuedView(requeued.new_job_id, requeued.job_id)
