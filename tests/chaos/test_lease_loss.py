"""Every lease is deleted amid work: `repair` rebuilds them from the facts."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import psycopg

from orbit.database.pool import Database
from orbit.database.repair import repair
from tests.chaos.harness import RunProfileShape, eventually, scene
from tests.chaos.proof import assert_exactly_once, finished

log = logging.getLogger(__name__)  # figures: pytest --log-cli-level=info

_SHAPES = (
    RunProfileShape("slow", pause_seconds=0.1, items=3),
    RunProfileShape("begun", has_initiator=True, items=2),
    RunProfileShape("quick", "west", steps=(0, 1, 0)),
)
_LEASES = ("dispatch_lease", "cycle_lease", "schedule", "config_active", "node")
_LOSSES = 5


async def _delete_leases(owner_dsn: str) -> int:
    """All of them in one transaction; how many cycles and jobs lost theirs.

    It locks in another order than Orbit does: a deadlock with work under way is tried again.
    """
    while True:
        try:
            async with await psycopg.AsyncConnection.connect(owner_dsn) as connection:
                gone = [
                    (await connection.execute(f"DELETE FROM {one}")).rowcount for one in _LEASES
                ]
        except psycopg.errors.DeadlockDetected:
            continue
        return gone[0] + gone[1]


async def test_repair_after_the_loss_of_all_leases(
    database: Database, dsn: str, owner_dsn: str, tmp_path: Path
) -> None:
    """With every lease deleted amid work, again and again, everything finishes exactly once."""
    lost, rebuilt = 0, {"jobs": 0, "cycles": 0, "configuration": 0}
    async with scene(tmp_path, _SHAPES, dsn, ORBIT_WORKER_CONCURRENCY="8") as stage:
        stage.receiver.pause_seconds = 0.05
        await stage.nodes.start()
        await stage.nodes.start()
        for number in range(_LOSSES):
            triggers = (stage.client.trigger(f"{number}-{one}") for one in range(15))
            await asyncio.gather(*triggers)
            before = len(stage.receiver.arrivals)

            async def is_busy(before: int = before) -> bool:
                return len(stage.receiver.arrivals) > before + 5

            await eventually(is_busy, "work under way")
            lost += await _delete_leases(owner_dsn)
            found = await repair(database)
            rebuilt = {name: rebuilt[name] + found[name] for name in rebuilt}
        await finished(owner_dsn)
        assert not any((await repair(database)).values())
        assert_exactly_once(owner_dsn, stage, is_lease_loss=True)
    assert rebuilt["configuration"] == _LOSSES
    assert min(rebuilt["jobs"], rebuilt["cycles"]) >= 10
    log.info("%d leases lost, rebuilt %s", lost, rebuilt)
