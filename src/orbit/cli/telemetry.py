"""`telemetry`: events replayed from a position, or followed as they come, one JSON a line.

The last line's `position` is where to go on with `--after`; a reader that keeps it misses nothing
and sees nothing twice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from orbit.cli.client import connected
from orbit.cli.options import Json, group, settings
from orbit.cli.terminal import say, when

_PAGE = 1000
_POLL_SECONDS = 0.5

app = group("Telemetry: replay and follow events.")

After = Annotated[int | None, typer.Option(min=0, help="Only events after this position.")]
Namespace = Annotated[str | None, typer.Option(help="Only this namespace; `*`: the installation.")]


@app.command()
def replay(after: After = None, namespace: Namespace = None, is_json: Json = False) -> None:
    """Print all events after a position (from the first that is kept), and end."""
    with connected(settings()) as api:
        for event in _events(api, after or 0, namespace, is_following=False):
            _print(event, is_json=is_json)


@app.command()
def tail(after: After = None, namespace: Namespace = None, is_json: Json = False) -> None:
    """Print events as they come, until interrupted; with --after, those before as well."""
    with connected(settings()) as api:
        if after is None:
            after = api.get("/telemetry", limit=1, after=0)["lastPosition"]
        for event in _events(api, after, namespace, is_following=True):
            _print(event, is_json=is_json)


def _events(
    api: Any, after: int, namespace: str | None, *, is_following: bool
) -> Iterator[dict[str, Any]]:
    named = {} if namespace is None else {"namespace": namespace}
    while True:
        page = api.get("/telemetry", after=after, limit=_PAGE, **named)
        yield from page["items"]
        after = page["position"]
        if len(page["items"]) == _PAGE:
            continue
        if not is_following:
            return
        time.sleep(_POLL_SECONDS)


def _print(event: dict[str, Any], *, is_json: bool) -> None:
    if is_json:
        say(json.dumps(event, separators=(",", ":")))
        return
    data = event["data"]
    known = {"namespace", "profileId", "runProfileId", "runId"}
    rest = " ".join(f"{name}={one}" for name, one in data.items() if name not in known)
    name = event["type"].removeprefix("orbit.")
    say(f"{event['position']} {when(event['time'])} {data['namespace']} {name} {rest}")
