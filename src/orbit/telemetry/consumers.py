"""Consumers: readers whose place is stored here, so that retention waits for them.

A place only goes on, and never beyond what has been given; a reader that commits what it has read
twice, or late, does no harm. Who removes a consumer lets go of what it has not read. Whose
consumer it is, and that its coming and going is audited, is the caller's business.
"""

from __future__ import annotations

from collections.abc import Sequence

from orbit.database.pool import Connection
from orbit.database.queries import array
from orbit.errors import ConsumerExists, NotFound, RequestInvalid
from orbit.telemetry.emission import SQL


async def add(
    connection: Connection,
    name: str,
    *,
    after: int | None = None,
    namespaces: Sequence[str] | None = None,
) -> None:
    """Makes a consumer at a position, at least at what is kept; without one, before all of that.

    Keys bounded to all of the `namespaces` (None: to none) may move it. No week is dropped while
    the transaction is open. Raises ConsumerExists, and RequestInvalid for a position not given yet.
    """
    await connection.execute(SQL.hold_weeks)
    asked = {
        "name": name,
        "after": after,
        "namespaces": None if namespaces is None else array(sorted(set(namespaces))),
    }
    row = await (await connection.execute(SQL.add_consumer, asked)).fetchone()
    assert row is not None
    if after is not None and after > row["last_position"]:
        raise _not_given("/after", row["last_position"])
    if not row["is_new"]:
        raise ConsumerExists(f"there is a consumer {name} already")


async def commit(connection: Connection, name: str, position: int) -> int:
    """Moves a consumer on to what it has read; its position, which never goes back.

    Raises NotFound, and RequestInvalid for a position that was not given yet.
    """
    asked = {"name": name, "position": position}
    row = await (await connection.execute(SQL.move_consumer, asked)).fetchone()
    if row is None:
        raise no_consumer(name)
    if position > row["last_position"]:
        raise _not_given("/position", row["last_position"])
    return int(row["position"])


async def remove(connection: Connection, name: str) -> None:
    """Lets a consumer go: nothing is kept for it any more. Raises NotFound."""
    if (await connection.execute(SQL.remove_consumer, {"name": name})).rowcount == 0:
        raise no_consumer(name)


def no_consumer(name: str) -> NotFound:
    """The answer where there is none of that name."""
    return NotFound(f"there is no consumer {name}")


def _not_given(place: str, last: int) -> RequestInvalid:
    return RequestInvalid(f"{place}: expected a position that was given; the last one is {last}")
