"""One stream: a profile's metric under one revision, from its baseline to its claims.

The first `BASELINE` observations are the baseline, then frozen. Every later one feeds two
e-detectors (lower, higher) and a running interval. A claim ends a chapter: a directional one
starts all evidence anew, `stable` the interval only, so that a slow decline cannot hide behind
reassurance. Sticky outcomes are fed as means of five or more. How sticky they are is judged by
values that have left the last ten: a sudden drop, which is a run too, is told of before that.

State is a fixed number of numbers whatever the age of the stream. It refuses values that are not
finite numbers in [0, 1]; positions are its caller's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from orbit.insight.evidence import NO_EVIDENCE, Parts, RunningInterval, grown, total, wilson_bounds
from orbit.insight.signals import RATES, Baseline, SignalName
from orbit.insight.stickiness import Stickiness

THRESHOLD = 1000.0
"""A: for a fixed limit the mean time to a false alarm is at least this many cycles."""
BASELINE = 100
LEAST_BASELINE = 50
RECENT = 10
STABLE_WITHIN = 0.06
_Z = 1.28
_RATE_MARGIN = 0.03
_SCORE_MARGIN = 0.02


@dataclass(frozen=True, slots=True)
class Claim:
    """What a stream claims after an observation, before anybody has put words to it.

    The interval is of `interval_count` observations from `interval_position`. All of the evidence
    may be older: `count` from `first_position`; for `stable` it is the interval itself.
    """

    name: SignalName
    evidence: float
    interval: tuple[float, float]
    count: int
    averaged: int
    is_against_peers: bool
    first_position: int
    interval_count: int
    interval_position: int


class Stream:
    """The state of one stream. `baseline` is None until it is frozen."""

    __slots__ = (
        "_alone",
        "_block",
        "_block_sum",
        "_chapter",
        "_count",
        "_elevated",
        "_gathered",
        "_gathered_sum",
        "_interval",
        "_interval_count",
        "_interval_position",
        "_low",
        "_size",
        "_stickiness",
        "baseline",
        "first_position",
        "last_claim",
        "last_claim_position",
        "last_position",
        "missed",
        "missed_since",
        "recent",
    )

    def __init__(self, size: int, position: int) -> None:
        self._size = size
        self._gathered, self._gathered_sum = 0, 0.0
        self._stickiness = Stickiness()
        self.baseline: Baseline | None = None
        self.recent: list[float] = []
        self._low: Parts = NO_EVIDENCE
        self._elevated: Parts = NO_EVIDENCE
        self._interval = RunningInterval()
        self._interval_count = self._count = self._alone = self._block = 0
        self._block_sum = 0.0
        self._chapter = self._interval_position = position
        self.first_position = self.last_position = position
        self.last_claim: SignalName | None = None
        self.last_claim_position: int | None = None
        self.missed, self.missed_since = 0, position

    @property
    def needed(self) -> int:
        """How many observations the baseline still lacks."""
        return 0 if self.baseline else self._size - self._gathered

    @property
    def count(self) -> int:
        """Observations since all evidence last began anew."""
        return self._count

    @property
    def interval(self) -> tuple[float, float]:
        """The anytime-valid interval of the mean since it last began anew."""
        return self._interval.bounds()

    @property
    def autocorrelation(self) -> float:
        """How far outcomes repeat the one before them, as estimated by now."""
        return self._stickiness.autocorrelation

    @property
    def block(self) -> int:
        """How many observations count as one by now, by their mean."""
        return self._stickiness.block

    def evidence(self) -> tuple[float, float]:
        """E so far for lower and for elevated performance."""
        return total(self._low), total(self._elevated)

    def take(self, position: int, value: float, metric: str, ratio: float | None) -> Claim | None:
        """Takes an observation in; `ratio` is the peers', from before it. Returns a claim."""
        self.last_position = position
        self.recent.append(value)
        if len(self.recent) > RECENT:
            self._stickiness.add(self.recent.pop(0))
        if self.baseline is None:
            self._gather(value, metric)
            return None
        if self._count == 0:
            self._chapter = position
        if self._interval_count == 0:
            self._interval_position = position
        self._count += 1
        self._alone += ratio is None
        self._interval_count += 1
        self._block += 1
        self._block_sum += value
        size = self._block
        if size < self._stickiness.block:
            return None
        value = self._block_sum / size if size > 1 else value
        self._block, self._block_sum = 0, 0.0
        return self._weigh(self.baseline, value, 1.0 if ratio is None else ratio, size)

    def _gather(self, value: float, metric: str) -> None:
        self._gathered += 1
        self._gathered_sum += value
        if self._gathered == self._size:
            mean = self._gathered_sum / self._size
            margin = _RATE_MARGIN if metric in RATES else _SCORE_MARGIN
            low, high = wilson_bounds(mean, self._size, _Z)
            low, high = max(0.0, low - margin), min(1.0, high + margin)
            self.baseline = Baseline(mean, self._size, low, high)

    def _weigh(self, baseline: Baseline, value: float, ratio: float, size: int) -> Claim | None:
        lower, upper = baseline.lower_limit, baseline.upper_limit
        if ratio < 1.0:
            lower *= ratio
        elif ratio > 1.0:
            upper = min(1.0, upper * ratio)
        self._low = grown(self._low, value, lower)
        self._elevated = grown(self._elevated, 1.0 - value, 1.0 - upper)
        interval = self._interval
        interval.add(value)
        if (low := total(self._low)) >= THRESHOLD:
            return self._claim(SignalName.LOW, low, size)
        if (elevated := total(self._elevated)) >= THRESHOLD:
            return self._claim(SignalName.ELEVATED, elevated, size)
        if interval.half_width < STABLE_WITHIN:
            low, high = interval.bounds()
            if low >= baseline.mean - STABLE_WITHIN and high <= baseline.mean + STABLE_WITHIN:
                return self._claim(SignalName.STABLE, 2 / 0.05, size)
        return None

    def _claim(self, name: SignalName, evidence: float, size: int) -> Claim:
        against_peers = 2 * self._alone < self._count
        own = self._interval_count, self._interval_position
        count, first = own if name is SignalName.STABLE else (self._count, self._chapter)
        made = Claim(name, evidence, self.interval, count, size, against_peers, first, *own)
        self._interval, self._interval_count = RunningInterval(), 0
        if name is not SignalName.STABLE:
            self._low = self._elevated = NO_EVIDENCE
            self._count = self._alone = 0
        self.last_claim, self.last_claim_position = name, self.last_position
        return made

    def state(self) -> dict[str, Any]:
        """All of it as JSON values."""
        frozen = self.baseline
        return {
            "size": self._size,
            "gathered": [self._gathered, self._gathered_sum],
            "baseline": frozen and list(astuple(frozen)),
            "stickiness": list(self._stickiness.state()),
            "recent": list(self.recent),
            "low": list(self._low),
            "elevated": list(self._elevated),
            "interval": list(self._interval.state()),
            "counts": [self._count, self._alone, self._interval_count, self._block, self.missed],
            "blockSum": self._block_sum,
            "positions": [
                self.first_position,
                self._chapter,
                self._interval_position,
                self.last_position,
                self.last_claim_position,
                self.missed_since,
            ],
            "claim": self.last_claim,
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Stream:
        """The stream whose `state()` this is."""
        first, chapter, interval, last, claimed, missed_since = state["positions"]
        made = cls(state["size"], first)
        made._gathered, made._gathered_sum = state["gathered"][0], float(state["gathered"][1])
        made._stickiness = Stickiness(state["stickiness"])
        if state["baseline"] is not None:
            mean, count, lower, upper = state["baseline"]
            made.baseline = Baseline(float(mean), count, float(lower), float(upper))
        made.recent = [float(one) for one in state["recent"]]
        made._low = _parts(state["low"])
        made._elevated = _parts(state["elevated"])
        made._interval = RunningInterval(tuple(float(one) for one in state["interval"]))
        made._count, made._alone, made._interval_count, made._block, made.missed = state["counts"]
        made._block_sum = float(state["blockSum"])
        made._chapter, made._interval_position = chapter, interval
        made.last_position, made.missed_since = last, missed_since
        made.last_claim_position = claimed
        made.last_claim = state["claim"] and SignalName(state["claim"])
        return made


def _parts(state: Sequence[float]) -> Parts:
    a, b, c, d, e, f, g = map(float, state)
    return a, b, c, d, e, f, g
