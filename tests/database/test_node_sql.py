"""sql/node.sql: nodes tell that they live, and keep partitions and statistics in order."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from orbit.database.pool import Database
from orbit.database.queries import array, load
from orbit.services.janitor import RETAINED_FACTS, Janitor
from tests.database.engine import count, only

SQL = load("node")


def row(node_id: str) -> dict[str, Any]:
    """A node, as it tells of itself."""
    return {
        "node_id": node_id,
        "name": "host:1",
        "address": None,
        "roles": array(["api", "worker"]),
        "version": "1",
        "files_revision": None,
    }


def seen(node_id: str) -> dict[str, Any]:
    """A node's heartbeat."""
    return {"node_id": node_id, "is_draining": True, "files_revision": "f"}


async def test_a_node_enters_is_seen_and_leaves(database: Database, node_id: str) -> None:
    """Its row follows what it says of itself, and goes when it ends in order."""
    assert await database.fetch_one(SQL.see_node, seen(node_id)) is None
    await database.execute(SQL.enter_node, row(node_id))
    await database.execute(SQL.enter_node, row(node_id))
    assert await database.fetch_one(SQL.see_node, seen(node_id)) is not None
    found = await only(database, "SELECT roles, is_draining, files_revision FROM node")
    assert found == {"roles": ["api", "worker"], "is_draining": True, "files_revision": "f"}
    await database.execute(SQL.leave_node, {"node_id": node_id})
    assert await count(database, "node") == 0


async def test_a_node_unseen_for_a_day_is_forgotten(database: Database, node_id: str) -> None:
    """A dead node's row is of use for a while, and then in the way."""
    await database.execute(SQL.enter_node, row(node_id))
    await database.execute(SQL.forget_nodes)
    assert await count(database, "node") == 1
    await database.execute(b"UPDATE node SET seen_at = seen_at - interval '25 hours'")
    await database.execute(SQL.forget_nodes)
    assert await count(database, "node") == 0


async def test_a_queue_that_filled_up_is_analyzed(database: Database, owner_dsn: str) -> None:
    """A lease table that looked empty is looked at again as soon as it is not, and then left."""
    async with await psycopg.AsyncConnection.connect(owner_dsn, autocommit=True) as owner:
        await owner.execute("VACUUM ANALYZE cycle_lease")
        await owner.execute(
            "INSERT INTO cycle_lease (namespace, cycle_id, run_profile_id, due_at)"
            " SELECT 'a', gen_random_uuid(), '', 'infinity' FROM generate_series(1, 2000)"
        )
        await owner.execute("SELECT pg_stat_force_next_flush()")
    first = await database.fetch_one(SQL.refresh_statistics)
    assert first == {"refreshed": ["cycle_lease"]}
    assert await database.fetch_one(SQL.refresh_statistics) == {"refreshed": []}


@pytest.mark.parametrize("days", [0, 30])
async def test_the_janitor_keeps_what_is_young(database: Database, days: int) -> None:
    """With any retention, a pass over a fresh database drops nothing and rests for an hour."""
    before = await count(database, "pg_inherits")
    assert await Janitor(database, fact_retention_days=days).run_once() == 3600
    assert await count(database, "pg_inherits") == before


async def test_the_janitor_may_drop_every_fact_that_it_retains(database: Database) -> None:
    """The names are partitioned facts, but ledgers, dead letters and telemetry."""
    rows = await database.fetch_all(
        b"SELECT partrelid::regclass::text AS fact FROM pg_partitioned_table"
    )
    kept = {found["fact"] for found in rows} - set(RETAINED_FACTS)
    telemetry = {"telemetry_batch", "telemetry_event"}
    assert kept == {"value_ledger_entry", "dead_letter_dispatch"} | telemetry
