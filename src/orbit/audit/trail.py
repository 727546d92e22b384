"""Entries of the audit trail, appended in the transaction of the act that they tell of.

For now an entry is a line of the node's log: the chain takes its place behind the same call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog

from orbit.database.pool import Connection

_log = structlog.get_logger("orbit.audit")


@dataclass(frozen=True, slots=True)
class Act:
    """What somebody did or was refused; `namespace` "*" is the whole installation."""

    namespace: str
    action: str
    actor: str
    reason: str | None = None
    subject: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


async def append(connection: Connection, *acts: Act) -> None:
    """Appends entries as the last statement of the caller's transaction."""
    del connection
    for act in acts:
        _log.info(
            "audit",
            namespace=act.namespace,
            action=act.action,
            actor=act.actor,
            reason=act.reason,
            subject=act.subject,
            **act.detail,
        )
