"""`lanes`: a namespace's queues for endpoints, what holds them up, and what became of attempts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from orbit.cli.client import connected
from orbit.cli.cycles import paged
from orbit.cli.lineage import hold_text
from orbit.cli.options import Json, settings
from orbit.cli.terminal import count, duration, note, print_json, say, show, table, when

_MOST_COUNTED = 1000


def lanes(
    namespace: Annotated[str | None, typer.Argument(help="Only its lanes.")] = None,
    endpoint: Annotated[
        str | None, typer.Argument(help="The lane for this endpoint, with limits and changes.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many.")] = 200,
    is_json: Json = False,
) -> None:
    """Show lanes: breaker, queue, what attempts came to."""
    with connected(settings()) as api:
        if endpoint is None:
            answer = paged(api, "/lanes", limit, namespace=namespace)
        else:
            answer = api.get(f"/lanes/{namespace}/{endpoint}")
    if is_json:
        print_json(answer)
    elif endpoint is not None:
        for line in lane_lines(answer):
            say(line)
        if answer["changes"]:
            say()
            _show_changes(answer["changes"])
    elif not answer["items"]:
        say("No lane has had a job.")
    else:
        show(lanes_table(answer["items"]))
        if answer.get("nextCursor"):
            note("There may be more; see --limit.")


def jobs_text(number: int) -> str:
    """A count that ends at 1,000."""
    return f"{_MOST_COUNTED:,} or more" if number >= _MOST_COUNTED else f"{number}"


def lanes_table(found: list[Any]) -> Any:
    """Lanes, one a line."""
    names = (
        "NAMESPACE",
        "ENDPOINT",
        "WAITING",
        "IN FLIGHT",
        "FIRST DUE",
        "DELIVERED",
        "FAILED",
        "NOT SENT",
        "UNKNOWN",
        "BREAKER",
    )
    rows = [
        (
            one["namespace"],
            one["endpointKey"],
            jobs_text(one["waiting"]),
            jobs_text(one["inFlight"]),
            when(one.get("dueAt")),
            *(one["attempts"][name] for name in ("delivered", "failed", "notSent", "unknown")),
            hold_text(one) if one["breaker"] == "open" else one["breaker"],
        )
        for one in found
    ]
    return table(names, rows, ids=("NAMESPACE", "ENDPOINT", "FIRST DUE"))


def lane_lines(answer: Mapping[str, Any]) -> Iterator[str]:
    """A lane's state and limits."""
    lane, limits, attempts = answer["lane"], answer.get("limits"), answer["lane"]["attempts"]
    is_open = lane["breaker"] == "open"
    window = f"{lane['windowFailures']} of {lane['windowAttempts']} failed in the window"
    facts = {
        "breaker": f"open: {hold_text(lane)}" if is_open else "closed",
        "failures": f"{lane['failures']} in a row, {window}",
        "waiting": jobs_text(lane["waiting"]),
        "in flight": jobs_text(lane["inFlight"]),
        "first due": when(lane.get("dueAt")),
        "attempts": f"delivered {attempts['delivered']}, failed {attempts['failed']}, "
        f"not sent {attempts['notSent']}, unknown {attempts['unknown']}",
    }
    yield f"lane {lane['namespace']}/{lane['endpointKey']}"
    for name, value in {**facts, **_limits(limits)}.items():
        yield f"  {name:<16}{value}"


def _limits(limits: Mapping[str, Any] | None) -> dict[str, str]:
    if limits is None:
        return {"limits": "this node does not know the endpoint"}
    rate, breaker = limits.get("ratePerSecond"), limits.get("breaker")
    return {
        "places": f"{limits['maxConcurrency']} over all nodes",
        "rate": f"{rate:g} a second over all nodes" if rate else "unlimited",
        "if unknown": limits["onUnknown"],
        "opens after": _opens_after(breaker) if breaker else "never: the breaker is off",
    }


def _opens_after(breaker: Mapping[str, Any]) -> str:
    return (
        f"{count(breaker['failures'], 'failure')} in a row, or {breaker['share']:.0%} of at least "
        f"{breaker['least']} attempts within {duration(breaker['windowSeconds'])}; holds "
        f"{duration(breaker['holdSeconds'])}, at most {duration(breaker['longestHoldSeconds'])}"
    )


def _show_changes(changes: list[Any]) -> None:
    names = ("AT", "BREAKER", "FAILURES", "IN WINDOW", "HOLDS FOR", "NODE")
    rows = [
        (
            when(one["createdAt"]),
            one["change"],
            one["failures"],
            f"{one['windowFailures']} of {one['windowAttempts']}",
            duration(one.get("holdSeconds")),
            one["nodeId"],
        )
        for one in changes
    ]
    show(table(names, rows, ids=("AT", "NODE")))
