"""Verification: whether the trail is whole, and whether the rows say what it says.

It reads one snapshot of the database with SQL of the program's own, hashes every stored byte
itself, and trusts no function, view or head of the database. Checked are, for each log, numbers,
links, hashes and roots; every checkpoint at hand; each fact against its number, whatever its row
says of its transaction; and both ways whether each governed change has its entry. Each finding
names the entry. What it cannot see: an end cut off since the last checkpoint that it is given.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import Connection, sql
from psycopg.abc import Buffer
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import TupleRow, dict_row, tuple_row

from orbit.audit.checkpoints import Checkpoint
from orbit.audit.merkle import leaf_hash
from orbit.audit.reconciliation import ACTIONS, Beginning, beginning, reconcile
from orbit.audit.retirement import RETIRED, Retirement
from orbit.audit.trail import INSTALLATION, SQL
from orbit.audit.walk import Entry, Finding, LogWalk, Told
from orbit.errors import VerificationImpossible

_ROWS = 10_000
_COPY_HEADER = b"PGCOPY\n\xff\r\n\x00" + bytes(8)
_ENTRY = struct.Struct(">hiqi32si32si")  # a row's beginning, up to its body: seq, prev, hash
_BEGUN = "trail.begun"
_WANTED = ACTIONS | {RETIRED, _BEGUN}
_STATES = {
    "late": "has no number: it was added",
    "impossible": "has no number, and is of a transaction that cannot be: it was added",
    "undated": "has no transaction, and is younger than the trail: it was added",
}
# Who reads must go on reading: a snapshot that stays open keeps dead rows on the hot path.
_SETTINGS = b"""
SELECT set_config(name, wanted.value, false) FROM (VALUES ('transaction_timeout', '0'),
    ('idle_in_transaction_session_timeout', '60s'), ('enable_seqscan', 'on'),
    ('enable_hashjoin', 'on'), ('enable_mergejoin', 'on'), ('plan_cache_mode', 'auto'),
    ('work_mem', '64MB'), ('cursor_tuple_fraction', '1')) AS wanted (name, value)
JOIN pg_settings USING (name)
"""
# A server that hangs or is gone is noticed in half a minute, as by the pool.
_CONNECTING = {"connect_timeout": 5, "keepalives_idle": 10, "tcp_user_timeout": 20_000}


@dataclass(frozen=True, slots=True)
class Vouched:
    """A log of so many entries, and the last checkpoint that vouches for them, if one does."""

    log: str
    entries: int
    last: Checkpoint | None

    @property
    def size(self) -> int:
        """How many entries are vouched for."""
        return 0 if self.last is None else self.last.size


@dataclass(slots=True)
class Report:
    """What was looked at, and what was found.

    `retired` facts were dropped by retention, which the trail declares; of `undeclared` ones this
    export of one log cannot say so; `unsealed` ones have no number yet. `unsigned` entries are
    younger than their log's last checkpoint, `unanchored` logs have none. `exported_at` is when
    an export was made, by its manifest.
    """

    logs: list[Vouched] = field(default_factory=list)
    exported_at: str | None = None
    facts: int = 0
    retired: int = 0
    undeclared: int = 0
    unsealed: int = 0
    checkpoints: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    @property
    def entries(self) -> int:
        """How many entries there are."""
        return sum(one.entries for one in self.logs)

    @property
    def unsigned(self) -> int:
        """How many of them no checkpoint covers."""
        return sum(one.entries - one.size for one in self.logs)

    @property
    def unanchored(self) -> int:
        """How many logs have no checkpoint."""
        return sum(one.last is None for one in self.logs)

    @property
    def is_anchored(self) -> bool:
        """Whether a checkpoint vouches for each log up to some place."""
        return self.unanchored == 0

    def vouch(self, log: str, entries: int, signed: Mapping[int, Checkpoint]) -> Vouched:
        """Takes a log's length, and which of its checkpoints vouches for the most of it."""
        size = max((one for one in signed if one <= entries), default=None)
        found = Vouched(log, entries, None if size is None else signed[size])
        self.logs.append(found)
        return found


def heads(signed: Mapping[int, Checkpoint]) -> dict[int, bytes]:
    """The hashes that a walk has to find, by number."""
    return {size: one.head for size, one in signed.items()}


def verify(dsn: str, checkpoints: Sequence[Checkpoint] = (), log: str | None = None) -> Report:
    """Verifies all logs of a database, or one and the installation's.

    `checkpoints` are ones whose signature was verified. Raises psycopg.Error if it cannot read.
    """
    with snapshot(dsn) as connection:
        return _Verification(connection, checkpoints, log).run()


@contextmanager
def snapshot(dsn: str) -> Iterator[Connection[TupleRow]]:
    """One unchanging view of the database, as long as it takes to read it whole."""
    with psycopg.connect(
        dsn, application_name="orbit audit", autocommit=True, **_options(dsn)
    ) as connection:
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


class _Verification:
    """One verification of a database."""

    def __init__(
        self, connection: Connection[TupleRow], checkpoints: Sequence[Checkpoint], log: str | None
    ) -> None:
        self._connection, self._log = connection, log
        self.report = Report(checkpoints=len(checkpoints))
        self._expected = self._by_log(checkpoints)
        self._told: dict[str, list[Told]] = {}
        self._begun: Beginning | None = None
        self._retirement = Retirement()

    def run(self) -> Report:
        """All of it."""
        rows = {row["log"]: row for row in _rows(self._connection, SQL.logs, {"log": None})}
        for name in sorted(rows.keys() | self._expected.keys() | {INSTALLATION}):
            if self._log in (None, name):
                self._verify_log(name, rows.get(name))
            elif name == INSTALLATION:  # what it declares counts for every log
                self._walk(name)
        self._read_installation()
        self._verify_facts()
        self._verify_missing()
        mismatches = reconcile(
            self._connection, self._told, self._begun, self._retirement, self._log
        )
        self.report.findings.extend(Finding(one.log, one.seq, one.what) for one in mismatches)
        return self.report

    def _by_log(self, checkpoints: Sequence[Checkpoint]) -> dict[str, dict[int, Checkpoint]]:
        found: dict[str, dict[int, Checkpoint]] = {}
        for one in checkpoints:
            if found.setdefault(one.log, {}).setdefault(one.size, one).head != one.head:
                self._find(one.log, one.size, "has two checkpoints that contradict each other")
        return found

    def _walk(self, name: str) -> LogWalk:
        expected = heads(self._expected.get(name, {}))
        walk = LogWalk(name, self.report.findings.append, expected, wanted=_WANTED)
        walk.walk(entries_of(self._connection, name))
        self._told[name] = walk.told
        return walk

    def _verify_log(self, name: str, row: Mapping[str, Any] | None) -> None:
        walk = self._walk(name)
        has_head = row is not None and row["seq"] is not None
        walk.end((row["seq"], row["hash"]) if row is not None and has_head else None)
        self.report.vouch(name, walk.seq, self._expected.get(name, {}))
        leaves = stream(self._connection, SQL.sealed_facts, {"log": name})
        self.report.facts += walk.roots((number, leaf) for number, _, _, _, leaf in leaves)

    def _read_installation(self) -> None:
        """What the installation's log says of all: how the trail began, what was dropped."""
        told = self._told.pop(INSTALLATION)
        if self._log in (None, INSTALLATION):
            self._told[INSTALLATION] = told
        try:
            first = [one for one in told if one.seq == 1 and one.act["action"] == _BEGUN]
            self._begun = beginning(first[0]) if first else None
            self._retirement.take(one for one in told if one.act["action"] == RETIRED)
        except (KeyError, ValueError, TypeError, AttributeError):
            self._find(INSTALLATION, None, "an entry cannot be read")
        if self._begun is None:
            self._find(INSTALLATION, 1, "is not the beginning of a trail, which stands here")

    def _verify_facts(self) -> None:
        """Holds each row against its number and hash, whatever it says of its transaction."""
        undated: Counter[str] = Counter()
        for name, fact, fact_id, part, body, number, stored, state in stream(
            self._connection, SQL.facts, {"log": self._log}
        ):
            if number is not None:
                if leaf_hash(body.encode()) != stored:
                    what = f"{_named(fact, fact_id, part)} was altered"
                    self._find(name, number, what, "fact")
            elif state == "due":
                self.report.unsealed += 1
            elif state == "undated" and self._is_older(fact_id):
                undated[fact] += 1
            else:
                self._find(name, None, f"{_named(fact, fact_id, part)} {_STATES[state]}")
        before = self._begun.undated if self._begun else {}
        for fact, count in sorted(undated.items()):
            if count > before.get(fact, 0):
                text = (
                    f"there were {before.get(fact, 0)} rows of {fact} without a transaction when "
                    f"the trail began, and there are {count} now"
                )
                self._find(INSTALLATION, 1, text)

    def _is_older(self, fact_id: Any) -> bool:
        begun = self._begun
        at = int(str(fact_id).replace("-", "")[:12], 16)
        return begun is not None and at <= begun.at.timestamp() * 1000

    def _verify_missing(self) -> None:
        """Every number whose row is not there, unless the trail declares that it was dropped."""
        for name, number, fact, fact_id, part in stream(
            self._connection, SQL.missing_facts, {"log": self._log}
        ):
            if self._retirement.covers(fact, fact_id):
                self.report.retired += 1
            else:
                self._find(name, number, f"{_named(fact, fact_id, part)} is missing", "fact")

    def _find(self, log: str, seq: int | None, what: str, kind: str = "entry") -> None:
        self.report.findings.append(Finding(log, seq, what, kind))


def _options(dsn: str) -> dict[str, Any]:
    given = conninfo_to_dict(dsn)
    return {name: value for name, value in _CONNECTING.items() if name not in given}


def _named(fact: str, fact_id: Any, part: str) -> str:
    return f"{fact} {fact_id}{'/' + part if part else ''}"


def _rows(
    connection: Connection[TupleRow], query: bytes, params: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    with connection.cursor(row_factory=dict_row, binary=True) as cursor:
        yield from cursor.execute(query, params).fetchall()
