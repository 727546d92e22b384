"""The database goes away amid work: nodes reconnect by themselves, and nothing is lost."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from orbit.database.embedded import APPLICATION_ROLE, EmbeddedServer, erase
from orbit.database.upgrade import upgrade
from tests.chaos.harness import NodeProcess, RunProfileShape, Scene, eventually, scene
from tests.chaos.proof import assert_exactly_once, finished

_SHAPES = (
    RunProfileShape("steady", pause_seconds=0.05, items=3),
    RunProfileShape("begun", "west", has_initiator=True, items=2),
)
_LOSSES = 3


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A server of this test alone, in the folder where the nodes look for theirs."""
    server = EmbeddedServer.start(tmp_path / "data")
    upgrade(server.owner_dsn, APPLICATION_ROLE)
    yield server
    server.ensure_running()
    server.leave()
    erase(tmp_path / "data")


def _postmaster(server: EmbeddedServer) -> int:
    return int((server.home / "data" / "postmaster.pid").read_text().split()[0])


async def _replaced(server: EmbeddedServer, postmaster: int) -> None:
    """Waits until another server answers in its place."""

    async def is_replaced() -> bool:
        try:
            if _postmaster(server) == postmaster:
                return False
            await (await psycopg.AsyncConnection.connect(server.owner_dsn)).close()
        except (OSError, IndexError, psycopg.OperationalError):  # it is being written
            return False
        return True

    await eventually(is_replaced, "another server")


def _complaints(node: NodeProcess) -> int:
    return node.log.read_text().count("database_unavailable")


async def _noticed(node: NodeProcess, before: int = 0) -> None:
    async def has_noticed() -> bool:
        return _complaints(node) > before

    await eventually(has_noticed, "a node that noticed")


async def _lose_database(stage: Scene, server: EmbeddedServer, how: signal.Signals) -> None:
    """A stream of triggers on two nodes, and a server that is ended again and again."""
    nodes = [await stage.nodes.start(), await stage.nodes.start()]
    for number in range(_LOSSES):
        asking = [stage.client.trigger(f"{number}-{one}") for one in range(10)]
        asked = asyncio.gather(*asking)
        before = len(stage.receiver.arrivals)

        async def is_busy(before: int = before) -> bool:
            return len(stage.receiver.arrivals) > before + 5

        await eventually(is_busy, "work under way")
        postmaster = _postmaster(server)
        noticed = [_complaints(node) for node in nodes]
        os.kill(postmaster, how)
        if "DATABASE_URL" in stage.nodes.environ:  # nobody but us can start it again
            for node, count in zip(nodes, noticed, strict=True):
                await _noticed(node, count)
            await asyncio.to_thread(server.ensure_running)
        await _replaced(server, postmaster)
        await asked
    assert all(node.is_alive for node in nodes)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["restart", "kill"])
async def test_nodes_bring_their_embedded_server_back(
    own_server: EmbeddedServer, tmp_path: Path, how: signal.Signals
) -> None:
    """The nodes' own server is stopped, or killed, amid work: they start it and finish."""
    async with scene(tmp_path, _SHAPES, None) as stage:
        await _lose_database(stage, own_server, how)
        await finished(own_server.owner_dsn)
        assert_exactly_once(own_server.owner_dsn, stage)


async def test_nodes_wait_for_a_database_that_restarts(
    own_server: EmbeddedServer, tmp_path: Path
) -> None:
    """A database that is not theirs restarts amid work: they wait for it and finish."""
    async with scene(tmp_path, _SHAPES, own_server.dsn) as stage:
        await _lose_database(stage, own_server, signal.SIGINT)
        await finished(own_server.owner_dsn)
        assert_exactly_once(own_server.owner_dsn, stage)


async def test_sigterm_without_a_database_ends_in_time(
    own_server: EmbeddedServer, tmp_path: Path
) -> None:
    """A node that is told to stop while its database is gone does not hang for ever."""
    given = {"ORBIT_DRAIN_TIMEOUT_SECONDS": "1"}
    async with scene(tmp_path, _SHAPES, own_server.dsn, **given) as stage:
        node = await stage.nodes.start()
        await stage.client.trigger("only")
        os.kill(_postmaster(own_server), signal.SIGINT)
        await _noticed(node)
        node.signal(signal.SIGTERM)
        assert await node.ended() == 0, node.tail()
        await asyncio.to_thread(own_server.ensure_running)
        await stage.nodes.start()
        await finished(own_server.owner_dsn)
        assert_exactly_once(own_server.owner_dsn, stage)
