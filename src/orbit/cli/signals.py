"""`signals`: what the detector says of a profile, and with `--compute` what it says by now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from orbit.cli.client import connected
from orbit.cli.cycles import paged
from orbit.cli.options import Json, settings
from orbit.cli.terminal import note, print_json, say, show, table, when

_PATIENCE_SECONDS = 60.0


def signals(
    profile: Annotated[str, typer.Argument(help="The profile.")],
    namespace: Annotated[
        str | None, typer.Option(help="Only those of this namespace; not with --compute.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many.")] = 20,
    is_computing: Annotated[
        bool, typer.Option("--compute", help="Take in what has happened since, and say how it is.")
    ] = False,
    is_json: Json = False,
) -> None:
    """Show a profile's signals, newest first. Nothing is changed by them."""
    path = f"/profiles/{profile}/signals"
    with connected(settings(), patience_seconds=_PATIENCE_SECONDS) as api:
        answer = api.post(path) if is_computing else paged(api, path, limit, namespace=namespace)
    if is_json:
        print_json(answer)
    elif is_computing:
        _show_streams(answer["items"])
    elif not answer["items"]:
        say(f"No signal of {profile} as yet; `orbit signals {profile} --compute` says how it is.")
    else:
        _show_signals(answer)


def _show_signals(answer: Mapping[str, Any]) -> None:
    names = ("AT", "NAMESPACE", "METRIC", "SIGNAL", "ALARM", "CONFIDENCE", "AGAINST", "REVISION")
    rows = [
        (
            when(one["computedAt"]),
            one["namespace"],
            one["metric"],
            one["name"],
            one["alarmLevel"],
            "-" if one.get("confidence") is None else f"{one['confidence']:.0%}",
            one["baseline"]["kind"] if one.get("baseline") else "-",
            one["revision"][:12],
        )
        for one in answer["items"]
    ]
    show(table(names, rows, ids=("AT", "NAMESPACE", "REVISION")))
    newest = answer["items"][0]
    say(f"{newest['metric']}: {newest['recommendation']}")
    if answer.get("nextCursor"):
        note("There may be more; see --limit.")


def _show_streams(found: list[Any]) -> None:
    names = ("NAMESPACE", "METRIC", "REVISION", "STATUS", "NEEDED", "LOW", "ELEVATED", "MEAN IN")
    rows = [
        (
            place["namespace"],
            one["metric"],
            one["revision"][:12],
            one["status"],
            one["needed"] or "-",
            f"{one['lowEvidence']:.3g}",
            f"{one['elevatedEvidence']:.3g}",
            "{:.2f} to {:.2f}".format(*one["interval"]),
        )
        for place in found
        for one in place["streams"]
    ]
    if rows:
        show(table(names, rows, ids=("NAMESPACE", "REVISION")))
        note("Evidence of 1,000 is a signal; needed is cycles until there is a baseline.")
    else:
        say("No cycle of it has ended as yet.")
    if not all(place["isUpToDate"] for place in found):
        note("There is more to take in; ask again.")
