"""Proposals: suggested, listed, shown, approved and rejected. None of it applies a proposal.

Where a person has armed the profile, controlled autonomy applies what is approved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Path, Query, Request

from orbit.api.access import actor_of, require
from orbit.api.bodies import Bodies, Body, Key, PageFilter, Reason, body_schema
from orbit.api.routes_signals import MOST_BATCHES, ProfileKey, namespaces_of
from orbit.app import Node
from orbit.errors import NotFound
from orbit.insight.proposals import Author
from orbit.reading.proposals import ProposalView, proposal, proposals
from orbit.reading.view import Page, View

ProposalId = Annotated[str, Path(alias="proposalId")]


class ProposalFilter(PageFilter):
    """Which proposals are listed."""

    namespace: Key | None = None
    profile_id: Key | None = None
    rule: Key | None = None
    state: Literal["pending", "approved", "rejected", "expired", "superseded"] | None = None


class ApproveBody(Body):
    """Why the proposal is good, if there is something to say."""

    reason: Reason | None = None


class RejectBody(Body):
    """Why the proposal is not good."""

    reason: Reason


@dataclass(frozen=True, slots=True)
class GeneratedView(View):
    """The ids of a namespace's proposals that are new, and of those that did not hold any more."""

    namespace: str
    made: list[str]
    ended: list[str]


def proposals_router(node: Node, bodies: Bodies) -> APIRouter:
    """The routes, for one node."""
    router = APIRouter(tags=["proposals"])
    read_approval = Depends(bodies.of(ApproveBody))
    read_rejection = Depends(bodies.of(RejectBody))

    @router.post(
        "/profiles/{profileId}/strategy-proposals",
        dependencies=[Depends(require("operator"))],
        summary="Suggest changes of a profile by what is known now",
    )
    async def suggested(request: Request, profile_id: ProfileKey) -> Page[GeneratedView]:
        """One entry for each namespace the profile runs in. Who asks does not approve the new."""
        actor, items = actor_of(request), []
        for namespace in await namespaces_of(node, request, profile_id):
            await node.signals.feed(namespace, MOST_BATCHES)
            author = Author(actor.name, actor.id)
            found = await node.proposals.generate(namespace, author, profile_id)
            items.append(GeneratedView(namespace, list(found.made), list(found.ended)))
        return Page(items)

    @router.get(
        "/proposals", dependencies=[Depends(require("viewer"))], summary="Proposals, newest first"
    )
    async def listed(
        request: Request, asked: Annotated[ProposalFilter, Query()]
    ) -> Page[ProposalView]:
        """With what each rests on, and what became of it."""
        within = actor_of(request).within
        return await proposals(node.database, **asked.model_dump(), within=within)

    @router.get(
        "/proposals/{proposalId}", dependencies=[Depends(require("viewer"))], summary="A proposal"
    )
    async def shown(request: Request, proposal_id: ProposalId) -> ProposalView:
        """As it was made, and what became of it."""
        return await proposal(node.database, proposal_id, actor_of(request).within)

    @router.post(
        "/proposals/{proposalId}/approve",
        dependencies=[Depends(require("approver"))],
        summary="Approve a proposal; it is applied by itself only where the profile is armed",
        openapi_extra=body_schema(ApproveBody, is_required=False),
    )
    async def approved(
        request: Request, proposal_id: ProposalId, body: ApproveBody = read_approval
    ) -> ProposalView:
        """409 if it is decided or holds no longer, or if who asks is its author."""
        return await _decided(node, request, proposal_id, body.reason, is_approved=True)

    @router.post(
        "/proposals/{proposalId}/reject",
        dependencies=[Depends(require("approver"))],
        summary="Reject a proposal, with the reason",
        openapi_extra=body_schema(RejectBody, is_required=True),
    )
    async def rejected(
        request: Request, proposal_id: ProposalId, body: RejectBody = read_rejection
    ) -> ProposalView:
        """It comes again only on new evidence."""
        return await _decided(node, request, proposal_id, body.reason, is_approved=False)

    return router


async def _decided(
    node: Node, request: Request, proposal_id: str, reason: str | None, *, is_approved: bool
) -> ProposalView:
    if "\x00" in proposal_id:
        raise NotFound("there is no such proposal")
    actor = actor_of(request)
    await node.proposals.decide(proposal_id, actor, is_approved=is_approved, reason=reason)
    return await proposal(node.database, proposal_id, actor.within)
