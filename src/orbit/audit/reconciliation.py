"""Reconciliation: every governed change has its entry, and every entry its change.

What is governed is declared here, a line each: the statement that reads the changes (log, key,
instant), and the action that an entry about one has. A change from before the trail began has no
entry; how many of those there were stands in the trail's first one. Counts, so that a change that
is dated back shows too. What entries say comes from the walk along them, so it was hashed. Re-runs
that retention dropped are left out of both. Consumers of telemetry come and go, and leave no row:
the ones that are there are those that entries added and did not remove.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from psycopg import Connection
from psycopg.rows import TupleRow, tuple_row

from orbit.audit.retirement import Retirement
from orbit.audit.trail import INSTALLATION, SQL
from orbit.audit.walk import Told


@dataclass(frozen=True, slots=True)
class Governed:
    """A kind of change: the table it is in, the action of its entry, and how it is read."""

    table: str
    action: str
    changes: bytes


_RERUN = "cycle.rerun"
GOVERNED = (
    Governed("cycle_run", _RERUN, SQL.reruns),
    Governed("config_activation", "configuration.activated", SQL.activations),
    Governed("dead_letter_decision", "dead_letter.requeued", SQL.requeue_decisions),
    Governed("dead_letter_decision", "dead_letter.discarded", SQL.discard_decisions),
    Governed("requeue_batch", "requeue.begun", SQL.begun_requeues),
    Governed("requeue_batch_end", "requeue.cancelled", SQL.cancelled_requeues),
    Governed("namespace_halt", "halt", SQL.halts),
    Governed("namespace_resume", "resume.asked", SQL.asked_resumptions),
    Governed("namespace_resume", "resume", SQL.resumptions),
    Governed("namespace_resume", "resume.until", SQL.timed_resumptions),
    Governed("halt_drill", "drill.halt", SQL.drilled_halts),
    Governed("governance_setting", "setting", SQL.made_settings),
    Governed("access_key", "key.created", SQL.created_keys),
    Governed("access_key_end", "key.rotated", SQL.rotated_keys),
    Governed("access_key_end", "key.revoked", SQL.revoked_keys),
    Governed("strategy_proposal", "proposal.made", SQL.made_proposals),
    Governed("strategy_decision", "proposal.approved", SQL.approved_proposals),
    Governed("strategy_decision", "proposal.rejected", SQL.rejected_proposals),
    Governed("strategy_decision", "proposal.expired", SQL.expired_proposals),
    Governed("strategy_decision", "proposal.superseded", SQL.superseded_proposals),
    Governed("profile_overlay", "overlay.added", SQL.added_overlays),
    Governed("profile_overlay_end", "overlay.ended", SQL.ended_overlays),
    Governed("autonomy_mode", "autonomy.set", SQL.set_modes),
    Governed("autonomy_skip", "autonomy.skipped", SQL.skipped_functions),
    Governed("autonomy_shadow", "autonomy.shadowed", SQL.shadowed_proposals),
    Governed("autonomy_verdict", "autonomy.judged", SQL.judged_changes),
)
_ADDED, _REMOVED = "consumer.added", "consumer.removed"
_CHANGES = frozenset(kind.action for kind in GOVERNED)
ACTIONS = _CHANGES | {_ADDED, _REMOVED}


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A change without its entry (no `seq`), or an entry without its change."""

    log: str
    seq: int | None
    what: str


@dataclass(frozen=True, slots=True)
class Beginning:
    """When the trail began, and how many governed changes and undated facts there were then."""

    at: datetime
    changes: Mapping[str, int]
    undated: Mapping[str, int]


def beginning(told: Told) -> Beginning:
    """What the trail's first entry says. Raises KeyError, ValueError or TypeError."""
    counts = dict(told.act.get("detail", {}))
    undated = counts.pop("undated", {})
    return Beginning(datetime.fromisoformat(told.at), counts, undated)


def reconcile(
    connection: Connection[TupleRow],
    told: Mapping[str, Sequence[Told]],
    begun: Beginning | None,
    retirement: Retirement,
    log: str | None = None,
) -> Iterator[Mismatch]:
    """Every mismatch, in all logs or one; `told` has the entries that were asked for, by log."""
    yield from _changes(connection, told, begun, retirement, log)
    if log in (None, INSTALLATION):
        yield from _consumers(connection, told.get(INSTALLATION, ()))


def _changes(
    connection: Connection[TupleRow],
    told: Mapping[str, Sequence[Told]],
    begun: Beginning | None,
    retirement: Retirement,
    log: str | None,
) -> Iterator[Mismatch]:
    declared: dict[tuple[str, str, str], int] = {}
    for name, seq, action, subject in _declared(told):
        if (action, name, subject) in declared:
            yield Mismatch(name, seq, f"{action}: a second entry about {subject}")
        declared[action, name, subject] = seq
    old: Counter[str] = Counter()
    for kind in GOVERNED:
        for name, subject, at in _fetch(connection, kind.changes, {"log": log}):
            if declared.pop((kind.action, name, subject), 0):
                continue
            if begun is not None and at < begun.at:
                old[kind.table] += 1
            else:
                what = f"{kind.table} {subject} has no entry {kind.action}"
                yield Mismatch(name, None, what)
    for (action, name, subject), seq in declared.items():
        if action != _RERUN or not retirement.covers("cycle_run", subject):
            yield Mismatch(name, seq, f"{action}: what it is about ({subject}) is not there")
    if log is None:
        yield from _dated_back(old, begun.changes if begun else {}, retirement)


def _consumers(connection: Connection[TupleRow], told: Sequence[Told]) -> Iterator[Mismatch]:
    present: dict[str, int] = {}
    for entry in told:
        name = str(entry.act.get("subject"))
        if entry.act["action"] == _ADDED:
            present[name] = entry.seq
        elif entry.act["action"] == _REMOVED:
            present.pop(name, None)
    for (name,) in _fetch(connection, SQL.present_consumers, {}):
        if not present.pop(name, 0):
            what = f"telemetry_consumer {name} has no entry {_ADDED}"
            yield Mismatch(INSTALLATION, None, what)
    for name, seq in present.items():
        what = f"{_ADDED}: what it is about ({name}) is not there, nor an entry {_REMOVED}"
        yield Mismatch(INSTALLATION, seq, what)


def _dated_back(
    old: Counter[str], before: Mapping[str, int], retirement: Retirement
) -> Iterator[Mismatch]:
    for table in sorted(old.keys() | before.keys()):
        is_fewer = old[table] < before.get(table, 0) and table in retirement.before
        if old[table] != before.get(table, 0) and not is_fewer:
            yield Mismatch(
                INSTALLATION,
                1,
                f"{table} had {before.get(table, 0)} changes when the trail began, "
                f"and has {old[table]} of that time now",
            )


def _declared(told: Mapping[str, Sequence[Told]]) -> Iterator[tuple[str, int, str, str]]:
    """What entries say was changed: log, number, action and key, one for each of several."""
    for log, entries in told.items():
        for entry in entries:
            if entry.act["action"] not in _CHANGES:
                continue
            detail = entry.act.get("detail") or {}
            for subject in detail.get("subjects", [entry.act.get("subject")]):
                yield log, entry.seq, entry.act["action"], str(subject)


def _fetch(
    connection: Connection[TupleRow], query: bytes, params: dict[str, Any]
) -> list[tuple[Any, ...]]:
    with connection.cursor(row_factory=tuple_row) as cursor:
        return cursor.execute(query, params).fetchall()
