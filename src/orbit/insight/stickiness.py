"""Stickiness: how far an outcome repeats the one before it, estimated all along.

It is the lag-1 autocorrelation of residuals, each a value less the mean of what came before it.
The mean follows the last hundred values, and a residual's weight halves in some seven hundred, so
that a change of the mean is not taken for stickiness for long. Where hardly any values differ (a
rate with two failures) nothing can be known, and what differs is taken to be sticky until shown
otherwise: the estimate is drawn towards `_PRIOR`, as if some telling residuals had said so. How
much a residual tells is measured by the residuals themselves (fourth powers over squares), so that
scores and rates are treated alike. Without any residual there is nothing to be cautious about.

Only + - * /, in a fixed order: the same values, the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

ABOVE = 0.1
"""An autocorrelation up to this counts as none."""
BLOCKS = ((0.8, 20), (0.6, 10), (ABOVE, 5))
"""From which autocorrelation on the mean of so many values counts as one."""
_MEMORY = 100
_KEPT = 0.999
_PRIOR, _PRIOR_RESIDUALS = 0.25, 3.0


class Stickiness:
    """The estimate of one stream, in six numbers."""

    __slots__ = ("_count", "_fourths", "_lagged", "_last", "_mean", "_squares")

    def __init__(self, state: Sequence[float] = (0, 0.0, 0.0, 0.0, 0.0, 0.0)) -> None:
        self._count = int(state[0])
        self._mean, self._last, self._lagged, self._squares, self._fourths = map(float, state[1:])

    def state(self) -> tuple[float, ...]:
        """Count (to a hundred), mean, last residual, and three sums; as `Stickiness` takes it."""
        return (
            self._count,
            self._mean,
            self._last,
            self._lagged,
            self._squares,
            self._fourths,
        )

    def add(self, value: float) -> None:
        """Takes the next value in."""
        if self._count == 0:
            self._count, self._mean = 1, value
            return
        residual = value - self._mean
        square = residual * residual
        self._lagged = self._lagged * _KEPT + residual * self._last
        self._squares = self._squares * _KEPT + square
        self._fourths = self._fourths * _KEPT + square * square
        self._last = residual
        if self._count < _MEMORY:
            self._count += 1
        self._mean += residual / self._count

    @property
    def autocorrelation(self) -> float:
        """The estimate; 0 as long as all values are the same."""
        if self._squares <= 0:
            return 0.0
        prior = _PRIOR_RESIDUALS * self._fourths / self._squares
        return (self._lagged + _PRIOR * prior) / (self._squares + prior)

    @property
    def block(self) -> int:
        """How many values are to count as one, by their mean."""
        found = self.autocorrelation
        for above, size in BLOCKS:
            if found > above:
                return size
        return 1
