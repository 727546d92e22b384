"""Exports: the trail as JSON lines, and their verification with the public key alone.

An export has, a line each: what it is, the signed checkpoints, a manifest that is signed for this
export and names every log with its last checkpoint, every log's entries as they are stored, the
hashes of its sealed facts and those facts' bytes, and how many lines there were. Checkpoints are
read before the database is: they cover no more than it then holds. Who verifies an export needs
no database and believes nothing but the public key, which has to come to them another way; so a
log that no checkpoint vouches for, and an export without a manifest, is a finding. What retention
dropped has its hash here, and no bytes.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from psycopg import Connection
from psycopg.rows import TupleRow

from orbit.audit.checkpoints import (
    Checkpoint,
    CheckpointInvalid,
    Manifest,
    files,
    log_of,
    read_manifest,
    read_signed,
    whole_lines,
)
from orbit.audit.merkle import leaf_hash
from orbit.audit.retirement import RETIRED, Retirement
from orbit.audit.signing import Signer
from orbit.audit.trail import INSTALLATION, SQL
from orbit.audit.verification import Report, entries_of, heads, snapshot, stream
from orbit.audit.walk import Entry, Finding, LogWalk

FORMAT = "orbit.audit.export.2"
_FORMATS = ("orbit.audit.export.1", FORMAT)  # the first had no manifest
_LEAVES = 1000
_HASH = 32


def export(
    dsn: str, checkpoints: Path | None, log: str | None = None, *, signer: Signer | None
) -> Iterator[bytes]:
    """The lines of an export of all logs, or of one; `checkpoints` is a folder of them.

    Without a signer it has no manifest. Raises psycopg.Error if the database cannot be read,
    OSError if the folder cannot be.
    """
    count = 0
    for value in _values(dsn, checkpoints, log, signer):
        count += 1
        yield json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    yield json.dumps({"kind": "end", "lines": count}).encode() + b"\n"


def _values(
    dsn: str, checkpoints: Path | None, log: str | None, signer: Signer | None
) -> Iterator[dict[str, Any]]:
    signed = list(_signed(checkpoints, log))
    if signer is not None:
        signed.append({"kind": "manifest", **signer.manifest(log)})
    yield {"kind": "export", "format": FORMAT, "log": log}
    yield from signed
    with snapshot(dsn) as connection:
        names = [name for name, _, _ in stream(connection, SQL.logs, {"log": log})]
        for name in names:
            yield from _log(connection, name)
        for name, _, _, _, body, number, _, _ in stream(connection, SQL.facts, {"log": log}):
            if number is not None:
                yield {"kind": "fact", "log": name, "number": number, "body": body}


def _signed(folder: Path | None, log: str | None) -> Iterator[dict[str, Any]]:
    """A folder's checkpoints; what cannot be read is told, and found by who verifies."""
    for path in files(folder) if folder is not None else ():
        if log in (None, log_of(path)):
            for line in whole_lines(path):
                try:
                    yield {"kind": "checkpoint", **json.loads(line)}
                except (ValueError, TypeError):
                    yield {"kind": "checkpoint", "checkpoint": {"log": log_of(path)}}


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


class _Leaves:
    """A log's leaf hashes, in the order of their numbers, and which facts' bytes were there."""

    def __init__(self) -> None:
        self._firsts: list[int] = []
        self._blocks: list[tuple[bytes, bytearray]] = []

    def add(self, last: int, hashes: bytes) -> None:
        """A block that ends with a number. Raises ValueError if it does not come after others."""
        first = last - len(hashes) // _HASH + 1
        if first < 1 or (self._firsts and first < self._end()):
            raise ValueError("leaves are out of order")
        self._firsts.append(first)
        self._blocks.append((hashes, bytearray(len(hashes) // _HASH)))

    def take(self, number: int, leaf: bytes) -> bool:
        """Whether a fact's leaf is the one of its number; it has been there then."""
        place = bisect_right(self._firsts, number) - 1
        if place < 0:
            return False
        (hashes, seen), offset = self._blocks[place], number - self._firsts[place]
        is_it = offset < len(seen) and hashes[offset * _HASH : (offset + 1) * _HASH] == leaf
        if offset < len(seen):
            seen[offset] = 1
        return is_it

    def each(self) -> Iterator[tuple[int, bytes]]:
        """Every number with its hash."""
        for first, (hashes, seen) in zip(self._firsts, self._blocks, strict=True):
            for offset in range(len(seen)):
                yield first + offset, hashes[offset * _HASH : (offset + 1) * _HASH]

    def missing(self) -> Iterator[int]:
        """The numbers whose facts' bytes were not there."""
        for first, (_, seen) in zip(self._firsts, self._blocks, strict=True):
            yield from (first + offset for offset, is_seen in enumerate(seen) if not is_seen)

    def _end(self) -> int:
        return self._firsts[-1] + len(self._blocks[-1][1])


class _Reading:
    """What an export is found to hold, line by line; of its lines it keeps a hash a fact."""

    def __init__(self, key: Ed25519PublicKey) -> None:
        self._key = key
        self.report = Report()
        self._log: str | None = None
        self._walks: dict[str, LogWalk] = {}
        self._signed: dict[str, dict[int, Checkpoint]] = {}
        self._manifest: Manifest | None = None
        self._leaves: dict[str, _Leaves] = {}
        self._retirement = Retirement()
        self._lines, self._is_ended = 0, False
        self._kinds: Mapping[str, Callable[[dict[str, Any]], None]] = {
            "export": self._export,
            "checkpoint": self._checkpoint,
            "manifest": self._take_manifest,
            "entry": self._entry,
            "leaves": self._take_leaves,
            "fact": self._fact,
            "end": self._end,
        }

    def take(self, line: bytes) -> None:
        """One line."""
        try:
            value = json.loads(line)
            self._kinds[value["kind"]](value)
        except (ValueError, KeyError, TypeError, AttributeError):
            self._find(INSTALLATION, None, f"line {self._lines + 1} cannot be read")
        self._lines += 1

    def end(self) -> Report:
        """The report, once every line was taken."""
        if not self._is_ended:
            self._find(INSTALLATION, None, "the export is cut off: its last line is missing")
        if self._manifest is None:
            text = (
                "the export has no signed manifest: other logs, or newer entries, may be left out"
            )
            self._find(INSTALLATION, None, text)
        elif self._manifest.log != self._log:
            told = "every log" if self._manifest.log is None else self._manifest.log
            self._find(INSTALLATION, None, f"the export's manifest is for {told}")
        names = self._signed.keys() | self._walks.keys() | self._leaves.keys()
        names |= {self._log or INSTALLATION}
        if INSTALLATION in self._walks:
            self._retire(self._walks[INSTALLATION])
        for name in sorted(names):
            self._end_log(name)
        return self.report

    def _retire(self, walk: LogWalk) -> None:
        try:
            self._retirement.take(walk.told)
        except (KeyError, ValueError, TypeError, AttributeError):
            self._find(INSTALLATION, None, "an entry cannot be read")

    def _end_log(self, name: str) -> None:
        walk, signed = self._walk(name), self._signed.get(name, {})
        walk.end()
        if walk.seq == 0:
            self._find(name, None, "has no entry here")
        if self.report.vouch(name, walk.seq, signed).last is None:
            self._find(name, None, "has no checkpoint here: nothing of it is vouched for")
        leaves = self._leaves.get(name, _Leaves())
        self.report.facts += walk.roots(leaves.each())
        for number in leaves.missing():
            self._missing(walk, number)

    def _missing(self, walk: LogWalk, number: int) -> None:
        """Bytes that are not here: dropped after they were sealed, or taken out of the export."""
        place = bisect_right(walk.seals, number, key=lambda seal: seal.first) - 1
        if self._log not in (None, INSTALLATION):
            self.report.undeclared += 1
        elif place >= 0 and walk.seals[place].at < self._retirement.last_at:
            self.report.retired += 1
        else:
            text = "is missing: no entry declares that it was dropped"
            self._find(walk.log, number, text, "fact")

    def _export(self, value: dict[str, Any]) -> None:
        self._log = value["log"]
        if value["format"] not in _FORMATS:
            self._find(INSTALLATION, None, f"the format is {value['format']}, not {FORMAT}")

    def _walk(self, name: str) -> LogWalk:
        """A log's walk, which knows the checkpoints that were read before."""
        if name not in self._walks:
            expected = heads(self._signed.get(name, {}))
            self._walks[name] = LogWalk(
                name, self.report.findings.append, expected, wanted=(RETIRED,)
            )
        return self._walks[name]

    def _entry(self, value: dict[str, Any]) -> None:
        prev, stored = bytes.fromhex(value["prev"]), bytes.fromhex(value["hash"])
        entry: Entry = (value["seq"], prev, stored, value["body"].encode(), True)
        self._walk(value["log"]).walk(iter((entry,)))

    def _take_leaves(self, value: dict[str, Any]) -> None:
        hashes = b"".join(bytes.fromhex(one) for one in value["hashes"])
        self._leaves.setdefault(value["log"], _Leaves()).add(value["last"], hashes)

    def _fact(self, value: dict[str, Any]) -> None:
        name, number = value["log"], value["number"]
        leaves = self._leaves.setdefault(name, _Leaves())
        if not leaves.take(number, leaf_hash(value["body"].encode())):
            self._find(name, number, "was altered", "fact")

    def _checkpoint(self, value: dict[str, Any]) -> None:
        self.report.checkpoints += 1
        try:
            found = read_signed(value, self._key)
        except CheckpointInvalid as error:
            told = value.get("checkpoint")
            name = told.get("log", INSTALLATION) if isinstance(told, dict) else INSTALLATION
            self._find(name, None, f"line {self._lines + 1}: {error}")
        else:
            self._expect(found)

    def _take_manifest(self, value: dict[str, Any]) -> None:
        try:
            found = read_manifest(value, self._key)
        except CheckpointInvalid as error:
            self._find(INSTALLATION, None, f"line {self._lines + 1}: {error}")
            return
        if self._manifest is not None:
            self._find(INSTALLATION, None, "the export has two manifests")
        self._manifest, self.report.exported_at = found, found.at
        for one in found.checkpoints:
            self._expect(one)

    def _expect(self, found: Checkpoint) -> None:
        """From here on the log has to have what a checkpoint says."""
        if found.log in self._walks:
            self._find(found.log, found.size, "has a checkpoint that comes after its entries")
        signed = self._signed.setdefault(found.log, {})
        if signed.setdefault(found.size, found).head != found.head:
            text = "has two checkpoints that contradict each other"
            self._find(found.log, found.size, text)

    def _end(self, value: dict[str, Any]) -> None:
        self._is_ended = True
        if value["lines"] != self._lines:
            text = f"the export has {self._lines} lines before its end, and says {value['lines']}"
            self._find(INSTALLATION, None, text)

    def _find(self, log: str, seq: int | None, what: str, kind: str = "entry") -> None:
        self.report.findings.append(Finding(log, seq, what, kind))
