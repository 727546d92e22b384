"""Retention of events: never before a stored consumer, never before the archive is proven."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import psycopg
import pyarrow.parquet
import pytest
from cryptography.fernet import Fernet

from orbit.app import Node
from orbit.clock import DatabaseClock, new_id
from orbit.database.pool import Database
from orbit.errors import ArchiveDamaged, ConsumerExists, NotFound, RequestInvalid
from orbit.services.janitor import Janitor
from orbit.settings import Settings
from orbit.telemetry import parquet, retention
from orbit.telemetry.archive import archive, read_chunk
from orbit.telemetry.catalogue import EventType
from orbit.telemetry.consumers import add, commit, remove
from orbit.telemetry.emission import SQL, Event, emit
from orbit.telemetry.parquet import check_parquet, parquet_lines, write_parquet
from orbit.telemetry.retention import Retained, Retention, retain
from orbit.telemetry.sequencing import sequence

WEEK = "2026-01-05"  # a Monday long ago
AT = datetime(2026, 1, 7, tzinfo=UTC)


@pytest.fixture
async def old(database: Database, owner_dsn: str, clock: DatabaseClock) -> int:
    """Twelve events in a week of long ago, numbered; the last position."""
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        for fact in ("telemetry_event", "telemetry_batch"):
            partition = f"{fact}_p20260105"
            owner.execute(f"CREATE TABLE {partition} (LIKE {fact} INCLUDING ALL)".encode())
            owner.execute(
                f"ALTER TABLE {fact} ATTACH PARTITION {partition} FOR VALUES FROM"
                " (orbit_first_id('2026-01-05Z')) TO (orbit_first_id('2026-01-12Z'))".encode()
            )
        for number in range(4):
            batch_id = new_id(AT + timedelta(seconds=number))
            owner.execute(
                "INSERT INTO telemetry_event (namespace, batch_id, ordinal, event_type, metadata)"
                " SELECT 'ns', %s, n, 'requeued', jsonb_build_object('n', n)"
                " FROM generate_series(1, 3) n",
                (batch_id,),
            )
            owner.execute(
                "INSERT INTO telemetry_pending (batch_id, namespace, events) VALUES (%s, 'ns', 3)",
                (batch_id,),
            )
    assert (await sequence(database, new_id(clock.now()))).events == 12
    return 12


async def numbered(database: Database, owner_dsn: str, metadata: str) -> None:
    """One more event of the old week, which comes after what is numbered."""
    batch_id = new_id(AT + timedelta(days=1))
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        owner.execute(
            "INSERT INTO telemetry_event (namespace, batch_id, ordinal, event_type, metadata)"
            " VALUES ('ns', %s, 1, 'outcome_reported', %s)",
            (batch_id, metadata),
        )
        owner.execute("INSERT INTO telemetry_pending VALUES (%s, 'ns', 1)", (batch_id,))
        owner.execute("UPDATE telemetry_sequencer SET due_at = '-infinity'")
    assert (await sequence(database, new_id(AT))).events == 1


async def weeks(database: Database) -> list[str]:
    """The old weeks that are there."""
    rows = await database.fetch_all(SQL.weeks, {"days": 30, "hard_days": 0})
    return [row["week"] for row in rows]


async def stored(database: Database, name: str, position: int) -> None:
    """A consumer at a position."""
    async with database.transaction() as connection:
        await add(connection, name, after=position)


async def test_what_a_consumer_has_not_read_stays(database: Database, old: int) -> None:
    """A week goes when the last stored consumer has passed it, and not before."""
    await stored(database, "bi", old - 1)
    await stored(database, "dwh", old)
    assert await retain(database, Retention(30)) == Retained([], ["bi"])
    assert await weeks(database) == [WEEK]
    with pytest.raises(psycopg.errors.ObjectInUse):
        await database.execute(SQL.drop_week, {"week": WEEK, "is_forced": False})
    async with database.transaction() as connection:
        await commit(connection, "bi", old)
    assert await retain(database, Retention(30)) == Retained([WEEK], [])
    assert await weeks(database) == []


async def test_what_signals_have_not_taken_in_stays(database: Database, old: int) -> None:
    """The detector's own place counts as a consumer's, as far as there is something for it."""
    feed = b"INSERT INTO signal_feed VALUES (%s, 2, %s, NULL)"
    await database.execute(feed, ["another", 0])
    await database.execute(feed, ["ns", old - 3])
    assert await retain(database, Retention(30)) == Retained([], ["signals of ns"])
    await database.execute(b"UPDATE signal_feed SET position = %s WHERE namespace = 'ns'", [old])
    assert await retain(database, Retention(30)) == Retained([WEEK], [])


async def test_a_consumer_that_is_being_stored_is_waited_for(database: Database, old: int) -> None:
    """While its transaction is open no week is dropped; after it, none that it needs."""
    async with database.transaction() as connection:
        await add(connection, "bi")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            await retain(database, Retention(30))
    assert await retain(database, Retention(30)) == Retained([], ["bi"])


async def test_a_place_only_goes_on(database: Database, old: int) -> None:
    """It begins at what is kept, never goes back, and is nowhere that was not given yet."""
    async with database.transaction() as connection:
        await add(connection, "bi")
        assert await commit(connection, "bi", 5) == 5
        assert await commit(connection, "bi", 3) == 5
    for refused in (commit(connection, "bi", old + 1), add(connection, "dwh", after=old + 1)):
        with pytest.raises(RequestInvalid, match=f"the last one is {old}"):
            async with database.transaction() as connection:
                await refused
    await retain(database, Retention(30, hard_days=60))
    async with database.transaction() as connection:
        await add(connection, "dwh", after=2)
        with pytest.raises(ConsumerExists):
            await add(connection, "bi")
        await remove(connection, "bi")
        for gone in (commit(connection, "bi", 1), remove(connection, "bi")):
            with pytest.raises(NotFound):
                await gone
    rows = await database.fetch_all(b"SELECT name, position FROM telemetry_consumer")
    assert rows == [{"name": "dwh", "position": old}]


async def test_a_hard_limit_is_told(database: Database, old: int, clock: DatabaseClock) -> None:
    """What is dropped unread leaves an event that names who had not read it."""
    await stored(database, "bi", 1)
    assert await retain(database, Retention(30, hard_days=60)) == Retained([WEEK], [])
    row = await database.fetch_one(b"SELECT event_type, namespace, metadata FROM telemetry_event")
    assert row == {
        "event_type": "telemetry_dropped",
        "namespace": "*",
        "metadata": {"week": WEEK, "lastPosition": old, "consumers": ["bi"]},
    }


@pytest.mark.parametrize("is_archiving", [False, True])
async def test_two_that_drop_at_once_do_it_once(
    database: Database, old: int, is_archiving: bool
) -> None:
    """One node drops a week, another finds that it is done: one event, and no error."""
    await stored(database, "bi", 1)
    given = Retention(30, hard_days=60, is_archiving=is_archiving)
    for found in await asyncio.gather(*(retain(database, given) for _ in range(3))):
        assert found == Retained([WEEK], [])
    rows = await database.fetch_all(b"SELECT event_type FROM telemetry_event")
    assert rows == [{"event_type": "telemetry_dropped"}]


async def test_a_drop_waits_for_another_before_it_looks(
    database: Database, old: int, owner_dsn: str
) -> None:
    """A week that another drops meanwhile is gone, and nothing to fail at."""
    drop = b"SELECT orbit_drop_telemetry('2026-01-05', false) AS last_position"
    with psycopg.connect(owner_dsn) as other, psycopg.connect(owner_dsn) as watching:
        other.execute(drop)
        late = asyncio.create_task(database.fetch_one(drop))
        while not watching.execute(
            "SELECT FROM pg_locks WHERE NOT granted AND locktype = 'advisory'"
        ).fetchall():
            assert not late.done()
            await asyncio.sleep(0.01)
        other.commit()
        assert await late == {"last_position": None}


async def test_a_consumer_that_came_during_the_archive_is_named(
    database: Database, old: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is passed over is who had not read in the moment of the drop."""
    monkeypatch.setattr(retention, "archive", partial(_then, archive, partial(stored, database)))
    await retain(database, Retention(30, hard_days=60, is_archiving=True))
    row = await database.fetch_one(b"SELECT metadata -> 'consumers' AS names FROM telemetry_event")
    assert row == {"names": ["bi"]}


@pytest.mark.parametrize("is_archiving", [False, True])
async def test_what_is_numbered_meanwhile_is_not_dropped(
    database: Database,
    old: int,
    owner_dsn: str,
    monkeypatch: pytest.MonkeyPatch,
    is_archiving: bool,
) -> None:
    """An event that gets its position after the week was looked at stays until the next time."""
    fetch, is_done = database.fetch_all, asyncio.Event()

    async def late(query: bytes, params: Any = None) -> Any:
        found = await fetch(query, params)
        if query == SQL.behind and not is_done.is_set():
            is_done.set()
            await numbered(database, owner_dsn, "{}")
        return found

    async def later(database: Database, week: str) -> Any:
        found = await archive(database, week)
        if not is_done.is_set():
            is_done.set()
            await numbered(database, owner_dsn, "{}")
        return found

    if is_archiving:
        monkeypatch.setattr(retention, "archive", later)
    else:
        monkeypatch.setattr(database, "fetch_all", late)
    given = Retention(30, is_archiving=is_archiving)
    assert await retain(database, given) == Retained([], ["events that were numbered meanwhile"])
    assert await weeks(database) == [WEEK]
    assert await retain(database, given) == Retained([WEEK], [])
    rows = await database.fetch_all(b"SELECT sum(events) AS events FROM telemetry_archive")
    assert rows == [{"events": old + 1 if is_archiving else None}]


async def test_an_archive_has_every_event(database: Database, old: int) -> None:
    """With the archive on a dropped week can be read, line by line, in order of position."""
    assert await retain(database, Retention(30, is_archiving=True)) == Retained([WEEK], [])
    lines = [json.loads(line) for line in await read_chunk(database, WEEK, 1)]
    assert [line["position"] for line in lines] == list(range(1, old + 1))
    assert [line["metadata"]["n"] for line in lines] == [1, 2, 3] * 4


async def test_a_week_is_sized_twice_however_many_chunks_it_has(
    database: Database, old: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What scans the whole week runs before the first chunk and after the last."""
    monkeypatch.setattr("orbit.telemetry.archive._CHUNK_EVENTS", 3)
    fetch, asked = database.fetch_one, []

    async def counting(query: bytes, params: Any = None) -> Any:
        asked.append(query)
        return await fetch(query, params)

    monkeypatch.setattr(database, "fetch_one", counting)
    assert await archive(database, WEEK) == (4, old)
    assert asked.count(SQL.week_size) == 2
    positions = [
        json.loads(line)["position"]
        for number in range(1, 5)
        for line in await read_chunk(database, WEEK, number)
    ]
    assert positions == list(range(1, old + 1))


async def test_two_archive_a_week_at_once(
    database: Database, old: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither doubles what the other wrote, nor takes it for damage."""
    monkeypatch.setattr("orbit.telemetry.archive._CHUNK_EVENTS", 3)
    both = await asyncio.gather(archive(database, WEEK), archive(database, WEEK))
    assert set(both) == {(4, old)}
    rows = await database.fetch_all(b"SELECT sum(events) AS events FROM telemetry_archive")
    assert rows == [{"events": old}]


DAMAGES = {
    "another digest": "sha256 = sha256('x')",
    "a flipped byte": "content = set_byte(content, 30, get_byte(content, 30) # 255)",
    "a flipped magic": "content = set_byte(content, 0, 0)",
    "a cut end": "content = substr(content, 1, 40)",
}


def damage(owner_dsn: str, how: str) -> None:
    """As a disk does, past the trigger that keeps facts."""
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        owner.execute("ALTER TABLE telemetry_archive DISABLE TRIGGER append_only")
        owner.execute(f"UPDATE telemetry_archive SET {DAMAGES[how]}".encode())


@pytest.mark.parametrize("how", DAMAGES)
async def test_a_changed_archive_stops_the_drop(
    database: Database, old: int, owner_dsn: str, how: str
) -> None:
    """Nothing is dropped while the archive does not read back as it was written."""
    assert await archive(database, WEEK) == (1, old)
    damage(owner_dsn, how)
    with pytest.raises(ArchiveDamaged, match=f"chunk 1 of {WEEK}"):
        await retain(database, Retention(30, is_archiving=True))
    assert await weeks(database) == [WEEK]


async def test_a_damaged_archive_keeps_no_node_from_starting(
    database: Database, old: int, dsn: str, owner_dsn: str, tmp_path: Path
) -> None:
    """It is for the janitor to keep trying; a node needs partitions, and no more of it."""
    await archive(database, WEEK)
    damage(owner_dsn, "a flipped byte")
    (tmp_path / "profiles.json").write_text('{"profiles": []}')
    (tmp_path / "runProfiles.json").write_text('{"run_profiles": []}')
    given: dict[str, Any] = {
        "database_url": dsn,
        "secret_keys": (Fernet.generate_key().decode(),),
        "config_dir": tmp_path,
        "auth": "off",
        "cron_schedule": "",
        "drain_timeout_seconds": 0.2,
        "telemetry_cold_archive_enabled": True,
    }
    node = Node(Settings(**given))
    await node.open()
    try:
        await node.start()
        assert node.is_ready
        await node.drain()
    finally:
        await node.close()
    assert await weeks(database) == [WEEK]


async def test_a_janitor_outlives_whatever_stops_retention(
    database: Database, old: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nobody thought of is logged and tried again the next hour, not at once."""

    async def fail(*_: object) -> None:
        raise LookupError("what nobody thought of")

    monkeypatch.setattr("orbit.telemetry.retention.archive", fail)
    janitor = Janitor(database, fact_retention_days=0, telemetry=Retention(30, is_archiving=True))
    assert await janitor.run_once() == 3600
    assert await weeks(database) == [WEEK]


async def test_numbering_goes_on_after_a_drop(
    database: Database, old: int, clock: DatabaseClock
) -> None:
    """Positions are never given again, though the rows that had them are gone."""
    await retain(database, Retention(30))
    async with database.transaction() as connection:
        await emit(connection, Event("ns", EventType.REQUEUED))
    while not (await sequence(database, new_id(clock.now()), lease_seconds=0.01)).events:
        pass
    row = await database.fetch_one(b"SELECT position FROM telemetry_stream")
    assert row == {"position": old + 1}


def names(folder: Path) -> list[str]:
    """What is in a folder."""
    return [one.name for one in folder.iterdir()]


async def files(database: Database) -> list[dict[str, object]]:
    """What is known of files that were written."""
    return await database.fetch_all(
        b"SELECT file, events, bytes, encode(sha256, 'hex') AS sha256 FROM telemetry_archive_file"
    )


async def test_a_parquet_file_has_every_event(
    database: Database, old: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a folder a dropped week is in a file too: the archive's own events, its digest kept."""
    monkeypatch.setattr("orbit.telemetry.archive._CHUNK_EVENTS", 5)
    folder = tmp_path / "made" / "anew"
    await retain(database, Retention(30, is_archiving=True, parquet_folder=folder))
    path = folder / f"telemetry-{WEEK}.parquet"
    assert names(folder) == [path.name]
    content = path.read_bytes()
    wanted = {"sha256": sha256(content).hexdigest(), "bytes": len(content), "events": old}
    assert await files(database) == [{"file": path.name, **wanted}]
    chunks = [await read_chunk(database, WEEK, number) for number in (1, 2)]
    lines = [json.loads(line) for chunk in chunks for line in chunk]
    assert [json.loads(line) for line in parquet_lines(path)] == lines
    assert [line["position"] for line in lines] == list(range(1, old + 1))
    await check_parquet(database, WEEK, path)
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(ArchiveDamaged, match="not as it was written"):
        await check_parquet(database, WEEK, path)


async def test_a_large_number_is_archived(
    database: Database, old: int, owner_dsn: str, tmp_path: Path
) -> None:
    """What may be reported can be dropped: a number beyond 2**53 comes out of a file as it was."""
    told = json.dumps({"value": 1.7e18, "unit": "ns", "metric": "größe"})
    await numbered(database, owner_dsn, told)
    await retain(database, Retention(30, is_archiving=True, parquet_folder=tmp_path))
    *_, last = parquet_lines(tmp_path / f"telemetry-{WEEK}.parquet")
    assert json.loads(last)["metadata"] == json.loads(told)
    assert await weeks(database) == []


async def test_a_file_that_is_there_as_written_stays(
    database: Database, old: int, tmp_path: Path
) -> None:
    """A pass that died before the drop writes no second file; a damaged one is written anew."""
    chunks, _ = await archive(database, WEEK)
    await write_parquet(database, WEEK, chunks, tmp_path)
    path = tmp_path / f"telemetry-{WEEK}.parquet"
    before = path.stat()
    await write_parquet(database, WEEK, chunks, tmp_path)
    assert path.stat().st_ino == before.st_ino
    path.write_bytes(b"damaged")
    await write_parquet(database, WEEK, chunks, tmp_path)
    await check_parquet(database, WEEK, path)
    assert len(list(parquet_lines(path))) == old


async def test_what_a_killed_writer_left_goes(database: Database, old: int, tmp_path: Path) -> None:
    """Of this week, and a day old: another node may be writing."""
    path = tmp_path / f"telemetry-{WEEK}.parquet"
    left = {name: tmp_path / f".{path.name}.{name}" for name in ("killed", "written")}
    left["another"] = tmp_path / ".telemetry-2026-01-12.parquet.killed"
    for name, one in left.items():
        one.write_bytes(b"half")
        if name != "written":
            os.utime(one, (1_700_000_000, 1_700_000_000))
    chunks, _ = await archive(database, WEEK)
    await write_parquet(database, WEEK, chunks, tmp_path)
    kept = {path.name, left["written"].name, left["another"].name}
    assert set(names(tmp_path)) == kept


async def test_a_file_that_cannot_be_written_or_read_back_stops_the_drop(
    database: Database, old: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is dropped, nothing half-written stays, and no file is known that there is not."""
    taken = tmp_path / "taken"
    taken.write_text("a file where the folder should be")
    given = Retention(30, is_archiving=True, parquet_folder=taken)
    with pytest.raises(ArchiveDamaged, match="cannot be written"):
        await retain(database, given)
    monkeypatch.setattr(parquet, "_write", partial(_write_less, parquet._write))
    with pytest.raises(ArchiveDamaged, match="does not read back"):
        await retain(database, replace(given, parquet_folder=tmp_path))
    assert names(tmp_path) == [taken.name]
    assert await weeks(database) == [WEEK]
    assert await files(database) == []


async def test_a_file_of_which_the_end_is_lost_stops_the_drop(
    database: Database, old: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is none any more is damage, like one that holds something else."""

    async def lose(write: Any, *given: Any) -> int:
        events: int = await write(*given)
        os.truncate(given[-1], 100)
        return events

    monkeypatch.setattr(parquet, "_write", partial(lose, parquet._write))
    with pytest.raises(ArchiveDamaged, match="does not read back"):
        await retain(database, Retention(30, is_archiving=True, parquet_folder=tmp_path))
    assert names(tmp_path) == []


async def test_archived_weeks_are_listed_and_restored(
    database: Database, old: int, dsn: str, owner_dsn: str, tmp_path: Path
) -> None:
    """`orbit telemetry archive ls|restore` from the archive, and from the file of a week."""
    await retain(database, Retention(30, is_archiving=True, parquet_folder=tmp_path))
    path = tmp_path / f"telemetry-{WEEK}.parquet"

    given = {"DATABASE_URL": dsn, "ORBIT_SECRET_KEYS": Fernet.generate_key().decode()}

    async def run(*arguments: str, code: int = 0) -> str:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "orbit", "telemetry", "archive", *arguments),
            env=os.environ | given,
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out, _ = await child.communicate()
        assert child.returncode == code, out.decode()
        return out.decode()

    (listed,) = json.loads(await run("ls", "--json"))["items"]
    assert (listed["week"], listed["events"], listed["file"]) == (WEEK, old, path.name)
    assert listed["file_sha256"] == sha256(path.read_bytes()).hexdigest()
    lines = [json.loads(line) for line in (await run("restore", WEEK)).splitlines()]
    assert [line["position"] for line in lines] == list(range(1, old + 1))
    await run("restore", WEEK, "--out", "week.jsonl", "--parquet", path.name)
    restored = (tmp_path / "week.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in restored] == lines
    assert "is not in the archive" in await run("restore", "2026-01-12", code=2)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    refused = await run("restore", WEEK, "--parquet", path.name, "--out", "no.jsonl", code=6)
    assert "not as it was written" in refused
    assert not (tmp_path / "no.jsonl").exists()
    os.mkfifo(tmp_path / "pipe")
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    await run("restore", WEEK, "--out", "pipe")
    assert [json.loads(line) for line in os.read(reading, 65_536).splitlines()] == lines
    os.close(reading)
    damage(owner_dsn, "a flipped byte")
    before = sorted(names(tmp_path))
    assert "is not what was archived" in await run("restore", WEEK, "--out", "no.jsonl", code=6)
    assert sorted(names(tmp_path)) == before


async def _then(first: Any, second: Any, *given: Any) -> Any:
    found = await first(*given)
    await second("bi", 1)
    return found


async def _write_less(write: Any, database: Database, week: str, chunks: int, path: Path) -> int:
    """As a disk that loses something: the last event is another."""
    events: int = await write(database, week, chunks, path)
    table = pyarrow.parquet.read_table(path)
    changed = table.slice(0, table.num_rows - 1)
    pyarrow.parquet.write_table(pyarrow.concat_tables([changed, table.slice(0, 1)]), path)
    return events
