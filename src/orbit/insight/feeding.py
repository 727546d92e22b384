"""From events to observations: what a namespace's telemetry says of its profiles.

A cycle that ended says what share was delivered and, unless a halt held it up, how long it took;
one that failed with no job delivered nothing. A reported outcome is one observation for each cycle
and metric: a score for the whole cycle counts at once, those of items and jobs count as their mean
when `OPEN_CYCLES` more cycles are reported on by parts, in whatever order reports come. Of the last
`FED_CYCLES` that counted it is known that they did; what else is reported of them is passed over.
So is what has a unit or lies outside [0, 1], a figure and not a score, and whatever is no number.

Data that stay away are an alarm. Two clocks, neither of the wall: a metric is silent when ten
more cycles of its profile have ended without a value than ever before; a profile is silent when
its namespace has had ten times as many turns without it as ever before (and 50 at least). Turns
are cycles, those of one profile in a row counted once; in a halt there are none. After an alarm
the longer pause is what is known of the profile.

Pure and incremental: the same events give the same state and the same signals, byte for byte,
however they were cut into batches. Events at positions already passed are left out.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, Protocol

from orbit.canonical import canonical_json
from orbit.errors import RequestInvalid
from orbit.insight.detector import Detector
from orbit.insight.signals import (
    CYCLES,
    DELIVERED,
    LATENCY,
    NoData,
    Observation,
    Signal,
    StreamKey,
    stopped,
)
from orbit.insight.stream import BASELINE

FINISHED, FAILED, OUTCOME = "execution_finished", "execution_failed", "outcome_reported"
OPEN_CYCLES, FED_CYCLES = 4, 32
LEAST_HEARD = 20
"""So many cycles or values are heard before their absence means anything."""
LEAST_TURNS = 50
TIMES_AS_LONG = 10

Said = Signal | NoData


class Observer(Protocol):
    """What observations are handed to."""

    def observe(self, observation: Observation) -> tuple[Said, ...]:
        """Takes one in; what it makes the observer say. Raises RequestInvalid for what is none."""
        ...


class Event(Protocol):
    """What is read of an event; positions rise within a namespace."""

    @property
    def position(self) -> int: ...
    @property
    def event_type(self) -> str: ...
    @property
    def profile_id(self) -> str | None: ...
    @property
    def run_id(self) -> str | None: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Stretch:
    """A stretch of a namespace's stream: of its `count` events those that are of use, in order.

    It ends at `last_position`; with `is_last` nothing followed it when it was read.
    """

    events: Sequence[Event]
    count: int
    last_position: int
    is_last: bool


@dataclass(slots=True)
class _Parts:
    """A cycle that is reported on by parts: the revision it ran under, their sum and number."""

    run_id: str
    revision: str
    total: float = 0.0
    count: int = 0


@dataclass(slots=True)
class _Reported:
    """What is reported of one metric of one profile.

    `since` counts cycles that ended since its last value, `longest` is the most there ever were
    between two, `values` how many values there were. `revision`: of the cycle reported on last.
    `open` are the cycles whose parts did not count yet, `fed` those that did, the oldest first.
    """

    since: int = 0
    longest: int = 0
    values: int = 0
    revision: str = ""
    open: list[_Parts] = field(default_factory=list)
    fed: list[str] = field(default_factory=list)

    def add(self, run_id: str, value: float, *, is_part: bool) -> tuple[str, float] | None:
        """Takes a value of a cycle in; what counts now, under which revision."""
        if run_id in self.fed:
            return None
        known = next((one for one in self.open if one.run_id == run_id), None)
        if not is_part:
            if known:
                self.open.remove(known)
            return self._feed(run_id, self.revision, value)
        if known is None:
            known = _Parts(run_id, self.revision)
            self.open.append(known)
        known.total, known.count = known.total + value, known.count + 1
        if len(self.open) <= OPEN_CYCLES:
            return None
        oldest = self.open.pop(0)
        return self._feed(oldest.run_id, oldest.revision, oldest.total / oldest.count)

    def _feed(self, run_id: str, revision: str, value: float) -> tuple[str, float]:
        self.fed.append(run_id)
        del self.fed[:-FED_CYCLES]
        return revision, value

    @classmethod
    def restored(cls, state: list[Any]) -> _Reported:
        since, longest, values, revision, parts, fed = state
        return cls(since, longest, values, revision, [_Parts(*one) for one in parts], list(fed))


@dataclass(slots=True)
class _Heard:
    """A profile: the revision it last ran under, its last turn, its pace, what is reported."""

    revision: str
    turn: int
    position: int
    cycles: int = 0
    longest: int = 0
    reported: dict[str, _Reported] = field(default_factory=dict)

    @property
    def last_turn(self) -> int:
        """The turn up to which its silence means nothing."""
        return self.turn + max(TIMES_AS_LONG * self.longest, LEAST_TURNS)

    def state(self) -> list[Any]:
        reported = {name: list(astuple(one)) for name, one in self.reported.items()}
        return [self.revision, self.turn, self.position, self.cycles, self.longest, reported]

    @classmethod
    def restored(cls, state: list[Any]) -> _Heard:
        revision, turn, position, cycles, longest, reported = state
        metrics = {name: _Reported.restored(one) for name, one in reported.items()}
        return cls(revision, turn, position, cycles, longest, metrics)


class Feed:
    """The detector of one namespace, fed with that namespace's events.

    Another `observer` gets the observations in its place. Raises RequestInvalid for a `baseline`
    that is too small.
    """

    def __init__(self, baseline: int = BASELINE, observer: Observer | None = None) -> None:
        self._detector = Detector(baseline)
        self._observer = observer
        self._profiles: dict[str, _Heard] = {}
        self._turn = 0
        self._last_profile: str | None = None
        self._watched: list[tuple[int, str]] = []  # derived: a heap of who may be overdue when
        self.position = 0

    @property
    def detector(self) -> Detector:
        """The streams, to be read."""
        return self._detector

    def take(self, events: Iterable[Event]) -> Iterator[Said]:
        """Takes events in, in the order of their positions; yields what they make it say."""
        for event in events:
            if event.position <= self.position:
                continue
            self.position = event.position
            if event.profile_id is None:
                continue
            if event.event_type in (FINISHED, FAILED):
                yield from self._ended(event, event.profile_id)
            elif event.event_type == OUTCOME:
                yield from self._reported(event, event.profile_id)

    def pass_over(self, position: int) -> None:
        """Says that up to a position there is nothing more to take in."""
        self.position = max(self.position, position)

    def state(self) -> bytes:
        """All of it as canonical JSON."""
        streams = [
            [key.profile_id, key.revision, key.metric, self._detector.stream_state(key)]
            for key in self._detector.stream_keys()
        ]
        return canonical_json({"head": self.head(), "streams": streams})

    def head(self) -> dict[str, Any]:
        """What of the state belongs to no stream."""
        return {
            "position": self.position,
            "turn": self._turn,
            "lastProfile": self._last_profile,
            "profiles": {name: one.state() for name, one in self._profiles.items()},
            "detector": self._detector.head(),
        }

    @classmethod
    def assembled(
        cls, head: Mapping[str, Any], streams: Iterable[tuple[StreamKey, Mapping[str, Any]]]
    ) -> Feed:
        """The feed of a `head()` and of its streams' states, in any order.

        Raises RequestInvalid for another detector version, and where streams are not those of the
        head: rebuild it from telemetry then.
        """
        made = cls(head["detector"]["baseline"])
        made._detector = Detector.assembled(head["detector"], streams)
        made.position, made._turn = head["position"], head["turn"]
        made._last_profile = head["lastProfile"]
        made._profiles = {name: _Heard.restored(one) for name, one in head["profiles"].items()}
        made._watched = [
            (one.last_turn, name)
            for name, one in made._profiles.items()
            if one.last_turn >= made._turn
        ]
        heapq.heapify(made._watched)
        return made

    def _ended(self, event: Event, profile_id: str) -> Iterator[Said]:
        facts = event.metadata
        heard = self._hear(profile_id, _revision(facts), event.position)
        yield from self._stopped(event.position)
        share = delivered_share(event)
        if share is not None:
            yield from self._observe(event, profile_id, heard.revision, DELIVERED, share)
        seconds = None if facts.get("halted") else _number(facts.get("durationSeconds"))
        if event.event_type == FINISHED and seconds is not None:
            yield from self._observe(event, profile_id, heard.revision, LATENCY, seconds)
        for metric, one in heard.reported.items():
            one.since += 1
            if one.values >= LEAST_HEARD and one.since > one.longest:
                yield from self._observe(event, profile_id, one.revision, metric, None)

    def _reported(self, event: Event, profile_id: str) -> Iterator[Said]:
        facts, heard = event.metadata, self._profiles.get(profile_id)
        metric, value = _text(facts.get("metric")), _number(facts.get("value"))
        if not metric or metric in (DELIVERED, LATENCY, CYCLES) or value is None or value > 1:
            return
        if heard is None or event.run_id is None or facts.get("unit") is not None:
            return  # a figure, or of a cycle from before what is kept
        one = heard.reported.setdefault(metric, _Reported())
        one.values += 1
        one.longest, one.since = max(one.longest, one.since), 0
        one.revision = _revision(facts) or heard.revision
        is_part = facts.get("itemIndex") is not None or facts.get("jobId") is not None
        self._detector.hear(StreamKey(profile_id, one.revision, metric))
        ready = one.add(event.run_id, value, is_part=is_part)
        if ready:
            yield from self._observe(event, profile_id, ready[0], metric, ready[1])

    def _hear(self, profile_id: str, revision: str, position: int) -> _Heard:
        if profile_id != self._last_profile:
            self._turn, self._last_profile = self._turn + 1, profile_id
        heard = self._profiles.get(profile_id)
        if heard is None:
            heard = self._profiles[profile_id] = _Heard(revision, self._turn, position)
        is_watched = heard.cycles > 0 and heard.last_turn >= self._turn - 1
        if heard.cycles:
            heard.longest = max(heard.longest, self._turn - heard.turn)
        heard.cycles += 1
        heard.revision, heard.turn, heard.position = revision, self._turn, position
        if not is_watched:
            heapq.heappush(self._watched, (heard.last_turn, profile_id))
        return heard

    def _stopped(self, position: int) -> Iterator[NoData]:
        """Who has been silent for too long as of this turn, each told of once."""
        found = []
        while self._watched and self._watched[0][0] < self._turn:
            _, profile_id = heapq.heappop(self._watched)
            one = self._profiles[profile_id]
            if one.last_turn >= self._turn:
                heapq.heappush(self._watched, (one.last_turn, profile_id))
            elif one.cycles >= LEAST_HEARD:
                found.append(profile_id)
        for profile_id in sorted(found):
            one = self._profiles[profile_id]
            key, turns = StreamKey(profile_id, one.revision, CYCLES), self._turn - one.turn
            yield NoData(key, turns, one.position, position, stopped(turns))

    def _observe(
        self, event: Event, profile_id: str, revision: str, metric: str, value: float | None
    ) -> tuple[Said, ...]:
        key = StreamKey(profile_id, revision, metric)
        try:
            observer = self._observer or self._detector
            return observer.observe(Observation(event.position, key, value))
        except RequestInvalid:  # no number of its metric; it says nothing, and stops nobody
            return ()


def delivered_share(event: Event) -> float | None:
    """What share of its jobs a cycle delivered, if the event is a cycle's end that says so."""
    if event.event_type not in (FINISHED, FAILED):
        return None
    facts = event.metadata
    jobs, delivered = _number(facts.get("jobs")), _number(facts.get("delivered"))
    if jobs and delivered is not None:
        return delivered / jobs
    return 0.0 if event.event_type == FAILED else None


def _number(value: Any) -> float | None:
    """A finite number from zero, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and value >= 0 else None


def _revision(facts: Mapping[str, Any]) -> str:
    """Of the profile as it was run; of the whole configuration where an event tells no other."""
    return _text(facts.get("profileRevision")) or _text(facts.get("revision"))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
