"""To which namespace a thing belongs, before anything is done with it.

What belongs to a namespace never changes it, so looking first is as good as looking within the
change. Refuses what is not there and what is not there for who asks with the same words.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from orbit.database.pool import Database
from orbit.database.queries import load
from orbit.errors import NotFound
from orbit.reading.view import is_within, known_id

READING_SQL = load("reading")
REQUEUE_SQL = load("requeues")


class Kind(Enum):
    """What has an id of its own: its word, and the statement that finds its namespace."""

    CYCLE = "cycle", READING_SQL.cycle_namespace, "cycle_id"
    DEAD_LETTER = "dead letter", READING_SQL.dead_letter_namespace, "job_id"
    BULK_REQUEUE = "bulk requeue", REQUEUE_SQL.find_batch, "batch_id"


async def visible_id(
    database: Database, kind: Kind, text: str, within: Sequence[str] | None
) -> str:
    """The id in its canonical form. Raises NotFound, also for what lies outside of `within`."""
    word, query, name = kind.value
    asked = known_id(text, word)
    if within is not None:
        row = await database.fetch_one(query, {name: asked})
        if row is None or not is_within(row["namespace"], within):
            raise NotFound(f"there is no {word} {asked}")
    return asked
