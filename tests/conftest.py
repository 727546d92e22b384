"""What tests share: one real PostgreSQL server, a fresh database per test from a template.

The server is the embedded one, in a folder of this run; ORBIT_TEST_DATABASE_URL names another
(of a role that may create databases). A test's database is a copy of a template with the
schema in place, which takes tens of milliseconds. Nothing waits for the disk, and where there is
plenty of memory the databases are in it: a process that is killed loses nothing by that, and no
test cuts the power.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import psutil
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from orbit.clock import DatabaseClock, SystemClock, new_id
from orbit.database.embedded import APPLICATION_ROLE, EmbeddedServer, erase
from orbit.database.pool import Database
from orbit.database.upgrade import upgrade
from orbit.errors import EmbeddedServerFailed
from tests.dealing import Dealing

# The same examples in every run: what fails fails for a change, and again on another machine.
# `ARGS='--hypothesis-profile=default'` draws others.
# Nor does one fail for a machine that is busy.
hypothesis.settings.register_profile(
    "orbit",
    derandomize=True,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("orbit")

_ROOM_BYTES = 6 << 30
_numbers = itertools.count(1)
# Nor does an autovacuum come between: who waits for a lock is somebody of the test.
_SETTINGS = ("fsync = off", "full_page_writes = off", "max_wal_size = '256MB'", "autovacuum = off")
_CLOSING_SECONDS = 60.0


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Dealing:
    """Which worker gets which tests."""
    return Dealing(config, log)


@dataclass(frozen=True)
class TestServer:
    """A server to make databases on: as the owner, and as the application's role."""

    __test__ = False
    owner_dsn: str
    app_role: str

    def owner(self, database: str) -> str:
        return make_conninfo(self.owner_dsn, dbname=database)

    def app(self, database: str) -> str:
        return make_conninfo(self.owner_dsn, dbname=database, user=self.app_role)

    def run(self, statement: str) -> None:
        """Runs it; who has closed a session of the database may still be seen there for a while."""
        deadline = time.monotonic() + _CLOSING_SECONDS
        with psycopg.connect(self.owner("postgres"), autocommit=True) as connection:
            while True:
                try:
                    connection.execute(statement)
                except psycopg.errors.ObjectInUse:  # after 5 s: the server waits by itself
                    if time.monotonic() > deadline:
                        raise
                else:
                    return


@pytest.fixture(scope="session")
def server() -> Iterator[TestServer]:
    """The PostgreSQL server of this test run, with a template database."""
    given = os.environ.get("ORBIT_TEST_DATABASE_URL")
    folder = Path(tempfile.mkdtemp(prefix="orbit-tests-", dir=None if given else _memory()))
    _sweep(folder)
    folder.chmod(0o755)  # for root's server, which runs as another user
    embedded = None if given else EmbeddedServer.start(folder / "data")
    found = TestServer(given or (embedded.owner_dsn if embedded else ""), APPLICATION_ROLE)
    if embedded is not None:
        for setting in _SETTINGS:
            found.run(f"ALTER SYSTEM SET {setting}")
        found.run("SELECT pg_reload_conf()")
    template = f"orbit_template_{os.getpid()}"
    found.run(
        f"DO $$ BEGIN CREATE ROLE {APPLICATION_ROLE} LOGIN; "
        "EXCEPTION WHEN duplicate_object THEN NULL; END $$"
    )
    found.run(f"DROP DATABASE IF EXISTS {template}")
    found.run(f"CREATE DATABASE {template}")
    upgrade(found.owner(template), APPLICATION_ROLE)
    yield found
    found.run(f"DROP DATABASE {template} WITH (FORCE)")
    if embedded is not None:
        embedded.leave()
        erase(folder / "data")
    shutil.rmtree(folder)


def _memory() -> Path | None:
    """A folder in memory, if there is room for some workers' servers; else None, the usual one."""
    folder = Path("/dev/shm")
    is_usable = folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
    if is_usable and shutil.disk_usage(folder).free > _ROOM_BYTES:
        return folder if psutil.virtual_memory().available > _ROOM_BYTES else None
    return None


def _sweep(folder: Path) -> None:
    """Ends servers that killed runs have left beside this folder; those in use are left alone."""
    before = SystemClock().now().timestamp() - 3600  # a younger one may be just starting
    for other in folder.parent.glob("orbit-tests-*"):
        with suppress(OSError, EmbeddedServerFailed):
            if other.stat().st_mtime < before:
                erase(other / "data")
                shutil.rmtree(other)


@pytest.fixture
def database_name(server: TestServer) -> Iterator[str]:
    """The name of a fresh database with Orbit's schema."""
    name = f"orbit_test_{os.getpid()}_{next(_numbers)}"
    server.run(f"CREATE DATABASE {name} TEMPLATE orbit_template_{os.getpid()}")
    yield name
    server.run(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@pytest.fixture
def dsn(server: TestServer, database_name: str) -> str:
    """A fresh database, as the application's role, which owns nothing."""
    return server.app(database_name)


@pytest.fixture
def owner_dsn(server: TestServer, database_name: str) -> str:
    """The same database as its owner, a superuser."""
    return server.owner(database_name)


@pytest.fixture
async def database(dsn: str) -> AsyncIterator[Database]:
    """A pool on the fresh database."""
    pool = Database(dsn, minimum=1, maximum=4)
    await pool.open()
    yield pool
    await pool.close()


@pytest.fixture
def clock() -> DatabaseClock:
    """A clock that agrees with the server's."""
    return DatabaseClock(SystemClock().now())


@pytest.fixture
def node_id(clock: DatabaseClock) -> str:
    """An id of a node."""
    return new_id(clock.now())


@pytest.fixture
def config_dir(tmp_path: Path) -> Path:
    """A folder with an empty, valid configuration."""
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "profiles.json").write_text('{"profiles": []}')
    (folder / "runProfiles.json").write_text('{"run_profiles": []}')
    return folder
