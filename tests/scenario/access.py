"""What the tests of access share: a node that asks for keys, and clients that show one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx

from orbit.api.application import create_application
from orbit.app import Node
from orbit.governance.actor import Scope, actor_here
from orbit.governance.keys import Grant
from orbit.governance.token import Token


async def key_of(
    node: Node, *scopes: str, namespaces: Sequence[str] = ("*",), **given: Any
) -> Token:
    """A key of the node, with these scopes."""
    found = tuple(Scope(one) for one in scopes)
    grant = Grant(f"test {' '.join(scopes)}", found, tuple(namespaces), **given)
    return await node.keys.create(actor_here(), grant)


def bearer(token: Token | str) -> dict[str, str]:
    """The header that shows a key."""
    return {"Authorization": f"Bearer {token if isinstance(token, str) else token.text}"}


@asynccontextmanager
async def asking(
    node: Node, token: Token | str | None = None, *, peer: str = "127.0.0.1", base: str = "http"
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the node's API, at an address, with or without a key."""
    transport = httpx.ASGITransport(create_application(node), client=(peer, 1234))
    headers = {} if token is None else bearer(token)
    async with httpx.AsyncClient(
        transport=transport, base_url=f"{base}://localhost", headers=headers
    ) as client:
        yield client
