"""Follows cycles to their end: a live table on a terminal, one line per change elsewhere.

Asks again and again; a node that goes away meanwhile is waited for a while, since another (or
the same, started again) goes on with the work. Where nobody works on cycles that is said once.
Nothing here changes anything.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from orbit.cli.client import Api
from orbit.cli.lineage import job_counts, owner_of, state_of, story_of
from orbit.cli.outcome import ApiProblem, NodeUnreachable
from orbit.cli.terminal import console, note, table

if TYPE_CHECKING:
    from rich.table import Table

_POLL_SECONDS = 0.15
_PATIENCE_SECONDS = 60.0
_IDLE_SECONDS = 3.0
_WITH_JOBS, _AFTER_JOBS = "dispatch_enqueued", "dispatch_complete"
_LIVE_WIDTH = 110  # what a line of the live table takes: it would be cut, not folded

Show = Callable[[Sequence[Any]], None]


def watch(api: Api, cycle_ids: Sequence[str], *, is_quiet: bool = False) -> list[Any]:
    """Shows the cycles until all have ended; their lineages as the API gives them.

    Raises NodeUnreachable when the node stays away, and ApiProblem.
    """
    with _showing(is_quiet=is_quiet) as shown:
        latest: dict[str, Any] = {}
        hint_at: float | None = time.monotonic() + _IDLE_SECONDS
        while True:
            asked_at = time.monotonic()
            for cycle_id in cycle_ids:
                if cycle_id not in latest or _is_running(latest[cycle_id]):
                    latest[cycle_id] = get_patiently(api, f"/cycles/{cycle_id}")
            shown([story_of(latest[cycle_id]) for cycle_id in cycle_ids])
            if not any(map(_is_running, latest.values())):
                return [latest[cycle_id] for cycle_id in cycle_ids]
            if hint_at is not None and time.monotonic() > hint_at:
                hint_at = None
                _tell_if_idle(api)
            # Cycles with thousands of jobs take a while to read: the node has other work too.
            time.sleep(max(_POLL_SECONDS, 3 * (time.monotonic() - asked_at)))


def has_worker(api: Api) -> bool:
    """Whether a node is alive that works on cycles."""
    nodes = api.get("/status").get("nodes") or ()
    return any(
        one.get("isAlive") and not one.get("isDraining") and "worker" in one.get("roles", ())
        for one in nodes
    )


def _tell_if_idle(api: Api) -> None:
    with suppress(NodeUnreachable, ApiProblem):
        if not has_worker(api):
            note("Nobody works on this: no node with the role worker is alive (ORBIT_ROLES).")


def changes(before: Any, cycle: Any) -> Iterator[str]:
    """What is new about a cycle since it was last seen (None: never), a line each."""
    name = f"{cycle['cycleRunId']}  {owner_of(cycle)}"
    known = {one["stage"] for one in (before or {}).get("checkpoints", ())}
    for stage in (one["stage"] for one in cycle["checkpoints"]):
        if stage == _AFTER_JOBS:
            yield from _jobs_change(name, before, cycle)
        if stage not in known:
            yield f"{name}  {stage}"
    if _AFTER_JOBS not in {one["stage"] for one in cycle["checkpoints"]}:
        yield from _jobs_change(name, before, cycle)
    if cycle["state"] != "running" and (before or {}).get("state") in (None, "running"):
        yield f"{name}  {state_of(cycle)}"


def _jobs_change(name: str, before: Any, cycle: Any) -> Iterator[str]:
    """The line on jobs, if they have changed; from when their queueing is known too."""
    counts, old = _known_jobs(cycle), _known_jobs(before)
    if counts["total"] and counts != old:
        yield f"{name}  {_jobs_text(counts)}, attempts {counts['attempts']}"


def _known_jobs(cycle: Any) -> dict[str, int]:
    """An answer is read piece by piece: its jobs may be younger than its checkpoints."""
    stages = {one["stage"] for one in (cycle or {}).get("checkpoints", ())}
    return job_counts(cycle if _WITH_JOBS in stages else {})


def stages_table(cycles: Sequence[Any]) -> Table:
    """The cycles as they stand."""
    rows = []
    for cycle in cycles:
        counts = job_counts(cycle)
        rows.append(
            (
                cycle["cycleRunId"],
                owner_of(cycle),
                state_of(cycle),
                cycle.get("stage"),
                len(cycle.get("items") or ()),
                _jobs_text(counts),
                counts["attempts"],
            )
        )
    names = ("CYCLE", "RUN PROFILE", "STATE", "STAGE", "ITEMS", "JOBS", "ATTEMPTS")
    return table(names, rows, ids=("CYCLE",))


def _is_running(lineage: Any) -> bool:
    return bool(lineage["cycle"]["state"] == "running")


def _jobs_text(counts: dict[str, int]) -> str:
    if not counts["total"]:
        return "-"
    cut = "+" if counts.get("cut") else ""
    parts = [f"delivered {counts.get('delivered', 0)}{cut} of {counts['total']}{cut}"]
    if counts.get("dead_lettered"):
        parts.append(f"dead letters {counts['dead_lettered']}")
    return ", ".join(parts)


def get_patiently(api: Api, path: str) -> Any:
    """What the API answers; a node that is away is waited for, and that is said once.

    Raises NodeUnreachable when it stays away for a minute, and ApiProblem.
    """
    deadline, is_told = time.monotonic() + _PATIENCE_SECONDS, False
    while True:
        try:
            return api.get(path)
        except NodeUnreachable as error:
            if time.monotonic() > deadline:
                raise
            if not is_told:
                note(f"waiting: {error}")
                is_told = True
            time.sleep(1)


@contextmanager
def _showing(*, is_quiet: bool) -> Iterator[Show]:
    if is_quiet:
        yield lambda cycles: None
    elif console().is_terminal and console().width >= _LIVE_WIDTH:
        from rich.live import Live

        with Live(console=console(), refresh_per_second=8, transient=False) as live:
            yield lambda cycles: live.update(stages_table(cycles))
    else:
        seen: dict[str, Any] = {}

        def tell(cycles: Sequence[Any]) -> None:
            for cycle in cycles:
                for line in changes(seen.get(cycle["cycleRunId"]), cycle):
                    print(line)
                seen[cycle["cycleRunId"]] = cycle
            sys.stdout.flush()

        yield tell
