"""Who may ask what: authentication before anything of a request is read, a scope on every route.

Every path needs an actor but those that are declared open; a route without a declared scope does
not come into being (`check_scopes`). What a namespace-bound actor may not see does not exist: it
gets the answer of an unknown id or name, and never a 403, which is about scopes alone.

A key in `Authorization` decides alone: a session beside it rescues nobody. A change that a browser
makes with its session needs the session's CSRF token too. What goes wrong while it is decided
denies; a wrong key, an unknown one, one that has ended and one that is no key get one answer.
"""

from __future__ import annotations

import hmac
import math
from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.routing import iter_route_contexts
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as AsgiScope

from orbit.api.problems import HttpRefusal, database_away
from orbit.api.refusals import SAFE_METHODS, method_of
from orbit.app import Node
from orbit.database.pool import TRANSIENT
from orbit.errors import NotFound
from orbit.governance.actor import ANYONE, Actor, Scope
from orbit.governance.authentication import TooManyFailures
from orbit.governance.refusals import Refusal
from orbit.governance.sessions import csrf_token
from orbit.governance.slowing import source_of

OPEN_PATHS = frozenset({"/health", "/ready", "/session/open"})
COOKIE = "orbit_session"
SECURE_COOKIE = f"__Host-{COOKIE}"
CSRF_HEADER = "x-csrf-token"
_PRESENTED_BYTES = 512
_DECLARED = "orbit_scope"


class Access:
    """ASGI middleware: finds out who asks; within the gate, around every route.

    `local` asks in this very process and needs no key: it has the database.
    """

    def __init__(self, app: ASGIApp, node: Node, local: Actor | None) -> None:
        self._app, self._node, self._local = app, node, local

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        try:
            actor = state["actor"] = await self._actor(Request(scope))
        except TRANSIENT as error:
            await database_away(error)(scope, receive, send)
            return

        async def answer(message: Message) -> None:
            """The trail has a refusal before who asked has it."""
            refusal = state.pop("refusal", None)
            if refusal is not None and actor is not None:
                await self._note(actor, refusal)
            await send(message)

        await self._app(scope, receive, answer)

    async def _actor(self, request: Request) -> Actor | None:
        settings = self._node.settings
        if self._local is not None:
            return self._local
        if settings.auth == "off":
            return ANYONE
        path = request.url.path
        if path in OPEN_PATHS or (path == "/metrics" and settings.metrics_open):
            return None
        if not hasattr(self._node, "authentication"):
            text = "the node is starting; try again"
            raise HttpRefusal(HTTPStatus.SERVICE_UNAVAILABLE, "not_started", text)
        try:
            actor = await self._presented(request)
        except TooManyFailures as pause:
            raise too_many(pause) from None
        if actor is None:
            raise unauthenticated(request)
        return actor

    async def _presented(self, request: Request) -> Actor | None:
        authentication, source = self._node.authentication, client_of(request)
        given = request.headers.getlist("authorization")
        if given:
            return await authentication.by_key(_bearer(given), source)
        secret = session_secret(request)
        if secret is None:
            return None
        actor = await authentication.by_session(secret)
        if actor is not None and request.method not in SAFE_METHODS:
            try:
                _check_csrf(request, secret)
            except HttpRefusal as error:
                what = f"{method_of(request.scope)} (with a session)"
                refusal = Refusal(what, error.http_code, str(error), is_act=False)
                await self._note(actor, refusal)
                raise
        return actor

    async def _note(self, actor: Actor, refusal: Refusal) -> None:
        if hasattr(self._node, "refusals"):
            await self._node.refusals.note(actor, refusal)


def require(*scopes: str, is_everywhere: bool = False) -> Callable[[Request], Awaitable[None]]:
    """A dependency that lets those with one of the scopes pass.

    With `is_everywhere` only those who have it in all namespaces.
    """
    needed = [Scope(scope) for scope in scopes]
    named = " or ".join(needed)

    async def check(request: Request) -> None:
        if request.app.state.node.settings.metrics_open and request.url.path == "/metrics":
            return
        actor = actor_of(request)
        may = any(map(actor.may, needed))
        if may and (actor.namespaces is None or not is_everywhere):
            return
        place = " in every namespace" if is_everywhere else ""
        text = f"this needs the scope {named}{place}"
        raise HttpRefusal(HTTPStatus.FORBIDDEN, "forbidden", text)

    setattr(check, _DECLARED, f"{named}{' everywhere' if is_everywhere else ''}")
    return check


async def anyone(request: Request) -> None:
    """The dependency of what is open to all."""


setattr(anyone, _DECLARED, "open")


def actor_of(request: Request) -> Actor:
    """Who asks; raises the 401 where nobody does."""
    actor = getattr(request.state, "actor", None)
    if not isinstance(actor, Actor):
        raise unauthenticated()
    return actor


async def actor_again(request: Request) -> Actor | None:
    """Who asked, looked at anew, for an answer that takes long; None: the key is good no more."""
    actor, node = actor_of(request), request.app.state.node
    if actor.key_id is None:
        return actor
    try:
        given = request.headers.getlist("authorization")
        if given:
            found = await node.authentication.by_key(_bearer(given), client_of(request))
        else:
            found = await node.authentication.by_session(session_secret(request) or "")
    except TooManyFailures:
        return None
    return found if isinstance(found, Actor) else None


def check_namespace(actor: Actor, namespace: str) -> None:
    """Raises NotFound for a namespace that is not there for the actor."""
    if not actor.sees(namespace):
        raise NotFound(f"there is no namespace {namespace}")


def sees_payloads(actor: Actor) -> bool:
    """Whether what may repeat a payload is shown: to all but who may only look."""
    return actor.may(Scope.OPERATOR) or actor.may(Scope.APPROVER)


def declared_scopes(application: FastAPI) -> dict[tuple[str, str], list[str]]:
    """The scopes that each method and path declares; a route without one has none."""
    found = {}
    for route in iter_route_contexts(application.routes):
        dependant = getattr(route, "dependant", None)
        scopes = [] if dependant is None else list(_declared(dependant))
        for method in sorted(route.methods or {"*"}):
            found[method, str(route.path)] = scopes
    return found


def check_scopes(application: FastAPI) -> None:
    """Raises RuntimeError unless every route declares who may ask it, once."""
    scopes = declared_scopes(application)
    wrong = [f"{method} {path}" for (method, path), found in scopes.items() if len(found) != 1]
    if wrong:
        raise RuntimeError(f"routes without exactly one scope: {', '.join(wrong)}")


def session_secret(request: Request) -> str | None:
    """The secret of the browser's session; over TLS only the cookie that TLS protects counts."""
    name = SECURE_COOKIE if request.url.scheme == "https" else COOKIE
    secret = request.cookies.get(name)
    return secret[:_PRESENTED_BYTES] if secret else None


def client_of(request: Request) -> str:
    """What failures of this request are counted by."""
    return source_of(request.client.host if request.client else None)


def unauthenticated(request: Request | None = None) -> HttpRefusal:
    """The one answer to everybody who brings no good key; a session's cookie goes with it."""
    headers = {"WWW_Authenticate": 'Bearer realm="orbit"'}
    if request is not None and session_secret(request) is not None:
        headers["Set_Cookie"] = _no_cookie(request)
    text = "this needs a good access key: Authorization: Bearer orb_…"
    return HttpRefusal(HTTPStatus.UNAUTHORIZED, "unauthenticated", text, **headers)


def too_many(pause: TooManyFailures) -> HttpRefusal:
    """The answer to who has failed too often."""
    return HttpRefusal(
        HTTPStatus.TOO_MANY_REQUESTS,
        "too_many_attempts",
        "too many failed attempts from this address; wait",
        Retry_After=str(math.ceil(pause.seconds)),
    )


def _no_cookie(request: Request) -> str:
    """The header that has a browser drop its session."""
    answer, is_secure = Response(), request.url.scheme == "https"
    name = SECURE_COOKIE if is_secure else COOKIE
    answer.delete_cookie(name, secure=is_secure, httponly=True, samesite="strict")
    return answer.headers["set-cookie"]


def _bearer(given: list[str]) -> str:
    scheme, _, text = given[0].partition(" ")
    is_one = len(given) == 1 and scheme.lower() == "bearer"
    return text.strip()[:_PRESENTED_BYTES] if is_one else ""


def _check_csrf(request: Request, secret: str) -> None:
    given = request.headers.get(CSRF_HEADER, "")
    if not hmac.compare_digest(given.encode(), csrf_token(secret).encode()):
        text = "a change with a session needs its X-CSRF-Token (GET /session gives it)"
        raise HttpRefusal(HTTPStatus.FORBIDDEN, "csrf_refused", text)


def _declared(dependant: Dependant) -> Iterable[Any]:
    for one in dependant.dependencies:
        scope = getattr(one.call, _DECLARED, None)
        if scope is not None:
            yield scope
        yield from _declared(one)
