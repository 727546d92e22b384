"""Sealing: every fact gets its number once, whatever commits late, rolls back or is killed."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from orbit.audit import sealing
from orbit.audit.sealing import NOTHING, seal
from orbit.audit.verification import verify
from orbit.clock import DatabaseClock, new_id
from orbit.database.pool import Database
from tests.scenario.conftest import until

DEAD = """
INSERT INTO dead_letter_dispatch (namespace, job_id, cycle_id, endpoint_key, cause, attempts)
SELECT 'ns-' || mod(n, 3), (substr(%s, 1, 24) || lpad(to_hex(n), 12, '0'))::uuid,
    %s, 'e', 'status 500', 4 FROM generate_series(%s::int, %s::int) AS n
"""


@pytest.fixture
def die(clock: DatabaseClock) -> Callable[..., None]:
    """Writes dead letters numbered from one to another, in a given session."""
    cycle_id = new_id(clock.now())

    def write(connection: psycopg.Connection[Any], first: int, last: int) -> None:
        connection.execute(DEAD.encode(), (cycle_id, cycle_id, first, last))

    return write


async def numbers(database: Database) -> dict[str, list[int]]:
    """The numbers of each log."""
    rows = await database.fetch_all(
        b"SELECT log, array_agg(number ORDER BY number) AS numbers FROM audit_sealed_fact"
        b" GROUP BY log ORDER BY log"
    )
    return {row["log"]: row["numbers"] for row in rows}


async def test_a_batch_is_numbered_and_its_root_is_an_entry(
    database: Database, owner_dsn: str, node_id: str, die: Callable[..., None]
) -> None:
    """Each namespace's facts are numbered densely, and verification finds them as they were."""
    with psycopg.connect(owner_dsn) as connection:
        die(connection, 1, 30)
    done = await seal(database, node_id)
    assert (done.sealed, done.is_more) == (30, False)
    assert await numbers(database) == {f"ns-{n}": list(range(1, 11)) for n in range(3)}
    assert await seal(database, node_id) == NOTHING
    report = verify(owner_dsn)
    assert report.findings == []
    assert (report.facts, report.unsealed) == (30, 0)


async def test_small_passes_make_the_same_numbers(
    database: Database, owner_dsn: str, node_id: str, die: Callable[..., None]
) -> None:
    """A backlog goes pass by pass, and one large transaction is not taken apart."""
    with psycopg.connect(owner_dsn, autocommit=True) as connection:
        for first in range(1, 40):
            die(connection, first, first)
        die(connection, 40, 90)
    passes = []
    while (done := await seal(database, node_id, count=10)) != NOTHING:
        passes.append(done.sealed)
    assert sum(passes) == 90
    assert len(passes) > 3
    assert await numbers(database) == {f"ns-{n}": list(range(1, 31)) for n in range(3)}
    assert verify(owner_dsn).findings == []


async def test_a_transaction_that_commits_late_is_not_passed_over(
    database: Database, owner_dsn: str, node_id: str, die: Callable[..., None]
) -> None:
    """Facts behind a transaction under way wait; then its own are sealed with them, once."""
    with (
        psycopg.connect(owner_dsn) as late,
        psycopg.connect(owner_dsn) as undone,
        psycopg.connect(owner_dsn, autocommit=True) as quick,
    ):
        die(quick, 1, 3)
        die(late, 4, 6)
        die(undone, 7, 9)
        die(quick, 10, 12)
        assert (await seal(database, node_id)).sealed == 3
        undone.rollback()
        assert (await seal(database, node_id)).sealed == 0
        report = verify(owner_dsn)
        assert report.unsealed == 3
        late.commit()
        assert (await seal(database, node_id)).sealed == 6
    assert await numbers(database) == {f"ns-{n}": [1, 2, 3] for n in range(3)}
    assert verify(owner_dsn).findings == []


async def test_only_one_seals_at_a_time(
    database: Database, owner_dsn: str, node_id: str, die: Callable[..., None]
) -> None:
    """Who does not get the sealer's row does nothing; several at once make no double."""
    with psycopg.connect(owner_dsn) as connection:
        die(connection, 1, 300)
    with psycopg.connect(owner_dsn) as holder:
        holder.execute("SELECT FROM audit_sealer FOR UPDATE")
        assert await seal(database, node_id) == NOTHING
    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(seal(database, node_id, 20))
    while await seal(database, node_id) != NOTHING:
        pass
    assert await numbers(database) == {f"ns-{n}": list(range(1, 101)) for n in range(3)}
    assert verify(owner_dsn).findings == []


async def test_a_lost_place_makes_no_double(
    database: Database, owner_dsn: str, node_id: str, die: Callable[..., None]
) -> None:
    """The sealer's row is a lease: without it, facts that have their number keep it."""
    with psycopg.connect(owner_dsn, autocommit=True) as connection:
        die(connection, 1, 9)
        await seal(database, node_id)
        await database.execute(b"DELETE FROM audit_sealer")
        die(connection, 10, 12)
    assert await seal(database, node_id) == NOTHING  # makes the row anew
    assert (await seal(database, node_id)).sealed == 3
    assert verify(owner_dsn).findings == []


async def test_transactions_of_another_server_are_found(
    database: Database, owner_dsn: str, node_id: str, die: Callable[..., None]
) -> None:
    """In a restored dump ids of transactions are too high: nothing is missed, nothing doubled."""
    with psycopg.connect(owner_dsn, autocommit=True) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute("ALTER TABLE dead_letter_dispatch DISABLE TRIGGER append_only")
        die(connection, 1, 6)
        await seal(database, node_id)
        die(connection, 7, 9)
        for table in connection.execute(
            "SELECT inhrelid::regclass::text FROM pg_inherits"
            " WHERE inhparent = 'dead_letter_dispatch'::regclass"
        ).fetchall():
            connection.execute(f"ALTER TABLE {table[0]} DISABLE TRIGGER append_only")
        connection.execute("UPDATE dead_letter_dispatch SET transaction_id = '9000000000'")
        connection.execute("UPDATE audit_sealer SET sealed_until = '8000000000'")
        die(connection, 10, 12)
    sealed = [await seal(database, node_id), await seal(database, node_id)]
    assert [one.sealed for one in sealed] == [3, 3]
    assert await numbers(database) == {f"ns-{n}": [1, 2, 3, 4] for n in range(3)}


async def _sealed(database: Database, node_id: str) -> int:
    return (await seal(database, node_id)).sealed


def _seal_and_hang(dsn: str, node_id: str, ready: Any) -> None:
    """A sealer that is stopped after all its writes, just before its commit."""

    async def hang(*_: Any) -> None:
        ready.set()
        await asyncio.sleep(600)

    async def run() -> None:
        database = Database(dsn, minimum=1, maximum=2)
        await database.open()
        setattr(sealing, "append", hang)  # noqa: B010
        await seal(database, node_id)

    asyncio.run(run())


async def test_a_killed_sealer_is_replaced_without_gap_or_double(
    database: Database, dsn: str, owner_dsn: str, node_id: str, die: Callable[..., None]
) -> None:
    """Killed with its numbers written and not committed, it has done nothing; the next goes on."""
    with psycopg.connect(owner_dsn, autocommit=True) as connection:
        die(connection, 1, 9)
        await seal(database, node_id)
        die(connection, 10, 60)
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_seal_and_hang, args=(dsn, node_id, ready))
    process.start()
    assert await asyncio.to_thread(ready.wait, 60)
    assert await seal(database, node_id) == NOTHING  # it holds the row
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    await until(lambda: _sealed(database, node_id), "the server's noticing")
    assert await numbers(database) == {f"ns-{n}": list(range(1, 21)) for n in range(3)}
    assert verify(owner_dsn).findings == []
