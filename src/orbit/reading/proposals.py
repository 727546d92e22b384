"""Proposals as people read them: what is suggested, what it rests on, and what became of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from orbit.database.pool import Database
from orbit.database.queries import array, load
from orbit.errors import NotFound
from orbit.reading.view import (
    Page,
    Position,
    Row,
    View,
    is_within,
    narrowed,
    position_of,
    read_all,
    read_page,
)

SQL = load("proposals")
_LATEST = ("infinity", "g")


@dataclass(frozen=True, slots=True)
class Application(View):
    """That autonomy made the change of an approved proposal, and what came of it.

    `outcome` is `on_probation`, `kept`, or how the overlay ended: `rolled_back`, `reverted`,
    `undone`, `adopted` or `dropped`.
    """

    overlay_id: str
    applied_at: datetime
    outcome: str


@dataclass(frozen=True, slots=True)
class ProposalView(View):
    """A proposal; `state` is `pending` until it is decided, expires, or does not hold any more.

    `patch` is a JSON Patch on the profile whose canonical body has the SHA-256 `profile_digest`,
    `replaced` the values it replaces. `digest` is the SHA-256 of all that it says, and begins with
    the id. `evidence` is the rule's; positions are of the namespace's telemetry. `application` is
    None unless autonomy applied it.
    """

    proposal_id: str
    namespace: str
    profile_id: str
    rule: str
    state: str
    why: str
    expected: str
    patch: list[dict[str, Any]]
    replaced: list[Any]
    evidence: dict[str, Any]
    profile_digest: str
    digest: str
    from_position: int
    to_position: int
    author: str
    created_at: datetime
    expires_at: datetime
    decided_by: str | None
    reason: str | None
    decided_at: datetime | None
    application: Application | None


async def proposals(
    database: Database,
    *,
    namespace: str | None = None,
    profile_id: str | None = None,
    state: str | None = None,
    rule: str | None = None,
    limit: int = 50,
    cursor: str | None = None,
    within: Sequence[str] | None = None,
) -> Page[ProposalView]:
    """Proposals, newest first, of the namespaces that there are for who asks.

    Raises RequestInvalid for a cursor that is none.
    """
    namespaces = narrowed(namespace, within)

    async def scan(after: Position | None, count: int) -> Sequence[Row]:
        created_at, proposal_id = after or _LATEST
        asked = {"created_at": created_at, "proposal_id": proposal_id, "count": count}
        return await read_all(database, SQL.proposal_window, {**asked, "namespaces": namespaces})

    async def choose(rows: Sequence[Row]) -> Mapping[Position, ProposalView]:
        chosen = [
            row
            for row in rows
            if profile_id in (None, row["profile_id"])
            and state in (None, row["state"])
            and rule in (None, row["rule"])
        ]
        applied = await _applications(database, chosen)
        return {_place(row): _view(row, applied) for row in chosen}

    return await read_page(
        scan,
        _place,
        choose,
        after=position_of(cursor, datetime.fromisoformat, _check_id),
        limit=limit,
        is_filtered=not (profile_id is None and state is None and rule is None),
    )


async def proposal(
    database: Database, proposal_id: str, within: Sequence[str] | None = None
) -> ProposalView:
    """One of them. Raises NotFound, also for one that is not there for who asks."""
    rows = (
        []
        if "\x00" in proposal_id
        else await read_all(database, SQL.proposal, {"proposal_id": proposal_id})
    )
    if not rows or not is_within(rows[0]["namespace"], within):
        raise NotFound("there is no such proposal")
    return _view(rows[0], await _applications(database, rows))


async def _applications(database: Database, rows: Sequence[Row]) -> Mapping[str, Application]:
    """By the proposal's id, which its namespace is part of."""
    approved = [row for row in rows if row["state"] == "approved"]
    if not approved:
        return {}
    asked = {name: array(row[name] for row in approved) for name in ("namespace", "proposal_id")}
    return {
        row["proposal_id"]: Application(row["overlay_id"], row["applied_at"], row["outcome"])
        for row in await read_all(database, SQL.applications, asked)
    }


def _place(row: Row) -> Position:
    return row["created_at"].isoformat(), row["proposal_id"]


def _check_id(text: str) -> object:
    if len(text) != 32:
        raise ValueError(text)
    return int(text, 16)


def _view(row: Row, applied: Mapping[str, Application]) -> ProposalView:
    body: dict[str, Any] = json.loads(row["body"])
    names = ProposalView.__dataclass_fields__
    given = {name: value for name, value in row.items() if name in names and name != "patch"}
    told = {name: body[name] for name in ("why", "expected", "patch", "replaced", "evidence")}
    return ProposalView(**given, **told, application=applied.get(row["proposal_id"]))
