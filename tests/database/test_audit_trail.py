"""Entries: numbered and chained in the act's own transaction, alone or in a pipelined batch."""

from __future__ import annotations

import asyncio

import psycopg
import pytest

from orbit.audit.trail import FIRST_PREV, Act, Chain, append
from orbit.database.pool import Database
from orbit.database.repair import repair


def act(namespace: str, **given: object) -> Act:
    """An act in a namespace."""
    return Act(namespace, "test.done", "a person", **given)  # type: ignore[arg-type]


async def entries(database: Database, log: str) -> list[dict[str, object]]:
    """A log's entries, in order."""
    return await database.fetch_all(
        b"SELECT seq, prev, hash, body FROM audit_trail_entry WHERE log = %s ORDER BY seq", [log]
    )


async def test_entries_are_chained_as_the_program_computes_it(database: Database) -> None:
    """The database's hash is the documented one, of log, number, predecessor and bytes."""
    async with database.batch() as connection:
        await append(connection, act("ns", reason='a "quoted"\x00 ünïcode \\ reason'), act("ns"))
    chain, prev = Chain("ns"), FIRST_PREV
    for number, row in enumerate(await entries(database, "ns"), 1):
        assert row["seq"] == number
        assert row["prev"] == prev
        prev = chain.hash(number, prev, row["body"].encode())  # type: ignore[attr-defined]
        assert row["hash"] == prev
    assert number == 2


async def test_a_refused_change_leaves_no_entry(database: Database) -> None:
    """An entry commits with its transaction or not at all."""
    async with database.transaction() as connection:
        await append(connection, act("ns"))
        raise psycopg.Rollback
    assert await entries(database, "ns") == []


async def test_many_at_once_leave_one_dense_chain(database: Database) -> None:
    """Concurrent acts of several namespaces, in any order, neither fork nor skip nor deadlock."""

    async def one(number: int) -> None:
        names = ["a", "b", "*"] if number % 2 else ["*", "b", "a"]
        async with database.batch() as connection:
            await append(connection, *map(act, names))

    await asyncio.gather(*map(one, range(60)))
    for log, count in (("a", 60), ("b", 60), ("*", 61)):
        assert [row["seq"] for row in await entries(database, log)] == list(range(1, count + 1))


async def test_a_lost_head_is_made_anew(database: Database) -> None:
    """A head is a lease: without it the chain goes on from its last entry."""
    async with database.batch() as connection:
        await append(connection, act("ns"))
    await database.execute(b"DELETE FROM audit_head")
    async with database.batch() as connection:
        await append(connection, act("ns"))
    first, second = await entries(database, "ns")
    assert (second["seq"], second["prev"]) == (2, first["hash"])


async def test_a_fork_cannot_commit(database: Database) -> None:
    """Whoever writes past the function cannot put a second entry after the same one."""
    async with database.batch() as connection:
        await append(connection, act("ns"), act("ns"))
    for seq in (2, 3):
        with pytest.raises(psycopg.errors.UniqueViolation):
            await database.execute(
                b"INSERT INTO audit_trail_entry SELECT log, %s, at, prev, sha256(hash), body"
                b" FROM audit_trail_entry WHERE log = 'ns' AND seq = 2",
                [seq],
            )
    await database.execute(b"UPDATE audit_head SET seq = 7 WHERE log = 'ns'")
    assert (await repair(database))["heads"] == 1
    async with database.batch() as connection:
        await append(connection, act("ns"))
    assert [row["seq"] for row in await entries(database, "ns")] == [1, 2, 3]
