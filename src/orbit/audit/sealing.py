"""Sealing: high-rate facts get dense numbers, and each batch's Merkle root becomes an entry.

Design note. A receipt, a record, a dead letter, an outcome or a cycle is written without a thought
of the trail, but carries the id of the transaction that wrote it. A pass takes the facts of
transactions older than every one still under way: all of those have ended, so no row can appear
among them later, however late a long transaction commits. Numbers, leaf hashes, roots and the new
place commit together, under the lock of the one row of `audit_sealer`: a sealer that is killed has
done nothing, and two cannot be at it. A batch is stored as it is sealed, one row for each log: a
row for each fact, with a key that says whether it has its number, cost more than all the rest of
sealing.

Where the place cannot be relied on, facts are looked for in the seals first, and what has its
number keeps it: all that was written before the place was lost and made anew; and in a restored
dump, whose transaction ids are another server's, all up to the highest of those. Sealing then
begins from the lowest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orbit.audit.merkle import HASH_BYTES, root
from orbit.audit.trail import SQL, Act, append
from orbit.database.pool import Connection, Database

BATCH = 5000
SEALED = "facts.sealed"
_ACTOR = "sealer"


@dataclass(frozen=True, slots=True)
class Pass:
    """What a pass did: how many facts it sealed, and whether there are more at once."""

    sealed: int
    is_more: bool


NOTHING = Pass(0, False)


async def seal(database: Database, node_id: str, count: int = BATCH) -> Pass:
    """Seals what can be sealed, about `count` facts of each kind at most.

    Does nothing if another node is at it. Idle, it costs one read.
    """
    place = await database.fetch_one(SQL.sealing_range, {"count": count})
    if place is None:
        await database.execute(SQL.ensure_sealer)
        return NOTHING
    if not (place["has_facts"] or place["is_restored"]):
        return NOTHING
    async with database.batch() as connection:  # heads are locked with the last words: the commit
        await connection.execute(SQL.bound_sealer)
        held = await connection.execute(SQL.hold_sealer)
        if await held.fetchone() is None:
            return NOTHING
        # Read again: what was seen before may have been sealed before the lock was had.
        found = await connection.execute(SQL.sealing_range, {"count": count})
        place = await found.fetchone()
        return NOTHING if place is None else await _seal(connection, place, node_id)


async def _seal(connection: Connection, place: Mapping[str, Any], node_id: str) -> Pass:
    asked = {name: place[name] for name in ("low", "until", "is_unsure")}
    cursor = await connection.execute(SQL.seal_facts, asked, binary=True)
    acts = [_sealed(**row) for row in await cursor.fetchall()]
    is_restored = place["is_restored"]
    moved = {"until": place["until"], "is_restored": is_restored, "node_id": node_id}
    await connection.execute(SQL.move_sealer, moved)
    await append(connection, *acts)
    count = sum(act.detail["last"] - act.detail["first"] + 1 for act in acts)
    return Pass(count, bool(place["is_more"] or is_restored))


def _sealed(log: str, first: int, last: int, hashes: bytes) -> Act:
    leaves = [hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)]
    detail = {"first": first, "last": last, "root": root(leaves).hex()}
    return Act(log, SEALED, _ACTOR, subject=f"{first}-{last}", detail=detail)
