"""What every request passes first, and what every answer carries.

Refuses requests that a web page of another site could make a browser send: a Host that is not
ours (DNS rebinding), and changes whose Origin is another site. Refuses what the node cannot
serve yet, or no more, and bodies that are larger than any. Adds the headers that keep answers
from being cached, sniffed, framed or read by other sites: none of them allows another origin.
"""

from __future__ import annotations

import ipaddress
from http import HTTPStatus
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orbit import tracing
from orbit.api.problems import HttpRefusal, problem_of, unexpected
from orbit.api.refusals import SAFE_METHODS, method_of
from orbit.app import Node
from orbit.errors import PayloadTooLarge
from orbit.governance.refusals import Refusal
from orbit.governance.slowing import source_of

PROBES = frozenset({"/health", "/ready", "/metrics"})
# Without a database nobody's key can be looked at, so these answer only who needs none.
_WITHOUT_DATABASE = PROBES | {"/openapi.json", "/docs"}
_OTHER_SITES = frozenset({"host_refused", "origin_refused"})
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_TRANSPORT = "max-age=31536000"


class Gate:
    """ASGI middleware; the outermost."""

    def __init__(self, app: ASGIApp, node: Node, *, is_probe_only: bool, limit_bytes: int) -> None:
        self._app, self._node, self._is_probe_only = app, node, is_probe_only
        self._limit = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def answer(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                _add_headers(message, is_secure=scope["scheme"] == "https")
            await send(message)

        try:
            self._check(scope)
            tracing.called_by(Headers(scope=scope).get("traceparent"))
            await self._app(scope, receive, answer)
        except (HttpRefusal, PayloadTooLarge) as refusal:
            await self._note(scope, refusal)
            await problem_of(refusal)(scope, receive, answer)
        except Exception as error:
            if has_begun:
                raise
            await unexpected(error)(scope, receive, answer)

    async def _note(self, scope: Scope, error: HttpRefusal | PayloadTooLarge) -> None:
        """The trail tells of pages of other sites that tried; who that was nobody was asked."""
        code = getattr(error, "http_code", "")
        if code in _OTHER_SITES and hasattr(self._node, "refusals"):
            source = source_of(scope["client"][0] if scope.get("client") else None)
            refusal = Refusal(f"{method_of(scope)} (of a page)", code, str(error), is_act=False)
            await self._node.refusals.note_stranger(source, refusal)

    def _check(self, scope: Scope) -> None:
        path, headers = scope["path"], Headers(scope=scope)
        is_change = scope["method"] not in SAFE_METHODS
        if path != "/health":
            self._check_host(headers.get("host", ""))
        if is_change:
            _check_origin(headers)
        size = headers.get("content-length", "")
        if size.isascii() and size.isdigit() and (len(size) > 18 or int(size) > self._limit):
            text = f"the request's body is larger than {self._limit:,} bytes"
            raise PayloadTooLarge(f"{text} (ORBIT_MAX_PAYLOAD_BYTES)")
        if self._is_probe_only and path not in PROBES:
            text = "this node has no api role (ORBIT_ROLES)"
            raise HttpRefusal(HTTPStatus.NOT_FOUND, "not_found", text)
        if is_change and self._node.is_draining:
            text = "the node is leaving; ask another"
            raise HttpRefusal(HTTPStatus.SERVICE_UNAVAILABLE, "draining", text)
        if path not in _WITHOUT_DATABASE and not hasattr(self._node, "orchestration"):
            text = "the node is starting; try again"
            raise HttpRefusal(HTTPStatus.SERVICE_UNAVAILABLE, "not_started", text)

    def _check_host(self, host: str) -> None:
        name, settings = _host_name(host), self._node.settings
        is_known = name in {settings.host.lower(), *settings.allowed_hosts} or _is_loopback(name)
        # A name may be made to lead here by anybody; an address is where it leads.
        if not (is_known or (not settings.is_loopback and _is_address(name))):
            text = "the Host header names another host than this one"
            raise HttpRefusal(HTTPStatus.MISDIRECTED_REQUEST, "host_refused", text)


def _check_origin(headers: Headers) -> None:
    origin = headers.get("origin")
    if origin is None:
        return
    try:
        netloc = urlsplit(origin).netloc
    except ValueError:
        netloc = ""
    if not netloc or netloc.lower() != headers.get("host", "").lower():
        text = "a page of another site may not change anything here"
        raise HttpRefusal(HTTPStatus.FORBIDDEN, "origin_refused", text)


def _host_name(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    return _is_address(name) and ipaddress.ip_address(name).is_loopback


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _add_headers(message: Message, *, is_secure: bool) -> None:
    headers = MutableHeaders(scope=message)
    for name, value in _HEADERS.items():
        headers.setdefault(name, value)
    headers.setdefault("Content-Security-Policy", _POLICY)
    if is_secure:
        headers.setdefault("Strict-Transport-Security", _TRANSPORT)
