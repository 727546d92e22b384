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
class Window:
    """What follows a position: JSON (an array, or SSE frames), how many, and the last position."""

    text: str
    events: int
    position: int


@dataclass(frozen=True, slots=True)
class Bounds:
    """The first position that is kept here, and the last that was given; 1 and 0 before any."""

    first_position: int
    last_position: int


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
    empty = "" if is_stream else "[]"
    return Window(row["text"] or empty, row["events"], row["last_position"] or after)
