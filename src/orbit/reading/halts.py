"""Halts: what is halted now and why, what is still in flight of it, and how earlier ones ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from orbit.database.pool import Database
from orbit.database.queries import load
from orbit.governance.in_flight import Flight, listed
from orbit.governance.rules import needs_two_persons
from orbit.reading.view import (
    Page,
    Position,
    Row,
    View,
    check_cursor_number,
    narrowed,
    position_of,
    read_all,
    read_page,
)

SQL = load("reading")
MAX_IN_FLIGHT = 1000
_HIGHEST = str(2**62)


@dataclass(frozen=True, slots=True)
class HaltedNamespace(View):
    """A namespace that is halted now; `resume_asked_by` the first of two persons.

    `reason` is the last that was given since it ran.
    """

    namespace: str
    epoch: int
    halted_at: datetime
    until_at: datetime | None
    reason: str | None
    actor: str
    resume_asked_by: str | None


@dataclass(frozen=True, slots=True)
class FlightView(View):
    """What is in flight: an attempt of a job, or without `job_id` a cycle in a node's hand.

    `outcome` is null while it is out; then its receipt's, `withheld` (no byte left) or, of a
    cycle, `released`.
    """

    job_id: str | None
    cycle_run_id: str
    endpoint_key: str | None
    node_id: str
    attempt: int | None
    outcome: str | None


@dataclass(frozen=True, slots=True)
class PastHalt(View):
    """A halt, and how it ended: by a `person`, by its `until`, or not yet."""

    epoch: int
    halted_at: datetime
    reason: str | None
    actor: str
    until_at: datetime | None
    resume_asked_by: str | None
    resumed_at: datetime | None
    ended_by: str | None
    resumed_by: str | None
    resume_reason: str | None


@dataclass(frozen=True, slots=True)
class NamespaceState(View):
    """A namespace's `state`, `running` or `halted`, under the epoch of its last halt (0: none).

    `in_flight` has at most 1,000 of `in_flight_count`. `history`: its halts, newest first.
    """

    namespace: str
    state: str
    epoch: int
    halted_at: datetime | None
    reason: str | None
    actor: str | None
    until_at: datetime | None
    resume_asked_by: str | None
    is_two_person_resume: bool
    in_flight_count: int
    in_flight: list[FlightView]
    history: Page[PastHalt]


def flight_view(flight: Flight) -> FlightView:
    """A flight as it is shown."""
    return FlightView(
        flight.job_id,
        flight.cycle_id,
        flight.endpoint_key,
        flight.node_id,
        flight.attempt,
        flight.outcome,
    )


async def halted_namespaces(
    database: Database, within: Sequence[str] | None = None
) -> list[HaltedNamespace]:
    """Those that are halted now, of those that there are for who asks; at most 200."""
    asked = {"namespaces": narrowed(None, within)}
    rows = await read_all(database, SQL.halted_namespaces, asked)
    return [HaltedNamespace(**row) for row in rows]


async def namespace_state(
    database: Database, namespace: str, *, limit: int = 50, cursor: str | None = None
) -> NamespaceState:
    """A namespace and its halts. Raises RequestInvalid for a cursor that is none."""
    history = await _history(database, namespace, limit, cursor)
    rows = await read_all(database, SQL.namespace_state, {"namespace": namespace})
    row = rows[0] if rows else {}
    is_halted = row.get("state") == "halted"
    async with database.connection() as connection:
        flights = await listed(connection, namespace)
        is_guarded = await needs_two_persons(connection, namespace)
    return NamespaceState(
        namespace=namespace,
        state="halted" if is_halted else "running",
        epoch=row.get("epoch", 0),
        halted_at=row["halted_at"] if is_halted else None,
        reason=row["reason"] if is_halted else None,
        actor=row["actor"] if is_halted else None,
        until_at=row.get("until_at"),
        resume_asked_by=row["resume_asked_by"] if is_halted else None,
        is_two_person_resume=is_guarded,
        in_flight_count=len(flights),
        in_flight=[flight_view(one) for one in flights[:MAX_IN_FLIGHT]],
        history=history,
    )


async def _history(
    database: Database, namespace: str, limit: int, cursor: str | None
) -> Page[PastHalt]:
    async def scan(after: Position | None, count: int) -> Sequence[Row]:
        before = int(after[0] if after else _HIGHEST)
        asked = {"namespace": namespace, "before": before, "count": count}
        return await read_all(database, SQL.namespace_halts, asked)

    async def choose(rows: Sequence[Row]) -> Mapping[Position, PastHalt]:
        return {(str(row["epoch"]),): PastHalt(**row) for row in rows}

    return await read_page(
        scan,
        lambda row: (str(row["epoch"]),),
        choose,
        after=position_of(cursor, check_cursor_number),
        limit=limit,
        is_filtered=False,
    )
