"""`halt`, `resume`, `policy`: the brake of a namespace, at once, with or without a node.

With `--direct`, or where no node answers or lets in, the verbs work on the database themselves. A
halt that could not be proved in time ends with code 6, a resumption that waits for a second person
with 4.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orbit.cli.client import connected
from orbit.cli.options import WHEN, Json, instant, settings
from orbit.cli.outcome import ExitCode, fail
from orbit.cli.terminal import note, print_json, say, show, table, when
from orbit.errors import OrbitError
from orbit.vocabulary import nearest

if TYPE_CHECKING:
    from orbit.cli.client import Api

_SHOWN = 20
Namespace = Annotated[str, typer.Argument(help="The namespace.")]
Direct = Annotated[
    bool, typer.Option("--direct", help="Ask no node: work straight on the database.")
]
Why = Annotated[str, typer.Option("--reason", help="Why; it is kept.")]


def halt(
    namespace: Namespace,
    reason: Annotated[str | None, typer.Option("--reason", help="Why; it is kept.")] = None,
    wait: Annotated[
        float, typer.Option("--wait", min=0, max=300, help="Seconds for what is in flight to end.")
    ] = 10.0,
    until: Annotated[
        str | None,
        typer.Option("--until", metavar="WHEN", help=f"Resume by itself then: {WHEN}."),
    ] = None,
    is_direct: Direct = False,
    is_json: Json = False,
) -> None:
    """Halt a namespace: nothing of it is sent until it is resumed."""
    if reason is not None:  # of any bytes: nothing that is said keeps a halt from being asked for
        reason = reason.encode("utf-8", "replace").decode()
    body = {"reason": reason, "waitSeconds": wait, "until": instant(until, "--until")}
    given = {name: value for name, value in body.items() if value is not None}
    # The answer comes after the wait, and a busy database may need some time of its own.
    with connected(
        settings(), is_direct=is_direct, is_urgent=True, patience_seconds=wait + 30
    ) as api:
        answer = api.post(f"/governance/namespaces/{namespace}/halt", given)
        if is_json:
            print_json(answer)
        else:
            for line in halt_lines(answer):
                say(line)
            _show_out(answer)
        if not answer["known"]:
            _warn_of_name(api, namespace)
    if not answer["quiesced"]:
        fail(ExitCode.VERIFICATION_FAILED)


def resume(
    namespace: Namespace,
    reason: Why,
    epoch: Annotated[
        int | None, typer.Option("--epoch", min=1, help="Only if this halt is still the last.")
    ] = None,
    is_direct: Direct = False,
    is_json: Json = False,
) -> None:
    """Let a halted namespace go on; some want a second person to say so too."""
    body = {"reason": reason} if epoch is None else {"reason": reason, "epoch": epoch}
    with connected(settings(), is_direct=is_direct, is_urgent=True) as api:
        answer = api.post(f"/governance/namespaces/{namespace}/resume", body)
    if is_json:
        print_json(answer)
    elif answer["state"] == "running":
        say(f"namespace {namespace} goes on")
    else:
        say(f"namespace {namespace} is still halted: a second person has to resume it too")
    if answer["state"] != "running":
        fail(ExitCode.HALTED)


def policy(
    namespace: Annotated[str, typer.Argument(help="The namespace, or * for all others.")],
    two_person_resume: Annotated[
        bool,
        typer.Option(
            "--two-person-resume/--one-person-resume", help="How many persons end a halt."
        ),
    ],
    reason: Why,
    is_direct: Direct = False,
    is_json: Json = False,
) -> None:
    """Say how many persons are needed to resume a namespace."""
    body = {"twoPersonResume": two_person_resume, "reason": reason}
    with connected(settings(), is_direct=is_direct, is_urgent=True) as api:
        answer = api.post(f"/governance/namespaces/{namespace}/settings", body)
    if is_json:
        print_json(answer)
        return
    persons = "two persons" if answer["twoPersonResume"] else "one person"
    say(f"namespace {answer['namespace']} is resumed by {persons}")


def halt_lines(answer: Mapping[str, Any]) -> Iterator[str]:
    """What a halt came to."""
    until = f" until {when(answer['untilAt'])}" if answer.get("untilAt") else ""
    yield f"namespace {answer['namespace']} is halted{until} (epoch {answer['epoch']})"
    seconds = f"{answer['waitedSeconds']:.2f} s"
    if answer["quiesced"]:
        yield f"quiesced after {seconds}: nothing of it is out on any node"
        if answer["inFlightCount"]:
            yield f"{answer['inFlightCount']} were in flight and ended: {_ends(answer)}"
        return
    if not answer["seen"]:
        yield f"NOT quiesced after {seconds}: the database was lost; say `orbit halt` again"
        return
    yield f"NOT quiesced after {seconds}: {answer['stillOut']} still out"
    if not answer["inForce"]:
        yield "it was resumed meanwhile"
    if not answer["fenced"]:
        yield "a claim that began before is still under way; it will find the halt, or has claimed"


def _warn_of_name(api: Api, namespace: str) -> None:
    """At night names are misspelt, and the right one goes on."""
    names: set[str] = set()
    with suppress(OrbitError):  # the halt is done; this only looks for a hint
        names = {one["namespace"] for one in api.get("/run-profiles")["items"]}
    hint = nearest(namespace, sorted(names))
    note(f"Nothing of that name is configured or ever ran here{hint or '; is it the right one?'}")


def _ends(answer: Mapping[str, Any]) -> str:
    """How many ended how, of those that are listed."""
    ends = Counter(str(one["outcome"]) for one in answer["inFlight"])
    return ", ".join(f"{number} {end}" for end, number in ends.most_common())


def _show_out(answer: Mapping[str, Any]) -> None:
    out = [one for one in answer["inFlight"] if one["outcome"] is None]
    if not out:
        return
    names = ("JOB", "CYCLE", "ENDPOINT", "ATTEMPT", "NODE")
    rows = [
        (
            one["jobId"] or "(a step)",
            one["cycleRunId"],
            one["endpointKey"] or "-",
            one["attempt"] or "-",
            one["nodeId"],
        )
        for one in out[:_SHOWN]
    ]
    show(table(names, rows, ids=("JOB", "CYCLE", "NODE")))
    if len(out) > _SHOWN:
        note(f"{len(out) - _SHOWN} more; see --json.")
