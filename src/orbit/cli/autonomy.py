"""`autonomy`: what it may do, armed and disarmed. What was skipped ends with code 3."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from orbit.cli.client import connected
from orbit.cli.options import Json, group, settings
from orbit.cli.outcome import ExitCode, fail
from orbit.cli.terminal import count, print_json, say, show, table, when

Profile = Annotated[str, typer.Argument(help="The profile's id.")]
Why = Annotated[str | None, typer.Option("--reason", help="Why; it is kept.")]

app = group("Controlled autonomy: what may apply approved proposals, and take them back.")


@app.command("status")
def status(
    profile: Annotated[str | None, typer.Argument(help="Only this one, with all of it.")] = None,
    is_json: Json = False,
) -> None:
    """Show the switches, modes, and what is on probation."""
    with connected(settings()) as api:
        answer = api.get("/autonomy" if profile is None else f"/autonomy/{profile}")
    if is_json:
        print_json(answer)
        return
    say(_switches_line(answer["switches"]))
    say()
    items = answer["items"] if profile is None else [answer["profile"]]
    if not items:
        say("No profile lets anything move (autonomy.allow).")
        return
    names = ("PROFILE", "MODE", "SINCE", "BY", "ON PROBATION", "SHADOW: AGREED")
    show(table(names, list(map(_row, items)), ids=("PROFILE", "SINCE")))
    if profile is not None:
        _show_detail(answer)


@app.command("shadow")
def shadow(profile: Profile, reason: Why = None, is_json: Json = False) -> None:
    """Have it write down what it would do with a profile; it applies nothing."""
    _set(profile, "shadow", reason, is_json=is_json)


@app.command("arm")
def arm(
    profile: Profile,
    reason: Annotated[str, typer.Option("--reason", help="Why; it is kept.")],
    is_json: Json = False,
) -> None:
    """Let it apply what is approved of a profile, within the profile's bounds."""
    _set(profile, "arm", reason, is_json=is_json)


@app.command("disarm")
def disarm(profile: Profile, reason: Why = None, is_json: Json = False) -> None:
    """Let it do nothing more with a profile."""
    _set(profile, "disarm", reason, is_json=is_json)


@app.command("revert")
def revert(profile: Profile, reason: Why = None, is_json: Json = False) -> None:
    """Take back all that it changed of a profile, at once, and disarm it."""
    with connected(settings(), is_urgent=True) as api:
        answer = api.post(f"/autonomy/{profile}/revert", _body(reason))
    if is_json:
        print_json(answer)
        return
    taken = count(len(answer["overlayIds"]), "change")
    say(f"{profile}: {taken} taken back; its files and other overlays are in force")


def _set(profile: str, verb: str, reason: str | None, *, is_json: bool) -> None:
    with connected(settings(), is_urgent=verb == "disarm") as api:
        answer = api.post(f"/autonomy/{profile}/{verb}", _body(reason))
    if is_json:
        print_json(answer)
    elif answer["outcome"] == "skipped":
        say(f"skipped: {answer['detail']}; profile {profile} is {answer['mode']}")
    else:
        was = "is" if answer["outcome"] == "set" else "was already"
        say(f"profile {profile} {was} {_mode_text(answer['mode'])}")
    if answer["outcome"] == "skipped":
        fail(ExitCode.REFUSED)


def _body(reason: str | None) -> dict[str, str]:
    return {} if reason is None else {"reason": reason}


def _mode_text(mode: str) -> str:
    return "in shadow mode" if mode == "shadow" else mode


def _switches_line(switches: Mapping[str, Any]) -> str:
    if not switches["enabled"]:
        return "Off: ORBIT_PHASE4_ENABLED is not true."
    if not switches["mutationAllowed"]:
        return "Shadow mode only: ORBIT_PHASE4_ALLOW_MUTATION is not true."
    return "On, but ORBIT_GLOBAL_PAUSE is set." if switches["paused"] else "On."


def _row(one: Mapping[str, Any]) -> tuple[Any, ...]:
    cause = f" ({one['cause']})" if one["cause"] not in (None, "person") else ""
    flight, shadowed = one["inFlight"], one["shadowed"]
    agreed = f"{shadowed['agreed']} of {shadowed['decided']}" if shadowed["decided"] else None
    return (
        one["profileId"],
        f"{one['mode']}{cause}",
        when(one["setAt"]) if one["setAt"] else None,
        one["actor"],
        f"{_changes_text(flight)} until {when(flight['expiresAt'])}" if flight else None,
        agreed,
    )


def _changes_text(change: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{one['path']} {json.dumps(one['before'])} -> {json.dumps(one['value'])}"
        for one in change["changes"]
    )


def _show_detail(answer: Mapping[str, Any]) -> None:
    flight = answer["profile"]["inFlight"]
    for namespace, found in ((flight or {}).get("evidence") or {}).items():
        for metric, one in found["metrics"].items():
            say(
                f"  {namespace}, {metric}: {count(one['observations'], 'cycle')}, evidence "
                f"{one['evidence']:.2f} of {one['threshold']:.0f}, {count(one['peers'], 'peer')}"
            )
    changes = [
        (
            when(one["createdAt"]),
            _changes_text(one),
            one["verdict"] or ("on probation" if not one["ending"] else None),
            one["ending"],
            when(one["endedAt"]),
        )
        for one in answer["changes"]
    ]
    _show_table(("CHANGED AT", "CHANGE", "VERDICT", "ENDED", "ENDED AT"), changes)
    skips = [(s["day"], s["function"], s["why"], s["proposalId"]) for s in answer["skips"]]
    _show_table(("DAY", "DID NOT", "WHY", "PROPOSAL"), skips)
    shadows = [(s["proposalId"], s["wouldApply"], s["why"], s["state"]) for s in answer["shadows"]]
    _show_table(("PROPOSAL", "WOULD APPLY", "WHY NOT", "STATE"), shadows)


def _show_table(names: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> None:
    if rows:
        say()
        show(table(names, rows, ids=("CHANGED AT", "ENDED AT", "DAY", "PROPOSAL")))
