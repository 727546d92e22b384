"""Fleets whose truth is known: simulated, or bootstrapped from healthy history.

A fleet is a table of values, one row a round in which each profile runs once, with what truly
changed, where, and in which direction. The same seed always gives the same fleet: only
`random.Random.random()` is drawn, whose sequence Python keeps across versions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import fsum
from random import Random

PROFILES = 20
ROUNDS = 800
_WORSE_SHARE = 0.25
_FIRST_CHANGE, _LAST_CHANGE = 300, 500
_OUTAGES = 3
_OUTAGE_FACTOR = 0.5
_STAYS = 0.5  # of sticky outcomes: how often one is simply the one before it
_BLOCK = 10  # bootstrapped history is drawn in runs of this length, so that stickiness survives


class Scenario(StrEnum):
    """What a simulated fleet goes through."""

    HEALTHY = "healthy"
    DROPPED = "dropped"
    LIFTED = "lifted"
    SHARED_OUTAGE = "shared-outage"
    STICKY = "sticky"


@dataclass(frozen=True, slots=True)
class Change:
    """A profile's true change: from which round on, and the mean before and after."""

    round: int
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Fleet:
    """Rounds of values in [0, 1], one per profile, and each profile's true change or None."""

    rounds: tuple[tuple[float, ...], ...]
    changes: tuple[Change | None, ...]


def simulated(scenario: Scenario, seed: int) -> Fleet:
    """A fleet of 20 profiles and 800 rounds; except in `healthy` a quarter truly change.

    Means lie between 0.85 and 0.95. A drop takes 0.1, 0.2, 0.3 or 0.4 off, a lift of means of
    0.5 to 0.6 adds as much. A shared outage halves every mean for 20 to 60 rounds, three times.
    Sticky outcomes repeat the one before them half of the time.
    """
    random = Random(f"{scenario} {seed}")
    draw = random.random
    low, width = (0.5, 0.1) if scenario is Scenario.LIFTED else (0.85, 0.1)
    means = [low + width * draw() for _ in range(PROFILES)]
    changing = 0 if scenario is Scenario.HEALTHY else round(PROFILES * _WORSE_SHARE)
    sign = 1 if scenario is Scenario.LIFTED else -1
    changes = tuple(
        _change(draw, mean, sign) if place < changing else None for place, mean in enumerate(means)
    )
    outages = _outages(draw) if scenario is Scenario.SHARED_OUTAGE else frozenset[int]()
    stays = _STAYS if scenario is Scenario.STICKY else 0.0
    return Fleet(tuple(_rounds(draw, means, changes, outages, stays)), changes)


def dropped_alone(before: float, after: float, seed: int, rounds: int, at: int) -> Fleet:
    """One profile without peers whose mean changes at round `at`."""
    draw = Random(f"alone {before} {after} {seed}").random
    change = Change(at, before, after)
    values = ((float(draw() < (before if now < at else after)),) for now in range(rounds))
    return Fleet(tuple(values), (change,))


def bootstrapped(histories: Sequence[Sequence[float]], seed: int, drop: float = 0.0) -> Fleet:
    """A fleet drawn from healthy histories, in runs of ten; a quarter lose a share `drop`.

    One profile per history, each at least ten values long. A value is lost by becoming 0.
    """
    draw = Random(f"bootstrap {seed}").random
    columns: list[list[float]] = []
    changes: list[Change | None] = []
    worse = round(len(histories) * _WORSE_SHARE) if drop else 0
    for place, history in enumerate(histories):
        if len(history) < _BLOCK:
            raise ValueError(f"a history of {len(history)} values; expected {_BLOCK} or more")
        column: list[float] = []
        while len(column) < ROUNDS:
            start = int(draw() * (len(history) - _BLOCK + 1))
            column.extend(history[start : start + _BLOCK])
        change = None
        if place < worse:
            mean = fsum(history) / len(history)
            at = _FIRST_CHANGE + int(draw() * (_LAST_CHANGE - _FIRST_CHANGE))
            change = Change(at, mean, mean * (1 - drop))
            column[at:] = [value if draw() >= drop else 0.0 for value in column[at:]]
        columns.append(column[:ROUNDS])
        changes.append(change)
    return Fleet(tuple(zip(*columns, strict=True)), tuple(changes))


def _change(draw: Callable[[], float], mean: float, sign: int) -> Change:
    at = _FIRST_CHANGE + int(draw() * (_LAST_CHANGE - _FIRST_CHANGE))
    size = 0.1 * (1 + int(draw() * 4))
    return Change(at, mean, min(1.0, mean + sign * size))


def _outages(draw: Callable[[], float]) -> frozenset[int]:
    """The rounds in which everything is halved; none in the first 150."""
    found: set[int] = set()
    for _ in range(_OUTAGES):
        start, length = 150 + int(draw() * 590), 20 + int(draw() * 41)
        found.update(range(start, min(ROUNDS, start + length)))
    return frozenset(found)


def _rounds(
    draw: Callable[[], float],
    means: Sequence[float],
    changes: Sequence[Change | None],
    outages: frozenset[int],
    stays: float,
) -> Iterator[tuple[float, ...]]:
    last: list[float] = [0.0] * len(means)
    for now in range(ROUNDS):
        factor = _OUTAGE_FACTOR if now in outages else 1.0
        for place, (mean, change) in enumerate(zip(means, changes, strict=True)):
            true = change.after if change and now >= change.round else mean
            if now == 0 or draw() >= stays:
                last[place] = float(draw() < true * factor)
        yield tuple(last)
