"""The audit trail: listed, and exported for whoever verifies it elsewhere.

Reads only. An export is written to a file here first, so that the database is read as fast as it
can be and not as fast as the client reads; few at a time, since each has a connection and a
snapshot of its own. One that breaks off lacks its last line, which verification says.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from pydantic import Field
from starlette.responses import StreamingResponse

from orbit.api.access import actor_of, check_namespace, require
from orbit.api.bodies import Filter, Instant, Key, PageFilter
from orbit.api.exports import MEDIA_TYPE, Exports
from orbit.app import Node
from orbit.errors import RequestInvalid
from orbit.governance.actor import Actor
from orbit.reading.audit import AuditEntry, audit_entries
from orbit.reading.view import Page

Log = Key | Annotated[str, Field(pattern=r"^\*$")]
Text = Annotated[str, Field(min_length=1, max_length=200)]


class AuditFilter(PageFilter):
    """Which entries are listed; `namespace` `*` is the whole installation's log."""

    namespace: Log | None = None
    action: Text | None = None
    actor: Text | None = None
    since: Instant | None = None
    until: Instant | None = None


class ExportFilter(Filter):
    """Which log is exported; all that there are for who asks, unless it is said."""

    namespace: Log | None = None


def audit_router(node: Node) -> APIRouter:
    """The routes, for one node."""
    router = APIRouter(prefix="/audit", tags=["audit"])
    exports = Exports(node)

    @router.get(
        "", dependencies=[Depends(require("viewer"))], summary="Audit entries, newest first"
    )
    async def listed(request: Request, asked: Annotated[AuditFilter, Query()]) -> Page[AuditEntry]:
        """A filter that matches little may give short or empty pages with a cursor."""
        within = actor_of(request).within
        return await audit_entries(node.database, **asked.model_dump(), within=within)

    @router.get(
        "/export",
        dependencies=[Depends(require("viewer"))],
        summary="The audit trail as JSON lines, for verification elsewhere",
        response_class=StreamingResponse,
        responses={200: {"content": {MEDIA_TYPE: {}}}},
    )
    async def exported(
        request: Request, asked: Annotated[ExportFilter, Query()]
    ) -> StreamingResponse:
        """Entries, hashes and bytes of sealed facts, and this node's checkpoints."""
        actor = actor_of(request)
        log = _log_for(actor, asked.namespace)
        return await exports.answer(actor, log)

    return router


def _log_for(actor: Actor, namespace: str | None) -> str | None:
    """The log that is exported; None is all of them, which is for who is in every namespace."""
    if namespace is not None:
        check_namespace(actor, namespace)
        return namespace
    if actor.within is None:
        return None
    if len(actor.within) > 1:
        raise RequestInvalid("namespace: one log at a time; name one of your namespaces")
    return actor.within[0]
