"""`validate` and `profiles`: what the configuration files say, and what is in force.

Validation reads the files and imports every step; it touches no database and sends nothing. A
node that runs here is asked what is in force: another revision, and overlays that would not fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from orbit.cli.options import DIFFERS, Json, settings
from orbit.cli.terminal import count, note, print_json, say, show, table, when

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
Id = Annotated[str, typer.Argument(help="The profile's id.")]
IsRunProfile = Annotated[
    bool, typer.Option("--run-profile", help="The id is that of a run profile.")
]
Why = Annotated[str | None, typer.Option("--reason", help="Why; it is kept.")]


def validate(
    config_dir: Annotated[
        Path | None,
        typer.Option("--config-dir", help="The folder to check; default: ORBIT_CONFIG_DIR."),
    ] = None,
    is_dropping: Annotated[
        bool, typer.Option("--drop-overlays", help="Overlays that do not fit may go.")
    ] = False,
    is_json: Json = False,
) -> None:
    """Check settings and configuration files."""
    from orbit.cli.client import InForce, in_force
    from orbit.profiles.documents import read_documents
    from orbit.profiles.overlays import lay, misfits
    from orbit.profiles.revision import revision_of

    given = settings()
    folder = config_dir or given.config_dir
    documents = read_documents(folder, endpoint_keys={e.key for e in given.dispatch_endpoints})
    profiles, run_profiles = len(documents.profiles), len(documents.run_profiles)
    running = in_force(given, documents) if folder == given.config_dir else InForce()
    broken = lay(documents, running.overlays).broken
    if broken and not is_dropping:
        raise misfits(broken)
    if is_json:
        print_json(
            {
                "valid": True,
                "configDir": str(folder),
                "revision": revision_of(documents).revision,
                "otherRevisionInForce": running.other_revision,
                "overlaysToDrop": [one.overlay.overlay_id for one in broken],
                "profiles": profiles,
                "runProfiles": run_profiles,
                "warnings": list(given.warnings),
            }
        )
        return
    say(f"{folder} is valid: {count(profiles, 'profile')}, {count(run_profiles, 'run profile')}")
    for one in broken:
        note(f"would be dropped: {one}")
    if running.other_revision is not None:
        note(DIFFERS)


@app.callback(invoke_without_command=True)
def profiles(context: typer.Context, is_json: Json = False) -> None:
    """Profiles and run profiles in force; without a verb they are listed."""
    from orbit.cli.client import connected

    if context.invoked_subcommand is not None:
        return
    with connected(settings()) as api:
        who = api.get("/profiles")
        where = api.get("/run-profiles")
    if is_json:
        print_json({"profiles": who["items"], "runProfiles": where["items"]})
        return
    rows = [(one.get("profileId"), one.get("state"), one.get("label")) for one in who["items"]]
    show(table(("PROFILE", "STATE", "LABEL"), rows, ids=("PROFILE",)))
    say()
    show(
        table(
            ("RUN PROFILE", "NAMESPACE", "PROFILE", "STATE", "SCHEDULE", "ENDPOINTS"),
            [_run_profile_row(one) for one in where["items"]],
            ids=("RUN PROFILE", "NAMESPACE", "PROFILE"),
        )
    )
    laid = [one for entry in (*who["items"], *where["items"]) for one in entry["overlays"]]
    if laid:
        say()
        say("Overlays on the files:")
        for one in laid:
            say(f"  {overlay_text(one)}")


@app.command("disable")
def disable(
    name: Id, is_run_profile: IsRunProfile = False, reason: Why = None, is_json: Json = False
) -> None:
    """Turn a profile off at once: no new cycle of it starts, whatever its file says."""
    _turn(name, "disable", reason, is_run_profile=is_run_profile, is_json=is_json)


@app.command("enable")
def enable(
    name: Id, is_run_profile: IsRunProfile = False, reason: Why = None, is_json: Json = False
) -> None:
    """Turn a profile on at once, for new cycles, whatever its file says."""
    _turn(name, "enable", reason, is_run_profile=is_run_profile, is_json=is_json)


def overlay_text(one: Mapping[str, Any]) -> str:
    """An overlay in a line: what it changes, who laid it, when and why."""
    changes = ", ".join(f"{c['path']} {c['before']} -> {c['value']}" for c in one["changes"])
    why = f": {one['reason']}" if one.get("reason") else ""
    target = one["target"].replace("_", " ")
    return (
        f"{target} {one['targetId']}: {changes}, by {one['actor']} at {when(one['createdAt'])}{why}"
    )


def _turn(name: str, verb: str, reason: str | None, *, is_run_profile: bool, is_json: bool) -> None:
    from orbit.cli.client import connected

    path = f"/{'run-' if is_run_profile else ''}profiles/{name}/{verb}"
    with connected(settings(), is_urgent=verb == "disable") as api:
        answer = api.post(path, {} if reason is None else {"reason": reason})
    if is_json:
        print_json(answer)
        return
    is_as_declared = answer["state"] == answer["declaredState"]
    file = "as its file says" if is_as_declared else f"its file says {answer['declaredState']}"
    was = "is" if answer["isChanged"] else "was already"
    say(f"{name} {was} {answer['state']} ({file})")


def _run_profile_row(entry: dict[str, Any]) -> tuple[Any, ...]:
    policy = entry.get("executionPolicy") or {}
    schedule, zone = policy.get("schedule"), policy.get("timezone")
    state, reason = entry.get("effectiveState"), entry.get("reason")
    return (
        entry.get("runProfileId"),
        entry.get("namespace"),
        entry.get("profileId"),
        f"{state} ({reason})" if reason else state,
        f"{schedule} {zone}" if schedule else None,
        entry.get("distributionTargets"),
    )
