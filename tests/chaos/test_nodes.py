"""Nodes that die, that are told to stop, and those that go on in their place."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from pathlib import Path

import psycopg

from tests.chaos.harness import NodeProcess, RunProfileShape, Scene, eventually, scene
from tests.chaos.proof import assert_exactly_once, finished
from tests.scenario.test_drain import hanging

log = logging.getLogger(__name__)  # figures: pytest --log-cli-level=info

_SLOW = RunProfileShape("slow", pause_seconds=0.3, items=2)
# Amid tier 2 until a node has it that was started with CHAOS_HASTE.
_HELD_UP = RunProfileShape("held-up", steps=(0, 1, 0), pause_seconds=600, items=2)


async def _count(owner_dsn: str, query: str) -> int:
    async with await psycopg.AsyncConnection.connect(owner_dsn) as connection:
        cursor = await connection.execute(query)
        row = await cursor.fetchone()
    return int(row[0]) if row else 0


async def _start_cycles(stage: Scene, count: int, shape: RunProfileShape = _SLOW) -> None:
    names = [f"cycle-{number}" for number in range(count)]
    await asyncio.gather(*(stage.client.trigger(one, [shape.run_profile_id]) for one in names))


async def test_another_node_finishes_a_killed_nodes_cycles_within_the_lease_time(
    dsn: str, owner_dsn: str, tmp_path: Path
) -> None:
    """Of two nodes one is killed amid its cycles; the other has ended them all a lease later.

    A lease, and what a busy machine needs for twenty cycles: far less than anything else that
    could have set them free.
    """
    lease_seconds, margin_seconds = 2.0, 60.0
    given = {"ORBIT_LEASE_SECONDS": str(lease_seconds), "ORBIT_WORKER_CONCURRENCY": "20"}
    async with scene(tmp_path, [_HELD_UP], dsn, **given) as stage:
        killed = await stage.nodes.start()
        await _start_cycles(stage, 20, _HELD_UP)

        async def is_busy() -> bool:
            return len(stage.calls.read_text().splitlines()) >= 20

        await eventually(is_busy, "cycles in hand")
        await stage.nodes.start(CHAOS_HASTE="1")
        await killed.kill()
        killed_at = time.monotonic()
        await finished(owner_dsn, lease_seconds + margin_seconds)
        seconds = time.monotonic() - killed_at
        evidence = assert_exactly_once(owner_dsn, stage)
    owners: dict[str, set[str]] = {}
    for checkpoint in evidence.checkpoints:
        owners.setdefault(checkpoint["cycle_id"], set()).add(checkpoint["node_id"])
    assert [len(nodes) for nodes in owners.values()] == [2] * 20
    log.info("20 cycles taken over, all ended %.1f s after the kill", seconds)


async def test_sigterm_amid_200_cycles_gives_them_back_at_once(
    dsn: str, owner_dsn: str, tmp_path: Path
) -> None:
    """SIGTERM: exit 0 within the drain time, leases given back, resumed by the next node at once.

    The bounds are those of a busy machine; a cycle that nobody gave back would be held for 600 s.
    """
    drain_seconds = 0.5
    given = {
        "ORBIT_LEASE_SECONDS": "600",  # so nobody can have waited for a lease to run out
        "ORBIT_DRAIN_TIMEOUT_SECONDS": str(drain_seconds),
        "ORBIT_WORKER_CONCURRENCY": "200",
    }
    async with scene(tmp_path, [_HELD_UP], dsn, **given) as stage:
        node = await stage.nodes.start(ORBIT_ROLES="api")
        await _start_cycles(stage, 200, _HELD_UP)
        await node.kill()
        stopped = await stage.nodes.start()
        held = "SELECT count(*) FROM cycle_lease WHERE node_id IS NOT NULL"

        async def are_running() -> bool:
            return await _count(owner_dsn, held) == 200

        await eventually(are_running, "200 cycles in hand")
        stopped.signal(signal.SIGTERM)
        told_at = time.monotonic()
        assert await stopped.ended() == 0, stopped.tail()
        seconds = time.monotonic() - told_at
        assert seconds < drain_seconds + 60, stopped.tail()
        assert await _count(owner_dsn, held) == 0
        assert await _count(owner_dsn, "SELECT count(*) FROM cycle_lease") == 200
        await stage.nodes.start(CHAOS_HASTE="1")
        await finished(owner_dsn, 300)
        assert_exactly_once(owner_dsn, stage)
    log.info("exit after %.2f s", seconds)


async def test_sigterm_lets_cycles_end_if_there_is_time(
    dsn: str, owner_dsn: str, tmp_path: Path
) -> None:
    """With time enough a node that is told to stop ends its cycles; jobs may be left to others."""
    async with scene(tmp_path, [_SLOW], dsn, ORBIT_LEASE_SECONDS="600") as stage:
        node = await stage.nodes.start()
        await _start_cycles(stage, 10)

        async def are_begun() -> bool:
            query = "SELECT count(*) FROM cycle_lease WHERE node_id IS NULL AND jobs = 0"
            return await _count(owner_dsn, query) == 0

        await eventually(are_begun, "all cycles begun")
        node.signal(signal.SIGTERM)
        assert await node.ended() == 0, node.tail()
        running = (
            "SELECT count(*) FROM cycle_status WHERE stage IN ('cycle_started',"
            " 'tier1_complete', 'tier2_complete', 'tier3_complete')"
        )
        assert await _count(owner_dsn, running) == 0
        await stage.nodes.start()
        await finished(owner_dsn)
        assert_exactly_once(owner_dsn, stage)


async def test_a_second_signal_ends_at_once(dsn: str, owner_dsn: str, tmp_path: Path) -> None:
    """A node that drains for a minute ends at the second signal, and nothing is lost by it."""
    stuck = RunProfileShape("stuck", pause_seconds=60)
    given = {"ORBIT_DRAIN_TIMEOUT_SECONDS": "60", "ORBIT_LEASE_SECONDS": "30"}
    async with scene(tmp_path, [stuck, _SLOW], dsn, **given) as stage:
        node = await stage.nodes.start()
        await stage.client.trigger("stuck", ["stuck"])

        async def is_called() -> bool:
            return bool(stage.calls.read_text())

        await eventually(is_called, "a step that is under way")
        node.signal(signal.SIGINT)

        async def is_draining() -> bool:
            return "draining" in node.log.read_text()

        await eventually(is_draining, "a node that drains")
        assert node.is_alive
        node.signal(signal.SIGINT)
        assert await node.ended(30) != 0  # of the minute that it would drain
        assert await _count(owner_dsn, "SELECT count(*) FROM cycle_lease") == 1


async def test_an_attempt_that_a_drain_cuts_off_is_settled_at_once(
    dsn: str, owner_dsn: str, tmp_path: Path
) -> None:
    """What is on the wire when the time is over is unknown, and any node may send it again."""
    given = {"ORBIT_LEASE_SECONDS": "600", "ORBIT_DRAIN_TIMEOUT_SECONDS": "0.2"}
    shape = RunProfileShape("quick", items=5)
    async with scene(tmp_path, [shape], dsn, **given) as stage:
        stage.receiver.pause_seconds = 60
        node = await stage.nodes.start()
        await stage.client.trigger("only", ["quick"])

        async def are_sent() -> bool:
            return len(stage.receiver.arrivals) >= 10

        await eventually(are_sent, "attempts on the wire")
        node.signal(signal.SIGTERM)
        assert await node.ended() == 0, node.tail()
        stage.receiver.pause_seconds = 0
        assert await _count(owner_dsn, "SELECT count(*) FROM delivery_receipt") == 10
        await stage.nodes.start()
        await finished(owner_dsn)
        evidence = assert_exactly_once(owner_dsn, stage)
    first = {row["outcome"] for row in evidence.receipts if row["attempt"] == 1}
    assert first == {"unknown"}


async def test_sigterm_while_the_database_hangs_ends_in_time(dsn: str, tmp_path: Path) -> None:
    """With cycles, sends and statements in hand the program ends in its time, with exit code 0."""
    drain_seconds = 2
    stuck = RunProfileShape("stuck", pause_seconds=60)
    quick = RunProfileShape("quick", items=5)
    given = {"ORBIT_DRAIN_TIMEOUT_SECONDS": str(drain_seconds)}
    async with hanging(dsn) as (proxy, url), scene(tmp_path, [stuck, quick], url, **given) as stage:
        stage.receiver.pause_seconds = 1
        node = await stage.nodes.start()
        await stage.client.trigger("both", ["stuck", "quick"])

        async def are_sent() -> bool:
            return len(stage.receiver.arrivals) >= 10

        await eventually(are_sent, "attempts on the wire")
        proxy.is_open.clear()
        node.signal(signal.SIGTERM)
        told_at = time.monotonic()
        assert await node.ended() == 0, node.tail()
        assert time.monotonic() - told_at < drain_seconds + 25, node.tail()  # steps take 60


async def _freeze(stage: Scene, owner_dsn: str, node: NodeProcess) -> None:
    """Stops a node amid steps and sends, as a machine that is suspended would be."""
    stage.receiver.pause_seconds = 5
    await _start_cycles(stage, 30)

    async def is_sending() -> bool:
        query = "SELECT count(*) FROM dispatch_lease WHERE node_id IS NOT NULL"
        return await _count(owner_dsn, query) > 0

    await eventually(is_sending, "attempts on the wire")
    node.signal(signal.SIGSTOP)
    stage.receiver.pause_seconds = 0.2


async def test_a_node_that_outlived_its_leases_changes_nothing(
    dsn: str, owner_dsn: str, tmp_path: Path
) -> None:
    """Frozen until another node has done its work, and then thawed, a node adds nothing to it."""
    async with scene(tmp_path, [_SLOW], dsn) as stage:
        frozen = await stage.nodes.start()
        await _freeze(stage, owner_dsn, frozen)
        await stage.nodes.start()
        await finished(owner_dsn)
        frozen.signal(signal.SIGCONT)
        frozen.signal(signal.SIGTERM)
        assert await frozen.ended() == 0, frozen.tail()
        assert_exactly_once(owner_dsn, stage)


async def test_a_node_takes_its_own_work_up_again(dsn: str, owner_dsn: str, tmp_path: Path) -> None:
    """Frozen for longer than its leases, alone, a node claims what it still has in hand."""
    async with scene(tmp_path, [_SLOW], dsn) as stage:
        node = await stage.nodes.start()
        await _freeze(stage, owner_dsn, node)

        async def are_over() -> bool:
            query = (
                "SELECT (SELECT count(*) FROM cycle_lease WHERE node_id IS NOT NULL"
                " AND due_at > orbit_now()) + (SELECT count(*) FROM dispatch_lease"
                " WHERE node_id IS NOT NULL AND due_at > orbit_now())"
            )
            return await _count(owner_dsn, query) == 0

        await eventually(are_over, "the end of all leases")
        node.signal(signal.SIGCONT)
        await finished(owner_dsn)
        assert_exactly_once(owner_dsn, stage)
        node.signal(signal.SIGTERM)
        assert await node.ended() == 0, node.tail()


async def test_a_node_that_freezes_in_a_transaction_does_not_keep_its_locks(
    dsn: str, owner_dsn: str, tmp_path: Path
) -> None:
    """The database ends the transaction of a suspended node, so that another can go on."""
    shape = RunProfileShape("quick")
    async with scene(tmp_path, [shape], dsn) as stage:
        frozen = await stage.nodes.start(("tier2_complete", "frozen"))
        await stage.client.trigger("only")

        async def is_stuck() -> bool:
            query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            return await _count(owner_dsn, f"{query} AND state = 'idle in transaction'") == 1

        await eventually(is_stuck, "a transaction that waits")
        await stage.nodes.start()
        await finished(owner_dsn)
        frozen.signal(signal.SIGCONT)
        frozen.signal(signal.SIGTERM)
        assert await frozen.ended() == 0, frozen.tail()
        assert_exactly_once(owner_dsn, stage)
