"""Access keys: made, listed, rotated, revoked. A key's text is in one answer and never again."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Request
from pydantic import AwareDatetime, Field

from orbit.api.access import actor_of, require
from orbit.api.bodies import Bodies, Body, Reason, body_schema
from orbit.app import Node
from orbit.errors import NotFound
from orbit.governance.actor import EVERYWHERE, Scope
from orbit.governance.keys import Grant
from orbit.reading.view import Page, View

_DAY_SECONDS = 86_400
KeyId = Annotated[str, Path(alias="keyId")]
ScopeName = Literal["viewer", "operator", "approver", "admin"]
Instant = Annotated[AwareDatetime, Field(strict=False)]


class CreateBody(Body):
    """A key's name, its scopes, in which namespaces (`*` alone is all of them), and why."""

    name: str = Field(min_length=1, max_length=100)
    scopes: list[ScopeName] = Field(min_length=1, max_length=4)
    namespaces: list[str] = Field([EVERYWHERE], min_length=1, max_length=1000)
    expires_at: Instant | None = None
    reason: Reason | None = None


class RotateBody(Body):
    """How long the old key is good yet, in seconds, until when the new one is, and why."""

    overlap_seconds: int = Field(_DAY_SECONDS, ge=0, le=90 * _DAY_SECONDS)
    expires_at: Instant | None = None
    reason: Reason | None = None


class RevokeBody(Body):
    """Why a key ends."""

    reason: Reason | None = None


@dataclass(frozen=True, slots=True)
class KeyView(View):
    """A key without its secret; `state` is `good`, `expired`, `rotated` or `revoked`.

    `root_id` is the first of the keys that were rotated into this one; `last_used_at` is kept to
    the minute.
    """

    key_id: str
    root_id: str
    name: str
    scopes: list[str]
    namespaces: list[str]
    state: str
    expires_at: datetime | None
    replaces: str | None
    rotated_until: datetime | None
    revoked_at: datetime | None
    revoked_reason: str | None
    last_used_at: datetime | None
    created_by: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class NewKey(View):
    """A key as it was made; `token` is what its owner keeps, and is not shown again."""

    token: str
    key: KeyView


def keys_router(node: Node, bodies: Bodies) -> APIRouter:
    """The routes, for one node."""
    router = APIRouter(prefix="/keys", tags=["keys"], dependencies=[Depends(require("admin"))])
    read_create, read_rotate, read_revoke = (
        Depends(bodies.of(model)) for model in (CreateBody, RotateBody, RevokeBody)
    )

    @router.get("", summary="Access keys, newest first")
    async def listed(request: Request) -> Page[KeyView]:
        """Those that reach no further than who asks; at most 1,000."""
        rows = await node.keys.listed(actor_of(request).within)
        return Page([_view(row) for row in rows])

    @router.post(
        "",
        status_code=201,
        summary="Make an access key",
        openapi_extra=body_schema(CreateBody, is_required=True),
    )
    async def create(request: Request, body: CreateBody = read_create) -> NewKey:
        """The only answer that has its text."""
        scopes = tuple(Scope(one) for one in body.scopes)
        grant = Grant(body.name, scopes, tuple(body.namespaces), body.expires_at)
        token = await node.keys.create(actor_of(request), grant, body.reason)
        return NewKey(token.text, await _shown(node, token.key_id))

    @router.post(
        "/{keyId}/rotate",
        status_code=201,
        summary="Make a key's successor, beside which it is good for a while yet",
        openapi_extra=body_schema(RotateBody, is_required=False),
    )
    async def rotate(request: Request, key_id: KeyId, body: RotateBody = read_rotate) -> NewKey:
        """409 `refused` if the key has ended, or was rotated before."""
        overlap = timedelta(seconds=body.overlap_seconds)
        token = await node.keys.rotate(
            actor_of(request), key_id, overlap, body.expires_at, body.reason
        )
        node.authentication.forget()
        return NewKey(token.text, await _shown(node, token.key_id))

    @router.post(
        "/{keyId}/revoke",
        summary="End a key now",
        openapi_extra=body_schema(RevokeBody, is_required=False),
    )
    async def revoke(request: Request, key_id: KeyId, body: RevokeBody = read_revoke) -> KeyView:
        """Within a second on every node; again changes nothing."""
        await node.keys.revoke(actor_of(request), key_id, body.reason)
        node.authentication.forget()
        return await _shown(node, key_id)

    return router


async def _shown(node: Node, key_id: str) -> KeyView:
    rows = await node.keys.listed(None, key_id)
    if not rows:
        raise NotFound(f"there is no key {key_id}")
    return _view(rows[0])


def _view(row: dict[str, Any]) -> KeyView:
    given: dict[str, Any] = {
        name: value.astimezone(UTC) if isinstance(value, datetime) else value
        for name, value in row.items()
        if name != "is_good"
    }
    return KeyView(**given, state=_state(row))


def _state(row: dict[str, Any]) -> str:
    if row["is_good"]:
        return "good"
    if row["revoked_at"] is not None:
        return "revoked"
    return "expired" if row["rotated_until"] is None else "rotated"
