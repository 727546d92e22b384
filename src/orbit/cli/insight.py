"""`insight`: what signals are worth, measured on fleets whose truth is known.

`insight replay --simulated` runs the offline gate in this process; no node and no database is
asked. It ends with the code for a failed verification when a band is broken.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orbit.cli.options import Json, group
from orbit.cli.outcome import ExitCode, fail
from orbit.cli.terminal import count, note, print_json, say, show, table
from orbit.errors import RequestInvalid

if TYPE_CHECKING:
    from orbit.insight.gate import Delay, Report, Score

app = group("Signals: what they are worth.")


@app.command("replay")
def replay(
    is_simulated: Annotated[
        bool, typer.Option("--simulated", help="Replay simulated fleets.")
    ] = False,
    seed: Annotated[int, typer.Option(help="The same seed, the same fleets.")] = 1,
    fleets: Annotated[
        int, typer.Option(min=1, max=1000, help="Fleets of 20 profiles for each scenario.")
    ] = 20,
    is_json: Json = False,
) -> None:
    """Measure false alarms, precision, recall and delay, beside naive rules."""
    from orbit.insight.gate import run_gate

    if not is_simulated:
        raise RequestInvalid("nothing to replay; expected --simulated")
    report = run_gate(seed, fleets)
    if is_json:
        print_json(report_json(report))
    else:
        _show(report)
    if report.broken:
        fail(ExitCode.VERIFICATION_FAILED)


def report_json(report: Report) -> dict[str, Any]:
    """As `--json` shows it."""
    return {
        "seed": report.seed,
        "fleets": report.fleets,
        "scores": [
            {
                "scenario": one.scenario,
                "detector": one.detector,
                "falseAlarmsPer1000": one.false_alarms_per_1000,
                "precision": one.precision,
                "precisionBothDirections": one.precision_both,
                "recallWithin200": one.recall,
                "medianDelayCycles": one.median_delay,
                "healthyProfilesFlagged": one.flagged_healthy,
            }
            for one in report.scores
        ],
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


def _show(report: Report) -> None:
    say(f"{count(report.fleets, 'fleet')} of each scenario, seed {report.seed}")
    say()
    names = ("SCENARIO", "DETECTOR", "FALSE/1,000", "PRECISION", "RECALL", "DELAY")
    show(table(names, (_row(one) for one in report.scores), ids=("SCENARIO",)))
    say()
    for line in delay_lines(report.delays):
        say(line)
    for broken in report.broken:
        note(f"band broken: {broken}")


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
