"""One whole cycle on each server of the distribution, and through a PgBouncer."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from aiohttp import web

from orbit.app import Node
from orbit.database.upgrade import upgrade
from orbit.endpoints import Endpoint
from orbit.payload import Payload
from orbit.settings import Settings
from orbit.vault import generate_key

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
BOUNCER = shutil.which("pgbouncer") or shutil.which("/usr/sbin/pgbouncer")
ROLE = "orbit"
needs_server = pytest.mark.skipif(not PROGRAMS, reason="no server under /usr/lib/postgresql")


@contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program that won't run as root, run as `nobody` then, and stopped at the end."""
    user: dict[str, Any] = {}
    if os.geteuid() == 0:
        user = {"user": "nobody", "group": "nogroup", "extra_groups": []}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd="/", **user)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(120)


@contextmanager
def folder() -> Iterator[Path]:
    """A folder of whoever runs the servers, with a path short enough for a socket."""
    path = Path(tempfile.mkdtemp(prefix="orbit-pg-"))
    if os.geteuid() == 0:
        shutil.chown(path, "nobody", "nogroup")
    yield path
    shutil.rmtree(path)


def connected(dsn: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Returns when the server answers."""
    while process.poll() is None:
        try:
            psycopg.connect(dsn, connect_timeout=1).close()
        except psycopg.OperationalError:
            continue
        return
    pytest.fail(log.read_text())


@dataclass(frozen=True)
class Server:
    """A server's socket folder, and how to reach its database."""

    place: Path
    version: str

    def dsn(self, user: str) -> str:
        return f"host={self.place} port=5432 dbname=orbit user={user}"


@pytest.fixture(scope="module", params=PROGRAMS, ids=lambda path: path.parts[-3])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of the distribution with Orbit's schema, and a role that owns nothing."""
    program: Path = request.param
    with folder() as place:
        data, log = place / "data", place / "log"
        with running(
            [
                *(str(program.with_name("initdb")), "-D", str(data), "-U", "owner", "-A", "trust"),
                *("-E", "UTF8", "--locale=C", "--no-sync"),
            ],
            log,
        ) as initdb:
            assert initdb.wait(300) == 0, log.read_text()
        options = ["-c", "listen_addresses=", "-c", "fsync=off", "-k", str(place)]
        with running([str(program), "-D", str(data), *options], log) as process:
            found = Server(place, program.parts[-3])
            connected(found.dsn("owner").replace("dbname=orbit", "dbname=postgres"), process, log)
            with psycopg.connect(
                found.dsn("owner").replace("dbname=orbit", "dbname=postgres"), autocommit=True
            ) as connection:
                connection.execute(f"CREATE ROLE {ROLE} LOGIN".encode())
                connection.execute("CREATE DATABASE orbit")
            upgrade(found.dsn("owner"), ROLE)
            yield found


@pytest.fixture
async def receiver() -> AsyncIterator[tuple[str, list[bytes]]]:
    """An endpoint's address, and what it was sent."""
    got: list[bytes] = []

    async def take(request: web.Request) -> web.Response:
        got.append(await request.read())
        return web.Response(status=200)

    application = web.Application()
    application.router.add_post("/", take)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    yield f"http://{host}:{port}/", got
    await runner.cleanup()


async def run_cycle(dsn: str, config_dir: Path, url: str, *, is_preparing: bool) -> str:
    """Runs one raw cycle on a node of this process, from trigger to its last receipt; its state."""
    settings = Settings(
        database_url=dsn,
        secret_keys=(generate_key(),),
        config_dir=config_dir,
        cron_schedule="",
        dispatch_endpoints=(Endpoint("default-endpoint", url),),
        database_prepared_statements=is_preparing,
        drain_timeout_seconds=5,
        warnings=(),
    )
    node = Node(settings)
    try:
        await node.open()
        await node.start()
        accepted = await node.orchestration.trigger_raw(payload=Payload(b"hello", "text/plain"))
        query = b"SELECT state FROM cycle_status WHERE cycle_id = %s"
        async with asyncio.timeout(120):
            while True:
                row = await node.database.fetch_one(query, (accepted.cycle_id,))
                if row is not None and row["state"] != "running":
                    return str(row["state"])
                await asyncio.sleep(0.01)  # looks again; the state is what is waited for
    finally:
        await node.drain()
        await node.close()


@needs_server
async def test_a_cycle_runs_on_this_server(
    server: Server, config_dir: Path, receiver: tuple[str, list[bytes]]
) -> None:
    """Schema, grants and every statement of a cycle's life work on the distribution's server."""
    url, got = receiver
    state = await run_cycle(server.dsn(ROLE), config_dir, url, is_preparing=True)
    assert (state, got) == ("finished", [b"hello"])


@needs_server
def test_the_application_cannot_create_tables_on_this_server(server: Server) -> None:
    """Also where everybody might create tables by default, as up to PostgreSQL 14."""
    with psycopg.connect(server.dsn("owner"), autocommit=True) as owner:
        owner.execute("GRANT CREATE ON SCHEMA public TO PUBLIC")
        owner.execute(f"SELECT orbit_grant('{ROLE}')".encode())
    with (
        psycopg.connect(server.dsn(ROLE), autocommit=True) as application,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        application.execute("CREATE TABLE mine ()")


@needs_server
@pytest.mark.skipif(BOUNCER is None, reason="pgbouncer is not installed")
async def test_a_cycle_runs_through_pgbouncer(
    server: Server, config_dir: Path, receiver: tuple[str, list[bytes]]
) -> None:
    """In transaction mode, without prepared statements, nothing relies on the session."""
    assert BOUNCER is not None
    url, got = receiver
    with folder() as place:
        settings, log = place / "pgbouncer.ini", place / "log"
        settings.write_text(
            f"[databases]\norbit = host={server.place} port=5432\n[pgbouncer]\n"
            f"pool_mode = transaction\nauth_type = any\nunix_socket_dir = {place}\n"
            "listen_port = 6432\nlisten_addr =\ndefault_pool_size = 3\n"
            "ignore_startup_parameters = extra_float_digits\n"
        )
        settings.write_text(
            settings.read_text().replace("port=5432", f"port=5432 user={ROLE} dbname=orbit")
        )
        dsn = f"host={place} port=6432 dbname=orbit user={ROLE}"
        with running([BOUNCER, str(settings)], log) as process:
            await asyncio.to_thread(connected, dsn, process, log)
            state = await run_cycle(dsn, config_dir, url, is_preparing=False)
    assert (state, got) == ("finished", [b"hello"])
