"""The first key, without one before it: embedded, on a given database, by the command line."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from cryptography.fernet import Fernet

from orbit.cli.scaffold import write_project
from tests.scenario.access import bearer
from tests.scenario.test_cli import Project, answers, free_port, wait_for

OPERATE = ("keys", "create", "ops", "--scope", "operator")


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A fresh project with its node up, on its embedded database."""
    yield from _up(tmp_path_factory.mktemp("embedded") / "project", {})


@pytest.fixture
def given(tmp_path: Path, dsn: str) -> Iterator[Project]:
    """The same on a database that was given, where nobody has a key."""
    settings = {"DATABASE_URL": dsn, "ORBIT_SECRET_KEYS": Fernet.generate_key().decode()}
    yield from _up(tmp_path / "project", settings)


def _up(folder: Path, settings: dict[str, str]) -> Iterator[Project]:
    project = Project(folder, {"PORT": str(free_port()), **settings})
    write_project(folder)
    with ExitStack() as stack:
        stack.enter_context(project.running("up"))
        wait_for(lambda: answers(f"{_url(project)}/ready"), "the node")
        yield project


def _url(project: Project) -> str:
    return f"http://127.0.0.1:{project.environment['PORT']}"


def _status(project: Project, token: str) -> int:
    url = f"{_url(project)}/cycles"
    return httpx.get(url, headers=bearer(token), trust_env=False, timeout=60).status_code


def test_an_embedded_instance_makes_its_own_key(embedded: Project) -> None:
    """In its folder, for its owner only; the command line uses it, nobody else gets in."""
    path = embedded.folder / ".orbit" / "admin.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert _status(embedded, "nothing") == 401
    assert _status(embedded, path.read_text().strip()) == 200
    (key,) = embedded.json("keys", "list")["items"]
    assert key["scopes"] == ["admin"]
    assert key["lastUsedAt"]
    started = embedded.json("trigger")
    assert started["items"][0]["cycleRunId"]


def test_keys_live_on_the_command_line(embedded: Project) -> None:
    """Made, shown once, used from the environment, rotated, revoked: over the API."""
    made = embedded.json(*OPERATE, "--namespace", "default", "--expires", "90d")
    token, key_id = made["token"], made["key"]["keyId"]
    assert _status(embedded, token) == 200
    asked = embedded.run("cycles", ORBIT_API_KEY=token)
    assert asked.returncode == 0, asked.stderr
    refused = embedded.run("keys", "list", ORBIT_API_KEY=token)
    assert (refused.returncode, token in refused.stdout + refused.stderr) == (3, False)
    new = embedded.json("keys", "rotate", key_id, "--overlap", "1h")
    assert new["key"]["replaces"] == key_id
    assert [_status(embedded, one) for one in (token, new["token"])] == [200, 200]
    assert "is revoked" in embedded.ok("keys", "revoke", key_id, "--reason", "moved")
    assert [_status(embedded, one) for one in (token, new["token"])] == [401, 200]
    assert token not in embedded.ok("keys", "list") + embedded.ok("keys", "list", "--json")
    assert embedded.run("keys", "create", "x", "--scope", "king").returncode == 2
    assert embedded.run("keys", "revoke", "0" * 16).returncode == 1


def test_the_brake_works_whatever_becomes_of_the_folders_key(embedded: Project) -> None:
    """A key that the node refuses, and one that has ended: halt and resume go to the database."""
    for key in ({"ORBIT_API_KEY": "orb_dead"}, {}):
        halted = embedded.run("halt", "brand", "--json", **key)
        assert halted.returncode == 0, halted.stderr
        assert ("straight on the database" in halted.stderr) is bool(key)
        assert json.loads(halted.stdout)["quiesced"] is True
        goes_on = embedded.run("resume", "brand", "--reason", "mended", **key)
        assert goes_on.returncode == 0, goes_on.stderr
    elsewhere = {"ORBIT_API_KEY": "orb_dead", "ORBIT_URL": _url(embedded)}
    assert embedded.run("halt", "brand", **elsewhere).returncode == 3
    assert embedded.run("cycles", ORBIT_API_KEY="orb_dead").returncode in {1, 3}


def test_a_link_opens_the_browsers_session(embedded: Project) -> None:
    """`orbit login` prints it; it leads to a page that the session may read."""
    link = embedded.ok("login").strip()
    with httpx.Client(follow_redirects=True, trust_env=False, timeout=60) as browser:
        page = browser.get(link)
        assert page.status_code == 200
        assert "text/html" in page.headers["content-type"]
    with httpx.Client(trust_env=False, timeout=60) as late:
        assert late.get(link).status_code == 401


def test_who_has_the_database_makes_the_first_key(given: Project) -> None:
    """Straight on the database, while a node is up that lets nobody in."""
    assert not (given.folder / ".orbit" / "admin.key").exists()
    made = given.json(*OPERATE)
    wait_for(lambda: _status(given, made["token"]) == 200, "the key")
    assert made["key"]["createdBy"].endswith("(cli)")
    with_key = given.run("trigger", ORBIT_API_KEY=made["token"])
    assert with_key.returncode == 0, with_key.stderr
    assert given.run("keys", "list", ORBIT_API_KEY=made["token"]).returncode == 3
    key_id = made["key"]["keyId"]
    given.ok("keys", "revoke", key_id, "--direct", ORBIT_API_KEY=made["token"])
    wait_for(lambda: _status(given, made["token"]) == 401, "the refusal")
    assert given.json("trigger")["items"][0]["cycleRunId"]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"ORBIT_HOST": "0.0.0.0"}, ["ORBIT_HOST=0.0.0.0", "orbit keys create"]),
        ({"ORBIT_HOST": "0.0.0.0", "ORBIT_AUTH": "off"}, ["ORBIT_AUTH=off", "loopback"]),
    ],
)
def test_other_machines_are_not_let_in_by_default(
    tmp_path: Path, dsn: str, settings: dict[str, str], names: list[str]
) -> None:
    """The start stops with one line that says what is missing."""
    write_project(tmp_path)
    project = Project(
        tmp_path,
        {
            "PORT": "0",
            "DATABASE_URL": dsn,
            "ORBIT_SECRET_KEYS": Fernet.generate_key().decode(),
            **settings,
        },
    )
    result = project.run("up")
    assert result.returncode == 1
    (line,) = [one for one in result.stderr.splitlines() if one.startswith("error:")]
    assert all(one in line for one in names), line


def test_the_demo_works_with_keys(tmp_path: Path) -> None:
    """`orbit demo` asks a node that wants one."""
    content = Project(tmp_path).json("demo")
    assert content["cycles"]
    assert "admin.key" not in json.dumps(content)
    assert list(tmp_path.iterdir()) == []


def test_an_embedded_key_that_was_revoked_is_replaced_at_the_next_start(tmp_path: Path) -> None:
    """Else every verb in the folder would be refused for ever; the old key stays refused."""
    project = Project(tmp_path / "project", {"PORT": str(free_port())})
    write_project(project.folder)
    path = project.folder / ".orbit" / "admin.key"
    with project.running("up"):
        wait_for(lambda: answers(f"{_url(project)}/ready"), "the node")
        old = path.read_text().strip()
        key_id = project.json("keys", "list")["items"][0]["keyId"]
        project.ok("keys", "revoke", key_id, "--reason", "seen by others")
        assert _status(project, old) == 401
    with project.running("up"):
        wait_for(lambda: answers(f"{_url(project)}/ready"), "the node")
        new = path.read_text().strip()
        assert new != old
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert [_status(project, one) for one in (old, new)] == [401, 200]
        assert len(project.json("keys", "list")["items"]) == 2
