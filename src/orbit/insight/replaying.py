"""Replaying: what the detector says of stored telemetry, and what it is worth on such a fleet.

Nobody knows what truly happened in stored telemetry, so its signals are only counted. What they are
worth is measured on fleets drawn from it in runs of ten: as they are, taken as healthy, and with a
quarter of the profiles losing a third of what they deliver. If the past was not healthy, what
counts as a false alarm there may have been a true one.

Memory is bounded by the profiles: of each the last 800 values are kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from orbit.insight.feeding import Event, Feed, Said, delivered_share
from orbit.insight.gate import Score, compared
from orbit.insight.simulation import ROUNDS, Scenario, bootstrapped
from orbit.insight.stream import BASELINE

DROP = 0.3
_MOST_HISTORIES = 20


@dataclass(frozen=True, slots=True)
class Placed:
    """What was said of a namespace."""

    namespace: str
    said: Said


class Replay:
    """A feed for each namespace, none of which is stored, and the shares that were delivered."""

    def __init__(self) -> None:
        self._feeds: dict[str, Feed] = {}
        self._histories: dict[tuple[str, str], deque[float]] = {}
        self.events = 0
        self.first_position = self.last_position = 0

    def take(self, namespace: str, events: Iterable[Event]) -> Iterator[Placed]:
        """Takes a namespace's events in, in the order of positions; yields what they say."""
        feed = self._feeds.setdefault(namespace, Feed())
        for event in events:
            self.events += 1
            self.first_position = self.first_position or event.position
            self.last_position = event.position
            share = delivered_share(event)
            if share is not None and event.profile_id is not None:
                kept = self._histories.setdefault(
                    (namespace, event.profile_id), deque(maxlen=ROUNDS)
                )
                kept.append(min(1.0, share))
            for said in feed.take((event,)):
                yield Placed(namespace, said)

    @property
    def profiles(self) -> int:
        """How many profiles have cycles that ended."""
        return len(self._histories)

    @property
    def histories(self) -> list[list[float]]:
        """The histories of a baseline's length and more, the longest first, at most twenty."""
        long = [list(one) for one in self._histories.values() if len(one) >= BASELINE]
        return sorted(long, key=len, reverse=True)[:_MOST_HISTORIES]

    def scores(self, seed: int, fleets: int) -> list[Score]:
        """How the detectors do on fleets drawn from the histories; none without histories."""
        histories = self.histories
        if not histories:
            return []
        found: list[Score] = []
        for scenario, drop in ((Scenario.HEALTHY, 0.0), (Scenario.DROPPED, DROP)):
            made = [bootstrapped(histories, seed + place, drop) for place in range(fleets)]
            found += compared(scenario, made)
        return found
