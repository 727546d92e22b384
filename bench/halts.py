"""The halt under load: how soon it says quiesced, and whether anything arrives after that.

One node, and a receiver in a thread of its own that holds requests until so many are on the wire,
and from the moment of the halt answers each after 50 ms. Seconds are the whole request's, as an
operator's verb sees them.
"""

from __future__ import annotations

import time
from typing import Any

from bench.program import Bench, Node
from bench.queues import SPLITTING, Sink, queue_up, sink

_SPACE = "/governance/namespaces/space-0"
_WATCHED_SECONDS = 0.5


def halt(in_flight: int = 1000, halts: int = 5, queued: int = 20_000) -> dict[str, Any]:
    """From the request for a halt to its answer, with so many requests on the wire.

    `withheld` of them had not begun, and were given back.
    """
    with sink() as found:
        endpoint = {"key": "quick", "url": f"{found.url}/fair", "max_concurrency": 2 * in_flight}
        bench = Bench(
            endpoints=[endpoint],
            policy=SPLITTING,
            target="quick",
            ORBIT_DISPATCH_CONCURRENCY=str(in_flight),
        )
        with bench.database() as database, bench.node() as node:
            queue_up(node, database, queued)
            found.gate.clear()
            database.execute("UPDATE lane SET probe_at = NULL")
            each = [_one(node, found, in_flight) for _ in range(halts)]
            found.gate.set()
        bench.close()
    return {
        "halt_to_quiesced_s": [one["seconds"] for one in each],
        "in_flight": [one["in_flight"] for one in each],
        "withheld": [one["withheld"] for one in each],
        "quiesced": all(one["quiesced"] for one in each),
        "arrived_afterwards": sum(one["late"] for one in each),
    }


def _one(node: Node, found: Sink, in_flight: int) -> dict[str, Any]:
    while found.on_the_wire < in_flight:
        time.sleep(0.002)
    began = time.monotonic()
    found.loop.call_soon_threadsafe(found.gate.set)
    answer = node.http.post(f"{_SPACE}/halt").raise_for_status().json()
    seconds, before = time.monotonic() - began, found.arrivals
    time.sleep(_WATCHED_SECONDS)
    late = found.arrivals - before
    found.gate.clear()
    node.http.post(f"{_SPACE}/resume", json={"reason": "measured"}).raise_for_status()
    return {
        "seconds": round(seconds, 3),
        "in_flight": answer["inFlightCount"],
        "withheld": sum(flight["outcome"] == "withheld" for flight in answer["inFlight"]),
        "quiesced": answer["quiesced"],
        "late": late,
    }
