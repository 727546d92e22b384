"""`validate` and `profiles`: what the configuration files say, and what is in force.

Validation reads the files and imports every step; it touches no database and sends nothing. A
node that runs here is asked which revision is in force.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from orbit.cli.options import DIFFERS, Json, settings
from orbit.cli.terminal import count, note, print_json, say, show, table


def validate(
    config_dir: Annotated[
        Path | None,
        typer.Option("--config-dir", help="The folder to check; default: ORBIT_CONFIG_DIR."),
    ] = None,
    is_json: Json = False,
) -> None:
    """Check settings and configuration files."""
    from orbit.cli.client import differing_revision
    from orbit.profiles.documents import document_body, read_documents

    given = settings()
    folder = config_dir or given.config_dir
    documents = read_documents(folder, endpoint_keys={e.key for e in given.dispatch_endpoints})
    profiles, run_profiles = len(documents.profiles), len(documents.run_profiles)
    is_own = folder == given.config_dir
    in_force = differing_revision(given, documents) if is_own else None
    if is_json:
        from orbit.canonical import canonical_digest

        print_json(
            {
                "valid": True,
                "configDir": str(folder),
                "revision": canonical_digest(document_body(documents)),
                "otherRevisionInForce": in_force,
                "profiles": profiles,
                "runProfiles": run_profiles,
                "warnings": list(given.warnings),
            }
        )
        return
    say(f"{folder} is valid: {count(profiles, 'profile')}, {count(run_profiles, 'run profile')}")
    if in_force is not None:
        note(DIFFERS)


def profiles(is_json: Json = False) -> None:
    """List profiles and run profiles in force."""
    from orbit.cli.client import connected

    with connected(settings()) as api:
        who = api.get("/profiles")
        where = api.get("/run-profiles")
    if is_json:
        print_json({"profiles": who["items"], "runProfiles": where["items"]})
        return
    show(
        table(
            ("PROFILE", "STATE", "LABEL"),
            [(one.get("profileId"), one.get("state"), one.get("label")) for one in who["items"]],
            ids=("PROFILE",),
        )
    )
    say()
    show(
        table(
            ("RUN PROFILE", "NAMESPACE", "PROFILE", "STATE", "SCHEDULE", "ENDPOINTS"),
            [_run_profile_row(one) for one in where["items"]],
            ids=("RUN PROFILE", "NAMESPACE", "PROFILE"),
        )
    )


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
