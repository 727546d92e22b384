"""The API's description: OpenAPI, and a page for people that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from html import escape
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.responses import HTMLResponse, JSONResponse

from orbit.api.access import declared_scopes, require
from orbit.api.problems import MEDIA_TYPE

_PROBLEM = {
    "type": "object",
    "description": "An RFC 9457 problem document; members beside these belong to the code.",
    "required": ["type", "title", "status", "detail", "code"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "code": {"type": "string", "description": "Stable; match on this."},
    },
    "additionalProperties": True,
}
_REFERENCE = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
# With "4XX" declared, FastAPI adds no 422 of its own.
PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The request is refused.", "content": _REFERENCE},
    "5XX": {"description": "The node cannot answer now.", "content": _REFERENCE},
}

_SECURITY = {
    "key": {"type": "http", "scheme": "bearer", "description": "An access key: orb_…"},
}

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
code { font: 14px ui-monospace, monospace }
dt { margin-top: 1rem } dd { margin-left: 0 }
"""
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_POLICY = f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; frame-ancestors 'none'"


def describe(application: FastAPI) -> None:
    """Adds the problem document to the application's OpenAPI, which is made once."""

    def openapi() -> dict[str, Any]:
        if application.openapi_schema is None:
            schema = get_openapi(
                title=application.title,
                version=application.version,
                description=application.description,
                routes=application.routes,
            )
            components = schema.setdefault("components", {})
            components.setdefault("schemas", {})["Problem"] = _PROBLEM
            components["securitySchemes"] = _SECURITY
            _name_scopes(schema, declared_scopes(application))
            application.openapi_schema = schema
        return application.openapi_schema

    application.openapi = openapi  # type: ignore[method-assign]


def _name_scopes(schema: dict[str, Any], scopes: Mapping[tuple[str, str], list[str]]) -> None:
    """Each operation says which scope it needs; what is open needs no key."""
    for (method, path), (scope,) in scopes.items():
        operation = schema["paths"].get(path, {}).get(method.lower())
        if operation is not None:
            operation["x-orbit-scope"] = scope
            operation["security"] = [] if scope == "open" else [{"key": []}]


def docs_router(application: FastAPI) -> APIRouter:
    """The description, for tools and as a page for people."""
    router = APIRouter(tags=["node"], dependencies=[Depends(require("viewer"))])

    @router.get("/openapi.json", include_in_schema=False)
    async def schema() -> JSONResponse:
        return JSONResponse(application.openapi())

    @router.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        policy = {"Content-Security-Policy": _POLICY}
        return HTMLResponse(_page(application.openapi()), headers=policy)

    return router


def _page(schema: dict[str, Any]) -> str:
    info = schema["info"]
    name = escape(info["title"])
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{name} API</title>",
        f"<style>{_STYLE}</style><h1>{name} {escape(info['version'])}</h1>",
        f"<p>{escape(info.get('description', ''))}</p>",
        '<p>For tools: <a href="openapi.json">openapi.json</a></p>',
    ]
    tag = None
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            group = (operation.get("tags") or ["other"])[0]
            if group != tag:
                parts.append(f"{'</dl>' if tag else ''}<h2>{escape(group)}</h2><dl>")
                tag = group
            parts.append(_operation(method, path, operation))
    return "".join([*parts, "</dl></html>"])


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    names = [one["name"] for one in operation.get("parameters", ()) if one["in"] == "query"]
    content = operation.get("requestBody", {}).get("content", {})
    body = content.get("application/json", {}).get("schema", {}).get("properties", {})
    lines = [escape(operation.get("summary", ""))]
    if operation.get("description"):
        lines.append(escape(operation["description"]))
    for label, given in (("Parameters", names), ("Body", list(body))):
        if given:
            lines.append(f"{label}: " + ", ".join(f"<code>{escape(one)}</code>" for one in given))
    lines.append(f"Scope: {escape(operation['x-orbit-scope'])}")
    shown = f"<code>{method.upper()} {escape(path)}</code>"
    return f"<dt>{shown}</dt><dd>{'<br>'.join(lines)}</dd>"
