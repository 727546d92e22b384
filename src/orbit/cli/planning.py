"""`plan`: what would run, from the files, and why the rest would not.

Computed as the scheduler computes it, jitter included; no database is asked, and a node
that runs here only for the revision in force. Whether a slot then fires also depends on what only
a node knows: a halt, or a cycle still active.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orbit.cli.options import DIFFERS, Json, settings
from orbit.cli.terminal import count, duration, note, print_json, say, show, table, utc

if TYPE_CHECKING:
    from orbit.profiles.model import Documents
    from orbit.services.schedule_rows import Key
    from orbit.services.scheduler import Planned
    from orbit.settings import Settings

_RAW = "(raw cycle)"


@dataclass(frozen=True, slots=True)
class PlannedStart:
    """One slot: when it is due, when its jitter lets it start, and what keeps it from running."""

    slot_at: datetime
    starts_at: datetime
    namespace: str
    run_profile_id: str
    timezone: str
    reason: str | None

    def local(self) -> str:
        """The slot on the wall clock of its zone."""
        from zoneinfo import ZoneInfo

        at = self.slot_at.astimezone(ZoneInfo(self.timezone))
        return f"{at:%Y-%m-%d %H:%M:%S} {self.timezone}"

    def as_json(self) -> dict[str, Any]:
        """As `--json` shows it."""
        from zoneinfo import ZoneInfo

        return {
            "slotAt": utc(self.slot_at),
            "startsAt": self.starts_at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "localTime": self.slot_at.astimezone(ZoneInfo(self.timezone)).isoformat(),
            "timezone": self.timezone,
            "namespace": self.namespace,
            "runProfileId": self.run_profile_id or None,
            "willRun": self.reason is None,
            "reason": self.reason,
        }


def plan(
    hours: Annotated[float, typer.Option(min=0.01, max=24 * 366, help="How far to look.")] = 24,
    limit: Annotated[int, typer.Option(min=1, help="Slots to show at most.")] = 200,
    is_json: Json = False,
) -> None:
    """Show what would run in the next hours."""
    from orbit.cli.client import in_force
    from orbit.clock import SystemClock
    from orbit.profiles.documents import read_documents
    from orbit.profiles.overlays import lay

    given = settings()
    keys = {endpoint.key for endpoint in given.dispatch_endpoints}
    documents = read_documents(given.config_dir, endpoint_keys=keys, check_imports=False)
    running = in_force(given, documents)
    documents = lay(documents, running.overlays).documents
    start = SystemClock().now()
    end = start + timedelta(hours=hours)
    found = list(planned_starts(documents, given, start, end, limit + 1))
    idle = list(without_schedule(documents, given))
    if is_json:
        print_json(
            {
                "from": utc(start),
                "until": utc(end),
                "otherRevisionInForce": running.other_revision,
                "items": [one.as_json() for one in found[:limit]],
                "isComplete": len(found) <= limit,
                "notScheduled": [
                    {"namespace": namespace, "runProfileId": name, "reason": reason}
                    for namespace, name, reason in idle
                ],
            }
        )
        return
    _show(found, idle, until=end, limit=limit)
    if running.other_revision is not None:
        note(DIFFERS)


def planned_starts(
    documents: Documents, given: Settings, start: datetime, end: datetime, limit: int
) -> Iterator[PlannedStart]:
    """The first `limit` slots in (start, end], by time."""
    from orbit.profiles import schedule as cron
    from orbit.profiles.revision import revision_of
    from orbit.services.scheduler import planned_schedules

    planned = planned_schedules(revision_of(documents), given)
    names: Mapping[str, Key] = {"\x1f".join(key): key for key in planned}
    schedules = {name: planned[key].schedule for name, key in names.items()}
    for slot_at, name in cron.plan(schedules, start, end, limit):
        key, schedule = names[name], schedules[name]
        yield PlannedStart(
            slot_at=slot_at,
            starts_at=slot_at + cron.jitter(name, slot_at, schedule.jitter_seconds),
            namespace=key[0],
            run_profile_id=key[1],
            timezone=schedule.timezone,
            reason=_reason(documents, given, planned[key]),
        )


def without_schedule(documents: Documents, given: Settings) -> Iterator[tuple[str, str, str]]:
    """The run profiles that never start by themselves: namespace, id, reason."""
    from orbit.profiles.bridge import why_not_runnable

    for one in documents.run_profiles:
        if not one.execution_policy.schedule and not given.run_profile_cron_schedule:
            reason = why_not_runnable(documents, one) or "it has no schedule: only when triggered"
            yield one.namespace, one.run_profile_id, reason


def _reason(documents: Documents, given: Settings, planned: Planned) -> str | None:
    from orbit.profiles.bridge import why_not_runnable

    if given.global_pause:
        return "ORBIT_GLOBAL_PAUSE is set"
    if planned.run_profile is None:
        return None
    return why_not_runnable(documents, planned.run_profile)


def _show(
    found: list[PlannedStart], idle: list[tuple[str, str, str]], *, until: datetime, limit: int
) -> None:
    if found:
        rows = [
            (
                utc(one.slot_at),
                one.local(),
                f"+{duration((one.starts_at - one.slot_at).total_seconds())}"
                if one.starts_at > one.slot_at
                else None,
                one.namespace,
                one.run_profile_id or _RAW,
                f"no: {one.reason}" if one.reason else "yes",
            )
            for one in found[:limit]
        ]
        names = ("SLOT (UTC)", "LOCAL TIME", "JITTER", "NAMESPACE", "RUN PROFILE", "RUNS")
        show(table(names, rows, ids=("SLOT (UTC)", "NAMESPACE", "RUN PROFILE")))
    else:
        say(f"Nothing is due until {utc(until)}.")
    if len(found) > limit:
        note(f"The first {count(limit, 'slot')} until {utc(until)}; see more with --limit.")
    if idle:
        say()
        say("Not on any schedule:")
        show(table(("NAMESPACE", "RUN PROFILE", "WHY"), idle, ids=("NAMESPACE", "RUN PROFILE")))
