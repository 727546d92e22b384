"""Group commit: what arrives while one flush runs goes out in the next, in one transaction.

Batches form by themselves and never wait for a timer: alone, an entry commits at once; under
load, hundreds share a commit. A flush must be idempotent, since it is repeated when the
connection breaks and nobody knows whether the commit had happened. An entry that the database
refuses, or gives up again and again, fails alone: its batch is flushed again one by one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar, cast

import psycopg

from orbit.database.pool import Database

_GATHERING_ROUNDS = 32
Entry = TypeVar("Entry")
Result = TypeVar("Result")


class GroupCommit(Generic[Entry, Result]):
    """Hands entries to `flush` in batches; each caller gets its entry's result.

    Args:
        flush: writes a batch in one transaction and gives a result per entry, in order.
        lanes: flushes at once, so that the database writes one batch while the next forms.
        weigh: the bytes that an entry holds; a batch ends when they pass `batch_bytes`.
    """

    def __init__(
        self,
        database: Database,
        flush: Callable[[Sequence[Entry]], Awaitable[Sequence[Result]]],
        *,
        lanes: int = 2,
        batch_size: int = 500,
        batch_bytes: int = 4 << 20,
        weigh: Callable[[Entry], int] = lambda _: 0,
    ) -> None:
        self._database, self._flush, self._weigh = database, flush, weigh
        self._lanes, self._batch_size, self._batch_bytes = lanes, batch_size, batch_bytes
        self._waiting: list[tuple[Entry, asyncio.Future[Result]]] = []
        self._flushing: set[asyncio.Task[None]] = set()

    async def commit(self, entry: Entry) -> Result:
        """The entry's result, once it is committed; raises what the database refused."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((entry, future))
        if len(self._flushing) < self._lanes:
            self._flushing.add(asyncio.create_task(self._run()))
        return await future

    async def drained(self) -> None:
        """Returns when nothing is waiting."""
        while self._flushing:
            await asyncio.wait(self._flushing)

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._gather()
                await self._write_all(self._take())
        finally:
            # In the same step as the look at `_waiting`: an entry that comes later starts a lane.
            self._flushing.discard(cast("asyncio.Task[None]", asyncio.current_task()))

    async def _gather(self) -> None:
        """Whoever is about to commit as well comes along: as long as more keep coming."""
        for _ in range(_GATHERING_ROUNDS):
            count = len(self._waiting)
            await asyncio.sleep(0)
            if len(self._waiting) == count:
                return

    async def _write_all(self, batch: list[tuple[Entry, asyncio.Future[Result]]]) -> None:
        try:
            if batch:
                await self._write(batch)
        except Exception as error:  # noqa: BLE001 - it is each waiting caller's
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)

    def _take(self) -> list[tuple[Entry, asyncio.Future[Result]]]:
        # Who gave up waiting before the flush began is left out: nothing of it happens.
        self._waiting = [pair for pair in self._waiting if not pair[1].done()]
        count, weight = 0, 0
        for entry, _ in self._waiting[: self._batch_size]:
            weight += self._weigh(entry)
            if count and weight > self._batch_bytes:
                break
            count += 1
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        return batch

    async def _write(self, batch: list[tuple[Entry, asyncio.Future[Result]]]) -> None:
        entries = [entry for entry, _ in batch]
        try:
            results = await self._database.persist(lambda: self._flush(entries))
        except psycopg.Error:
            if len(batch) == 1:
                raise
            for pair in batch:
                await self._write_alone(pair)
            return
        for (_, future), result in zip(batch, results, strict=True):
            if not future.done():
                future.set_result(result)

    async def _write_alone(self, pair: tuple[Entry, asyncio.Future[Result]]) -> None:
        try:
            await self._write([pair])
        except psycopg.Error as error:
            if not pair[1].done():
                pair[1].set_exception(error)
