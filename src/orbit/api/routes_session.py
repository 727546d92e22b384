"""Sessions: a key exchanged for a cookie, by a request or by a one-time link.

The cookie is HttpOnly, SameSite=Strict and, over TLS, Secure under a name that only TLS can set.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.responses import RedirectResponse

from orbit.api.access import (
    COOKIE,
    SECURE_COOKIE,
    actor_of,
    anyone,
    require,
    session_secret,
    unauthenticated,
)
from orbit.api.problems import HttpRefusal
from orbit.app import Node
from orbit.governance.actor import EVERYWHERE, Actor
from orbit.governance.sessions import Session, csrf_token
from orbit.reading.view import View

_LANDING = "/docs"


@dataclass(frozen=True, slots=True)
class Who(View):
    """Who asks, and what they may do; `csrf_token` goes with each change a session makes."""

    name: str
    scopes: list[str]
    namespaces: list[str]
    csrf_token: str | None


@dataclass(frozen=True, slots=True)
class Opened(View):
    """A session was opened; its cookie is in the answer's head."""

    csrf_token: str
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Link(View):
    """A path that opens a session in a browser, once."""

    path: str
    expires_at: datetime


def session_router(node: Node) -> APIRouter:
    """The routes, for one node."""
    router = APIRouter(prefix="/session", tags=["session"])

    @router.get("", dependencies=[Depends(require("viewer"))], summary="Who asks")
    async def who(request: Request) -> Who:
        actor, secret = actor_of(request), _own_session(request)
        return Who(
            actor.name,
            sorted(actor.scopes),
            [EVERYWHERE] if actor.within is None else actor.within,
            None if secret is None else csrf_token(secret),
        )

    @router.post(
        "",
        dependencies=[Depends(require("viewer"))],
        status_code=201,
        summary="Exchange a key for a session",
    )
    async def begin(request: Request, response: Response) -> Opened:
        session = await node.sessions.begin(_with_key(request))
        _set_cookie(request, response, session)
        return Opened(csrf_token(session.secret), session.expires_at.astimezone(UTC))

    @router.delete(
        "", dependencies=[Depends(require("viewer"))], status_code=204, summary="End the session"
    )
    async def end(request: Request, response: Response) -> None:
        secret = session_secret(request)
        if secret is not None:
            await node.sessions.end(actor_of(request), secret)
            node.authentication.forget()
        for name in (COOKIE, SECURE_COOKIE):
            response.delete_cookie(name, secure=name == SECURE_COOKIE, httponly=True)

    _add_links(router, node)
    return router


def _add_links(router: APIRouter, node: Node) -> None:
    @router.post(
        "/links",
        dependencies=[Depends(require("viewer"))],
        status_code=201,
        summary="Make a link that opens a session, once, within two minutes",
    )
    async def link(request: Request) -> Link:
        code, expires_at = await node.sessions.link(_with_key(request))
        return Link(f"/session/open?code={code}", expires_at.astimezone(UTC))

    @router.get(
        "/open",
        dependencies=[Depends(anyone)],
        status_code=303,
        response_class=RedirectResponse,
        summary="Follow a link that opens a session",
    )
    async def follow(
        request: Request, code: Annotated[str, Query(min_length=1, max_length=200)]
    ) -> Response:
        """401 for a link that was followed before, or is over."""
        opened = await node.authentication.by_link(code)
        if opened is None:
            raise unauthenticated()
        response = RedirectResponse(_LANDING, HTTPStatus.SEE_OTHER)
        _set_cookie(request, response, opened[1])
        return response


def _with_key(request: Request) -> Actor:
    actor = actor_of(request)
    if actor.key_id is None:
        text = "there is no key that a session could be opened with (ORBIT_AUTH=off)"
        raise HttpRefusal(HTTPStatus.CONFLICT, "refused", text)
    if "authorization" not in request.headers:
        text = "a session cannot open another one; use its key"
        raise HttpRefusal(HTTPStatus.CONFLICT, "refused", text)
    return actor


def _own_session(request: Request) -> str | None:
    """The session that the request was let in by."""
    return None if "authorization" in request.headers else session_secret(request)


def _set_cookie(request: Request, response: Response, session: Session) -> None:
    is_secure = request.url.scheme == "https"
    response.set_cookie(
        SECURE_COOKIE if is_secure else COOKIE,
        session.secret,
        expires=session.expires_at.astimezone(UTC),
        secure=is_secure,
        httponly=True,
        samesite="strict",
    )
