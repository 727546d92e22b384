"""Telemetry read by position: pages of CloudEvents, and the frames of a stream.

The database writes the JSON, so that a page is passed on as it is and a node holds no more than
one page for each reader. A reader bounded to namespaces sees gaps in the positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orbit.database.pool import Database
from orbit.database.queries import load
from orbit.reading.view import narrowed

SQL = load("telemetry")


@dataclass(frozen=True, slots=True)
class Bounds:
    """The first position that is kept here, and the last that was given; 1 and 0 before any."""

    first_position: int
    last_position: int


@dataclass(frozen=True, slots=True)
class Window:
    """What follows a position: JSON (an array, or SSE frames), how many, and where to go on.

    `bounds` are of the same moment: nothing after `position` has been looked for, and what lies
    before `bounds.first_position` was not there to be found.
    """

    text: str
    events: int
    position: int
    bounds: Bounds


async def bounds(database: Database) -> Bounds:
    """From where to where telemetry can be read."""
    row = await database.fetch_one(SQL.bounds)
    assert row is not None
    return Bounds(row["first_position"], row["last_position"])


async def window(
    database: Database,
    after: int,
    count: int,
    *,
    namespace: str | None = None,
    within: Sequence[str] | None = None,
    is_stream: bool = False,
) -> Window:
    """At most `count` events after a position, in its order, of the namespaces there are."""
    namespaces = narrowed(namespace, within)
    query = SQL.window if namespaces is None else SQL.window_of_namespaces
    asked = {"after": after, "count": count, "is_stream": is_stream, "namespaces": namespaces}
    row = await database.fetch_one(query, asked)
    assert row is not None
    text = row["text"] or ("" if is_stream else "[]")
    edge = Bounds(row["first_position"], row["last_position"])
    # With fewer than asked for, all that was given has been looked at.
    position = row["position"] if row["events"] == count else max(after, edge.last_position)
    return Window(text, row["events"], position, edge)
