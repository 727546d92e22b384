"""Latencies as yes and no: whether each is within the P90 of the stream's first ones.

While the baseline is gathered nothing can be said, so the first values are kept and judged all at
once when the last of them has come; after that one number, the P90, is all the state there is.
"""

from __future__ import annotations

from typing import Any


class LatencyScale:
    """The scale of one stream: seconds in, 1.0 (within the P90) or 0.0 (above it) out."""

    __slots__ = ("_first", "_p90", "_size")

    def __init__(self, size: int) -> None:
        self._size = size
        self._first: list[float] = []
        self._p90: float | None = None

    @property
    def needed(self) -> int:
        """How many latencies are lacking before any can be judged."""
        return 0 if self._p90 is not None else self._size - len(self._first)

    @property
    def limit(self) -> float | None:
        """The P90 in seconds, once it is known."""
        return self._p90

    def take(self, seconds: float) -> list[float]:
        """What is known now that `seconds` came: nothing, all the first ones, or this one."""
        if self._p90 is not None:
            return [float(seconds <= self._p90)]
        self._first.append(seconds)
        if len(self._first) < self._size:
            return []
        nearest_rank = -(-len(self._first) * 9 // 10)
        bound = self._p90 = sorted(self._first)[nearest_rank - 1]
        judged = [float(one <= bound) for one in self._first]
        self._first = []
        return judged

    def state(self) -> list[Any]:
        """Size, P90 (or None) and what is kept until it is known."""
        return [self._size, self._p90, list(self._first)]

    @classmethod
    def restored(cls, state: list[Any]) -> LatencyScale:
        """The scale whose `state()` this is."""
        made = cls(state[0])
        made._p90 = None if state[1] is None else float(state[1])
        made._first = [float(one) for one in state[2]]
        return made
