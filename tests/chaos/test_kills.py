"""Promises 1 to 5 under kill -9: nothing is lost, nothing takes effect twice."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from pathlib import Path

import pytest

from tests.chaos.boundaries import MOMENTS, POINTS
from tests.chaos.harness import RunProfileShape, Scene, scene
from tests.chaos.proof import assert_exactly_once, finished

log = logging.getLogger(__name__)  # figures: pytest --log-cli-level=info

SHAPES = (
    RunProfileShape("plain", items=3),
    RunProfileShape("begun", has_initiator=True, steps=(2, 1, 1), items=2),
    RunProfileShape("normal", "west", items=3, is_normalized=True, endpoint_keys=("beta",)),
    RunProfileShape("short", "west", steps=(1, 0, 0)),
)
_ROUNDS = 2
_RANDOM_KILLS = 64


async def _kill_at_every_boundary(scene: Scene) -> int:
    """A node per boundary, each with fresh work, each dead by its own hand when it gets there."""
    kills = 0
    for number, point in enumerate(itertools.product(range(_ROUNDS), POINTS, MOMENTS)):
        node = await scene.nodes.start(point[1:])
        asking = asyncio.create_task(scene.client.trigger(f"boundary-{number}"))
        assert await node.ended() == -9, (point, node.tail())
        kills += 1
        if not asking.done():
            node = await scene.nodes.start()
            await asking
            await node.kill()
            kills += 1
    return kills


async def _kill_at_random(scene: Scene) -> int:
    """A stream of triggers, and a node that never lives longer than a fraction of a second."""
    chance = random.Random(1)
    asking = []
    for number in range(_RANDOM_KILLS):
        node = await scene.nodes.start()
        asking.append(asyncio.create_task(scene.client.trigger(f"random-{number}")))
        await asyncio.sleep(chance.uniform(0, 0.25))  # the moment is the point, not the waiting
        await node.kill()
    await scene.nodes.start()
    await asyncio.gather(*asking)
    return _RANDOM_KILLS


@pytest.mark.timeout(1800)  # more than a hundred nodes start
async def test_a_hundred_kills_lose_nothing_and_double_nothing(
    dsn: str, owner_dsn: str, tmp_path: Path
) -> None:
    """Killed at every boundary and at random, everything accepted takes effect exactly once."""
    async with scene(tmp_path, SHAPES, dsn) as stage:
        kills = await _kill_at_every_boundary(stage)
        kills += await _kill_at_random(stage)
        await finished(owner_dsn, 300)
        evidence = assert_exactly_once(owner_dsn, stage)
    assert kills >= 100
    unknown = sum(receipt["outcome"] == "unknown" for receipt in evidence.receipts)
    log.info(
        "%d kills, %d cycles, %d jobs, %d receipts (%d unknown), %d arrivals",
        kills,
        len(evidence.cycles),
        len(evidence.jobs),
        len(evidence.receipts),
        unknown,
        len(stage.receiver.arrivals),
    )
