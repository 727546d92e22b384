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

app = group("Look after dead letters: jobs that are out of retries.")

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
            one.get("cause"),
        )
        for one in answer["items"]
    ]
    names = ("JOB", "NAMESPACE", "ENDPOINT", "ATTEMPTS", "SINCE", "DECISION", "CAUSE")
    show(table(names, rows, ids=("JOB", "NAMESPACE", "ENDPOINT", "SINCE")))


@app.command("show")
def show_letter(job_id: JobId, is_json: Json = False) -> None:
    """Show one dead letter: its job, its attempts, what was decided."""
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
    reason: Annotated[str | None, typer.Option(help="Why; stored with the decision.")] = None,
    is_forced: Annotated[
        bool, typer.Option("--force", help="Even if it was requeued before.")
    ] = False,
    snapshot: Annotated[
        Snapshot, typer.Option(help="To the endpoint as it is now, or as it stood.")
    ] = Snapshot.CURRENT,
    is_json: Json = False,
) -> None:
    """Send a dead letter again, as a new job that names the old."""
    body: dict[str, Any] = {"force": is_forced, "snapshot": snapshot.value}
    if reason is not None:
        body["reason"] = reason
    with connected(settings()) as api:
        answer = api.post(f"/dead-letters/{job_id}/requeue", body)
        if api.is_in_process:
            note("Stored. If no node is up, it is sent when one is.")
    if is_json:
        print_json(answer)
    else:
        say(f"requeued as {answer.get('newJobId') or answer.get('jobId')}")


@app.command("discard")
def discard(
    job_id: JobId,
    reason: Annotated[str, typer.Option(help="Why; stored with the decision.")],
    is_json: Json = False,
) -> None:
    """Decide that a dead letter is not to be sent; it stays on record."""
    with connected(settings()) as api:
        answer = api.post(f"/dead-letters/{job_id}/discard", {"reason": reason})
    if is_json:
        print_json(answer)
    else:
        say(f"discarded {job_id}")


def letter_lines(answer: Any) -> list[str]:
    """A dead letter as lines of text."""
    letter = answer["deadLetter"]
    lines = [
        f"dead letter {letter['jobId']}",
        f"  cause         {cell(letter.get('cause'))}",
        f"  since         {when(letter.get('createdAt'))}",
        f"  cycle         {letter.get('cycleRunId')} in {letter.get('namespace')}",
        f"  endpoint      {letter.get('endpointKey')}: {cell(letter.get('method'))} "
        f"{cell(letter.get('url'))}",
        f"  content       item {cell(letter.get('itemIndex'))}, {cell(letter.get('contentType'))}, "
        f"{size(letter.get('size'))}, sha256:{letter.get('digest')}",
    ]
    if letter.get("requeuedFrom"):
        lines.append(f"  requeued from {letter['requeuedFrom']}")
    lines += [f"  {receipt_line(receipt)}" for receipt in answer["receipts"]]
    lines += [f"  {_decision(decision)}" for decision in answer["decisions"]]
    return lines


def _decision(decision: Any) -> str:
    new = f" as {decision['newJobId']}" if decision.get("newJobId") else ""
    at, why = when(decision.get("decidedAt")), cell(decision.get("reason"))
    return f"{decision['decision']}{new} at {at}: {why}"
