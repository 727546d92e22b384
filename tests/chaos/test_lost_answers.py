"""Commits whose answers never arrive: what is repeated must not take effect twice."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.chaos.harness import RunProfileShape, scene
from tests.chaos.proof import assert_exactly_once, finished

log = logging.getLogger(__name__)  # figures: pytest --log-cli-level=info

_COMMITTED = b"C\x00\x00\x00\x0bCOMMIT\x00"  # CommandComplete of COMMIT
_SHAPES = (
    RunProfileShape("plain", items=3),
    RunProfileShape("begun", "west", has_initiator=True, items=2),
)


class FaithlessProxy:
    """Between nodes and their database: loses some answers, and the connection with them."""

    def __init__(self, dsn: str) -> None:
        self._upstream = conninfo_to_dict(dsn)
        self._chance = random.Random(1)
        self.is_faithless = True
        self.lost_commits = 0
        self.lost_answers = 0
        self._serving: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, remembered until it is over."""
        task = asyncio.current_task()
        assert task is not None
        self._serving[task] = writer
        try:
            await self._pass_on(reader, writer)
        finally:
            del self._serving[task]

    async def close(self) -> None:
        """Ends all connections, and waits for them: a task cancelled with its loop complains."""
        tasks = list(self._serving)
        for writer in self._serving.values():
            writer.transport.abort()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = str(self._upstream["host"]), int(self._upstream.get("port") or 5432)
        if host.startswith("/"):
            path = f"{host}/.s.PGSQL.{port}"
            answers, requests = await asyncio.open_unix_connection(path)
        else:
            answers, requests = await asyncio.open_connection(host, port)
        forward = asyncio.create_task(_forward(reader, requests))
        try:
            while chunk := await answers.read(1 << 16):
                if self._is_lost(chunk):
                    break
                writer.write(chunk)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.transport.abort()
            requests.transport.abort()
            await asyncio.gather(forward, return_exceptions=True)

    def _is_lost(self, chunk: bytes) -> bool:
        if not self.is_faithless:
            return False
        if _COMMITTED in chunk and self._chance.random() < 0.3:
            self.lost_commits += 1
            return True
        if self._chance.random() < 0.02:
            self.lost_answers += 1
            return True
        return False


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Ends the other side too once this one is gone."""
    with contextlib.suppress(OSError):
        while chunk := await reader.read(1 << 16):
            writer.write(chunk)
            await writer.drain()
    writer.transport.abort()


@asynccontextmanager
async def _faithless(dsn: str) -> AsyncIterator[tuple[FaithlessProxy, str]]:
    proxy = FaithlessProxy(dsn)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    no_tls = {"sslmode": "disable", "gssencmode": "disable"}
    try:
        yield proxy, make_conninfo(dsn, host=host, port=port, **no_tls)
    finally:
        server.close()
        await proxy.close()


async def test_a_commit_whose_answer_is_lost_takes_effect_once(
    dsn: str, owner_dsn: str, tmp_path: Path
) -> None:
    """A third of all commits are never answered; repeated, they double nothing."""
    async with (
        _faithless(dsn) as (proxy, faithless_dsn),
        scene(tmp_path, _SHAPES, faithless_dsn) as stage,
    ):
        proxy.is_faithless = False
        await stage.nodes.start()
        await stage.nodes.start()
        proxy.is_faithless = True
        number = 0
        while number < 10 or (proxy.lost_commits < 20 and number < 100):
            number += 1
            triggers = (stage.client.trigger(f"{number}-{one}") for one in range(4))
            await asyncio.gather(*triggers)
        await finished(owner_dsn, 300)
        assert_exactly_once(owner_dsn, stage)
    assert proxy.lost_commits >= 20
    log.info("%d commits and %d other answers lost", proxy.lost_commits, proxy.lost_answers)
