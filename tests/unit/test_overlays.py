"""Overlays on files: what they come to, what does not fit, and what takes them away again."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orbit.profiles.model import Allowance, Documents, Profile, RunProfile
from orbit.profiles.overlays import (
    STATE,
    Move,
    Origin,
    Overlay,
    Target,
    inverse_of,
    json_patch,
    lay,
    moved,
    moves_of,
    namespaces_of,
)

PLACE = "/execution_rules/intensity"
LIMITS: dict[str, Any] = {"minimum": 1, "maximum": 10, "step": 2}


def documents(intensity: float = 5, **given: Any) -> Documents:
    """Nova, whose intensity may move, and two ways in which it runs."""
    values: dict[str, Any] = {"autonomy": {"allow": [{"path": PLACE, **LIMITS}]}, **given}
    nova = Profile("nova", "Nova", values.pop("state", "enabled"), **values)
    nova = replace(nova, execution_rules={"intensity": intensity, "a/b": [{"~": 1}]})
    runs = (
        RunProfile("daily", "nova", "sea", "enabled"),
        RunProfile("weekly", "nova", "air", "enabled"),
    )
    return Documents((nova,), runs)


def overlay(*moves: Move, origin: Origin = Origin.AUTONOMY, **given: Any) -> Overlay:
    """An overlay on nova."""
    target = {"target": Target.PROFILE, "target_id": "nova", **given}
    return Overlay("id", origin=origin, moves=moves, namespaces=("sea",), actor="ann",
                   reason=None, **target)  # fmt: skip


def state(old: str, new: str, **given: Any) -> Overlay:
    """A person's overlay on a state."""
    return overlay(Move(STATE, old, new), origin=Origin.PERSON, **given)


LOWER, LOWER_YET = overlay(Move(PLACE, 5, 4)), overlay(Move(PLACE, 4, 3))


def test_overlays_lie_on_files_in_their_order() -> None:
    """Each on what the ones before it made; what they do not name stays."""
    laid = lay(documents(), [LOWER, state("enabled", "disabled"), LOWER_YET])
    (nova,) = laid.documents.profiles
    assert nova.execution_rules == {"intensity": 3, "a/b": [{"~": 1}]}
    assert (nova.state, laid.adopted, laid.broken) == ("disabled", (), ())
    assert documents().profiles[0].execution_rules["intensity"] == 5


def test_a_place_is_named_by_a_json_pointer() -> None:
    """Escapes and indexes too."""
    found = lay(documents(), [overlay(Move("/execution_rules/a~1b/0/~0", 1, 2),
                                      origin=Origin.PERSON)])  # fmt: skip
    assert found.documents.profiles[0].execution_rules["a/b"] == [{"~": 2}]


@pytest.mark.parametrize(
    ("files", "laid", "why"),
    [
        (Documents(), LOWER, "do not have it"),
        (documents(7), LOWER, "replaces 5 .* there is 7 by now"),
        (documents(autonomy={}), LOWER, "may not move"),
        (
            documents(autonomy={"allow": [{"path": PLACE, **LIMITS, "minimum": 5}]}),
            LOWER,
            "not within",
        ),
        (documents(), overlay(Move("/execution_rules/gone", 5, 4)), "nothing at"),
        (documents(), overlay(Move("/label", "Nova", "X")), "nothing at"),
        (documents(), state("enabled", "disabled", target_id="terra"), "do not have it"),
        (documents(), state("enabled", "disabled", target=Target.RUN_PROFILE), "do not have it"),
    ],
)
def test_what_does_not_fit_is_broken_and_says_why(
    files: Documents, laid: Overlay, why: str
) -> None:
    """And changes nothing; an overlay on top of it does not fit either."""
    found = lay(files, [laid])
    assert found.documents == files
    (broken,) = found.broken
    assert re.search(why, str(broken))


def test_an_overlay_over_one_that_is_broken_is_broken_too() -> None:
    """It was made for what the other came to."""
    assert len(lay(documents(7), [LOWER, LOWER_YET]).broken) == 2


def test_a_file_that_says_the_same_has_adopted_it() -> None:
    """Then the overlay is needless; what lies on top of it still fits."""
    found = lay(documents(4), [LOWER, LOWER_YET])
    assert (found.adopted, found.broken) == ((LOWER,), ())
    assert found.documents.profiles[0].execution_rules["intensity"] == 3
    off = state("enabled", "disabled")
    assert lay(documents(state="disabled"), [off]).adopted == (off,)


def test_a_file_that_says_what_several_came_to_has_adopted_them_all() -> None:
    """As it is in force; what says something else of their place is broken all the same."""
    found = lay(documents(3), [LOWER, LOWER_YET])
    assert (found.adopted, found.broken) == ((LOWER, LOWER_YET), ())
    assert found.documents == documents(3)
    assert len(lay(documents(2), [LOWER, LOWER_YET]).broken) == 2


def test_what_goes_back_to_the_files_value_is_laid_all_the_same() -> None:
    """It may be on probation: only other files adopt it."""
    back = overlay(Move(PLACE, 4, 5))
    found = lay(documents(), [LOWER, back])
    assert (found.adopted, found.broken, found.documents) == ((), (), documents())


def test_where_a_profile_runs() -> None:
    """All its namespaces; a run profile has one, and what runs nowhere has none of its own."""
    found = documents()
    assert namespaces_of(found, Target.PROFILE, "nova") == ("air", "sea")
    assert namespaces_of(found, Target.RUN_PROFILE, "daily") == ("sea",)
    assert namespaces_of(found, Target.PROFILE, "terra") == ("*",)


NUMBERS = st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False)


@given(NUMBERS, NUMBERS)
def test_the_inverse_takes_an_overlay_away(old: float, new: float) -> None:
    """Whatever the numbers; and a patch says the moves that it was made of."""
    (nova,) = documents(old).profiles
    moves = (Move(PLACE, old, new), Move(STATE, "enabled", "disabled"))
    assert moved(moved(nova, moves), inverse_of(moves)) == nova
    assert moves_of(json_patch(moves)) == moves


@given(st.floats(-100, 100), st.floats(0.001, 10), st.integers(-30, 30), st.integers(0, 30))
def test_an_allowance_holds_its_step_and_its_day(
    present: float, step: float, tenths: int, steps: int
) -> None:
    """A tenth of a step more is refused; a digit that floating point added to a sum is not."""
    allowed = Allowance(PLACE, -1000, 1000, step, per_day=30 * step)
    if abs(tenths) != 10:  # at the very step rounding may go either way
        assert allowed.permits(present, present + step * tenths / 10) == (abs(tenths) < 10)
    moved_today = sum([step] * steps)
    assert allowed.has_room(moved_today, -step) == (steps < 30)
    assert Allowance(PLACE, 0, 1, step).has_room(1e9, step)
    assert not Allowance(PLACE, 0, 1, 5).permits(0.5, 1.1)
    assert Allowance(PLACE, 0, 1, 0.1).permits(0.2, 0.2 + 0.1)
