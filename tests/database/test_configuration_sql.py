"""sql/configuration.sql: one revision in force for all nodes, replaced whole or not at all."""

from __future__ import annotations

import asyncio

import psycopg
import pytest

from orbit.clock import DatabaseClock
from orbit.database.pool import Database
from orbit.database.queries import load
from orbit.errors import CyclesActive, DatabaseUnavailable
from orbit.execution.initiation import RevisionReplaced
from orbit.profiles.model import Documents
from orbit.profiles.revision import Configuration, revision_of
from tests.database.engine import Worker, count, documents, only

SQL = load("configuration")


@pytest.fixture
def configuration(database: Database, node_id: str, clock: DatabaseClock) -> Configuration:
    """A node's view of the configuration."""
    return Configuration(database, node_id, clock)


@pytest.fixture
def worker(database: Database, clock: DatabaseClock) -> Worker:
    """A worker on the fresh database."""
    return Worker.new(database, clock)


async def test_the_first_files_come_into_force(
    configuration: Configuration, database: Database
) -> None:
    """Files read at boot are stored whole under their digest, with the reason."""
    assert await configuration.propose(documents("one"))
    row = await only(
        database,
        "SELECT active.revision, activation.reason FROM config_active active"
        " JOIN config_activation activation USING (revision)",
    )
    assert row == {"revision": revision_of(documents("one")).revision, "reason": "files at boot"}


async def test_the_same_files_change_nothing(
    configuration: Configuration, database: Database
) -> None:
    """A node that starts with what is in force adds no fact."""
    await configuration.propose(documents("one"))
    assert not await configuration.propose(documents("one"))
    assert not await configuration.replace(documents("one"))
    assert await count(database, "config_activation") == 1


async def test_going_back_is_an_activation_of_the_stored_revision(
    configuration: Configuration, database: Database
) -> None:
    """A revision is stored once, and may come into force more than once."""
    for name in ("one", "two", "one"):
        assert await configuration.replace(documents(name))
    assert await count(database, "config_revision") == 2
    assert await count(database, "config_activation") == 3


async def test_old_files_at_boot_do_not_undo_newer_ones(
    configuration: Configuration, database: Database, clock: DatabaseClock, node_id: str
) -> None:
    """What was in force before stays past at a boot, and is visible; a reload goes back to it."""
    for name in ("one", "two"):
        assert await configuration.propose(documents(name))
    restarted = Configuration(database, node_id, clock)
    assert not await restarted.propose(documents("one"))
    assert restarted.active.documents == documents("two")
    assert not restarted.is_in_step
    assert await count(database, "config_activation") == 2
    assert await restarted.replace(documents("one"))
    assert restarted.is_in_step


async def test_a_request_that_waits_for_a_lost_configuration_is_told_so(
    configuration: Configuration, owner_dsn: str
) -> None:
    """Without its one row the database cannot say what is in force; repair can."""
    await configuration.propose(documents("one"))
    await configuration.catch_up()
    with psycopg.connect(owner_dsn) as connection:
        connection.execute("DELETE FROM config_active")
    with pytest.raises(DatabaseUnavailable, match="run `orbit db repair`"):
        await configuration.catch_up()


async def test_another_node_sees_the_new_revision(
    configuration: Configuration, database: Database, clock: DatabaseClock, node_id: str
) -> None:
    """A node looks up what is in force and reads it from the database, not from its files."""
    other = Configuration(database, node_id, clock)
    await configuration.propose(documents("one"))
    assert await other.refresh()
    assert other.active.documents == documents("one")
    assert not await other.refresh()


async def test_a_reload_is_refused_while_a_cycle_is_active(
    configuration: Configuration, database: Database, worker: Worker
) -> None:
    """The refusal names the cycles, and nothing is changed."""
    await configuration.propose(documents("one"))
    request = worker.request(profile_id="nova", run_profile_id="daily")
    await worker.accept(request, *[worker.request() for _ in range(24)])
    with pytest.raises(CyclesActive, match="25 cycles are active") as refusal:
        await configuration.replace(documents("two"))
    named = refusal.value.details["activeCycles"]
    assert len(named) == 20
    assert {"namespace", "cycleRunId", "runProfileId"} == set(named[0])
    assert configuration.active.documents == documents("one")
    assert await count(database, "config_revision") == 1


async def test_a_reload_does_not_wait_for_what_a_halt_holds_up(
    configuration: Configuration, database: Database, worker: Worker
) -> None:
    """It may be what the halt is for. What a node has in hand is waited for all the same."""
    await configuration.propose(documents("one"))
    await worker.accept(worker.request("halted"), worker.request("orbit-drill-left"))
    (cycle,) = await worker.claim()
    await database.execute(
        b"INSERT INTO namespace_fence (namespace, epoch, is_halted) VALUES ('halted', 1, true)"
    )
    with pytest.raises(CyclesActive, match="1 cycle is active") as refusal:
        await configuration.replace(documents("two"))
    assert refusal.value.details["activeCycles"][0]["cycleRunId"] == cycle.cycle_id
    await database.execute(b"UPDATE cycle_lease SET node_id = NULL, due_at = orbit_now()")
    await configuration.replace(documents("two"))
    assert configuration.active.documents == documents("two")


async def test_boot_does_not_wait_for_active_cycles(
    configuration: Configuration, worker: Worker
) -> None:
    """A changed file takes effect for new cycles; unfinished ones keep theirs."""
    await configuration.propose(documents("one"))
    await worker.accept(worker.request())
    assert await configuration.propose(documents("two"))


async def test_an_acceptance_under_way_holds_a_reload_up(
    configuration: Configuration, database: Database, worker: Worker
) -> None:
    """Whoever replaces the configuration sees every cycle accepted before, or comes first."""
    await configuration.propose(documents("one"))
    revision = configuration.active.revision
    async with database.transaction() as connection:
        await connection.execute(load("cycle").share_configuration)
        reload = asyncio.create_task(configuration.replace(documents("two")))
        await waiting(database)
        row = await only(database, "SELECT revision FROM config_active")
        assert row["revision"] == revision
        (late,) = [asyncio.create_task(worker.accept(worker.request(revision=revision)))]
    assert await reload
    (answer,) = await late
    assert isinstance(answer, RevisionReplaced)


async def test_a_reload_does_not_wait_without_bound(database: Database) -> None:
    """A lock that somebody keeps ends in an error after ten seconds, not in a hanging node."""
    async with database.transaction() as connection:
        await connection.execute(SQL.bound_wait)
        cursor = await connection.execute("SHOW lock_timeout")
        assert await cursor.fetchone() == {"lock_timeout": "10s"}


async def waiting(database: Database) -> None:
    """Returns when a session waits for the configuration's lock."""
    async with asyncio.timeout(60):
        where = "locktype = 'advisory' AND NOT granted"
        while not await count(database, "pg_locks", where):  # noqa: ASYNC110 - the server says nothing
            await asyncio.sleep(0)


async def test_no_documents_are_a_revision_too(configuration: Configuration) -> None:
    """An empty configuration is one: a node without files works."""
    assert await configuration.propose(Documents())
    assert (await configuration.read(configuration.active.revision)).documents == Documents()
