"""A receiver that is away for a while, over a queue: no attempts are spent, and it flows again."""

from __future__ import annotations

import asyncio

from aiohttp import web

from orbit.app import Node
from orbit.endpoints import Breaker
from orbit.payload import Payload
from orbit.reading.lanes import lane
from tests.scenario.conftest import Arrival, Facts, MakeNode, Receiver, until

JOBS = 60  # before the outage ends, and as many after it
CAP, RATE = 8, 20.0
BREAKER = Breaker(failures=4, hold_seconds=0.1, longest_hold_seconds=0.2)
LEFT = "SELECT count(*)::int AS n FROM dispatch_lease"
CHANGES = "SELECT change FROM lane_change ORDER BY created_at"
COUNTED = (
    "SELECT count(*)::int AS n FROM delivery_receipt WHERE outcome = 'failed' AND NOT is_probe"
)
DELIVERED = """
SELECT attempt, extract(epoch FROM started_at)::float8 AS at FROM delivery_receipt
WHERE outcome = 'delivered' ORDER BY started_at
"""


async def queue(node: Node, jobs: int) -> None:
    """So many jobs for the endpoint."""
    trigger, payload = node.orchestration.trigger_raw, Payload(b"an item", "text/plain")
    await asyncio.gather(*(trigger(payload=payload, endpoint_keys=["out"]) for _ in range(jobs)))


async def test_an_outage_spends_no_attempts_and_the_lane_flows_again(
    make_node: MakeNode, receiver: Receiver, facts: Facts
) -> None:
    """Across a restart: held as before, then at the lane's rate, and not only retries."""
    is_back = False

    async def answer(_: Arrival) -> web.Response:
        return web.Response(status=200 if is_back else 503)

    receiver.answers["/out"] = answer
    endpoint = receiver.endpoint("out", max_concurrency=CAP, rate_per_second=RATE, breaker=BREAKER)
    first = await make_node(dispatch_endpoints=(endpoint,))
    await queue(first, JOBS)
    await until(lambda: len(facts(CHANGES)) >= 3, "the lane is held on")
    await first.drain()
    # Those that it took to open the breaker, and those that were under way beside the last of them.
    [counted] = facts(COUNTED)
    assert counted["n"] < BREAKER.failures + CAP
    assert {row["change"] for row in facts(CHANGES)} == {"opened", "held"}

    second = await make_node(dispatch_endpoints=(endpoint,))
    found = (await lane(second.database, "default", "out", None)).lane
    assert (found.breaker, found.waiting) == (
        "open",
        JOBS - len(facts("TABLE dead_letter_dispatch")),
    )
    held = len(facts(CHANGES))
    await until(lambda: len(facts(CHANGES)) > held, "another probe")
    await queue(second, JOBS)
    is_back = True
    await until(lambda: facts(LEFT) == [{"n": 0}], "all is delivered")

    dead = len(facts("TABLE dead_letter_dispatch"))
    assert dead <= counted["n"] // 4
    assert facts(COUNTED) == [counted]
    delivered = facts(DELIVERED)
    assert len(delivered) == 2 * JOBS - dead
    # After the probe there are a second's tokens, and what a slow machine had in hand.
    shortest = (len(delivered) - 1 - RATE - CAP) / RATE
    assert delivered[-1]["at"] - delivered[0]["at"] >= shortest * 0.9
    assert sum(row["attempt"] == 1 for row in delivered[1:25]) >= 12
