"""`proposals`: what rules suggest, and a person's decision on it. Approving applies nothing.

Where a person has armed the profile, controlled autonomy applies what is approved.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from orbit.cli.client import connected
from orbit.cli.cycles import paged
from orbit.cli.options import Json, group, settings
from orbit.cli.terminal import count, note, print_json, say, show, table, when

_PATIENCE_SECONDS = 60.0
Proposal = Annotated[str, typer.Argument(help="The proposal's id.")]

app = group("Proposals: changes of profiles that wait for a person.")


@app.command("ls")
def listed(
    namespace: Annotated[str | None, typer.Option(help="Only of this namespace.")] = None,
    profile: Annotated[str | None, typer.Option(help="Only of this profile.")] = None,
    state: Annotated[
        str | None,
        typer.Option(help="Only: pending, approved, rejected, expired or superseded."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many.")] = 20,
    is_json: Json = False,
) -> None:
    """List proposals, newest first."""
    with connected(settings()) as api:
        answer = paged(
            api, "/proposals", limit, namespace=namespace, profileId=profile, state=state
        )
    if is_json:
        print_json(answer)
    elif not answer["items"]:
        say("No proposals.")
    else:
        names = ("PROPOSAL", "AT", "NAMESPACE", "PROFILE", "RULE", "STATE", "EXPIRES")
        rows = [
            (
                one["proposalId"],
                when(one["createdAt"]),
                one["namespace"],
                one["profileId"],
                one["rule"],
                one["state"],
                when(one["expiresAt"]),
            )
            for one in answer["items"]
        ]
        show(table(names, rows, ids=("PROPOSAL", "AT", "NAMESPACE", "PROFILE", "EXPIRES")))
        if answer.get("nextCursor"):
            note("There may be more; see --limit.")


@app.command("show")
def shown(proposal: Proposal, is_json: Json = False) -> None:
    """Show a proposal: the change, why, and what to expect."""
    with connected(settings()) as api:
        answer = api.get(f"/proposals/{proposal}")
    _show(answer, is_json=is_json)


@app.command("make")
def made(
    profile: Annotated[str, typer.Argument(help="The profile.")], is_json: Json = False
) -> None:
    """Have the rules look at a profile now. Another person than you approves what is new."""
    with connected(settings(), patience_seconds=_PATIENCE_SECONDS) as api:
        answer = api.post(f"/profiles/{profile}/strategy-proposals")
    if is_json:
        print_json(answer)
        return
    for one in answer["items"]:
        made, ended = count(len(one["made"]), "new proposal"), len(one["ended"])
        say(f"{one['namespace']}: {made}, {ended} that hold no longer")
        for proposal in one["made"]:
            say(f"  {proposal}")


@app.command("approve")
def approve(
    proposal: Proposal,
    reason: Annotated[str | None, typer.Option(help="Why.")] = None,
    is_json: Json = False,
) -> None:
    """Approve a proposal. It is applied by itself only where the profile is armed."""
    _decide(proposal, "approve", reason, is_json=is_json)


@app.command("reject")
def reject(
    proposal: Proposal, reason: Annotated[str, typer.Option(help="Why.")], is_json: Json = False
) -> None:
    """Reject a proposal; it comes again only on new evidence."""
    _decide(proposal, "reject", reason, is_json=is_json)


def _decide(proposal: str, verb: str, reason: str | None, *, is_json: bool) -> None:
    body = {} if reason is None else {"reason": reason}
    with connected(settings()) as api:
        answer = api.post(f"/proposals/{proposal}/{verb}", body)
    _show(answer, is_json=is_json)


def _show(found: Mapping[str, Any], *, is_json: bool) -> None:
    if is_json:
        print_json(found)
        return
    say(f"proposal {found['proposalId']}: {found['state']}")
    say(f"{found['rule']} for profile {found['profileId']} in {found['namespace']}")
    say(found["why"])
    for change, old in zip(found["patch"], found["replaced"], strict=True):
        say(f"  {change['path']}: {json.dumps(old)} becomes {json.dumps(change['value'])}")
    say(f"To expect: {found['expected']}")
    if found.get("decidedAt"):
        why = f": {found['reason']}" if found.get("reason") else ""
        say(f"{found['state']} by {found['decidedBy']} at {when(found['decidedAt'])}{why}")
        if applied := found.get("application"):
            outcome = applied["outcome"].replace("_", " ")
            say(f"Applied by autonomy at {when(applied['appliedAt'])}: {outcome}")
    elif found["state"] == "pending":
        until, author = when(found["expiresAt"]), found["author"]
        say(f"It waits until {until} for an approver other than {author}.")
