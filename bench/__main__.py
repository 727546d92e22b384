"""Measures one node as its users meet it: start, latency, cost, backlogs, bad neighbours.

    python -m bench [start latency idle payload neighbours backlog halt fence audit telemetry
                     pipeline drain]

Each figure is of the real program (`orbit up` on an embedded server in a folder of its own) and
the real receiver, printed as one JSON line. `pipeline` and `drain` run Orbit beside the peers'
floor program in one call; they need nginx and the peers' folder in ORBIT_BENCH_PEERS. A machine's
speed swings, so only what one call prints can be compared.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from bench.audit import audit
from bench.fence import fence
from bench.halts import halt
from bench.peers import drain, pipeline
from bench.program import Bench
from bench.queues import backlog, neighbours
from bench.telemetry import telemetry


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
    "neighbours": neighbours,
    "backlog": backlog,
    "halt": halt,
    "fence": fence,
    "audit": audit,
    "telemetry": telemetry,
    "pipeline": pipeline,
    "drain": drain,
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
