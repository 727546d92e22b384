"""Errors as RFC 9457 problem documents: the only place that knows which status an error has.

Every problem has a stable `code`, which tools match on; what else is known of it stands beside
it (`problems`, `activeCycles`, …). No input makes a stack trace visible: what nobody expected
is logged, and the client gets the code `internal_error` and no more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import psycopg
import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from orbit.api.refusals import refusal_of
from orbit.database.pool import TRANSIENT
from orbit.errors import (
    ConfigurationInvalid,
    DatabaseUnavailable,
    IdempotencyKeyReused,
    NotFound,
    OrbitError,
    PayloadTooLarge,
    Refused,
    RequestInvalid,
    SchemaMismatch,
    TooManySessions,
)

MEDIA_TYPE = "application/problem+json"

_STATUSES: Mapping[type[OrbitError], HTTPStatus] = {
    RequestInvalid: HTTPStatus.BAD_REQUEST,
    NotFound: HTTPStatus.NOT_FOUND,
    TooManySessions: HTTPStatus.TOO_MANY_REQUESTS,
    Refused: HTTPStatus.CONFLICT,
    PayloadTooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    IdempotencyKeyReused: HTTPStatus.UNPROCESSABLE_ENTITY,
    ConfigurationInvalid: HTTPStatus.UNPROCESSABLE_ENTITY,
    DatabaseUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    SchemaMismatch: HTTPStatus.SERVICE_UNAVAILABLE,
}
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 415: "unsupported_media_type"}
_AWAY = "the database does not answer; try again"

log = structlog.get_logger(__name__)


class HttpRefusal(OrbitError):
    """A request refused for how it was made, not for what it asks."""

    def __init__(self, status: HTTPStatus, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.http_code = status, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def status_of(kind: type[OrbitError]) -> HTTPStatus:
    """The status that a kind of error is answered with."""
    return next(
        (_STATUSES[one] for one in kind.__mro__ if one in _STATUSES),
        HTTPStatus.INTERNAL_SERVER_ERROR,
    )


def problem_of(error: OrbitError) -> JSONResponse:
    """The answer that an error of Orbit's own gets."""
    if isinstance(error, HttpRefusal):
        answer = problem(error.status, error.http_code, str(error))
        answer.headers.update(error.headers)
        return answer
    status = status_of(type(error))
    if isinstance(error, ConfigurationInvalid):
        found = [
            {"file": one.file, "line": one.line, "pointer": one.pointer, "message": one.message}
            for one in error.problems
        ]
        text = f"the configuration has {len(found)} problem{'' if len(found) == 1 else 's'}"
        return problem(status, error.code, text, problems=found)
    return problem(status, error.code, str(error), **error.details)


def problem(status: HTTPStatus, code: str, detail: str, **more: Any) -> JSONResponse:
    """A problem document; `more` stands beside the members that RFC 9457 names."""
    document = {
        **more,
        "type": "about:blank",
        "title": status.phrase,
        "status": status.value,
        "detail": _printable(detail),
        "code": code,
    }
    headers = {"Retry-After": "1"} if status is HTTPStatus.SERVICE_UNAVAILABLE else None
    return JSONResponse(document, status.value, headers, media_type=MEDIA_TYPE)


def unexpected(error: Exception) -> JSONResponse:
    """The answer to what nobody expected; the log has the rest."""
    log.error("request_failed", exc_info=error)
    text = "this should not have happened; the node's log says more"
    return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error", text)


def database_away(error: Exception) -> JSONResponse:
    """The answer while the database does not answer."""
    log.warning("database_unavailable", error=type(error).__name__)
    return problem(HTTPStatus.SERVICE_UNAVAILABLE, DatabaseUnavailable.code, _AWAY)


def request_invalid(errors: Sequence[ErrorDetails | Mapping[str, Any]]) -> RequestInvalid:
    """What is wrong with a request's values, each with its place."""
    problems = [
        {"pointer": _place(one["loc"]), "message": _printable(one["msg"])} for one in errors[:100]
    ]
    text = "; ".join(f"{one['pointer']}: {one['message']}" for one in problems[:5])
    return RequestInvalid(text, problems=problems)


def install(application: FastAPI) -> None:
    """Has the application answer every error with a problem document."""

    async def orbit_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, OrbitError)
        answer = problem_of(error)
        code = error.http_code if isinstance(error, HttpRefusal) else error.code
        request.state.refusal = refusal_of(request, answer.status_code, code, error)
        return answer

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return problem_of(request_invalid(error.errors()))

    async def http_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        status = HTTPStatus(error.status_code)
        answer = problem(status, _HTTP_CODES.get(status, "request_invalid"), error.detail)
        answer.headers.update(error.headers or {})
        return answer

    async def away(_: Request, error: Exception) -> JSONResponse:
        return database_away(error)

    async def unstorable(_: Request, error: Exception) -> JSONResponse:
        log.warning("value_unstorable", error=type(error).__name__)
        return problem_of(RequestInvalid("a value cannot be stored as text"))

    application.add_exception_handler(OrbitError, orbit_error)
    application.add_exception_handler(RequestValidationError, invalid)
    application.add_exception_handler(HTTPException, http_error)
    application.add_exception_handler(psycopg.DataError, unstorable)
    for kind in TRANSIENT:
        application.add_exception_handler(kind, away)


def _place(location: Sequence[str | int]) -> str:
    """Where a value stands: `/endpointKeys/0` in the body, `?limit`, a header's name."""
    if not location:
        return "/"
    where, *path = location
    if where in {"query", "path", "header", "cookie"} and path:
        text = ".".join(map(str, path))
        return f"?{text}" if where == "query" else text
    parts = path if where == "body" else location
    text = "".join("/" + str(one).replace("~", "~0").replace("/", "~1") for one in parts)
    return _printable(text) or "/"


def _printable(text: str) -> str:
    """Text that any terminal takes, and not without bound."""
    shown = (
        text
        if text.isprintable()
        else "".join(one if one.isprintable() or one == "\n" else ascii(one)[1:-1] for one in text)
    )
    return shown if len(shown) <= 2000 else shown[:2000] + "…"
