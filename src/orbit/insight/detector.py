"""The detector: the streams of one namespace, each weighed against its own past and its peers.

Peers of a stream are the streams of the same metric of other profiles, each by the revision it
was last heard under, with a frozen baseline and not silent for longer than `SILENT_ROUNDS` rounds
of all. The peers' ratio is the sum of their last ten observations over ten times the sum of
their baselines, the stream itself left out; fewer than four peers give none (`own-history`).

Values are rounded to a multiple of 2**-20 on entry, so that sums of them are exact in whatever
order they are formed; the totals are therefore not part of the state. Observations come in the
order of their positions. The same observations from an empty detector give the same bytes, from
`state()` on too: how they were cut into batches leaves no trace.

Refused with RequestInvalid: what is no finite number, lies outside [0, 1] (negative latencies),
or comes at a position already passed. What is refused changes nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from orbit.canonical import canonical_json
from orbit.errors import RequestInvalid
from orbit.insight.confidence import confidence_of
from orbit.insight.latency import LatencyScale
from orbit.insight.signals import (
    DETECTOR_VERSION,
    INSUFFICIENT_DATA,
    LATENCY,
    NO_DATA,
    BaselineKind,
    Basis,
    NoData,
    Observation,
    Peer,
    Signal,
    SignalName,
    Standing,
    StreamKey,
    missing,
    recommend,
)
from orbit.insight.stream import BASELINE, LEAST_BASELINE, RECENT, THRESHOLD, Claim, Stream

LEAST_PEERS = 4
SILENT_ROUNDS = 50
SILENT_AFTER = 10
"""So many values that were due and did not come, in a row, are an alarm."""
KEPT_REVISIONS = 4
_GRID = float(2**20)


@dataclass(slots=True)
class _Group:
    """The streams of one metric that count as each other's peers, and their exact totals.

    `heard` maps a profile to its counted revision, the longest silent first; `turns` to the
    number of observations of the metric when it was last heard.
    """

    heard: dict[str, StreamKey]
    turns: dict[str, int]
    turn: int = 0
    recent: float = 0.0
    expected: float = 0.0
    peers: int = 0


class Detector:
    """The streams of one namespace. `baseline` is how many observations are frozen (50 or more).

    Raises RequestInvalid for a smaller baseline.
    """

    def __init__(self, baseline: int = BASELINE) -> None:
        if baseline < LEAST_BASELINE:
            raise RequestInvalid(f"a baseline of {baseline}; expected {LEAST_BASELINE} or more")
        self._size = baseline
        self._streams: dict[StreamKey, Stream] = {}
        self._scales: dict[StreamKey, LatencyScale] = {}
        self._groups: dict[str, _Group] = {}
        self._revisions: dict[tuple[str, str], list[StreamKey]] = {}
        self._changed: set[StreamKey] = set()
        self.position = 0

    def observe(self, observation: Observation) -> tuple[Signal | NoData, ...]:
        """Takes one observation in; returns what it makes the detector say, mostly nothing.

        Raises RequestInvalid.
        """
        key, position, value = observation.key, observation.position, observation.value
        stream = self._streams.get(key)
        self._check(position, stream)
        if value is None:
            return self._missed(self._heard(key, stream, position), key, position)
        value = _checked(value, key.metric)
        stream = self._heard(key, stream, position)
        stream.missed = 0
        if key.metric != LATENCY:
            return self._take(key, stream, position, value)
        scale = self._scales.get(key)
        if scale is None:
            scale = self._scales[key] = LatencyScale(self._size)
        said: tuple[Signal | NoData, ...] = ()
        for one in scale.take(value):
            said += self._take(key, stream, position, one)
        return said

    def hear(self, key: StreamKey) -> None:
        """Says that of what was due something came, though it is no observation yet."""
        stream = self._streams.get(key)
        if stream is not None and stream.missed:
            stream.missed = 0
            self._changed.add(key)

    def standing(self, key: StreamKey) -> Standing:
        """How the stream stands; a stream never heard of has insufficient data."""
        stream = self._streams.get(key)
        if stream is None:
            return Standing(key, INSUFFICIENT_DATA, None, self._size, 0, 0.0, 0.0, (0.0, 1.0), 0)
        status = stream.last_claim.value if stream.last_claim else INSUFFICIENT_DATA
        scale = self._scales.get(key)
        return Standing(
            key,
            NO_DATA if stream.missed >= SILENT_AFTER else status,
            stream.last_claim_position,
            scale.needed if scale and scale.needed else stream.needed,
            stream.count,
            *stream.evidence(),
            stream.interval,
            stream.missed,
        )

    def basis(self, key: StreamKey) -> Basis | None:
        """What a change of the stream's profile can be held against; None without a baseline.

        Peers are those that the stream is compared with now, the longest silent first.
        """
        stream = self._streams.get(key)
        if stream is None or stream.baseline is None:
            return None
        group = self._groups.get(key.metric)
        heard = () if group is None else group.heard.items()
        found = [(one, self._streams[one]) for name, one in heard if name != key.profile_id]
        peers = [
            Peer(one.profile_id, one.revision, peer.baseline.mean, self._limit(one), peer.recent)
            for one, peer in found
            if peer.baseline is not None
        ]
        return Basis(key.metric, stream.baseline, stream.block, self._limit(key), peers)

    @property
    def size(self) -> int:
        """How many streams there are."""
        return len(self._streams)

    def stream_keys(self) -> tuple[StreamKey, ...]:
        """Every stream there is, in order."""
        return tuple(sorted(self._streams))

    def state(self) -> bytes:
        """All of it as canonical JSON: the same observations, the same bytes."""
        streams = [
            [key.profile_id, key.revision, key.metric, self.stream_state(key)]
            for key in self.stream_keys()
        ]
        return canonical_json({**self.head(), "streams": streams})

    def head(self) -> dict[str, Any]:
        """What of the state belongs to no stream: version, position, who is heard in which turn."""
        return {
            "version": DETECTOR_VERSION,
            "size": self.size,
            "baseline": self._size,
            "position": self.position,
            "groups": [
                [
                    metric,
                    group.turn,
                    [[name, key.revision, group.turns[name]] for name, key in group.heard.items()],
                ]
                for metric, group in self._groups.items()
            ],
        }

    def stream_state(self, key: StreamKey) -> dict[str, Any] | None:
        """What of the state belongs to one stream; None for one that is not (or no longer) kept."""
        stream, scale = self._streams.get(key), self._scales.get(key)
        if stream is None:
            return None
        return stream.state() | ({"scale": scale.state()} if scale else {})

    @classmethod
    def restored(cls, state: bytes) -> Detector:
        """The detector whose `state()` this is.

        Raises RequestInvalid for another detector version: rebuild from telemetry then.
        """
        given: dict[str, Any] = json.loads(state)
        streams = ((StreamKey(*names), one) for *names, one in given["streams"])
        return cls.assembled(given, streams)

    @classmethod
    def assembled(
        cls, head: Mapping[str, Any], streams: Iterable[tuple[StreamKey, Mapping[str, Any]]]
    ) -> Detector:
        """The detector of a `head()` and the `stream_state()` of each stream, in any order.

        Raises RequestInvalid for another detector version, and where streams are not those.
        """
        if head["version"] != DETECTOR_VERSION:
            raise RequestInvalid(
                f"state of detector version {head['version']}; this is {DETECTOR_VERSION}: "
                "rebuild it from telemetry"
            )
        made = cls(head["baseline"])
        made.position = head["position"]
        for key, one in streams:
            made._streams[key] = Stream.restored(one)
            made._revisions.setdefault((key.profile_id, key.metric), []).append(key)
            if "scale" in one:
                made._scales[key] = LatencyScale.restored(one["scale"])
        heard = {
            StreamKey(one[0], one[1], group[0]) for group in head["groups"] for one in group[2]
        }
        if made.size != head["size"] or not heard <= made._streams.keys():
            raise RequestInvalid(
                f"state of {head['size']} streams, and not those: rebuild it from telemetry"
            )
        for metric, turn, peers in head["groups"]:
            group = made._groups[metric] = _Group({}, {}, turn)
            for name, revision, heard_at in peers:
                key = group.heard[name] = StreamKey(name, revision, metric)
                group.turns[name] = heard_at
                _count_in(group, made._streams[key], 1)
        return made

    def changed(self) -> frozenset[StreamKey]:
        """The streams that were heard or let go since this was last asked."""
        found, self._changed = frozenset(self._changed), set()
        return found

    def _limit(self, key: StreamKey) -> float | None:
        scale = self._scales.get(key)
        return None if scale is None else scale.limit

    def _check(self, position: int, stream: Stream | None) -> None:
        if position < self.position or (stream and position <= stream.last_position):
            raise RequestInvalid(
                f"an observation at position {position}; "
                f"{stream.last_position if stream else self.position} is passed already"
            )

    def _heard(self, key: StreamKey, stream: Stream | None, position: int) -> Stream:
        """The stream, made if it is new; every observation that is accepted passes here."""
        self.position = position
        if stream is None:
            stream = self._streams[key] = Stream(self._size, position)
            self._keep_revisions(key)
        self._changed.add(key)
        stream.last_position = position
        return stream

    def _take(
        self, key: StreamKey, stream: Stream, position: int, value: float
    ) -> tuple[Signal, ...]:
        group = self._groups.get(key.metric)
        if group is None:
            group = self._groups[key.metric] = _Group({}, {})
        counted = group.heard.pop(key.profile_id, None)
        if counted is not None:
            _count_in(group, self._streams[counted], -1)
        self._drop_silent(group)
        peers = group.peers
        is_judged = peers >= LEAST_PEERS and group.expected > 0
        ratio = group.recent / group.expected if is_judged else None
        claim = stream.take(position, value, key.metric, ratio)
        group.turn += 1
        group.heard[key.profile_id] = key
        group.turns[key.profile_id] = group.turn
        _count_in(group, stream, 1)
        return () if claim is None else (_signal(key, stream, claim, peers, ratio),)

    def _drop_silent(self, group: _Group) -> None:
        while group.heard:
            longest = next(iter(group.heard))
            if group.turn - group.turns[longest] <= SILENT_ROUNDS * (len(group.heard) + 1):
                return
            _count_in(group, self._streams[group.heard.pop(longest)], -1)
            del group.turns[longest]

    def _missed(self, stream: Stream, key: StreamKey, position: int) -> tuple[NoData, ...]:
        if stream.missed == 0:
            stream.missed_since = position
        stream.missed += 1
        if stream.missed != SILENT_AFTER:
            return ()
        words = missing(stream.missed)
        return (NoData(key, stream.missed, stream.missed_since, position, words),)

    def _keep_revisions(self, added: StreamKey) -> None:
        """Keeps the streams of a profile's metric to the revisions heard last."""
        known = self._revisions.setdefault((added.profile_id, added.metric), [])
        known.append(added)
        if len(known) <= KEPT_REVISIONS:
            return
        oldest = min(known, key=lambda one: self._streams[one].last_position)
        group = self._groups.get(added.metric)
        if group and group.heard.get(added.profile_id) == oldest:
            _count_in(group, self._streams[oldest], -1)
            del group.heard[added.profile_id], group.turns[added.profile_id]
        known.remove(oldest)
        self._changed.add(oldest)
        del self._streams[oldest]
        self._scales.pop(oldest, None)


def _count_in(group: _Group, stream: Stream, sign: int) -> None:
    """Adds a stream to its group's totals, or takes it out. Exact: all terms are on the grid."""
    if stream.baseline is None:
        return
    recent = 0.0
    for value in stream.recent:
        recent += value
    group.recent += sign * recent
    group.expected += sign * RECENT * (round(stream.baseline.mean * _GRID) / _GRID)
    group.peers += sign


def _checked(value: float, metric: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RequestInvalid(f"{metric} is {value!r}; expected a finite number")
    if metric == LATENCY:
        if value < 0:
            raise RequestInvalid(f"{metric} is {value}; expected seconds, zero or more")
        return float(value)
    if not 0 <= value <= 1:
        raise RequestInvalid(f"{metric} is {value}; expected a number from 0 to 1")
    return round(value * _GRID) / _GRID


def _signal(
    key: StreamKey, stream: Stream, claim: Claim, peers: int, ratio: float | None
) -> Signal:
    baseline = stream.baseline
    assert baseline is not None
    recent = math.fsum(stream.recent) / len(stream.recent)
    kind = BaselineKind.PEERS if claim.is_against_peers else BaselineKind.OWN_HISTORY
    return Signal(
        claim.name,
        key,
        confidence_of(claim.name, kind, claim.evidence),
        claim.evidence,
        claim.evidence if claim.name is SignalName.STABLE else THRESHOLD,
        claim.count,
        claim.interval,
        recent,
        baseline,
        kind,
        peers,
        ratio,
        stream.autocorrelation,
        claim.averaged,
        stream.first_position,
        claim.first_position,
        claim.interval_position,
        claim.interval_count,
        stream.last_position,
        recommend(claim.name, recent, baseline, ratio),
    )
