"""Dead letters: jobs out of retries, why, and what people decided about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from orbit.database.pool import Database
from orbit.database.queries import array, load
from orbit.errors import NotFound
from orbit.reading.receipts import Receipt, receipt_of, safe_url
from orbit.reading.view import (
    LARGEST_ID,
    Page,
    Position,
    Row,
    View,
    check_cursor_id,
    known_id,
    position_of,
    read_all,
    read_page,
)

SQL = load("reading")


@dataclass(frozen=True, slots=True)
class Decision(View):
    """What a person decided; `new_job_id` is the job that came of a requeue."""

    decision: str
    new_job_id: str | None
    reason: str
    decided_at: datetime


@dataclass(frozen=True, slots=True)
class DeadLetter(View):
    """A job out of retries. What its retention has let go is None.

    `may_have_arrived`: an attempt ended unknown, so the receiver is to be asked before a requeue.
    """

    job_id: str
    namespace: str
    cycle_run_id: str
    endpoint_key: str
    cause: str
    attempts: int
    created_at: datetime
    item_index: int | None
    digest: str | None
    content_type: str | None
    size: int | None
    requeued_from: str | None
    url: str | None
    method: str | None
    may_have_arrived: bool
    state: str
    decision: Decision | None
    last_receipt: Receipt | None


@dataclass(frozen=True, slots=True)
class DeadLetterDetail(View):
    """A dead letter with all its receipts and decisions."""

    dead_letter: DeadLetter
    receipts: list[Receipt]
    decisions: list[Decision]


async def dead_letters(
    database: Database,
    *,
    namespace: str | None = None,
    endpoint_key: str | None = None,
    cause: str | None = None,
    state: str | None = None,
    limit: int = 50,
    cursor: str | None = None,
) -> Page[DeadLetter]:
    """Dead letters newest first; `state` is `open` or `decided`.

    Raises RequestInvalid for a cursor that is none.
    """
    wanted = {
        "namespace": namespace,
        "endpoint_key": endpoint_key,
        "cause": cause,
        "is_open": None if state is None else state == "open",
    }
    filters = {name: value for name, value in wanted.items() if value is not None}

    async def scan(after: Position | None, count: int) -> Sequence[Row]:
        before = after[0] if after else LARGEST_ID
        return await database.fetch_all(SQL.dead_letter_window, {"before": before, "count": count})

    async def choose(rows: Sequence[Row]) -> Mapping[Position, DeadLetter]:
        asked = [row for row in rows if all(row[name] == value for name, value in filters.items())]
        return {(one.job_id,): one for one in await _read(database, asked)}

    return await read_page(
        scan,
        lambda row: (row["job_id"],),
        choose,
        after=position_of(cursor, check_cursor_id),
        limit=limit,
        is_filtered=bool(filters),
    )


async def dead_letter(database: Database, job_id: str) -> DeadLetterDetail:
    """One dead letter. Raises NotFound."""
    asked = known_id(job_id, "dead letter")
    row = await database.fetch_one(SQL.dead_letter_namespace, {"job_id": asked})
    if row is None:
        raise NotFound(f"there is no dead letter {asked}")
    key = {"namespace": row["namespace"], "job_id": asked}
    (found,) = await _read(database, [key])
    receipts = await read_all(
        database,
        SQL.job_receipts,
        {"namespace": row["namespace"], "job_id": array([asked]), "count": 1001},
    )
    decisions = await read_all(database, SQL.dead_letter_decisions, key)
    return DeadLetterDetail(
        found, [receipt_of(one) for one in receipts], [_decision(one) for one in decisions]
    )


async def _read(database: Database, rows: Sequence[Row]) -> list[DeadLetter]:
    if not rows:
        return []
    asked = {
        "namespace": array(row["namespace"] for row in rows),
        "job_id": array(row["job_id"] for row in rows),
    }
    receipts = {row["job_id"]: row for row in await read_all(database, SQL.last_receipts, asked)}
    return [
        _dead_letter(row, receipts.get(row["job_id"]))
        for row in await read_all(database, SQL.dead_letters, asked)
    ]


def _dead_letter(row: dict[str, Any], receipt: Row | None) -> DeadLetter:
    decided = {
        "decision": row.pop("decision"),
        "new_job_id": row.pop("new_job_id"),
        "reason": row.pop("decision_reason"),
        "decided_at": row.pop("decided_at"),
    }
    is_open = decided["decision"] is None
    return DeadLetter(
        **{**row, "url": row["url"] and safe_url(row["url"])},
        state="open" if is_open else "decided",
        decision=None if is_open else Decision(**decided),
        last_receipt=receipt_of(receipt) if receipt else None,
    )


def _decision(row: Row) -> Decision:
    return Decision(row["decision"], row["new_job_id"], row["reason"], row["decided_at"])
