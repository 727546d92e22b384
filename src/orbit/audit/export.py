"""Exports: the trail as JSON lines, and their verification with the public key alone.

An export has, a line each: what it is, every log's entries as they are stored, the hashes of its
sealed facts and those facts' bytes, the signed checkpoints, and how many lines there were. Who
verifies it needs no database and believes nothing but the public key, which has to come to them
another way. What was dropped by retention has its hash here, and no bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from psycopg import Connection
from psycopg.rows import TupleRow

from orbit.audit.checkpoints import CheckpointInvalid, files, log_of, read_signed
from orbit.audit.merkle import leaf_hash
from orbit.audit.trail import INSTALLATION, SQL
from orbit.audit.verification import Report, entries_of, snapshot, stream
from orbit.audit.walk import Entry, Finding, LogWalk

FORMAT = "orbit.audit.export.1"
_LEAVES = 1000


def export(dsn: str, checkpoints: Path | None, log: str | None = None) -> Iterator[bytes]:
    """The lines of an export of all logs, or of one; `checkpoints` is a folder of them.

    Raises psycopg.Error if the database cannot be read.
    """
    count = 0
    for value in _values(dsn, checkpoints, log):
        count += 1
        yield json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    yield json.dumps({"kind": "end", "lines": count}).encode() + b"\n"


def _values(dsn: str, checkpoints: Path | None, log: str | None) -> Iterator[dict[str, Any]]:
    yield {"kind": "export", "format": FORMAT, "log": log}
    with snapshot(dsn) as connection:
        names = [name for name, _, _ in stream(connection, SQL.logs, {"log": log})]
        for name in names:
            yield from _log(connection, name)
        everything = {"low": "0", "until": str(2**64 - 1)}
        for name, _, _, _, body, number, _ in stream(connection, SQL.facts_to_seal, everything):
            if number is not None and log in (None, name):
                yield {"kind": "fact", "log": name, "number": number, "body": body}
    for path in files(checkpoints) if checkpoints is not None else ():
        if log in (None, log_of(path)):
            for line in path.read_bytes().splitlines():
                yield {"kind": "checkpoint", **json.loads(line)}


def _log(connection: Connection[TupleRow], name: str) -> Iterator[dict[str, Any]]:
    for seq, prev, stored, body, _ in entries_of(connection, name):
        yield {
            "kind": "entry",
            "log": name,
            "seq": seq,
            "prev": prev.hex(),
            "hash": stored.hex(),
            "body": body.decode(),
        }
    leaves: list[str] = []
    for number, _, _, _, leaf in stream(connection, SQL.sealed_facts, {"log": name}):
        leaves.append(leaf.hex())
        if len(leaves) == _LEAVES:
            yield {"kind": "leaves", "log": name, "last": number, "hashes": leaves}
            leaves = []
    if leaves:
        yield {"kind": "leaves", "log": name, "last": number, "hashes": leaves}


def verify_export(lines: Iterable[bytes], key: Ed25519PublicKey) -> Report:
    """Verifies an export's lines with the public key alone; nothing is read but they."""
    reading = _Reading(key)
    for line in lines:
        reading.take(line)
    return reading.end()


class _Reading:
    """What an export is found to hold, line by line."""

    def __init__(self, key: Ed25519PublicKey) -> None:
        self._key = key
        self.report = Report()
        self._walks: dict[str, LogWalk] = {}
        self._heads: dict[str, dict[int, bytes]] = {}
        self._signed: dict[str, dict[int, bytes]] = {}
        self._leaves: dict[str, dict[int, bytes]] = {}
        self._seen: dict[str, set[int]] = {}
        self._lines, self._is_ended = 0, False
        self._kinds: Mapping[str, Callable[[dict[str, Any]], None]] = {
            "export": self._export,
            "entry": self._entry,
            "leaves": self._take_leaves,
            "fact": self._fact,
            "checkpoint": self._checkpoint,
            "end": self._end,
        }

    def take(self, line: bytes) -> None:
        """One line."""
        try:
            value = json.loads(line)
            self._kinds[value["kind"]](value)
        except (ValueError, KeyError, TypeError):
            self._find(INSTALLATION, None, f"line {self._lines + 1} cannot be read")
        self._lines += 1

    def end(self) -> Report:
        """The report, once every line was taken."""
        if not self._is_ended:
            self._find(INSTALLATION, None, "the export is cut off: its last line is missing")
        for name in sorted(self._signed.keys() - self._walks.keys()):
            self._find(name, None, "there are checkpoints of this log, and no entry")
        for name, walk in self._walks.items():
            self._end_log(name, walk)
        return self.report

    def _end_log(self, name: str, walk: LogWalk) -> None:
        signed = self._signed.get(name, {})
        for size, head in sorted(signed.items()):
            if size <= walk.seq and self._heads[name].get(size) != head:
                self._find(name, size, "contradicts a checkpoint: another entry stood here")
            elif size > walk.seq:
                text = f"is missing: a checkpoint covers it, the log ends at {walk.seq}"
                self._find(name, size, text)
        self.report.entries += walk.seq
        self.report.unsigned += walk.seq - max((s for s in signed if s <= walk.seq), default=0)
        leaves = self._leaves.get(name, {})
        self.report.facts += walk.roots(iter(sorted(leaves.items())))
        self.report.retired += len(leaves) - len(self._seen.get(name, ()))

    def _export(self, value: dict[str, Any]) -> None:
        if value["format"] != FORMAT:
            self._find(INSTALLATION, None, f"the format is {value['format']}, not {FORMAT}")

    def _entry(self, value: dict[str, Any]) -> None:
        name, seq, stored = value["log"], value["seq"], bytes.fromhex(value["hash"])
        if name not in self._walks:
            self._walks[name] = LogWalk(name, self.report.findings.append)
            self._heads[name] = {}
        entry: Entry = (seq, bytes.fromhex(value["prev"]), stored, value["body"].encode(), True)
        self._walks[name].walk(iter((entry,)))
        self._heads[name][seq] = stored

    def _take_leaves(self, value: dict[str, Any]) -> None:
        hashes = [bytes.fromhex(one) for one in value["hashes"]]
        first = value["last"] - len(hashes) + 1
        self._leaves.setdefault(value["log"], {}).update(enumerate(hashes, first))

    def _fact(self, value: dict[str, Any]) -> None:
        name, number = value["log"], value["number"]
        if self._leaves.get(name, {}).get(number) != leaf_hash(value["body"].encode()):
            self.report.findings.append(Finding(name, number, "was altered", "fact"))
        self._seen.setdefault(name, set()).add(number)

    def _checkpoint(self, value: dict[str, Any]) -> None:
        self.report.checkpoints += 1
        try:
            found = read_signed(value, self._key)
        except CheckpointInvalid as error:
            told = value.get("checkpoint")
            name = told.get("log", INSTALLATION) if isinstance(told, dict) else INSTALLATION
            self._find(name, None, f"line {self._lines + 1}: {error}")
            return
        self._signed.setdefault(found.log, {})[found.size] = found.head

    def _end(self, value: dict[str, Any]) -> None:
        self._is_ended = True
        if value["lines"] != self._lines:
            text = f"the export has {self._lines} lines before its end, and says {value['lines']}"
            self._find(INSTALLATION, None, text)

    def _find(self, log: str, seq: int | None, what: str) -> None:
        self.report.findings.append(Finding(log, seq, what))
