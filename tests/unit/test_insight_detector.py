"""The detector: equal to the formulas, the same bytes however it is fed, and finite for ever."""

from __future__ import annotations

import math
from fractions import Fraction
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from orbit.errors import RequestInvalid
from orbit.insight.detector import Detector
from orbit.insight.evidence import NO_EVIDENCE, STAKES, RunningInterval, grown, total, wilson_bounds
from orbit.insight.gate import signals_of
from orbit.insight.signals import (
    DETECTOR_VERSION,
    INSUFFICIENT_DATA,
    BaselineKind,
    NoData,
    Observation,
    Signal,
    SignalName,
    StreamKey,
)
from orbit.insight.simulation import Fleet, Scenario, simulated
from orbit.insight.stickiness import Stickiness
from tests.unit.detector_reference import autocorrelation, expected, interval, residuals

ALONE = StreamKey("nova", "r1", "delivered")
exactly = settings(derandomize=True, deadline=None, max_examples=25)


def fed(detector: Detector, key: StreamKey, values: list[float]) -> list[Signal | NoData]:
    """Feeds values of one stream, each at the next position."""
    said: list[Signal | NoData] = []
    for value in values:
        said += detector.observe(Observation(detector.position + 1, key, value))
    return said


def draws(seed: int, mean: float, count: int) -> list[float]:
    """Yes and no, as 1.0 and 0.0."""
    random = Random(seed)
    return [float(random.random() < mean) for _ in range(count)]


def fleet_of(seed: int, profiles: int, rounds: int) -> list[Observation]:
    """Profiles in turn; the first gets worse at 150."""
    random = Random(seed)
    return [
        Observation(
            now * profiles + place,
            StreamKey(f"p{place}", "r1", "delivered"),
            float(random.random() < (0.5 if place == 0 and now >= 150 else 0.9)),
        )
        for now in range(rounds)
        for place in range(profiles)
    ]


def reference_evidence(values: list[float], limits: list[Fraction]) -> Fraction:
    """E as the e-detector is defined: a sum over all starts of products of e-values, exactly."""
    parts = []
    for stake in STAKES:
        factors = [
            1 + Fraction(stake) / (1 - limit) * (limit - Fraction(value))
            for value, limit in zip(values, limits, strict=True)
        ]
        parts.append(
            sum(
                (math.prod(factors[start:], start=Fraction(1)) for start in range(len(factors))),
                start=Fraction(0),
            )
        )
    return sum(parts, start=Fraction(0)) / len(parts)


@pytest.mark.parametrize("seed", [1, 2, 4, 5])
def test_evidence_equals_the_formulas(seed: int) -> None:
    """E alone, of both directions, equals the definition computed exactly."""
    values = draws(seed, 0.88, 160)
    detector = Detector()
    fed(detector, ALONE, values)
    standing = detector.standing(ALONE)
    stream = detector._streams[ALONE]
    assert stream.baseline is not None
    assert stream._stickiness.block == 1
    mean = sum(values[:100]) / 100
    low, high = stats.binomtest(round(sum(values[:100])), 100).proportion_ci(
        2 * stats.norm.cdf(1.28) - 1, method="wilson"
    )
    assert stream.baseline.mean == mean
    assert stream.baseline.lower_limit == pytest.approx(low - 0.03, rel=1e-12)
    assert stream.baseline.upper_limit == pytest.approx(min(1, high + 0.03), rel=1e-12)
    after = values[100:]
    lower = reference_evidence(after, [Fraction(stream.baseline.lower_limit)] * 60)
    mirrored = [1 - value for value in after]
    upper = reference_evidence(mirrored, [1 - Fraction(stream.baseline.upper_limit)] * 60)
    assert standing.low_evidence == pytest.approx(float(lower), rel=1e-9)
    assert standing.elevated_evidence == pytest.approx(float(upper), rel=1e-9)


def test_peers_ratio_equals_the_formula() -> None:
    """With peers the limits move with the others' last ten over their baselines, as defined."""
    events = fleet_of(4, 6, 130)
    detector = Detector()
    for one in events:
        detector.observe(one)
    histories = [[float(o.value or 0) for o in events[place::6]] for place in range(6)]
    mine = StreamKey("p5", "r1", "delivered")
    baseline = detector._streams[mine].baseline
    assert baseline is not None
    assert detector._streams[mine]._stickiness.block == 1
    limits = []
    for now in range(100, 130):  # p5 is last in its round: its peers have seen this round
        recent = sum(sum(history[now - 9 : now + 1]) for history in histories[:5])
        expected = sum(10 * round(sum(h[:100]) / 100 * 2**20) / 2**20 for h in histories[:5])
        limits.append(Fraction(baseline.lower_limit * min(1.0, recent / expected)))
    wanted = reference_evidence(histories[5][100:], limits)
    assert detector.standing(mine).low_evidence == pytest.approx(float(wanted), rel=1e-9)


@exactly
@given(st.integers(0, 200), st.integers(50, 400), st.floats(0.1, 4))
def test_wilson_bounds_equal_scipys(successes: int, count: int, z: float) -> None:
    """The Wilson bounds agree with SciPy's at any level."""
    successes = min(successes, count)
    level = 2 * stats.norm.cdf(z) - 1
    wanted = stats.binomtest(successes, count).proportion_ci(level, method="wilson")
    low, high = wilson_bounds(successes / count, count, z)
    assert low == pytest.approx(wanted.low, abs=1e-9)
    assert high == pytest.approx(wanted.high, abs=1e-9)


@pytest.mark.parametrize(
    ("scenario", "seed"),
    [
        (Scenario.HEALTHY, 1),
        (Scenario.DROPPED, 3),
        (Scenario.LIFTED, 2),
        (Scenario.SHARED_OUTAGE, 5),
        (Scenario.STICKY, 4),
    ],
)
def test_the_detector_equals_a_slow_reference(scenario: Scenario, seed: int) -> None:
    """Six profiles, 800 rounds: the very signals that the formulas give from whole histories."""
    rounds = [row[3:9] for row in simulated(scenario, seed).rounds]
    wanted = expected(rounds)
    fleet = Fleet(tuple(rounds), (None,) * 6)
    found = list(signals_of(fleet))
    assert [(now, place, one.name, one.averaged, one.count) for now, place, one in found] == [
        (one.round, one.profile, one.name, one.averaged, one.count) for one in wanted
    ]
    for (_, _, one), other in zip(found, wanted, strict=True):
        assert one.evidence == pytest.approx(other.evidence, rel=1e-6)
        assert one.peer_ratio == pytest.approx(other.ratio, rel=1e-12)
    assert found


@exactly
# To nine places: the squares of the smallest floats are nothing.
@given(st.lists(st.floats(0, 1).map(lambda one: round(one, 9)), min_size=1, max_size=300))
def test_stickiness_equals_its_definition(values: list[float]) -> None:
    """The running estimate of the autocorrelation equals the one from the whole history."""
    stickiness = Stickiness()
    for value in values:
        stickiness.add(value)
    wanted = autocorrelation(residuals(values))
    assert stickiness.autocorrelation == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def test_outcomes_in_runs_are_fed_as_means() -> None:
    """Long runs make ten count as one; values that have nothing to do with the last do not."""
    detector = Detector()
    fed(detector, ALONE, [float(now // 5 % 4 != 0) for now in range(110)])
    stream = detector._streams[ALONE]
    assert stream.autocorrelation > 0.1
    assert stream._stickiness.block == 10
    other = StreamKey("other", "r1", "delivered")
    fed(detector, other, draws(3, 0.9, 400))
    assert detector._streams[other]._stickiness.block == 1


def test_stickiness_that_begins_late_is_noticed() -> None:
    """A stream whose outcomes come in runs from some day on is fed as means soon after."""
    detector = Detector()
    fed(detector, ALONE, draws(5, 0.8, 300))
    assert detector._streams[ALONE]._stickiness.block == 1
    fed(detector, ALONE, [float(now // 4 % 5 != 0) for now in range(150)])
    assert detector._streams[ALONE]._stickiness.block >= 5


def test_a_perfect_profile_that_fails_is_told_of_at_once() -> None:
    """Nothing ever differed, so nothing is taken for a run: three failures are enough."""
    detector = Detector()
    assert fed(detector, ALONE, [1.0] * 150) == []
    said = fed(detector, ALONE, [0.0] * 3)
    assert [one.name for one in said] == [SignalName.LOW]


@exactly
@given(st.lists(st.floats(0, 1), min_size=1, max_size=80))
def test_the_interval_equals_its_definition(values: list[float]) -> None:
    """The running interval equals Waudby-Smith and Ramdas's, at most a hair wider."""
    running = RunningInterval()
    log_term, bets, errors = math.log(2 / 0.05), [], []
    for count, value in enumerate(values, start=1):
        seen = values[: count - 1]
        means = [(0.5 + math.fsum(seen[: n + 1])) / (n + 2) for n in range(len(seen))]
        spread = math.fsum((x - mean) ** 2 for x, mean in zip(seen, means, strict=True))
        bets.append(min(0.5, math.sqrt(2 * log_term / ((0.25 + spread) / count * (count + 300)))))
        errors.append((value - (0.5 + math.fsum(seen)) / count) ** 2)
        running.add(value)
    centre = math.fsum(b * v for b, v in zip(bets, values, strict=True)) / math.fsum(bets)
    paid = math.fsum(e * (-math.log1p(-b) - b) for e, b in zip(errors, bets, strict=True))
    half = (log_term + paid) / math.fsum(bets)
    low, high = running.bounds()
    assert half * (1 - 1e-9) <= running.half_width <= half * 1.05
    assert low == pytest.approx(max(0.0, centre - running.half_width), abs=1e-9)
    assert high == pytest.approx(min(1.0, centre + running.half_width), abs=1e-9)


def test_the_interval_holds_at_all_times_at_once() -> None:
    """Of 400 histories looked at after each of 400 values, at most 5 % ever leave the mean out."""
    missed = 0
    for seed in range(400):
        running, was_out = RunningInterval(), False
        for value in draws(seed, 0.9, 400):
            running.add(value)
            low, high = running.bounds()
            was_out = was_out or not low <= 0.9 <= high
        missed += was_out
    assert missed <= 20


@exactly
@given(st.integers(0, 1000), st.lists(st.integers(0, 1500), max_size=6))
def test_any_split_gives_the_same_bytes(seed: int, cuts: list[int]) -> None:
    """Fed in one go or in pieces, each from the state before: the same signals and state."""
    events = fleet_of(seed, 6, 250)
    whole = Detector()
    wanted = [one.as_json() for event in events for one in whole.observe(event)]
    said, piecewise = [], Detector()
    for place, event in enumerate(events):
        if place in cuts:
            piecewise = Detector.restored(piecewise.state())
        said += [one.as_json() for one in piecewise.observe(event)]
    assert said == wanted
    assert piecewise.state() == whole.state()
    assert Detector.restored(whole.state()).state() == whole.state()


@exactly
@given(st.lists(st.floats(0, 60), min_size=0, max_size=140), st.integers(0, 140))
def test_latencies_survive_a_restart(latencies: list[float], cut: int) -> None:
    """A latency stream restored in the middle of its first hundred ends in the same bytes."""
    key = StreamKey("nova", "r1", "latency")
    whole = Detector()
    fed(whole, key, latencies)
    first = Detector()
    fed(first, key, latencies[:cut])
    second = Detector.restored(first.state())
    fed(second, key, latencies[cut:])
    assert second.state() == whole.state()


def test_a_drop_is_said_with_all_that_it_rests_on() -> None:
    """A profile that gets worse among peers is told of with evidence, peers and positions."""
    detector, events = Detector(), fleet_of(8, 6, 220)
    said = [one for event in events for one in detector.observe(event)]
    lows = [one for one in said if isinstance(one, Signal) and one.name is SignalName.LOW]
    assert {one.key.profile_id for one in lows} == {"p0"}
    first = lows[0]
    assert first.evidence >= first.threshold == 1000
    assert first.baseline_kind is BaselineKind.PEERS
    assert first.peers == 5
    assert (first.baseline_position, first.first_position) == (0, 600)
    assert 150 * 6 < first.last_position < 220 * 6
    assert 0 < first.confidence < 1
    assert "nothing was changed" in first.recommendation


def test_without_four_peers_it_says_so() -> None:
    """With three peers the signal is set against the stream's own history."""
    detector = Detector()
    said = [one for event in fleet_of(8, 4, 220) for one in detector.observe(event)]
    kinds = {one.baseline_kind for one in said if isinstance(one, Signal)}
    assert kinds == {BaselineKind.OWN_HISTORY}


def test_stable_is_claimed_only_within_the_baseline() -> None:
    """A steady stream has insufficient data first and is stable later, inside 0.06 of its start."""
    detector = Detector()
    key = StreamKey("nova", "r1", "score")
    early = fed(detector, key, [0.7] * 150)
    assert not early
    assert detector.standing(key).status == INSUFFICIENT_DATA
    said = fed(detector, key, [0.7] * 500)
    assert {one.name for one in said} == {SignalName.STABLE}
    first = said[0]
    assert isinstance(first, Signal)
    assert first.baseline.mean - 0.06 <= first.interval[0] <= first.interval[1]
    assert first.interval[1] <= first.baseline.mean + 0.06
    assert detector.standing(key).status == "stable"


def test_an_interval_is_that_of_the_positions_it_names() -> None:
    """Steady for long, then worse: each claim's interval, computed again from its own cycles."""
    detector, key = Detector(), StreamKey("nova", "r1", "score")
    values = [0.625, 0.75] * 350 + [0.0, 0.125] * 30
    found = [one for one in fed(detector, key, values) if isinstance(one, Signal)]
    said = [one for one in found if one.averaged == 1]
    assert {one.name for one in said[:-1]} == {SignalName.STABLE}
    for one in said:
        own = np.array(values[one.interval_position - 1 : one.last_position])
        assert len(own) == one.interval_count
        assert one.interval == pytest.approx(interval(own)[:2], abs=1e-9)
        assert one.count == one.last_position - one.first_position + 1
        assert (one.first_position == one.interval_position) or one.name is SignalName.LOW
    low = said[-1]
    assert low.name is SignalName.LOW
    assert low.first_position == 101 < low.interval_position


def test_a_silent_stream_raises_one_alarm() -> None:
    """Ten values due and missing are one alarm; a value that comes arms it again."""
    detector = Detector()
    fed(detector, ALONE, [1.0] * 5)

    def miss(times: int) -> list[Signal | NoData]:
        said: list[Signal | NoData] = []
        for _ in range(times):
            said += detector.observe(Observation(detector.position + 1, ALONE, None))
        return said

    alarms = miss(25)
    assert [(one.name, one.first_position, one.last_position) for one in alarms] == [
        ("no_data", 6, 15)
    ]
    assert detector.standing(ALONE).status == "no_data"
    fed(detector, ALONE, [1.0])
    assert detector.standing(ALONE).status == INSUFFICIENT_DATA
    assert len(miss(10)) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.01, 1.01, True, "0.5"])
def test_what_is_no_share_is_refused_and_changes_nothing(value: float) -> None:
    """NaN, infinity, other types and values outside [0, 1] leave the state as it was."""
    detector = Detector()
    fed(detector, ALONE, [1.0])
    before = detector.state()
    with pytest.raises(RequestInvalid):
        detector.observe(Observation(2, ALONE, value))
    with pytest.raises(RequestInvalid):
        detector.observe(Observation(2, StreamKey("new", "r1", "delivered"), value))
    assert detector.state() == before


def test_positions_only_go_on() -> None:
    """A position that has passed is refused, the same one too for the same stream."""
    detector = Detector()
    detector.observe(Observation(5, ALONE, 1.0))
    detector.observe(Observation(5, StreamKey("nova", "r1", "score"), 0.5))
    before = detector.state()
    for position in (4, 5):
        with pytest.raises(RequestInvalid):
            detector.observe(Observation(position, ALONE, 1.0))
    assert detector.state() == before


def test_other_versions_and_short_baselines_are_refused() -> None:
    """State of another detector version must be rebuilt; fewer than 50 are no baseline."""
    version = f'"version":{DETECTOR_VERSION}'.encode()
    with pytest.raises(RequestInvalid):
        Detector.restored(Detector().state().replace(version, b'"version":0'))
    with pytest.raises(RequestInvalid):
        Detector(49)


def test_old_revisions_are_let_go() -> None:
    """A profile's streams are bounded by the revisions heard last, and so are its peers' totals."""
    detector = Detector(50)
    for revision in range(8):
        fed(detector, StreamKey("nova", f"r{revision}", "score"), [0.5] * 60)
    assert [key.revision for key in detector.stream_keys()] == ["r4", "r5", "r6", "r7"]
    assert detector._groups["score"].peers == 1


@pytest.mark.parametrize(("before", "after"), [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.06, 0.0)])
def test_numbers_stay_finite_for_ever(before: float, after: float) -> None:
    """After 200,000 cycles of the strongest evidence, or of none, everything is finite."""
    detector = Detector()
    values = draws(1, before, 100) if 0 < before < 1 else [before] * 100
    fed(detector, ALONE, values)
    said = fed(detector, ALONE, [after] * 200_000)
    standing = detector.standing(ALONE)
    assert math.isfinite(standing.low_evidence + standing.elevated_evidence)
    assert all(math.isfinite(one.evidence) for one in said if isinstance(one, Signal))
    assert Detector.restored(detector.state()).state() == detector.state()


@exactly
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1e9))
def test_a_step_is_finite_and_never_negative(value: float, limit: float, part: float) -> None:
    """Whatever the limit, evidence is finite and not negative after a step."""
    parts = grown((part,) * 7, value, limit)
    assert all(0 <= one < math.inf for one in parts)
    assert total(grown(NO_EVIDENCE, limit, limit)) in {0.0, 1.0}
