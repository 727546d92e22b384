"""`GET /metrics`: what the node counted, and what it has in hand at this moment.

Prometheus text, or JSON for who asks for it. What all nodes share costs two queries, which are
bounded; it is left out while the database does not answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, Metric, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry

from orbit import __version__
from orbit.api.access import require
from orbit.app import Node
from orbit.database.pool import TRANSIENT
from orbit.metrics import REGISTRY
from orbit.reading.consumers import most_behind
from orbit.reading.lanes import dispatch_load

_SHARED_SECONDS = 2.0
_SHARED = {
    "lanes_held": ("orbit_lanes_held", "Lanes that all nodes' breakers hold."),
    "waiting": ("orbit_jobs_waiting", "Jobs of all nodes to be sent, counted up to 10,000."),
    "in_flight": ("orbit_jobs_in_flight", "Attempts of all nodes, counted up to 10,000."),
    "consumer_behind": (
        "orbit_telemetry_consumer_behind_events",
        "Events that the stored consumer furthest behind has yet to read.",
    ),
}


class NodeCollector(Collector):
    """The gauges of one node, read when they are asked for."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def collect(self) -> Iterator[Metric]:
        """Every gauge with its value now."""
        node = self._node
        info = GaugeMetricFamily("orbit_node_info", "This program.", labels=["version"])
        info.add_metric([__version__], 1)
        yield info
        yield _gauge("orbit_node_ready", "Whether this node takes work on.", node.is_ready)
        yield _gauge("orbit_node_draining", "Whether this node is leaving.", node.is_draining)
        cycles = len(node.runner.running) if node.runner else 0
        yield _gauge("orbit_cycles_in_hand", "Cycles that this node is carrying on.", cycles)
        attempts = node.dispatcher.in_flight if node.dispatcher else 0
        yield _gauge("orbit_attempts_in_flight", "Attempts on the wire from this node.", attempts)
        is_in_step = not hasattr(node, "configuration") or node.configuration.is_in_step
        text = "Whether this node's files say what is in force."
        yield _gauge("orbit_configuration_in_step", text, is_in_step)
        signer = getattr(node, "signer", None)
        text = (
            "Since this node last signed what is new in the audit trail; absent if it never does."
        )
        age = GaugeMetricFamily("orbit_audit_checkpoint_age_seconds", text)
        if signer is not None:
            age.add_metric([], signer.age_seconds)
        yield age


class SharedCollector(Collector):
    """The gauges of what all nodes share, as they were just read."""

    def __init__(self, load: Mapping[str, int] | None = None) -> None:
        self._load = dict.fromkeys(_SHARED, 0) if load is None else load

    def collect(self) -> Iterator[Metric]:
        """A gauge for each count."""
        for name, value in self._load.items():
            yield _gauge(*_SHARED[name], value)


def metrics_router(node: Node) -> APIRouter:
    """The route, for one node."""
    own = NodeCollector(node)
    router = APIRouter(tags=["node"])

    @router.get(
        "/metrics",
        dependencies=[Depends(require("viewer", is_everywhere=True))],
        response_class=Response,
        summary="Metrics of this node",
    )
    async def metrics(request: Request) -> Response:
        """Prometheus text; JSON if `Accept` asks for `application/json`."""
        now = CollectorRegistry()
        now.register(own)
        now.register(SharedCollector(await _load(node)))
        if "application/json" in request.headers.get("accept", ""):
            families = [*now.collect(), *REGISTRY.collect()]
            return JSONResponse({"items": [_family(one) for one in families]})
        text = generate_latest(now) + generate_latest(REGISTRY)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    return router


async def _load(node: Node) -> dict[str, int]:
    if not node.is_ready:
        return {}
    try:
        async with asyncio.timeout(_SHARED_SECONDS):
            return await dispatch_load(node.database) | await most_behind(node.database)
    except (*TRANSIENT, TimeoutError):
        return {}


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=float(value))


def _family(family: Metric) -> dict[str, Any]:
    return {
        "name": family.name,
        "help": family.documentation,
        "type": family.type,
        "samples": [
            {"name": one.name, "labels": one.labels, "value": one.value} for one in family.samples
        ],
    }
