"""The pool: a server that became read-only, one that vanished, and what asks too much of one."""

from __future__ import annotations

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from orbit.database.pool import TRANSIENT, Database
from orbit.errors import DatabaseUnavailable

_WRITE = (
    b"INSERT INTO node (node_id, name, roles, version) VALUES (gen_random_uuid(), '', '{}', '')"
)
_LOOK = b"SELECT pg_backend_pid() AS pid"


def set_read_only(owner_dsn: str, is_read_only: bool) -> None:
    """Makes every new session on the test's database unable to write, as a standby's are."""
    with psycopg.connect(
        owner_dsn, autocommit=True, options="-c default_transaction_read_only=off"
    ) as owner:
        name = psycopg.sql.Identifier(owner.info.dbname)
        statement = psycopg.sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = {}")
        owner.execute(statement.format(name, psycopg.sql.Literal(is_read_only)))


async def write(database: Database, way: str) -> None:
    """One row, in one of the ways that there are."""
    if way == "execute":
        await database.execute(_WRITE)
    elif way == "fetch":
        await database.fetch_one(_WRITE + b" RETURNING node_id")
    else:
        async with database.transaction() as connection:
            await connection.execute(_WRITE)


@pytest.mark.parametrize("way", ["execute", "fetch", "transaction"])
async def test_a_session_that_became_read_only_is_not_used_again(dsn: str, way: str) -> None:
    """After a fail-over the old primary refuses once, transiently; the next try is elsewhere."""
    database = Database(dsn, minimum=1, maximum=1)
    await database.open()
    try:
        await database.execute(b"SET default_transaction_read_only = on")
        before = await database.fetch_one(_LOOK)
        with pytest.raises(TRANSIENT, match="read-only transaction"):
            await write(database, way)
        await write(database, way)
        assert await database.fetch_one(_LOOK) != before
    finally:
        await database.close()


@pytest.mark.parametrize("way", ["autocommit", "transaction", "batch", "apart", "pooler"])
async def test_statements_see_what_was_committed_before(dsn: str, owner_dsn: str, way: str) -> None:
    """Whatever the database's default, or that of a session which a pooler hands over."""
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        name = psycopg.sql.Identifier(owner.info.dbname)
        statement = "ALTER DATABASE {} SET default_transaction_isolation = 'repeatable read'"
        owner.execute(psycopg.sql.SQL(statement).format(name))
    database = Database(dsn, minimum=1, maximum=1)
    await database.open()
    try:
        if way == "pooler":
            await database.execute(b"SET default_transaction_isolation = 'repeatable read'")
        assert await isolation(database, way) == "read committed"
    finally:
        await database.close()


async def isolation(database: Database, way: str) -> str:
    """How far a transaction is kept from others."""
    show = b"SHOW transaction_isolation"
    if way == "autocommit":
        row = await database.fetch_one(show)
    elif way == "apart":
        async with database.apart() as connection, connection.transaction():
            row = await (await connection.execute(show)).fetchone()
    else:
        async with database.batch() if way == "batch" else database.transaction() as connection:
            cursor = await connection.execute(show)
        row = await cursor.fetchone()
    assert row is not None
    return str(row["transaction_isolation"])


async def test_only_a_server_that_takes_writes_is_connected_to(dsn: str, owner_dsn: str) -> None:
    """A standby is refused with a reason, unless the connection string wants any server."""
    set_read_only(owner_dsn, True)
    with pytest.raises(DatabaseUnavailable, match="read-only"):
        await Database(dsn).open()
    database = Database(make_conninfo(dsn, target_session_attrs="any"), minimum=1, maximum=1)
    await database.open()
    await database.close()
    set_read_only(owner_dsn, False)


async def test_a_peer_that_vanished_is_noticed_while_something_is_on_its_way(
    database: Database, owner_dsn: str
) -> None:
    """Both sides give up what is not acknowledged in 20 s; the connection string has precedence."""
    async with database.connection() as connection:
        assert connection.info.get_parameters()["tcp_user_timeout"] == "20000"
        cursor = await connection.execute("SHOW tcp_user_timeout")
        [row] = await cursor.fetchall()
        is_local = connection.info.host.startswith("/")
        assert row["tcp_user_timeout"] == ("0" if is_local else "20s")
    own = Database(make_conninfo(database.dsn, tcp_user_timeout=5000), minimum=1, maximum=1)
    await own.open()
    async with own.connection() as connection:
        assert connection.info.get_parameters()["tcp_user_timeout"] == "5000"
    await own.close()


async def test_what_asks_too_much_is_given_up(database: Database) -> None:
    """Five timeouts in a row are an answer; what succeeds before that is repeated as ever."""
    tries = 0

    async def work() -> int:
        nonlocal tries
        tries += 1
        async with database.transaction() as connection:
            if tries != 3:
                await connection.execute("SET LOCAL statement_timeout = '5ms'")
                await connection.execute("SELECT pg_sleep(5)")
        return tries

    assert await database.persist(work) == 3
    with pytest.raises(psycopg.errors.QueryCanceled):
        await database.persist(work)
    assert tries == 3 + 5


async def test_lost_connections_are_repeated_without_bound(database: Database) -> None:
    """However often the connection breaks, and whatever timeouts lie in between, work goes on."""
    tries = 0

    async def work() -> int:
        nonlocal tries
        tries += 1
        async with database.transaction() as connection:
            if tries % 3 == 0:
                await connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")
            if tries < 8:
                await connection.execute("SET LOCAL statement_timeout = '5ms'")
                await connection.execute("SELECT pg_sleep(5)")
        return tries

    assert await database.persist(work) == 8
