"""Bounds: what a profile lets autonomy change, and that nothing else is."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orbit.autonomy.bounds import Why, moves_in, why_not
from orbit.autonomy.guard import Switches
from orbit.autonomy.modes import Cause, Mode, in_force
from orbit.profiles.model import Profile
from orbit.profiles.overlays import Move

PLACE = "/execution_rules/intensity"
ALLOW = {"path": PLACE, "minimum": 1, "maximum": 10, "step": 2, "per_day": 4}


def nova(intensity: float = 5, **given: Any) -> Profile:
    """A profile that lets its intensity move, and nothing else."""
    rules = {"intensity": intensity, "other": 5, "word": "x", "is": True}
    allow = [{**ALLOW, **given}]
    return Profile("nova", "Nova", "enabled", execution_rules=rules, autonomy={"allow": allow})


def replacing(value: Any, path: Any = PLACE, op: str = "replace") -> dict[str, Any]:
    """An operation of a JSON Patch."""
    return {"op": op, "path": path, "value": value}


@pytest.mark.parametrize(
    "patch",
    [
        [],
        [replacing(4, "/execution_rules/other")],
        [replacing(4, "/execution_rules/word")],
        [replacing(4, "/execution_rules/none")],
        [replacing("disabled", "/state")],
        [replacing([], "/autonomy/allow")],
        [replacing(4, op="add")],
        [replacing(4, op="remove")],
        [replacing("4")],
        [replacing(True)],
        [replacing(None)],
        [replacing(float("nan"))],
        [replacing(float("inf"))],
        [replacing(4), replacing(3)],
        [replacing(4), replacing(4, "/execution_rules/other")],
        [replacing(4, path=7)],
        [{"op": "replace"}],
    ],
)
def test_what_the_profile_does_not_name_is_not_moved(patch: list[dict[str, Any]]) -> None:
    """Whoever approved it: one operation that may not be, and none is done."""
    assert moves_in(nova(), patch) is Why.NOT_ALLOWED


def test_an_allowed_change_is_a_move_from_what_there_is() -> None:
    """Not from what the proposal was made for."""
    assert moves_in(nova(6), [replacing(4)]) == (Move(PLACE, 6, 4),)


@pytest.mark.parametrize(
    ("old", "new", "today", "why"),
    [
        (5, 4, [], None),
        (5, 3, [], None),
        (5, 2.9, [], Why.BEYOND),
        (5, 7.1, [], Why.BEYOND),
        (1.5, 0.5, [], Why.BEYOND),
        (9.5, 10.5, [], Why.BEYOND),
        (5, 3, [2], None),
        (5, 3, [2, 0.1], Why.DAY_SPENT),
        (5, 3, [-2, 2], Why.DAY_SPENT),
        (5, 5.5, [-2, 1.5], None),
    ],
)
def test_a_change_keeps_to_step_bounds_and_day(
    old: float, new: float, today: list[float], why: Why | None
) -> None:
    """The day counts what was taken back too: up and down again is twice."""
    of_today = [(Move(PLACE, 5, 5 + one),) for one in today]
    of_today.append((Move("/execution_rules/other", 0, 1000),))
    assert why_not(nova(old), (Move(PLACE, old, new),), of_today) is why


def test_a_move_that_was_allowed_is_not_when_the_profile_says_so_no_more() -> None:
    """What was thought out is looked at again."""
    bare = Profile("nova", "Nova", "enabled", execution_rules={"intensity": 5})
    assert why_not(bare, (Move(PLACE, 5, 4),), []) is Why.NOT_ALLOWED


@given(st.lists(st.floats(0.1, 12), max_size=12))
def test_no_sequence_of_changes_leaves_the_bounds_or_the_day(wanted: list[float]) -> None:
    """However often it is tried within a day: bounds hold, steps hold, and so does their sum."""
    value, made = 5.0, list[tuple[Move, ...]]()
    for one in wanted:
        profile = nova(value)
        moves = moves_in(profile, [replacing(one)])
        assert not isinstance(moves, Why)
        if why_not(profile, moves, made) is None:
            made.append(moves)
            value = one
    path = [5.0, *(change[0].new for change in made)]
    assert all(1 <= one <= 10 for one in path)
    assert all(abs(new - old) <= 2 + 1e-6 for old, new in pairwise(path))
    assert sum(abs(new - old) for old, new in pairwise(path)) <= 4 + 1e-6


@pytest.mark.parametrize(
    ("enabled", "mutation", "paused", "why"),
    [
        (False, False, False, Why.DISABLED),
        (True, False, False, Why.NO_MUTATION),
        (False, True, False, Why.DISABLED),
        (True, True, True, Why.PAUSED),
        (True, True, False, None),
    ],
)
def test_both_switches_are_needed(
    enabled: bool,
    mutation: bool,
    paused: bool,
    why: Why | None,
) -> None:
    """And no pause."""
    assert Switches(enabled, mutation, paused).why_off is why


def row(mode: str, **epochs: int) -> dict[str, Any]:
    """A mode as it was said."""
    return {"mode": mode, "namespaces": list(epochs), "epochs": list(epochs.values())}


def fence(epoch: int, *, is_halted: bool = False) -> dict[str, Any]:
    """A fence."""
    return {"epoch": epoch, "is_halted": is_halted}


@pytest.mark.parametrize(
    ("said", "namespaces", "fences", "mode"),
    [
        (None, ["sea"], {}, (Mode.DISARMED, None)),
        (row("shadow", sea=0), ["sea"], {"sea": fence(3)}, (Mode.SHADOW, None)),
        (row("armed", sea=0), ["sea"], {}, (Mode.ARMED, None)),
        (row("armed", sea=2), ["sea"], {"sea": fence(2)}, (Mode.ARMED, None)),
        (row("armed", sea=2), ["sea"], {"sea": fence(3)}, (Mode.DISARMED, Cause.HALT)),
        (row("armed", sea=2), ["sea"], {}, (Mode.DISARMED, Cause.HALT)),
        (
            row("armed", sea=3),
            ["sea"],
            {"sea": fence(3, is_halted=True)},
            (Mode.DISARMED, Cause.HALT),
        ),
        (row("armed", sea=0, air=0), ["sea"], {"air": fence(1)}, (Mode.DISARMED, Cause.HALT)),
        (row("armed", sea=0), ["sea", "air"], {}, (Mode.DISARMED, Cause.REACH)),
        (row("armed", sea=0, air=0), ["sea"], {}, (Mode.ARMED, None)),
    ],
)
def test_armed_holds_until_a_halt_or_another_namespace(
    said: dict[str, Any] | None,
    namespaces: list[str],
    fences: dict[str, dict[str, Any]],
    mode: tuple[Mode, Cause | None],
) -> None:
    """A halt that is over by now disarmed it all the same: its epoch is higher."""
    assert in_force(said, namespaces, fences) == mode
