"""Sequencing: committed events get dense positions, by one node at a time.

Design note. A writer's events become visible when it commits, in any order; so no number that a
writer could draw is a place to read from. Beside its events it leaves one pending row per batch.
Who leads takes the pending rows that it sees, which are committed, and gives them the next
positions in the order of their ids; a batch that commits later gets later positions. Nothing
waits for an open transaction. Taking away, numbering and the last position commit together, under
the lock of the one row of `telemetry_sequencer`: a leader that is killed has done nothing, two
cannot number at once, and a leader that lost its lease meanwhile holds the lock or finds itself
replaced. The lease only keeps others from looking often.
"""

from __future__ import annotations

from dataclasses import dataclass

from orbit.database.pool import Database
from orbit.database.queries import load

SQL = load("telemetry")
BATCHES = 2000
LEASE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Pass:
    """What a pass did.

    `lag_seconds` is how long the oldest batch had waited since its statement; a batch of a long
    transaction counts from when it was written, not from the commit. `wait_seconds`: another
    node leads, for so long yet.
    """

    events: int = 0
    lag_seconds: float = 0.0
    is_more: bool = False
    wait_seconds: float = 0.0


async def sequence(
    database: Database, node_id: str, *, lease_seconds: float = LEASE_SECONDS, count: int = BATCHES
) -> Pass:
    """Numbers what is pending, `count` batches at most. Idle, or led by another, it is one read."""
    asked = {"node_id": node_id, "lease_seconds": lease_seconds, "count": count}
    seen = await database.fetch_one(SQL.look, asked)
    if seen is None:
        await database.execute(SQL.ensure_sequencer)
        return Pass(is_more=True)
    if not (seen["is_mine"] or seen["is_free"]):
        return Pass(wait_seconds=seen["wait_seconds"])
    if seen["is_mine"] and not seen["is_due"] and not seen["has_pending"]:
        return Pass()
    async with database.batch() as connection:
        await connection.execute(SQL.lead, asked)
        cursor = await connection.execute(SQL.number_batches, asked)
        row = await cursor.fetchone()
    if row is None or not row["batches"]:
        return Pass()
    return Pass(row["events"], row["lag_seconds"], row["batches"] == count)
