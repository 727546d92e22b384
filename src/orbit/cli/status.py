"""`status`: what is going on, and with `--why`, what is not and for which reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer

from orbit.cli.client import connected
from orbit.cli.cycles import paged
from orbit.cli.lanes import jobs_text
from orbit.cli.lineage import hold_text
from orbit.cli.options import Json, settings
from orbit.cli.terminal import print_json, say, show, table, when

_SLOTS_READ, _SLOTS_SHOWN = 200, 3


def status(
    is_why: Annotated[
        bool, typer.Option("--why", help="Also what did not run, and for which reason.")
    ] = False,
    is_json: Json = False,
) -> None:
    """Show nodes, cycles, queues, dead letters."""
    with connected(settings()) as api:
        now = api.get("/status")
        why = {}
        if is_why:
            why = {
                "runProfiles": api.get("/run-profiles")["items"],
                "slots": paged(api, "/slots", _SLOTS_READ)["items"],
            }
        address = api.address
    if is_json:
        print_json({**now, **why})
        return
    if address is None:
        say("No node answers; this is what the database says.")
    _overview(now)
    if is_why:
        _why(now, why["runProfiles"], why["slots"])


def why_not_running(run_profile: Any, now: Any) -> str:
    """What a run profile is waiting for."""
    return next(_waits_for(run_profile, now))


def _waits_for(run_profile: Any, now: Any) -> Iterator[str]:
    """The reasons, the most telling first; the last one always holds."""
    active = run_profile.get("activeCycle") or {}
    if active.get("state") == "running":
        waits = "waits for the one before it"
        where = waits if active.get("isWaiting") else f"at {active['stage']}"
        yield f"it runs: {active['cycleRunId']}, {where}"
    if run_profile.get("reason"):
        yield str(run_profile["reason"])
    if now.get("isPaused"):
        yield "ORBIT_GLOBAL_PAUSE is set"
    for one in now.get("haltedNamespaces", ()):
        if one["namespace"] == run_profile["namespace"]:
            yield f"its namespace is halted: {halted_line(one)}"
    due_at = run_profile.get("nextDueAt")
    if not due_at:
        yield "it has no schedule: only when triggered"
    for role in ("scheduler", "worker"):
        if not _has_role(now, role):
            yield f"no node that is up has the role {role}; it is due {when(due_at)}"
    yield f"its next slot is {when(due_at)}"


def last_slots(slots: Sequence[Any], run_profiles: Sequence[Any]) -> list[Any]:
    """The last slots of every schedule, schedule by schedule, the newest first."""
    grouped: dict[tuple[str, str], list[Any]] = {}
    for slot in slots:
        grouped.setdefault((slot["namespace"], slot["runProfileId"] or ""), []).append(slot)
    for one in run_profiles:
        key = one["namespace"], one["runProfileId"]
        if key not in grouped and one.get("lastSlot"):
            grouped[key] = [one["lastSlot"]]
    return [slot for key in sorted(grouped) for slot in grouped[key][:_SLOTS_SHOWN]]


def _overview(now: Any) -> None:
    cycles, store = now["cycles"], now["database"]
    lines = {
        "time": when(now["now"]),
        "paused": "yes: ORBIT_GLOBAL_PAUSE is set" if now["isPaused"] else "no",
        "halted": _halted_text(now["haltedNamespaces"]),
        "configuration": now["revision"] or "none yet",
        "database": f"PostgreSQL {store['serverVersion']}, schema {store['schemaRevision']}",
        "active cycles": _cycles_text(cycles),
        "failed cycles": _failed_text(now["failedCycles"]["count"]),
        "on the wire": f"{now['attemptsInFlight']} attempts",
        "dead letters": f"{now['openDeadLetters']} open",
        "lanes held": str(len(held_lanes(now))),
    }
    for name, value in lines.items():
        say(f"{name:<16}{value}")
    say()
    if now["nodes"]:
        names = ("NODE", "NAME", "STATE", "ROLES", "ADDRESS", "VERSION", "SEEN")
        show(table(names, map(_node_row, now["nodes"]), ids=("NODE", "SEEN")))
    else:
        say("No node is known.")
    if now["lanes"]:
        say()
        show(_lanes_table(now["lanes"]))
    if now["slotsNotFired"]:
        say()
        say("Slots that did not fire, the newest first:")
        show(_slots_table(now["slotsNotFired"]))


def held_lanes(now: Any) -> list[Any]:
    """The lanes that their breaker holds, of those with jobs to send."""
    return [one for one in now["lanes"] if one.get("probeAt")]


def _lanes_table(lanes: Sequence[Any]) -> Any:
    names = ("NAMESPACE", "ENDPOINT", "WAITING", "IN FLIGHT", "FIRST DUE", "HELD")
    rows = [
        (
            one["namespace"],
            one["endpointKey"],
            jobs_text(one["waiting"]),
            jobs_text(one["inFlight"]),
            when(one.get("dueAt")),
            hold_text(one),
        )
        for one in lanes
    ]
    return table(names, rows, ids=("NAMESPACE", "ENDPOINT", "FIRST DUE"))


def held_lines(now: Any) -> Iterator[str]:
    """Why jobs of held lanes are not sent, a line for each lane."""
    for one in held_lanes(now):
        lane = f"{one['namespace']}/{one['endpointKey']}"
        yield f"{lane}: {hold_text(one)}; jobs that wait for it: {jobs_text(one['waiting'])}"


def _halted_text(halted: Sequence[Any]) -> str:
    """The halted namespaces, each with who halted it and why."""
    return "; ".join(map(halted_line, halted)) or "none"


def halted_line(one: Any) -> str:
    """A halted namespace, who halted it, and why."""
    until = f", until {when(one['untilAt'])}" if one.get("untilAt") else ""
    why = f": {one['reason']}" if one.get("reason") else ""
    asked = one.get("resumeAskedBy")
    second = f"; {asked} asks to resume it, and a second person has to agree" if asked else ""
    return f"{one['namespace']} (by {one['actor']} at {when(one['haltedAt'])}{until}{why}{second})"


def _cycles_text(cycles: Mapping[str, Any]) -> str:
    stages = ", ".join(f"{count} at {stage}" for stage, count in cycles["byStage"].items())
    waiting = f", {cycles['waiting']} waiting for another" if cycles["waiting"] else ""
    return f"{cycles['active']}{f' ({stages})' if stages else ''}{waiting}"


def _failed_text(count: int) -> str:
    return f"{count} in 24 h{' (orbit cycles --state failed)' if count else ''}"


def _node_row(node: Any) -> tuple[Any, ...]:
    state = "alive" if node["isAlive"] else "gone"
    if node["isAlive"] and node["isDraining"]:
        state = "draining"
    if not node["isInStep"]:
        state += ", its files differ from the configuration in force"
    return (
        node["nodeId"],
        node["name"],
        state,
        node["roles"],
        node["address"],
        node["version"],
        when(node["seenAt"]),
    )


def _why(now: Any, run_profiles: Sequence[Any], slots: Sequence[Any]) -> None:
    say()
    say("Run profiles:")
    rows = [
        (one["namespace"], one["runProfileId"], why_not_running(one, now)) for one in run_profiles
    ]
    show(table(("NAMESPACE", "RUN PROFILE", "WHY"), rows, ids=("NAMESPACE", "RUN PROFILE")))
    say()
    if held := list(held_lines(now)):
        say("Held lanes, whose jobs wait without spending attempts:")
        for line in held:
            say(f"  {line}")
        say()
    shown = last_slots(slots, run_profiles)
    if not shown:
        say("No schedule has had a slot yet.")
        return
    say("Last slots of every schedule:")
    show(_slots_table(shown))


def _slots_table(slots: Sequence[Any]) -> Any:
    names = ("SLOT", "NAMESPACE", "RUN PROFILE", "OUTCOME", "CYCLE", "REASON")
    whole = ("SLOT", "NAMESPACE", "RUN PROFILE", "CYCLE")
    return table(names, _slot_rows(slots), ids=whole)


def _slot_rows(slots: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    for one in slots:
        name = one["runProfileId"] or "(raw)"
        yield (
            when(one["slotAt"]),
            one["namespace"],
            name,
            one["outcome"],
            one.get("cycleRunId"),
            one["reason"],
        )


def _has_role(now: Any, role: str) -> bool:
    return any(
        one["isAlive"] and not one["isDraining"] and role in one["roles"] for one in now["nodes"]
    )
