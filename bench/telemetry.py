"""Telemetry's pace: a million events replayed, how long they wait for positions, the detector's.

Events are written as settlements write them, some fifty in a batch. Replays are of the real
program over its sockets, by one client that keeps nothing; `lag` is each event's, from its
statement to its position, and on to a client of the stream. What telling costs is measured on the
statement that writes receipts, as it is and without what it tells, in turns.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from random import Random
from typing import Any

import psutil
import psycopg

from bench.program import Bench, Node
from orbit.clock import SystemClock, new_id
from orbit.database.embedded import APPLICATION_ROLE
from orbit.database.pool import session_settings
from orbit.database.queries import array, load
from orbit.database.upgrade import upgrade
from orbit.insight.detector import Detector
from orbit.insight.signals import Observation, StreamKey

_PER_BATCH = 50
_RECEIPTS = 500
_LIMIT = 5000
_EVENTS = b"""WITH batch AS MATERIALIZED (
    SELECT orbit_new_batch() AS batch_id, 'space-' || (n %% 20) AS namespace
    FROM generate_series(1, %(batches)s) n
), told AS (
    INSERT INTO telemetry_event (namespace, batch_id, ordinal, event_type, occurred_at, profile_id,
        run_profile_id, run_id, metadata)
    SELECT namespace, batch_id, k, 'delivery_confirmed', clock_timestamp(), 'bench', 'bench-0',
        batch_id, jsonb_build_object('jobId', batch_id, 'attempt', 1, 'endpointKey', 'sink',
            'status', 200, 'seconds', 0.0123)
    FROM batch CROSS JOIN generate_series(1, %(per)s) k
)
INSERT INTO telemetry_pending (namespace, batch_id, events)
SELECT namespace, batch_id, %(per)s FROM batch"""
_LAGS = b"""SELECT extract(epoch FROM batch.sequenced_at - event.occurred_at) AS lag
FROM telemetry_batch batch JOIN telemetry_event event USING (namespace, batch_id)
WHERE last_position > %(after)s"""


def telemetry(events: int = 1_000_000, rate: int = 5000, seconds: int = 10) -> dict[str, Any]:
    """Replays over JSON and SSE with their memory, lag at a rate, and the detector's seconds."""
    bench = Bench()
    with bench.database() as connection:
        upgrade(connection.info.dsn, APPLICATION_ROLE)
        for _ in range(events // 10_000):
            connection.execute(_EVENTS, {"batches": 10_000 // _PER_BATCH, "per": _PER_BATCH})
        connection.execute("ANALYZE")
        emission = _emission(connection)
        with bench.node() as node:
            while _last(node) < events:
                time.sleep(0.05)
            at_start = node.memory_mb()
            found = {
                "json": _pace(node, connection, events, _paged(node, events)),
                "sse": _pace(node, connection, events, _streamed(node, events)),
                "memory_before_mb": at_start,
                "memory_peak_mb": node.peak_memory_mb(),
                **_lag(node, connection, events, rate, seconds),
            }
    bench.close()
    return {"events": events, **emission, **found, **detector()}


def detector(profiles: int = 1000, cycles: int = 1000) -> dict[str, Any]:
    """The detector over so many profiles and cycles, in this process."""
    draw = Random(1).random
    keys = [StreamKey(f"p{place:04}", "r", "delivered") for place in range(profiles)]
    values = [float(draw() < 0.9) for _ in range(10_007)]
    watched, position = Detector(), 0
    began, cpu = time.monotonic(), time.process_time()
    for _ in range(cycles):
        for key in keys:
            watched.observe(Observation(position, key, values[position % 10_007]))
            position += 1
    taken, cpu = time.monotonic() - began, time.process_time() - cpu
    return {
        "detector_observations": position,
        "detector_s": round(taken, 2),
        "detector_cpu_s": round(cpu, 2),
    }


def _emission(connection: psycopg.Connection[Any], batches: int = 60) -> dict[str, float]:
    """What the statement of receipts takes for each, in batches of 500; and how much is telling.

    Nothing is kept of it. Raises ValueError where the statement is not as it was.
    """
    told = load("dispatch").insert_receipts
    begin, end = told.index(b"), batch AS MATERIALIZED ("), told.index(b")\nINSERT INTO lane_tally")
    silent = told[:begin] + told[end:]
    taken: dict[bytes, list[float]] = {told: [], silent: []}
    for name, value in session_settings().items():
        connection.execute("SELECT set_config(%s, %s, false)", (name, value))
    for _ in range(batches):
        for statement, seconds in taken.items():
            receipts = _receipts()
            with connection.transaction(force_rollback=True):
                began = time.monotonic()
                connection.execute(statement, receipts, prepare=True)
                seconds.append((time.monotonic() - began) / _RECEIPTS)
    each = {one: statistics.median(seconds) * 1e6 for one, seconds in taken.items()}
    return {
        "receipt_us": round(each[told], 1),
        "of_it_emission_us": round(each[told] - each[silent], 1),
    }


def _receipts() -> dict[str, Any]:
    at = SystemClock().now()
    ids = [new_id(at) for _ in range(_RECEIPTS)]
    constant = {
        "attempt": 1,
        "endpoint_key": "sink",
        "outcome": "delivered",
        "status": 200,
        "error": None,
        "digest": "0" * 64,
        "size": 1024,
        "queue_seconds": 0.01,
        "connect_seconds": 0.001,
        "first_byte_seconds": 0.002,
        "total_seconds": 0.003,
        "answer_content_type": None,
        "is_probe": False,
        "is_reused": True,
        "lease_number": 1,
        "node_id": ids[0],
        "started_at": at.isoformat(),
        "profile_id": "bench",
        "run_profile_id": "bench-0",
    }
    return {
        **{name: array([value] * _RECEIPTS) for name, value in constant.items()},
        "namespace": array(f"space-{number % 20}" for number in range(_RECEIPTS)),
        "job_id": array(ids),
        "cycle_id": array(ids),
        "answer": [b""] * _RECEIPTS,
        "part": 0,
    }


def _last(node: Node) -> int:
    return int(node.http.get("/telemetry", params={"limit": 1}).json()["lastPosition"])


def _pace(
    node: Node, connection: psycopg.Connection[Any], events: int, counts: Iterator[int]
) -> dict[str, float]:
    """Events a second, and what of two cores they took: on a busy machine only that is telling."""
    server = psutil.Process(connection.info.backend_pid).parent()
    assert server is not None
    before = node.cpu_seconds(), _cpu_seconds(server)
    began, count = time.monotonic(), 0
    for one in counts:
        count += one
    taken = time.monotonic() - began
    assert count == events, (count, events)
    return {
        "events_per_s": round(events / taken),
        "node_cpu_us_per_event": round(1e6 * (node.cpu_seconds() - before[0]) / events, 1),
        "database_cpu_us_per_event": round(1e6 * (_cpu_seconds(server) - before[1]) / events, 1),
    }


def _cpu_seconds(server: psutil.Process) -> float:
    times = [one.cpu_times() for one in (server, *server.children())]
    return sum(one.user + one.system for one in times)


def _paged(node: Node, events: int) -> Iterator[int]:
    after = 0
    while after < events:
        asked = {"after": after, "limit": _LIMIT}
        text = node.http.get("/telemetry", params=asked).raise_for_status().content
        after = json.loads(b"{" + text[text.rindex(b'"position":') :])["position"]
        yield text.count(b'"specversion":')


def _streamed(node: Node, events: int) -> Iterator[int]:
    count, rest = 0, b""
    with node.http.stream("GET", "/telemetry/stream", params={"after": 0}) as answer:
        for chunk in answer.iter_raw():
            whole = (rest + chunk).rpartition(b"\n\n")
            rest = whole[2]
            found = whole[0].count(b"\ndata: ")
            count += found
            yield found
            if count >= events:
                return


def _lag(
    node: Node, connection: psycopg.Connection[Any], after: int, rate: int, seconds: int
) -> dict[str, Any]:
    reader = threading.Thread(target=lambda: seen.extend(_arrivals(node, after, rate * seconds)))
    seen: list[float] = []
    reader.start()
    batches, began = rate // _PER_BATCH // 50, time.monotonic()
    for turn in range(50 * seconds):
        time.sleep(max(0.0, began + turn / 50 - time.monotonic()))
        connection.execute(_EVENTS, {"batches": batches, "per": _PER_BATCH})
    written = time.monotonic() - began
    reader.join(60)
    numbered = [float(row[0]) for row in connection.execute(_LAGS, {"after": after})]
    return {
        "rate_per_s": round(len(numbered) / written),
        "lag_to_position_ms": _percentiles(numbered),
        "lag_to_stream_ms": _percentiles(seen),
    }


def _arrivals(node: Node, after: int, count: int) -> Iterator[float]:
    rest = b""
    with node.http.stream("GET", "/telemetry/stream", params={"after": after}) as answer:
        for chunk in answer.iter_raw():
            now = time.time()  # noqa: TID251 - set against the database's clock on this machine
            *frames, rest = (rest + chunk).split(b"\n\n")
            for frame in frames:
                _, _, data = frame.partition(b"\ndata: ")
                if data:
                    yield now - datetime.fromisoformat(json.loads(data)["time"]).timestamp()
                    count -= 1
            if count <= 0:
                return


def _percentiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100)
    return {f"p{at}": round(cuts[at - 1] * 1000, 1) for at in (50, 95, 99)}
