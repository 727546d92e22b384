"""Access keys: made, listed, rotated, revoked. A key's text is in one answer and never again."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import Field

from orbit.api.access import actor_of, require
from orbit.api.bodies import Bodies, Body, Instant, PageFilter, Reason, body_schema
from orbit.app import Node
from orbit.governance.actor import EVERYWHERE, Scope
from orbit.governance.keys import Grant
from orbit.reading.keys import KeyView, access_key, access_keys
from orbit.reading.view import Page, View

_DAY_SECONDS = 86_400
KeyId = Annotated[str, Path(alias="keyId")]
ScopeName = Literal["viewer", "operator", "approver", "admin"]


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
    """Why a key ends, and whether all that it made ends with it."""

    with_descendants: bool = False
    reason: Reason | None = None


@dataclass(frozen=True, slots=True)
class NewKey(View):
    """A key as it was made; `token` is what its owner keeps, and is not shown again."""

    token: str
    key: KeyView


@dataclass(frozen=True, slots=True)
class RevokedKey(KeyView):
    """A key that has ended; `descendants` are the keys that it made, and that these made.

    Only those that were good; they end with it if that was asked for, else they are good yet.
    """

    descendants: list[str]


def keys_router(node: Node, bodies: Bodies) -> APIRouter:
    """The routes, for one node."""
    router = APIRouter(prefix="/keys", tags=["keys"], dependencies=[Depends(require("admin"))])
    read_create, read_rotate, read_revoke = (
        Depends(bodies.of(model)) for model in (CreateBody, RotateBody, RevokeBody)
    )

    @router.get("", summary="Access keys, newest first")
    async def listed(request: Request, asked: Annotated[PageFilter, Query()]) -> Page[KeyView]:
        """Those that reach no further than who asks."""
        within = actor_of(request).within
        return await access_keys(node.keys, **asked.model_dump(), within=within)

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
        return NewKey(token.text, await access_key(node.keys, token.key_id))

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
        return NewKey(token.text, await access_key(node.keys, token.key_id))

    @router.post(
        "/{keyId}/revoke",
        summary="End a key now",
        openapi_extra=body_schema(RevokeBody, is_required=False),
    )
    async def revoke(request: Request, key_id: KeyId, body: RevokeBody = read_revoke) -> RevokedKey:
        """Within a second on every node; again changes nothing."""
        made = await node.keys.revoke(
            actor_of(request), key_id, body.reason, with_descendants=body.with_descendants
        )
        node.authentication.forget()
        shown = await access_key(node.keys, key_id)
        given = {one.name: getattr(shown, one.name) for one in fields(shown)}
        return RevokedKey(**given, descendants=made)

    return router
