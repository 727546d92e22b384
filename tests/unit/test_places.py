"""Places: no lane takes what others need, none is left out, and the sums are right."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from orbit.endpoints import Endpoint
from orbit.execution.dispatch import LaneKey
from orbit.services.places import Places

COUNT = 64
FAST, WELL = ("brand-a", "fast"), ("brand-a", "well")


class StillClock:
    """A clock that a test moves."""

    at = 1.0

    def monotonic(self) -> float:
        """Seconds."""
        return self.at


def places(
    clock: StillClock, count: int = COUNT, cap: int = 128, on_unknown: str = "retry"
) -> Places[LaneKey]:
    """Places for lanes with a cap."""
    endpoint = Endpoint("any", "http://127.0.0.1:9/", max_concurrency=cap, on_unknown=on_unknown)
    return Places(count, lambda _: endpoint, clock)  # type: ignore[arg-type]


def claim(found: Places[LaneKey], *due: LaneKey) -> Counter[LaneKey]:
    """Claims all that is to be claimed of lanes that have jobs without end."""
    shares = found.shares(due)
    for lane, jobs in shares.items():
        for _ in range(jobs):
            found.add(lane, lane)
    return Counter(shares)


def test_a_lane_alone_takes_all() -> None:
    """Its cap is the only bound."""
    found = places(StillClock())
    assert claim(found, FAST) == {FAST: COUNT}
    assert Counter(found.take([FAST])) == {FAST: COUNT}
    assert claim(places(StillClock(), cap=5), FAST) == {FAST: 5}


def busy(clock: StillClock, on_unknown: str = "retry") -> Places[LaneKey]:
    """Places all taken by a lane that has just ended as many attempts."""
    found = places(clock, on_unknown=on_unknown)
    claim(found, FAST)
    for _ in range(2):
        for lane in list(found.take([FAST])):
            found.leave(lane)
            found.settle(lane)
        claim(found, FAST)
        clock.at += 0.031
    return found


def test_what_was_claimed_ahead_leaves_places_to_others() -> None:
    """A lane that was fast and now hangs gets half, whatever of it is claimed already."""
    found = busy(StillClock())
    taken = len(list(found.take([FAST])))
    assert taken == COUNT
    assert len(found._waiting[FAST]) > COUNT // 2, "as many as it ended"
    for _ in range(COUNT // 2 + 1):  # these end while the other lane has come
        found.leave(FAST)
        found.settle(FAST)
        list(found.take([FAST, WELL]))
    assert claim(found, FAST, WELL)[WELL] > 0
    begun = Counter(found.take([FAST, WELL]))
    assert begun[WELL] > 0
    assert found.free > 0


@pytest.mark.parametrize("claim_seconds", [0.002, 0.01, 0.05])
@pytest.mark.parametrize("send_seconds", [0.001, 0.003, 0.01])
def test_no_lane_is_left_behind(send_seconds: float, claim_seconds: float) -> None:
    """Beside two that hang eight lanes share the last place: none has all of its turns."""
    clock, backlog = StillClock(), 48
    found = places(clock, 4)
    lanes = [("brand-a", str(number)) for number in range(10)]
    left, sent = Counter(dict.fromkeys(lanes, backlog)), Counter[LaneKey]()
    flying: list[tuple[float, LaneKey]] = []
    claimed: tuple[float, dict[LaneKey, int]] = (0.0, {})
    while max(sent.values(), default=0) < backlog:
        due = [lane for lane in lanes if left[lane]]
        if not claimed[1] and (rooms := found.shares(due)):
            found.served(list(rooms), clock.at)
            claimed = clock.at + claim_seconds, rooms
        ends = [at for at, lane in flying if lane in lanes[2:]]
        clock.at = max(clock.at, min([*ends, claimed[0] if claimed[1] else clock.at + 0.05]))
        if claimed[1] and claimed[0] <= clock.at:
            for lane in Counter(claimed[1]).elements():
                found.add(lane, lane)
            left -= Counter(claimed[1])
            claimed = 0.0, {}
        for at, lane in list(flying):
            if at <= clock.at and lane in lanes[2:]:
                flying.remove((at, lane))
                found.leave(lane)
                found.settle(lane)
                sent[lane] += 1
        flying += [(clock.at + send_seconds, lane) for lane in found.take(due)]
    assert min(sent[lane] for lane in lanes[2:]) >= backlog // 2


def test_what_may_not_be_lost_is_not_claimed_ahead() -> None:
    """Where an unknown outcome is left to a person, only what may begin is claimed."""
    found = busy(StillClock(), on_unknown="hold")
    list(found.take([FAST]))
    assert claim(found, FAST) == {}


@pytest.mark.parametrize("seed", range(20))
def test_lanes_share_in_any_order_of_events(seed: int) -> None:
    """At every step: no more than there are, nobody takes the half of another, no sum is off."""
    chance, clock = random.Random(seed), StillClock()
    count, cap = chance.choice([1, 2, 7, 32]), chance.choice([1, 3, 100])
    found = places(clock, count, cap)
    lanes = [("brand-a", str(number)) for number in range(chance.choice([2, 3, 9]))]
    flying: Counter[LaneKey] = Counter()
    unsettled: Counter[LaneKey] = Counter()
    held: Counter[LaneKey] = Counter()
    for _ in range(400):
        due = chance.sample(lanes, chance.randrange(len(lanes) + 1))
        held += claim(found, *due)
        free = count - flying.total()
        is_alone = len({*due, *(held - unsettled)}) <= 1
        for lane in found.take(due):
            assert is_alone or flying[lane] < free
            flying[lane] += 1
            free -= 1
        assert free == found.free >= 0
        assert max(held.values(), default=0) <= cap
        for lane in list(flying.elements()):
            if chance.random() < 0.3:
                found.leave(lane)
                flying[lane] -= 1
                unsettled[lane] += 1
        for lane in list(unsettled.elements()):
            if chance.random() < 0.5:
                found.settle(lane)
                unsettled[lane] -= 1
                held[lane] -= 1
        clock.at += chance.random() * 0.05
    for _ in range(count + 10 * cap * len(lanes)):
        for lane in [*found.take([]), *flying.elements()]:
            found.leave(lane)
        flying.clear()
    assert found.free == count
