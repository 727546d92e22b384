"""Follows cycles to their end: a live table on a terminal, one line per change elsewhere.

Asks again and again; a node that goes away meanwhile is waited for a while, since another (or
the same, started again) goes on with the cycle. Nothing here changes anything.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from orbit.cli.client import Api
from orbit.cli.lineage import job_counts, owner_of, state_of, story_of
from orbit.cli.outcome import NodeUnreachable
from orbit.cli.terminal import console, note, table

if TYPE_CHECKING:
    from rich.table import Table

_POLL_SECONDS = 0.15
_PATIENCE_SECONDS = 60.0

Show = Callable[[Sequence[Any]], None]


def watch(api: Api, cycle_ids: Sequence[str], *, is_quiet: bool = False) -> list[Any]:
    """Shows the cycles until all have ended; their lineages.

    Raises NodeUnreachable when the node stays away, and ApiProblem.
    """
    with _showing(is_quiet=is_quiet) as shown:
        latest: dict[str, Any] = {}
        while True:
            for cycle_id in cycle_ids:
                if latest.get(cycle_id, {}).get("state") in (None, "running"):
                    latest[cycle_id] = _ask(api, cycle_id)
            cycles = [latest[cycle_id] for cycle_id in cycle_ids]
            shown(cycles)
            if all(one.get("state") != "running" for one in cycles):
                return cycles
            time.sleep(_POLL_SECONDS)


def changes(before: Any, cycle: Any) -> Iterator[str]:
    """What is new about a cycle since it was last seen (None: never), a line each."""
    name = f"{cycle['cycleRunId']}  {owner_of(cycle)}"
    known = {one["stage"] for one in (before or {}).get("checkpoints") or ()}
    for checkpoint in cycle.get("checkpoints") or ():
        if checkpoint["stage"] not in known:
            yield f"{name}  {checkpoint['stage']}"
    counts, old = job_counts(cycle), job_counts(before or {})
    if counts["total"] and counts != old:
        yield f"{name}  {_jobs_text(counts)}, attempts {counts['attempts']}"
    if cycle.get("state") != "running" and (before or {}).get("state") in (None, "running"):
        yield f"{name}  {state_of(cycle)}"


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


def _jobs_text(counts: dict[str, int]) -> str:
    if not counts["total"]:
        return "-"
    parts = [f"delivered {counts.get('delivered', 0)} of {counts['total']}"]
    if counts.get("dead_lettered"):
        parts.append(f"dead letters {counts['dead_lettered']}")
    return ", ".join(parts)


def _ask(api: Api, cycle_id: str) -> Any:
    deadline, is_told = time.monotonic() + _PATIENCE_SECONDS, False
    while True:
        try:
            return story_of(api.get(f"/cycles/{cycle_id}"))
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
    elif console().is_terminal:
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
