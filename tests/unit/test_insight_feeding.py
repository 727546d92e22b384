"""Feeding: the same events, the same bytes; what counts as an observation; data that stay away."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest

from orbit.insight.feeding import FAILED, FINISHED, LEAST_TURNS, OUTCOME, Feed, Said
from orbit.insight.signals import NoData, Signal, SignalName, StreamKey


@dataclass(frozen=True)
class Told:
    """An event as telemetry hands it out."""

    position: int
    event_type: str
    profile_id: str | None
    run_id: str | None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def ended(position: int, profile: str, share: float, revision: str = "r1") -> Told:
    """A cycle of ten jobs that ended."""
    delivered = round(10 * share)
    facts = {"jobs": 10, "delivered": delivered, "durationSeconds": 1.5, "revision": revision}
    return Told(position, FINISHED, profile, f"run-{position}", facts)


def scored(position: int, profile: str, run: str, value: Any, **more: str | int) -> Told:
    """A score that was reported."""
    return Told(position, OUTCOME, profile, run, {"metric": "clicks", "value": value, **more})


def fleet(seed: int, profiles: int, rounds: int) -> list[Told]:
    """Profiles in turn with scores, failures, noise and gaps; one gets worse, one stops."""
    random = Random(seed)
    events: list[Told] = []
    for now in range(rounds):
        for number in range(profiles):
            name = f"p{number}"
            if number == 1 and now > rounds // 2:
                continue
            share = 0.4 if number == 0 and now > rounds // 2 else 0.9
            position = len(events) + 1
            if random.random() < 0.03:
                events.append(Told(position, FAILED, name, f"run-{position}", {"revision": "r1"}))
            else:
                value = sum(random.random() < share for _ in range(10)) / 10
                events.append(ended(position, name, value, "r1" if now < 170 else "r2"))
            if number != 2 or now < rounds // 3:
                run = f"run-{position}"
                for item in range(random.randint(1, 3)):
                    value = random.choice([0.5, 0.75, 0.8, 3.0])
                    given = scored(len(events) + 1, name, run, value, itemIndex=item)
                    events.append(given)
            if random.random() < 0.05:
                events.append(Told(len(events) + 1, "delivery_confirmed", name, None))
    return events


def reassembled(feed: Feed, random: Random) -> Feed:
    """The feed as it comes back from what is stored of it, its streams in any order."""
    head = json.loads(json.dumps(feed.head()))
    streams = [(key, feed.detector.stream_state(key)) for key in feed.detector.stream_keys()]
    random.shuffle(streams)
    stored = [(key, json.loads(json.dumps(state))) for key, state in streams]
    return Feed.assembled(head, stored)


@pytest.mark.parametrize("seed", range(4))
def test_batches_of_any_size_end_in_the_same_bytes_and_signals(seed: int) -> None:
    """Stored and fetched after each of many batches, some of them repeated: as in one go."""
    events, random = fleet(seed, 6, 260), Random(seed)
    whole, pieces = Feed(50), Feed(50)
    expected = list(whole.take(events))
    said: list[Said] = []
    start = 0
    while start < len(events):
        end = start + random.randint(1, 400)
        said += pieces.take(events[max(0, start - 5) : end])
        pieces, start = reassembled(pieces, random), end
    assert pieces.state() == whole.state()
    assert said == expected
    names = {one.name for one in expected}
    assert {SignalName.LOW, "no_data"} <= names
    assert {one.key.metric for one in expected if isinstance(one, NoData)} == {"cycles", "clicks"}


def test_a_cycle_without_jobs_says_nothing_and_one_that_failed_delivered_nothing() -> None:
    """What a cycle that failed before it had jobs did not deliver counts against it."""
    feed, key = Feed(50), StreamKey("nova", "r1", "delivered")
    nothing = {"jobs": 0, "delivered": 0, "revision": "r1"}
    list(feed.take([Told(1, FINISHED, "nova", "a", nothing)]))
    assert feed.detector.standing(key).needed == 50
    list(feed.take([Told(2, FAILED, "nova", "b", {"revision": "r1"}), ended(3, "nova", 1.0)]))
    assert feed.detector.standing(key).needed == 48
    state = feed.detector.stream_state(key)
    assert state is not None
    assert state["recent"] == [0.0, 1.0]


def test_a_halt_makes_no_cycle_slow() -> None:
    """A cycle that a halt held up says what it delivered, and not how long it took."""
    feed = Feed(50)
    facts = {**ended(1, "nova", 1.0).metadata, "durationSeconds": 3600}
    list(feed.take([Told(1, FINISHED, "nova", "a", {**facts, "halted": True})]))
    list(feed.take([Told(2, FINISHED, "nova", "b", {**facts, "halted": False})]))
    list(feed.take([Told(3, FINISHED, "nova", "c", facts)]))  # told before there was the field
    needed = {one.metric: feed.detector.standing(one).needed for one in feed.detector.stream_keys()}
    assert needed == {"delivered": 47, "latency": 48}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 1.5, "1", True, None])
def test_what_is_no_score_is_passed_over(value: Any) -> None:
    """A figure, or no number at all, makes no stream and stops no later score."""
    feed, key = Feed(50), StreamKey("nova", "r1", "clicks")
    list(feed.take([ended(1, "nova", 1.0), scored(2, "nova", "a", value)]))
    assert feed.detector.stream_state(key) is None
    list(feed.take([scored(3, "nova", "b", 0.5, unit="EUR")]))
    assert feed.detector.stream_state(key) is None
    list(feed.take([scored(4, "nova", "c", 0.5)]))
    assert feed.detector.standing(key).needed == 49


def recent(feed: Feed, metric: str = "clicks") -> list[float]:
    """The last values of nova's metric that counted."""
    state = feed.detector.stream_state(StreamKey("nova", "r1", metric))
    return [] if state is None else state["recent"]


def test_parts_of_a_cycle_count_once_as_their_mean() -> None:
    """Scores of items wait until four more cycles have some; a whole cycle's counts at once."""
    feed = Feed(50)
    list(feed.take([ended(1, "nova", 1.0), scored(2, "nova", "a", 0.25, itemIndex=0)]))
    list(feed.take([scored(3, "nova", "a", 0.75, jobId="2"), scored(4, "nova", "w", 0.0)]))
    list(feed.take([scored(5, "nova", "w", 1.0), scored(6, "nova", "w", 1.0, itemIndex=3)]))
    assert recent(feed) == [0.0]
    later = [scored(10 + number, "nova", f"b{number}", 1.0, itemIndex=0) for number in range(5)]
    list(feed.take(later[:3]))
    assert recent(feed) == [0.0]
    list(feed.take(later[3:]))
    assert recent(feed) == [0.0, 0.5, 1.0]
    list(feed.take([scored(20, "nova", "a", 0.0, itemIndex=9), scored(21, "nova", "b4", 0.125)]))
    assert recent(feed) == [0.0, 0.5, 1.0, 0.125]


@pytest.mark.parametrize("cycles", [2, 5, 30])
@pytest.mark.parametrize("is_part", [True, False])
def test_a_cycle_counts_once_however_reports_are_mixed(cycles: int, is_part: bool) -> None:
    """Six reports of each of several cycles, by turns, then of others: one value of each."""
    feed, events = Feed(50), [ended(1, "nova", 1.0)]
    for turn in range(6):
        for number in range(cycles):
            item = {"itemIndex": turn} if is_part else {}
            value = turn / 8 if cycles <= 4 else 0.5
            events.append(scored(len(events) + 1, "nova", f"r{number}", value, **item))
    for number in range(4):
        events.append(scored(len(events) + 1, "nova", f"end{number}", 1.0, itemIndex=0))
    random = Random(cycles)
    while events:
        list(feed.take(events[:7]))
        events, feed = events[7:], reassembled(feed, random)
    counted = 50 - feed.detector.standing(StreamKey("nova", "r1", "clicks")).needed
    assert counted == cycles
    if cycles <= 4:
        assert recent(feed) == [(0 + 1 + 2 + 3 + 4 + 5) / 6 / 8 if is_part else 0.0] * cycles


def test_a_late_score_counts_for_the_profile_as_its_cycle_ran() -> None:
    """A score of a cycle from before a change goes to the stream from before it."""
    feed = Feed(50)
    list(feed.take([ended(1, "nova", 1.0), scored(2, "nova", "a", 0.5, revision="r1")]))
    list(feed.take([ended(3, "nova", 1.0, "r2"), scored(4, "nova", "b", 0.25, revision="r1")]))
    list(feed.take([scored(5, "nova", "c", 1.0, revision="r2"), scored(6, "nova", "d", 0.75)]))
    found = [feed.detector.stream_state(StreamKey("nova", one, "clicks")) for one in ("r1", "r2")]
    assert [state and state["recent"] for state in found] == [[0.5, 0.25], [1.0, 0.75]]


def test_a_metric_that_stays_away_is_an_alarm_and_a_slower_pace_is_learned() -> None:
    """Ten cycles more than ever before; afterwards that pause is the longest known one."""
    feed, events = Feed(50), []
    for number in range(40):
        events += [ended(2 * number + 1, "nova", 1.0)]
        events += [scored(2 * number + 2, "nova", f"r{number}", 0.5)]
    assert not list(feed.take(events))
    (alarm,) = feed.take(ended(100 + number, "nova", 1.0) for number in range(12))
    assert isinstance(alarm, NoData)
    assert (alarm.key.metric, alarm.missed) == ("clicks", 10)
    list(feed.take([scored(200, "nova", "late", 0.5)]))
    again = [ended(300 + number, "nova", 1.0) for number in range(12)]
    assert not [one for one in feed.take(again) if isinstance(one, NoData)]


def test_a_second_silence_is_told_of_too() -> None:
    """Also where one cycle reported by parts, which counts later, is all that came in between."""
    feed, events = Feed(50), []
    for number in range(30):
        events += [ended(2 * number + 1, "nova", 1.0)]
        events += [scored(2 * number + 2, "nova", f"r{number}", 0.5)]
    events += [ended(100 + number, "nova", 1.0) for number in range(15)]
    events += [scored(200, "nova", "late", 0.5, itemIndex=0)]
    events += [ended(300 + number, "nova", 1.0) for number in range(60)]
    alarms = [one for one in feed.take(events) if isinstance(one, NoData)]
    assert [(one.key.metric, one.missed) for one in alarms] == [("clicks", 10)] * 2
    assert alarms[0].last_position < 200 < alarms[1].first_position


def test_a_profile_whose_cycles_stay_away_is_told_of_once() -> None:
    """Others go on and it does not: an alarm once; a burst of one profile alarms nobody."""
    feed, names = Feed(50), ["a", "b", "c"]
    events = [ended(number + 1, names[number % 3], 1.0) for number in range(90)]
    assert not list(feed.take(events))
    burst = [ended(200 + number, "a", 1.0) for number in range(500)]
    assert not [one for one in feed.take(burst) if isinstance(one, NoData)]
    others = [ended(1000 + number, names[number % 2], 1.0) for number in range(4 * LEAST_TURNS)]
    alarms = [one for one in feed.take(others) if isinstance(one, NoData)]
    (alarm,) = alarms
    assert (alarm.key.profile_id, alarm.key.metric) == ("c", "cycles")
    assert alarm.missed == LEAST_TURNS + 1


def test_a_halted_namespace_alarms_nobody() -> None:
    """No cycle ends in a halt, however long, so no profile is late when it is over."""
    feed, names = Feed(50), ["a", "b", "c", "d", "e"]
    before = [ended(number + 1, names[number % 5], 1.0) for number in range(200)]
    after = [ended(number + 90_000, names[number % 5], 1.0) for number in range(200)]
    said = [*feed.take(before), *feed.take(after)]
    assert all(isinstance(one, Signal) for one in said)
