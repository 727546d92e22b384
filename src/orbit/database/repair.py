"""Rebuilds leases from facts: what makes a lost, emptied or half-restored lease table harmless.

Facts say what has happened, and so what is left to do: a cycle without its end goes on from its
last checkpoint, a job that is neither delivered nor dead is sent again. Safe while nodes run:
no lease moves meanwhile, and no configuration. Leases that exist keep their owner; only the
counts of cycles that wait for their jobs are set right. What it cannot know, it does not
pretend: an attempt that was open when its lease was lost has its number used again, and a cycle
that waited for its predecessor begins at once.

Schedules are not rebuilt here: the scheduler writes them anew when it finds none.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from psycopg.errors import DeadlockDetected

from orbit.clock import SystemClock, new_id
from orbit.database.pool import Connection, Database
from orbit.database.queries import array, load

SQL = load("repair")
CONFIGURATION_SQL = load("configuration")
CYCLE_SQL = load("cycle")

# A lease's number can run ahead of the facts by the takeovers that left no trace. Far below this.
_STRIDE = 100_000
_TRIES = 10


Note = Callable[[Connection, Mapping[str, int]], Awaitable[None]]


async def repair(database: Database, note: Note | None = None) -> dict[str, int]:
    """Gives every unfinished cycle and job that has no lease a new one; repeating does no harm.

    `note` is called last in the transaction that has changed something, with what it changed.
    Returns what was rebuilt: `configuration` (0 or 1), `jobs`, `cycles`; and of the cycles that
    wait for their jobs, how many were `recounted` and how many were complete, so `ended`. Last,
    bulk `requeues` that have not ended, `fences` of namespaces that were ever halted, and how many
    wrong `heads` of the audit trail were forgotten, and how many batches of `events` had neither a
    position nor a row that asks for one.
    Raises one of pool.TRANSIENT if a lock cannot be had within 10 s; then nothing has changed.
    """
    for remaining in reversed(range(_TRIES)):
        try:
            return await _rebuild(database, note)
        except DeadlockDetected:
            # Stages lock one lease table first, settlements the other: no order suits both.
            if not remaining:
                raise
    raise AssertionError("the last try returns or raises")


async def _rebuild(database: Database, note: Note | None) -> dict[str, int]:
    async with database.transaction() as connection:
        for lock in (
            SQL.prepare,
            CONFIGURATION_SQL.lock_configuration,
            SQL.lock_partitions,
            SQL.lock_leases,
            SQL.lock_sequencer,
        ):
            await connection.execute(lock)
        stride = {"stride": _STRIDE}
        rebuilt = {
            "configuration": (await connection.execute(SQL.rebuild_configuration)).rowcount,
            "jobs": (await connection.execute(SQL.rebuild_jobs, stride)).rowcount,
            "cycles": (await connection.execute(SQL.rebuild_cycles, stride)).rowcount,
            "recounted": (await connection.execute(SQL.recount_jobs)).rowcount,
            "ended": await _end_completed(connection),
            "requeues": (await connection.execute(SQL.rebuild_requeues, stride)).rowcount,
            "fences": (await connection.execute(SQL.rebuild_fences)).rowcount,
            "heads": (await connection.execute(SQL.rebuild_heads)).rowcount,
            "events": (await connection.execute(SQL.rebuild_pending)).rowcount,
        }
        if note is not None and any(rebuilt.values()):
            await note(connection, rebuilt)
        return rebuilt


async def _end_completed(connection: Connection) -> int:
    cursor = await connection.execute(SQL.completed_cycles)
    completed = await cursor.fetchall()
    if completed:
        cycles = [row["cycle_id"] for row in completed]
        await connection.execute(
            CYCLE_SQL.end_dispatched,
            {
                "namespace": array(row["namespace"] for row in completed),
                "cycle_id": array(cycles),
                "first": min(cycles),
                "last": max(cycles),
                "node_id": new_id(SystemClock().now()),
            },
        )
    return len(completed)
