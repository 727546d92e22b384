"""Proposals: what rules suggest is kept as facts, and a person decides. Nothing here applies one.

A proposal is pending until it is approved, rejected, or too old; and only as long as the rules
still suggest the very same of the profile in force: otherwise it is superseded, and what they
suggest now is another proposal. Where its rule does not answer it stays as it is, and nobody
approves it. The same on the same grounds is proposed once for ever, so a rejection holds until
there is new evidence; only what was superseded comes again, if it holds again. Approved proposals
change no profile either: whoever applies one does so by the file, or as controlled autonomy within
its own bounds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from datetime import UTC, timedelta
from typing import Any

from orbit.audit.trail import Act, append
from orbit.canonical import canonical_json
from orbit.clock import Clock
from orbit.database.pool import Connection, Database
from orbit.database.queries import array, load
from orbit.errors import (
    AlreadyDecided,
    DatabaseUnavailable,
    NotEntitled,
    NotFound,
    RuleUnavailable,
    SecondPersonRequired,
)
from orbit.governance.actor import Actor
from orbit.insight.source import profile_revisions
from orbit.insight.strategy import (
    Figures,
    Rule,
    SaidSignal,
    Situation,
    Suggestion,
    declares_reaction,
    profile_digest,
    rules,
    suggestions,
)
from orbit.profiles.model import Documents, document_body
from orbit.profiles.revision import Configuration, Revision
from orbit.telemetry.catalogue import EventType
from orbit.telemetry.emission import Event, emit

SQL = load("proposals")
CONFIGURATION_SQL = load("configuration")
_TRIES = 3
_A_DAY = timedelta(days=1, minutes=10)  # its last events are committed by then
_OVER = "its time is over"
_CHANGED = "the profile is another by now"
_UNFOUNDED = "what it rests on is another by now"
_GROUNDS = ("profile_id", "body")


@dataclass(frozen=True, slots=True)
class Author:
    """Who suggests: a person who asked for it, or Orbit by itself."""

    name: str
    id: str


ORBIT = Author("orbit", "orbit")


@dataclass(frozen=True, slots=True)
class Generated:
    """The ids of the proposals that are new, and of those that ended by a change or by time.

    `unknown` are those that neither hold nor ended, since their rule did not answer. All of it is
    of the configuration `revision`.
    """

    made: Sequence[str]
    ended: Sequence[str]
    unknown: Set[str]
    revision: str


@dataclass(slots=True)
class _Answers:
    """What rules suggest, and of which profiles which rules answered at all."""

    suggestions: list[Suggestion] = field(default_factory=list)
    answered: set[tuple[str, str]] = field(default_factory=set)


class Proposals:
    """The proposals of all namespaces."""

    def __init__(
        self,
        database: Database,
        configuration: Configuration,
        clock: Clock,
        *,
        hours: int,
        using: Sequence[Rule] | None = None,
    ) -> None:
        self._database, self._configuration, self._clock = database, configuration, clock
        self._hours, self._rules = hours, using
        self._figures: dict[str, tuple[str, Sequence[Mapping[str, Any]]]] = {}

    async def generate(
        self, namespace: str, author: Author = ORBIT, profile_id: str | None = None
    ) -> Generated:
        """Suggests what there is to suggest in a namespace, and ends what no longer holds.

        The undecided are read first: what another node has made since on newer grounds is not
        among them, so it is not ended for ours.
        """
        asked = {
            "namespace": namespace,
            "profile_id": None if profile_id is None else array([profile_id]),
        }
        undecided = await self._database.fetch_all(SQL.undecided, asked)
        await self._configuration.refresh()
        active = self._configuration.active
        within = _of_namespace(active.documents, namespace, profile_id)
        found = await self._suggested(active.documents, within, namespace)
        ends, unknown = _ends(undecided, found, within)
        made: Sequence[str] = ()
        ended: Sequence[str] = ()
        if found.suggestions or ends:
            made, ended = await self._write(namespace, author, found.suggestions, ends)
        return Generated(made, ended, unknown, active.revision)

    async def is_suggested(self, row: Mapping[str, Any]) -> bool:
        """Whether the rules still suggest a proposal; no, where its rule does not answer."""
        documents, namespace = self._configuration.active.documents, row["namespace"]
        within = _of_namespace(documents, namespace, row["profile_id"])
        found = await self._suggested(documents, within, namespace)
        return row["proposal_id"] in {one.proposal_id for one in found.suggestions}

    async def namespaces(self, node_id: str) -> list[str]:
        """Where there may be something to do; nowhere unless the node numbers events."""
        row = await self._database.fetch_one(SQL.leader)
        if row is None or row["node_id"] != node_id:
            return []
        await self._configuration.refresh()
        documents = self._configuration.active.documents
        asking = {one.profile_id for one in documents.profiles if declares_reaction(one)}
        names = {one.namespace for one in documents.run_profiles if one.profile_id in asking}
        rows = await self._database.fetch_all(SQL.undecided_namespaces)
        return sorted(names | {row["namespace"] for row in rows})

    async def decide(
        self, proposal_id: str, actor: Actor, *, is_approved: bool, reason: str | None
    ) -> None:
        """Approves or rejects, once; what the rules say no longer is superseded first.

        Raises NotFound, AlreadyDecided, SecondPersonRequired (an author approves nothing of their
        own), NotEntitled (the profile runs where the actor has no say) and RuleUnavailable (an
        approval, and the rule did not answer).
        """
        row = await self._visible(proposal_id, actor)
        if row["decision"] is not None:
            raise _decided(row)
        for _ in range(_TRIES):
            found = await self.generate(row["namespace"], profile_id=row["profile_id"])
            if is_approved and proposal_id in found.unknown:
                raise RuleUnavailable(
                    f"the rule {row['rule']} does not answer on this node, so whether the proposal "
                    "still holds is not known; it stays pending, see rule_failed and rule_unusable "
                    "in the log"
                )
            if await self._decide(
                row, found.revision, actor, is_approved=is_approved, reason=reason
            ):
                return
        raise DatabaseUnavailable("the configuration is changing; try again")

    async def _visible(self, proposal_id: str, actor: Actor) -> Mapping[str, Any]:
        row = await self._database.fetch_one(SQL.proposal, {"proposal_id": proposal_id})
        if row is None or not actor.sees(row["namespace"]):
            raise NotFound("there is no such proposal")
        return row

    async def _decide(
        self,
        row: Mapping[str, Any],
        revision: str,
        actor: Actor,
        *,
        is_approved: bool,
        reason: str | None,
    ) -> bool:
        """Whether it was decided; not if another configuration came into force since `revision`."""
        active = self._configuration.active
        namespace, proposal_id = row["namespace"], row["proposal_id"]
        async with self._database.transaction() as connection:
            await connection.execute(CONFIGURATION_SQL.bound_wait)
            await connection.execute(SQL.share_configuration)
            cursor = await connection.execute(CONFIGURATION_SQL.active_revision)
            force = await cursor.fetchone()
            if force is None or {force["revision"], active.revision} != {revision}:
                return False
            cursor = await connection.execute(SQL.proposal, {"proposal_id": proposal_id})
            now = await cursor.fetchone()
            assert now is not None
            if now["state"] != "pending":
                raise _decided(now)
            if is_approved:
                _check_approver(now, actor, active)
            verdict = "approved" if is_approved else "rejected"
            made = await _end(
                connection, namespace, {proposal_id: (verdict, reason)}, actor.name, actor.id
            )
            if not made:
                cursor = await connection.execute(SQL.proposal, {"proposal_id": proposal_id})
                first = await cursor.fetchone()
                assert first is not None
                raise _decided(first)
            told = {"proposalId": proposal_id, "rule": row["rule"], "decision": verdict}
            event = Event(namespace, EventType.PROPOSAL_DECIDED, told, row["profile_id"])
            await emit(connection, event)
            await append(
                connection,
                Act(namespace, f"proposal.{verdict}", actor.name, reason, proposal_id),
            )
        return True

    async def _suggested(self, documents: Documents, within: Documents, namespace: str) -> _Answers:
        asking = [one for one in within.profiles if declares_reaction(one)]
        found = _Answers()
        if not asking:
            return found
        revisions = profile_revisions(document_body(documents))
        said = await self._signals(
            namespace, {one.profile_id: revisions[one.profile_id] for one in asking}
        )
        day, figures = await self._of_day(namespace)
        using = rules() if self._rules is None else self._rules
        for profile in asking:
            situation = Situation(namespace, profile, said.get(profile.profile_id, ()), day)
            endpoints = {
                key
                for one in within.run_profiles
                if one.profile_id == profile.profile_id
                for key in one.distribution_targets
            }
            made, answered = suggestions(_with_figures(situation, figures, endpoints), using)
            found.suggestions += made
            found.answered |= {(profile.profile_id, rule) for rule in answered}
        found.suggestions = await self._counted(namespace, found.suggestions)
        return found

    async def _counted(self, namespace: str, found: Sequence[Suggestion]) -> list[Suggestion]:
        """What is suggested, as often as the very same was superseded before."""
        if not found:
            return []
        columns = {name: array(getattr(one, name) for one in found) for name in _GROUNDS}
        rows = await self._database.fetch_all(SQL.superseded, {"namespace": namespace, **columns})
        times = {row["body"]: row["times"] for row in rows}
        return [one.again(times.get(one.body, 0)) for one in found]

    async def _signals(
        self, namespace: str, revisions: Mapping[str, str]
    ) -> dict[str, list[SaidSignal]]:
        asked = {
            "namespace": namespace,
            "profile_id": array(revisions),
            "revision": array(revisions.values()),
        }
        found: dict[str, list[SaidSignal]] = {}
        for row in await self._database.fetch_all(SQL.last_signals, asked):
            body = json.loads(row["body"])
            said = SaidSignal(
                row["signal_id"],
                row["metric"],
                row["name"],
                row["confidence"],
                body["recent"],
                body["baseline"]["mean"],
                row["from_position"],
                row["to_position"],
            )
            found.setdefault(row["profile_id"], []).append(said)
        return found

    async def _of_day(self, namespace: str) -> tuple[str, Sequence[Mapping[str, Any]]]:
        """The figures of the last day that is over and all of whose events have positions.

        They change no more, so they are read once.
        """
        over = self._clock.now() - _A_DAY
        row = await self._database.fetch_one(SQL.oldest_pending, {"namespace": namespace})
        if row is not None:
            over = min(over, row["at"] - timedelta(days=1))
        day = over.astimezone(UTC).date().isoformat()
        known = self._figures.get(namespace)
        if known is None or known[0] != day:
            asked = {"namespace": namespace, "day": day}
            known = day, await self._database.fetch_all(SQL.figures, asked)
            self._figures[namespace] = known
        return known

    async def _write(
        self,
        namespace: str,
        author: Author,
        found: Sequence[Suggestion],
        ends: Mapping[str, tuple[str, str | None]],
    ) -> tuple[list[str], list[str]]:
        async with self._database.transaction() as connection:
            made = await self._add(connection, namespace, author, found)
            ended = await _end(connection, namespace, ends, ORBIT.name, ORBIT.id)
            profiles = {row["proposal_id"]: row["profile_id"] for row in made}
            events = [
                Event(
                    namespace,
                    EventType.PROPOSAL_MADE,
                    {"proposalId": row["proposal_id"], "rule": row["rule"]},
                    row["profile_id"],
                )
                for row in made
            ]
            await emit(connection, *events, *(_ended_event(namespace, row) for row in ended))
            acts = [
                Act(namespace, "proposal.made", author.name, None, name, {"profileId": profile})
                for name, profile in profiles.items()
            ]
            acts += [
                Act(
                    namespace,
                    f"proposal.{row['decision']}",
                    ORBIT.name,
                    row["reason"],
                    row["proposal_id"],
                )
                for row in ended
            ]
            await append(connection, *acts)
        return list(profiles), [row["proposal_id"] for row in ended]

    async def _add(
        self,
        connection: Connection,
        namespace: str,
        author: Author,
        found: Sequence[Suggestion],
    ) -> Sequence[Mapping[str, Any]]:
        if not found:
            return ()
        columns = ("profile_id", "rule", "profile_digest", "body", "digest")
        rows = {name: array(getattr(one, name) for one in found) for name in columns}
        rows |= {
            "proposal_id": array(one.proposal_id for one in found),
            "patch": array(canonical_json(list(one.patch)).decode() for one in found),
            "from_position": array(one.from_position for one in found),
            "to_position": array(one.to_position for one in found),
        }
        given = {"namespace": namespace, "author": author.name, "author_id": author.id}
        cursor = await connection.execute(
            SQL.add_proposals, {**rows, **given, "hours": self._hours}
        )
        return await cursor.fetchall()


def _of_namespace(documents: Documents, namespace: str, profile_id: str | None) -> Documents:
    """The enabled profiles that run in a namespace, or the one of them; and how they run there."""
    here = tuple(one for one in documents.run_profiles if one.namespace == namespace)
    used = {one.profile_id for one in here}
    return Documents(
        tuple(
            one
            for one in documents.profiles
            if one.is_enabled and one.profile_id in used and profile_id in (None, one.profile_id)
        ),
        here,
    )


def _with_figures(
    situation: Situation, rows: Sequence[Mapping[str, Any]], endpoints: set[str]
) -> Situation:
    """The situation with what the day's rows say of the profile and of its endpoints' lanes."""
    mine = [
        row
        for row in rows
        if row["profile_id"] == situation.profile.profile_id or row["endpoint_key"] in endpoints
    ]
    if not mine:
        return situation
    return replace(
        situation,
        recent=_summed(row for row in mine if row["is_recent"]),
        before=_summed(row for row in mine if not row["is_recent"]),
        from_position=min(row["from_position"] for row in mine),
        to_position=max(row["to_position"] for row in mine),
    )


def _summed(rows: Any) -> Figures:
    found = list(rows)
    return Figures(
        **{name: sum(row[name] for row in found) for name in Figures.__dataclass_fields__ if found}
    )


def _ends(
    undecided: Sequence[Mapping[str, Any]], found: _Answers, within: Documents
) -> tuple[dict[str, tuple[str, str | None]], set[str]]:
    """Of what is undecided what becomes of that which does not hold, and what nobody can say of."""
    held = {one.proposal_id for one in found.suggestions}
    digests = {one.profile_id: profile_digest(one) for one in within.profiles}
    ends: dict[str, tuple[str, str | None]] = {}
    unknown: set[str] = set()
    for row in undecided:
        if row["is_over"]:
            ends[row["proposal_id"]] = "expired", _OVER
        elif digests.get(row["profile_id"]) != row["profile_digest"]:
            ends[row["proposal_id"]] = "superseded", _CHANGED
        elif (row["profile_id"], row["rule"]) not in found.answered:
            unknown.add(row["proposal_id"])
        elif row["proposal_id"] not in held:
            ends[row["proposal_id"]] = "superseded", _UNFOUNDED
    return ends, unknown


async def _end(
    connection: Connection,
    namespace: str,
    ends: Mapping[str, tuple[str, str | None]],
    actor: str,
    actor_id: str,
) -> Sequence[Mapping[str, Any]]:
    if not ends:
        return ()
    rows = {
        "namespace": namespace,
        "actor": actor,
        "actor_id": actor_id,
        "proposal_id": array(ends),
        "decision": array(decision for decision, _ in ends.values()),
        "reason": array(reason for _, reason in ends.values()),
    }
    return await (await connection.execute(SQL.decide, rows)).fetchall()


def _ended_event(namespace: str, row: Mapping[str, Any]) -> Event:
    told = {"proposalId": row["proposal_id"], "rule": row["rule"], "decision": row["decision"]}
    return Event(namespace, EventType.PROPOSAL_DECIDED, told, row["profile_id"])


def _check_approver(row: Mapping[str, Any], actor: Actor, active: Revision) -> None:
    if row["author_id"] == actor.id:
        raise SecondPersonRequired("whoever asked for a proposal does not approve it")
    profile = active.documents.profile(row["profile_id"])
    if profile is None or profile_digest(profile) != row["profile_digest"]:
        raise AlreadyDecided(f"the proposal is superseded: {_CHANGED}", decision="superseded")
    used = {
        one.namespace
        for one in active.documents.run_profiles
        if one.profile_id == profile.profile_id
    }
    if not actor.contains(used):
        raise NotEntitled(
            "the profile runs elsewhere too; this needs somebody with a say in all of it"
        )


def _decided(row: Mapping[str, Any]) -> AlreadyDecided:
    by = f" by {row['decided_by']}" if row["decided_by"] else ""
    why = f": {row['reason']}" if row["state"] == "superseded" and row["reason"] else ""
    return AlreadyDecided(f"the proposal is {row['state']}{by}{why}", decision=row["state"])
