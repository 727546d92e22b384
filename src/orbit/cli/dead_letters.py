"""`dlq`: jobs out of retries. Only a person brings one back, and says so.

One is requeued by its id, many by a selection: at once, or in steps with canaries and a rate.
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

import typer

from orbit.cli import requeues
from orbit.cli.client import Api, connected
from orbit.cli.cycles import paged
from orbit.cli.lineage import receipt_line
from orbit.cli.options import Json, group, settings
from orbit.cli.terminal import cell, note, print_json, say, show, size, table, when
from orbit.errors import RequestInvalid

app = group("Look after jobs out of retries.")

_ON_THE_SPOT = "asked for on the command line"
_MOST_AT_ONCE = 10_000
_LARGEST_PAGE = 200
JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id.")]


class Snapshot(StrEnum):
    """Which endpoint a requeued job goes to: as it is now, or as it stood."""

    CURRENT = "current"
    OLD = "old"


class State(StrEnum):
    """Whether somebody has decided about a dead letter."""

    OPEN = "open"
    DECIDED = "decided"


Namespace = Annotated[str | None, typer.Option(help="Only its.")]
EndpointKey = Annotated[str | None, typer.Option(metavar="KEY", help="Only its.")]
Cause = Annotated[str | None, typer.Option(help="Only of this cause, as `ls` shows it.")]
RunProfile = Annotated[str | None, typer.Option(metavar="ID", help="Only its.")]

# What `requeue` takes.
OneJobId = Annotated[
    str | None, typer.Argument(metavar="[ID]", help="The job's id; else --namespace.")
]
Reason = Annotated[str | None, typer.Option(help="Why; stored with the decision. Needed for many.")]
Forced = Annotated[
    bool, typer.Option("--force", help="Even if it was requeued before, or may have arrived.")
]
SnapshotChoice = Annotated[
    Snapshot, typer.Option(help="To the endpoint as it is now, or as it stood.")
]
Many = Annotated[str | None, typer.Option(help="Many: all open ones of it.")]
Since = Annotated[datetime | None, typer.Option(help="Dead from then on (UTC).")]
Until = Annotated[datetime | None, typer.Option(help="Dead before then (UTC).")]
Limit = Annotated[int | None, typer.Option(min=1, max=10_000, help="At most so many, the oldest.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only count.")]
Canary = Annotated[
    int | None,
    typer.Option(min=1, max=10_000, help="So many first, until all are delivered."),
]
Rate = Annotated[float | None, typer.Option(help="Jobs a second.")]
Stopping = Annotated[
    bool,
    typer.Option(
        "--stop-on-failure/--no-stop-on-failure",
        help="With canary or rate: the first failed attempt ends it.",
    ),
]
Watched = Annotated[
    bool, typer.Option("--watch", help="With canary or rate: follow it to its end.")
]


@app.command("ls")
def list_letters(
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many.")] = 20,
    namespace: Namespace = None,
    endpoint: EndpointKey = None,
    cause: Cause = None,
    run_profile: RunProfile = None,
    state: Annotated[State | None, typer.Option(help="Only those; open unless told.")] = None,
    is_all: Annotated[
        bool, typer.Option("--all", help="Also those that were requeued or discarded.")
    ] = False,
    is_grouped: Annotated[
        bool, typer.Option("--group", help="Count the open ones by cause; only --namespace.")
    ] = False,
    is_json: Json = False,
) -> None:
    """List dead letters, those that died last first."""
    with connected(settings()) as api:
        if is_grouped:
            if endpoint or cause or run_profile or state or is_all:
                raise RequestInvalid("--group: only --namespace goes with it")
            _list_groups(api, namespace, is_json=is_json)
            return
        wanted = {
            "namespace": namespace,
            "endpointKey": endpoint,
            "cause": cause,
            "runProfileId": run_profile,
            "state": None if is_all else (state or State.OPEN).value,
        }
        answer = paged(api, "/dead-letters", limit, **wanted)
        if is_json:
            print_json(answer)
            return
        rest = _rest(api, answer["nextCursor"], wanted)
    if answer["items"]:
        _show_letters(answer["items"])
    elif not rest:
        say("No dead letter.")
    if rest:
        note(rest)


def _rest(api: Api, cursor: str | None, wanted: dict[str, str | None]) -> str | None:
    """What is said of those that are not shown; they are counted up to a page."""
    if cursor is None:
        return None
    page = api.get("/dead-letters", limit=_LARGEST_PAGE, cursor=cursor, **wanted)
    found = len(page["items"])
    if page["nextCursor"] is not None:
        number = f"At least {found:,}" if found else "There may be"
        return f"{number} more: --limit, or --group"
    return f"{found:,} more: --limit, or --group" if found else None


def _show_letters(letters: list[Any]) -> None:
    rows = [
        (
            one.get("jobId"),
            one.get("namespace"),
            one.get("runProfileId") or "(raw)",
            one.get("endpointKey"),
            one.get("attempts"),
            when(one.get("createdAt")),
            (one.get("decision") or {}).get("decision"),
            one.get("mayHaveArrived"),
            one.get("cause"),
        )
        for one in letters
    ]
    names = (
        "JOB",
        "NAMESPACE",
        "RUN PROFILE",
        "ENDPOINT",
        "ATTEMPTS",
        "SINCE",
        "DECISION",
        "MAY HAVE ARRIVED",
        "CAUSE",
    )
    show(table(names, rows, ids=("JOB", "NAMESPACE", "RUN PROFILE", "ENDPOINT", "SINCE")))


def _list_groups(api: Api, namespace: str | None, *, is_json: bool) -> None:
    answer = api.get("/dead-letters/groups", namespace=namespace)
    if is_json:
        print_json(answer)
        return
    if not answer["items"]:
        say("No dead letter.")
        return
    rows = [
        (
            one["namespace"],
            one["endpointKey"],
            one["open"],
            one["mayHaveArrived"],
            when(one["oldestAt"]),
            when(one["newestAt"]),
            one["cause"],
        )
        for one in answer["items"]
    ]
    names = ("NAMESPACE", "ENDPOINT", "OPEN", "MAY HAVE ARRIVED", "OLDEST", "NEWEST", "CAUSE")
    show(table(names, rows, ids=("NAMESPACE", "ENDPOINT", "OLDEST", "NEWEST")))


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
    job_id: OneJobId = None,
    reason: Reason = None,
    is_forced: Forced = False,
    snapshot: SnapshotChoice = Snapshot.CURRENT,
    namespace: Many = None,
    endpoint: EndpointKey = None,
    cause: Cause = None,
    run_profile: RunProfile = None,
    since: Since = None,
    until: Until = None,
    limit: Limit = None,
    is_dry_run: DryRun = False,
    canary: Canary = None,
    rate: Rate = None,
    is_stopping: Stopping = True,
    is_watched: Watched = False,
    is_json: Json = False,
) -> None:
    """Send a dead letter again as a new job, or many of a namespace."""
    many = {
        "endpointKey": endpoint,
        "cause": cause,
        "runProfileId": run_profile,
        "since": _instant(since),
        "until": _instant(until),
        "limit": limit,
        "canary": canary,
        "rate": rate,
        "isDryRun": is_dry_run or None,
        "stopOnFailure": None if is_stopping else False,
    }
    given = {name: value for name, value in many.items() if value is not None}
    if job_id is None:
        body = {**given, "namespace": namespace, "snapshot": snapshot.value, "reason": reason}
        _requeue_many(body, is_forced=is_forced, is_watched=is_watched, is_json=is_json)
    elif namespace or given or is_watched:
        raise RequestInvalid("give an ID, or --namespace and what goes with it, not both")
    else:
        _requeue_one(job_id, reason or _ON_THE_SPOT, snapshot, is_forced, is_json=is_json)


def _requeue_many(
    body: dict[str, Any], *, is_forced: bool, is_watched: bool, is_json: bool
) -> None:
    if body["namespace"] is None or is_forced:
        raise RequestInvalid("give an ID, or --namespace (without --force) for many")
    if body["reason"] is None and "isDryRun" not in body:
        raise RequestInvalid("--reason: say why so many are sent again")
    is_in_steps = "canary" in body or "rate" in body
    if not is_in_steps and (is_watched or "stopOnFailure" in body):
        raise RequestInvalid("--watch and --no-stop-on-failure: only with --canary or --rate")
    if not is_in_steps:
        body.setdefault("limit", _MOST_AT_ONCE)
    with connected(settings()) as api:
        requeues.ask(api, body, is_watched=is_watched, is_json=is_json)


def _requeue_one(
    job_id: str, reason: str, snapshot: Snapshot, is_forced: bool, *, is_json: bool
) -> None:
    body = {"reason": reason, "force": is_forced, "snapshot": snapshot.value}
    with connected(settings()) as api:
        answer = api.post(f"/dead-letters/{job_id}/requeue", body)
        if api.is_in_process:
            note("Stored. If no node is up, it is sent when one is.")
    if is_json:
        print_json(answer)
    else:
        say(f"requeued as {answer['jobId']}, {requeues.where(answer['snapshot'])}")


@app.command("requeues")
def list_requeues(
    batch_id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="A bulk requeue's id.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many.")] = 20,
    namespace: Namespace = None,
    is_watched: Annotated[bool, typer.Option("--watch", help="Follow it to its end.")] = False,
    cancel_reason: Annotated[
        str | None, typer.Option("--cancel", metavar="REASON", help="End it, and say why.")
    ] = None,
    is_json: Json = False,
) -> None:
    """List bulk requeues in steps, or show, follow or cancel one."""
    if batch_id is None and (is_watched or cancel_reason is not None):
        raise RequestInvalid("--watch and --cancel: say the ID of the bulk requeue")
    with connected(settings()) as api:
        if batch_id is None:
            answer = paged(api, "/dead-letters/requeues", limit, namespace=namespace)
        elif cancel_reason is not None:
            body = {"reason": cancel_reason}
            answer = api.post(f"/dead-letters/requeues/{batch_id}/cancel", body)
        elif is_watched:
            requeues.follow(api, batch_id, is_json=is_json)
            return
        else:
            answer = api.get(f"/dead-letters/requeues/{batch_id}")
    if is_json:
        print_json(answer)
    elif batch_id is None:
        requeues.show_batches(answer["items"])
        if answer["nextCursor"] is not None:
            note("There may be more: --limit")
    else:
        requeues.show_batch(answer)


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
        "cause": letter.get("cause"),
        "arrival": "may have arrived: ask the receiver" if letter.get("mayHaveArrived") else None,
        "since": when(letter.get("createdAt")),
        "cycle": f"{letter.get('cycleRunId')} in {letter.get('namespace')}",
        "run profile": letter.get("runProfileId"),
        "endpoint": f"{letter['endpointKey']}: {letter.get('method')} {letter.get('url')}",
        "bound to": _snapshot(answer.get("snapshot")),
        "item": f"{cell(letter.get('itemIndex'))}, {', '.join(content)}",
        "digest": f"sha256:{letter.get('digest')}",
        "requeued from": letter.get("requeuedFrom"),
    }
    lines = [f"dead letter {letter['jobId']}"]
    lines += [f"  {name:<16}{cell(value)}" for name, value in facts.items() if value]
    lines += [f"  {receipt_line(receipt)}" for receipt in answer["receipts"]]
    lines += [f"  {_decision(decision)}" for decision in answer["decisions"]]
    return lines


def _snapshot(snapshot: Any) -> str | None:
    """Which snapshot the job was bound to, and how the endpoint is now; older nodes don't say."""
    if snapshot is None:
        return None
    version = snapshot.get("version")
    name = "a snapshot past its retention" if version is None else f"snapshot v{version}"
    match snapshot["state"]:
        case "unchanged":
            return f"{name}, the endpoint is unchanged"
        case "re_encrypted":
            return f"{name}, re-encrypted since, the endpoint is otherwise unchanged"
        case "changed":
            return f"{name}, endpoint is now v{snapshot['currentVersion']}"
        case _:
            return f"{name}, endpoint is not configured any more"


def _instant(at: datetime | None) -> str | None:
    """An instant of the command line, which is UTC, as the API takes it."""
    return None if at is None else at.replace(tzinfo=at.tzinfo or UTC).isoformat()


def _decision(decision: Any) -> str:
    new = f" as {decision['newJobId']}" if decision.get("newJobId") else ""
    at, why = when(decision.get("decidedAt")), cell(decision.get("reason"))
    return f"{decision['decision']}{new} at {at}: {why}"
