"""A cycle's whole story as lines of text, from the JSON of `GET /cycles/{id}`. Pure.

Lines are never folded here: ids and digests stay whole, and a terminal wraps where it must.
Missing parts are left out, so that an older node's answer is shown as far as it goes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orbit.cli.terminal import cell, count, duration, size, when

Json = Mapping[str, Any]


def lineage_lines(cycle: Json) -> Iterator[str]:
    """Every line of a cycle's story, from its trigger to its end."""
    yield f"cycle {cycle['cycleRunId']}  {state_of(cycle)}"
    yield from _indented(_facts(cycle))
    sections: Sequence[tuple[str, Iterator[str]]] = (
        ("stages", map(_checkpoint, _list(cycle, "checkpoints"))),
        ("steps", map(_record, _list(cycle, "records"))),
        ("items", map(_item, _list(cycle, "items"))),
        ("jobs", _jobs(_list(cycle, "jobs"))),
        ("value ledger", _ledger(cycle.get("valueLedger") or {})),
    )
    for name, lines in sections:
        content = list(lines)
        if content:
            yield f"  {name}"
            yield from _indented(content, 4)
    if cycle.get("isComplete") is False:
        yield "  (too much to show whole; what is above is the beginning)"


def story_of(answer: Json) -> dict[str, Any]:
    """A lineage with the cycle's own values beside its checkpoints, items and jobs."""
    return {**answer["cycle"], **answer}


def state_of(cycle: Json) -> str:
    """The state as a person reads it: with the reason, with dead letters, or waiting."""
    state = str(cycle.get("state"))
    if cycle.get("isWaiting"):
        state = f"{state} (waits for the one before it)"
    if cycle.get("deadLettered"):
        state = f"{state} (dead letters: {cycle['deadLettered']})"
    reason = cycle.get("reason")
    return f"{state}: {cell(reason)}" if reason else state


def owner_of(cycle: Json) -> str:
    """The run profile and its namespace; a raw cycle has only the latter."""
    run_profile = cycle.get("runProfileId")
    namespace = cycle.get("namespace")
    return f"{namespace}/{run_profile}" if run_profile else f"{namespace} (raw)"


def job_counts(cycle: Json) -> dict[str, int]:
    """How many jobs are in each state, `total` and `attempts` of all; `cut`: there are more."""
    jobs = _list(cycle, "jobs")
    counts = {"total": len(jobs), "attempts": 0}
    if cycle.get("isComplete") is False:
        counts["cut"] = 1
    for job in jobs:
        state = str(job.get("state"))
        counts[state] = counts.get(state, 0) + 1
        counts["attempts"] += int(job.get("attempts") or 0)
    return counts


def _facts(cycle: Json) -> Iterator[str]:
    initiation = cycle.get("initiation") or {}
    yield _fact("of", owner_of(cycle) + _of_profile(cycle))
    yield _fact("began", f"{when(cycle.get('createdAt'))} by {cycle.get('trigger')}")
    if cycle.get("endedAt"):
        yield _fact("ended", when(cycle["endedAt"]))
    slot = cycle.get("slot")
    if slot:
        what = f"{when(slot.get('slotAt'))} {slot.get('outcome')}: {slot.get('reason')}"
        yield _fact("slot", what)
    elif cycle.get("slotAt"):
        yield _fact("slot", when(cycle["slotAt"]))
    if initiation.get("hash"):
        yield _fact("initiation", f"sha256:{initiation['hash']}")
    for name, key in (("idempotency key", "idempotencyKey"), ("configuration", "revision")):
        if cycle.get(key):
            yield _fact(name, str(cycle[key]))
    if cycle.get("traceparent"):
        yield _fact("trace", str(cycle["traceparent"]))
    if cycle.get("rerunOf"):
        yield _fact("re-run of", str(cycle["rerunOf"]))
    for rerun in _list(cycle, "reruns"):
        yield _fact("re-run as", str(rerun))


def _of_profile(cycle: Json) -> str:
    return f", profile {cycle['profileId']}" if cycle.get("profileId") else ""


def _fact(name: str, value: str) -> str:
    return f"{name:<16}{cell(value)}"


def _checkpoint(entry: Json) -> str:
    line = f"{when(entry.get('createdAt'))}  {entry.get('stage'):<22}"
    output = _content(entry) if entry.get("digest") else ""
    return f"{line}  {output}{_detail(entry.get('detail') or {})}".rstrip()


def _detail(detail: Json) -> str:
    told = [f"{key}={cell(value)}" for key, value in detail.items() if value not in (None, "")]
    return ("  " + " ".join(told)) if told else ""


def _content(entry: Json) -> str:
    digest, kind = entry.get("digest"), cell(entry.get("contentType"))
    return f"{kind}  {size(entry.get('size'))}  sha256:{digest}"


def _record(entry: Json) -> str:
    line = (
        f"{entry.get('stage')} [{entry.get('step')}] {cell(entry.get('name'))}  "
        f"attempt {entry.get('attempt')}  {entry.get('outcome')}  "
        f"{duration(entry.get('durationSeconds'))}"
    )
    return f"{line}: {cell(entry['error'])}" if entry.get("error") else line


def _item(entry: Json) -> str:
    return f"[{entry.get('itemIndex')}] {_content(entry)}"


def _jobs(jobs: Sequence[Json]) -> Iterator[str]:
    for job in jobs:
        where = f"item {job.get('itemIndex')} to {cell(job.get('endpointKey'))}"
        yield f"{job['jobId']}  {where}  {job.get('state')}"
        yield f"    {job.get('method')} {cell(job.get('url'))}  {_content(job)}"
        if job.get("requeuedFrom"):
            yield f"    requeued from {job['requeuedFrom']}"
        for receipt in job.get("receipts") or ():
            yield f"    {receipt_line(receipt)}"
        if job.get("dueAt") and job.get("state") in ("ready", "retrying"):
            yield f"    next attempt from {when(job['dueAt'])}"
        if job.get("held"):
            yield f"    not sent meanwhile: the lane is {hold_text(job['held'])}"
        if job.get("cause"):
            yield f"    dead letter: {cell(job['cause'])}"


def receipt_line(receipt: Json) -> str:
    """One attempt: when it began, what became of it, how long it took."""
    total = (receipt.get("latency") or {}).get("totalSeconds")
    parts = [
        f"attempt {receipt.get('attempt')}",
        _began(receipt),
        str(receipt.get("outcome")),
        str(receipt["status"]) if receipt.get("status") else "",
        "" if total is None else duration(total),
        "kept connection" if receipt.get("isReused") else "",
        "probe" if receipt.get("isProbe") else "",
    ]
    line = "  ".join(part for part in parts if part)
    return f"{line}: {cell(receipt['error'])}" if receipt.get("error") else line


def _began(receipt: Json) -> str:
    """When the attempt began; of a lost worker's it is only known when that was noticed."""
    if receipt.get("startedAt"):
        return when(receipt["startedAt"])
    return f"found lost at {when(receipt.get('createdAt'))}"


def hold_text(lane: Json) -> str:
    """Why a held lane sends nothing; a dash for one that is not held."""
    if not lane.get("probeAt"):
        return "-"
    since = f" since {when(lane['openedAt'])}" if lane.get("openedAt") else ""
    failed = count(lane.get("failures") or 0, "failure")
    return f"held{since}, {failed} in a row; next probe from {when(lane['probeAt'])}"


def _ledger(entry: Json) -> Iterator[str]:
    if not entry:
        return
    tags = entry.get("tags") or {}
    yield "tags: " + (", ".join(f"{key}={cell(value)}" for key, value in tags.items()) or "none")
    yield (
        f"items {entry.get('items')}, jobs {entry.get('jobs')}, delivered "
        f"{entry.get('delivered')}, dead letters {entry.get('deadLettered')}, attempts "
        f"{entry.get('attempts')}, {size(entry.get('bytes'))}, {duration(entry.get('wallSeconds'))}"
    )


def _list(entry: Json, key: str) -> Sequence[Any]:
    found = entry.get(key)
    return found if isinstance(found, list) else ()


def _indented(lines: Iterator[str] | Sequence[str], by: int = 2) -> Iterator[str]:
    return (" " * by + line for line in lines)
