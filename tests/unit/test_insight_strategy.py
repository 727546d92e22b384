"""Rules: what each finds, and that no reaction leaves what the profile declares."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orbit.canonical import sha256_hex
from orbit.insight.strategy import (
    SHIPPED,
    Figures,
    Finding,
    SaidSignal,
    Situation,
    profile_digest,
    reactions,
    suggestions,
)
from orbit.profiles.model import Profile

LOW = SaidSignal("a" * 32, "delivered", "low_performance", 0.97, 0.6, 0.9, 10, 90)
BETTER = SaidSignal("b" * 32, "clicks", "elevated_performance", 0.9, 0.8, 0.6, 20, 95)
STABLE = SaidSignal("c" * 32, "delivered", "stable", 0.9, 0.9, 0.9, 30, 99)
STEADY = Figures(cycles=700, attempts=7000, unknown=70, opened=7, values=140, costs=140)


def allowing(**on: float) -> dict[str, Any]:
    """An entry that lets rules move the intensity between 1 and 10, by 2 at most."""
    place = "/execution_rules/intensity"
    return {"path": place, "minimum": 1, "maximum": 10, "step": 2, "per_day": 4, "on": on}


def profile(*allow: dict[str, Any], intensity: Any = 5) -> Profile:
    """A profile with an intensity."""
    return Profile(
        "nova",
        "Nova",
        "enabled",
        execution_rules={"intensity": intensity, "list": [1, {"a/b": 2.5}]},
        autonomy={"allow": list(allow)},
    )


def found(situation: Situation) -> list[str]:
    """The shipped rules that find something."""
    return [rule.name for rule in SHIPPED if rule.find(situation)]


def test_the_last_word_of_a_metric_counts() -> None:
    """Low and better are found side by side; a metric that is stable again is not."""
    assert found(Situation("sea", profile(), (LOW, BETTER))) == [
        "low_performance",
        "elevated_performance",
    ]
    assert found(Situation("sea", profile(), (STABLE,))) == []


@pytest.mark.parametrize(
    ("recent", "expected"),
    [
        (Figures(attempts=1000, unknown=60), True),
        (Figures(attempts=1000, unknown=12), False),  # within chance
        (Figures(attempts=1000, unknown=30), False),  # more than chance, less than the margin
        (Figures(attempts=49, unknown=49), False),  # too few to tell
    ],
)
def test_a_share_of_unknown_attempts_rises_by_more_than_chance(
    recent: Figures, expected: bool
) -> None:
    """Intervals must be apart by the margin, with 50 attempts on each side."""
    situation = Situation("sea", profile(), day="2026-01-02", recent=recent, before=STEADY)
    assert ("unknown_share_rising" in found(situation)) is expected


@pytest.mark.parametrize(
    ("opened", "before", "expected"), [(4, 0, True), (3, 0, False), (4, 14, False), (9, 28, True)]
)
def test_a_breaker_flaps_if_it_opens_more_than_is_usual(
    opened: int, before: int, expected: bool
) -> None:
    """Four times a day, and more than twice what the week before had a day."""
    situation = Situation(
        "sea", profile(), day="d", recent=Figures(opened=opened), before=Figures(opened=before)
    )
    assert ("breaker_flapping" in found(situation)) is expected


@pytest.mark.parametrize(
    ("value", "reports", "expected"), [(79.0, 20, True), (81.0, 20, False), (10.0, 19, False)]
)
def test_value_per_cost_falls_by_a_fifth(value: float, reports: int, expected: bool) -> None:
    """Sums of what was reported, with twenty reports of each on both sides."""
    situation = Situation(
        "sea",
        profile(),
        day="d",
        recent=Figures(values=reports, value=value, costs=reports, cost=100.0),
        before=Figures(values=140, value=700.0, costs=140, cost=700.0),
    )
    assert ("value_per_cost_falling" in found(situation)) is expected


def test_a_suggestion_says_all_that_it_rests_on() -> None:
    """Its digest is that of its body, and another evidence or profile is another suggestion."""
    told = profile(allowing(low_performance=-1))
    ((one,), _) = suggestions(Situation("sea", told, (LOW,)), SHIPPED)
    body = json.loads(one.body)
    assert one.patch == [{"op": "replace", "path": "/execution_rules/intensity", "value": 4}]
    assert body["replaced"] == [5]
    assert body["evidence"] == {"signals": [LOW.signal_id]}
    assert (one.from_position, one.to_position) == (10, 90)
    assert one.digest == sha256_hex(one.body.encode())
    assert one.profile_digest == profile_digest(told)
    ((again,), _) = suggestions(Situation("sea", told, (LOW,)), SHIPPED)
    assert again == one
    other = profile(allowing(low_performance=-2))
    for situation in (Situation("air", told, (LOW,)), Situation("sea", other, (LOW,))):
        ((different,), _) = suggestions(situation, SHIPPED)
        assert different.proposal_id != one.proposal_id


def test_what_is_suggested_again_says_how_often() -> None:
    """It is a suggestion of its own, and all else of its body is the same to the byte."""
    ((one,), _) = suggestions(
        Situation("sea", profile(allowing(low_performance=-1)), (LOW,)), SHIPPED
    )
    assert one.again(0) == one
    twice = one.again(2)
    assert twice.body == '{"again":2,' + one.body[1:]
    assert twice.digest == sha256_hex(twice.body.encode()) != one.digest


def test_without_a_declared_reaction_nothing_is_suggested() -> None:
    """A finding alone changes nothing: only the profile knows what its fields mean."""
    for allow in ((), (allowing(),), (allowing(elevated_performance=1),)):
        assert not suggestions(Situation("sea", profile(*allow), (LOW,)), SHIPPED)[0]


def test_a_rule_that_fails_keeps_no_other_from_suggesting() -> None:
    """Rules are the user's code too."""

    class Broken:
        name = "broken"

        def find(self, situation: Situation) -> Finding | None:
            raise ValueError(situation.namespace)

    told = profile(allowing(broken=1, low_performance=-1))
    found, answered = suggestions(Situation("sea", told, (LOW,)), (Broken(), *SHIPPED))
    assert [one.rule for one in found] == ["low_performance"]
    assert answered == {"low_performance"}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/execution_rules/intensity", 6),
        ("/execution_rules/list/0", 2),
        ("/execution_rules/list/1/a~1b", 3.5),
        ("/execution_rules/list/7", None),
        ("/execution_rules/none", None),
        ("/execution_rules/list", None),
        ("/label", None),
        ("/autonomy/allow", None),
    ],
)
def test_a_path_names_a_number_in_a_free_object(path: str, expected: float | None) -> None:
    """What is no number there, or is Orbit's own, is never moved."""
    told = profile(allowing(rule=1) | {"path": path})
    assert list(reactions(told, "rule")) == ([] if expected is None else [(path, expected)])


@given(
    present=st.integers(-30, 30) | st.floats(-30, 30),
    change=st.floats(-20, 20),
    lowest=st.floats(-10, 5),
    highest=st.floats(5, 10),
    step=st.floats(0.01, 5),
)
def test_no_reaction_goes_beyond_step_and_bounds(
    present: float, change: float, lowest: float, highest: float, step: float
) -> None:
    """Whatever is declared and wherever the value is: within both, or nothing."""
    entry = allowing(rule=change) | {"minimum": lowest, "maximum": highest, "step": step}
    for _, value in reactions(profile(entry, intensity=present), "rule"):
        assert lowest <= value <= highest
        assert abs(value - present) <= step * (1 + 1e-9)
        assert value != present
