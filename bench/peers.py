"""Orbit beside the peers' floor program, in the peers' own runner and in one call.

The runner takes turns, waits for a quiet machine, and measures both sides alike, so the ratios
hold where the rates themselves swing with the machine. Needs nginx and the peers' folder in
ORBIT_BENCH_PEERS; ORBIT_BENCH_SYSTEMS names other peers than the floor, ORBIT_BENCH_RUNS the
number of turns.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
_OURS = (HERE / "peer_orbit.py", HERE / "history.sql")
_SKIPPED = {"skipped": "set ORBIT_BENCH_PEERS to the peers' folder, and install nginx"}


def pipeline(cycles: int = 1000) -> dict[str, Any]:
    """W2 of the peers' benchmark: whole cycles of five steps and a request."""
    results = _run("floor,orbit", "w2", "--cycles", str(cycles))
    if results is None:
        return _SKIPPED
    rates = {name: row["cycles_per_s"] for name, row in results.items()}
    ratio = rates["orbit"]["median"] / rates["floor"]["median"]
    return {"cycles_per_s": rates, "orbit_over_floor": round(ratio, 3)}


def drain(jobs: int = 10_000) -> dict[str, Any]:
    """W1 of the peers' benchmark: one worker drains queued jobs, 64 requests in flight.

    CPU is in microseconds a delivery: the worker's own, and with PostgreSQL's.
    """
    results = _run("floor-uvloop,orbit", "w1", "--jobs", str(jobs))
    if results is None:
        return _SKIPPED
    rates = {name: row["drain_per_s"] for name, row in results.items()}
    worker = {name: _microseconds(row, "worker") for name, row in results.items()}
    both = {name: _microseconds(row, "worker", "store") for name, row in results.items()}
    floor, orbit = "floor-uvloop", "orbit"
    return {
        "deliveries_per_s": rates,
        "worker_cpu_us": worker,
        "worker_and_database_cpu_us": both,
        "orbit_over_floor": {
            "deliveries_per_s": round(rates[orbit]["median"] / rates[floor]["median"], 3),
            "worker_cpu": round(worker[orbit] / worker[floor], 3),
            "worker_and_database_cpu": round(both[orbit] / both[floor], 3),
        },
    }


def _microseconds(row: dict[str, Any], *parts: str) -> float:
    """CPU a delivery; a second for a thousand is a thousand microseconds for one."""
    seconds = sum(float(row[f"{part}_cpu_s_per_1000"]["median"]) for part in parts)
    return round(seconds * 1000, 1)


def _run(systems: str, workload: str, *options: str) -> dict[str, Any] | None:
    """The runner's results by system, or None where it cannot run."""
    peers = os.environ.get("ORBIT_BENCH_PEERS")
    if not peers or shutil.which("nginx") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        for source in (*Path(peers).glob("*.py"), *_OURS):
            shutil.copy(source, folder)
        systems = os.environ.get("ORBIT_BENCH_SYSTEMS", systems)
        runs = os.environ.get("ORBIT_BENCH_RUNS", "3")
        command = ["run.py", "--systems", systems, "--workloads", workload, "--runs", runs]
        printed = subprocess.run(
            [sys.executable, *command, *options],
            cwd=folder,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
    rows = list(map(json.loads, printed.splitlines()))
    if failed := {row["system"]: row["error"] for row in rows if "result" not in row}:
        raise SystemExit(f"the runner failed: {failed}")
    return {row["system"]: row["result"] for row in rows}
