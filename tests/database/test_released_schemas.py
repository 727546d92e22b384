"""Every released schema, with the data a killed node left in it, upgraded and gone on with.

The dumps are in `released/`, made by the program of that release, and restored as they are. A job
that waits in one goes to the address that it was made for, where nobody listens any more.
"""

from __future__ import annotations

import gzip
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from orbit.database import embedded_place
from orbit.database.upgrade import HEAD, REVISIONS
from tests.conftest import TestServer
from tests.database.released.make import RUN_PROFILES, SECRET_KEY, endpoints, write_project
from tests.scenario.test_cli import Project, answers, free_port, wait_for

RELEASED = Path(__file__).with_name("released")
DUMPS = {path.name.partition(".")[0]: path for path in sorted(RELEASED.glob("*.sql.gz"))}
NAME = f"orbit_released_{os.getpid()}"
IDLE = "SELECT (SELECT count(*) FROM cycle_lease) + (SELECT count(*) FROM dispatch_lease)"


def rows(dsn: str, query: str) -> list[tuple[Any, ...]]:
    """What a query answers, as the owner."""
    with psycopg.connect(dsn) as connection:
        return connection.execute(query.encode()).fetchall()


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[str]:
    """A receiver that takes everything; its address."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with Project(tmp_path).running("receiver", "--port", str(port), "--quiet"):
        wait_for(lambda: answers(f"{address}/health"), "the receiver")
        yield address


@pytest.fixture(params=list(DUMPS.values()), ids=list(DUMPS))
def released(
    request: pytest.FixtureRequest, server: TestServer, tmp_path: Path
) -> Iterator[tuple[str, str]]:
    """A database as a release left it, and that release's revision."""
    text = gzip.decompress(request.param.read_bytes()).decode()
    server.run(f"CREATE DATABASE {NAME}")
    (tmp_path / "psql").mkdir()
    psql = embedded_place.find_place(tmp_path / "psql").binaries / "psql"
    command = [str(psql), "--no-psqlrc", "--quiet", "--set", "ON_ERROR_STOP=1"]
    told = subprocess.run(
        [*command, "--dbname", server.owner(NAME)],
        input=text,
        text=True,
        capture_output=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    yield server.owner(NAME), request.param.name.partition(".")[0]
    server.run(f"DROP DATABASE {NAME} WITH (FORCE)")


@pytest.fixture
def project(
    released: tuple[str, str], server: TestServer, receiver: str, tmp_path: Path
) -> Project:
    """The folder of the release's node, for this program's."""
    folder = tmp_path / "project"
    write_project(folder)
    return Project(
        folder,
        {
            "PORT": str(free_port()),
            "DATABASE_URL": server.app(NAME),
            "ORBIT_DATABASE_OWNER_URL": released[0],
            "ORBIT_SECRET_KEYS": SECRET_KEY,
            "ORBIT_CRON_SCHEDULE": "",
            "ORBIT_DISPATCH_RETRY_BASE_SECONDS": "0.05",
            "ORBIT_FACT_RETENTION_DAYS": "0",
            "ORBIT_TELEMETRY_RETENTION_DAYS": "0",
            "ORBIT_DISPATCH_ENDPOINTS": endpoints(*[f"{receiver}/posts"] * 3),
        },
    )


def ask(project: Project, key: str, path: str, body: dict[str, Any]) -> None:
    """A request to the project's node that it has to grant."""
    answer = httpx.post(
        f"http://127.0.0.1:{project.environment['PORT']}/{path}",
        json=body,
        headers={"Authorization": f"Bearer {key}"},
        timeout=60,
        trust_env=False,
    )
    assert answer.is_success, answer.text


def test_there_is_a_dump_of_each_released_schema() -> None:
    """The first is there, and each is of a revision that this program knows."""
    assert DUMPS.keys() <= set(REVISIONS)
    assert REVISIONS[0] in DUMPS


def test_a_released_schema_is_upgraded_and_its_work_goes_on(
    project: Project, released: tuple[str, str], receiver: str
) -> None:
    """Refused before, sound after; what was accepted ends, what was dead can be brought back."""
    owner_dsn, revision = released
    known = "SELECT cycle_id::text, run_profile_id FROM cycle_run"
    cycles = dict(rows(owner_dsn, known))
    assert sorted(cycles.values()) == sorted(RUN_PROFILES)
    if revision != HEAD:
        refused = project.run("up")
        assert refused.returncode == 1
        assert f"schema is {revision}, this program needs {HEAD}" in refused.stderr

    assert HEAD in project.ok("db", "upgrade")
    project.ok("db", "check")
    project.ok("audit", "verify")
    assert dict(rows(owner_dsn, known)) == cycles

    (project.folder / "go").touch()
    key = project.ok("keys", "create", "ann", "--scope", "admin").strip()
    project.environment["ORBIT_API_KEY"] = key
    with project.running("up"):
        wait_for(lambda: answers(f"http://127.0.0.1:{project.environment['PORT']}/ready"), "ready")
        ask(project, key, "run-profiles/trigger", {"runProfileIds": ["ends"]})
        wait_for(lambda: rows(owner_dsn, IDLE) == [(0,)], "the end of all work")
        dead = rows(owner_dsn, "SELECT job_id::text FROM dead_letter_dispatch")
        assert len(dead) == 2
        for (job_id,) in dead:
            ask(
                project, key, f"dead-letters/{job_id}/requeue", {"reason": "the receiver is mended"}
            )
        wait_for(lambda: rows(owner_dsn, IDLE) == [(0,)], "the end of what was requeued")
    states = rows(owner_dsn, "SELECT run_profile_id, state FROM cycle_status ORDER BY cycle_id")
    ended = {name: "failed" if name == "fails" else "finished" for name in RUN_PROFILES}
    assert sorted(states) == sorted([*ended.items(), ("ends", "finished")])
    arrived = httpx.get(f"{receiver}/received", trust_env=False, timeout=60).json()["items"]
    assert [one["outcome"] for one in arrived] == ["stored"] * 4
    went_on = {one["cycleRunId"] for one in arrived} & cycles.keys()
    assert {cycles[cycle] for cycle in went_on} == {"refused", "slow", "waits"}
    project.ok("audit", "verify")
