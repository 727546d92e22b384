"""The program under measurement: `orbit up` in a folder of its own, and the real receiver.

A `Bench` is the folder with its configuration; nodes are started in it, one after the other or
side by side, and share its embedded database. Nothing here measures anything but a start.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg

from orbit.database.embedded import EmbeddedServer, erase


class Bench:
    """A folder with a configuration, a receiver, and nodes started in it."""

    def __init__(
        self,
        run_profiles: int = 1,
        endpoints: Sequence[Mapping[str, Any]] = (),
        policy: Mapping[str, Any] | None = None,
        target: str = "sink",
        **environment: str,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="orbit-bench-"))
        self.folder.chmod(0o755)
        self.config = self.folder / "config"
        self.config.mkdir()
        self._configure(run_profiles, dict(policy or {}), target)
        self.receiver = Receiver(self.folder / "received")
        endpoint = {"key": "sink", "url": self.receiver.url, "max_concurrency": 64}
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("ORBIT_")},
            "PORT": "0",
            "ORBIT_ENV": "production",
            "ORBIT_LOG_LEVEL": "info",
            "ORBIT_CONFIG_DIR": str(self.config),
            "ORBIT_DATA_DIR": str(self.folder / "data"),
            "ORBIT_CRON_SCHEDULE": "",
            "ORBIT_AUTH": "off",
            "ORBIT_DISPATCH_ENDPOINTS": json.dumps([endpoint, *endpoints]),
            **environment,
        }

    def _configure(self, count: int, policy: dict[str, Any], target: str) -> None:
        profile = {"profile_id": "bench", "label": "Benchmark", "state": "enabled"}
        run_profiles = [
            {
                "run_profile_id": f"bench-{number}",
                "profile_id": "bench",
                "namespace": f"space-{number % 50}",
                "state": "enabled",
                "execution_policy": {"schedule": f"{number % 60} {number % 24} 1 1 *", **policy},
                "distribution_targets": [target],
            }
            for number in range(count)
        ]
        (self.config / "profiles.json").write_text(json.dumps({"profiles": [profile]}))
        (self.config / "runProfiles.json").write_text(json.dumps({"run_profiles": run_profiles}))

    @contextmanager
    def node(self) -> Iterator[Node]:
        """A running, ready node."""
        node = Node(self.environment)
        try:
            yield node
        finally:
            node.stop()

    @contextmanager
    def database(self) -> Iterator[psycopg.Connection[Any]]:
        """The database as its owner; its server runs at least as long."""
        server = EmbeddedServer.start(self.folder / "data")
        try:
            with psycopg.connect(server.owner_dsn, autocommit=True) as connection:
                yield connection
        finally:
            server.leave()

    def close(self) -> None:
        self.receiver.stop()
        erase(self.folder / "data")
        shutil.rmtree(self.folder, ignore_errors=True)


class Node:
    """`orbit up` as a child; `seconds_to_ready` counts from its start."""

    def __init__(self, environment: dict[str, str]) -> None:
        started = time.monotonic()
        self._log = tempfile.NamedTemporaryFile(mode="w+", prefix="orbit-bench-log-")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "orbit", "up"],
            env=environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self.url = self._address()
        self.http = httpx.Client(base_url=self.url, timeout=30)
        while self.http.get("/ready").status_code != httpx.codes.OK:
            time.sleep(0.005)
        self.seconds_to_ready = time.monotonic() - started
        self.ps = psutil.Process(self.process.pid)

    def _address(self) -> str:
        while self.process.poll() is None:
            found = re.search(r"http://127\.0\.0\.1:\d+", Path(self._log.name).read_text())
            if found:
                return found[0]
            time.sleep(0.005)
        raise SystemExit("the node ended before it was ready:\n" + Path(self._log.name).read_text())

    def cpu_seconds(self) -> float:
        times = self.ps.cpu_times()
        return times.user + times.system

    def memory_mb(self) -> float:
        return round(self.ps.memory_info().rss / 2**20, 1)

    def peak_memory_mb(self) -> float:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return round(int(line.split()[1]) / 1024, 1)
        return self.memory_mb()

    def stop(self) -> None:
        self.http.close()
        self.process.terminate()
        self.process.wait(60)
        self._log.close()


class Receiver:
    """The reference receiver as a child."""

    def __init__(self, store: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "orbit.receiver", "--port", "0", "--store", str(store)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split()[2].rstrip(",")
        self.store = store

    def arrivals(self) -> list[dict[str, Any]]:
        log = self.store / "received.jsonl"
        if not log.exists():
            return []
        return [json.loads(line) for line in log.read_text().splitlines()]

    def wait(self, count: int, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while len(self.arrivals()) < count:
            if time.monotonic() > end:
                raise SystemExit(f"only {len(self.arrivals())} of {count} arrived")
            time.sleep(0.002)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)
