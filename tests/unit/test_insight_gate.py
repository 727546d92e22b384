"""The offline gate: its bands held with fixed seeds, its scoring, fleets that repeat."""

from __future__ import annotations

import json
from random import Random

import pytest

from orbit.cli.program import main
from orbit.insight.confidence import MEASURED, confidence_of
from orbit.insight.feeding import FAILED, FINISHED, Feed
from orbit.insight.gate import BANDS, DELAY_BANDS, OURS, Flag, calibration, run_gate, score
from orbit.insight.naive import below_two_sigma, tenth_below, wilson_each_time
from orbit.insight.replaying import Replay
from orbit.insight.signals import BaselineKind, SignalName
from orbit.insight.simulation import Change, Fleet, Scenario, bootstrapped, simulated
from tests.unit.test_insight_feeding import ended, fleet


def test_the_bands_hold() -> None:
    """On fixed seeds every band of the gate is kept: false alarms, precision, recall, delays."""
    report = run_gate(seed=1, fleets=10, is_compared=False)
    assert report.broken == ()
    judged = {one.scenario for one in report.scores if one.detector == OURS}
    assert judged == set(Scenario) == {band.scenario for band in BANDS}
    assert len(report.delays) == len(DELAY_BANDS)


def test_confidence_is_what_replay_gives() -> None:
    """On other fleets than those it was measured on, each level is right about as often."""
    found = calibration(seed=1, fleets=4)
    assert found.keys() <= MEASURED.keys()
    for level, hits in found.items():
        if hits.all >= 100:
            assert hits.share == pytest.approx(MEASURED[level].share, abs=0.15), level


@pytest.mark.parametrize("evidence", [40.0, 1000.0, 1999.0, 2000.0, 1e12])
@pytest.mark.parametrize("kind", BaselineKind)
@pytest.mark.parametrize("name", SignalName)
def test_no_confidence_is_claimed_that_was_not_measured(
    name: SignalName, kind: BaselineKind, evidence: float
) -> None:
    """Whatever a signal's evidence, its confidence is a share of many signals."""
    shares = {
        round(hits.share, 2)
        for level, hits in MEASURED.items()
        if level[:2] == (name, kind) and hits.all >= 100
    }
    assert confidence_of(name, kind, evidence) in shares


def test_scores_count_what_they_say() -> None:
    """A fleet of three, flags put by hand: each figure worked out on paper."""
    change = Change(300, 0.9, 0.5)
    fleet = Fleet(((0.0,) * 3,) * 600, (change, change, None))
    flags = [Flag(0, 310, -1), Flag(0, 400, -1), Flag(1, 200, -1), Flag(2, 500, 1)]
    found = score(Scenario.DROPPED, "by hand", [(fleet, flags)])
    assert found.false_alarms_per_1000 == pytest.approx(1000 * 2 / 900)
    assert found.precision == pytest.approx(1 / 2)
    assert found.precision_both == pytest.approx(1 / 3)
    assert found.recall == pytest.approx(1 / 2)
    assert found.median_delay is None
    assert found.flagged_healthy == 1


@pytest.mark.parametrize("scenario", Scenario)
def test_a_seed_gives_one_fleet(scenario: Scenario) -> None:
    """The same seed the same fleet, another seed another; a quarter change, in `healthy` none."""
    fleet = simulated(scenario, 5)
    assert fleet == simulated(scenario, 5) != simulated(scenario, 6)
    changed = sum(one is not None for one in fleet.changes)
    assert changed == (0 if scenario is Scenario.HEALTHY else 5)
    assert len(fleet.rounds) == 800
    assert {value for row in fleet.rounds for value in row} == {0.0, 1.0}


def test_history_is_bootstrapped_and_made_worse() -> None:
    """Values come from the histories; a quarter of the profiles lose the share that was asked."""
    fleet = bootstrapped([[1.0] * 40] * 8, seed=3, drop=0.5)
    worse = [place for place, one in enumerate(fleet.changes) if one is not None]
    assert len(worse) == 2
    for place, change in enumerate(fleet.changes):
        column = [row[place] for row in fleet.rounds]
        if change is None:
            assert set(column) == {1.0}
        else:
            assert set(column[: change.round]) == {1.0}
            after = column[change.round :]
            assert 0.35 < sum(after) / len(after) < 0.65
    with pytest.raises(ValueError, match="expected 10 or more"):
        bootstrapped([[1.0] * 9], seed=3)


def test_naive_rules_judge_as_written() -> None:
    """Each naive rule says no to a steady history, and yes once the last twenty are bad."""
    steady = [float(now % 10 != 0) for now in range(140)]
    for judge in (below_two_sigma, tenth_below, wilson_each_time):
        assert not judge(steady)
        assert judge(steady + [0.0] * 20)


def test_the_verb_prints_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    """`insight replay --simulated --json` gives every scenario and detector, and the bands."""
    main(["insight", "replay", "--simulated", "--fleets", "1", "--seed", "3", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["seed"] == 3
    assert len(report["scores"]) == 5 * len(Scenario)
    assert {one["after"] for one in report["delays"]} == {0.8, 0.5}
    assert isinstance(report["brokenBands"], list)


def test_stored_telemetry_is_replayed_as_it_was_fed() -> None:
    """Event by event, in two namespaces at once: what a feed of each says, and its histories."""
    events, replayed = fleet(3, 6, 260), Replay()
    said = [
        one
        for event in events
        for namespace in ("sea", "air")
        for one in replayed.take(namespace, (event,))
    ]
    expected = list(Feed().take(events))
    assert expected
    for namespace in ("sea", "air"):
        assert [one.said for one in said if one.namespace == namespace] == expected
    assert replayed.events == 2 * len(events)
    assert (replayed.first_position, replayed.last_position) == (1, len(events))
    assert replayed.profiles == 12
    ended = sum(one.event_type in (FINISHED, FAILED) for one in events if one.profile_id == "p0")
    assert {len(one) for one in replayed.histories} >= {ended}
    assert {one.event_type for one in events} > {FINISHED, FAILED}


def test_fleets_drawn_from_history_are_scored_beside_naive_rules() -> None:
    """Healthy history flags little and naive rules much; a loss of 30 % is found."""
    random, replayed = Random(4), Replay()
    for position in range(1, 6 * 400):
        share = float(random.random() < 0.9)
        list(replayed.take("sea", (ended(position, f"p{position % 6}", share),)))
    scores = {(one.scenario, one.detector): one for one in replayed.scores(seed=1, fleets=2)}
    ours = scores[Scenario.HEALTHY, OURS], scores[Scenario.DROPPED, OURS]
    assert ours[0].false_alarms_per_1000 < 0.2
    assert scores[Scenario.HEALTHY, "10 % below baseline"].false_alarms_per_1000 > 1
    assert ours[1].recall is not None
    assert ours[1].recall > 0.5
    assert Replay().scores(seed=1, fleets=2) == []
