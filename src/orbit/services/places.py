"""Whose turn it is: a node's places, shared among its lanes.

A lane takes places up to its endpoint's `max_concurrency`. While other lanes have jobs due or in
flight it also leaves at least as many free as it holds: one that hangs can take half of the
places, two a third each, and there are always some for a lane that is well. Free places go first
to the lane that has the fewest, among these to the one that has waited longest.

A lane that ends many attempts is given jobs ahead: they begin without waiting for the database, and
the next claim is made while they last. At most twice as many as it ended in the last 30 ms, four
times where it is alone; several lanes together half of that, so that they come forward together.
Each may have one: else those that ended some lately would take every place that comes free.
Not so where an unknown outcome is left to a person, since what is lost with its worker counts as
unknown.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Generic, TypeVar

from orbit.clock import Clock
from orbit.endpoints import Endpoint
from orbit.execution.dispatch import LaneKey

_AHEAD_SECONDS = 0.03  # what a lane ended in such a time, it will have places for in the next
Item = TypeVar("Item")


class Places(Generic[Item]):
    """Up to `count` attempts at once. `endpoint` gives a lane's limits by its endpoint's key."""

    def __init__(self, count: int, endpoint: Callable[[str], Endpoint], clock: Clock) -> None:
        self.count = count
        self._endpoint, self._pace = endpoint, _Pace(clock)
        self._taken: Counter[LaneKey] = Counter()  # places of this node
        self._in_all = 0  # their sum
        self._held: Counter[LaneKey] = Counter()  # places of the lane: claimed and not settled
        self._waiting: dict[LaneKey, deque[Item]] = {}
        self._served_at: dict[LaneKey, float] = {}
        self._was_alone = False

    @property
    def free(self) -> int:
        """How many attempts could begin now."""
        return self.count - self._in_all

    @property
    def is_worth_a_claim(self) -> bool:
        """Whether there is room for half at least of what is claimed at a time."""
        most = self._most_in_all()
        return (self.free + most - self._ahead()) * 2 >= self.count + most

    def add(self, lane: LaneKey, item: Item) -> None:
        """A claimed job waits for its turn; it holds a place of its lane until `settle`."""
        self._held[lane] += 1
        self._waiting.setdefault(lane, deque()).append(item)

    def take(self, due: Collection[LaneKey]) -> Iterator[Item]:
        """What may begin; each takes a place of the node until `leave`."""
        is_alone = self._is_alone(due)
        while self._waiting and self.free > 0:
            lane = min(self._waiting, key=lambda one: self._taken[one])
            if not is_alone and self._taken[lane] >= self.free:
                return
            waiting = self._waiting.pop(lane)
            self._in_all += 1
            self._taken[lane] += 1
            item = waiting.popleft()
            if waiting:
                self._waiting[lane] = waiting  # the last now among its equals
            yield item

    def leave(self, lane: LaneKey) -> None:
        """An attempt is over."""
        self._in_all -= 1
        _take_one(self._taken, lane)
        self._pace.count(lane)

    def settle(self, lane: LaneKey) -> None:
        """What came of a job is committed, or it is given back, or lost."""
        _take_one(self._held, lane)

    def withdraw(self, items: AbstractSet[Item]) -> None:
        """These will not begin, if they wait."""
        for lane, waiting in list(self._waiting.items()):
            kept = deque(item for item in waiting if item not in items)
            if kept:
                self._waiting[lane] = kept
            else:
                del self._waiting[lane]

    def clear(self) -> None:
        """Nothing that waits will begin."""
        self._waiting.clear()

    def served(self, lanes: Collection[LaneKey], at: float) -> None:
        """These lanes were asked for jobs."""
        self._served_at.update(dict.fromkeys(lanes, at))

    def shares(self, due: Sequence[LaneKey]) -> dict[LaneKey, int]:
        """How many jobs to claim: the free places, dealt out one by one, then what is ahead."""
        free, shares = self.free, Counter[LaneKey]()  # what waits although some are free may not
        is_alone = self._was_alone = self._is_alone(due)
        ahead = self._most_in_all() - self._ahead()
        waiting = Counter({lane: len(items) for lane, items in self._waiting.items()})
        turns = [(self._held[lane], self._served_at.get(lane, 0.0), lane) for lane in due]
        heapq.heapify(turns)
        while turns and (free > 0 or ahead > 0):
            held, served_at, lane = heapq.heappop(turns)
            if held >= self._endpoint(lane[1]).max_concurrency:
                continue
            if free > 0 and (is_alone or self._taken[lane] + shares[lane] < free):
                free -= 1
            elif ahead > 0 and waiting[lane] < self._most_ahead(lane):
                waiting[lane] += 1
                ahead -= 1
            else:
                continue
            shares[lane] += 1
            heapq.heappush(turns, (held + 1, served_at, lane))
        return +shares

    def _ahead(self) -> int:
        return sum(map(len, self._waiting.values()))

    def _is_alone(self, due: Collection[LaneKey]) -> bool:
        """Whether there is but one lane with jobs due or in flight."""
        return len({*due, *self._waiting, *self._taken}) <= 1

    def _most_in_all(self) -> int:
        if self._was_alone:
            return min(4 * self._pace.total(), 6 * self.count)
        return min(self._pace.total(), 2 * self.count)

    def _most_ahead(self, lane: LaneKey) -> int:
        is_left_to_a_person = self._endpoint(lane[1]).on_unknown == "hold"
        ended = (4 if self._was_alone else 2) * self._pace.ended(lane)
        return 0 if is_left_to_a_person else max(1, ended)


class _Pace:
    """How many attempts each lane ended in the last stretch of time."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._until = clock, 0.0
        self._now: Counter[LaneKey] = Counter()
        self._before: Counter[LaneKey] = Counter()
        self._sum = 0

    def count(self, lane: LaneKey) -> None:
        """One more ended."""
        self._turn()
        self._now[lane] += 1

    def ended(self, lane: LaneKey) -> int:
        """In the last whole stretch."""
        self._turn()
        return self._before[lane]

    def total(self) -> int:
        """All lanes' together."""
        self._turn()
        return self._sum

    def _turn(self) -> None:
        at = self._clock.monotonic()
        if at >= self._until:
            is_next = at < self._until + _AHEAD_SECONDS
            self._before = self._now if is_next else Counter()
            self._sum = self._before.total()
            self._now, self._until = Counter(), at + _AHEAD_SECONDS


def _take_one(places: Counter[LaneKey], lane: LaneKey) -> None:
    places[lane] -= 1
    if not places[lane]:
        del places[lane]
