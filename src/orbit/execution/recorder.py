"""Writes what stages did: output, checkpoint, records, items and jobs in one transaction.

The stages of many cycles share a commit. Each is fenced by its cycle's lease number: the leases
are locked first, and every insert joins them, so a worker that lost its lease writes nothing.
A batch may be repeated after a broken connection: what is there already stays as it is. If its
commit had succeeded, and with it the lease was given up, its own checkpoints say so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orbit import metrics
from orbit.database.group_commit import GroupCommit
from orbit.database.pool import Connection, Database
from orbit.database.queries import array, load
from orbit.errors import LeaseLost
from orbit.execution.context import ClaimedCycle, Stage
from orbit.payload import Payload

SQL = load("cycle")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A stage that is done, its output if it has one, and what else is to be known of it."""

    stage: Stage
    payload: Payload | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One call of a step. `error` is None where it succeeded; sizes in bytes."""

    stage: Stage
    step: int
    attempt: int
    name: str
    error: str | None
    duration_seconds: float
    input_size: int
    output_size: int | None


@dataclass(frozen=True, slots=True)
class NewJob:
    """A dispatch job to be queued: one item for one endpoint's snapshot."""

    job_id: str
    item_index: int
    endpoint_key: str
    snapshot_id: str
    max_attempts: int


@dataclass(slots=True)
class StageResult:
    """What is to be committed for one cycle: one or more stages in a row.

    With `is_end` the cycle is over; with jobs (and not at its end) it then waits for them.
    """

    cycle: ClaimedCycle
    checkpoints: list[Checkpoint] = field(default_factory=list)
    records: list[StepRecord] = field(default_factory=list)
    items: Sequence[Payload] | None = None
    jobs: Sequence[NewJob] = ()
    is_end: bool = False

    def weight(self) -> int:
        """Bytes of payload that it holds."""
        outputs = sum(c.payload.size for c in self.checkpoints if c.payload)
        return outputs + sum(item.size for item in self.items or ())


class Recorder:
    """The group committer of stages."""

    def __init__(self, database: Database, node_id: str) -> None:
        self._database, self._node_id = database, node_id
        self._group = GroupCommit(database, self._flush, weigh=StageResult.weight)

    async def record(self, result: StageResult) -> None:
        """Returns when the result is committed. Raises LeaseLost if the cycle is not ours."""
        if not await self._group.commit(result):
            raise LeaseLost(f"cycle {result.cycle.cycle_id} is held by another worker")

    async def _flush(self, results: Sequence[StageResult]) -> Sequence[bool]:
        async with self._database.transaction() as connection:
            async with connection.pipeline():
                cursor = await connection.execute(
                    SQL.hold_cycles, _columns(self._node_id, [(r.cycle, r) for r in results])
                )
                for query, rows, columns in _plan(results):
                    await connection.execute(query, _columns(self._node_id, rows, **columns))
                held = {(row["cycle_id"], row["lease_number"]) for row in await cursor.fetchall()}
            held |= await self._written_before(connection, results, held)
        are_held = [(r.cycle.cycle_id, r.cycle.lease_number) in held for r in results]
        metrics.commit_entries.labels("stages").observe(len(results))
        for result, is_held in zip(results, are_held, strict=True):
            if result.is_end and is_held:
                metrics.cycles_ended.labels(_END["state"](result)).inc()
        return are_held

    async def _written_before(
        self, connection: Connection, results: Sequence[StageResult], held: set[tuple[str, int]]
    ) -> set[tuple[str, int]]:
        """Of the results that give up their lease and do not hold it: those committed before."""
        rows: list[_Row] = [
            (r.cycle, r.checkpoints[-1])
            for r in results
            if (r.jobs or r.is_end) and (r.cycle.cycle_id, r.cycle.lease_number) not in held
        ]
        if not rows:
            return set()
        given = _columns(self._node_id, rows, stage=lambda c: c.stage.value)
        cursor = await connection.execute(SQL.written_before, given)
        return {(row["cycle_id"], row["lease_number"]) for row in await cursor.fetchall()}


_Row = tuple[ClaimedCycle, Any]
_Write = tuple[bytes, list[_Row], dict[str, Callable[[Any], Any]]]

_CHECKPOINT: dict[str, Callable[[Checkpoint], Any]] = {
    "stage": lambda c: c.stage.value,
    "digest": lambda c: c.payload and c.payload.digest,
    "content_type": lambda c: c.payload and c.payload.content_type,
    "size": lambda c: c.payload and c.payload.size,
    "detail": lambda c: json.dumps(dict(c.detail)) if c.detail else "{}",
}
_RECORD: dict[str, Callable[[StepRecord], Any]] = {
    "stage": lambda r: r.stage.value,
    "step": lambda r: r.step,
    "attempt": lambda r: r.attempt,
    "name": lambda r: r.name,
    "outcome": lambda r: "succeeded" if r.error is None else "failed",
    "error": lambda r: r.error,
    "duration_seconds": lambda r: r.duration_seconds,
    "input_size": lambda r: r.input_size,
    "output_size": lambda r: r.output_size,
}
_ITEM: dict[str, Callable[[tuple[int, Payload]], Any]] = {
    "item_index": lambda i: i[0],
    "digest": lambda i: i[1].digest,
    "content_type": lambda i: i[1].content_type,
    "size": lambda i: i[1].size,
}
_JOB: dict[str, Callable[[tuple[NewJob, Payload]], Any]] = {
    "job_id": lambda j: j[0].job_id,
    "item_index": lambda j: j[0].item_index,
    "endpoint_key": lambda j: j[0].endpoint_key,
    "snapshot_id": lambda j: j[0].snapshot_id,
    "digest": lambda j: j[1].digest,
    "content_type": lambda j: j[1].content_type,
    "size": lambda j: j[1].size,
    "max_attempts": lambda j: j[0].max_attempts,
}
_WAIT: dict[str, Callable[[StageResult], Any]] = {
    "items": lambda r: len(r.items or ()),
    "jobs": lambda r: len(r.jobs),
}
_END: dict[str, Callable[[StageResult], Any]] = {
    "state": lambda r: "failed" if r.checkpoints[-1].stage is Stage.CYCLE_FAILED else "finished",
    "items": lambda r: len(r.items or ()),
}


def _plan(results: Sequence[StageResult]) -> list[_Write]:
    """The statements that a batch needs, in order; those without rows are left out."""
    outputs = {(r.cycle.cycle_id, p.digest): (r.cycle, p) for r in results for p in _outputs(r)}
    writes: list[_Write] = [
        (SQL.insert_payloads, list(outputs.values()), {"digest": lambda p: p.digest}),
        (
            SQL.insert_checkpoints,
            [(r.cycle, c) for r in results for c in r.checkpoints],
            _CHECKPOINT,
        ),
        (SQL.insert_records, [(r.cycle, s) for r in results for s in r.records], _RECORD),
        (
            SQL.insert_items,
            [(r.cycle, i) for r in results for i in enumerate(r.items or ())],
            _ITEM,
        ),
        (SQL.insert_jobs, [(r.cycle, j) for r in results for j in _jobs(r)], _JOB),
        (SQL.note_progress, [(r.cycle, r) for r in results if r.cycle.recoveries], {}),
        (SQL.await_dispatch, [(r.cycle, r) for r in results if r.jobs and not r.is_end], _WAIT),
        (SQL.end_cycles, [(r.cycle, r) for r in results if r.is_end], _END),
    ]
    return [write for write in writes if write[1]]


def _outputs(result: StageResult) -> list[Payload]:
    stages = [checkpoint.payload for checkpoint in result.checkpoints if checkpoint.payload]
    return [*stages, *(result.items or ())]


def _jobs(result: StageResult) -> list[tuple[NewJob, Payload]]:
    items = result.items or ()
    return [(job, items[job.item_index]) for job in result.jobs]


def _columns(node_id: str, rows: Sequence[_Row], **columns: Callable[[Any], Any]) -> dict[str, Any]:
    """Rows as one array per column: the lease that fences each, then what is asked for."""
    named: dict[str, Any] = {
        "node_id": node_id,
        "namespace": array([cycle.namespace for cycle, _ in rows]),
        "cycle_id": array([cycle.cycle_id for cycle, _ in rows]),
        "lease_number": array([cycle.lease_number for cycle, _ in rows]),
        "profile_id": array([cycle.profile_id for cycle, _ in rows]),
        "run_profile_id": array([cycle.run_profile_id for cycle, _ in rows]),
    }
    for name, value in columns.items():
        named[name] = array([value(row) for _, row in rows])
    if rows and isinstance(rows[0][1], Payload):
        named["content"] = [row.content for _, row in rows]
    return named


async def release(
    connection: Connection,
    node_id: str,
    cycles: Sequence[ClaimedCycle],
    *,
    delay_seconds: float = 0.0,
    error: str | None = None,
) -> None:
    """Gives the leases of cycles back, so that any node may go on after the delay.

    With an error it counts as a recovery, and the error is what the cycle fails with at the last.
    """
    rows = _columns(node_id, [(c, c) for c in cycles])
    given = {**rows, "delay_seconds": delay_seconds, "error": error}
    await connection.execute(SQL.release_cycles, given)


async def renew(
    connection: Connection, node_id: str, cycles: Sequence[ClaimedCycle], lease_seconds: float
) -> set[str]:
    """Prolongs the leases of cycles; the ids of those that are still ours."""
    rows = _columns(node_id, [(c, c) for c in cycles])
    cursor = await connection.execute(SQL.renew_cycles, {**rows, "lease_seconds": lease_seconds})
    return {row["cycle_id"] for row in await cursor.fetchall()}
