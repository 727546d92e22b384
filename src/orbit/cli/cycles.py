"""`cycles` and `trace`: what ran, and the whole story of one."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from orbit.cli.client import Api, connected
from orbit.cli.lineage import lineage_lines, state_of, story_of
from orbit.cli.options import Json, settings
from orbit.cli.outcome import ApiProblem
from orbit.cli.terminal import note, print_json, say, show, table, when

_NOT_FOUND = 404
_LARGEST_PAGE = 200
_MOST_PAGES = 60  # a filter that matches nothing ends, however long the history


class State(StrEnum):
    """A cycle's state."""

    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"


def cycles(
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many.")] = 20,
    state: Annotated[State | None, typer.Option(help="Only those.")] = None,
    namespace: Annotated[str | None, typer.Option(help="Only its.")] = None,
    run_profile: Annotated[str | None, typer.Option(metavar="ID", help="Only its.")] = None,
    is_json: Json = False,
) -> None:
    """List cycles, the newest first."""
    with connected(settings()) as api:
        answer = paged(
            api,
            "/cycles",
            limit,
            state=None if state is None else state.value,
            namespace=namespace,
            runProfileId=run_profile,
        )
    if is_json:
        print_json(answer)
        return
    if not answer["items"]:
        say("No cycle.")
        return
    rows = [
        (
            one.get("cycleRunId"),
            one.get("namespace"),
            one.get("runProfileId") or "(raw)",
            one.get("trigger"),
            state_of(one),
            one.get("stage"),
            when(one.get("createdAt")),
        )
        for one in answer["items"]
    ]
    names = ("CYCLE", "NAMESPACE", "RUN PROFILE", "TRIGGER", "STATE", "STAGE", "BEGAN")
    show(table(names, rows, ids=("CYCLE", "NAMESPACE", "RUN PROFILE", "BEGAN")))
    if answer.get("nextCursor"):
        note("There may be more; see --limit.")


def paged(api: Api, path: str, limit: int, **params: Any) -> Any:
    """The first `limit` entries of a list, over as many pages as that takes, up to a bound."""
    items: list[Any] = []
    cursor = None
    for _ in range(_MOST_PAGES):
        size = min(limit - len(items), _LARGEST_PAGE)
        page = api.get(path, limit=size, cursor=cursor, **params)
        items += page["items"]
        cursor = page.get("nextCursor")
        if cursor is None or len(items) >= limit:
            break
    return {"items": items, "nextCursor": cursor}


def trace(
    identity: Annotated[
        str, typer.Argument(metavar="ID", help="A cycle's id, or a dead letter's.")
    ],
    is_json: Json = False,
) -> None:
    """Show the whole story of a cycle."""
    with connected(settings()) as api:
        cycle = _cycle(api, identity)
    if is_json:
        print_json(cycle)
        return
    for line in lineage_lines(story_of(cycle)):
        say(line)


def _cycle(api: Api, identity: str) -> Any:
    """The cycle of that id, or the one whose job of that id is a dead letter."""
    try:
        return api.get(f"/cycles/{identity}")
    except ApiProblem as error:
        if error.status != _NOT_FOUND:
            raise
        try:
            letter = api.get(f"/dead-letters/{identity}")
        except ApiProblem:
            raise error from None
    return api.get(f"/cycles/{letter['deadLetter']['cycleRunId']}")
