"""What a bulk requeue does next: pure arithmetic of canaries, rate and limits."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orbit.execution.requeues import (
    LARGEST_STEP,
    TICK_SECONDS,
    BatchState,
    End,
    Pace,
    Phase,
    Progress,
    Step,
    next_move,
)

PACES = st.builds(
    Pace,
    canary=st.integers(0, 50),
    rate=st.none() | st.floats(0.01, 1000),
    size_limit=st.none() | st.integers(1, 3000),
)


@example(Pace(rate=0.95), 0)  # 0.95 * (1 / 0.95) is less than 1
@given(PACES, st.integers(0, 5000))
def test_a_batch_ends_and_has_requeued_what_it_may(pace: Pace, letters: int) -> None:
    """Canaries first, never more than the limit, never nothing for ever; then it is finished."""
    phase = Phase.CANARY if pace.canary else Phase.FLOWING
    requeued, is_exhausted, elapsed = 0, False, max(1.0, 1 / pace.rate) if pace.rate else 0.0
    move: Step | End | None = None
    for _ in range(2 * letters + 200):
        move = next_move(pace, Progress(phase, requeued, is_exhausted, False, elapsed))
        if isinstance(move, End):
            break
        count = min(move.count, letters - requeued)
        assert 0 <= move.count <= LARGEST_STEP
        if move.phase is Phase.CANARY:
            assert requeued + move.count <= pace.canary
        phase, is_exhausted = move.phase, is_exhausted or count < move.count
        requeued, elapsed = requeued + count, move.owed_seconds + move.rest_seconds
    assert isinstance(move, End)
    assert move.state is BatchState.FINISHED
    limit = letters if pace.size_limit is None else pace.size_limit
    assert requeued == min(letters, limit)


@given(st.floats(0.01, 1000), st.lists(st.floats(0, 100), min_size=1, max_size=200))
def test_no_looking_often_or_late_exceeds_the_rate(rate: float, waits: list[float]) -> None:
    """In any time no more than the rate gives, and what one look may make up for."""
    owed, count = 0.0, 0
    for wait in waits:
        move = next_move(Pace(rate=rate), Progress(Phase.FLOWING, 0, False, False, owed + wait))
        assert isinstance(move, Step)
        assert move.count <= max(1.0, rate * TICK_SECONDS) + 1e-6
        assert move.rest_seconds >= 0
        count, owed = count + move.count, move.owed_seconds
    assert count <= rate * sum(waits) + 1e-6


@pytest.mark.parametrize("phase", Phase)
def test_a_batch_waits_for_the_jobs_that_are_out(phase: Phase) -> None:
    """With nothing left to requeue its end still waits for the last attempt."""
    waiting = next_move(Pace(canary=3), Progress(phase, 3, True, True, 5.0))
    assert waiting == Step(phase, 0, TICK_SECONDS)
    assert isinstance(next_move(Pace(canary=3), Progress(phase, 3, True, False, 5.0)), End)
