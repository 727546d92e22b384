"""Every route of the API with the least scope that opens it, written out.

It is not read from the application: a route that is added, or one that asks for another scope than
before, has to be written here too, by somebody who has thought about it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ROUTES: Mapping[tuple[str, str], str] = {
    ("GET", "/health"): "open",
    ("GET", "/ready"): "open",
    ("GET", "/session/open"): "open",
    ("GET", "/metrics"): "viewer everywhere",
    ("GET", "/status"): "viewer",
    ("GET", "/openapi.json"): "viewer",
    ("GET", "/docs"): "viewer",
    ("GET", "/config"): "viewer",
    ("GET", "/profiles"): "viewer",
    ("GET", "/run-profiles"): "viewer",
    ("GET", "/cycles"): "viewer",
    ("GET", "/cycles/recent"): "viewer",
    ("GET", "/cycles/{cycleRunId}"): "viewer",
    ("GET", "/slots"): "viewer",
    ("GET", "/lanes"): "viewer",
    ("GET", "/lanes/{namespace}/{endpointKey}"): "viewer",
    ("GET", "/dead-letters"): "viewer",
    ("GET", "/dead-letters/groups"): "viewer",
    ("GET", "/dead-letters/{jobId}"): "viewer",
    ("GET", "/dead-letters/requeues"): "viewer",
    ("GET", "/dead-letters/requeues/{batchId}"): "viewer",
    ("GET", "/governance/namespaces/{namespace}"): "viewer",
    ("GET", "/audit"): "viewer",
    ("GET", "/audit/export"): "viewer",
    ("GET", "/profiles/{profileId}/signals"): "viewer",
    ("GET", "/proposals"): "viewer",
    ("GET", "/proposals/{proposalId}"): "viewer",
    ("GET", "/autonomy"): "viewer",
    ("GET", "/autonomy/{profileId}"): "viewer",
    ("GET", "/telemetry"): "viewer",
    ("GET", "/telemetry/stream"): "viewer",
    ("GET", "/telemetry/consumers"): "viewer",
    ("GET", "/telemetry/consumers/{name}"): "viewer",
    ("POST", "/telemetry/consumers"): "operator everywhere",
    ("POST", "/telemetry/consumers/{name}/commit"): "operator",
    ("POST", "/telemetry/consumers/{name}/remove"): "operator everywhere",
    ("GET", "/session"): "viewer",
    ("POST", "/session"): "viewer",
    ("DELETE", "/session"): "viewer",
    ("POST", "/session/links"): "viewer",
    ("POST", "/cycles/trigger"): "operator",
    ("POST", "/cycles/{cycleRunId}/rerun"): "operator",
    ("POST", "/run-profiles/trigger"): "operator",
    ("POST", "/profiles/{profileId}/disable"): "operator",
    ("POST", "/profiles/{profileId}/enable"): "operator",
    ("POST", "/run-profiles/{runProfileId}/disable"): "operator",
    ("POST", "/run-profiles/{runProfileId}/enable"): "operator",
    ("POST", "/profiles/{profileId}/signals"): "operator",
    ("POST", "/profiles/{profileId}/strategy-proposals"): "operator",
    ("POST", "/proposals/{proposalId}/approve"): "approver",
    ("POST", "/proposals/{proposalId}/reject"): "approver",
    ("POST", "/autonomy/{profileId}/shadow"): "operator",
    ("POST", "/autonomy/{profileId}/disarm"): "operator",
    ("POST", "/autonomy/{profileId}/revert"): "operator",
    ("POST", "/autonomy/{profileId}/arm"): "admin",
    ("POST", "/outcomes"): "operator",
    ("POST", "/dead-letters/requeue"): "operator",
    ("POST", "/dead-letters/requeues/{batchId}/cancel"): "operator",
    ("POST", "/dead-letters/{jobId}/requeue"): "operator",
    ("POST", "/dead-letters/{jobId}/discard"): "operator",
    ("POST", "/governance/namespaces/{namespace}/halt"): "operator",
    ("POST", "/governance/namespaces/{namespace}/resume"): "operator or approver",
    ("POST", "/governance/drills/halt"): "operator everywhere",
    ("POST", "/governance/namespaces/{namespace}/settings"): "admin",
    ("GET", "/keys"): "admin",
    ("POST", "/keys"): "admin",
    ("POST", "/keys/{keyId}/rotate"): "admin",
    ("POST", "/keys/{keyId}/revoke"): "admin",
    ("POST", "/config/validate"): "admin everywhere",
    ("POST", "/config/reload"): "admin everywhere",
}

OF_A_NAMESPACE = frozenset(
    {"namespace", "namespaces", "runProfileId", "runProfileIds", "endpointKey", "endpointKeys"}
)


def inputs(description: Mapping[str, Any]) -> dict[tuple[str, str], tuple[set[str], set[str]]]:
    """By method and path of an OpenAPI description: names of the query's, and of the body's."""
    found = {}
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            query = {one["name"] for one in operation.get("parameters", ()) if one["in"] == "query"}
            content = operation.get("requestBody", {}).get("content", {})
            schema = content.get("application/json", {}).get("schema", {})
            found[method.upper(), path] = query, set(schema.get("properties", {}))
    return found
