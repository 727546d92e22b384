"""Dispatch under strain: bad neighbours, and a long backlog on a long history.

Latency is the facts' own: from a job's due time to its receipt, both stamped by the database.
Each measurement runs its two cases in one call, on one machine, so that they can be compared.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import uvloop

from bench.program import Bench, Node
from bench.steps import ITEMS

SPLITTING = {"normalization": {"use": "orbit:no_op", "split": "bench.steps:hundred"}}
HISTORY = Path(__file__).with_name("history.sql")
_HEALTHY = tuple(f"healthy-{number}" for number in range(8))
_BAD = ("hole", "slow")
_SLOW_SECONDS = 2.0
_FAIR_SECONDS = 0.05
_PATIENCE_SECONDS = 600
_ANSWER = b"HTTP/1.1 204 No Content\r\n\r\n"
_LATENCIES = """
SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY seconds),
    percentile_cont(0.99) WITHIN GROUP (ORDER BY seconds)
FROM dispatch_job job JOIN delivery_receipt receipt
    ON receipt.namespace = job.namespace AND receipt.job_id = job.job_id
CROSS JOIN LATERAL (
    SELECT extract(epoch FROM receipt.created_at - job.created_at)::float8 AS seconds
) taken
WHERE job.endpoint_key LIKE 'healthy-%'"""
_HEALTHY_DELIVERED = """
SELECT COALESCE(sum(delivered), 0)::int FROM lane_tally WHERE endpoint_key LIKE 'healthy-%'"""
_DELIVERED = "SELECT COALESCE(sum(delivered), 0)::int FROM lane_tally"
_WAITING = "SELECT count(*)::int FROM dispatch_lease"


class Sink:
    """Answers at once, after 50 ms or two seconds, or never, by the path; counts what came.

    What comes to `/fair` while the gate is shut waits for it first, so that many are on the wire.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.arrivals = self.answers = 0
        self.url = ""
        self.gate = asyncio.Event()
        self.gate.set()

    @property
    def on_the_wire(self) -> int:
        """Requests without an answer yet."""
        return self.arrivals - self.answers

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
                await reader.readexactly(length)
                self.arrivals += 1
                if b" /hole " in head:
                    await asyncio.Event().wait()
                if b" /slow " in head:
                    await asyncio.sleep(_SLOW_SECONDS)
                if b" /fair " in head:
                    await self.gate.wait()
                    await asyncio.sleep(_FAIR_SECONDS)
                writer.write(_ANSWER)
                self.answers += 1
        writer.close()


@contextmanager
def sink() -> Iterator[Sink]:
    """A sink, while it runs in a thread of its own."""
    loop = uvloop.new_event_loop()
    found = Sink(loop)
    listening = asyncio.start_server(found.serve, "127.0.0.1", 0, backlog=1024)
    server = loop.run_until_complete(listening)
    host, port = server.sockets[0].getsockname()[:2]
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        found.url = f"http://{host}:{port}"
        yield found
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        under_way = asyncio.all_tasks(loop)
        for task in under_way:
            task.cancel()
        if under_way:
            loop.run_until_complete(asyncio.wait(under_way))
        loop.close()


def neighbours(seconds: float = 20, rate: float = 50) -> dict[str, Any]:
    """Eight healthy lanes, each with `rate` jobs a second, without and with two bad lanes.

    One of these never answers (timeout 30 s), one takes two seconds; both get as many jobs.
    """
    with sink() as found:
        alone = _healthy_latencies(found.url, (), seconds, rate)
        beside = _healthy_latencies(found.url, _BAD, seconds, rate)
    return {"due_to_receipt_ms": {"alone": alone, "beside_bad_lanes": beside}}


def _healthy_latencies(url: str, bad: tuple[str, ...], seconds: float, rate: float) -> Any:
    lanes = (*_HEALTHY, *bad)
    bench = Bench(endpoints=[{"key": key, "url": f"{url}/{key}"} for key in lanes])
    with bench.database() as database, bench.node() as node:
        count = _trigger_steadily(node, list(lanes), seconds, rate) * len(_HEALTHY)
        until(database, _HEALTHY_DELIVERED, count)
        p50, p99 = row(database, _LATENCIES)
        result = {"p50": round(p50 * 1000, 1), "p99": round(p99 * 1000, 1), "jobs": count}
    bench.close()
    return result


def _trigger_steadily(node: Node, lanes: list[str], seconds: float, rate: float) -> int:
    """One cycle after the other at a steady pace, each with a job for every lane; how many."""
    began, count = time.monotonic(), int(seconds * rate)
    for number in range(count):
        time.sleep(max(0.0, began + number / rate - time.monotonic()))
        body = {"payload": {"number": number}, "endpointKeys": lanes}
        node.http.post("/cycles/trigger", json=body).raise_for_status()
    return count


def backlog(queued: int = 100_000, drained: int = 10_000, history: int = 1_000_000) -> Any:
    """A backlog, of which a part is drained, without a history and on a long one.

    `memory_mb` is the node's peak from its start until so many are delivered.
    """
    return {
        "queued": queued,
        "drained": drained,
        "without_history": _drain_backlog(queued, drained, 0),
        f"after_{history}_jobs": _drain_backlog(queued, drained, history),
    }


def _drain_backlog(queued: int, drained: int, history: int) -> dict[str, float]:
    with sink() as found:
        endpoint = {"key": "quick", "url": f"{found.url}/quick", "max_concurrency": 64}
        bench = Bench(endpoints=[endpoint], policy=SPLITTING, target="quick")
        with bench.database() as database:
            with bench.node() as node:
                queue_up(node, database, queued)
            if history:
                database.execute(HISTORY.read_text().replace(":n", str(history)).encode())
            database.execute("VACUUM ANALYZE")
            database.execute("CHECKPOINT")
            with bench.node() as node:
                result = _release(node, database, drained)
        bench.close()
    return result


def queue_up(node: Node, database: psycopg.Connection[Any], count: int) -> None:
    """Queues so many jobs by the program itself, in a lane that is held by its breaker."""
    database.execute(
        "INSERT INTO lane (namespace, endpoint_key, probe_at)"
        " VALUES ('space-0', 'quick', orbit_now() + interval '1 day')"
    )
    for number in range(count // ITEMS):
        body, key = {"runProfileIds": ["bench-0"]}, {"Idempotency-Key": f"part-{number}"}
        node.http.post("/run-profiles/trigger", json=body, headers=key).raise_for_status()
    until(database, _WAITING, count)


def _release(node: Node, database: psycopg.Connection[Any], count: int) -> dict[str, float]:
    """Opens the lane; how fast so many jobs are delivered, and the node's peak memory."""
    cpu, began = node.cpu_seconds(), time.monotonic()
    database.execute("UPDATE lane SET probe_at = NULL")
    until(database, _DELIVERED, count)
    taken = time.monotonic() - began
    return {
        "deliveries_per_s": round(count / taken, 1),
        "node_cpu_us_per_delivery": round((node.cpu_seconds() - cpu) / count * 1e6, 1),
        "memory_mb": node.peak_memory_mb(),
    }


def until(database: psycopg.Connection[Any], query: str, count: int) -> None:
    end = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < end:
        if row(database, query)[0] >= count:
            return
        time.sleep(0.02)
    raise SystemExit(f"{count} did not come within {_PATIENCE_SECONDS} s: {query}")


def row(database: psycopg.Connection[Any], query: str) -> tuple[Any, ...]:
    row = database.execute(query.encode()).fetchone()
    assert row is not None
    return tuple(row)
