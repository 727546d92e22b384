"""`drill`: rehearse an emergency, and see whether the installation is ready for it.

The node that answers rehearses, or, with `--direct` or where none answers, this process. A drill
that did not pass ends with code 6.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from orbit.cli.brake import Direct
from orbit.cli.client import connected
from orbit.cli.options import Json, settings
from orbit.cli.outcome import ExitCode, fail
from orbit.cli.terminal import print_json, say

_PATIENCE_SECONDS = 180.0

app = typer.Typer(help="Rehearse an emergency.", rich_markup_mode=None)


@app.callback()
def drill() -> None:
    """Rehearse an emergency in a scratch namespace."""


@app.command("halt")
def halt(
    watch: Annotated[
        float,
        typer.Option("--watch", min=0.1, max=60, help="Seconds in which nothing may arrive."),
    ] = 2.0,
    is_direct: Direct = False,
    is_json: Json = False,
) -> None:
    """Rehearse a halt: real requests to a receiver of the drill's own, halted amid them."""
    with connected(settings(), is_direct=is_direct, patience_seconds=_PATIENCE_SECONDS) as api:
        answer = api.post("/governance/drills/halt", {"watchSeconds": watch})
    if is_json:
        print_json(answer)
    else:
        for line in drill_lines(answer):
            say(line)
    if not answer["hasPassed"]:
        fail(ExitCode.VERIFICATION_FAILED)


def drill_lines(answer: Mapping[str, Any]) -> Iterator[str]:
    """What a drill came to, step by step."""
    yield f"drill in namespace {answer['namespace']}: {answer['requests']} requests"
    yield f"halted amid them: {answer['arrivedBefore']} had arrived, {_flights(answer)}"
    quiesced = "quiesced" if answer["isQuiesced"] else "NOT quiesced"
    yield f"{quiesced} after {answer['quiescedSeconds']:.2f} s (epoch {answer['epoch']})"
    late, seconds = answer["arrivedHalted"], answer["watchedSeconds"]
    yield f"arrived in the {seconds:g} s after that answer: {late}"
    yield f"a trigger meanwhile was {'refused' if answer['isRefused'] else 'NOT refused'}"
    yield f"resumed: the other {answer['arrivedAfter']} arrived, {answer['arrivedTwice']} twice"
    missing = answer["requests"] - answer["arrivedBefore"] - late - answer["arrivedAfter"]
    if missing > 0:
        yield f"NOT arrived: {missing}"
    yield "the drill passed" if answer["hasPassed"] else "the drill did NOT pass"


def _flights(answer: Mapping[str, Any]) -> str:
    return f"{answer['inFlight']} were in flight and waited for"
