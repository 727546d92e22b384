"""Whether the node lives, whether it is ready, and the overview of all nodes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from http import HTTPStatus

from fastapi import APIRouter, Depends, Request

from orbit import __version__
from orbit.api.access import actor_of, anyone, require
from orbit.api.problems import HttpRefusal
from orbit.app import Node
from orbit.database.pool import TRANSIENT
from orbit.database.upgrade import HEAD
from orbit.errors import DatabaseUnavailable, SchemaMismatch
from orbit.reading.overview import Status, probe, status
from orbit.reading.view import View

_PROBE_SECONDS = 2.0
_PROBE_KEPT_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Health(View):
    """The process is up."""

    status: str
    version: str
    node_id: str


@dataclass(frozen=True, slots=True)
class Ready(View):
    """The node takes work on.

    `audit_contradictions`: in how many logs the trail is not what this node signed; /status says
    which.
    """

    status: str
    node_id: str
    revision: str
    is_in_step: bool
    audit_contradictions: int


def node_router(node: Node) -> APIRouter:
    """The routes, for one node."""
    router = APIRouter(tags=["node"])
    database = _DatabaseProbe(node)

    @router.get("/health", dependencies=[Depends(anyone)], summary="Whether the process is up")
    async def health() -> Health:
        """Never asks the database."""
        return Health("up", __version__, node.node_id)

    @router.get(
        "/ready",
        dependencies=[Depends(anyone)],
        summary="Whether the node takes work on",
    )
    async def ready() -> Ready:
        """503 with the reason where it does not: starting, leaving, database or schema."""
        if node.is_draining:
            raise _unready("draining", "the node is leaving")
        if not node.is_ready:
            raise _unready("not_started", "the node is starting")
        await database.check()
        configuration = node.configuration
        return Ready(
            "ready",
            node.node_id,
            configuration.active.revision,
            configuration.is_in_step,
            len(node.signer.contradictions) if node.signer else 0,
        )

    @router.get(
        "/status",
        dependencies=[Depends(require("viewer"))],
        summary="The overview of all nodes",
    )
    async def overview(request: Request) -> Status:
        """Cheap however long the history is; counts are bounded."""
        return await status(
            node.database,
            lease_seconds=node.settings.lease_seconds,
            is_paused=node.settings.global_pause,
            within=actor_of(request).within,
            contradictions=node.signer.contradictions if node.signer else {},
        )

    return router


class _DatabaseProbe:
    """Asks the database, for all who ask within a moment once: anybody may."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._task: asyncio.Task[None] | None = None
        self._begun_at = 0.0

    async def check(self) -> None:
        """Raises DatabaseUnavailable and SchemaMismatch."""
        now = asyncio.get_running_loop().time()
        task = self._task
        if task is None or (task.done() and now - self._begun_at > _PROBE_KEPT_SECONDS):
            self._begun_at = now
            task = self._task = asyncio.create_task(_check_database(self._node))
        await asyncio.shield(task)


async def _check_database(node: Node) -> None:
    try:
        async with asyncio.timeout(_PROBE_SECONDS):
            schema = await probe(node.database)
    except (*TRANSIENT, TimeoutError):
        text = f"the database did not answer within {_PROBE_SECONDS:g} s"
        raise DatabaseUnavailable(text) from None
    if schema != HEAD:
        raise SchemaMismatch(f"the database's schema is {schema}, this program needs {HEAD}")


def _unready(code: str, text: str) -> HttpRefusal:
    return HttpRefusal(HTTPStatus.SERVICE_UNAVAILABLE, code, text)
