"""Bad starts and awkward ends, through the real program.

A start that cannot succeed ends at once with exit code 1 and one message that names the place;
no traceback, no secret, and nothing left behind.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.conftest import TestServer
from tests.scenario.conftest import SECRET_KEY, Configure, Facts, policy, run_profile, until

PASSWORD = "pw_never-to-be-seen"
ROOT = Path(__file__).parents[2]
STEPS = """
import asyncio

async def stubborn(payload, context):
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass
"""

# Root is kept out of no folder; the imports come first, since Python may lie in root's own.
AS_ORDINARY_USER = """
import os, sys
import concurrent.futures.thread, fcntl, pwd, shutil, subprocess, tempfile
import orbit.api.server, orbit.cli, orbit.database.embedded
if os.geteuid() == 0:
    os.chdir("/"); os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.exit(orbit.cli.main(["up"]))
"""

Up = Callable[..., subprocess.CompletedProcess[str]]


def environment(config_dir: Path, **given: str) -> dict[str, str]:
    """A clean environment for a node on a free port."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return {
        **kept,
        "PYTHONPATH": str(ROOT / "src"),
        "PYTHONWARNINGS": "ignore",
        "PORT": "0",
        "ORBIT_CRON_SCHEDULE": "",
        "ORBIT_AUTH": "off",
        "ORBIT_CONFIG_DIR": str(config_dir),
        "ORBIT_SECRET_KEYS": SECRET_KEY,
        **given,
    }


@pytest.fixture
def up(config_dir: Path, tmp_path: Path) -> Up:
    """Starts `orbit up`, which is expected to end by itself."""

    def start(
        command: Sequence[str] = ("-m", "orbit", "up"), **given: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command],
            env=environment(config_dir, **given),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            cwd=tmp_path,
        )

    return start


def complaint(result: subprocess.CompletedProcess[str]) -> list[str]:
    """What a start that failed as it should has to say, line by line."""
    assert result.returncode == 1, result
    assert "Traceback" not in result.stdout + result.stderr
    lines = result.stderr.splitlines()
    errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    assert len(errors) == 1, lines
    said = lines[errors[0] :]
    assert all(line.startswith("  ") for line in said[1:])
    return said


def assert_untouched(facts: Facts) -> None:
    """No configuration, no node, no cycle, no schedule came into being."""
    for table in ("config_revision", "config_active", "node", "schedule", "cycle_run"):
        assert facts(f"SELECT count(*) FROM {table}") == [{"count": 0}], table


# --- configuration and settings -----------------------------------------------------------


def test_every_mistake_in_the_configuration_is_named_at_once(
    up: Up, dsn: str, config_dir: Path, facts: Facts
) -> None:
    """Types, keys, ids, references, schedule, zone, step: file, line and pointer of each."""
    profiles = [
        {"profile_id": "nova", "label": 7, "state": "enabled"},
        {"profile_id": "nova", "lable": "x", "state": "on", "label": "x"},
    ]
    bad = run_profile(
        profile_id="nowa",
        distribution_targets=["nowhere"],
        execution_policy={
            "schedule": "61 * * * *",
            "timezone": "Mars/Olympus",
            "tiers": {"tier1": [{"use": "no_such_module:step"}, {"use": "json:no_such_name"}]},
        },
    )
    (config_dir / "profiles.json").write_text(json.dumps({"profiles": profiles}, indent=1))
    (config_dir / "runProfiles.json").write_text(json.dumps({"run_profiles": [bad]}, indent=1))
    first, *lines = complaint(up(DATABASE_URL=dsn))
    assert first == f"error: the configuration is invalid: {len(lines)} problems"
    expected = {
        "/profiles/0/label": "expected a string",
        "/profiles/1/profile_id": "unique",
        "/profiles/1/lable": "did you mean label?",
        "/profiles/1/state": '"enabled" or "disabled"',
        "/run_profiles/0/profile_id": "did you mean nova?",
        "/run_profiles/0/distribution_targets/0": "expected an endpoint's key",
        "/run_profiles/0/execution_policy/schedule": "61",
        "/run_profiles/0/execution_policy/timezone": "IANA time zone",
        "/run_profiles/0/execution_policy/tiers/tier1/0/use": "no module no_such_module",
        "/run_profiles/0/execution_policy/tiers/tier1/1/use": "has no no_such_name",
    }
    for pointer, words in expected.items():
        [line] = [one for one in lines if f" {pointer}: " in one]
        assert words in line
        assert re.match(rf"  {re.escape(str(config_dir))}/\w+\.json:\d+ /", line)
    assert len(lines) == len(expected)
    assert_untouched(facts)


def test_files_that_are_no_json_or_missing_are_named(
    up: Up, dsn: str, config_dir: Path, facts: Facts
) -> None:
    """Broken JSON has a line and a column; a missing file says what would do."""
    (config_dir / "profiles.json").write_text('{"profiles": [\n  {"profile_id" "x"}\n]}')
    (config_dir / "runProfiles.json").unlink()
    _, broken, missing = complaint(up(DATABASE_URL=dsn))
    assert f"{config_dir}/profiles.json:2: broken JSON" in broken
    assert f"{config_dir}/runProfiles.json: the file is missing" in missing
    assert_untouched(facts)


def test_settings_that_cannot_be_used_are_named_together(up: Up) -> None:
    """Each variable has its line: name, value (never a secret), and what is accepted."""
    endpoint = {"key": "out", "url": "ftp://x", "token": PASSWORD, "tokn": PASSWORD}
    said = complaint(
        up(
            PORT="seventy",
            ORBIT_CRON_SCHEDULE="0 0 30 2 *",
            ORBIT_DISPATCH_ENDPOINTS=json.dumps([endpoint]),
            ORBIT_SECRET_KEYS=PASSWORD,
            DATABASE_URL=f"mysql://orbit:{PASSWORD}@db/orbit",
        )
    )
    text = "\n".join(said)
    assert "PORT='seventy': accepted is a whole number from 0 to 65535" in text
    assert "ORBIT_CRON_SCHEDULE='0 0 30 2 *'" in text
    assert "/0/url: an absolute http:// or https:// URL" in text
    assert "/0/tokn: not a key of an endpoint; did you mean token?" in text
    assert "ORBIT_SECRET_KEYS=***" in text
    assert "DATABASE_URL=" in text
    assert PASSWORD not in text


# --- the database -------------------------------------------------------------------------


def test_a_database_that_is_not_there_is_named(up: Up) -> None:
    """Nothing listens: the server's address, and no password."""
    [said] = complaint(up(DATABASE_URL=f"postgresql://orbit:{PASSWORD}@127.0.0.1:9/orbit"))
    assert 'server at "127.0.0.1", port 9 failed: Connection refused' in said
    assert PASSWORD not in said


def test_a_port_that_is_no_database_is_named(up: Up) -> None:
    """A web server answers: the start ends, and says what it spoke to."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        answering = threading.Thread(target=_answer_http, args=(listening,), daemon=True)
        answering.start()
        [said] = complaint(up(DATABASE_URL=f"postgresql://o:{PASSWORD}@127.0.0.1:{port}/o"))
    assert f"port {port}" in said
    assert PASSWORD not in said


def test_a_port_that_never_answers_is_given_up(up: Up) -> None:
    """Accepted and then silence: the wait is bounded by the connection's own timeout."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        [said] = complaint(up(DATABASE_URL=f"postgresql://o@127.0.0.1:{port}/o?connect_timeout=2"))
    assert "timeout" in said


def test_a_database_that_does_not_exist_is_named(up: Up, server: TestServer) -> None:
    """The server's own words say which database is missing."""
    [said] = complaint(up(DATABASE_URL=server.app("no_such_database")))
    assert 'database "no_such_database" does not exist' in said


def test_a_wrong_password_is_refused_and_not_shown(
    up: Up, server: TestServer, locked_role: str, database_name: str
) -> None:
    """The server refuses the role; the message has its name, not what was tried."""
    url = make_conninfo(server.owner(database_name), user=locked_role, password=PASSWORD)
    [said] = complaint(up(DATABASE_URL=url))
    assert f'password authentication failed for user "{locked_role}"' in said
    assert PASSWORD not in said


def test_a_database_without_schema_says_what_to_do(up: Up, server: TestServer) -> None:
    """An empty database is not touched; the message names the command that makes the schema."""
    name = f"orbit_empty_{os.getpid()}"
    server.run(f"CREATE DATABASE {name}")
    try:
        [said] = complaint(up(DATABASE_URL=server.app(name)))
        with psycopg.connect(server.owner(name)) as connection:
            row = connection.execute(
                "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace"
            ).fetchone()
    finally:
        server.run(f"DROP DATABASE {name} WITH (FORCE)")
    assert "the database has no schema" in said
    assert "`orbit db upgrade`" in said
    assert row == (0,)


def test_a_schema_newer_than_the_program_is_left_alone(
    up: Up, dsn: str, owner_dsn: str, facts: Facts
) -> None:
    """An older program says so and does not start."""
    with psycopg.connect(owner_dsn) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    [said] = complaint(up(DATABASE_URL=dsn))
    assert "schema 9999 is newer than this program" in said
    assert "upgrade Orbit" in said
    assert_untouched(facts)


# --- the machine --------------------------------------------------------------------------


def test_a_port_in_use_is_noticed_before_anything_starts(up: Up, dsn: str, facts: Facts) -> None:
    """The address is named, with the variable to change; the database is not touched."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        [said] = complaint(up(DATABASE_URL=dsn, PORT=port))
    assert f"127.0.0.1:{port}" in said
    assert "PORT" in said
    assert_untouched(facts)


def test_a_folder_that_cannot_be_written_is_named(up: Up) -> None:
    """The embedded server's folder lies in a read-only one: its name, and what else to set."""
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder, "locked", "data")
        data_dir.parent.mkdir(mode=0o555)
        Path(folder).chmod(0o755)
        [said] = complaint(up(("-c", AS_ORDINARY_USER), ORBIT_DATA_DIR=str(data_dir)))
        assert str(data_dir) in said
        assert "ORBIT_DATA_DIR" in said
        assert not list(data_dir.parent.iterdir())


# --- the end ------------------------------------------------------------------------------


async def test_a_step_that_never_ends_does_not_keep_the_program(
    dsn: str, config_dir: Path, tmp_path: Path, configure: Configure, facts: Facts
) -> None:
    """SIGTERM while a step ignores its cancellation: exit code 0, and the lease is given back."""
    (tmp_path / "stubborn_steps.py").write_text(STEPS)
    tiers = policy(tier1=[{"use": "stubborn_steps:stubborn", "timeout_seconds": 0.2}])
    tiers["tiers"]["tier2"] = [{"use": "stubborn_steps:stubborn"}]
    first, second = (
        run_profile(name, execution_policy=given, distribution_targets=[])
        for name, given in (
            ("timed-out", tiers),
            ("running", policy(tier1=["stubborn_steps:stubborn"])),
        )
    )
    configure(first, second)
    process = subprocess.Popen(  # noqa: ASYNC220 - it starts while nothing else goes on
        [sys.executable, "-m", "orbit", "up"],
        env=environment(config_dir, DATABASE_URL=dsn, ORBIT_DRAIN_TIMEOUT_SECONDS="0.5"),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[4]
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            answer = await client.post("/run-profiles/trigger")
            assert answer.status_code == 202, answer.text
        await until(
            lambda: facts("SELECT FROM cycle_status WHERE state = 'failed'"), "the first's end"
        )
        await until(
            lambda: facts("SELECT FROM cycle_lease WHERE node_id IS NOT NULL"), "the second's begin"
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 0
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    [lease] = facts("SELECT node_id, due_at <= orbit_now() AS is_due FROM cycle_lease")
    assert lease == {"node_id": None, "is_due": True}
    assert facts("SELECT count(*) FROM node") == [{"count": 0}]


# --- what these tests need ----------------------------------------------------------------


def _answer_http(listening: socket.socket) -> None:
    while True:
        try:
            connection, _ = listening.accept()
        except OSError:
            return
        with connection:
            connection.recv(1024)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


@pytest.fixture
def locked_role(server: TestServer) -> Iterator[str]:
    """A role that has to give a password, which the test server asks nobody else for."""
    role = f"orbit_locked_{os.getpid()}"
    with psycopg.connect(server.owner("postgres"), autocommit=True) as connection:
        found: Any = connection.execute("SHOW hba_file").fetchone()
        file = Path(found[0])
        if not os.access(file, os.W_OK):
            pytest.skip("the test server's rules of access cannot be changed from here")
        before = file.read_text()
        create = sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'another'").format(sql.Identifier(role))
        connection.execute(create)
        rules = f"local all {role} scram-sha-256\nhost all {role} all scram-sha-256\n"
        file.write_text(rules + before)
        connection.execute("SELECT pg_reload_conf()")
        yield role
        file.write_text(before)
        connection.execute("SELECT pg_reload_conf()")
        connection.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))
