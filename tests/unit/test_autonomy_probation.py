"""Probation: a change that does harm is noticed, a shared outage is not held against it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orbit.autonomy.probation import (
    ALPHA,
    MOST_PEERS,
    Trial,
    Verdict,
    trials_of,
    verdict_of,
    written,
)
from orbit.insight.evidence import NO_WAGER, STAKES, total, wagered
from orbit.insight.feeding import FINISHED, OUTCOME, Feed
from orbit.insight.signals import StreamKey

OLD, NEW, PEERS = "old", "new", tuple(f"peer-{number}" for number in range(6))


@dataclass(frozen=True)
class Happened:
    """An event as the feed reads it."""

    position: int
    profile_id: str
    metadata: dict[str, Any]
    event_type: str = FINISHED
    run_id: str | None = field(default=None)


def cycles(
    chance: random.Random, rates: dict[str, tuple[str, float]], rounds: int, first: int = 1
) -> Iterator[Happened]:
    """Rounds of cycles with ten jobs each: by profile its revision and the rate of deliveries."""
    position = first
    for _ in range(rounds):
        for name, (revision, rate) in rates.items():
            delivered = sum(chance.random() < rate for _ in range(10))
            facts = {"jobs": 10, "delivered": delivered, "profileRevision": revision}
            yield Happened(position, name, {**facts, "durationSeconds": 1 + chance.random()})
            position += 1


def healthy(peers: Sequence[str] = PEERS, rate: float = 0.9) -> dict[str, tuple[str, float]]:
    """Nova and its peers, all the same."""
    return {"nova": (OLD, rate), **dict.fromkeys(peers, ("theirs", rate))}


def basis(
    peers: Sequence[str] = PEERS, metrics: Sequence[str] = ("delivered", "latency")
) -> dict[str, Any]:
    """What is written down of nova when its baseline and its peers' are there."""
    feed = Feed()
    list(feed.take(cycles(random.Random(1), healthy(peers), 120)))
    found = [feed.detector.basis(StreamKey("nova", OLD, one)) for one in metrics]
    made = written(feed.position, [one for one in found if one is not None])
    stored: dict[str, Any] = json.loads(json.dumps(made))
    return stored


def trial(given: dict[str, Any]) -> dict[str, Trial]:
    """The trial of a change of nova in one namespace, as it is built from what was stored."""
    return trials_of("nova", {"revision": NEW, "namespaces": {"sea": given}})


def after(
    given: dict[str, Any], rates: dict[str, tuple[str, float]], rounds: int, seed: int = 2
) -> dict[str, Trial]:
    """The trial when so many rounds have passed."""
    made = trial(given)
    events = list(cycles(random.Random(seed), rates, rounds, given["position"] + 1))
    made["sea"].take(events, events[-1].position)
    return made


def changed(rate: float, others: float = 0.9) -> dict[str, tuple[str, float]]:
    """Nova under its new revision, with this rate; the peers with theirs."""
    return {**healthy(rate=others), "nova": (NEW, rate)}


BASIS = basis()
DELIVERED = basis(metrics=("delivered",))


def test_harm_is_a_breach() -> None:
    """A drop from 0.9 to 0.7 is noticed within 40 cycles; nothing after it is taken in."""
    found = after(BASIS, changed(0.7), 40)
    assert verdict_of(found) is Verdict.BREACHED
    told = found["sea"].told()
    assert told["metrics"]["delivered"]["evidence"] >= told["metrics"]["delivered"]["threshold"]
    position = found["sea"].position
    found["sea"].take(list(cycles(random.Random(3), changed(1.0), 50, position + 1)), 10**6)
    assert found["sea"].told() == told


def test_no_harm_is_no_breach_and_kept_only_with_many_cycles() -> None:
    """A few cycles say nothing; some hundreds do."""
    assert verdict_of(after(BASIS, changed(0.9), 60)) is Verdict.INCONCLUSIVE
    assert verdict_of(after(DELIVERED, changed(0.9), 900)) is Verdict.KEPT


def test_an_outage_of_all_is_not_held_against_the_change() -> None:
    """However sudden and whole, and nothing is kept in it; alone it is a breach."""
    for rate in (0.6, 0.3, 0.0):
        found = after(DELIVERED, changed(rate, others=rate), 400)
        assert verdict_of(found) is Verdict.INCONCLUSIVE
        assert verdict_of(after(BASIS, changed(rate), 60)) is Verdict.BREACHED


def test_harm_that_sets_in_later_is_noticed_too() -> None:
    """After three hundred good cycles the early bet is lost; the detector's evidence is not."""
    made = trial(BASIS)
    events = list(cycles(random.Random(2), changed(0.9), 300, BASIS["position"] + 1))
    made["sea"].take(events, events[-1].position)
    assert verdict_of(made) is not Verdict.BREACHED
    events = list(cycles(random.Random(3), changed(0.6), 40, events[-1].position + 1))
    made["sea"].take(events, events[-1].position)
    assert verdict_of(made) is Verdict.BREACHED


def test_harm_is_noticed_though_no_peer_is_heard() -> None:
    """Then by the profile's own past, a few cycles later."""
    assert verdict_of(after(BASIS, {"nova": (NEW, 0.5)}, 30)) is Verdict.BREACHED


def test_peers_that_changed_count_no_more() -> None:
    """With fewer than four unchanged ones the profile's own past decides, and nothing is kept."""
    rates = changed(0.92)
    rates |= dict.fromkeys(PEERS[:3], ("another", 0.9))
    found = after(DELIVERED, rates, 900)
    assert verdict_of(found) is Verdict.INCONCLUSIVE
    assert found["sea"].told()["metrics"]["delivered"]["peers"] == 3
    few = dict.fromkeys(PEERS[:3], ("theirs", 0.9)) | {"nova": (NEW, 0.92)}
    assert verdict_of(after(DELIVERED, few, 900)) is Verdict.INCONCLUSIVE  # the others are silent
    alone = basis((), ("delivered",))
    assert verdict_of(after(alone, changed(0.92), 900)) is Verdict.INCONCLUSIVE
    assert verdict_of(after(alone, changed(0.7), 40)) is Verdict.BREACHED


def test_what_is_not_under_the_new_revision_says_nothing() -> None:
    """Cycles that began before the change, or after another one."""
    for revision in (OLD, "third"):
        found = after(BASIS, changed(0.9) | {"nova": (revision, 0.1)}, 60)
        assert found["sea"].told()["metrics"]["delivered"]["observations"] == 0
        assert verdict_of(found) is Verdict.INCONCLUSIVE


def test_slower_is_harm_too() -> None:
    """Latency is judged by the P90 of the profile's own baseline."""
    made = trial(BASIS)["sea"]
    events = list(cycles(random.Random(2), changed(0.9), 80, BASIS["position"] + 1))
    for one in events:
        if one.profile_id == "nova":
            one.metadata["durationSeconds"] += 5
    made.take(events, events[-1].position)
    assert made.is_breached
    assert made.told()["metrics"]["latency"]["breachedAt"]


def test_a_reported_score_is_judged_as_the_detector_takes_it() -> None:
    """A score of a cycle, fed as the detector takes it."""
    feed, position = Feed(), 0
    chance = random.Random(5)
    for number in range(130):
        for name in ("nova", *PEERS):
            events = scored(position, name, number, chance.uniform(0.7, 0.9), OLD)
            list(feed.take(events))
            position = events[-1].position
    found = feed.detector.basis(StreamKey("nova", OLD, "quality"))
    assert found is not None
    made = trial(json.loads(json.dumps(written(position, [found]))))["sea"]
    for number in range(60):
        for name in ("nova", *PEERS):
            low = 0.3 if name == "nova" else 0.7
            revision = NEW if name == "nova" else OLD
            events = scored(position, name, 1000 + number, chance.uniform(low, low + 0.2), revision)
            made.take(events, events[-1].position)
            position = events[-1].position
    assert made.is_breached


def scored(position: int, name: str, run: int, score: float, revision: str) -> list[Happened]:
    """A cycle's end, and a score for it."""
    facts = {"jobs": 1, "delivered": 1, "profileRevision": revision}
    report = {"metric": "quality", "value": score, "profileRevision": revision}
    return [
        Happened(position + 1, name, facts),
        Happened(position + 2, name, report, OUTCOME, f"{name}-{run}"),
    ]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**32), st.sampled_from([0.5, 0.8, 0.9]), st.lists(st.integers(1, 90)), st.data()
)
def test_the_same_events_give_the_same_verdict_however_they_were_cut(
    seed: int, rate: float, cuts: list[int], data: st.DataObject
) -> None:
    """In one go, in pieces, with a piece repeated, or begun anew halfway by another node."""
    events = list(cycles(random.Random(seed), changed(rate), 40, BASIS["position"] + 1))
    whole = trial(BASIS)["sea"]
    whole.take(events, events[-1].position)
    pieces = trial(BASIS)["sea"]
    at = 0
    for cut in [*cuts, len(events)]:
        piece = events[at : at + cut]
        if piece:
            pieces.take(piece, piece[-1].position)
            if data.draw(st.booleans()):
                pieces.take(piece, piece[-1].position)
        at += cut
    assert pieces.told() == whole.told()


def test_false_alarms_stay_within_their_share() -> None:
    """Of 300 changes that do nothing at all, watched for 200 cycles each."""
    alarms = sum(
        after(BASIS, changed(0.9), 200, seed=1000 + seed)["sea"].is_breached for seed in range(300)
    )
    assert alarms / 300 <= ALPHA


@pytest.mark.parametrize("of", [1, 4])
def test_the_more_is_looked_at_the_more_evidence_is_asked_for(of: int) -> None:
    """All metrics of all namespaces share one chance of a false alarm."""
    parts = {f"ns-{number}": BASIS for number in range(of)}
    found = trials_of("nova", {"revision": NEW, "namespaces": parts})
    for one in found.values():
        for metric in one.told()["metrics"].values():
            assert metric["threshold"] == pytest.approx(2 * of / ALPHA)


def test_no_more_peers_are_written_down_than_say_anything() -> None:
    """Those heard last."""
    many = tuple(f"p-{number:03}" for number in range(MOST_PEERS + 20))
    peers = basis(many)["metrics"][0]["peers"]
    assert [one[0] for one in peers] == list(many[-MOST_PEERS:])


@given(st.lists(st.floats(0, 1), max_size=60), st.floats(0.011, 0.98))
def test_a_wager_is_a_product_of_bets(values: list[float], limit: float) -> None:
    """As written in the formula; never negative, and fair at the limit's worst."""
    parts = NO_WAGER
    for value in values:
        parts = wagered(parts, value, limit)
    for part, stake in zip(parts, STAKES, strict=True):
        slow = 1.0
        for value in values:
            slow *= 1 + stake / (1 - limit) * (limit - value)
        assert part == pytest.approx(slow, rel=1e-9, abs=1e-12)
        assert part >= 0
    assert total(parts) >= 0


@given(st.floats(0.011, 0.98))
def test_a_wager_gains_nothing_while_the_claim_holds(limit: float) -> None:
    """Its expectation at a mean that equals the limit is 1, of values that are 0 or 1."""
    up, down = wagered(NO_WAGER, 1.0, limit), wagered(NO_WAGER, 0.0, limit)
    for high, low in zip(up, down, strict=True):
        assert limit * high + (1 - limit) * low == pytest.approx(1.0)
