"""The brake of a namespace: halted, resumed, looked at; and its rule of two persons.

A halt is an emergency brake: it is never refused for its reason (a blank one is none, a long one
is cut), it has a database connection of its own, and its answer comes in bounded time and says what
is still out.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import AfterValidator, Field

from orbit.api.access import actor_of, check_namespace, require
from orbit.api.bodies import (
    MOST_CHARACTERS,
    Bodies,
    Body,
    Instant,
    PageFilter,
    Reason,
    body_schema,
)
from orbit.app import Node
from orbit.errors import NotFound
from orbit.governance.actor import Scope
from orbit.governance.halt import Halted, Order, check_reason
from orbit.governance.rules import ALL, set_two_persons
from orbit.reading.halts import (
    MAX_IN_FLIGHT,
    FlightView,
    NamespaceState,
    flight_view,
    namespace_state,
)
from orbit.reading.view import View
from orbit.vocabulary import check_key

Name = Annotated[str, Path(alias="namespace")]


def _as_far_as_kept(reason: str | None) -> str | None:
    """What can be stored of a reason; None if it says nothing."""
    kept = (reason or "").replace("\x00", "�")[:MOST_CHARACTERS]
    return kept if kept.strip() else None


class HaltBody(Body):
    """Why, for how many seconds the answer may wait for what is in flight, and until when.

    Of `reason` the first 1,000 characters are kept. Without `until` the halt lasts until somebody
    resumes.
    """

    reason: Annotated[str | None, AfterValidator(_as_far_as_kept)] = None
    wait_seconds: float = Field(10.0, ge=0, le=300)
    until: Instant | None = None


class ResumeBody(Body):
    """Why a namespace may go on; with `epoch` only from that halt, not from a later one."""

    reason: Reason
    epoch: int | None = Field(None, ge=1)


class SettingsBody(Body):
    """Whether two persons are needed to resume, and why that is so from now on."""

    two_person_resume: bool
    reason: Reason


@dataclass(frozen=True, slots=True)
class HaltAnswer(View):
    """What a halt came to.

    `quiesced`: nothing of the namespace is in flight on any node, and nothing will begin until it
    is resumed. Else `fenced` says whether all claims from before were over, and `in_flight`, of
    which at most 1,000 are listed, those still out first, what has no outcome yet and on which
    node. `in_force` is false if it was resumed meanwhile. Unless `seen`, the database was lost once
    the halt was written, and nothing of this is known: halt again. Unless `known`, no run profile
    and no cycle was ever of a namespace of that name: it is halted, and may be misspelt.
    """

    namespace: str
    epoch: int
    quiesced: bool
    fenced: bool
    in_force: bool
    seen: bool
    halted_at: datetime
    until_at: datetime | None
    waited_seconds: float
    in_flight_count: int
    still_out: int
    known: bool
    in_flight: list[FlightView]


@dataclass(frozen=True, slots=True)
class ResumeAnswer(View):
    """`state` is `running`, or still `halted` until a second person agrees with `asked_by`."""

    namespace: str
    epoch: int
    state: str
    asked_by: str | None


@dataclass(frozen=True, slots=True)
class SettingsView(View):
    """A namespace's rules, as they are in force: its own and those of all."""

    namespace: str
    two_person_resume: bool


def governance_router(node: Node, bodies: Bodies) -> APIRouter:
    """The routes, for one node."""
    router = APIRouter(prefix="/governance/namespaces", tags=["governance"])
    _add_brake(router, node, bodies)
    _add_rules(router, node, bodies)
    return router


def _add_brake(router: APIRouter, node: Node, bodies: Bodies) -> None:
    read_halt, read_resume = Depends(bodies.of(HaltBody)), Depends(bodies.of(ResumeBody))

    @router.post(
        "/{namespace}/halt",
        summary="Halt a namespace, and say whether it has stopped",
        dependencies=[Depends(require("operator"))],
        openapi_extra=body_schema(HaltBody, is_required=False),
    )
    async def halt(request: Request, namespace: Name, body: HaltBody = read_halt) -> HaltAnswer:
        """Halted again, it gets the next epoch, and not a shorter time."""
        found = await node.brake.halt(
            _order(request, namespace, body.reason),
            until=body.until,
            wait_seconds=body.wait_seconds,
        )
        return _answer(found)

    @router.post(
        "/{namespace}/resume",
        summary="Let a halted namespace go on",
        dependencies=[Depends(require("operator", "approver"))],
        openapi_extra=body_schema(ResumeBody, is_required=True),
    )
    async def resume(
        request: Request, namespace: Name, body: ResumeBody = read_resume
    ) -> ResumeAnswer:
        """409 `not_halted`, `halted_anew`, or `second_person_required` for the same person.

        An approver agrees to what an operator has asked for; before that, 409 `operator_required`.
        """
        order = _order(request, namespace, body.reason)
        is_second = not actor_of(request).may(Scope.OPERATOR)
        found = await node.brake.resume(order, epoch=body.epoch, is_second=is_second)
        state = "halted" if found.is_halted else "running"
        return ResumeAnswer(found.namespace, found.epoch, state, found.asked_by)

    @router.get(
        "/{namespace}",
        summary="A namespace's state, what is in flight, and its halts",
        dependencies=[Depends(require("viewer"))],
    )
    async def shown(
        request: Request, namespace: Name, asked: Annotated[PageFilter, Query()]
    ) -> NamespaceState:
        """Also of a namespace that nothing is known of: it is running."""
        _check(namespace)
        check_namespace(actor_of(request), namespace)
        return await namespace_state(node.database, namespace, **asked.model_dump())


def _add_rules(router: APIRouter, node: Node, bodies: Bodies) -> None:
    read_settings = Depends(bodies.of(SettingsBody))

    @router.post(
        "/{namespace}/settings",
        summary="Say whether two persons are needed to resume a namespace",
        dependencies=[Depends(require("admin"))],
        openapi_extra=body_schema(SettingsBody, is_required=True),
    )
    async def settings(
        request: Request, namespace: Name, body: SettingsBody = read_settings
    ) -> SettingsView:
        """Needed where the namespace's or that of all (`*`) says so. 409 if it loosens a halt."""
        order = _order(request, namespace, body.reason, is_all_allowed=True)
        check_reason(order.reason)
        is_wanted = body.two_person_resume
        is_needed = await set_two_persons(node.database, node.node_id, order, is_wanted=is_wanted)
        return SettingsView(namespace, is_needed)


def _order(
    request: Request, namespace: str, reason: str | None, *, is_all_allowed: bool = False
) -> Order:
    if not (is_all_allowed and namespace == ALL):
        _check(namespace)
    actor = actor_of(request)
    check_namespace(actor, namespace)
    return Order(namespace, actor.name, actor.id, reason)


def _check(namespace: str) -> None:
    try:
        check_key(namespace)
    except ValueError as error:
        raise NotFound(f"there can be no such namespace: {error}") from error


def _answer(found: Halted) -> HaltAnswer:
    flights = sorted(found.in_flight, key=lambda one: one.outcome is not None)
    return HaltAnswer(
        namespace=found.namespace,
        epoch=found.epoch,
        quiesced=found.is_quiesced,
        fenced=found.is_fenced,
        in_force=found.is_in_force,
        seen=found.is_seen,
        halted_at=found.halted_at,
        until_at=found.until_at,
        waited_seconds=found.waited_seconds,
        in_flight_count=len(flights),
        still_out=sum(one.outcome is None for one in flights),
        known=found.is_known,
        in_flight=[flight_view(one) for one in flights[:MAX_IN_FLIGHT]],
    )
