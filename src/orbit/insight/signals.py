"""What the detector says: signals, the alarm for missing data, and how a stream stands.

A signal is advice for a person to read: it changes nothing. Each carries all that is needed to
judge it and to compute it again: the evidence and its threshold, the interval, the baseline and
whether it was set against peers, the positions it rests on, and the detector's version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

DETECTOR_VERSION = 3
"""Raised by every change that gives other numbers for the same observations."""

DELIVERED = "delivered"
LATENCY = "latency"
CYCLES = "cycles"
"""No stream is kept of it: the alarm that a profile's cycles stay away is of this metric."""
RATES = frozenset({DELIVERED, LATENCY})
"""Metrics that are shares of yes and no; any other metric is a score."""


class SignalName(StrEnum):
    """What is claimed of a stream."""

    ELEVATED = "elevated_performance"
    LOW = "low_performance"
    STABLE = "stable"


class BaselineKind(StrEnum):
    """What the stream was compared with."""

    PEERS = "peers"
    OWN_HISTORY = "own-history"


INSUFFICIENT_DATA = "insufficient_data"
NO_DATA = "no_data"


@dataclass(frozen=True, slots=True, order=True)
class StreamKey:
    """One metric of one profile under one revision of its configuration."""

    profile_id: str
    revision: str
    metric: str


@dataclass(frozen=True, slots=True)
class Observation:
    """What one cycle came to, at a position of the telemetry stream.

    `value` lies in [0, 1]; of the metric `latency` it is in seconds. None says that a value was
    due and none came. How long a cycle took that a halt held up is no observation.
    """

    position: int
    key: StreamKey
    value: float | None


@dataclass(frozen=True, slots=True)
class Baseline:
    """The stream's first cycles, frozen: their mean, and the limits that count as no change."""

    mean: float
    count: int
    lower_limit: float
    upper_limit: float


@dataclass(frozen=True, slots=True)
class Peer:
    """Another profile's stream: its baseline's mean and its last values.

    `limit`: of latencies the seconds within which a value counts as 1, else None.
    """

    profile_id: str
    revision: str
    mean: float
    limit: float | None
    recent: Sequence[float]


@dataclass(frozen=True, slots=True)
class Basis:
    """What a change of a profile can be held against, of one metric: its past, and its peers.

    `block`: how many values count as one, by their mean, as sticky as they are.
    """

    metric: str
    baseline: Baseline
    block: int
    limit: float | None
    peers: Sequence[Peer]


@dataclass(frozen=True, slots=True)
class Signal:
    """A claim about a stream.

    `evidence` is E at the claim and `threshold` A, for `stable` 1 / alpha twice. `count` is the
    number of observations that it rests on, from `first_position` to `last_position`. `interval`
    is an anytime-valid 95 % interval of the mean of the `interval_count` from
    `interval_position`: a `stable` begins it anew, and not the evidence. `recent` is the mean of
    the last ten, and `peer_ratio` None without peers. So many observations as `averaged` says
    counted as one, by their mean, because outcomes repeat the one before (`autocorrelation`).
    `confidence` is the share of such signals that were right in replay, not a function of E. The
    baseline begins at `baseline_position`.
    """

    name: SignalName
    key: StreamKey
    confidence: float
    evidence: float
    threshold: float
    count: int
    interval: tuple[float, float]
    recent: float
    baseline: Baseline
    baseline_kind: BaselineKind
    peers: int
    peer_ratio: float | None
    autocorrelation: float
    averaged: int
    baseline_position: int
    first_position: int
    interval_position: int
    interval_count: int
    last_position: int
    recommendation: str
    detector_version: int = DETECTOR_VERSION

    def as_json(self) -> dict[str, Any]:
        """As JSON carries it; the same signal always gives the same canonical bytes."""
        return asdict(self) | {"interval": list(self.interval)}


@dataclass(frozen=True, slots=True)
class NoData:
    """The alarm that values were due `missed` times in a row and none came."""

    key: StreamKey
    missed: int
    first_position: int
    last_position: int
    recommendation: str
    name: str = NO_DATA
    detector_version: int = DETECTOR_VERSION

    def as_json(self) -> dict[str, Any]:
        """As JSON carries it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Standing:
    """How a stream stands: its last claim, or `insufficient_data`, and the evidence under way.

    `needed` is how many cycles the baseline still lacks; `low_evidence` and `elevated_evidence`
    are E so far, to be compared with the threshold.
    """

    key: StreamKey
    status: str
    last_claim_position: int | None
    needed: int
    count: int
    low_evidence: float
    elevated_evidence: float
    interval: tuple[float, float]
    missed: int


def alarm_level(said: Signal | NoData, *, is_strong: bool) -> str:
    """How loud it is: `none` (stable), `notice` (better), `warning`, `critical` (much worse)."""
    match said.name:
        case SignalName.STABLE:
            return "none"
        case SignalName.ELEVATED:
            return "notice"
        case SignalName.LOW if is_strong:
            return "critical"
        case _:
            return "warning"


def recommend(name: SignalName, recent: float, baseline: Baseline, ratio: float | None) -> str:
    """What a person might look at first, in plain words."""
    against = f"The last ten came to {recent:.2f}, the baseline to {baseline.mean:.2f}."
    if ratio is not None:
        against += f" Peers are at {ratio:.0%} of theirs."
    match name:
        case SignalName.LOW:
            return f"{against} Look at what changed for this profile alone; nothing was changed."
        case SignalName.ELEVATED:
            return f"{against} See what is different here and whether others could have it."
        case SignalName.STABLE:
            return f"{against} Nothing to do."


def missing(missed: int) -> str:
    """What a person might look at when data stay away."""
    return (
        f"The last {missed} cycles brought no value. Look whether whoever reports it still runs; "
        "until values come, nothing can be said of this stream."
    )


def stopped(turns: int) -> str:
    """What a person might look at when a profile's cycles stay away."""
    return (
        f"No cycle of this profile ended in {turns} turns of its namespace, ten times as long as "
        "ever before. Unless it was stopped on purpose, look at its schedule and who triggers it."
    )
