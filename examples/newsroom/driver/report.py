"""What was delivered, compared with what the receiver really stored, and shown.

The receiver is asked independently of Orbit: a job counts as delivered only if the receiver
has stored a body under the job's id, once, with the digest that Orbit names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from driver.orbit_api import Cycle, Job

STAGES = (
    "cycle_started",
    "tier1_complete",
    "tier2_complete",
    "tier3_complete",
    "normalization_complete",
    "dispatch_enqueued",
    "dispatch_complete",
    "cycle_finished",
)

Cycles = Mapping[str, Cycle]


def problems(cycles: Cycles, arrivals: Iterable[Mapping[str, Any]]) -> list[str]:
    """Everything that is not as it should be, in words; empty when all was delivered."""
    stored = stored_by_job(arrivals)
    found: list[str] = []
    for run_profile, cycle in cycles.items():
        if cycle.state != "finished":
            found.append(f"{run_profile}: cycle {cycle.cycle_id} {cycle.state}. {cycle.reason}")
        elif not cycle.jobs:
            found.append(f"{run_profile}: cycle {cycle.cycle_id} made no job")
        found += [
            f"{run_profile}: job {job.job_id}: {fault}"
            for job in cycle.jobs
            if (fault := _fault(job, stored.get(job.job_id, [])))
        ]
    return found


def stored_by_job(arrivals: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The receiver's stored arrivals, grouped by job id."""
    stored: dict[str, list[Mapping[str, Any]]] = {}
    for arrival in arrivals:
        if arrival["outcome"] == "stored":
            stored.setdefault(arrival["jobId"], []).append(arrival)
    return stored


def stages_table(cycles: Cycles, skipped: Mapping[str, str]) -> Table:
    """How far every run profile's cycle is."""
    table = Table("run profile", "progress", "stage", "delivered", box=None, pad_edge=False)
    for run_profile, cycle in cycles.items():
        done = STAGES.index(cycle.stage) + 1 if cycle.stage in STAGES else 0
        colour = {"finished": "green", "failed": "red"}.get(cycle.state, "cyan")
        progress = f"[{colour}]{'●' * done}[/]{'○' * (len(STAGES) - done)}"
        delivered = sum(job.state == "delivered" for job in cycle.jobs)
        jobs = f"{delivered} of {len(cycle.jobs)}" if cycle.jobs else ""
        table.add_row(run_profile, progress, cycle.stage, jobs)
    for run_profile, reason in skipped.items():
        table.add_row(run_profile, "skipped", escape(reason), "")
    return table


def deliveries(cycles: Cycles, arrivals: Iterable[Mapping[str, Any]]) -> Group:
    """A table per run profile, one row per job: what went where, and how it arrived."""
    stored = stored_by_job(arrivals)
    return Group(*(_table(key, cycle, stored) for key, cycle in cycles.items()))


def _table(
    run_profile: str, cycle: Cycle, stored: Mapping[str, Sequence[Mapping[str, Any]]]
) -> Table:
    title = f"\n[bold]{run_profile}[/]: cycle {cycle.cycle_id}, {cycle.state}"
    headings = "endpoint", "job", "sha256", "bytes", "sends", "kept"
    table = Table(*headings, title=title, title_justify="left", title_style="", box=None)
    table.pad_edge, table.padding = False, (0, 2, 0, 0)
    for job in cycle.jobs:
        fault = _fault(job, stored.get(job.job_id, []))
        kept = f"[red]{escape(fault)}[/]" if fault else "[green]✓[/]"
        numbers = str(job.size), str(job.attempts)
        table.add_row(job.endpoint_key, job.job_id, job.digest[:10], *numbers, kept)
    for column in table.columns[:-1]:
        column.no_wrap = True
    return table


def _fault(job: Job, stored: Sequence[Mapping[str, Any]]) -> str:
    """What is wrong with a job's delivery; empty if nothing is."""
    if job.state != "delivered":
        return f"is {job.state} after {job.attempts} sends"
    if len(stored) != 1:
        return f"Orbit says delivered, the receiver stored it {len(stored)} times"
    if stored[0]["digest"] != job.digest:
        return f"Orbit sent sha256 {job.digest}, the receiver stored {stored[0]['digest']}"
    return ""
