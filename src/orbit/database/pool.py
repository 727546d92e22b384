"""Connections: a pool that survives the database's restarts, and what every session has.

Every connection autocommits; who needs more says `connection.transaction()`. Ids come back as
text. A statement that fails because the connection or the server went away raises one of
TRANSIENT: its effect is unknown, so what is repeated must be idempotent. Only a server that takes
writes is connected to; a session on one that no longer does is closed. Whatever the server's
default, a statement sees all that was committed before it: the fence of halts rests on that.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import psycopg
import structlog
from psycopg import AsyncConnection, IsolationLevel, pq
from psycopg.abc import Buffer
from psycopg.adapt import Loader
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import DictRow, dict_row
from psycopg.types.string import TextLoader
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from orbit.database.cursor import BinaryList, BinaryListDumper, Cursor
from orbit.errors import DatabaseUnavailable, OrbitError

Connection = AsyncConnection[DictRow]
Result = TypeVar("Result")

# Also deadlocks, serialization failures, shutdowns and a full disk: all are OperationalErrors.
TRANSIENT = (
    psycopg.OperationalError,
    psycopg.InterfaceError,
    PoolTimeout,
    psycopg.errors.IdleInTransactionSessionTimeout,
    psycopg.errors.TransactionTimeout,
    psycopg.errors.ReadOnlySqlTransaction,  # the server was the primary, and is no longer
)
# What a server that is well answers to what asks too much of it, now or at every repetition.
_EXHAUSTED = (
    psycopg.errors.TransactionTimeout,
    psycopg.errors.QueryCanceled,
    psycopg.errors.OutOfMemory,
)
_EXHAUSTED_TRIES = 5
_CLOSING_SECONDS = 1.0
_FIRST_DELAY, _LAST_DELAY = 0.05, 1.0
_PROGRAM_LIMIT = "54"  # an OperationalError that no repetition mends

log = structlog.get_logger(__name__)


class Database:
    """A pool of connections to one database.

    `revive` is called, off the event loop, when the database does not answer: the embedded
    server is started again by it. No transaction outlives `transaction_seconds` (from PostgreSQL
    17 on; before that, only one that waits for its next statement is ended).
    """

    def __init__(
        self,
        dsn: str,
        *,
        minimum: int = 2,
        maximum: int = 10,
        is_preparing: bool = True,
        revive: Callable[[], None] | None = None,
        transaction_seconds: float = 30,
    ) -> None:
        self.dsn, self.transaction_seconds = dsn, transaction_seconds
        self._revive = revive
        self._options = _options(dsn)
        self._pool = _WarmPool(
            dsn,
            connection_class=AsyncConnection[DictRow],
            kwargs={
                "autocommit": True,
                "row_factory": dict_row,
                "cursor_factory": Cursor,
                "prepare_threshold": 0 if is_preparing else None,
                "application_name": "orbit",
                **self._options,
            },
            min_size=minimum,
            max_size=maximum,
            # The pool connects anew only when it is asked, so who waits in vain asks again soon:
            # that is how long a database that is back can go unnoticed.
            timeout=3,
            reconnect_timeout=1,
            configure=self._configure,
            open=False,
        )

    async def open(self) -> None:
        """Connects; raises DatabaseUnavailable with the server's own words."""
        try:
            connection = await AsyncConnection.connect(self.dsn, **self._options)
            await connection.close()
        except psycopg.Error as error:
            raise DatabaseUnavailable(
                f"cannot connect to the database: {first_line(error)}"
            ) from error
        await self._pool.open(wait=True)

    async def close(self) -> None:
        """Ends the pool, soon also when it is just connecting to a server that hangs."""
        await self._pool.close(timeout=_CLOSING_SECONDS)

    async def _configure(self, connection: Connection) -> None:
        wanted = session_settings(self.transaction_seconds) | _NOTICING
        await connection.execute(_SET, (list(wanted), list(wanted.values())), prepare=False)
        await connection.set_isolation_level(IsolationLevel.READ_COMMITTED)  # behind a pooler too
        connection.adapters.register_dumper(BinaryList, BinaryListDumper)
        connection.adapters.register_loader("uuid", TextLoader)
        connection.adapters.register_loader("uuid", _IdLoader)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection from the pool, autocommitting."""
        async with self._pool.connection() as connection:
            try:
                yield connection
            except psycopg.errors.ReadOnlySqlTransaction:
                await connection.close()  # so that the pool looks for the new primary
                raise

    @asynccontextmanager
    async def apart(self) -> AsyncIterator[Connection]:
        """A connection of its own beside the pool, for what cannot wait until one is free."""
        connection = await AsyncConnection.connect(
            self.dsn,
            autocommit=True,
            row_factory=dict_row,
            cursor_factory=Cursor,
            prepare_threshold=None,
            application_name="orbit apart",
            **self._options,
        )
        async with connection:
            await self._configure(connection)
            yield connection

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """A connection with a transaction open, committed at the end."""
        async with self.connection() as connection, connection.transaction():
            yield connection

    @asynccontextmanager
    async def batch(self) -> AsyncIterator[Connection]:
        """A transaction whose statements go out together, in one round trip.

        What they answer is there after the end, which raises what any of them was refused for.
        """
        async with (
            self.connection() as connection,
            connection.pipeline(),
            connection.transaction(),
        ):
            yield connection

    async def fetch_all(self, query: bytes, params: Any = None) -> list[DictRow]:
        """The rows of one statement, with bytes in binary."""
        async with self.connection() as connection:
            cursor = await connection.execute(query, params, binary=True)
            return await cursor.fetchall()

    async def fetch_one(self, query: bytes, params: Any = None) -> DictRow | None:
        """The first row of one statement, or None."""
        async with self.connection() as connection:
            cursor = await connection.execute(query, params, binary=True)
            return await cursor.fetchone()

    async def execute(self, query: bytes, params: Any = None) -> int:
        """Runs one statement; the number of rows it touched."""
        async with self.connection() as connection:
            return (await connection.execute(query, params)).rowcount

    async def persist(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """Repeats `work`, which must be idempotent, until the database takes it.

        Connections may be lost without bound. What is answered five times in a row by a timeout
        or for want of memory may never succeed: the answer is raised. So is the end of the pool.
        """
        delay, exhausted = _FIRST_DELAY, 0
        while True:
            try:
                return await work()
            except TRANSIENT as error:
                exhausted = exhausted + 1 if isinstance(error, _EXHAUSTED) else 0
                is_hopeless = (getattr(error, "sqlstate", None) or "").startswith(_PROGRAM_LIMIT)
                if is_hopeless or exhausted == _EXHAUSTED_TRIES or self._pool.closed:
                    raise
                log.warning("database_unavailable", error=first_line(error), retry_seconds=delay)
                await self.revive()
                await asyncio.sleep(delay)
                delay = min(delay * 2, _LAST_DELAY)

    async def revive(self) -> None:
        """Lets the embedded server, if it is one, be started again."""
        if self._revive is None:
            return
        try:
            await asyncio.to_thread(self._revive)
        except OrbitError as error:
            log.warning("embedded_server_failed", error=first_line(error))


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its name."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class _WarmPool(AsyncConnectionPool[Connection]):
    """Gives out the connection that came back last.

    A few are then in use all the time, with their plans made and their caches warm, and what load
    once needed can be closed. Given out in turn, ten cost a fifth more of the server's time.
    """

    async def _get_ready_connection(
        self,
        timeout: float | None,  # noqa: ASYNC109 - the library's
    ) -> Connection | None:
        self._pool.rotate()  # the last comes first
        return await super()._get_ready_connection(timeout)


class _IdLoader(Loader):
    """A binary uuid as its canonical text: ids are text everywhere in Orbit."""

    format = pq.Format.BINARY

    def load(self, data: Buffer) -> str:
        text = bytes(data).hex()
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


# Every statement finds its rows by an index, a few at a time. The planner must not take a table
# that was empty when it last looked for one that still is: a plan made then would scan what has
# grown to hundreds of thousands of rows, until the next ANALYZE.
_PLANNING = {
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
    "plan_cache_mode": "force_generic_plan",
}


def session_settings(transaction_seconds: float = 30) -> dict[str, str]:
    """What each session needs, by name; an older server may not know all of it.

    A node that is suspended or cut off in the middle of a transaction must not keep its row
    locks: whoever claims skips locked rows, so nobody could take that work over.
    """
    limit = f"{max(1, round(transaction_seconds))}s"
    timeouts = ("idle_in_transaction_session_timeout", "transaction_timeout")
    isolation = {"default_transaction_isolation": "read committed"}
    return _PLANNING | isolation | dict.fromkeys(timeouts, limit)


# What a server does not know is left out.
_SET = b"""
SELECT set_config(name, wanted.value, false)
FROM unnest(%s::text[], %s::text[]) AS wanted (name, value) JOIN pg_settings USING (name)
"""
# A peer that is gone without a word is noticed in half a minute. While something sent is
# unacknowledged no keepalive goes out: the user timeout (ms) is for that.
_NOTICING = {
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "20000",
}
# The same from this side.
_OPTIONS = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
    "target_session_attrs": "read-write",
}


def _options(dsn: str) -> dict[str, Any]:
    """How to connect, where the connection string does not say otherwise."""
    try:
        given = conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        given = {}  # connecting says what is wrong with it
    return {name: value for name, value in _OPTIONS.items() if name not in given}
