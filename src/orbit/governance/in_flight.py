"""What of a halted namespace is still out: open attempts, and cycles that a node carries on.

Each has an end: an attempt its receipt, or it was given back before a byte left; a cycle its
lease. An attempt whose worker is gone ends when its lease has run out and somebody has settled
it as unknown: a worker that wakes up later finds its lease over by its own clock, and no
heartbeat of it prolongs what is not its own any more. So nothing here trusts that a lease's time
alone is over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from psycopg.errors import LockNotAvailable

from orbit.database.pool import Connection
from orbit.database.queries import array, load

SQL = load("halt")
WITHHELD = "withheld"
RELEASED = "released"


@dataclass(frozen=True, slots=True)
class Flight:
    """An attempt, or with no `job_id` a cycle, that a node had in hand; `number` of its lease.

    `outcome` is None while it is out; then what its receipt says, `withheld` (no byte left) or,
    of a cycle, `released`.
    """

    job_id: str | None
    cycle_id: str
    endpoint_key: str | None
    node_id: str
    attempt: int | None
    number: int
    outcome: str | None = None

    @property
    def key(self) -> tuple[str, int]:
        """What names it among the leases."""
        return self.job_id or self.cycle_id, self.number


@dataclass(frozen=True, slots=True)
class Look:
    """What is out now, by key; whether the halt is still in force, and some lease is over."""

    is_in_force: bool
    out: frozenset[tuple[str, int]]
    has_expired: bool


async def listed(connection: Connection, namespace: str) -> list[Flight]:
    """All that is in flight."""
    asked = {"namespace": namespace}
    attempts = await connection.execute(SQL.attempts_in_flight, asked)
    flights = [
        Flight(
            row["job_id"],
            row["cycle_id"],
            row["endpoint_key"],
            row["node_id"],
            row["attempt"],
            row["lease_number"],
        )
        for row in await attempts.fetchall()
    ]
    cycles = await connection.execute(SQL.cycles_in_flight, asked)
    return flights + [
        Flight(None, row["cycle_id"], None, row["node_id"], None, row["lease_number"])
        for row in await cycles.fetchall()
    ]


async def look(connection: Connection, namespace: str, epoch: int) -> Look:
    """What of it is out still; takes cycles' leases that have run out from their owners."""
    asked = {"namespace": namespace, "epoch": epoch}
    with suppress(LockNotAvailable):  # all leases are being rebuilt: these stay out meanwhile
        await connection.execute(SQL.free_expired_cycles, asked)
    row = await (await connection.execute(SQL.still_in_flight, asked)).fetchone()
    assert row is not None
    out = frozenset(_keys(row))
    return Look(row["is_in_force"], out, row["has_expired"])


async def with_outcomes(
    connection: Connection, namespace: str, flights: Sequence[Flight], out: frozenset[Any]
) -> list[Flight]:
    """The flights, each that is not out any more with its outcome."""
    over = [one for one in flights if one.key not in out]
    attempts = [one for one in over if one.job_id is not None]
    found: dict[tuple[str, int], str] = {}
    if attempts:
        asked = {
            "namespace": array(namespace for _ in attempts),
            "job_id": array(one.job_id for one in attempts),
            "attempt": array(one.attempt for one in attempts),
        }
        rows = await (await connection.execute(SQL.outcomes, asked)).fetchall()
        found = {(row["job_id"], row["attempt"]): row["outcome"] for row in rows}
    return [one if one.key in out else replace(one, outcome=_end(one, found)) for one in flights]


def _end(flight: Flight, receipts: Mapping[tuple[str, int], str]) -> str:
    if flight.job_id is None or flight.attempt is None:
        return RELEASED
    return receipts.get((flight.job_id, flight.attempt), WITHHELD)


def _keys(row: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for text in (*row["attempts"], *row["cycles"]):
        name, _, number = text.partition(" ")
        yield name, int(number)
