"""Audit entries as people read them: newest first, narrowed by who, what and when.

What is shown is what is hashed: the stored body, parsed. Whether it is whole is not said here, but
by verification.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from orbit.database.pool import Database
from orbit.database.queries import load
from orbit.reading.view import (
    Page,
    Position,
    Row,
    View,
    check_cursor_number,
    is_within,
    narrowed,
    position_of,
    read_page,
)

SQL = load("audit")
_LARGEST = 2**63 - 1


@dataclass(frozen=True, slots=True)
class AuditEntry(View):
    """One entry of a namespace's log (`*`: the installation's), with its SHA-256."""

    namespace: str
    seq: int
    at: datetime
    action: str
    actor: str
    reason: str | None
    subject: str | None
    detail: dict[str, Any]
    hash: str


async def audit_entries(  # noqa: PLR0913 - one for each filter
    database: Database,
    *,
    namespace: str | None = None,
    action: str | None = None,
    actor: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    limit: int = 50,
    cursor: str | None = None,
    within: Sequence[str] | None = None,
) -> Page[AuditEntry]:
    """Entries newest first, of the namespaces that there are for who asks.

    `since` is included, `until` is not.

    Raises RequestInvalid for a cursor that is none.
    """
    wanted = {"action": action, "actor": actor}
    filters = {name: value for name, value in wanted.items() if value is not None}

    logs = narrowed(namespace, within)
    query = SQL.newest_entries if logs is None else SQL.newest_entries_of_logs

    async def scan(after: Position | None, count: int) -> Sequence[Row]:
        if namespace is not None and is_within(namespace, within):
            asked = {"log": namespace, "before": int(after[2]) if after else _LARGEST}
            return await database.fetch_all(SQL.entry_window, {**asked, "count": count})
        at, log, seq = after or (until.isoformat() if until else "infinity", "", "0")
        place = {"logs": logs, "at": at, "log": log, "seq": int(seq), "count": count}
        rows = await database.fetch_all(query, place)
        return [row for row in rows if since is None or row["at"] >= since]

    async def choose(rows: Sequence[Row]) -> Mapping[Position, AuditEntry]:
        entries = {_place(row): _entry(row) for row in rows}
        return {
            place: entry
            for place, entry in entries.items()
            if all(getattr(entry, name) == value for name, value in filters.items())
            and (since is None or entry.at >= since)
            and (until is None or entry.at < until)
        }

    return await read_page(
        scan,
        _place,
        choose,
        after=position_of(cursor, datetime.fromisoformat, str, check_cursor_number),
        limit=limit,
        is_filtered=bool(filters or since or until),
    )


def _place(row: Row) -> Position:
    return (row["at"].isoformat(), row["log"], str(row["seq"]))


def _entry(row: Row) -> AuditEntry:
    body = json.loads(row["body"])
    act = body["act"]
    return AuditEntry(
        row["log"],
        row["seq"],
        datetime.fromisoformat(body["at"]),
        act["action"],
        act["actor"],
        act.get("reason"),
        act.get("subject"),
        act.get("detail", {}),
        row["hash"].hex(),
    )
