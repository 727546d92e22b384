"""Measures one node as its users meet it: start, restart, latency, idle cost, large payloads.

    python -m bench [start latency idle payload pipeline]

Each figure is of the real program (`orbit up` on an embedded server in a folder of its own) and
the real receiver, printed as one JSON line. `pipeline` runs Orbit beside the peers' floor
program in one call; it needs nginx and the peers' folder in ORBIT_BENCH_PEERS. A machine's
speed swings, so only what one call prints can be compared.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

HERE = Path(__file__).resolve().parent
_NO_OP = {"use": "orbit:no_op"}


class Bench:
    """A folder with a configuration, a receiver, and nodes started in it."""

    def __init__(self, run_profiles: int = 1, **environment: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="orbit-bench-"))
        self.folder.chmod(0o755)
        self.config = self.folder / "config"
        self.config.mkdir()
        self._configure(run_profiles)
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
            "ORBIT_DISPATCH_ENDPOINTS": json.dumps([endpoint]),
            **environment,
        }

    def _configure(self, count: int) -> None:
        profile = {"profile_id": "bench", "label": "Benchmark", "state": "enabled"}
        run_profiles = [
            {
                "run_profile_id": f"bench-{number}",
                "profile_id": "bench",
                "namespace": f"space-{number % 50}",
                "state": "enabled",
                "execution_policy": {"schedule": f"{number % 60} {number % 24} 1 1 *"},
                "distribution_targets": ["sink"],
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

    def close(self) -> None:
        self.receiver.stop()
        from orbit.database.embedded import erase

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


def start() -> dict[str, Any]:
    """Empty folder to ready, and restart to ready."""
    empty, restart = [], []
    for _ in range(3):
        bench = Bench()
        with bench.node() as node:
            empty.append(node.seconds_to_ready)
        with bench.node() as node:
            restart.append(node.seconds_to_ready)
        bench.close()
    return {"empty_folder_to_ready_s": _spread(empty), "restart_to_ready_s": _spread(restart)}


def latency(count: int = 100) -> dict[str, Any]:
    """From the trigger's request to the receiver's record of the arrival, empty tiers."""
    bench = Bench()
    taken, answered = [], []
    with bench.node() as node:
        for number in range(count + 5):
            body = {"payload": {"number": number}, "endpointKeys": ["sink"]}
            began = time.monotonic()
            node.http.post("/cycles/trigger", json=body).raise_for_status()
            answered.append(time.monotonic() - began)
            bench.receiver.wait(number + 1)
            taken.append(time.monotonic() - began)
    bench.close()
    return {
        "trigger_to_receiver_ms": _percentiles(taken[5:]),
        "trigger_to_answer_ms": _percentiles(answered[5:]),
    }


def idle(seconds: float = 20) -> dict[str, Any]:
    """A node with 1,000 scheduled run profiles and nothing to do."""
    bench = Bench(run_profiles=1000)
    with bench.node() as node:
        time.sleep(5)
        before, began = node.cpu_seconds(), time.monotonic()
        time.sleep(seconds)
        share = (node.cpu_seconds() - before) / (time.monotonic() - began)
        result = {"idle_core_percent": round(share * 100, 2), "memory_mb": node.memory_mb()}
    bench.close()
    return result


def payload(count: int = 30) -> dict[str, Any]:
    """30 payloads of 10 MiB through a node that may hold 64 MiB of payloads at once."""
    bench = Bench(ORBIT_PAYLOAD_MEMORY_BYTES=str(64 << 20))
    body = b"x" * (10 << 20)
    with bench.node() as node:
        at_start = node.memory_mb()
        text = body.decode()
        for _ in range(count):
            trigger = {"payload": text, "endpointKeys": ["sink"]}
            node.http.post("/cycles/trigger", json=trigger).raise_for_status()
        bench.receiver.wait(count, 300)
        too_large = node.http.post("/cycles/trigger", json={"payload": text + "x"})
        result = {
            "memory_at_start_mb": at_start,
            "memory_peak_mb": node.peak_memory_mb(),
            "larger_is_refused_with": too_large.status_code,
        }
    bench.close()
    return result


def pipeline() -> dict[str, Any]:
    """W2 of the peers' benchmark: Orbit and the floor program in turns, in one call."""
    peers = os.environ.get("ORBIT_BENCH_PEERS")
    if not peers or shutil.which("nginx") is None:
        return {"skipped": "set ORBIT_BENCH_PEERS to the peers' folder, and install nginx"}
    with tempfile.TemporaryDirectory() as folder:
        for source in (*Path(peers).glob("*.py"), HERE / "peer_orbit.py"):
            shutil.copy(source, folder)
        systems = os.environ.get("ORBIT_BENCH_SYSTEMS", "floor,orbit")
        command = ["run.py", "--systems", systems, "--workloads", "w2", "--cycles", "1000"]
        printed = subprocess.run(
            [sys.executable, *command], cwd=folder, stdout=subprocess.PIPE, text=True, check=True
        ).stdout
    results = {row["system"]: row for row in map(json.loads, printed.splitlines())}
    rates = {name: row["result"]["cycles_per_s"] for name, row in results.items()}
    ratio = rates["orbit"]["median"] / rates["floor"]["median"]
    return {"cycles_per_s": rates, "orbit_over_floor": round(ratio, 3)}


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "min": round(min(values), 2),
        "median": round(statistics.median(values), 2),
        "max": round(max(values), 2),
    }


def _percentiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100)
    return {f"p{at}": round(cuts[at - 1] * 1000, 1) for at in (50, 95, 99)}


MEASUREMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "start": start,
    "latency": latency,
    "idle": idle,
    "payload": payload,
    "pipeline": pipeline,
}


def main() -> None:
    asked = sys.argv[1:] or list(MEASUREMENTS)
    unknown = sorted(set(asked) - set(MEASUREMENTS))
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; there are {', '.join(MEASUREMENTS)}")
    for name in asked:
        print(json.dumps({"measurement": name, **MEASUREMENTS[name]()}), flush=True)


if __name__ == "__main__":
    main()
