"""Probation: whether a change of a profile made it worse, against peers that did not change.

What the change is held against is written down before it is made: per metric the profile's frozen
baseline, and the peers with theirs. After it, each cycle of the profile under its new revision is
a bet against "no worse than before, if the peers had it as before": an e-process, with limits and
blocks of sticky outcomes as the detector has them. That it ever reaches its threshold while nothing
became worse has a probability of at most `ALPHA`, over all metrics and namespaces together. Such a
bet is lost for harm that sets in later, so the detector's own evidence, which begins anew with each
cycle, is watched too, at its own threshold. A peer that is heard under another revision is one that
changed, and counts no more.

A bet begins at once, so an outage of all must not look like the change's: a cycle is weighed when
enough peers were heard after it, by their last few, and at the latest ten cycles on.

`breached` is said once and for all. `kept` only where the anytime-valid interval of every metric
lies above what the peers' cycles since the change let one expect, less the detector's margin for
"stable", with enough peers, and only while these are well. All else is `inconclusive`. All of this
is pure: the same events give the same verdict.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from orbit.insight.detector import LEAST_PEERS
from orbit.insight.evidence import (
    NO_EVIDENCE,
    NO_WAGER,
    Parts,
    RunningInterval,
    grown,
    total,
    wagered,
)
from orbit.insight.feeding import Event, Feed
from orbit.insight.signals import LATENCY, Basis, Observation
from orbit.insight.stream import STABLE_WITHIN, THRESHOLD

ALPHA = 0.05
MOST_PEERS = 50
_WINDOW = 3  # of each peer: enough to be sure what all have in common, few enough to see it soon
_MOST_WAITING = 10
_WELL = 0.9  # of what peers had in their baselines: in hard times nothing is shown to be good


class Verdict(StrEnum):
    """What comes of a probation."""

    BREACHED = "breached"
    KEPT = "kept"
    INCONCLUSIVE = "inconclusive"


def written(position: int, bases: Sequence[Basis]) -> dict[str, Any]:
    """What a namespace's part of a probation is held against, as JSON values.

    Of the peers those heard last; every one would be no better.
    """
    return {
        "position": position,
        "metrics": [
            {
                "metric": one.metric,
                "mean": one.baseline.mean,
                "lower": one.baseline.lower_limit,
                "block": one.block,
                "limit": one.limit,
                "peers": [
                    [peer.profile_id, peer.revision, peer.mean, peer.limit, peer.recent[-_WINDOW:]]
                    for peer in list(one.peers)[-MOST_PEERS:]
                ],
            }
            for one in bases
        ],
    }


@dataclass(slots=True)
class _Peer:
    revision: str
    mean: float
    limit: float | None
    recent: list[float]
    heard_at: int = 0
    total: float = 0.0
    count: int = 0


@dataclass(slots=True)
class _Metric:
    """One metric of the changed profile in one namespace, and of the peers that did not change."""

    name: str
    mean: float
    lower: float
    block: int
    limit: float | None
    of: int
    peers: dict[str, _Peer]
    parts: Parts = NO_WAGER
    later: Parts = NO_EVIDENCE
    interval: RunningInterval = field(default_factory=RunningInterval)
    count: int = 0
    waiting: deque[tuple[int, float]] = field(default_factory=deque)
    gathered: list[float] = field(default_factory=list)
    breached_at: int | None = None

    @property
    def ratio(self) -> float | None:
        """How the peers do against their baselines; None where there are too few."""
        expected = sum(len(one.recent) * one.mean for one in self.peers.values())
        if len(self.peers) < LEAST_PEERS or expected <= 0:
            return None
        return sum(sum(one.recent) for one in self.peers.values()) / expected

    @property
    def is_kept(self) -> bool:
        """Whether it is certain enough that it did not become worse."""
        heard = [one for one in self.peers.values() if one.count]
        expected = sum(one.count * one.mean for one in heard)
        if len(heard) < LEAST_PEERS or expected <= 0:
            return False
        ratio = sum(one.total for one in heard) / expected
        low, _ = self.interval.bounds()
        return ratio >= _WELL and low >= self.mean * ratio - STABLE_WITHIN

    def take(self, position: int, value: float) -> None:
        """One more value of the changed profile."""
        self.count += 1
        self.waiting.append((self.count, value))
        self._weigh_ready(position)

    def hear(self, position: int, peer: _Peer, value: float) -> None:
        """One more value of a peer."""
        peer.recent.append(value)
        del peer.recent[:-_WINDOW]
        peer.total, peer.count = peer.total + value, peer.count + 1
        peer.heard_at = self.count
        self._weigh_ready(position)

    def _weigh_ready(self, position: int) -> None:
        """Weighs the values after which enough peers were heard, and those that wait too long."""
        needed = LEAST_PEERS if len(self.peers) >= LEAST_PEERS else 0
        while self.waiting and self.breached_at is None:
            turn, value = self.waiting[0]
            heard = sum(one.heard_at >= turn for one in self.peers.values())
            if heard < needed and len(self.waiting) <= _MOST_WAITING:
                return
            self.waiting.popleft()
            self._weigh(position, value)

    def _weigh(self, position: int, value: float) -> None:
        if self.block > 1:
            self.gathered.append(value)
            if len(self.gathered) < self.block:
                return
            value, self.gathered = sum(self.gathered) / self.block, []
        ratio = self.ratio
        limit = self.lower if ratio is None else self.lower * min(1.0, ratio)
        self.parts = wagered(self.parts, value, limit)
        self.later = grown(self.later, value, limit)
        self.interval.add(value)
        is_early = total(self.parts) >= self.of / ALPHA
        if is_early or total(self.later) >= self.of * THRESHOLD:
            self.breached_at = position

    def told(self) -> dict[str, Any]:
        """How it stands, as JSON values."""
        return {
            "evidence": total(self.parts),
            "threshold": self.of / ALPHA,
            "laterEvidence": total(self.later),
            "laterThreshold": self.of * THRESHOLD,
            "observations": self.count,
            "interval": list(self.interval.bounds()),
            "baseline": self.mean,
            "peers": len(self.peers),
            "peerRatio": self.ratio,
            "breachedAt": self.breached_at,
            "isKept": self.is_kept,
        }


class Trial:
    """A change on probation in one namespace; `of` is how many metrics there are in all of them.

    Takes events after the position that was written down, in their order, as the detector does.
    """

    def __init__(self, profile_id: str, revision: str, basis: Mapping[str, Any], of: int) -> None:
        self._profile_id, self._revision = profile_id, revision
        self._metrics = {one["metric"]: _metric(one, of) for one in basis["metrics"]}
        self._feed = Feed(observer=self)
        self._feed.pass_over(basis["position"])

    @property
    def position(self) -> int:
        """Up to where events were taken in."""
        return self._feed.position

    @property
    def is_breached(self) -> bool:
        """Whether it became worse. Then it takes nothing more in."""
        return any(one.breached_at is not None for one in self._metrics.values())

    @property
    def is_kept(self) -> bool:
        """Whether each of its metrics is."""
        return all(one.is_kept for one in self._metrics.values())

    def take(self, events: Sequence[Event], last_position: int) -> None:
        """Takes the events up to a position in."""
        for event in events:
            if self.is_breached:
                return
            list(self._feed.take([event]))
        if not self.is_breached:
            self._feed.pass_over(last_position)

    def observe(self, observation: Observation) -> tuple[()]:
        """An observation of any profile; the feed hands them on."""
        key, value = observation.key, observation.value
        metric = self._metrics.get(key.metric)
        if metric is None or value is None:
            return ()
        if key.profile_id == self._profile_id:
            if key.revision == self._revision:
                metric.take(observation.position, _scaled(key.metric, value, metric.limit))
            return ()
        peer = metric.peers.get(key.profile_id)
        if peer is not None and peer.revision != key.revision:
            del metric.peers[key.profile_id]
        elif peer is not None:
            scaled = _scaled(key.metric, value, peer.limit)
            metric.hear(observation.position, peer, scaled)
        return ()

    def told(self) -> dict[str, Any]:
        """How it stands, as JSON values."""
        metrics = {name: one.told() for name, one in sorted(self._metrics.items())}
        return {"position": self.position, "metrics": metrics}


def trials_of(profile_id: str, trial: Mapping[str, Any]) -> dict[str, Trial]:
    """The trials, by namespace, of what was written down with a change."""
    parts: Mapping[str, Any] = trial["namespaces"]
    of = sum(len(one["metrics"]) for one in parts.values())
    return {name: Trial(profile_id, trial["revision"], one, of) for name, one in parts.items()}


def verdict_of(trials: Mapping[str, Trial]) -> Verdict:
    """What comes of all of a change's trials together."""
    if any(one.is_breached for one in trials.values()):
        return Verdict.BREACHED
    return Verdict.KEPT if all(one.is_kept for one in trials.values()) else Verdict.INCONCLUSIVE


def _metric(given: Mapping[str, Any], of: int) -> _Metric:
    peers = {
        name: _Peer(revision, float(mean), limit, [float(one) for one in recent])
        for name, revision, mean, limit, recent in given["peers"]
    }
    return _Metric(
        given["metric"],
        float(given["mean"]),
        float(given["lower"]),
        int(given["block"]),
        given["limit"],
        of,
        peers,
    )


def _scaled(metric: str, value: float, limit: float | None) -> float:
    """A share or score as it is; of latencies whether it lies within the limit."""
    if metric == LATENCY:
        return float(limit is not None and value <= limit)
    return min(1.0, max(0.0, value))
