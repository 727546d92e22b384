"""Sealing: high-rate facts get dense numbers, and each batch's Merkle root becomes an entry.

Design note. A receipt, a record, a dead letter or a cycle is written without a thought of the
trail, but carries the id of the transaction that wrote it. A pass takes the facts of transactions
older than every one still under way: all of those have ended, so no row can appear among them
later, however late a long transaction commits. Numbers, leaf hashes, roots and the new place
commit together, under the lock of the one row of `audit_sealer`: a sealer that is killed has done
nothing, and two cannot be at it. A fact's number is unique by its key, so even a lost place makes
no double: what has its number keeps it.

Transaction ids of a restored dump are those of another server. Sealing then begins anew from the
lowest; facts that have numbers are passed over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from orbit.audit.merkle import leaf_hash, root
from orbit.audit.trail import SQL, Act, append
from orbit.database.pool import Connection, Database
from orbit.database.queries import array

BATCH = 5000
SEALED = "facts.sealed"
_ACTOR = "sealer"
FACTS_TO_SEAL = (
    SQL.facts.rstrip(b";")
    + b" AND fact.transaction_id >= %(low)s::text::xid8"
    + b" AND fact.transaction_id < %(until)s::text::xid8"
)


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
    asked = {"low": place["low"], "until": place["until"], "log": None}
    cursor = await connection.execute(FACTS_TO_SEAL, asked, binary=True)
    facts = [row for row in await cursor.fetchall() if row["number"] is None]
    facts.sort(key=lambda row: (row["log"], row["fact_id"], row["fact"], row["part"]))
    is_restored = place["is_restored"]
    until = "0" if is_restored else place["until"]
    acts = await _number(connection, facts)
    await connection.execute(SQL.move_sealer, {"until": until, "node_id": node_id})
    await append(connection, *acts)
    return Pass(len(facts), bool(place["is_more"] or is_restored))


async def _number(connection: Connection, facts: Sequence[Mapping[str, Any]]) -> list[Act]:
    """Numbers facts, which come log by log; the entries that seal them."""
    if not facts:
        return []
    logs = list(dict.fromkeys(row["log"] for row in facts))
    cursor = await connection.execute(SQL.last_numbers, {"log": array(logs)})
    last = {row["log"]: row["number"] for row in await cursor.fetchall()}
    hashes = [leaf_hash(row["body"].encode()) for row in facts]
    numbers: list[int] = []
    acts = []
    for log, group in groupby(range(len(facts)), key=lambda index: facts[index]["log"]):
        places = list(group)
        first = last[log] + 1
        numbers.extend(range(first, first + len(places)))
        acts.append(_sealed(log, first, [hashes[place] for place in places]))
    rows = {
        "log": array(row["log"] for row in facts),
        "number": array(numbers),
        "fact": array(row["fact"] for row in facts),
        "fact_id": array(row["fact_id"] for row in facts),
        "part": array(row["part"] for row in facts),
        "hash": hashes,
    }
    await connection.execute(SQL.insert_sealed, rows)
    return acts


def _sealed(log: str, first: int, hashes: Sequence[bytes]) -> Act:
    last = first + len(hashes) - 1
    detail = {"first": first, "last": last, "root": root(hashes).hex()}
    return Act(log, SEALED, _ACTOR, subject=f"{first}-{last}", detail=detail)
