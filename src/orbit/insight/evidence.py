"""The arithmetic of evidence: Wilson bounds, the mixture e-detector, an anytime-valid interval.

Everything here uses only + - * / and the square root, which IEEE 754 rounds alike everywhere, in a
fixed order; so the same observations give the same bits on any machine and any Python. Nothing can
overflow: an e-detector starts anew when it has reached its threshold, so a part is never above
parts * threshold * largest factor, and no limit comes nearer to 0 or 1 than `EDGE`.

Sources: E. B. Wilson, "Probable Inference", JASA 22, 1927; J. Shin, A. Ramdas, A. Rinaldo,
"E-detectors", NEJSDS, 2023; I. Waudby-Smith, A. Ramdas, "Estimating means of bounded random
variables by betting", JRSS B 86, 2024, theorem 2 (predictable plug-in empirical Bernstein).
"""

from __future__ import annotations

import math

STAKES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.6, 0.95)
"""Shares of the largest bet that cannot lose everything; the mixture is their plain mean."""
PARTS = len(STAKES)
EDGE = 0.01
"""A limit this near to 0 or 1 cannot be passed by anything worth knowing, and gives no evidence."""
_LOG_2_OVER_ALPHA = 3.6888794541139363  # alpha = 0.05
_LARGEST_BET = 0.5
_HORIZON = 300.0  # bets are sized for an interval that has to decide after some hundred cycles

Parts = tuple[float, float, float, float, float, float, float]
NO_EVIDENCE: Parts = (0.0,) * 7
NO_WAGER: Parts = (1.0,) * 7


def wilson_bounds(mean: float, count: int, z: float) -> tuple[float, float]:
    """The Wilson score interval of a share `mean` seen in `count` trials, at `z` sigmas."""
    square = z * z / count
    centre = (mean + square / 2) / (1 + square)
    spread = math.sqrt(mean * (1 - mean) / count + square / (4 * count))
    half = z * spread / (1 + square)
    return max(0.0, centre - half), min(1.0, centre + half)


def grown(parts: Parts, value: float, limit: float) -> Parts:
    """The e-detector's parts after one more `value`, for the claim that the mean is >= `limit`.

    M <- (M + 1) * (1 + lambda * (limit - value)), with lambda = stake / (1 - limit) for each
    stake. Mirror value and limit (1 - x) for the claim that the mean is <= `limit`. A limit
    beyond `EDGE` leaves the parts as they are.
    """
    if not EDGE <= limit <= 1 - EDGE:
        return parts
    gain = (limit - value) / (1 - limit)
    a, b, c, d, e, f, g = parts
    return (
        (a + 1) * (1 + 0.02 * gain),
        (b + 1) * (1 + 0.05 * gain),
        (c + 1) * (1 + 0.1 * gain),
        (d + 1) * (1 + 0.2 * gain),
        (e + 1) * (1 + 0.35 * gain),
        (f + 1) * (1 + 0.6 * gain),
        (g + 1) * (1 + 0.95 * gain),
    )


def wagered(parts: Parts, value: float, limit: float) -> Parts:
    """The e-process's parts after one more `value`, for the claim that the mean is >= `limit`.

    M <- M * (1 + lambda * (limit - value)), with the same bets, from `NO_WAGER`: for what begins at
    a known time. While the claim holds, their mean ever reaches 1/alpha with a probability of at
    most alpha (Ville), however often one looks.
    """
    if not EDGE <= limit <= 1 - EDGE:
        return parts
    gain = (limit - value) / (1 - limit)
    a, b, c, d, e, f, g = parts
    return (
        a * (1 + 0.02 * gain),
        b * (1 + 0.05 * gain),
        c * (1 + 0.1 * gain),
        d * (1 + 0.2 * gain),
        e * (1 + 0.35 * gain),
        f * (1 + 0.6 * gain),
        g * (1 + 0.95 * gain),
    )


def total(parts: Parts) -> float:
    """E, the mean of the parts."""
    a, b, c, d, e, f, g = parts
    return (a + b + c + d + e + f + g) / PARTS


class RunningInterval:
    """An interval for the mean of values in [0, 1] that may be looked at after each of them.

    With probability 0.95 the mean lies in all the intervals at once, however often one looks.
    Six numbers of state, in the order of `state()`.
    """

    __slots__ = ("_bets", "_count", "_deviation", "_penalty", "_sum", "_weighted")

    def __init__(self, state: tuple[float, ...] = NO_EVIDENCE[:6]) -> None:
        self._count, self._sum, self._deviation = state[:3]
        self._bets, self._weighted, self._penalty = state[3:]

    def state(self) -> tuple[float, ...]:
        """Count, sum, squared deviations, sum of bets, bets times values, penalty."""
        return (
            self._count,
            self._sum,
            self._deviation,
            self._bets,
            self._weighted,
            self._penalty,
        )

    def add(self, value: float) -> None:
        """Takes one more value in."""
        count = self._count + 1
        variance = (0.25 + self._deviation) / count
        bet = math.sqrt(2 * _LOG_2_OVER_ALPHA / (variance * (count + _HORIZON)))
        bet = min(bet, _LARGEST_BET)
        error = value - (0.5 + self._sum) / count
        square = bet * bet
        # -log(1 - bet) - bet from above, by its series and the series' tail: no logarithm.
        price = square / 2 + square * bet / 3 + square * square / (4 * (1 - bet))
        self._penalty += error * error * price
        self._bets += bet
        self._weighted += bet * value
        self._sum += value
        error = value - (0.5 + self._sum) / (count + 1)
        self._deviation += error * error
        self._count = count

    def bounds(self) -> tuple[float, float]:
        """The interval; (0, 1) before the first value."""
        if self._bets == 0:
            return 0.0, 1.0
        centre = self._weighted / self._bets
        half = (_LOG_2_OVER_ALPHA + self._penalty) / self._bets
        return max(0.0, centre - half), min(1.0, centre + half)

    @property
    def half_width(self) -> float:
        """Half the width, before the interval is cut to [0, 1]."""
        return (_LOG_2_OVER_ALPHA + self._penalty) / self._bets if self._bets else 1.0
