"""Who asks, and what they may do: decided once per request, then handed down.

An actor has scopes, in some namespaces or in all. Nobody has a right that is not written here:
what is not granted is denied, and nothing that an actor brings can widen it.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

EVERYWHERE = "*"


class Scope(StrEnum):
    """What a key is for. Operators run the work, approvers decide on it; admins do both and keys.

    Operator and approver do not contain each other, so that two persons can be two persons.
    """

    VIEWER = "viewer"
    OPERATOR = "operator"
    APPROVER = "approver"
    ADMIN = "admin"


_CONTAINED = {
    Scope.VIEWER: frozenset({Scope.VIEWER}),
    Scope.OPERATOR: frozenset({Scope.VIEWER, Scope.OPERATOR}),
    Scope.APPROVER: frozenset({Scope.VIEWER, Scope.APPROVER}),
    Scope.ADMIN: frozenset(Scope),
}


@dataclass(frozen=True, slots=True)
class Actor:
    """Who asks.

    Attributes:
        id: the same for a key and what it was rotated into: two ids are two persons.
        name: as the audit trail has it.
        scopes: as granted; `may` knows what they contain.
        namespaces: where; None is everywhere.
        key_id: the key that was shown; None for who needs none.
    """

    id: str
    name: str
    scopes: frozenset[Scope]
    namespaces: frozenset[str] | None = None
    key_id: str | None = None

    def may(self, scope: Scope) -> bool:
        """Whether the scope, or one that contains it, is granted."""
        return any(scope in _CONTAINED[one] for one in self.scopes)

    def sees(self, namespace: str) -> bool:
        """Whether the namespace exists for this actor."""
        return self.namespaces is None or namespace in self.namespaces

    @property
    def within(self) -> list[str] | None:
        """The namespaces that reading is bounded to; None is all."""
        return None if self.namespaces is None else sorted(self.namespaces)

    @property
    def audited_in(self) -> str:
        """The namespace whose trail tells of what the actor was refused."""
        return EVERYWHERE if self.namespaces is None else min(self.namespaces)

    def contains(self, namespaces: Collection[str]) -> bool:
        """Whether the actor is entitled in each of the namespaces, of which `*` means all."""
        return self.namespaces is None or self.namespaces.issuperset(namespaces)


ANYONE = Actor("anyone", "anyone (ORBIT_AUTH=off)", frozenset({Scope.ADMIN}))


def actor_here() -> Actor:
    """Who runs this program: whoever has the database has everything, and is one person.

    The name says whose process it was and where, by the system's word and not the environment's.
    """
    name = f"{_user()}@{socket.gethostname()} (cli)"
    return Actor("database", name, frozenset({Scope.ADMIN}))


def _user() -> str:
    if sys.platform == "win32":
        return os.getlogin()
    import pwd  # noqa: PLC0415 - not on Windows

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a user without a name, as containers have
        return f"uid {os.getuid()}"
