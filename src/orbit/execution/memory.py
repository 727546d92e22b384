"""How many payload bytes a node takes on at once.

A cycle or a send reserves its payload's size before the bytes are read from the database; work
that does not fit waits. One reservation is always granted, however large, so nothing starves.
Who is named as an owner leaves others as much as it holds: a receiver that hangs, or a step, does
not take all. Work under way that grows takes what it needs at once (waiting could deadlock with
its like), and nothing new begins until the budget has room again.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Reservation:
    """What one piece of work holds of the budget while it is entered."""

    memory: PayloadMemory
    size: int
    owner: Hashable

    async def __aenter__(self) -> Reservation:
        await self.memory.take(self)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.resize(0)

    def resize(self, size: int) -> None:
        """Holds `size` bytes from now on; never waits."""
        self.memory.change(self, size)


class PayloadMemory:
    """A budget of bytes, granted in the order of asking.

    An owner who is not alone gets no more than he leaves free, and is passed over meanwhile.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._used = limit_bytes, 0
        self._held: Counter[Hashable] = Counter()
        self._waiting: list[tuple[Reservation, asyncio.Future[None]]] = []

    def reserve(self, size: int, owner: Hashable = None) -> Reservation:
        """To be entered: holds `size` bytes of the budget, after waiting until they are free."""
        return Reservation(self, size, owner)

    async def take(self, asked: Reservation) -> None:
        """Waits until so many bytes are free, and takes them."""
        if not self._waiting and self._may(asked):
            self._add(asked.owner, asked.size)
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((asked, granted))
        self._grant()
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self._add(asked.owner, -asked.size)
            self._grant()
            raise

    def change(self, held: Reservation, size: int) -> None:
        """Takes so many bytes more, or gives them back."""
        self._add(held.owner, size - held.size)
        held.size = size
        self._grant()

    def _add(self, owner: Hashable, size: int) -> None:
        self._used += size
        if owner is not None:
            self._held[owner] += size
            if not self._held[owner]:
                del self._held[owner]

    def _has_room(self, asked: Reservation) -> bool:
        return self._used == 0 or self._used + asked.size <= self._limit

    def _may(self, asked: Reservation) -> bool:
        held = self._held[asked.owner]
        is_modest = held in (0, self._used) or held + asked.size <= self._limit - self._used
        return self._has_room(asked) and is_modest

    def _grant(self) -> None:
        """Nobody overtakes one that waits for room."""
        left, is_full = [], False
        for asked, granted in self._waiting:
            if granted.done():
                continue
            if not is_full and self._may(asked):
                self._add(asked.owner, asked.size)
                granted.set_result(None)
                continue
            is_full = is_full or not self._has_room(asked)
            left.append((asked, granted))
        self._waiting = left
