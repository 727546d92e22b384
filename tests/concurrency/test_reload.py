"""Reloads against acceptances: a cycle is pinned to the revision in force when it was accepted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from orbit.clock import DatabaseClock, new_id
from orbit.database.pool import Database
from orbit.errors import CyclesActive
from orbit.execution.initiation import Intake, RevisionReplaced
from orbit.profiles.revision import Configuration
from tests.database.engine import Worker, count, documents

RELOADS, TRIGGERS = 40, 25


@pytest.fixture
async def pools(dsn: str) -> AsyncIterator[list[Database]]:
    """Two nodes' pools."""
    found = [Database(dsn, minimum=2, maximum=5) for _ in range(2)]
    for pool in found:
        await pool.open()
    yield found
    for pool in found:
        await pool.close()


async def put_in_turn(configuration: Configuration, names: list[str]) -> None:
    """Puts one configuration after the other into force."""
    for name in names:
        await configuration.propose(documents(name))
        await asyncio.sleep(0)


async def trigger(worker: Worker, configuration: Configuration, intake: Intake) -> int:
    """Triggers cycles as a node does, each from the revision it knows; how often it was too old."""
    replaced = 0
    for _ in range(TRIGGERS):
        while True:
            try:
                await intake.accept(worker.request(revision=configuration.active.revision))
            except RevisionReplaced:
                replaced += 1
                await configuration.refresh()
            else:
                break
    return replaced


async def test_a_cycle_has_the_revision_in_force_at_its_commit(
    pools: list[Database], clock: DatabaseClock
) -> None:
    """Among many reloads and acceptances on two nodes, none slips into a revision that is gone."""
    workers = [Worker.new(pool, clock) for pool in pools]
    putters = [Configuration(pool, new_id(clock.now()), clock) for pool in pools]
    await putters[0].propose(documents("first"))
    askers = []
    for pool, worker in zip(pools, workers, strict=True):
        configuration = Configuration(pool, worker.node_id, clock)
        await configuration.refresh()
        askers.append((worker, configuration, Intake(pool, worker.node_id, lambda: None)))
    reloads = [
        put_in_turn(putter, [f"{number}-{turn}" for turn in range(RELOADS)])
        for number, putter in enumerate(putters)
    ]
    results = await asyncio.gather(*reloads, *[trigger(*asker) for asker in askers for _ in "abc"])
    database = pools[0]
    assert sum(result or 0 for result in results) > 0, "no acceptance ever met a reload"
    assert await count(database, "cycle_run") == 6 * TRIGGERS
    # xmin orders commits of what one lock serializes: an activation and the next bound a reign.
    strays = await database.fetch_all(
        b"""SELECT run.cycle_id FROM cycle_run run WHERE NOT EXISTS (
            SELECT FROM (SELECT revision, activated_at, lead(activated_at, 1, 'infinity') OVER (
                ORDER BY xmin::text::bigint) AS until FROM config_activation) reign
            WHERE reign.revision = run.revision AND run.created_at >= reign.activated_at
                AND run.created_at <= reign.until)"""
    )
    assert strays == []


async def test_a_reload_never_passes_an_acceptance_by(
    pools: list[Database], clock: DatabaseClock
) -> None:
    """Whenever a reload succeeds no cycle is active; whenever one is, the reload is refused."""
    worker = Worker.new(pools[0], clock)
    configuration = Configuration(pools[1], new_id(clock.now()), clock)
    await configuration.propose(documents("first"))
    asker = Configuration(pools[0], worker.node_id, clock)
    intake = Intake(pools[0], worker.node_id, lambda: None)
    refused = 0
    for turn in range(30):
        await asker.refresh()
        request = worker.request(revision=asker.active.revision)
        accepted, reloaded = await asyncio.gather(
            intake.accept(request),
            configuration.replace(documents(f"turn {turn}")),
            return_exceptions=True,
        )
        if isinstance(accepted, RevisionReplaced):
            assert reloaded is True
        else:
            assert isinstance(reloaded, CyclesActive)
            refused += 1
            await pools[0].execute(b"DELETE FROM cycle_lease")
    assert await count(pools[0], "cycle_run") == refused
