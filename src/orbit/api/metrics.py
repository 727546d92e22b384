"""`GET /metrics`: what the node counted, and what it has in hand at this moment.

Prometheus text, or JSON for who asks for it. Costs no query.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, Metric, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry

from orbit import __version__
from orbit.app import Node
from orbit.metrics import REGISTRY


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


def metrics_router(node: Node) -> APIRouter:
    """The route, for one node."""
    own = CollectorRegistry()
    own.register(NodeCollector(node))
    router = APIRouter(tags=["node"])

    @router.get("/metrics", response_class=Response, summary="Metrics of this node")
    async def metrics(request: Request) -> Response:
        """Prometheus text; JSON if `Accept` asks for `application/json`."""
        if "application/json" in request.headers.get("accept", ""):
            families = [*own.collect(), *REGISTRY.collect()]
            return JSONResponse({"items": [_family(one) for one in families]})
        text = generate_latest(own) + generate_latest(REGISTRY)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    return router


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
