"""Every released schema, with the data a killed node left in it, upgraded and gone on with.

The dumps are in `released/`, made by the program of that release, and restored as they are. A job
that waits in one goes to the address that it was made for, where nobody listens any more. Each
revision is declared: released, and then there is its dump, or passed over. Autonomy's switches are
off here: the change on probation is older than any time it was given.
"""

from __future__ import annotations

import gzip
import json
import os
import re
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

FOLDER = Path(__file__).with_name("released")
DUMPS = {path.name.partition(".")[0]: path for path in sorted(FOLDER.glob("*.sql.gz"))}
RELEASED = ("0001", "0003", "0006", "0007", "0008", "0009", "0010", "0013", "0015")
PASSED_OVER = ("0002", "0004", "0005", "0011", "0012", "0014")
"""Revisions that no release ended with: whoever had one of them had the next one too."""
GOVERNED_SINCE = "0013"
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


def test_every_revision_is_declared_and_each_released_one_has_its_dump() -> None:
    """A new migration is passed over until it is released; then `make.py` makes its dump."""
    assert sorted((*RELEASED, *PASSED_OVER)) == sorted(REVISIONS)
    assert sorted(DUMPS) == sorted(RELEASED)


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


@pytest.mark.parametrize(
    "released",
    [path for one, path in DUMPS.items() if one >= GOVERNED_SINCE],
    indirect=True,
    ids=lambda path: path.name[:4],
)
def test_what_people_decided_outlives_an_upgrade(
    project: Project, released: tuple[str, str]
) -> None:
    """Halted, turned off, changed on probation, a key, a reader's place: as it was, and usable."""
    dump = gzip.decompress(DUMPS[released[1]].read_bytes()).decode()
    [key] = re.findall(r"^-- key: (orb_\S+)$", dump, re.MULTILINE)
    project.environment["ORBIT_API_KEY"] = key
    (project.folder / "go").touch()
    project.ok("db", "upgrade")
    with project.running("up"):
        wait_for(lambda: answers(f"http://127.0.0.1:{project.environment['PORT']}/ready"), "ready")
        known = {one["name"]: one["state"] for one in project.json("keys", "list")["items"]}
        assert known["bob"] == "good"
        assert project.json("trigger", "halted", code=4)["code"] == "namespace_halted"
        assert "profile luna is disabled" in project.run("trigger", "off").stdout
        assert "/execution_rules/intensity 5 -> 4 until" in project.ok(
            "autonomy", "status", "terra"
        )

        project.ok("resume", "brand-b", "--reason", "prices are right again")
        project.ok("profiles", "enable", "luna")
        project.ok("trigger", "halted", "off", "--watch")
        unread = ("telemetry", "replay", "--namespace", "brand-b", "--consumer", "reader", "--json")
        read = [json.loads(line)["type"] for line in project.ok(*unread).splitlines()]
        assert read[0] == "orbit.namespace_resumed.v1"
        assert "orbit.namespace_halted.v1" not in read
        assert "1 change taken back" in project.ok("autonomy", "revert", "terra")
        assert "/execution_rules/intensity" not in project.ok("profiles")
    project.ok("audit", "verify")
