"""The application: the routes of one node behind the gate that every request passes."""

from __future__ import annotations

from fastapi import FastAPI

from orbit import __version__
from orbit.api.access import Access, check_scopes
from orbit.api.bodies import Bodies
from orbit.api.gate import Gate
from orbit.api.metrics import metrics_router
from orbit.api.openapi import PROBLEM_RESPONSES, describe, docs_router
from orbit.api.problems import install
from orbit.api.routes_audit import audit_router
from orbit.api.routes_autonomy import autonomy_router
from orbit.api.routes_configuration import configuration_router
from orbit.api.routes_consumers import consumers_router
from orbit.api.routes_cycles import cycles_router
from orbit.api.routes_dead_letters import dead_letters_router
from orbit.api.routes_drills import drills_router
from orbit.api.routes_governance import governance_router
from orbit.api.routes_keys import keys_router
from orbit.api.routes_lanes import lanes_router
from orbit.api.routes_node import node_router
from orbit.api.routes_outcomes import outcomes_router
from orbit.api.routes_proposals import proposals_router
from orbit.api.routes_session import session_router
from orbit.api.routes_signals import signals_router
from orbit.api.routes_telemetry import telemetry_router
from orbit.app import Node
from orbit.governance.actor import Actor

_BODY_OVERHEAD_BYTES = 64 << 10
_ABOUT = (
    "A control plane for unattended work. Lists answer {items, nextCursor}; errors are problem "
    "documents with a stable code; a trigger repeated under its Idempotency-Key starts nothing new."
)


def create_application(
    node: Node, *, is_probe_only: bool = False, local: Actor | None = None
) -> FastAPI:
    """The HTTP API of a node, which may still be opening.

    With `is_probe_only` it answers /health, /ready and /metrics and nothing else. `local` is who
    asks where the application is asked in its own process only.
    """
    application = FastAPI(
        title="Orbit",
        version=__version__,
        description=_ABOUT,
        openapi_url=None,  # a route of ours, which needs a key as the others do
        docs_url=None,
        redoc_url=None,
        responses=PROBLEM_RESPONSES,
        generate_unique_id_function=lambda route: f"{route.tags[0]}_{route.name}",
        redirect_slashes=False,
        # Its own spans and logs would hold queries, bodies and errors.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    settings = node.settings
    # Base64 takes four bytes for three.
    limit = settings.max_payload_bytes * 4 // 3 + _BODY_OVERHEAD_BYTES
    bodies = Bodies(limit, settings.payload_memory_bytes)
    for router in (
        node_router(node),
        metrics_router(node),
        cycles_router(node, bodies),
        configuration_router(node, bodies),
        dead_letters_router(node, bodies),
        lanes_router(node),
        signals_router(node),
        proposals_router(node, bodies),
        autonomy_router(node, bodies),
        governance_router(node, bodies),
        drills_router(node, bodies),
        audit_router(node),
        consumers_router(node, bodies),
        telemetry_router(node),
        outcomes_router(node, bodies),
        keys_router(node, bodies),
        session_router(node),
        docs_router(application),
    ):
        application.include_router(router)
    check_scopes(application)
    application.state.node = node
    install(application)
    describe(application)
    application.add_middleware(Access, node=node, local=local)
    application.add_middleware(Gate, node=node, is_probe_only=is_probe_only, limit_bytes=limit)
    return application
