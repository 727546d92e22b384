"""The audit trail: listed, and exported for whoever verifies it elsewhere.

Reads only. An export is streamed as it is read; one that breaks off lacks its last line, which
verification says.
"""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from pydantic import Field
from starlette.responses import StreamingResponse

from orbit.api.access import actor_of, check_namespace, require
from orbit.api.bodies import Filter, Instant, Key, PageFilter
from orbit.app import Node, checkpoint_folder
from orbit.audit.export import export
from orbit.errors import RequestInvalid
from orbit.governance.actor import Actor
from orbit.reading.audit import AuditEntry, audit_entries
from orbit.reading.view import Page

Log = Key | Annotated[str, Field(pattern=r"^\*$")]
Text = Annotated[str, Field(min_length=1, max_length=200)]
MEDIA_TYPE = "application/x-ndjson"


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
        """Entries, hashes and bytes of sealed facts, and this node's checkpoints, signed anew."""
        log = _log_for(actor_of(request), asked.namespace)
        if node.signer is not None:
            await asyncio.to_thread(node.signer.sign_all)
        lines = export(node.database.dsn, checkpoint_folder(node.settings), log)
        return StreamingResponse(lines, media_type=MEDIA_TYPE)

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
