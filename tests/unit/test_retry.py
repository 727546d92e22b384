"""Retry delays: bounds of full jitter, huge retry numbers, spans, `Retry-After`."""

from __future__ import annotations

import math
import random
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orbit.execution.retry import (
    FLOOR_SECONDS,
    Backoff,
    full_jitter,
    parse_retry_after,
    retry_span,
    with_retry_after,
)

NOW = datetime(2026, 7, 1, 6, 0, tzinfo=UTC)
ALMOST_ONE = math.nextafter(1.0, 0.0)

exactly = settings(derandomize=True, deadline=None, max_examples=200)
backoffs = st.builds(
    Backoff, st.floats(0, 1e6), st.floats(1, 1e3), st.one_of(st.floats(0, 1e6), st.just(300.0))
)
retries = st.one_of(st.integers(1, 50), st.integers(1, 10**400))
draws = st.floats(0, ALMOST_ONE)


@exactly
@given(backoffs, retries, draws, st.floats(0, 10))
@example(Backoff(1.0, 2.0, 300.0), 10**400, ALMOST_ONE, FLOOR_SECONDS)
@example(Backoff(1.0, 1.0, 300.0), 10**400, ALMOST_ONE, FLOOR_SECONDS)
@example(Backoff(1e6, 1e3, 1e-9), 1, ALMOST_ONE, 10.0)
def test_a_delay_lies_between_floor_and_cap(
    backoff: Backoff, retry: int, draw: float, floor: float
) -> None:
    """Whatever is drawn and however late the retry, floor <= delay <= ceiling <= cap."""
    ceiling = backoff.ceiling_seconds(retry)
    delay = full_jitter(backoff, retry, lambda: draw, floor)
    assert min(floor, ceiling) <= delay <= ceiling <= backoff.cap_seconds


@exactly
@given(backoffs, retries)
def test_ceilings_never_fall(backoff: Backoff, retry: int) -> None:
    """A later retry's ceiling is at least the one before it."""
    assert backoff.ceiling_seconds(retry) <= backoff.ceiling_seconds(retry + 1)


def test_ceilings_double_up_to_the_cap() -> None:
    """The ceilings of the default retry settings, written out."""
    backoff = Backoff(1.0, 2.0, 300.0)
    ceilings = [backoff.ceiling_seconds(retry) for retry in range(1, 12)]
    assert ceilings == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    assert Backoff(2.0, 1.0, 300.0).ceiling_seconds(10**400) == 2.0


def test_a_delay_uses_its_whole_range() -> None:
    """The jitter is full: the lowest draw gives the floor, the highest almost the ceiling."""
    backoff = Backoff(1.0, 2.0, 300.0)
    assert full_jitter(backoff, 4, lambda: 0.0) == FLOOR_SECONDS
    assert full_jitter(backoff, 4, lambda: ALMOST_ONE) == pytest.approx(8.0)
    assert full_jitter(backoff, 4, lambda: 0.5) == pytest.approx((8.0 + FLOOR_SECONDS) / 2)


def test_the_first_retry_is_number_one() -> None:
    """Retry zero is a mistake of the caller, not a short delay."""
    with pytest.raises(ValueError, match="first retry is 1"):
        full_jitter(Backoff(1.0, 2.0, 300.0), 0, lambda: 0.5)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ((-1.0, 2.0, 300.0), "base_seconds"),
        ((1.0, 0.5, 300.0), "factor"),
        ((1.0, 2.0, -1.0), "cap_seconds"),
        ((math.nan, 2.0, 300.0), "base_seconds"),
        ((1.0, math.inf, 300.0), "factor"),
        ((1.0, 2.0, math.inf), "cap_seconds"),
    ],
)
def test_a_senseless_backoff_is_refused(values: tuple[float, float, float], name: str) -> None:
    """Negative, shrinking and endless settings are refused by name."""
    with pytest.raises(ValueError, match=name):
        Backoff(*values)


@exactly
@given(backoffs, st.integers(0, 60))
def test_a_span_is_the_sum_of_its_delays(backoff: Backoff, count: int) -> None:
    """Shortest and longest are what the lowest and highest draws add up to."""
    numbers = range(1, count + 1)
    span = retry_span(backoff, count)
    shortest = math.fsum(full_jitter(backoff, retry, lambda: 0.0) for retry in numbers)
    longest = math.fsum(backoff.ceiling_seconds(retry) for retry in numbers)
    assert span == pytest.approx((shortest, (shortest + longest) / 2, longest))


def test_the_expected_span_is_the_average() -> None:
    """Over many sequences of retries, the mean total is the expected one."""
    backoff, source = Backoff(1.0, 2.0, 20.0), random.Random(7)
    totals = [
        sum(full_jitter(backoff, retry, source.random) for retry in range(1, 7))
        for _ in range(4000)
    ]
    expected = retry_span(backoff, 6).expected_seconds
    assert sum(totals) / len(totals) == pytest.approx(expected, rel=0.02)


def test_a_span_of_very_many_retries_is_there_at_once() -> None:
    """Past the cap the sum is a product; a constant delay is one from the start."""
    assert retry_span(Backoff(1.0, 2.0, 4.0), 10**12).longest_seconds == 3 + 4.0 * (10**12 - 2)
    assert retry_span(Backoff(3.0, 1.0, 4.0), 10**12).longest_seconds == 3.0 * 10**12
    assert retry_span(Backoff(0.0, 2.0, 4.0), 10**12) == (0, 0, 0)


@exactly
@given(st.floats(0, 300), st.none() | st.floats(), st.floats(0, 3600))
def test_retry_after_only_delays_and_is_capped(
    delay: float, asked: float | None, cap: float
) -> None:
    """The answer is never sooner than the own delay and never beyond it by more than the cap."""
    result = with_retry_after(delay, asked, cap)
    assert delay <= result <= max(delay, cap)
    if asked is None or math.isnan(asked) or asked < 0:
        assert result == delay
    elif asked <= cap:
        assert result == max(delay, asked)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("120", 120.0),
        (" 0 ", 0.0),
        ("1.5", 1.5),
        ("9" * 5000, math.inf),
        ("Wed, 01 Jul 2026 06:01:30 GMT", 90.0),
        ("Wednesday, 01-Jul-26 06:01:30 GMT", 90.0),
        ("Wed Jul  1 06:01:30 2026", 90.0),
        ("Wed, 01 Jul 2026 08:01:30 +0200", 90.0),
        ("Wed, 01 Jul 2026 05:00:00 GMT", 0.0),
        ("-1", None),
        ("1e3", None),
        ("nan", None),
        ("inf", None),
        ("", None),
        ("soon", None),
        ("\u0661\u0662", None),
        ("Wed, 99 Jul 2026 06:01:30 GMT", None),
    ],
)
def test_retry_after_table(value: str, seconds: float | None) -> None:
    """Seconds and the three forms of HTTP date are read; garbage is no answer."""
    assert parse_retry_after(value, NOW) == seconds


@exactly
@given(st.text(max_size=60) | st.text("0123456789 :,-+GMTJulWed", max_size=40))
def test_any_header_is_seconds_or_nothing(value: str) -> None:
    """No header makes parsing fail, and what is read can be used as a delay."""
    seconds = parse_retry_after(value, NOW)
    assert seconds is None or seconds >= 0
    assert 1.0 <= with_retry_after(1.0, seconds, 300.0) <= 300.0


@exactly
@given(st.integers(0, 10**6))
def test_dates_come_back_as_written(seconds: int) -> None:
    """An HTTP date so many seconds ahead is that many seconds."""
    header = format_datetime(NOW + timedelta(seconds=seconds), usegmt=True)
    assert parse_retry_after(header, NOW) == seconds
