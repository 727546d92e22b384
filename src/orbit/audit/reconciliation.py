"""Reconciliation: every governed change has its entry, and every entry its change.

What is governed is declared here, a line each: the statement that reads the changes (log, key,
instant), and the action that an entry about one has. A change from before the trail began has no
entry; how many of those there were stands in the trail's first one. Counts, so that a change that
is dated back shows too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from psycopg import Connection
from psycopg.rows import TupleRow, tuple_row

from orbit.audit.trail import INSTALLATION, SQL


@dataclass(frozen=True, slots=True)
class Governed:
    """A kind of change: the table it is in, the action of its entry, and how it is read."""

    table: str
    action: str
    changes: bytes


GOVERNED = (
    Governed("cycle_run", "cycle.rerun", SQL.reruns),
    Governed("config_activation", "configuration.activated", SQL.activations),
    Governed("dead_letter_decision", "dead_letter.requeued", SQL.requeue_decisions),
    Governed("dead_letter_decision", "dead_letter.discarded", SQL.discard_decisions),
    Governed("requeue_batch", "requeue.begun", SQL.begun_requeues),
    Governed("requeue_batch_end", "requeue.cancelled", SQL.cancelled_requeues),
    Governed("namespace_halt", "halt", SQL.halts),
    Governed("namespace_resume", "resume.asked", SQL.asked_resumptions),
    Governed("namespace_resume", "resume", SQL.resumptions),
    Governed("namespace_resume", "resume.until", SQL.timed_resumptions),
    Governed("governance_setting", "setting", SQL.made_settings),
    Governed("access_key", "key.created", SQL.created_keys),
    Governed("access_key_end", "key.rotated", SQL.rotated_keys),
    Governed("access_key_end", "key.revoked", SQL.revoked_keys),
)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A change without its entry (no `seq`), or an entry without its change."""

    log: str
    seq: int | None
    what: str


def reconcile(connection: Connection[TupleRow], log: str | None = None) -> Iterator[Mismatch]:
    """Every mismatch, in all logs or one."""
    begun_at, before = _beginning(connection)
    declared: dict[tuple[str, str, str], int] = {}
    for name, seq, action, subject in _declared(connection, log):
        if (action, name, subject) in declared:
            yield Mismatch(name, seq, f"{action}: a second entry about {subject}")
        declared[action, name, subject] = seq
    old: Counter[str] = Counter()
    for kind in GOVERNED:
        for name, subject, at in _fetch(connection, kind.changes, {"log": log}):
            seq = declared.pop((kind.action, name, subject), None)
            if seq is not None:
                continue
            if begun_at is not None and at < begun_at:
                old[kind.table] += 1
            else:
                what = f"{kind.table} {subject} has no entry {kind.action}"
                yield Mismatch(name, None, what)
    for (action, name, subject), seq in declared.items():
        yield Mismatch(name, seq, f"{action}: what it is about ({subject}) is not there")
    if log is None:
        yield from _dated_back(old, before)


def _dated_back(old: Counter[str], before: dict[str, int]) -> Iterator[Mismatch]:
    for table in sorted(old.keys() | before.keys()):
        if old[table] != before.get(table, 0):
            yield Mismatch(
                INSTALLATION,
                1,
                f"{table} had {before.get(table, 0)} changes when the trail began, "
                f"and has {old[table]} of that time now",
            )


def _beginning(connection: Connection[TupleRow]) -> tuple[Any, dict[str, int]]:
    for at, counts in _fetch(connection, SQL.trail_beginning, {}):
        return at, counts or {}
    return None, {}


def _declared(connection: Connection[TupleRow], log: str | None) -> list[tuple[Any, ...]]:
    """What entries say was changed: log, number, action and key."""
    asked = {"actions": sorted({kind.action for kind in GOVERNED}), "log": log}
    return _fetch(connection, SQL.declared_changes, asked)


def _fetch(
    connection: Connection[TupleRow], query: bytes, params: dict[str, Any]
) -> list[tuple[Any, ...]]:
    with connection.cursor(row_factory=tuple_row) as cursor:
        return cursor.execute(query, params).fetchall()
