"""The offline gate: what detectors do on fleets whose truth is known, and the bands they must keep.

A profile counts once, by its first signal in the direction that the scenario asks about (lower;
higher in `lifted`), true if it had changed that way by then. Recall asks for it within 200 cycles
of the change; profiles falsely flagged before their change count as missed. `precision_both`
judges each profile by its first signal in either direction. False alarms are all signals,
repeated ones too, on a profile that had not changed, per 1,000 cycles in which there was nothing to
find. The median delay is over all changes, those never found counting as longer than any.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import inf
from typing import Any

from orbit.insight.confidence import Hits, is_strong
from orbit.insight.detector import Detector
from orbit.insight.naive import NAIVE, Judge
from orbit.insight.signals import BaselineKind, Observation, Signal, SignalName, StreamKey
from orbit.insight.simulation import Change, Fleet, Scenario, dropped_alone, simulated
from orbit.insight.stream import BASELINE, STABLE_WITHIN

OURS = "orbit"
WITHIN = 200
FLEETS = 20
_DIRECTIONS = {SignalName.LOW: -1, SignalName.ELEVATED: 1}
_ALONE_AT, _ALONE_ROUNDS = 300, 1500


@dataclass(frozen=True, slots=True)
class Flag:
    """A detector's word on a profile: after which round, and whether lower (-1) or higher (1)."""

    profile: int
    round: int
    direction: int


@dataclass(frozen=True, slots=True)
class Score:
    """How a detector did in a scenario; None where there was nothing to judge by."""

    scenario: str
    detector: str
    false_alarms_per_1000: float
    precision: float | None
    precision_both: float | None
    recall: float | None
    median_delay: float | None
    flagged_healthy: float | None

    def as_json(self) -> dict[str, Any]:
        """As `--json` shows it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Band:
    """What a score must keep to; a bound that is None is not asked for."""

    scenario: Scenario
    most_false_alarms_per_1000: float
    least_precision: float | None = None
    least_recall: float | None = None


@dataclass(frozen=True, slots=True)
class DelayBand:
    """The median delay that a drop of one profile may take, in cycles."""

    before: float
    after: float
    most_cycles: float


BANDS = (
    Band(Scenario.HEALTHY, 0.2),
    Band(Scenario.DROPPED, 0.2, 0.93, 0.55),
    Band(Scenario.LIFTED, 0.2, 0.85, 0.55),
    Band(Scenario.SHARED_OUTAGE, 0.2, 0.8, 0.5),
    Band(Scenario.STICKY, 0.2, 0.75, 0.4),
)
"""A little outside what was measured: they notice harm."""
DELAY_BANDS = (DelayBand(0.9, 0.8, 500), DelayBand(0.9, 0.5, 25))


@dataclass(frozen=True, slots=True)
class Report:
    """The gate's whole answer: scores, median delays of single drops, and the bands broken."""

    seed: int
    fleets: int
    scores: tuple[Score, ...]
    delays: tuple[Delay, ...]
    broken: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """As `--json` shows it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Delay:
    """How long one profile's drop takes to be found, over `runs` simulated ones without peers.

    `median` counts drops not found as longer than any; `median_of_found` leaves them out.
    """

    before: float
    after: float
    runs: int
    median: float | None
    found_within_200: float
    median_of_found: float | None


def signals_of(fleet: Fleet, *, alone: bool = False) -> Iterator[tuple[int, int, Signal]]:
    """The detector's signals on a fleet, as (round, profile, signal); `alone` hides the peers."""
    width = len(fleet.changes)
    shared = Detector()
    detectors = [Detector() if alone else shared for _ in range(width)]
    keys = [StreamKey(f"{place:04}", "simulated", "delivered") for place in range(width)]
    for now, values in enumerate(fleet.rounds):
        for place, value in enumerate(values):
            said = detectors[place].observe(Observation(now * width + place, keys[place], value))
            for one in said:
                if isinstance(one, Signal):
                    yield now, place, one


def our_flags(fleet: Fleet, *, alone: bool = False) -> list[Flag]:
    """The directional signals of the detector."""
    return [
        Flag(place, now, _DIRECTIONS[one.name])
        for now, place, one in signals_of(fleet, alone=alone)
        if one.name in _DIRECTIONS
    ]


def naive_flags(fleet: Fleet, judge: Judge) -> list[Flag]:
    """The flags of a naive detector: each time its condition begins to hold."""
    found: list[Flag] = []
    for place in range(len(fleet.changes)):
        values = [row[place] for row in fleet.rounds[: BASELINE + 20]]
        was = False
        for now in range(BASELINE + 20, len(fleet.rounds)):
            values.append(fleet.rounds[now][place])
            holds = judge(values)
            if holds and not was:
                found.append(Flag(place, now, -1))
            was = holds
    return found


def score(
    scenario: Scenario, detector: str, judged: Iterable[tuple[Fleet, Sequence[Flag]]]
) -> Score:
    """The score of a detector over fleets of one scenario."""
    asked = 1 if scenario is Scenario.LIFTED else -1
    false = cycles = healthy = flagged_healthy = 0
    first_asked: list[bool] = []
    first_both: list[bool] = []
    delays: list[float] = []
    for fleet, flags in judged:
        truth = {one: _is_true(one, fleet.changes[one.profile]) for one in flags}
        false += sum(not is_true for is_true in truth.values())
        in_direction = _first(one for one in flags if one.direction == asked)
        in_either = _first(flags)
        first_asked += [truth[one] for one in in_direction.values()]
        first_both += [truth[one] for one in in_either.values()]
        for place, change in enumerate(fleet.changes):
            cycles += (change.round if change else len(fleet.rounds)) - BASELINE
            if change is None:
                healthy += 1
                flagged_healthy += place in in_either
            else:
                delays.append(_delay(change, in_direction.get(place)))
    return Score(
        scenario,
        detector,
        1000 * false / cycles,
        _share(sum(first_asked), len(first_asked)),
        _share(sum(first_both), len(first_both)),
        _share(sum(one <= WITHIN for one in delays), len(delays)),
        _median(delays),
        _share(flagged_healthy, healthy),
    )


def calibration(seed: int, fleets: int) -> dict[tuple[SignalName, BaselineKind, bool], Hits]:
    """How often signals are right, by name, baseline and whether E is at least twice A.

    Over all scenarios alike, so a quarter of most fleets truly changes. `stable` is right while
    the true mean is within 0.06 of what it was at first.
    """
    found: dict[tuple[SignalName, BaselineKind, bool], Hits] = {}
    for scenario in Scenario:
        for fleet in (simulated(scenario, seed + place) for place in range(fleets)):
            for is_alone in (False, True):
                for now, place, one in signals_of(fleet, alone=is_alone):
                    level = (one.name, one.baseline_kind, is_strong(one.name, one.evidence))
                    hits = found.get(level, Hits(0, 0))
                    right = hits.right + _is_right(one, now, fleet.changes[place])
                    found[level] = Hits(right, hits.all + 1)
    return found


def single_drop(before: float, after: float, seed: int, runs: int) -> Delay:
    """How long the drop of one profile takes to be found."""
    delays: list[float] = []
    for run in range(runs):
        fleet = dropped_alone(before, after, seed + run, _ALONE_ROUNDS, _ALONE_AT)
        hits = (
            one.round for one in our_flags(fleet) if one.direction < 0 and one.round >= _ALONE_AT
        )
        delays.append(next(hits, inf) - _ALONE_AT + 1)
    found = [one for one in delays if one != inf]
    within = sum(one <= WITHIN for one in delays) / runs
    return Delay(before, after, runs, _median(delays), within, _median(found))


def run_gate(seed: int = 1, fleets: int = FLEETS, *, is_compared: bool = True) -> Report:
    """Runs every scenario over `fleets` fleets and checks the bands.

    Unless `is_compared` is False, beside the naive detectors and ours without peers.
    """
    scores: list[Score] = []
    for scenario in Scenario:
        made = [simulated(scenario, seed + place) for place in range(fleets)]
        if is_compared:
            scores += compared(scenario, made)
        else:
            scores.append(score(scenario, OURS, ((one, our_flags(one)) for one in made)))
    delays = [single_drop(band.before, band.after, seed, 10 * fleets) for band in DELAY_BANDS]
    return Report(seed, fleets, tuple(scores), tuple(delays), tuple(broken_bands(scores, delays)))


def compared(scenario: Scenario, fleets: Sequence[Fleet]) -> list[Score]:
    """The scores of ours, of ours without peers, and of the naive detectors."""
    scores = [score(scenario, OURS, ((one, our_flags(one)) for one in fleets))]
    alone = ((one, our_flags(one, alone=True)) for one in fleets)
    scores.append(score(scenario, f"{OURS}, own history", alone))
    for name, judge in NAIVE.items():
        scores.append(score(scenario, name, ((one, naive_flags(one, judge)) for one in fleets)))
    return scores


def broken_bands(scores: Iterable[Score], delays: Iterable[Delay]) -> Iterator[str]:
    """Each band that is not kept, in words."""
    ours = {one.scenario: one for one in scores if one.detector == OURS}
    for band in BANDS:
        found = ours[band.scenario]
        if found.false_alarms_per_1000 > band.most_false_alarms_per_1000:
            yield (
                f"{band.scenario}: {found.false_alarms_per_1000:.3f} false alarms per 1,000 "
                f"profile-cycles, at most {band.most_false_alarms_per_1000:g}"
            )
        asked = (
            ("precision", found.precision, band.least_precision),
            ("recall", found.recall, band.least_recall),
        )
        for what, value, least in asked:
            if least is not None and (value is None or value < least):
                yield f"{band.scenario}: {what} {_shown(value)}, at least {least:g}"
    for limit, delay in zip(DELAY_BANDS, delays, strict=True):
        if delay.median is None or delay.median > limit.most_cycles:
            yield (
                f"a drop from {limit.before:g} to {limit.after:g} took {_shown(delay.median)} "
                f"cycles at the median, at most {limit.most_cycles:g}"
            )


def _first(flags: Iterable[Flag]) -> dict[int, Flag]:
    found: dict[int, Flag] = {}
    for one in flags:
        found.setdefault(one.profile, one)
    return found


def _delay(change: Change, flag: Flag | None) -> float:
    is_found = flag is not None and flag.round >= change.round
    return flag.round - change.round + 1 if flag and is_found else inf


def _is_right(signal: Signal, now: int, change: Change | None) -> bool:
    if signal.name is SignalName.STABLE:
        has_moved = change is not None and abs(change.after - change.before) > STABLE_WITHIN
        return not (change and has_moved and now >= change.round)
    return _is_true(Flag(0, now, _DIRECTIONS[signal.name]), change)


def _is_true(flag: Flag, change: Change | None) -> bool:
    if change is None or flag.round < change.round:
        return False
    return (change.after - change.before) * flag.direction > 0


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _median(values: Sequence[float]) -> float | None:
    """The median; None of nothing, and where it falls on what was never found."""
    if not values:
        return None
    ordered = sorted(values)
    half = len(ordered) // 2
    found = ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
    return None if found == inf else found


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"
