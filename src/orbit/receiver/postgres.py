"""Remembers deliveries in a table of the receiver's own PostgreSQL.

`claim` is for a service that has its connection at hand: the row of the id and the service's
own writes commit in one transaction, so that a delivery takes effect exactly once however the
service, its database or the network fails. It never waits for another transaction that has
the same id in hand, but answers `BUSY`; the sender comes again. `PostgresSeen` is the same for
the middleware, on one connection for each delivery that is being worked on. There an SQL error
that the application caught and went on from is an error all the same: such a transaction can only
be rolled back, and PostgreSQL would do so at COMMIT without a word.

Needs `psycopg` (3.2 or newer) when used, not to be imported, and READ COMMITTED, PostgreSQL's
default: under stricter levels a race ends in a serialization failure instead of a verdict.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from orbit.receiver.seen import Claim, Verdict

if TYPE_CHECKING:
    import psycopg

TABLE = """
CREATE TABLE IF NOT EXISTS orbit_deliveries (
    id          text        PRIMARY KEY,
    digest      text        NOT NULL,
    received_at timestamptz NOT NULL DEFAULT now(),
    repeats     integer     NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS orbit_deliveries_by_age ON orbit_deliveries (received_at);
"""

# One round trip: without the lock nothing is inserted and no row comes back; whoever gets the
# lock finds the row of the one before it committed or gone.
_CLAIM = """
INSERT INTO orbit_deliveries (id, digest)
SELECT %(id)s, %(digest)s
 WHERE pg_try_advisory_xact_lock(hashtextextended(%(id)s, 8787))
    ON CONFLICT (id) DO UPDATE SET repeats = orbit_deliveries.repeats + 1
RETURNING digest, repeats
"""
_FORGET = "DELETE FROM orbit_deliveries WHERE received_at < now() - %s::interval"


def create_table(connection: psycopg.Connection[Any]) -> None:
    """Makes the table if it is not there; put `TABLE` into your migrations instead if you like."""
    connection.execute(TABLE)


def claim(connection: psycopg.Connection[Any], delivery_id: str, digest: str) -> Verdict:
    """Claims an id in the connection's transaction; NEW means that the effect is yours to do.

    `digest` is the body's, in any one notation. Commit after the effect; a rollback gives the
    id back, and so does a commit after an SQL error, silently: let such an error end the
    transaction, or catch it around an inner `connection.transaction()`. On DUPLICATE answer 2xx,
    on CONFLICT 409, on BUSY 503. Raises psycopg.Error, or ValueError in autocommit outside of
    `connection.transaction()`, where it would hold nothing.
    """
    if connection.autocommit and connection.info.transaction_status == 0:
        raise ValueError("claim() belongs in a transaction with the effect")
    values = {"id": delivery_id, "digest": digest}
    return _verdict(connection.execute(_CLAIM, values).fetchone(), digest)


def forget(connection: psycopg.Connection[Any], age: timedelta) -> int:
    """Removes ids older than `age`, which exceeds what a sender may repeat; returns how many."""
    return connection.execute(_FORGET, (age,)).rowcount


class PostgresSeen:
    """Seen ids in the table, for `OrbitDeliveries`.

    `connect` gives an async context manager of a `psycopg.AsyncConnection`: the method
    `connection` of a `psycopg_pool.AsyncConnectionPool` does. A delivery keeps its connection
    while the application works on it, and the application may write through it
    (`request.state.connection`): that commits together with the id, or not at all.
    """

    def __init__(
        self, connect: Callable[[], AbstractAsyncContextManager[psycopg.AsyncConnection[Any]]]
    ) -> None:
        self._connect = connect

    @asynccontextmanager
    async def claim(self, key: str, digest: str) -> AsyncIterator[Claim]:
        """Holds `key` in a transaction that is committed at the block's end if it is kept.

        Raises psycopg.errors.InFailedSqlTransaction if it is kept but can't be: the block has
        caught an SQL error outside of a savepoint, or ended the transaction.
        """
        from psycopg import Rollback  # noqa: PLC0415 - this package is imported without it too

        async with self._connect() as connection, connection.transaction() as transaction:
            values = {"id": key, "digest": digest}
            row = await (await connection.execute(_CLAIM, values)).fetchone()
            held = Claim(_verdict(row, digest), connection)
            yield held
            if held.verdict is not Verdict.NEW:
                return
            if not held.is_kept:
                raise Rollback(transaction)
            _check_can_commit(connection)


def _check_can_commit(connection: psycopg.AsyncConnection[Any]) -> None:
    from psycopg import errors, pq  # noqa: PLC0415 - as above

    status = connection.info.transaction_status
    if status in (pq.TransactionStatus.INERROR, pq.TransactionStatus.IDLE):
        raise errors.InFailedSqlTransaction(
            "the delivery was answered with 2xx in a transaction that had failed or ended; "
            "catch SQL errors around `async with connection.transaction():`"
        )


def _verdict(row: Any, digest: str) -> Verdict:
    if row is None:
        return Verdict.BUSY
    known, repeats = (row["digest"], row["repeats"]) if isinstance(row, dict) else row
    if repeats == 0:
        return Verdict.NEW
    return Verdict.DUPLICATE if known == digest else Verdict.CONFLICT
