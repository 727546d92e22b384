"""Dead letters: jobs out of retries, why, and what people decided about them.

They are listed by when they died, not by when their jobs were made, and grouped by cause. A
snapshot of an endpoint has a version for people: its definition's rank in its namespace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from orbit.database.pool import Database
from orbit.database.queries import array, load
from orbit.errors import NotFound
from orbit.execution.snapshots import definition_of
from orbit.reading.receipts import Receipt, receipt_of, safe_url, without_answer
from orbit.reading.view import (
    LARGEST_ID,
    Page,
    Position,
    Row,
    View,
    check_cursor_id,
    is_within,
    known_id,
    narrowed,
    position_of,
    read_all,
    read_page,
)

SQL = load("reading")
MAX_GROUPS = 1000
_MAX_VERSIONS = 10_000
_LATEST = ("infinity", LARGEST_ID)


@dataclass(frozen=True, slots=True)
class Decision(View):
    """What a person decided; `new_job_id` is the job that came of a requeue.

    `batch_id`: the bulk requeue that brought it back, if that went in steps.
    """

    decision: str
    new_job_id: str | None
    reason: str
    batch_id: str | None
    decided_at: datetime


@dataclass(frozen=True, slots=True)
class DeadLetter(View):
    """A job out of retries. What its retention has let go is None.

    `may_have_arrived`: an attempt ended unknown, so the receiver is to be asked before a requeue.
    """

    job_id: str
    namespace: str
    cycle_run_id: str
    run_profile_id: str | None
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
class DeadLetterGroup(View):
    """Open dead letters of one cause; `may_have_arrived` of them have an unknown attempt."""

    namespace: str
    endpoint_key: str
    cause: str
    open: int
    may_have_arrived: int
    oldest_at: datetime
    newest_at: datetime


@dataclass(frozen=True, slots=True)
class SnapshotVersions(View):
    """The endpoint's snapshot that the job was bound to, and the endpoint as it is now.

    `state` is `unchanged`, `re_encrypted` (only the key that its secrets are stored under is
    another), `changed` or `not_configured`. A version is None if it isn't known: the job's is
    past its retention, or the endpoint is not configured on the node asked.
    """

    state: str
    version: int | None
    current_version: int | None


@dataclass(frozen=True, slots=True)
class DeadLetterDetail(View):
    """A dead letter with its snapshot's version, and all its receipts and decisions."""

    dead_letter: DeadLetter
    snapshot: SnapshotVersions
    receipts: list[Receipt]
    decisions: list[Decision]


async def dead_letters(  # noqa: PLR0913 - one for each filter
    database: Database,
    *,
    namespace: str | None = None,
    endpoint_key: str | None = None,
    cause: str | None = None,
    run_profile_id: str | None = None,
    state: str | None = None,
    limit: int = 50,
    cursor: str | None = None,
    within: Sequence[str] | None = None,
) -> Page[DeadLetter]:
    """Dead letters newest first; `state` is `open` or `decided`.

    Raises RequestInvalid for a cursor that is none.
    """
    namespaces = narrowed(namespace, within)
    query = SQL.dead_letter_window if namespaces is None else SQL.dead_letter_window_of_namespaces
    wanted = {
        "endpoint_key": endpoint_key,
        "cause": cause,
        "run_profile_id": run_profile_id,
        "is_open": None if state is None else state == "open",
    }
    filters = {name: value for name, value in wanted.items() if value is not None}

    async def scan(after: Position | None, count: int) -> Sequence[Row]:
        before_at, before = after or _LATEST
        return await database.fetch_all(
            query,
            {
                "namespaces": namespaces,
                "before_at": before_at,
                "before": before,
                "count": count,
            },
        )

    async def choose(rows: Sequence[Row]) -> Mapping[Position, DeadLetter]:
        asked = [row for row in rows if all(row[name] == value for name, value in filters.items())]
        found = await _read(database, asked)
        return {(one.created_at.isoformat(), one.job_id): one for one, _ in found}

    return await read_page(
        scan,
        lambda row: (row["created_at"].astimezone(UTC).isoformat(), row["job_id"]),
        choose,
        after=position_of(cursor, datetime.fromisoformat, check_cursor_id),
        limit=limit,
        is_filtered=bool(filters),
    )


async def dead_letter_groups(
    database: Database, namespace: str | None = None, within: Sequence[str] | None = None
) -> list[DeadLetterGroup]:
    """The open dead letters grouped by namespace, endpoint and cause, the most first."""
    asked = {"namespaces": narrowed(namespace, within), "count": MAX_GROUPS}
    rows = await read_all(database, SQL.dead_letter_groups, asked)
    return [DeadLetterGroup(**row) for row in rows]


async def dead_letter(
    database: Database,
    job_id: str,
    current_snapshots: Mapping[str, str],
    within: Sequence[str] | None = None,
    *,
    has_answers: bool = True,
) -> DeadLetterDetail:
    """One dead letter. Raises NotFound.

    `current_snapshots` gives the snapshot of each endpoint that is configured now.
    """
    asked = known_id(job_id, "dead letter")
    row = await database.fetch_one(SQL.dead_letter_namespace, {"job_id": asked})
    if row is None or not is_within(row["namespace"], within):
        raise NotFound(f"there is no dead letter {asked}")
    key = {"namespace": row["namespace"], "job_id": asked}
    ((found, snapshot_id),) = await _read(database, [key])
    receipts = await read_all(
        database,
        SQL.job_receipts,
        {"namespace": row["namespace"], "job_id": array([asked]), "count": 1001},
    )
    decisions = await read_all(database, SQL.dead_letter_decisions, key)
    shown = [receipt_of(one) for one in receipts]
    return DeadLetterDetail(
        found if has_answers else withheld(found),
        await _versions(database, found, snapshot_id, current_snapshots.get(found.endpoint_key)),
        [one if has_answers else without_answer(one) for one in shown],
        [_decision(one) for one in decisions],
    )


async def _versions(
    database: Database, letter: DeadLetter, snapshot_id: str | None, current_id: str | None
) -> SnapshotVersions:
    rows = await database.fetch_all(
        SQL.snapshot_versions,
        {
            "namespace": letter.namespace,
            "endpoint_key": letter.endpoint_key,
            "count": _MAX_VERSIONS,
        },
    )
    known = {row["definition"]: number for number, row in enumerate(rows, 1)}
    old = definition_of(snapshot_id or "")
    if current_id is None:
        return SnapshotVersions("not_configured", known.get(old), None)
    current = definition_of(current_id)
    same = "unchanged" if current_id == snapshot_id else "re_encrypted"
    state = same if current == old else "changed"
    # One that no job was made with yet is not stored: it will be the next.
    return SnapshotVersions(state, known.get(old), known.get(current, len(rows) + 1))


async def _read(database: Database, rows: Sequence[Row]) -> list[tuple[DeadLetter, str | None]]:
    """The dead letters, each with the id of its job's snapshot."""
    if not rows:
        return []
    asked = {
        "namespace": array(row["namespace"] for row in rows),
        "job_id": array(row["job_id"] for row in rows),
    }
    receipts = {row["job_id"]: row for row in await read_all(database, SQL.last_receipts, asked)}
    return [
        (_dead_letter(row, receipts.get(row["job_id"])), row["snapshot_id"])
        for row in await read_all(database, SQL.dead_letters, asked)
    ]


def _dead_letter(row: Mapping[str, Any], receipt: Row | None) -> DeadLetter:
    letter = {name: value for name, value in row.items() if name != "snapshot_id"}
    decided = {
        "decision": letter.pop("decision"),
        "new_job_id": letter.pop("new_job_id"),
        "reason": letter.pop("decision_reason"),
        "batch_id": letter.pop("batch_id"),
        "decided_at": letter.pop("decided_at"),
    }
    is_open = decided["decision"] is None
    return DeadLetter(
        **{**letter, "url": row["url"] and safe_url(row["url"])},
        state="open" if is_open else "decided",
        decision=None if is_open else Decision(**decided),
        last_receipt=receipt_of(receipt) if receipt else None,
    )


def withheld(letter: DeadLetter) -> DeadLetter:
    """The dead letter without the body of the receiver's answer, which may repeat a payload."""
    receipt = letter.last_receipt
    return letter if receipt is None else replace(letter, last_receipt=without_answer(receipt))


def _decision(row: Row) -> Decision:
    return Decision(
        row["decision"], row["new_job_id"], row["reason"], row["batch_id"], row["decided_at"]
    )
