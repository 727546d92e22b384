"""Schedule slots: one row for every slot of every schedule, fired or not, with the reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from orbit.database.pool import Database
from orbit.database.queries import load
from orbit.reading.view import (
    Page,
    Position,
    Row,
    View,
    narrowed,
    position_of,
    read_all,
    read_page,
)
from orbit.vocabulary import check_key

SQL = load("reading")
_LATEST = ("infinity", "", "")


@dataclass(frozen=True, slots=True)
class Slot(View):
    """A schedule's slot; `run_profile_id` None is the schedule of raw cycles."""

    namespace: str
    run_profile_id: str | None
    slot_at: datetime
    outcome: str
    reason: str
    cycle_run_id: str | None
    decided_at: datetime


async def slots(
    database: Database,
    *,
    namespace: str | None = None,
    run_profile_id: str | None = None,
    outcome: str | None = None,
    limit: int = 50,
    cursor: str | None = None,
    within: Sequence[str] | None = None,
) -> Page[Slot]:
    """Slots newest first. Raises RequestInvalid for a cursor that is none."""
    namespaces = narrowed(namespace, within)
    query = SQL.slot_window if namespaces is None else SQL.slot_window_of_namespaces
    wanted = {"run_profile_id": run_profile_id, "outcome": outcome}
    filters = {name: value for name, value in wanted.items() if value is not None}

    async def scan(after: Position | None, count: int) -> Sequence[Row]:
        slot_at, in_namespace, of = after or _LATEST
        return await read_all(
            database,
            query,
            {
                "slot_at": slot_at,
                "namespace": in_namespace,
                "namespaces": namespaces,
                "run_profile_id": of,
                "count": count,
            },
        )

    async def choose(rows: Sequence[Row]) -> Mapping[Position, Slot]:
        return {
            _place(row): Slot(**{**row, "run_profile_id": row["run_profile_id"] or None})
            for row in rows
            if all(row[name] == value for name, value in filters.items())
        }

    return await read_page(
        scan,
        _place,
        choose,
        after=position_of(cursor, datetime.fromisoformat, check_key, _check_run_profile),
        limit=limit,
        is_filtered=bool(filters),
    )


def _place(row: Row) -> Position:
    return row["slot_at"].isoformat(), row["namespace"], row["run_profile_id"]


def _check_run_profile(text: str) -> str:
    return text and check_key(text)
