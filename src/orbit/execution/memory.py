"""How many payload bytes a node takes on at once.

A cycle or a send reserves its payload's size before the bytes are read from the database; work
that does not fit waits. One reservation is always granted, however large, so nothing starves.
Work under way that grows takes what it needs at once (waiting could deadlock with its like), and
nothing new begins until the budget has room again.
"""

from __future__ import annotations

import asyncio
from collections import deque


class Reservation:
    """What one piece of work holds of the budget while it is entered."""

    __slots__ = ("_memory", "size")

    def __init__(self, memory: PayloadMemory, size: int) -> None:
        self._memory, self.size = memory, size

    async def __aenter__(self) -> Reservation:
        await self._memory.take(self.size)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.resize(0)

    def resize(self, size: int) -> None:
        """Holds `size` bytes from now on; never waits."""
        self._memory.change(size - self.size)
        self.size = size


class PayloadMemory:
    """A budget of bytes, granted in the order of asking."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._used = limit_bytes, 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    def reserve(self, size: int) -> Reservation:
        """To be entered: holds `size` bytes of the budget, after waiting until they are free."""
        return Reservation(self, size)

    async def take(self, size: int) -> None:
        """Waits until so many bytes are free, and takes them."""
        if self._waiting or not self._fits(size):
            await self._turn(size)
        else:
            self._used += size

    def change(self, size: int) -> None:
        """Takes so many bytes more, or gives them back if negative."""
        self._used += size
        self._grant()

    def _fits(self, size: int) -> bool:
        return self._used == 0 or self._used + size <= self._limit

    async def _turn(self, size: int) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, future))
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self._used -= size
            self._grant()
            raise

    def _grant(self) -> None:
        while self._waiting:
            size, future = self._waiting[0]
            if not future.done():
                if not self._fits(size):
                    return
                self._used += size
                future.set_result(None)
            self._waiting.popleft()
