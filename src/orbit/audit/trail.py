"""The trail's entries: what an act is, and how entries are chained.

An act commits with the change that it is about, or neither does. Its entry is canonical JSON
(RFC 8785) `{"act": …, "at": …}`; the hash covers version, log, number, predecessor and those bytes
as they are stored. The database numbers and chains, so that no answer is waited for. An entry
never holds a secret or a payload: who appends sees to that.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from orbit.canonical import canonical_json
from orbit.database.pool import Connection
from orbit.database.queries import array, load

SQL = load("audit")
INSTALLATION = "*"
FIRST_PREV = bytes(32)
_DOMAIN = b"orbit.audit.entry.v1\x00"


@dataclass(frozen=True, slots=True)
class Act:
    """Who did what, in which namespace (`*`: the whole installation), to what, and why.

    `subject` is the key of the one row that changed; an act that changed several lists their keys
    as `subjects` in its `detail`. Verification holds both against the rows.
    """

    namespace: str
    action: str
    actor: str
    reason: str | None = None
    subject: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


async def append(connection: Connection, *acts: Act) -> None:
    """Appends acts to the trail, as the last statement of the caller's transaction.

    It locks the heads of the acts' logs, in key order, until the transaction ends. No answer is
    read, so it may stand in a pipelined batch. Called once in a transaction.
    """
    if acts:
        rows = {"log": array(act.namespace for act in acts), "act": array(map(act_json, acts))}
        await connection.execute(SQL.append, rows)


def act_json(act: Act) -> str:
    """An act's canonical JSON. Raises RequestInvalid for a detail that JSON cannot carry."""
    values = {
        "action": act.action,
        "actor": act.actor,
        "detail": dict(act.detail),
        "reason": act.reason,
        "subject": act.subject,
    }
    given = {name: value for name, value in values.items() if value not in (None, {})}
    return canonical_json(_storable(given)).decode()


class Chain:
    """Computes the hashes of one log's entries, in order of their numbers."""

    def __init__(self, log: str) -> None:
        name = log.encode()
        self._prefix = _DOMAIN + struct.pack(">i", len(name)) + name
        self._number = struct.Struct(">q").pack

    def hash(self, seq: int, prev: bytes, body: bytes) -> bytes:
        """The SHA-256 of an entry, as the database computes it when it appends."""
        return sha256(self._prefix + self._number(seq) + prev + body).digest()


def _storable(value: Any) -> Any:
    """The value without what PostgreSQL's text cannot hold: NUL and half surrogate pairs."""
    if isinstance(value, str):
        return value.replace("\x00", "�").encode("utf-8", "replace").decode()
    if isinstance(value, Mapping):
        return {_storable(str(key)): _storable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_storable(one) for one in value]
    return value
