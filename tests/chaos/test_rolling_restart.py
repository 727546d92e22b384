"""Two nodes replaced one after the other while work comes in: an upgrade as operators do it."""

from __future__ import annotations

import asyncio
import itertools
import signal
from pathlib import Path

from tests.chaos.harness import RunProfileShape, Scene, eventually, scene
from tests.chaos.proof import assert_exactly_once, finished

_SHAPE = RunProfileShape("steady", pause_seconds=0.1, items=3)
_AHEAD = 15


async def _keep_asking(stage: Scene, is_over: asyncio.Event) -> None:
    """Triggers without a pause, some at a time, at whichever node answers."""
    numbers = itertools.count()

    async def ask() -> None:
        while not is_over.is_set():
            await stage.client.trigger(f"steady-{next(numbers)}", ["steady"])

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(ask())


async def test_a_rolling_restart_under_load_loses_and_doubles_nothing(
    dsn: str, owner_dsn: str, tmp_path: Path
) -> None:
    """Each of two nodes is told to stop and replaced, twice over; all of it happened once."""
    given = {"ORBIT_DRAIN_TIMEOUT_SECONDS": "1"}
    async with scene(tmp_path, [_SHAPE], dsn, **given) as stage:
        stage.receiver.pause_seconds = 0.05
        nodes = [await stage.nodes.start(), await stage.nodes.start()]
        is_over = asyncio.Event()
        asking = asyncio.create_task(_keep_asking(stage, is_over))
        for place in (0, 1, 0, 1):
            before = len(stage.client.accepted)

            async def is_busy(before: int = before) -> bool:
                return len(stage.client.accepted) >= before + _AHEAD

            await eventually(is_busy, "more cycles under way")
            nodes[place].signal(signal.SIGTERM)
            assert await nodes[place].ended() == 0, nodes[place].tail()
            nodes[place] = await stage.nodes.start()
        is_over.set()
        await asking
        await finished(owner_dsn, 300)
        evidence = assert_exactly_once(owner_dsn, stage)
    assert len(evidence.cycles) >= 4 * _AHEAD
    assert len({checkpoint["node_id"] for checkpoint in evidence.checkpoints}) >= 4
