"""What most would write, for comparison in replay only: three rules that are wrong often.

Each looks at one profile after each of its cycles, against the first 100 as its baseline. None
of them knows how often it has looked already, and none looks at peers.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

from orbit.insight.evidence import wilson_bounds
from orbit.insight.stream import BASELINE

_LAST = 20
_Z_95 = 1.96

Judge = Callable[[list[float]], bool]
"""Whether a history of values, oldest first, looks worse than its beginning."""


def below_two_sigma(values: list[float]) -> bool:
    """The mean of the last 20 lies below the baseline's mean - 2 sigma (of a mean of 20)."""
    mean = sum(values[:BASELINE]) / BASELINE
    sigma = sqrt(mean * (1 - mean) / _LAST)
    return sum(values[-_LAST:]) / _LAST < mean - 2 * sigma


def tenth_below(values: list[float]) -> bool:
    """The mean of the last 20 lies 10 % below the baseline's mean."""
    return sum(values[-_LAST:]) / _LAST < 0.9 * sum(values[:BASELINE]) / BASELINE


def wilson_each_time(values: list[float]) -> bool:
    """The 95 % Wilson interval of all since the baseline lies below the baseline's mean."""
    since = len(values) - BASELINE
    upper = wilson_bounds(sum(values[BASELINE:]) / since, since, _Z_95)[1]
    return upper < sum(values[:BASELINE]) / BASELINE


NAIVE: dict[str, Judge] = {
    "last 20 below mean - 2 sigma": below_two_sigma,
    "10 % below baseline": tenth_below,
    "95 % Wilson interval after each run": wilson_each_time,
}
