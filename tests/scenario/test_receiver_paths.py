"""Whichever way a path is mounted or spelt, nothing reaches the receiver's handler unverified."""

from __future__ import annotations

import http.client
import json

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

from orbit.receiver import Delivery, OrbitDeliveries
from tests.scenario.receiving import SECRET, TOKEN, genuine, serving

BODY = b'{"headline": "Good morning"}'


class Endpoint(HTTPEndpoint):
    """Takes whatever its router lets through; counts nothing unverified."""

    async def post(self, request: Request) -> Response:
        return PlainTextResponse(getattr(request.state, "delivery", Delivery("unverified")).id)


def verifying(path: str) -> Middleware:
    """The middleware, for one path."""
    return Middleware(OrbitDeliveries, token=TOKEN, signing_secret=SECRET, path=path)


def mounted(at: str) -> ASGIApp:
    """An application with the middleware of its own, below a path of another one."""
    inner = Starlette(routes=[Route("/orbit", Endpoint)], middleware=[verifying("/orbit")])
    return Starlette(routes=[Mount(at, inner)])


def behind_a_proxy() -> ASGIApp:
    """As a server does that is told the prefix which a proxy takes off."""
    return FastAPI(routes=[Route("/orbit", Endpoint)], middleware=[verifying("/orbit")])


def on_a_mount(at: str) -> ASGIApp:
    """The middleware around a mount's routes, told the mount's own path."""
    below = Mount("/orbit", routes=[Route("/in", Endpoint)], middleware=[verifying("/orbit")])
    return Starlette(routes=[Mount(at, routes=[below])])


@pytest.mark.parametrize(
    ("app", "root_path", "path"),
    [
        (mounted("/api"), "", "/api/orbit"),
        (mounted("/{tenant}"), "", "/brand-a/orbit"),
        (mounted("/orbit"), "", "/orbit/orbit"),
        (behind_a_proxy(), "/api", "/orbit"),
        (mounted("/v1"), "/api", "/v1/orbit"),
        (on_a_mount(""), "", "/orbit/in"),
        (on_a_mount("/api"), "/x", "/api/orbit/in"),
    ],
)
def test_below_a_prefix_nothing_passes_unverified(app: ASGIApp, root_path: str, path: str) -> None:
    """Mounted, or behind a server's root_path: a stranger is refused, the genuine one served."""
    with serving(app, root_path=root_path) as client:
        assert client.post(path, content=BODY).status_code == 401
        answer = client.post(path, content=BODY, headers=genuine("j1", BODY))
    assert (answer.status_code, answer.text) == (200, "j1")


@pytest.mark.parametrize(
    "target",
    ["/in", "/in/", "//in", "/./in", "/x/../in", "/%69n", "/in%0A", "/in%20", "/IN", "/in/x"],
)
@pytest.mark.parametrize("method", ["POST", "post", "QUERY"])
def test_no_spelling_of_a_path_passes_unverified(method: str, target: str) -> None:
    """Refused before any router, however it reads paths, could take it for the receiver's."""
    app = Starlette(routes=[Route("/in", Endpoint), Route("/{rest:path}", Endpoint)])
    app.add_middleware(OrbitDeliveries, token=TOKEN, path="/in")
    with serving(app) as client:
        host, port = client.base_url.host, client.base_url.port
        connection = http.client.HTTPConnection(host, port, timeout=60)
        connection.request(method, target, BODY)
        answer = connection.getresponse()
        said = (answer.status, json.loads(answer.read())["code"])
        connection.close()
    assert said == (401, "bearer_invalid")


@pytest.mark.parametrize("path", ["in", "/in/", "", "/"])
def test_no_spelling_of_the_setting_opens_the_door(path: str) -> None:
    """Without its slash, or empty, `path` still has the handler's."""
    app = Starlette(routes=[Route("/in", Endpoint)])
    app.add_middleware(OrbitDeliveries, token=TOKEN, path=path)
    with serving(app) as client:
        assert client.post("/in", content=BODY).status_code == 401
