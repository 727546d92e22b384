"""`dlq`: jobs out of retries. Only a person brings one back, and says so."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from orbit.cli.client import connected
from orbit.cli.cycles import paged
from orbit.cli.lineage import receipt_line
from orbit.cli.options import Json, group, settings
from orbit.cli.terminal import cell, note, print_json, say, show, size, table, when

app = group("Look after jobs out of retries.")

_ON_THE_SPOT = "asked for on the command line"
JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id.")]


class Snapshot(StrEnum):
    """Which endpoint a requeued job goes to: as it is now, or as it stood."""

    CURRENT = "current"
    OLD = "old"


@app.command("ls")
def list_letters(
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many.")] = 20,
    namespace: Annotated[str | None, typer.Option(help="Only its.")] = None,
    endpoint: Annotated[str | None, typer.Option(metavar="KEY", help="Only its.")] = None,
    is_all: Annotated[
        bool, typer.Option("--all", help="Also those that were requeued or discarded.")
    ] = False,
    is_json: Json = False,
) -> None:
    """List dead letters, the newest first."""
    with connected(settings()) as api:
        answer = paged(
            api,
            "/dead-letters",
            limit,
            namespace=namespace,
            endpointKey=endpoint,
            state=None if is_all else "open",
        )
    if is_json:
        print_json(answer)
        return
    if not answer["items"]:
        say("No dead letter.")
        return
    rows = [
        (
            one.get("jobId"),
            one.get("namespace"),
            one.get("endpointKey"),
            one.get("attempts"),
            when(one.get("createdAt")),
            (one.get("decision") or {}).get("decision"),
            _cause(one),
        )
        for one in answer["items"]
    ]
    names = ("JOB", "NAMESPACE", "ENDPOINT", "ATTEMPTS", "SINCE", "DECISION", "CAUSE")
    show(table(names, rows, ids=("JOB", "NAMESPACE", "ENDPOINT", "SINCE")))


@app.command("show")
def show_letter(job_id: JobId, is_json: Json = False) -> None:
    """Show a dead letter with its attempts."""
    with connected(settings()) as api:
        letter = api.get(f"/dead-letters/{job_id}")
    if is_json:
        print_json(letter)
        return
    for line in letter_lines(letter):
        say(line)


@app.command("requeue")
def requeue(
    job_id: JobId,
    reason: Annotated[str, typer.Option(help="Why; stored with the decision.")] = _ON_THE_SPOT,
    is_forced: Annotated[
        bool, typer.Option("--force", help="Even if it was requeued before, or may have arrived.")
    ] = False,
    snapshot: Annotated[
        Snapshot, typer.Option(help="To the endpoint as it is now, or as it stood.")
    ] = Snapshot.CURRENT,
    is_json: Json = False,
) -> None:
    """Send a dead letter again, as a new job."""
    body = {"reason": reason, "force": is_forced, "snapshot": snapshot.value}
    with connected(settings()) as api:
        answer = api.post(f"/dead-letters/{job_id}/requeue", body)
        if api.is_in_process:
            note("Stored. If no node is up, it is sent when one is.")
    if is_json:
        print_json(answer)
    else:
        say(f"requeued as {answer['jobId']}")


@app.command("discard")
def discard(
    job_id: JobId,
    reason: Annotated[str, typer.Option(help="Why; stored with the decision.")],
    is_json: Json = False,
) -> None:
    """Give a dead letter up; it stays on record."""
    with connected(settings()) as api:
        answer = api.post(f"/dead-letters/{job_id}/discard", {"reason": reason})
    if is_json:
        print_json(answer)
    else:
        say(f"discarded {job_id}")


def letter_lines(answer: Any) -> list[str]:
    """A dead letter as lines of text."""
    letter = answer["deadLetter"]
    content = (cell(letter.get("contentType")), size(letter.get("size")))
    facts = {
        "cause": _cause(letter),
        "since": when(letter.get("createdAt")),
        "cycle": f"{letter.get('cycleRunId')} in {letter.get('namespace')}",
        "endpoint": f"{letter['endpointKey']}: {letter.get('method')} {letter.get('url')}",
        "item": f"{cell(letter.get('itemIndex'))}, {', '.join(content)}",
        "digest": f"sha256:{letter.get('digest')}",
        "requeued from": letter.get("requeuedFrom"),
    }
    lines = [f"dead letter {letter['jobId']}"]
    lines += [f"  {name:<16}{cell(value)}" for name, value in facts.items() if value]
    lines += [f"  {receipt_line(receipt)}" for receipt in answer["receipts"]]
    lines += [f"  {_decision(decision)}" for decision in answer["decisions"]]
    return lines


def _cause(letter: Any) -> str:
    doubt = " (may have arrived)" if letter.get("mayHaveArrived") else ""
    return f"{cell(letter.get('cause'))}{doubt}"


def _decision(decision: Any) -> str:
    new = f" as {decision['newJobId']}" if decision.get("newJobId") else ""
    at, why = when(decision.get("decidedAt")), cell(decision.get("reason"))
    return f"{decision['decision']}{new} at {at}: {why}"
