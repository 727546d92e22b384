"""A node under the real PM2, by ecosystem.config.js: start, reload, crash, stop.

PM2 runs as a daemon of its own in a folder of the test (PM2_HOME). Cycles are in hand whenever
the node goes; every one that was accepted has to end, and each of its items to be stored once.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from orbit.cli.scaffold import write_project
from orbit.database.embedded import erase
from tests.delivery.conftest import ROOT, Missing, program, run
from tests.scenario.test_cli import PROGRAM, answers, free_port, wait_for

DRAIN_SECONDS = 5
SLOW_STEP = '''
import asyncio

from orbit.payload import Payload


async def greet(payload, context):
    """Takes its time, so that a cycle is in hand when the node goes."""
    await asyncio.sleep(0.5)
    return Payload.of_text(f"from {context.cycle_id}")
'''


@dataclass
class Managed:
    """A project's folder with its node under PM2, and a receiver."""

    pm2: Path
    folder: Path
    port: int
    receiver_url: str
    accepted: list[str] = field(default_factory=list)

    def __call__(self, *arguments: str) -> str:
        """Runs a verb of PM2 in the folder."""
        return run(self.pm2, *arguments, cwd=self.folder, **self.environment)

    @property
    def environment(self) -> dict[str, Any]:
        path = f"{PROGRAM.parent}:{os.environ['PATH']}"
        python = {"PYTHONPATH": str(ROOT / "src"), "PATH": path}
        return {"PM2_HOME": str(self.folder / ".pm2"), "PORT": str(self.port), **python}

    @property
    def process(self) -> dict[str, Any]:
        """What PM2 knows of the node."""
        (found,) = json.loads(self("jlist").splitlines()[-1])
        return dict(found)

    def is_ready(self) -> bool:
        return answers(f"http://127.0.0.1:{self.port}/ready")

    def trigger(self, count: int) -> None:
        """Starts so many cycles; each is accepted."""
        key = (self.folder / ".orbit" / "admin.key").read_text().strip()
        url = f"http://127.0.0.1:{self.port}/run-profiles/trigger"
        head = {"Authorization": f"Bearer {key}"}
        with httpx.Client(headers=head, trust_env=False, timeout=60) as client:
            for _ in range(count):
                (item,) = client.post(url).raise_for_status().json()["items"]
                self.accepted.append(item["cycleRunId"])

    def stored(self) -> list[str]:
        """The cycles of the items that the receiver stored; repetitions it drops."""
        url = f"{self.receiver_url}/received"
        received = httpx.get(url, trust_env=False, timeout=60).json()["items"]
        return sorted(one["cycleRunId"] for one in received if one["outcome"] == "stored")

    def has_all(self) -> bool:
        return self.stored() == sorted(self.accepted)


@pytest.fixture
def managed(missing: Missing) -> Iterator[Managed]:
    """A project that allows many cycles at once, its receiver up, its node not yet."""
    pm2 = program("pm2")
    if pm2 is None:
        missing("PM2 is not here: npm install --prefix build/pm2 pm2")
        raise AssertionError
    folder = Path(tempfile.mkdtemp(prefix="orbit-pm2-"))
    folder.chmod(0o755)
    ports = free_port(), free_port()
    write_project(folder, receiver_url=f"http://127.0.0.1:{ports[1]}/posts")
    (folder / "steps.py").write_text(SLOW_STEP)
    path = folder / "config" / "runProfiles.json"
    content = json.loads(path.read_text())
    content["run_profiles"][0]["execution_policy"]["overlap"] = "allow"
    path.write_text(json.dumps(content))
    with (folder / ".env").open("a") as settings:
        settings.write(f"ORBIT_DRAIN_TIMEOUT_SECONDS={DRAIN_SECONDS}\nORBIT_LEASE_SECONDS=2\n")
    shutil.copy(ROOT / "ecosystem.config.js", folder)
    receiver = psutil.Popen(
        [sys.executable, "-m", "orbit", "receiver", "--port", str(ports[1]), "--quiet"],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": os.environ["PATH"]},
    )
    made = Managed(pm2, folder, ports[0], f"http://127.0.0.1:{ports[1]}")
    try:
        wait_for(lambda: answers(f"{made.receiver_url}/health"), "the receiver")
        yield made
    finally:
        made("kill")
        receiver.terminate()
        receiver.wait(300)
        erase(folder / ".orbit")
        shutil.rmtree(folder, ignore_errors=True)


def test_pm2_keeps_a_node_and_loses_no_cycle(managed: Managed) -> None:
    """Started, reloaded amid cycles, killed amid cycles, stopped: all ended, each stored once."""
    managed("start", "ecosystem.config.js")
    wait_for(managed.is_ready, "the node under PM2")
    started = managed.process
    told = started["pm2_env"]
    assert (told["exec_mode"], told.get("instances", 1)) == ("fork_mode", 1)
    assert told["kill_timeout"] > DRAIN_SECONDS * 1000
    assert told["exp_backoff_restart_delay"] > 0

    managed.trigger(20)
    managed("reload", "ecosystem.config.js")
    wait_for(lambda: managed.process["pid"] not in {0, started["pid"]}, "another process")
    wait_for(managed.is_ready, "the node after the reload")
    assert not psutil.pid_exists(started["pid"])
    managed.trigger(10)
    wait_for(managed.has_all, "every item, once")

    managed.trigger(10)
    killed = managed.process["pid"]
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: managed.process["pid"] not in {0, killed}, "the node after the crash")
    wait_for(managed.is_ready, "the node after the crash")
    wait_for(managed.has_all, "every item, once")

    last = psutil.Process(managed.process["pid"])
    managed("stop", "orbit")
    assert not last.is_running()
    assert managed.process["pm2_env"]["status"] == "stopped"
    logs = managed.folder / "logs"
    assert "Orbit is ready at" in (logs / "orbit-out.log").read_text()
    errors = (logs / "orbit-error.log").read_text()
    assert "node_stopped" in errors.splitlines()[-1]
    assert "Traceback" not in errors
