"""Whose turn it is to have a connection of one's own: halts are not to use up the server's.

So many may at once, and of one namespace only a few of these: who halts one namespace a hundred
times keeps no other from being halted.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from psycopg_pool import PoolTimeout


class Turns:
    """At most `in_all` at once, `of_one` of the same namespace."""

    def __init__(self, *, in_all: int, of_one: int) -> None:
        self._in_all, self._of_one = in_all, of_one
        self._taken: Counter[str] = Counter()
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def turn(self, namespace: str, seconds: float) -> AsyncIterator[None]:
        """A turn for this block, waited for so long; raises PoolTimeout."""
        try:
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait_for(lambda: self._is_free(namespace))
                self._taken[namespace] += 1
        except TimeoutError:
            raise PoolTimeout(f"others of {namespace}, or too many in all, are under way") from None
        try:
            yield
        finally:
            await self._leave(namespace)

    @asynccontextmanager
    async def turn_at_once(self, namespace: str) -> AsyncIterator[bool]:
        """Whether there is a turn for this block, without waiting."""
        is_free = self._is_free(namespace)
        if is_free:
            self._taken[namespace] += 1
        try:
            yield is_free
        finally:
            if is_free:
                await self._leave(namespace)

    def _is_free(self, namespace: str) -> bool:
        return self._taken.total() < self._in_all and self._taken[namespace] < self._of_one

    async def _leave(self, namespace: str) -> None:
        self._taken[namespace] -= 1
        if not self._taken[namespace]:
            del self._taken[namespace]
        async with self._changed:
            self._changed.notify_all()
