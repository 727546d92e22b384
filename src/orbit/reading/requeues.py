"""Bulk requeues: what was asked for, how far they are, and what became of their jobs.

The counts are always those of now: jobs of a batch that ended go on until they are delivered or
dead letters again. What ended with no job out is not counted again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from orbit.database.pool import Database
from orbit.database.queries import array, load
from orbit.errors import NotFound
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
REQUEUE_SQL = load("requeues")


@dataclass(frozen=True, slots=True)
class BulkRequeue(View):
    """A bulk requeue; `state` is `running`, `finished`, `stopped` or `cancelled`.

    While it runs it has a `phase`, `canary` or `flowing`, and `last_error` if no step could be
    done. `matching` is how many dead letters it found; of `requeued` jobs some are `delivered`,
    `failed` (dead letters again) or `pending`. `why` it ended; `job_id` stopped it.
    """

    batch_id: str
    namespace: str
    endpoint_key: str | None
    cause: str | None
    run_profile_id: str | None
    since_at: datetime | None
    until_at: datetime
    reason: str
    asked_by: str | None
    snapshot: str
    canary: int
    rate: float | None
    stop_on_failure: bool
    size_limit: int | None
    matching: int
    created_at: datetime
    state: str
    phase: str | None
    last_error: str | None
    requeued: int
    delivered: int
    failed: int
    pending: int
    why: str | None
    job_id: str | None
    ended_at: datetime | None


async def bulk_requeues(
    database: Database,
    *,
    namespace: str | None = None,
    state: str | None = None,
    limit: int = 50,
    cursor: str | None = None,
    within: Sequence[str] | None = None,
) -> Page[BulkRequeue]:
    """Bulk requeues newest first. Raises RequestInvalid for a cursor that is none."""
    namespaces = narrowed(namespace, within)
    query = SQL.requeue_window if namespaces is None else SQL.requeue_window_of_namespaces

    async def scan(after: Position | None, count: int) -> Sequence[Row]:
        before = after[0] if after else LARGEST_ID
        return await database.fetch_all(
            query, {"namespaces": namespaces, "before": before, "count": count}
        )

    async def choose(rows: Sequence[Row]) -> Mapping[Position, BulkRequeue]:
        asked = [row for row in rows if state in (None, row["state"])]
        return {(one.batch_id,): one for one in await _read(database, asked)}

    return await read_page(
        scan,
        lambda row: (row["batch_id"],),
        choose,
        after=position_of(cursor, check_cursor_id),
        limit=limit,
        is_filtered=state is not None,
    )


async def bulk_requeue(
    database: Database, batch_id: str, within: Sequence[str] | None = None
) -> BulkRequeue:
    """One bulk requeue. Raises NotFound."""
    asked = known_id(batch_id, "bulk requeue")
    row = await database.fetch_one(REQUEUE_SQL.find_batch, {"batch_id": asked})
    if row is None or not is_within(row["namespace"], within):
        raise NotFound(f"there is no bulk requeue {asked}")
    (found,) = await _read(database, [{"namespace": row["namespace"], "batch_id": asked}])
    return found


async def _read(database: Database, rows: Sequence[Row]) -> list[BulkRequeue]:
    if not rows:
        return []
    found = await read_all(database, SQL.requeue_batches, _keys(rows))
    moving = [row for row in found if row["pending"] != 0]
    counted = await database.fetch_all(REQUEUE_SQL.tally, _keys(moving)) if moving else []
    tallies = {tally["batch_id"]: tally for tally in counted}
    return [BulkRequeue(**(row | tallies.get(row["batch_id"], {}))) for row in found]


def _keys(rows: Sequence[Row]) -> dict[str, str]:
    return {
        "namespace": array(row["namespace"] for row in rows),
        "batch_id": array(row["batch_id"] for row in rows),
    }
