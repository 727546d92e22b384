"""Which answers are refusals that the audit trail tells of.

All that a change is refused for, whoever asks; every missing scope; and whatever is not there for
an actor that is bound to namespaces, which may be another's. What is wrong with a request's values
is told by its code alone: the text could repeat them. A method that nobody has is `OTHER`, for the
same reason, and since each kind of refusal is noted anew.
"""

from __future__ import annotations

from http import HTTPStatus

from fastapi import Request
from starlette.types import Scope

from orbit.errors import OrbitError, RequestInvalid
from orbit.governance.actor import Actor
from orbit.governance.refusals import Refusal
from orbit.vocabulary import check_key

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_METHODS = SAFE_METHODS | {"POST", "PUT", "PATCH", "DELETE"}
_MAY_NOT = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND})


def refusal_of(request: Request, status: int, code: str, error: OrbitError) -> Refusal | None:
    """The refusal that an answer is, if it is one."""
    actor = getattr(request.state, "actor", None)
    is_change = request.method not in SAFE_METHODS
    is_bound = isinstance(actor, Actor) and actor.namespaces is not None
    is_told = (
        (is_change and 400 <= status < 500)
        or status == HTTPStatus.FORBIDDEN
        or (is_bound and status == HTTPStatus.NOT_FOUND)
    )
    if not is_told:
        return None
    return Refusal(
        f"{method_of(request.scope)} {template(request)}",
        code,
        "" if isinstance(error, RequestInvalid) else str(error),
        is_act=status not in _MAY_NOT,
        namespace=_namespace(request),
        reason=getattr(request.state, "reason", None),
    )


def method_of(scope: Scope) -> str:
    """The request's method, if it is one that there is: what was sent may be any word."""
    method = str(scope["method"])
    return method if method in _METHODS else "OTHER"


def template(request: Request) -> str:
    """The route's path as declared: what was asked for may be anything."""
    return str(getattr(request.scope.get("route"), "path", ""))


def _namespace(request: Request) -> str | None:
    found = request.path_params.get("namespace")
    try:
        return None if found is None else check_key(found)
    except ValueError:
        return None
