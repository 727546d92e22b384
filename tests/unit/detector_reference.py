"""The detector once more, slowly: each claim from a stream's whole history, by the formulas.

Nothing is carried along but histories: baseline, limits, residuals, evidence as a sum over all
starts of products, interval and peers' ratio are computed anew after every cycle. For fleets whose
profiles all run in every round, in one order; there is no silence and no second revision here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from orbit.insight.evidence import STAKES

Values = NDArray[np.float64]
_BASELINE, _RECENT, _THRESHOLD, _WITHIN = 100, 10, 1000.0, 0.06
_LOG_TERM = np.log(2 / 0.05)


@dataclass(frozen=True)
class Said:
    """What has to be said, of which profile and after which round."""

    round: int
    profile: int
    name: str
    evidence: float
    averaged: int
    count: int
    ratio: float | None


@dataclass
class _Fed:
    """What counted as one observation after the baseline: its value, limits, last round."""

    value: float
    lower: float
    upper: float
    round: int


@dataclass
class _History:
    values: list[float]
    residuals: list[float]
    fed: list[_Fed]
    block: list[float]
    evidence_from: int = _BASELINE
    interval_from: int = _BASELINE


def expected(rounds: Sequence[Sequence[float]]) -> list[Said]:
    """Everything that the detector has to say of a fleet."""
    columns = list(zip(*rounds, strict=True))
    histories = [_History([], residuals(column), [], []) for column in columns]
    said: list[Said] = []
    for now, row in enumerate(rounds):
        for place, value in enumerate(row):
            others = [one.values for at, one in enumerate(histories) if at != place]
            claim = _taken(histories[place], now, value, peers_ratio(others))
            if claim:
                name, evidence, averaged, count, ratio = claim
                said.append(Said(now, place, name, evidence, averaged, count, ratio))
    return said


def peers_ratio(others: Sequence[Sequence[float]]) -> float | None:
    """The peers' last ten over their baselines."""
    peers = [one for one in others if len(one) >= _BASELINE]
    if len(peers) < 4:
        return None
    expected = sum(_RECENT * round(np.mean(one[:_BASELINE]) * 2**20) / 2**20 for one in peers)
    return float(sum(sum(one[-_RECENT:]) for one in peers) / expected) if expected else None


def residuals(values: Sequence[float]) -> list[float]:
    """Each value less the mean of those before it, which follows the last hundred."""
    mean, found = 0.0, []
    for number, value in enumerate(values, start=1):
        found.append(value - mean if number > 1 else 0.0)
        mean += (value - mean) / min(number, 100)
    return found


def autocorrelation(residuals: Sequence[float]) -> float:
    """The lag-1 autocorrelation of residuals that fade, drawn to a prior."""
    found = np.array(residuals)
    weights = 0.999 ** np.arange(len(found) - 1, -1, -1)
    lagged = float(np.sum(weights[1:] * found[1:] * found[:-1]))
    squares, fourths = float(np.sum(weights * found**2)), float(np.sum(weights * found**4))
    if squares == 0:
        return 0.0
    prior = 3 * fourths / squares
    return (lagged + 0.25 * prior) / (squares + prior)


def evidence(values: Values, limits: Values) -> float:
    """The mean over stakes of the sum over all starts of the products of e-values."""
    usable = (limits >= 0.01) & (limits <= 0.99)
    gains = ((limits - values) / np.where(usable, 1 - limits, 1))[usable]
    factors = 1 + np.outer(STAKES, gains)
    return float(np.mean(np.sum(np.cumprod(factors[:, ::-1], axis=1), axis=1)))


def interval(values: Values) -> tuple[float, float, float]:
    """Predictable plug-in empirical Bernstein: low, high, half width before cutting."""
    count = len(values)
    before = np.arange(count)
    sums = np.concatenate(([0.0], np.cumsum(values)))
    means = (0.5 + sums[1:]) / (before + 2)
    spreads = np.concatenate(([0.0], np.cumsum((values - means) ** 2)[:-1]))
    bets = np.sqrt(2 * _LOG_TERM / ((0.25 + spreads) / (before + 1) * (before + 1 + 300)))
    bets = np.minimum(0.5, bets)
    errors = (values - (0.5 + sums[:-1]) / (before + 1)) ** 2
    prices = bets**2 / 2 + bets**3 / 3 + bets**4 / (4 * (1 - bets))
    centre = np.sum(bets * values) / np.sum(bets)
    half = (_LOG_TERM + np.sum(errors * prices)) / np.sum(bets)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half)), float(half)


def _taken(
    one: _History, now: int, value: float, ratio: float | None
) -> tuple[str, float, int, int, float | None] | None:
    one.values.append(value)
    if len(one.values) <= _BASELINE:
        return None
    one.block.append(value)
    found = autocorrelation(one.residuals[: now + 1 - _RECENT])
    if len(one.block) < (20 if found > 0.8 else 10 if found > 0.6 else 5 if found > 0.1 else 1):
        return None
    averaged, mean = len(one.block), float(np.mean(one.block))
    one.block = []
    base = one.values[:_BASELINE]
    level = 2 * stats.norm.cdf(1.28) - 1
    wilson = stats.binomtest(round(sum(base)), _BASELINE).proportion_ci(level, method="wilson")
    lower = max(0.0, wilson.low - 0.03) * min(1.0, 1.0 if ratio is None else ratio)
    upper = min(1.0, wilson.high + 0.03)
    upper = min(1.0, upper * max(1.0, 1.0 if ratio is None else ratio))
    one.fed.append(_Fed(mean, lower, upper, now))
    recent = [fed for fed in one.fed if fed.round >= one.evidence_from]
    values = np.array([fed.value for fed in recent])
    for name, weighed in (
        ("low_performance", evidence(values, np.array([fed.lower for fed in recent]))),
        ("elevated_performance", evidence(1 - values, 1 - np.array([f.upper for f in recent]))),
    ):
        if weighed >= _THRESHOLD:
            count = now + 1 - one.evidence_from
            one.evidence_from = one.interval_from = now + 1
            return name, weighed, averaged, count, ratio
    seen = np.array([fed.value for fed in one.fed if fed.round >= one.interval_from])
    low, high, half = interval(seen)
    centre = float(np.mean(base))
    if half < _WITHIN and low >= centre - _WITHIN and high <= centre + _WITHIN:
        count, one.interval_from = now + 1 - one.interval_from, now + 1
        return "stable", 40.0, averaged, count, ratio
    return None
