"""`insight`: what signals are worth, measured on fleets whose truth is known.

`insight replay` reads the stored telemetry over the API, shows what the detector says of it, and
measures it on fleets drawn from that history; nothing is stored. `insight replay --simulated` runs
the offline gate in this process; no node and no database is asked. It ends with the code for a
failed verification when a band is broken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orbit.cli.client import connected
from orbit.cli.options import Json, group, settings
from orbit.cli.outcome import ExitCode, fail
from orbit.cli.terminal import count, note, print_json, say, show, table

if TYPE_CHECKING:
    from orbit.cli.client import Api
    from orbit.insight.gate import Delay, Report, Score
    from orbit.insight.replaying import Placed, Replay
    from orbit.insight.source import TelemetryEvent

_PAGE = 1000
_SHOWN = 50
_SIMULATED_FLEETS, _DRAWN_FLEETS = 20, 5

app = group("Signals: what they are worth.")


@app.command("replay")
def replay(
    is_simulated: Annotated[
        bool, typer.Option("--simulated", help="Replay simulated fleets, and hold their bands.")
    ] = False,
    namespace: Annotated[
        str | None, typer.Option(help="Of stored telemetry only this namespace.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed, the same fleets.")] = 1,
    fleets: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Fleets per scenario (20; drawn ones 5).")
    ] = None,
    is_json: Json = False,
) -> None:
    """Replay telemetry: false alarms, precision, recall, delay, beside naive rules."""
    if is_simulated:
        _simulated(seed, fleets or _SIMULATED_FLEETS, is_json=is_json)
    else:
        _stored(namespace, seed, fleets or _DRAWN_FLEETS, is_json=is_json)


def _simulated(seed: int, fleets: int, *, is_json: bool) -> None:
    from orbit.insight.gate import run_gate

    report = run_gate(seed, fleets)
    if is_json:
        print_json(report_json(report))
    else:
        _show(report)
    if report.broken:
        fail(ExitCode.VERIFICATION_FAILED)


def _stored(namespace: str | None, seed: int, fleets: int, *, is_json: bool) -> None:
    from orbit.insight.replaying import Replay

    replayed = Replay()
    with connected(settings()) as api:
        said = list(_said(api, replayed, namespace))
    scores = replayed.scores(seed, fleets)
    if is_json:
        print_json(
            {
                "events": replayed.events,
                "firstPosition": replayed.first_position,
                "lastPosition": replayed.last_position,
                "profiles": replayed.profiles,
                "signals": [{"namespace": one.namespace, **one.said.as_json()} for one in said],
                "seed": seed,
                "fleets": fleets,
                "drawnFrom": len(replayed.histories),
                "scores": [_score_json(one) for one in scores],
            }
        )
    else:
        _show_stored(replayed, said, scores)


def _said(api: Api, replayed: Replay, namespace: str | None) -> Iterator[Placed]:
    """What is said of the telemetry there is, a page in memory at a time."""
    named = {} if namespace is None else {"namespace": namespace}
    after = 0
    while True:
        page = api.get("/telemetry", after=after, limit=_PAGE, **named)
        for one in page["items"]:
            yield from replayed.take(one["data"]["namespace"], (_event(one),))
        after = page["position"]
        if len(page["items"]) < _PAGE:
            return


def _event(given: dict[str, Any]) -> TelemetryEvent:
    from orbit.insight.source import TelemetryEvent

    data = given["data"]
    name = given["type"].removeprefix("orbit.").rpartition(".")[0]
    return TelemetryEvent(given["position"], name, data["profileId"], data["runId"], data)


def _show_stored(replayed: Replay, said: list[Placed], scores: list[Score]) -> None:
    say(
        f"{count(replayed.events, 'event')} of {count(replayed.profiles, 'profile')}, "
        f"{count(len(said), 'signal')}; nothing was stored"
    )
    if said:
        say()
        names = ("POSITION", "NAMESPACE", "PROFILE", "METRIC", "SIGNAL", "CONFIDENCE")
        show(table(names, (_said_row(one) for one in said[-_SHOWN:]), ids=names[:3]))
    if len(said) > _SHOWN:
        note(f"Only the last {_SHOWN} are shown; --json gives all.")
    if not scores:
        note("No profile has 100 cycles as yet; `--simulated` shows what signals are worth.")
        return
    say()
    say(
        f"Fleets drawn from {count(len(replayed.histories), 'profile')}, taken as healthy; in "
        "`dropped` a quarter lose 30 %:"
    )
    _show_scores(scores)


def _said_row(one: Placed) -> tuple[str, ...]:
    said = one.said
    confidence = getattr(said, "confidence", None)
    return (
        str(said.last_position),
        one.namespace,
        said.key.profile_id,
        said.key.metric,
        str(said.name),
        "-" if confidence is None else f"{confidence:.0%}",
    )


def report_json(report: Report) -> dict[str, Any]:
    """As `--json` shows it."""
    return {
        "seed": report.seed,
        "fleets": report.fleets,
        "scores": [_score_json(one) for one in report.scores],
        "delays": [
            {
                "before": one.before,
                "after": one.after,
                "runs": one.runs,
                "medianCycles": one.median,
                "foundWithin200": one.found_within_200,
                "medianCyclesOfFound": one.median_of_found,
            }
            for one in report.delays
        ],
        "brokenBands": list(report.broken),
    }


def _score_json(one: Score) -> dict[str, Any]:
    return {
        "scenario": one.scenario,
        "detector": one.detector,
        "falseAlarmsPer1000": one.false_alarms_per_1000,
        "precision": one.precision,
        "precisionBothDirections": one.precision_both,
        "recallWithin200": one.recall,
        "medianDelayCycles": one.median_delay,
        "healthyProfilesFlagged": one.flagged_healthy,
    }


def _show(report: Report) -> None:
    say(f"{count(report.fleets, 'fleet')} of each scenario, seed {report.seed}")
    say()
    _show_scores(report.scores)
    say()
    for line in delay_lines(report.delays):
        say(line)
    for broken in report.broken:
        note(f"band broken: {broken}")


def _show_scores(scores: Iterable[Score]) -> None:
    names = ("SCENARIO", "DETECTOR", "FALSE/1,000", "PRECISION", "RECALL", "DELAY")
    show(table(names, (_row(one) for one in scores), ids=("SCENARIO",)))


def delay_lines(delays: tuple[Delay, ...]) -> Iterator[str]:
    """How long single drops take to be found, one a line."""
    for one in delays:
        median = "not found by half" if one.median is None else f"{one.median:g} cycles"
        yield (
            f"a drop from {one.before:g} to {one.after:g}, no peers: {median} at the median, "
            f"{one.found_within_200:.0%} found within 200"
        )


def _row(one: Score) -> tuple[str, ...]:
    delay = "-" if one.median_delay is None else f"{one.median_delay:g}"
    return (
        one.scenario,
        one.detector,
        f"{one.false_alarms_per_1000:.3f}",
        _figure(one.precision),
        _figure(one.recall),
        delay,
    )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
