"""The overview: what runs, what waits, what did not run and why, and whether all is well.

Cheap however long the history is: live tables are counted up to a bound, history is looked at
from its newest end only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Any

from orbit.database.pool import Database
from orbit.database.queries import load
from orbit.database.upgrade import HEAD
from orbit.reading.halts import HaltedNamespace, halted_namespaces
from orbit.reading.lanes import LaneView, waiting_lanes
from orbit.reading.slots import Slot
from orbit.reading.view import View, is_within, narrowed, read_all

SQL = load("reading")
_SCHEDULES_SHOWN = 100


@dataclass(frozen=True, slots=True)
class NodeView(View):
    """A node as it told of itself; `is_in_step`: its files say what is in force."""

    node_id: str
    name: str
    address: str | None
    roles: list[str]
    version: str
    is_draining: bool
    is_alive: bool
    is_in_step: bool
    started_at: datetime
    seen_at: datetime


@dataclass(frozen=True, slots=True)
class ActiveCycles(View):
    """Active cycles, counted up to 10,000; by stage up to 1,000 of them."""

    active: int
    waiting: int
    by_stage: dict[str, int]


@dataclass(frozen=True, slots=True)
class FailedCycle(View):
    """A cycle that failed, and why."""

    cycle_run_id: str
    namespace: str
    run_profile_id: str | None
    failed_at: datetime
    reason: str | None


@dataclass(frozen=True, slots=True)
class FailedCycles(View):
    """How many of the last 24 hours' cycles failed, among the newest 1,000, and the newest 5."""

    count: int
    newest: list[FailedCycle]


@dataclass(frozen=True, slots=True)
class Due(View):
    """When a schedule's next slot is to be decided; None: never."""

    namespace: str
    run_profile_id: str | None
    due_at: datetime | None


@dataclass(frozen=True, slots=True)
class Store(View):
    """The database; partitions for new facts reach until `partitions_until`."""

    server_version: str
    schema_revision: str | None
    is_schema_current: bool
    partitions_until: datetime | None


@dataclass(frozen=True, slots=True)
class Status(View):
    """The overview; `lanes` are those with jobs to send.

    `audit_contradictions`: where the audit trail is not what this node signed, and why.
    """

    now: datetime
    is_paused: bool
    halted_namespaces: list[HaltedNamespace]
    revision: str | None
    nodes: list[NodeView]
    cycles: ActiveCycles
    failed_cycles: FailedCycles
    lanes: list[LaneView]
    attempts_in_flight: int
    open_dead_letters: int
    slots_not_fired: list[Slot]
    schedules: list[Due]
    audit_contradictions: dict[str, str]
    database: Store


async def probe(database: Database) -> str | None:
    """The schema's revision, if the database answers."""
    row = await database.fetch_one(SQL.probe)
    return row["schema_revision"] if row else None


async def status(
    database: Database,
    *,
    lease_seconds: float,
    is_paused: bool,
    within: Sequence[str] | None = None,
    contradictions: Mapping[str, str] = MappingProxyType({}),
) -> Status:
    """What is to be known at a glance, of the namespaces that there are for who asks."""
    asked = {"namespaces": narrowed(None, within)}
    (store,) = await read_all(database, SQL.store)
    (in_flight,) = await read_all(database, SQL.in_flight, asked)
    (dead,) = await read_all(database, SQL.open_dead_letters, asked)
    return Status(
        now=store["now"],
        is_paused=is_paused,
        halted_namespaces=await halted_namespaces(database, within),
        revision=store["revision"],
        nodes=await _nodes(database, lease_seconds, store["declared_revision"]),
        cycles=await _active_cycles(database, asked),
        failed_cycles=await _failed_cycles(database, asked),
        lanes=await waiting_lanes(database, within),
        attempts_in_flight=in_flight["attempts"],
        open_dead_letters=dead["open"],
        slots_not_fired=[
            Slot(**row) for row in await read_all(database, SQL.slots_not_fired, asked)
        ],
        schedules=await _schedules(database, asked),
        audit_contradictions={
            log: why for log, why in contradictions.items() if is_within(log, within)
        },
        database=Store(
            store["server_version"],
            store["schema_revision"],
            store["schema_revision"] == HEAD,
            store["partitions_until"],
        ),
    )


async def _nodes(database: Database, lease_seconds: float, revision: str | None) -> list[NodeView]:
    rows = await read_all(database, SQL.nodes, {"lease_seconds": lease_seconds})
    return [
        NodeView(is_in_step=row.pop("files_revision") in (None, revision), **row) for row in rows
    ]


async def _schedules(database: Database, asked: Mapping[str, Any]) -> list[Due]:
    rows = await read_all(database, SQL.schedules, {**asked, "count": _SCHEDULES_SHOWN})
    return [Due(row["namespace"], row["run_profile_id"] or None, row["due_at"]) for row in rows]


async def _active_cycles(database: Database, asked: Mapping[str, Any]) -> ActiveCycles:
    (total,) = await read_all(database, SQL.active_cycles, asked)
    stages = await read_all(database, SQL.active_stages, asked)
    by_stage = {row["stage"] or "accepted": row["cycles"] for row in stages}
    return ActiveCycles(total["active"], total["waiting"], by_stage)


async def _failed_cycles(database: Database, asked: Mapping[str, Any]) -> FailedCycles:
    rows = await read_all(database, SQL.failed_cycles, asked)
    count = rows[0]["failed"] if rows else 0
    for row in rows:
        del row["failed"]
    return FailedCycles(count, [FailedCycle(**row) for row in rows])
