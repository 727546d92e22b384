"""Dispatch without a database: a job's next move, and when a lane is worth a claim."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orbit.endpoints import Endpoint
from orbit.execution.dispatch import Lane, NextMove, RetryPolicy, grain
from orbit.execution.retry import Backoff, full_jitter
from orbit.execution.wire import Outcome, WireResult

NOW = datetime(2026, 7, 1, 6, 0, tzinfo=UTC)
BACKOFF = Backoff(1.0, 2.0, 60.0)
LUCKLESS = RetryPolicy(BACKOFF, lambda: 0.5)

exactly = settings(derandomize=True, deadline=None, max_examples=200)
rates = st.floats(0.001, 1e6)
seconds = st.floats(-1e6, 1e6)
failures = st.sampled_from([Outcome.FAILED, Outcome.NOT_SENT, Outcome.UNKNOWN])


def failed(status: int = 503, retry_after: str | None = None) -> WireResult:
    """An answer that is no success."""
    cause = f"status {status}"
    return WireResult(Outcome.FAILED, status=status, cause=cause, retry_after=retry_after)


def lane(
    due: float = 0.0, probe: float | None = None, tokens: float | None = None, age: float = 0.0
) -> Lane:
    """A lane as a look finds it."""
    return Lane("brand", "one", True, due, probe, tokens, age)


def at_rate(rate: float | None) -> Endpoint:
    """An endpoint with a breaker, and with a rate unless None."""
    return Endpoint("one", "http://127.0.0.1:9/", rate_per_second=rate)


# ---- the next move


@exactly
@given(st.integers(0, 100), st.integers(1, 50))
def test_a_delivered_job_is_done(counted: int, most: int) -> None:
    """However many attempts it took, there is no next one and no cause."""
    delivered = WireResult(Outcome.DELIVERED, status=200)
    assert LUCKLESS.next_move(delivered, counted, most, NOW) == NextMove(None, None)


@exactly
@given(failures, st.integers(0, 100), st.integers(1, 50))
def test_a_job_is_dead_when_its_counted_attempts_are_spent(
    outcome: Outcome, counted: int, most: int
) -> None:
    """Not one attempt earlier; a job whose probes were all spared waits like after its first."""
    move = LUCKLESS.next_move(WireResult(outcome, cause="why"), counted, most, NOW)
    if counted >= most:
        assert move == NextMove(None, "why")
    else:
        delay = full_jitter(BACKOFF, max(counted, 1), LUCKLESS.draw)
        assert move == NextMove(delay, None)


def test_a_permanent_status_ends_a_job_at_once() -> None:
    """Only the statuses that the endpoint names."""
    refused = LUCKLESS.next_move(failed(422), 1, 5, NOW, permanent_statuses={422})
    assert refused == NextMove(None, "status 422")
    assert LUCKLESS.next_move(failed(423), 1, 5, NOW, permanent_statuses={422}).cause is None


def test_only_the_unknown_is_left_to_a_person() -> None:
    """With `on_unknown: hold` what may have arrived stops; what has not goes on."""
    lost = WireResult(Outcome.UNKNOWN, cause="timeout")
    held = LUCKLESS.next_move(lost, 1, 5, NOW, on_unknown="hold")
    assert held == NextMove(None, "unknown, left to a person: timeout")
    assert LUCKLESS.next_move(failed(), 1, 5, NOW, on_unknown="hold").retry_seconds is not None


@pytest.mark.parametrize(
    ("asked", "delay"), [("30", 30.0), ("9999999", 60.0), ("0", 0.525), ("soon", 0.525)]
)
def test_what_the_receiver_asks_for_lengthens_the_wait(asked: str, delay: float) -> None:
    """Up to the cap, never below the own delay; nonsense is passed over."""
    move = LUCKLESS.next_move(failed(429, asked), 1, 5, NOW)
    assert move.retry_seconds == pytest.approx(delay)


def test_a_failure_without_a_cause_is_named_by_its_outcome() -> None:
    """A dead letter always has a cause."""
    assert LUCKLESS.next_move(WireResult(Outcome.NOT_SENT), 5, 5, NOW).cause == "not_sent"


# ---- when a lane is ready


@exactly
@given(seconds, st.none() | seconds)
def test_a_lane_without_a_rate_waits_for_its_job_and_its_probe(
    due: float, probe: float | None
) -> None:
    """The later of the two; a closed breaker holds nothing up."""
    assert lane(due, probe).ready_in_seconds(at_rate(None)) == max(
        due, 0.0 if probe is None else probe
    )


@exactly
@given(rates, seconds)
def test_a_full_bucket_holds_nothing_up(rate: float, due: float) -> None:
    """A lane that has never spent a token waits for its job only."""
    assert lane(due).ready_in_seconds(at_rate(rate)) == lane(due).ready_in_seconds(at_rate(None))


@exactly
@given(rates, st.floats(0, 1e6), st.floats(0, 100), seconds)
def test_a_rate_waits_until_a_claim_is_worth_it(
    rate: float, tokens: float, age: float, due: float
) -> None:
    """When it says so there is a grain of tokens, and there was none any earlier."""
    found = lane(due, None, tokens, age)
    at = found.ready_in_seconds(at_rate(rate))
    wait = lane(due).ready_in_seconds(at_rate(None))
    assert at >= wait
    there = tokens + (age + at) * rate
    assert there >= grain(rate) * (1 - 1e-9) - 1e-3
    if at > wait:
        assert there == pytest.approx(grain(rate), rel=1e-6, abs=1e-3)


@exactly
@given(rates)
def test_a_grain_is_a_job_or_a_tenth_of_a_second(rate: float) -> None:
    """Never less than one job, and never more than the bucket of a second holds."""
    assert grain(rate) == max(1.0, rate / 10) or grain(rate) == pytest.approx(rate / 10)
    assert 1.0 <= grain(rate) <= max(1.0, rate)
