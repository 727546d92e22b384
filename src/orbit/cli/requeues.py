"""Bulk requeues on the command line: asked for, followed to their end, listed.

What follows a batch only looks: a batch goes on without it. A node that goes away meanwhile is
waited for, since another goes on with the batch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from orbit.cli.client import Api
from orbit.cli.outcome import ExitCode, fail
from orbit.cli.terminal import cell, count, note, print_json, say, show, table, when
from orbit.cli.watching import get_patiently

_POLL_SECONDS = 0.5
_RUNNING = "running"


def ask(api: Api, body: Mapping[str, Any], *, is_watched: bool, is_json: bool) -> None:
    """Asks for a bulk requeue and shows the answer; follows it if that is wanted.

    Ends the verb with code 1 if the batch that it followed did not finish.
    """
    answer = api.post("/dead-letters/requeue", body)
    batch_id = answer.get("batchId")
    if batch_id and is_watched:
        if not is_json:
            _tell(answer)
        follow(api, batch_id, is_json=is_json)
        return
    if is_json:
        print_json(answer)
        return
    _tell(answer)
    if api.is_in_process and answer["matching"] and not answer["isDryRun"]:
        note("Stored. If no node is up, it is sent when one is.")


def _tell(answer: Any) -> None:
    matching, target = answer["matching"], where(answer["snapshot"])
    if not matching:
        say("no dead letter matches")
    elif answer["isDryRun"]:
        say(f"{_selected(answer)} would be requeued, {target}")
    elif answer.get("batchId"):
        say(f"bulk requeue {answer['batchId']} of {_selected(answer)}, {target}")
    else:
        done = len(answer["items"])
        left = f", {matching - done} are left" if matching > done else ""
        say(f"requeued {count(done, 'dead letter')}, {target}{left}")
    if answer["mayHaveArrived"]:
        say(f"left out: {answer['mayHaveArrived']} that may have arrived (ask the receiver)")
    if answer["withoutPayload"]:
        say(f"left out: {answer['withoutPayload']} whose payload is past its retention")


def _selected(answer: Any) -> str:
    matching, selected = count(answer["matching"], "dead letter"), answer["selected"]
    is_cut = selected < answer["matching"]
    return f"{selected:,} of {matching} (the oldest)" if is_cut else matching


def where(snapshot: str) -> str:
    """Says aloud which snapshot a requeue uses."""
    if snapshot == "old":
        return "to the endpoint as it stood for the old job (old snapshot)"
    return "to the endpoint as it is now (current snapshot)"


def follow(api: Api, batch_id: str, *, is_json: bool) -> None:
    """Shows a batch until it has ended; code 1 if it was stopped or cancelled."""
    told = ""
    while True:
        asked_at = time.monotonic()
        batch = get_patiently(api, f"/dead-letters/requeues/{batch_id}")
        line = progress(batch)
        if line != told and not is_json:
            say(line)
            told = line
        if batch["state"] != _RUNNING:
            break
        # A batch with very many jobs takes a while to count: the node has other work too.
        time.sleep(max(_POLL_SECONDS, 3 * (time.monotonic() - asked_at)))
    if is_json:
        print_json(batch)
    if batch["state"] != "finished":
        fail(ExitCode.FAILED)


def progress(batch: Any) -> str:
    """A batch in a line."""
    most = min(batch["matching"], batch.get("sizeLimit") or batch["matching"])
    phase = {"canary": " (canary)"}.get(batch.get("phase") or "", "")
    text = (
        f"{batch['state']}{phase}: requeued {batch['requeued']} of {most}, "
        f"delivered {batch['delivered']}, failed {batch['failed']}, pending {batch['pending']}"
    )
    why = batch.get("why") or batch.get("lastError")
    return f"{text}; {cell(why)}" if why and batch["state"] != "finished" else text


def show_batch(batch: Any) -> None:
    """A batch as lines of text."""
    narrowed = {
        "endpoint": batch.get("endpointKey"),
        "cause": batch.get("cause"),
        "run profile": batch.get("runProfileId"),
        "since": batch.get("sinceAt") and when(batch["sinceAt"]),
        "before": when(batch["untilAt"]),
    }
    rate = batch.get("rate")
    facts = {
        "namespace": batch["namespace"],
        **narrowed,
        "reason": batch["reason"],
        "asked for by": f"{cell(batch.get('askedBy'))} at {when(batch['createdAt'])}",
        "snapshot": where(batch["snapshot"]),
        "canary": batch.get("canary"),
        "rate": f"{rate:g} a second" if rate else None,
        "stops": "at the first failure" if batch["stopOnFailure"] else "if a canary dies",
        "limit": batch.get("sizeLimit"),
        "ended": batch.get("endedAt") and when(batch["endedAt"]),
    }
    say(f"bulk requeue {batch['batchId']}")
    say(f"  {progress(batch)}")
    for name, value in facts.items():
        if value:
            say(f"  {name:<16}{cell(value)}")


def show_batches(batches: list[Any]) -> None:
    """Batches as a table."""
    if not batches:
        say("No bulk requeue in steps.")
        return
    names = ("BATCH", "NAMESPACE", "STATE", "MATCHING", "REQUEUED", "DELIVERED", "FAILED", "BEGAN")
    rows = [
        (
            one["batchId"],
            one["namespace"],
            one["state"],
            one["matching"],
            one["requeued"],
            one["delivered"],
            one["failed"],
            when(one["createdAt"]),
        )
        for one in batches
    ]
    show(table(names, rows, ids=("BATCH", "NAMESPACE", "BEGAN")))
