"""Bad neighbours: a lane that never answers and one that is slow, beside lanes that are well.

What is checked is order, never the clock: what has arrived while the bad lanes' attempts are
still under way, and how far healthy lanes are when the first of them is done. The receiver that
hangs does so for longer than any wait of these tests, so nothing here passes by its timeout.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
from aiohttp import web

from orbit.app import Node
from orbit.payload import Payload
from tests.scenario.conftest import Arrival, Facts, MakeNode, Receiver, until

PLACES = 32
LONGEST_POLL_SECONDS = 60.0
HEALTHY = tuple(f"healthy-{number}" for number in range(8))
BAD = ("hole", "slow")
ENDED = """SELECT count(*)::int AS n FROM delivery_receipt WHERE endpoint_key = ANY (%s)"""
WAITING = "SELECT count(*)::int AS n FROM dispatch_lease WHERE node_id IS NULL"


class Gate:
    """Answers that wait until the gate is opened for good."""

    def __init__(self) -> None:
        self.is_open = asyncio.Event()

    async def __call__(self, arrival: Arrival) -> None:
        await self.is_open.wait()


@pytest.fixture
def slow(receiver: Receiver) -> Gate:
    """The slow lane's gate; the hole's is never opened."""
    receiver.answers["/hole"] = Gate()
    gate = receiver.answers["/slow"] = Gate()
    return gate


async def node_for(
    make_node: MakeNode,
    receiver: Receiver,
    lanes: Sequence[str],
    places: int = PLACES,
    **more: Any,
) -> Node:
    """A node whose lanes could each take all of its places."""
    endpoints = tuple(
        receiver.endpoint(lane, max_concurrency=places, timeout_seconds=600) for lane in lanes
    )
    return await make_node(dispatch_endpoints=endpoints, dispatch_concurrency=places, **more)


async def queue(node: Node, lanes: Sequence[str], cycles: int) -> None:
    """Cycles with a job for each lane."""
    trigger = node.orchestration.trigger_raw
    payload = Payload(b"an item", "text/plain")
    await asyncio.gather(*(trigger(payload=payload, endpoint_keys=lanes) for _ in range(cycles)))


def arrived(receiver: Receiver, lanes: Sequence[str]) -> int:
    """How many requests have come to these lanes."""
    return sum(len(receiver.at(f"/{lane}")) for lane in lanes)


def has_come(receiver: Receiver, lanes: Sequence[str], each: int) -> bool:
    """Whether so many requests for each of these lanes have come, and none too many."""
    return arrived(receiver, lanes) == each * len(lanes)


async def test_healthy_jobs_arrive_while_bad_lanes_hang(
    make_node: MakeNode, receiver: Receiver, slow: Gate, facts: Facts
) -> None:
    """Batch after batch is delivered whole, and not one attempt of a bad lane has ended."""
    node = await node_for(make_node, receiver, (*HEALTHY, *BAD))
    for number in range(1, 13):
        await queue(node, (*HEALTHY, *BAD), 6)
        await until(partial(has_come, receiver, HEALTHY, number * 6), f"batch {number}")
    assert facts(ENDED, list(BAD)) == [{"n": 0}]
    assert 2 <= arrived(receiver, BAD) <= PLACES * 3 // 4 + 1
    slow.is_open.set()
    await until(lambda: arrived(receiver, ["slow"]) == 12 * 6, "what waited for the slow lane")
    assert facts(ENDED, ["hole"]) == [{"n": 0}]


async def test_a_lane_that_comes_back_takes_its_turn(
    make_node: MakeNode, receiver: Receiver, slow: Gate, facts: Facts
) -> None:
    """A burst that was held back goes out beside new healthy jobs, and all arrive once."""
    node = await node_for(make_node, receiver, (*HEALTHY, "slow"))
    await queue(node, ("slow",), 100)
    await until(lambda: arrived(receiver, ["slow"]) > 0, "the first slow jobs")
    slow.is_open.set()
    await queue(node, HEALTHY, 20)
    everything = 20 * len(HEALTHY) + 100
    await until(lambda: facts(ENDED, [*HEALTHY, "slow"]) == [{"n": everything}], "the receipts")
    assert arrived(receiver, (*HEALTHY, "slow")) == everything


@pytest.mark.parametrize("places", [4, PLACES])
@pytest.mark.parametrize("bad", [(), BAD], ids=["alone", "beside bad lanes"])
async def test_healthy_lanes_come_forward_together(
    make_node: MakeNode,
    receiver: Receiver,
    slow: Gate,
    facts: Facts,
    bad: tuple[str, ...],
    places: int,
) -> None:
    """When the first healthy lane has sent its whole backlog, each other has sent a third."""
    lanes, backlog = (*HEALTHY, *bad), 48
    idle = await node_for(make_node, receiver, lanes)
    assert idle.dispatcher is not None
    idle.dispatcher.halt()
    await queue(idle, lanes, backlog)
    await until(lambda: facts(WAITING) == [{"n": backlog * len(lanes)}], "the backlog")
    await idle.drain()
    await node_for(make_node, receiver, lanes, places)
    await until(lambda: arrived(receiver, HEALTHY) == backlog * len(HEALTHY), "the backlog's end")
    sent: Counter[str] = Counter()
    for arrival in receiver.arrivals:
        sent[arrival.path] += arrival.path.startswith("/healthy")
        if sent[arrival.path] == backlog:
            break
    assert min(sent[f"/{lane}"] for lane in HEALTHY) >= backlog // 3


async def test_a_place_that_comes_free_is_used_without_a_poll(
    make_node: MakeNode, receiver: Receiver, slow: Gate, facts: Facts
) -> None:
    """Beside lanes that hang, a lane that is well goes on with each of its attempts that ends."""
    lanes, places, backlog = ("healthy-0", *BAD), 8, 40

    async def when_the_next_has_come(arrival: Arrival) -> None:
        mine = receiver.at("/healthy-0").index(arrival)
        await until(lambda: len(receiver.at("/healthy-0")) > mine + 1, "the next job")

    receiver.answers["/healthy-0"] = when_the_next_has_come
    idle = await node_for(make_node, receiver, lanes, places)
    assert idle.dispatcher is not None
    idle.dispatcher.halt()
    await queue(idle, lanes, backlog)
    await until(lambda: facts(WAITING) == [{"n": backlog * len(lanes)}], "the backlog")
    await idle.drain()
    await node_for(make_node, receiver, lanes, places, poll_seconds=LONGEST_POLL_SECONDS)
    await until(lambda: arrived(receiver, ["healthy-0"]) == backlog, "all that is healthy")
    receiver.answers.pop("/healthy-0")


async def test_a_retry_is_on_time_without_a_poll(
    make_node: MakeNode, receiver: Receiver, slow: Gate, facts: Facts
) -> None:
    """A node with few free places, which looks for jobs once a minute, knows of its retries."""
    refusals = iter([503] * 3)

    async def answer(_: Arrival) -> web.Response:
        return web.Response(status=next(refusals, 200))

    receiver.answers["/shaky"] = answer
    given = {"dispatch_retry_base_seconds": 0.1, "dispatch_retry_cap_seconds": 0.2}
    lanes = ("shaky", *BAD)
    node = await node_for(make_node, receiver, lanes, 8, poll_seconds=LONGEST_POLL_SECONDS, **given)
    for lane, jobs in (("hole", 3), ("slow", 2), ("shaky", 1)):
        await queue(node, [lane], jobs)
    await until(lambda: arrived(receiver, BAD) == 5, "the bad lanes' jobs")
    delivered = "SELECT attempt FROM delivery_receipt WHERE outcome = 'delivered'"
    await until(lambda: facts(delivered) == [{"attempt": 4}], "the fourth attempt")
