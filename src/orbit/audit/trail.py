"""Appending to the audit trail: the interim version, which tells the log and stores nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog

from orbit.database.pool import Connection

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Act:
    """What somebody did or was refused; namespace `*` is the whole installation."""

    namespace: str
    action: str
    actor: str
    reason: str | None = None
    subject: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


async def append(connection: Connection, *acts: Act) -> None:
    """Appends entries; the last statement of the caller's transaction."""
    for act in acts:
        log.info("audited", action=act.action, actor=act.actor, subject=act.subject)
