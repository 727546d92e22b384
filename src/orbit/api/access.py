"""Who asks, and whether they may.

For now whoever reaches the loopback port may do everything, and is called by how they ask.
"""

from __future__ import annotations

import getpass
import socket
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import Request


@dataclass(frozen=True, slots=True)
class Actor:
    """Who did it; two persons have two ids."""

    name: str
    id: str


def actor_of(request: Request) -> Actor:
    """Who makes a request."""
    if request.headers.get("user-agent", "").startswith("orbit-cli/"):
        name = f"{_user()}@{socket.gethostname()} (cli)"
        return Actor(name, name)
    return Actor("api", "api")


def require(scope: str) -> Callable[[Request], None]:
    """A dependency that lets through who has the scope."""
    del scope  # nobody has a key yet

    def check(request: Request) -> None:
        del request

    return check


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
