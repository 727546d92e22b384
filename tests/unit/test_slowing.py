"""Failures slow down who makes them, for a while, and cost a bounded memory."""

from __future__ import annotations

import pytest

from orbit.clock import SystemClock
from orbit.governance.slowing import (
    FREE_FAILURES,
    LONGEST_PAUSE_SECONDS,
    Ration,
    Slowing,
    source_of,
)


class Hand(SystemClock):
    """A clock that is moved by hand."""

    seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


def test_pauses_grow_to_a_minute_and_no_further() -> None:
    """Five tries are free; then each failure costs twice the pause of the last one."""
    clock = Hand()
    slowing = Slowing(clock)
    waits = []
    for _ in range(FREE_FAILURES + 10):
        slowing.failed("a")
        waits.append(slowing.wait_seconds("a"))
        clock.seconds += waits[-1]
    assert waits[: FREE_FAILURES - 1] == [0.0] * (FREE_FAILURES - 1)
    assert waits[FREE_FAILURES - 1 : FREE_FAILURES + 2] == [1.0, 2.0, 4.0]
    assert max(waits) == LONGEST_PAUSE_SECONDS
    assert slowing.wait_seconds("b") == 0.0


def test_who_has_used_up_what_is_free_is_known_for_a_while() -> None:
    """Also between pauses; and no longer than a quarter of an hour after the last failure."""
    clock = Hand()
    slowing = Slowing(clock)
    for _ in range(FREE_FAILURES):
        assert not slowing.is_slowed("a")
        slowing.failed("a")
    assert slowing.is_slowed("a")
    assert not slowing.is_slowed("b")
    clock.seconds = 900.0
    assert slowing.is_slowed("a")
    clock.seconds = 900.5
    assert not slowing.is_slowed("a")


def test_tries_during_a_pause_do_not_lengthen_it() -> None:
    """They are counted, for the trail, and change nothing."""
    clock = Hand()
    slowing = Slowing(clock)
    for _ in range(FREE_FAILURES):
        slowing.failed("a")
    assert [slowing.wait_seconds("a") for _ in range(3)] == [1.0] * 3
    clock.seconds = 1.0
    assert slowing.wait_seconds("a") == 0.0
    assert slowing.failed("a") == 3


def test_a_quarter_of_an_hour_later_all_is_forgotten() -> None:
    """The next failure is a first one."""
    clock = Hand()
    slowing = Slowing(clock)
    for _ in range(FREE_FAILURES + 3):
        slowing.failed("a")
    clock.seconds = 1000.0
    slowing.failed("a")
    assert slowing.wait_seconds("a") == 0.0


def test_the_memory_is_bounded() -> None:
    """However many sources fail, the ones that failed last are known."""
    slowing = Slowing(Hand())
    for number in range(10_000):
        slowing.failed(str(number))
    assert len(slowing._records) == 4096
    assert "9999" in slowing._records


@pytest.mark.parametrize(
    ("host", "source"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9%eth0", "2001:db8:1:2::/64"),
        (None, "unknown"),
    ],
)
def test_a_subscriber_is_one_source(host: str | None, source: str) -> None:
    """Of IPv6 the /64 counts, which one subscriber has whole."""
    assert source_of(host) == source


def test_a_ration_counts_what_it_leaves_out() -> None:
    """So many a minute; the first of the next minute says how many there were besides."""
    clock = Hand()
    ration = Ration(clock, 2)
    assert [ration.take() for _ in range(5)] == [0, 0, None, None, None]
    clock.seconds += 59.0
    assert ration.take() is None
    clock.seconds += 1.0
    assert [ration.take(), ration.take(), ration.take()] == [4, 0, None]
