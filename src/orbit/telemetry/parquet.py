"""Archived weeks as Parquet: columns for whoever analyses them, beside the archive itself.

A file is written under another name, read back row by row against the archive, and only then
renamed; its name, count and SHA-256 are kept as a fact. A file that is there already, as it was
written, stays. Needs pyarrow (the extra `parquet`), which is imported when a file is written or
read. What a disk refuses is ArchiveDamaged: the week is kept.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orbit.database.pool import Database
from orbit.database.queries import load
from orbit.errors import ArchiveDamaged
from orbit.telemetry.archive import read_chunk

if TYPE_CHECKING:
    import pyarrow as pa

SQL = load("telemetry")
_LEFT_SECONDS = 86_400
_TEXTS = {
    "id": "id",
    "namespace": "namespace",
    "type": "type",
    "profile_id": "profileId",
    "run_profile_id": "runProfileId",
    "run_id": "runId",
}


async def write_parquet(database: Database, week: str, chunks: int, folder: Path) -> None:
    """Writes an archived week, a row group for each chunk, and reads it back.

    Raises ArchiveDamaged if what is read is not what is in the archive, and for what the
    disk refuses.
    """
    from pyarrow import ArrowException  # noqa: PLC0415 - of the extra

    path = folder / f"telemetry-{week}.parquet"
    partial = folder / f".{path.name}.{secrets.token_hex(4)}"
    try:
        if await _is_written(database, week, path):
            return
        try:
            events = await _write(database, week, chunks, partial)
            await asyncio.to_thread(_forget_killed, partial, path)
            await _compare(database, week, chunks, partial)
            digest, size = await asyncio.to_thread(_kept, partial, path)
        finally:
            await asyncio.to_thread(partial.unlink, missing_ok=True)
    except OSError as error:
        text = f"{path.name} cannot be written: {error.strerror or error}"
        raise ArchiveDamaged(text) from error
    except ArrowException as error:
        raise ArchiveDamaged(f"{path.name} does not read back: {error}") from error
    fact = {"week": week, "sha256": digest, "file": path.name, "events": events, "bytes": size}
    await database.execute(SQL.add_archive_file, fact)


async def check_parquet(database: Database, week: str, path: Path) -> None:
    """Raises ArchiveDamaged for a file that is not the one written of the week."""
    if not await _is_written(database, week, path):
        raise ArchiveDamaged(f"{path.name} is not as it was written of {week}")


def parquet_lines(path: Path) -> Iterator[bytes]:
    """A file's events as JSON lines, a row group in memory at a time."""
    from pyarrow.parquet import ParquetFile  # noqa: PLC0415 - of the extra

    with ParquetFile(path) as file:
        for number in range(file.num_row_groups):
            for row in file.read_row_group(number).to_pylist():
                yield json.dumps(_event(row), separators=(",", ":")).encode()


async def _is_written(database: Database, week: str, path: Path) -> bool:
    try:
        digest, _ = await asyncio.to_thread(_digest, path)
    except FileNotFoundError:
        return False
    row = await database.fetch_one(SQL.archive_file, {"sha256": digest})
    return row is not None and row["week"] == week


async def _write(database: Database, week: str, chunks: int, path: Path) -> int:
    from pyarrow.parquet import ParquetWriter  # noqa: PLC0415 - of the extra

    events = 0
    await asyncio.to_thread(path.parent.mkdir, parents=True, exist_ok=True)
    first = await asyncio.to_thread(_table, await read_chunk(database, week, 1))
    with ParquetWriter(path, first.schema, compression="zstd") as writer:
        for number in range(1, chunks + 1):
            table = await asyncio.to_thread(_table, await read_chunk(database, week, number))
            await asyncio.to_thread(writer.write_table, table, table.num_rows)
            events += table.num_rows
    return events


async def _compare(database: Database, week: str, chunks: int, path: Path) -> None:
    from pyarrow.parquet import ParquetFile  # noqa: PLC0415 - of the extra

    with ParquetFile(path) as file:
        is_whole = file.num_row_groups == chunks
        for number in range(chunks if is_whole else 0):
            wanted = await asyncio.to_thread(_table, await read_chunk(database, week, number + 1))
            found = await asyncio.to_thread(file.read_row_group, number)
            is_whole = is_whole and found.equals(wanted)
    if not is_whole:
        raise ArchiveDamaged(f"the Parquet file of {week} does not read back as written")


def _table(lines: Sequence[bytes]) -> pa.Table:
    import pyarrow as pa  # noqa: PLC0415 - of the extra

    rows = [json.loads(line) for line in lines]
    at = pa.timestamp("us", tz="UTC")
    columns = {
        "position": pa.array([row["position"] for row in rows], pa.int64()),
        "time": pa.array([datetime.fromisoformat(row["time"]) for row in rows], at),
        "version": pa.array([row.get("version", 1) for row in rows], pa.int16()),
        "metadata": pa.array([_metadata(row["metadata"]) for row in rows], pa.string()),
    }
    for name, field in _TEXTS.items():
        columns[name] = pa.array([row[field] for row in rows], pa.string())
    return pa.table(columns)


def _metadata(fields: Mapping[str, Any]) -> str:
    """JSON text of whatever JSON carries: canonical JSON refuses numbers beyond 2**53."""
    return json.dumps(fields, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _event(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "position": row["position"],
        "time": row["time"].isoformat(timespec="microseconds").replace("+00:00", "Z"),
        **{field: row[name] for name, field in _TEXTS.items()},
        "version": row.get("version", 1),
        "metadata": json.loads(row["metadata"]),
    }


def _kept(partial: Path, path: Path) -> tuple[bytes, int]:
    """Makes the file last under its name; its digest, as read from the disk, and its size."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    found = _digest(partial)
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return found


def _forget_killed(partial: Path, path: Path) -> None:
    """Removes what writers of this file have left that were killed: by age, others may be at it."""
    newest = partial.stat().st_mtime
    for left in path.parent.glob(f".{path.name}.*"):
        if left.stat().st_mtime < newest - _LEFT_SECONDS:
            left.unlink(missing_ok=True)


def _digest(path: Path) -> tuple[bytes, int]:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest(), path.stat().st_size
