"""Dead letters: listed, grouped, shown, requeued singly or in bulk, discarded.

Only a person decides. A bulk requeue without canary and rate is done when it is answered; with
either it becomes a batch that nodes carry on, and that can be looked at and cancelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from pydantic import Field

from orbit.api.access import actor_of, check_namespace, require, sees_payloads
from orbit.api.bodies import Bodies, Body, Filter, Instant, Key, PageFilter, Reason, body_schema
from orbit.app import Node
from orbit.execution.dead_letters import (
    Found,
    Requeued,
    Selection,
    SnapshotChoice,
    check_reason,
)
from orbit.execution.requeues import LARGEST_STEP, Pace
from orbit.reading.belonging import Kind, visible_id
from orbit.reading.dead_letters import (
    DeadLetter,
    DeadLetterDetail,
    DeadLetterGroup,
    dead_letter,
    dead_letter_groups,
    dead_letters,
    withheld,
)
from orbit.reading.requeues import BulkRequeue, bulk_requeue, bulk_requeues
from orbit.reading.view import Page, View

_AT_ONCE = 100
Cause = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00]+$")]
Snapshot = Literal["current", "old"]
JobId = Annotated[str, Path(alias="jobId")]
BatchId = Annotated[str, Path(alias="batchId")]


class RequeueBody(Body):
    """Why a dead letter is sent again; `force` even if that was decided, or it may have arrived.

    `snapshot`: to the endpoint as it is now, or as it stood for the old job.
    """

    reason: Reason
    force: bool = False
    snapshot: Snapshot = "current"


class RequeueManyBody(Body):
    """Which open dead letters of a namespace are sent again, the oldest first.

    With `isDryRun` nothing is: the answer says how many would be. With `canary` (so many first,
    and no other before all of them are delivered) or `rate` (jobs a second) it is done in steps;
    `stopOnFailure` is about those. `since` and `until`: when they became dead letters. `limit`
    is 100 unless told otherwise, at most 10,000 at once; in steps there is none.
    """

    namespace: Key
    endpoint_key: Key | None = None
    cause: Cause | None = None
    run_profile_id: Key | None = None
    since: Instant | None = None
    until: Instant | None = None
    limit: int | None = Field(None, ge=1, le=10_000)
    is_dry_run: bool = False
    reason: Reason | None = None
    snapshot: Snapshot = "current"
    canary: int | None = Field(None, ge=1, le=10_000)
    rate: float | None = Field(None, ge=0.001, le=LARGEST_STEP)
    stop_on_failure: bool = True

    @property
    def selection(self) -> Selection:
        """The dead letters that are meant."""
        return Selection(
            self.namespace,
            self.endpoint_key,
            self.cause,
            self.run_profile_id,
            self.since,
            self.until,
        )

    @property
    def most(self) -> int | None:
        """How many are requeued at most; None if there is no limit."""
        return self.limit if self.pace else self.limit or _AT_ONCE

    @property
    def pace(self) -> Pace | None:
        """How it goes on in steps; None if it is done at once."""
        if self.canary is None and self.rate is None:
            return None
        return Pace(self.canary or 0, self.rate, self.stop_on_failure, self.limit)


class CancelBody(Body):
    """Why a bulk requeue ends before its time."""

    reason: Reason


class DiscardBody(Body):
    """Why a dead letter is let be."""

    reason: Reason


class DeadLetterFilter(PageFilter):
    """Which dead letters are listed."""

    namespace: Key | None = None
    endpoint_key: Key | None = None
    cause: Cause | None = None
    run_profile_id: Key | None = None
    state: Literal["open", "decided"] | None = None


class GroupFilter(Filter):
    """Of which namespace dead letters are grouped."""

    namespace: Key | None = None


class RequeueFilter(PageFilter):
    """Which bulk requeues are listed."""

    namespace: Key | None = None
    state: Literal["running", "finished", "stopped", "cancelled"] | None = None


@dataclass(frozen=True, slots=True)
class RequeuedView(View):
    """The job that a dead letter came back as, the dead letter, and the snapshot it uses."""

    job_id: str
    requeued_from: str
    snapshot: str


@dataclass(frozen=True, slots=True)
class RequeuedMany(View):
    """How many open dead letters matched, and the jobs that came of them.

    `selected` of those `matching` are within the limit, the oldest: they are requeued, or would
    be. Left out were those that `may_have_arrived`, since an attempt ended unknown, and those
    `without_payload`. `batch_id`: what goes on in steps, with no job yet.
    """

    is_dry_run: bool
    matching: int
    selected: int
    may_have_arrived: int
    without_payload: int
    snapshot: str
    batch_id: str | None
    items: list[RequeuedView]


@dataclass(frozen=True, slots=True)
class Discarded(View):
    """The dead letter that was let be."""

    job_id: str
    decision: str


def dead_letters_router(node: Node, bodies: Bodies) -> APIRouter:
    """The routes, for one node."""
    router = APIRouter(prefix="/dead-letters", tags=["dead letters"])

    @router.get(
        "",
        dependencies=[Depends(require("viewer"))],
        summary="Dead letters, those that died last first",
    )
    async def listed(
        request: Request, asked: Annotated[DeadLetterFilter, Query()]
    ) -> Page[DeadLetter]:
        """A filter that matches little may give short or empty pages with a cursor."""
        actor = actor_of(request)
        page = await dead_letters(node.database, **asked.model_dump(), within=actor.within)
        if sees_payloads(actor):
            return page
        return Page([withheld(one) for one in page.items], page.next_cursor)

    @router.get(
        "/groups",
        dependencies=[Depends(require("viewer"))],
        summary="Open dead letters by namespace, endpoint and cause",
    )
    async def grouped(
        request: Request, asked: Annotated[GroupFilter, Query()]
    ) -> Page[DeadLetterGroup]:
        """At most 1,000 groups, the largest first."""
        within = actor_of(request).within
        return Page(await dead_letter_groups(node.database, asked.namespace, within))

    _add_bulk(router, node, bodies)
    _add_batches(router, node, bodies)
    _add_single(router, node, bodies)
    return router


def _add_bulk(router: APIRouter, node: Node, bodies: Bodies) -> None:
    read_many = Depends(bodies.of(RequeueManyBody))

    @router.post(
        "/requeue",
        dependencies=[Depends(require("operator"))],
        status_code=202,
        summary="Requeue the open dead letters of a namespace, at once or in steps",
        responses={200: {"model": RequeuedMany, "description": "A dry run, or nothing matches."}},
        openapi_extra=body_schema(RequeueManyBody, is_required=True),
    )
    async def requeue_many(
        request: Request, response: Response, body: RequeueManyBody = read_many
    ) -> RequeuedMany:
        """At once all or none of those selected; 200 where nothing is or will be requeued."""
        actor = actor_of(request)
        check_namespace(actor, body.namespace)
        if not body.is_dry_run:
            check_reason(body.reason or "")
        answer = await _requeued(node, body, actor.name)
        if body.is_dry_run or not answer.matching:
            response.status_code = HTTPStatus.OK
        return answer


async def _requeued(node: Node, body: RequeueManyBody, asker: str) -> RequeuedMany:
    choice, reason = SnapshotChoice(body.snapshot), body.reason or ""
    if body.pace is None or body.is_dry_run:
        found = await node.dead_letters.count(body.selection)
        if body.is_dry_run or not found.matching:
            return _answer(body, found)
        requeued = await node.dead_letters.requeue_many(
            body.selection,
            reason,
            limit=body.limit or _AT_ONCE,
            snapshot=choice,
            asked_by=asker,
        )
        return _answer(body, found, requeued)
    batch_id, found = await node.requeues.begin(
        body.selection, reason, body.pace, snapshot=choice, asked_by=asker
    )
    if node.requeuer is not None:
        node.requeuer.wake()
    return _answer(body, found, batch_id=batch_id)


def _answer(
    body: RequeueManyBody,
    found: Found,
    requeued: Sequence[Requeued] = (),
    batch_id: str | None = None,
) -> RequeuedMany:
    return RequeuedMany(
        body.is_dry_run,
        found.matching,
        found.matching if body.most is None else min(body.most, found.matching),
        found.may_have_arrived,
        found.without_payload,
        body.snapshot,
        batch_id,
        [RequeuedView(one.new_job_id, one.job_id, body.snapshot) for one in requeued],
    )


def _add_batches(router: APIRouter, node: Node, bodies: Bodies) -> None:
    read_cancel = Depends(bodies.of(CancelBody))

    @router.get(
        "/requeues",
        dependencies=[Depends(require("viewer"))],
        summary="Bulk requeues in steps, newest first",
    )
    async def requeues(
        request: Request, asked: Annotated[RequeueFilter, Query()]
    ) -> Page[BulkRequeue]:
        """Counts are those of now, also of one that has ended."""
        within = actor_of(request).within
        return await bulk_requeues(node.database, **asked.model_dump(), within=within)

    @router.get(
        "/requeues/{batchId}",
        dependencies=[Depends(require("viewer"))],
        summary="A bulk requeue and how far it is",
    )
    async def bulk(request: Request, batch_id: BatchId) -> BulkRequeue:
        return await bulk_requeue(node.database, batch_id, actor_of(request).within)

    @router.post(
        "/requeues/{batchId}/cancel",
        dependencies=[Depends(require("operator"))],
        summary="End a bulk requeue; what it has not requeued stays a dead letter",
        openapi_extra=body_schema(CancelBody, is_required=True),
    )
    async def cancel(
        request: Request, batch_id: BatchId, body: CancelBody = read_cancel
    ) -> BulkRequeue:
        """409 `refused` if it has ended before."""
        actor = actor_of(request)
        asked = await visible_id(node.database, Kind.BULK_REQUEUE, batch_id, actor.within)
        await node.requeues.cancel(asked, body.reason, actor.name)
        return await bulk_requeue(node.database, asked)


def _add_single(router: APIRouter, node: Node, bodies: Bodies) -> None:
    read_requeue, read_discard = Depends(bodies.of(RequeueBody)), Depends(bodies.of(DiscardBody))

    @router.get(
        "/{jobId}",
        dependencies=[Depends(require("viewer"))],
        summary="A dead letter with its receipts and decisions",
    )
    async def shown(request: Request, job_id: JobId) -> DeadLetterDetail:
        actor = actor_of(request)
        return await dead_letter(
            node.database,
            job_id,
            node.snapshots.ids,
            actor.within,
            has_answers=sees_payloads(actor),
        )

    @router.post(
        "/{jobId}/requeue",
        dependencies=[Depends(require("operator"))],
        status_code=202,
        summary="Requeue a dead letter as a new job",
        openapi_extra=body_schema(RequeueBody, is_required=True),
    )
    async def requeue(
        request: Request, job_id: JobId, body: RequeueBody = read_requeue
    ) -> RequeuedView:
        """409 `already_requeued` or `may_have_arrived`, unless forced."""
        actor = actor_of(request)
        requeued = await node.dead_letters.requeue(
            await visible_id(node.database, Kind.DEAD_LETTER, job_id, actor.within),
            body.reason,
            is_forced=body.force,
            snapshot=SnapshotChoice(body.snapshot),
            asked_by=actor.name,
        )
        return RequeuedView(requeued.new_job_id, requeued.job_id, body.snapshot)

    @router.post(
        "/{jobId}/discard",
        dependencies=[Depends(require("operator"))],
        summary="Let a dead letter be",
        openapi_extra=body_schema(DiscardBody, is_required=True),
    )
    async def discard(
        request: Request, job_id: JobId, body: DiscardBody = read_discard
    ) -> Discarded:
        actor = actor_of(request)
        asked = await visible_id(node.database, Kind.DEAD_LETTER, job_id, actor.within)
        await node.dead_letters.discard(asked, body.reason, actor.name)
        return Discarded(asked, "discarded")
