"""The program that `orbit up` runs: its address, its signals, its logs."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from cryptography.fernet import Fernet

from orbit.api.server import bind
from orbit.errors import AddressInUse, SettingInvalid
from orbit.settings import Settings
from tests.scenario.test_cli import free_port

SECONDS = 60.0
PASSWORD = "password-that-nobody-may-see"
_PROGRAM = """
import sys
from orbit.api.server import serve
from orbit.settings import load_settings
sys.exit(serve(load_settings()))
"""


def until(look: Callable[[], bool]) -> None:
    """Returns as soon as a look finds what it looks for."""
    deadline = time.monotonic() + SECONDS
    while not look():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


class Program:
    """A node in a process of its own."""

    def __init__(self, folder: Path, dsn: str, **environment: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.out, self.log = folder / "out", folder / "log"
        given = {
            "PATH": os.environ["PATH"],
            "PORT": str(self.port),
            "DATABASE_URL": dsn,
            "ORBIT_SECRET_KEYS": Fernet.generate_key().decode(),
            "ORBIT_CONFIG_DIR": str(folder / "config"),
            "ORBIT_CRON_SCHEDULE": "",
            "ORBIT_AUTH": "off",
            **environment,
        }
        with self.out.open("wb") as out, self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM], cwd=folder, env=given, stdout=out, stderr=log
            )

    def answers(self, path: str) -> bool:
        """Whether the node answers a path with 2xx."""
        try:
            return httpx.get(self.url + path, timeout=60).is_success
        except httpx.TransportError:
            return False


@pytest.fixture
def program(tmp_path: Path, config_dir: Path, dsn: str) -> Iterator[Callable[..., Program]]:
    """Starts nodes; those still there at the end are killed."""
    started: list[Program] = []

    def start(**environment: str) -> Program:
        assert config_dir.parent == tmp_path
        started.append(Program(tmp_path, dsn, **environment))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()


def test_a_signal_ends_the_node_in_order(program: Callable[..., Program]) -> None:
    """SIGTERM ends with 0, although a client keeps its connection; the logs are JSON lines."""
    node = program(ORBIT_ENV="production")
    until(lambda: node.answers("/ready"))
    with httpx.Client(base_url=node.url, timeout=60) as keeping:
        assert keeping.post("/cycles/trigger", json={"payload": PASSWORD}).status_code == 202
        node.process.send_signal(signal.SIGTERM)
        assert node.process.wait(SECONDS) == 0
    assert not node.answers("/health")
    lines = [json.loads(line) for line in node.log.read_text().splitlines()]
    assert {"node_started", "draining", "node_stopped"} <= {line["event"] for line in lines}
    assert all({"time", "level", "event"} <= line.keys() for line in lines)
    assert PASSWORD not in node.log.read_text()
    assert node.out.read_text() == ""


def test_in_development_the_address_is_told(program: Callable[..., Program]) -> None:
    """In development one line on stdout says where the node is; SIGINT ends it too."""
    node = program()
    until(lambda: node.answers("/ready"))
    until(lambda: node.url in node.out.read_text())
    assert len(node.out.read_text().splitlines()) == 1
    assert "node_started" in node.log.read_text()
    node.process.send_signal(signal.SIGINT)
    assert node.process.wait(SECONDS) == 0


def test_a_second_signal_ends_at_once(program: Callable[..., Program]) -> None:
    """Who cannot wait for the drain sends another signal."""
    node = program()
    until(lambda: node.answers("/ready"))
    # A request that never ends keeps the node from leaving.
    with socket.create_connection(("127.0.0.1", node.port)) as hanging:
        hanging.sendall(
            b"POST /cycles/trigger HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 10\r\n\r\n{"
        )
        node.process.send_signal(signal.SIGTERM)
        until(lambda: "draining" in node.log.read_text())
        assert node.process.poll() is None
        begun = time.monotonic()
        node.process.send_signal(signal.SIGTERM)
        assert node.process.wait(SECONDS) == 1
        assert time.monotonic() - begun < 20  # the drain would take 30


def test_without_the_api_role_only_probes_answer(program: Callable[..., Program]) -> None:
    """A worker's node answers its probes and refuses everything else."""
    node = program(ORBIT_ROLES="worker")
    until(lambda: node.answers("/ready"))
    assert node.answers("/metrics")
    assert httpx.get(f"{node.url}/cycles", timeout=60).status_code == 404
    assert httpx.post(f"{node.url}/cycles/trigger", timeout=60).status_code == 404


def test_a_taken_address_is_named() -> None:
    """A port in use is refused with how to choose another; an unusable one too."""
    settings = Settings.model_validate({"port": 0})
    with bind(settings) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AddressInUse, match=f"127.0.0.1:{port}.*PORT"):
            bind(settings.model_copy(update={"port": port}))
    with pytest.raises(SettingInvalid, match="ORBIT_HOST"):
        bind(settings.model_copy(update={"host": "192.0.2.1"}))
