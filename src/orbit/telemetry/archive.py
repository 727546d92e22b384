"""The cold archive: a week of events as chunks of compressed lines, each with its digest.

Every chunk is read back and compared with its digest, and their count with the week's, before it
says that a week is archived. A pass that dies goes on at the chunk where it was. The lines of a
chunk are JSON objects in the order of their positions.
"""

from __future__ import annotations

import asyncio
import gzip
import zlib
from hashlib import sha256
from typing import Any

from orbit.database.pool import Database
from orbit.database.queries import load
from orbit.errors import ArchiveDamaged, NotFound

SQL = load("telemetry")
_CHUNK_EVENTS = 5000


async def archive(database: Database, week: str) -> tuple[int, int]:
    """Writes a week to the archive and reads it back; its chunks there, and the last position.

    Raises ArchiveDamaged if what is read is not what was written.
    """
    size = await _size(database, week)
    while True:
        asked = {"week": week, "after": size["archived_until"], "count": _CHUNK_EVENTS}
        found = await database.fetch_one(SQL.week_lines, asked)
        assert found is not None
        if not found["events"]:
            break
        chunk = {
            "week": week,
            "chunk": size["chunks"] + 1,
            "first_position": found["first_position"],
            "last_position": found["last_position"],
            "events": found["events"],
        }
        packed = await asyncio.to_thread(_packed, found["text"])
        if await database.execute(SQL.insert_archive, chunk | packed):
            size |= {"chunks": chunk["chunk"], "archived_until": chunk["last_position"]}
        else:  # another node archives it too: after what that has
            size = await _size(database, week)
    size = await _size(database, week)
    archived = 0
    for number in range(1, size["chunks"] + 1):
        archived += len(await read_chunk(database, week, number))
    if size["events"] and archived != size["events"]:  # none: another node has dropped the week
        raise ArchiveDamaged(
            f"the archive of {week} has {archived} events, the week {size['events']}"
        )
    return size["chunks"], size["archived_until"]


async def _size(database: Database, week: str) -> dict[str, Any]:
    """A scan of the week's batches: for the beginning and the end."""
    size = await database.fetch_one(SQL.week_size, {"week": week})
    assert size is not None
    return size


async def read_chunk(database: Database, week: str, chunk: int) -> list[bytes]:
    """The lines of a chunk. Raises NotFound, and ArchiveDamaged if they were changed."""
    row = await database.fetch_one(SQL.archive_chunk, {"week": week, "chunk": chunk})
    if row is None:
        raise NotFound(f"there is no chunk {chunk} of {week} in the archive")
    found, digest = await asyncio.to_thread(_unpacked, row["content"])
    if digest != row["sha256"] or len(found) != row["events"]:
        raise ArchiveDamaged(f"chunk {chunk} of {week} is not what was archived")
    return found


def _packed(text: str) -> dict[str, bytes]:
    lines = text.encode() + b"\n"
    return {"sha256": sha256(lines).digest(), "content": gzip.compress(lines, mtime=0)}


def _unpacked(content: bytes) -> tuple[list[bytes], bytes]:
    try:
        lines = gzip.decompress(content)
    except (OSError, EOFError, zlib.error):
        return [], b""
    return lines.splitlines(), sha256(lines).digest()
