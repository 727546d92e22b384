"""Verification: whether the trail is whole, and whether the rows say what it says.

It reads one snapshot of the database with SQL of the program's own, hashes every stored byte
itself, and trusts no function, view or head of the database. Checked are, for each log, numbers,
links, hashes and roots; every checkpoint at hand; each sealed fact against its row; and both ways
whether each governed change has its entry. Each finding names the entry. What it cannot see: an
end cut off since the last checkpoint that it is given.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import Connection, sql
from psycopg.abc import Buffer
from psycopg.rows import TupleRow, dict_row, tuple_row

from orbit.audit.checkpoints import Checkpoint
from orbit.audit.merkle import leaf_hash
from orbit.audit.reconciliation import reconcile
from orbit.audit.trail import SQL
from orbit.audit.walk import Entry, Finding, LogWalk
from orbit.errors import VerificationImpossible

_ROWS = 10_000
_COPY_HEADER = b"PGCOPY\n\xff\r\n\x00" + bytes(8)
_ENTRY = struct.Struct(">hiqi32si32si")  # a row's beginning, up to its body: seq, prev, hash
_EVERY_TRANSACTION = {"low": "0", "until": str(2**64 - 1)}
_SETTINGS = b"""
SELECT set_config(name, wanted.value, false) FROM (VALUES ('transaction_timeout', '0'),
    ('idle_in_transaction_session_timeout', '0'), ('enable_seqscan', 'on'),
    ('enable_hashjoin', 'on'), ('enable_mergejoin', 'on'), ('plan_cache_mode', 'auto'),
    ('work_mem', '64MB'), ('cursor_tuple_fraction', '1')) AS wanted (name, value)
JOIN pg_settings USING (name)
"""


@dataclass(slots=True)
class Report:
    """What was looked at, and what was found.

    `retired` facts were dropped by retention and `unsealed` ones have no number yet; `unsigned`
    entries are younger than their log's last checkpoint.
    """

    entries: int = 0
    facts: int = 0
    retired: int = 0
    unsealed: int = 0
    unsigned: int = 0
    checkpoints: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether nothing was found."""
        return not self.findings


def verify(dsn: str, checkpoints: Sequence[Checkpoint] = (), log: str | None = None) -> Report:
    """Verifies all logs of a database, or one.

    `checkpoints` are ones whose signature was verified. Raises psycopg.Error if it cannot read.
    """
    report = Report(checkpoints=len(checkpoints))
    with snapshot(dsn) as connection:
        expected = _by_log(checkpoints, log)
        heads = {row["log"]: row for row in _rows(connection, SQL.logs, {"log": log})}
        for name in sorted(heads.keys() | expected.keys()):
            _verify_log(connection, name, heads.get(name), expected.get(name, {}), report)
        _verify_facts(connection, log, report)
        report.findings.extend(
            Finding(one.log, one.seq, one.what) for one in reconcile(connection, log)
        )
    return report


@contextmanager
def snapshot(dsn: str) -> Iterator[Connection[TupleRow]]:
    """One unchanging view of the database, as long as it takes to read it whole."""
    with psycopg.connect(dsn, application_name="orbit audit", autocommit=True) as connection:
        connection.execute(_SETTINGS)
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        with connection.transaction():
            yield connection


def stream(
    connection: Connection[TupleRow], query: bytes, params: Mapping[str, Any]
) -> Iterator[tuple[Any, ...]]:
    """The rows of a statement, binary, without holding them all."""
    with connection.cursor(name="audit", binary=True, row_factory=tuple_row) as cursor:
        cursor.itersize = _ROWS
        cursor.execute(query, params)
        yield from cursor


def entries_of(connection: Connection[TupleRow], log: str, after: int = 0) -> Iterator[Entry]:
    """A log's entries as LogWalk takes them, copied in binary: the quickest way out."""
    query = SQL.entries.rstrip(b";")  # COPY takes no parameters
    for name, value in (("log", log), ("after", after)):
        query = query.replace(f"%({name})s".encode(), sql.Literal(value).as_bytes(connection))
    with (
        connection.cursor() as cursor,
        cursor.copy(b"COPY (" + query + b") TO STDOUT (FORMAT binary)") as copy,
    ):
        yield from _unpacked(iter(copy))


def _unpacked(rows: Iterator[Buffer]) -> Iterator[Entry]:
    """Binary COPY rows, one a message, taken apart by hand: a third of the driver's own time."""
    skip = len(_COPY_HEADER)
    unpack, size = _ENTRY.unpack_from, _ENTRY.size
    for row in rows:
        data = bytes(row)[skip:]
        if len(data) < size:
            continue  # the mark of the end
        skip = 0
        fields, _, seq, prev_size, prev, hash_size, stored, body_size = unpack(data)
        if (fields, prev_size, hash_size) != (5, 32, 32):
            raise VerificationImpossible("entries are not stored as this program stores them")
        end = size + body_size
        yield seq, prev, stored, data[size:end], data[-1] == 1


def _verify_log(
    connection: Connection[TupleRow],
    log: str,
    row: Mapping[str, Any] | None,
    expected: Mapping[int, bytes],
    report: Report,
) -> None:
    walk = LogWalk(log, report.findings.append, expected)
    walk.walk(entries_of(connection, log))
    has_head = row is not None and row["seq"] is not None
    walk.end((row["seq"], row["hash"]) if row is not None and has_head else None)
    report.entries += walk.seq
    report.unsigned += walk.seq - max((one for one in expected if one <= walk.seq), default=0)
    leaves = stream(connection, SQL.sealed_facts, {"log": log})
    report.facts += walk.roots((number, leaf) for number, _, _, _, leaf in leaves)


def _verify_facts(connection: Connection[TupleRow], log: str | None, report: Report) -> None:
    """Holds every row that is sealed against its hash, and every number against its row."""
    row = next(_rows(connection, SQL.sealed_until, {}), {"sealed_until": "0"})
    due = {"low": "0", "until": row["sealed_until"]}
    late = {"low": row["sealed_until"], "until": _EVERY_TRANSACTION["until"]}
    for asked in (due, late):
        for name, fact, fact_id, part, body, number, stored in stream(
            connection, SQL.facts_to_seal, asked
        ):
            if log is not None and name != log:
                continue
            what = f"{fact} {fact_id}{'/' + part if part else ''}"
            if number is None and asked is due:
                report.findings.append(Finding(name, None, f"{what} has no number: it was added"))
            elif number is None:
                report.unsealed += 1
            elif leaf_hash(body.encode()) != stored:
                report.findings.append(Finding(name, number, f"{what} was altered", "fact"))
    for name, number, fact, fact_id, part, is_retired in stream(
        connection, SQL.unsealed_facts, {"log": log}
    ):
        if is_retired:
            report.retired += 1
        else:
            what = f"{fact} {fact_id}{'/' + part if part else ''} is missing"
            report.findings.append(Finding(name, number, what, "fact"))


def _by_log(checkpoints: Sequence[Checkpoint], log: str | None) -> dict[str, dict[int, bytes]]:
    found: dict[str, dict[int, bytes]] = {}
    for one in checkpoints:
        if log is None or one.log == log:
            found.setdefault(one.log, {})[one.size] = one.head
    return found


def _rows(
    connection: Connection[TupleRow], query: bytes, params: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    with connection.cursor(row_factory=dict_row, binary=True) as cursor:
        yield from cursor.execute(query, params).fetchall()
