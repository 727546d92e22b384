"""Cycles: lists of them with their state, and one with its whole lineage.

The lineage is everything that is stored of a cycle, from what asked for it to the last answer of
a receiver, but no payload's bytes and no secret. Items, jobs and records come up to a bound.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from orbit.database.pool import Database
from orbit.database.queries import array, load
from orbit.errors import NotFound
from orbit.reading.lanes import Hold, holds
from orbit.reading.receipts import Receipt, receipt_of, safe_url, without_answer
from orbit.reading.slots import Slot
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
from orbit.vocabulary import DRILL_PREFIX

SQL = load("reading")
MAX_LINEAGE = 10_000
_WAITING = ("ready", "retrying")  # states of a job that is to be sent


@dataclass(frozen=True, slots=True)
class CycleSummary(View):
    """A cycle with its state; `reason` says why it failed. `dead_lettered` counts jobs."""

    cycle_run_id: str
    namespace: str
    profile_id: str | None
    run_profile_id: str | None
    trigger: str
    slot_at: datetime | None
    state: str
    stage: str | None
    stage_at: datetime | None
    created_at: datetime
    ended_at: datetime | None
    dead_lettered: int
    is_waiting: bool
    rerun_of: str | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class InitiationView(View):
    """A cycle's deterministic first object and its SHA-256."""

    hash: str
    context: Any


@dataclass(frozen=True, slots=True)
class CycleView(CycleSummary):
    """A cycle with what it began from."""

    idempotency_key: str | None
    revision: str | None
    endpoint_keys: list[str] | None
    value_tags: dict[str, Any]
    traceparent: str
    node_id: str
    reruns: list[str]
    initiation: InitiationView


@dataclass(frozen=True, slots=True)
class CheckpointView(View):
    """A stage that is done; size in bytes."""

    stage: str
    digest: str | None
    content_type: str | None
    size: int | None
    detail: dict[str, Any]
    lease_number: int
    node_id: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class ItemView(View):
    """A normalised payload; size in bytes."""

    item_index: int
    digest: str
    content_type: str
    size: int
    created_at: datetime


@dataclass(frozen=True, slots=True)
class JobView(View):
    """A dispatch job with its attempts' receipts; `cause` is that of its dead letter.

    `held`, while it waits in a lane whose breaker is open: why it is not sent.
    """

    job_id: str
    item_index: int
    endpoint_key: str
    url: str
    method: str
    token_fingerprint: str | None
    digest: str
    content_type: str
    size: int
    state: str
    attempts: int
    max_attempts: int
    requeued_from: str | None
    due_at: datetime | None
    created_at: datetime
    cause: str | None
    held: Hold | None
    receipts: list[Receipt]


@dataclass(frozen=True, slots=True)
class RecordView(View):
    """One call of a step."""

    stage: str
    step: int
    attempt: int
    name: str
    outcome: str
    error: str | None
    duration_seconds: float
    input_size: int
    output_size: int | None
    lease_number: int
    node_id: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class LedgerView(View):
    """What a run profile's execution was for, and what it took."""

    state: str
    tags: dict[str, Any]
    items: int
    jobs: int
    delivered: int
    dead_lettered: int
    attempts: int
    bytes: int
    wall_seconds: float
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Lineage(View):
    """All that is stored of a cycle; `is_complete` is false where a list was cut at the limit."""

    cycle: CycleView
    checkpoints: list[CheckpointView]
    items: list[ItemView]
    jobs: list[JobView]
    records: list[RecordView]
    value_ledger: LedgerView | None
    slot: Slot | None
    is_complete: bool


async def cycles(
    database: Database,
    *,
    namespace: str | None = None,
    run_profile_id: str | None = None,
    state: str | None = None,
    limit: int = 50,
    cursor: str | None = None,
    within: Sequence[str] | None = None,
) -> Page[CycleSummary]:
    """Cycles newest first, in a namespace, of a run profile, in a state; drills' if asked for.

    `within`, here and in all of reading: the namespaces that there are for who asks; None: all.

    Raises RequestInvalid for a cursor that is none.
    """
    namespaces = narrowed(namespace, within)
    query = SQL.cycle_window if namespaces is None else SQL.cycle_window_of_namespaces
    if state == "running":
        query = SQL.cycle_window_of_running

    async def scan(after: Position | None, count: int) -> Sequence[Row]:
        before = after[0] if after else LARGEST_ID
        asked = {"namespaces": namespaces, "before": before, "count": count}
        return await database.fetch_all(query, {**asked, "drills": DRILL_PREFIX})

    async def choose(rows: Sequence[Row]) -> Mapping[Position, CycleSummary]:
        asked = [row for row in rows if run_profile_id in (None, row["run_profile_id"])]
        found = await summaries(database, asked)
        return {(one.cycle_run_id,): one for one in found if state in (None, one.state)}

    return await read_page(
        scan,
        lambda row: (row["cycle_id"],),
        choose,
        after=position_of(cursor, check_cursor_id),
        limit=limit,
        is_filtered=run_profile_id is not None or state is not None,
    )


async def summaries(database: Database, rows: Sequence[Row]) -> list[CycleSummary]:
    """The cycles that rows name by `namespace` and `cycle_id`, newest first."""
    if not rows:
        return []
    asked = {
        "namespace": array(row["namespace"] for row in rows),
        "cycle_id": array(row["cycle_id"] for row in rows),
    }
    return [CycleSummary(**row) for row in await read_all(database, SQL.cycle_summaries, asked)]


async def lineage(
    database: Database,
    cycle_id: str,
    limit: int = 1000,
    within: Sequence[str] | None = None,
    *,
    has_answers: bool = True,
) -> Lineage:
    """Everything stored of a cycle; of items, jobs and records at most `limit` each.

    A receiver's answer may repeat what it was sent: without `has_answers` its body is left out.
    Raises NotFound.
    """
    asked = known_id(cycle_id, "cycle")
    found = await read_all(database, SQL.find_cycle, {"cycle_id": asked})
    if not found or not is_within(found[0]["namespace"], within):
        raise NotFound(f"there is no cycle {asked}")
    cycle = await _cycle(database, found[0])
    params = {
        "namespace": cycle.namespace,
        "cycle_id": asked,
        "run_profile_id": cycle.run_profile_id or "",
        "slot_at": cycle.slot_at,
        "count": limit + 1,
    }
    checkpoints = await read_all(database, SQL.cycle_checkpoints, params)
    items = await read_all(database, SQL.cycle_items, params)
    records = await read_all(database, SQL.cycle_records, params)
    jobs, has_all_jobs = await _jobs(database, params, limit, has_answers=has_answers)
    ledger = await read_all(database, SQL.cycle_ledger, params)
    slots = await read_all(database, SQL.find_slot, params) if cycle.slot_at else []
    return Lineage(
        cycle=cycle,
        checkpoints=[CheckpointView(**row) for row in checkpoints],
        items=[ItemView(**row) for row in items[:limit]],
        jobs=jobs,
        records=[RecordView(**row) for row in records[:limit]],
        value_ledger=LedgerView(**ledger[0]) if ledger else None,
        slot=Slot(**slots[0]) if slots else None,
        is_complete=has_all_jobs and max(len(items), len(records)) <= limit,
    )


async def _cycle(database: Database, row: dict[str, Any]) -> CycleView:
    key = {"namespace": row["namespace"], "cycle_id": row["cycle_run_id"]}
    (status,) = await read_all(
        database, SQL.cycle_summaries, {name: array([value]) for name, value in key.items()}
    )
    # Only a failed cycle is run again, so that for any other nothing needs looking for.
    has_failed = status["state"] == "failed"
    reruns = await database.fetch_all(SQL.cycle_reruns, key) if has_failed else []
    initiation = InitiationView(row.pop("hash"), json.loads(row.pop("context")))
    return CycleView(
        **{**status, **row},
        reruns=[rerun["cycle_id"] for rerun in reruns],
        initiation=initiation,
    )


async def _jobs(
    database: Database, params: dict[str, Any], limit: int, *, has_answers: bool
) -> tuple[list[JobView], bool]:
    """The jobs with their receipts, and whether those are all."""
    time = params["cycle_id"][:13]
    rows = await read_all(
        database,
        SQL.cycle_jobs,
        {
            **params,
            "first_id": f"{time}-0000-0000-000000000000",
            "last_id": f"{time}-ffff-ffff-ffffffffffff",
        },
    )
    receipts, has_all_receipts = await _receipts(database, params["namespace"], rows[:limit])
    waiting = {row["endpoint_key"] for row in rows if row["state"] in _WAITING}
    held = await holds(database, params["namespace"], waiting)
    jobs = [
        JobView(
            **{**row, "url": safe_url(row["url"])},
            held=held.get(row["endpoint_key"]) if row["state"] in _WAITING else None,
            receipts=[
                one if has_answers else without_answer(one) for one in receipts[row["job_id"]]
            ],
        )
        for row in rows[:limit]
    ]
    return jobs, len(rows) <= limit and has_all_receipts


async def _receipts(
    database: Database, namespace: str, jobs: Sequence[Row]
) -> tuple[Mapping[str, list[Receipt]], bool]:
    """The receipts of each job, and whether those are all."""
    found = await read_all(
        database,
        SQL.job_receipts,
        {
            "namespace": namespace,
            "job_id": array(row["job_id"] for row in jobs),
            "count": MAX_LINEAGE + 1,
        },
    )
    by_job: dict[str, list[Receipt]] = defaultdict(list)
    for receipt in found[:MAX_LINEAGE]:
        by_job[receipt["job_id"]].append(receipt_of(receipt))
    return by_job, len(found) <= MAX_LINEAGE
