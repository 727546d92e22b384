"""Cycles: triggered, listed, traced, run again."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from pydantic import Field

from orbit.api.access import actor_of, check_namespace, require, sees_payloads
from orbit.api.bodies import Bodies, Body, Key, PageFilter, Reason, body_schema, idempotency_key
from orbit.app import Node
from orbit.errors import DatabaseUnavailable, RequestInvalid
from orbit.execution.initiation import Accepted
from orbit.payload import DEFAULT_CONTENT_TYPE, Payload
from orbit.profiles.bridge import RAW_NAMESPACE
from orbit.reading.belonging import Kind, visible_id
from orbit.reading.cycles import MAX_LINEAGE, CycleSummary, Lineage, cycles, lineage
from orbit.reading.view import Page, View

RECENT = 20
_TEXT = "text/plain; charset=utf-8"
_ACCEPTANCE_SECONDS = 15.0
CycleRunId = Annotated[str, Path(alias="cycleRunId")]

Result = TypeVar("Result")


class TriggerBody(Body):
    """A raw cycle: what it passes on, in which namespace, to which endpoints.

    `payload` is any JSON value: text is sent as its UTF-8 bytes, anything else as compact JSON.
    Without a payload the cycle passes its initiation object on. Without `endpointKeys` it goes
    to `default-endpoint`, if there is one.
    """

    namespace: Key = RAW_NAMESPACE
    payload: Any = None
    payload_base64: str | None = None
    content_type: str | None = None
    endpoint_keys: list[Key] | None = Field(None, max_length=1000)

    def to_payload(self) -> Payload | None:
        """The payload; raises RequestInvalid where there are two, or it cannot be one."""
        has_payload = "payload" in self.model_fields_set
        if has_payload and self.payload_base64 is not None:
            raise RequestInvalid("/payload: expected either payload or payloadBase64, not both")
        if self.payload_base64 is not None:
            kind = DEFAULT_CONTENT_TYPE if self.content_type is None else self.content_type
            return Payload(_decoded(self.payload_base64), kind)
        if not has_payload:
            if self.content_type is not None:
                raise RequestInvalid("/contentType: there is no payload that it could be of")
            return None
        return _payload(self.payload, self.content_type)


class RerunBody(Body):
    """From where a failed cycle is run again: the stage that failed, or the start.

    `force` even if a re-run of it is running or has finished. `reason` is kept.
    """

    from_: Literal["failed", "start"] = Field("failed", alias="from")
    force: bool = False
    reason: Reason | None = None


class CycleFilter(PageFilter):
    """Which cycles are listed."""

    namespace: Key | None = None
    run_profile_id: Key | None = None
    state: Literal["running", "finished", "failed"] | None = None


@dataclass(frozen=True, slots=True)
class Triggered(View):
    """The cycle that a request belongs to, and whether it began with it."""

    cycle_run_id: str
    is_new: bool


def cycles_router(node: Node, bodies: Bodies) -> APIRouter:
    """The routes, for one node."""
    router = APIRouter(prefix="/cycles", tags=["cycles"])
    read_trigger, read_rerun = Depends(bodies.of(TriggerBody)), Depends(bodies.of(RerunBody))

    @router.post(
        "/trigger",
        dependencies=[Depends(require("operator"))],
        status_code=202,
        summary="Start a raw cycle",
        openapi_extra=body_schema(TriggerBody, is_required=False),
    )
    async def trigger(
        request: Request, response: Response, body: TriggerBody = read_trigger
    ) -> Triggered:
        """Repeated under its `Idempotency-Key`, a request gets the first one's cycle."""
        actor, keys = actor_of(request), body.endpoint_keys
        check_namespace(actor, body.namespace)
        accepted = await answered(
            node.orchestration.trigger_raw(
                namespace=body.namespace,
                payload=body.to_payload(),
                endpoint_keys=None if keys is None else list(dict.fromkeys(keys)),
                idempotency_key=idempotency_key(request),
                trigger=trigger_kind(request),
                asked_by=actor.name,
                is_bound=actor.namespaces is not None,
            )
        )
        return _triggered(accepted, response)

    @router.get("/recent", dependencies=[Depends(require("viewer"))], summary="The last 20 cycles")
    async def recent(request: Request) -> Page[CycleSummary]:
        page = await cycles(node.database, limit=RECENT, within=actor_of(request).within)
        return Page(page.items)

    @router.get("", dependencies=[Depends(require("viewer"))], summary="Cycles, newest first")
    async def listed(
        request: Request, asked: Annotated[CycleFilter, Query()]
    ) -> Page[CycleSummary]:
        """A filter that matches little may give short or empty pages with a cursor."""
        return await cycles(node.database, **asked.model_dump(), within=actor_of(request).within)

    @router.get(
        "/{cycleRunId}",
        dependencies=[Depends(require("viewer"))],
        summary="A cycle's whole lineage",
    )
    async def traced(
        request: Request,
        cycle_id: CycleRunId,
        limit: Annotated[int, Query(ge=1, le=MAX_LINEAGE)] = 1000,
    ) -> Lineage:
        """Items, jobs and records up to `limit` each; `isComplete` says whether that is all.

        Who may only look does not see receivers' answers, which may repeat a payload.
        """
        actor = actor_of(request)
        return await lineage(
            node.database, cycle_id, limit, actor.within, has_answers=sees_payloads(actor)
        )

    @router.post(
        "/{cycleRunId}/rerun",
        dependencies=[Depends(require("operator"))],
        status_code=202,
        summary="Run a failed cycle again",
        openapi_extra=body_schema(RerunBody, is_required=False),
    )
    async def rerun(
        request: Request,
        response: Response,
        cycle_id: CycleRunId,
        body: RerunBody = read_rerun,
    ) -> Triggered:
        """A new cycle, which names the old one; `Idempotency-Key` is honoured.

        409 `not_rerunnable` while a re-run is running or has finished, unless forced.
        """
        actor = actor_of(request)
        asked = await visible_id(node.database, Kind.CYCLE, cycle_id, actor.within)
        accepted = await answered(
            node.orchestration.rerun(
                asked,
                is_from_start=body.from_ == "start",
                is_forced=body.force,
                idempotency_key=idempotency_key(request),
                asked_by=actor.name,
                reason=body.reason,
            )
        )
        return _triggered(accepted, response)

    return router


async def answered(request: Awaitable[Result]) -> Result:
    """Bounds the wait for the database; raises DatabaseUnavailable when it is over."""
    try:
        async with asyncio.timeout(_ACCEPTANCE_SECONDS):
            return await request
    except TimeoutError:
        raise DatabaseUnavailable(
            "the database does not answer; the request may be accepted yet: repeat it under the "
            "same Idempotency-Key"
        ) from None


def trigger_kind(request: Request) -> str:
    """Which kind of trigger a request is: the command line names itself."""
    is_cli = request.headers.get("user-agent", "").startswith("orbit-cli/")
    return "cli" if is_cli else "api"


def _triggered(accepted: Accepted, response: Response) -> Triggered:
    response.headers["Location"] = f"/cycles/{accepted.cycle_id}"
    return Triggered(accepted.cycle_id, accepted.is_new)


def _payload(value: Any, content_type: str | None) -> Payload:
    if isinstance(value, str):
        return Payload.of_text(value, _TEXT if content_type is None else content_type)
    try:
        made = Payload.of_json(value)
    except (ValueError, RecursionError):
        raise RequestInvalid("/payload: expected a value that JSON can carry") from None
    return made if content_type is None else Payload(made.content, content_type)


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RequestInvalid("/payloadBase64: expected standard base64, padded") from None
