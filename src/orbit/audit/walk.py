"""The walk along one log: numbers, links, hashes, seals and roots.

It takes entries from wherever they are (a database, a part of it, an export), believes none of
their columns but through the hash, and goes on after a finding, so that each is named once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orbit.audit.merkle import root
from orbit.audit.sealing import SEALED
from orbit.audit.trail import FIRST_PREV, Chain

# How an entry begins whose act is canonical JSON: its first key is the action.
_BEGINNING = b'{"act":{"action":"'


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it was: the log, the entry's or fact's number if it has one."""

    log: str
    seq: int | None
    what: str
    kind: str = "entry"

    def __str__(self) -> str:
        place = "" if self.seq is None else f" {self.kind} {self.seq}"
        return f"{self.log}{place}: {self.what}"


@dataclass(frozen=True, slots=True)
class Seal:
    """A sealing entry: it stands for the facts `first` to `last`, under their root, since `at`."""

    seq: int
    first: int
    last: int
    root: bytes
    at: str


@dataclass(frozen=True, slots=True)
class Told:
    """An entry whose action was asked for, after its hash was computed: act and RFC 3339 time."""

    seq: int
    act: Mapping[str, Any]
    at: str


Entry = tuple[int, bytes, bytes, bytes, bool]


class LogWalk:
    """Walks one log's entries in order; usable for a database, an export or a part of a log.

    `told` has the entries whose action is one of `wanted`, `seals` the ones that seal facts.
    """

    def __init__(
        self,
        log: str,
        tell: Callable[[Finding], None],
        expected: Mapping[int, bytes] | None = None,
        *,
        wanted: Collection[str] = (),
        after: int = 0,
        prev: bytes = FIRST_PREV,
    ) -> None:
        self.log, self._tell = log, tell
        self._expected = dict(expected or {})
        self.seq, self.head = after, prev
        self._begins_at = after
        self.seals: list[Seal] = []
        self.told: list[Told] = []
        self._wanted = {SEALED.encode(), *(action.encode() for action in wanted)}
        self._hash = Chain(log).hash

    def walk(self, entries: Iterator[Entry]) -> None:
        """Goes on with (seq, prev, hash, body, whether the columns beside it agree)."""
        compute, expected = self._hash, self._expected
        last, head = self.seq, self.head
        wanted, start = self._wanted, len(_BEGINNING)
        for seq, prev, stored, body, is_dated in entries:
            if seq != last + 1:
                self._skipped(last, seq)
            elif prev != head:
                self._find(seq, f"does not follow entry {last}: its predecessor's hash differs")
            if compute(seq, prev, body) != stored:
                self._find(seq, "was altered: its hash is not that of its bytes")
            elif not is_dated:
                self._find(seq, "was altered: its column `at` differs from its bytes")
            if expected and expected.pop(seq, stored) != stored:
                self._find(seq, "contradicts a checkpoint: another entry stood here")
            if not body.startswith(_BEGINNING) or body[start : body.find(b'"', start)] in wanted:
                self._take(seq, body)
            last, head = seq, stored
        self.seq, self.head = last, head

    def end(self, head: tuple[int, bytes] | None = None) -> None:
        """Says what is missing at the end: by checkpoints, and by the log's head if it has one."""
        for size in sorted(self._expected):
            if size > self.seq:
                self._find(size, f"is missing: a checkpoint covers it, the log ends at {self.seq}")
        if head is not None and head != (self.seq, self.head):
            text = f"the head names entry {head[0]} as the last, the log ends at {self.seq}"
            self._find(max(head[0], self.seq), text)

    def roots(self, leaves: Iterator[tuple[int, bytes]]) -> int:
        """Holds numbered leaf hashes, in order, against the seals; how many there were."""
        seals = iter(self.seals)
        count = last = 0
        seal = next(seals, None)
        found: list[bytes] = []
        for number, leaf in leaves:
            count += 1
            if number != last + 1:
                self._fact(last + 1, "has no hash, though a later one has")
            last = number
            while seal is not None and number > seal.last:
                self._check_root(seal, found)
                seal, found = next(seals, None), []
            if seal is None or number < seal.first:
                self._fact(number, "is in no sealed batch")
            else:
                found.append(leaf)
        while seal is not None:
            self._check_root(seal, found)
            seal, found = next(seals, None), []
        return count

    def _check_root(self, seal: Seal, leaves: Sequence[bytes]) -> None:
        if len(leaves) != seal.last - seal.first + 1 or root(leaves) != seal.root:
            self._find(
                seal.seq,
                f"has another root than facts {seal.first} to {seal.last}: "
                "their numbers or hashes were altered",
            )

    def _take(self, seq: int, body: bytes) -> None:
        try:
            value = json.loads(body)
            act = value["act"]
            if act["action"] == SEALED:
                self._seal(seq, act["detail"], value["at"])
            elif act["action"].encode() in self._wanted:
                self.told.append(Told(seq, act, value["at"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            self._find(seq, "is no entry that can be read")

    def _seal(self, seq: int, detail: Mapping[str, Any], at: str) -> None:
        seal = Seal(seq, detail["first"], detail["last"], bytes.fromhex(detail["root"]), at)
        # The first seal in a part of a log may begin anywhere: what came before is not seen.
        expected = self.seals[-1].last + 1 if self.seals else 1
        if seal.first != expected and (self.seals or not self._begins_at):
            self._find(seq, f"seals facts from {seal.first}, not from {expected}")
        self.seals.append(seal)

    def _skipped(self, last: int, seq: int) -> None:
        if seq <= last:
            self._find(seq, f"stands after entry {last}: a fork, or out of order")
            return
        many = "" if seq == last + 2 else f", and those up to {seq - 1} are"
        self._find(last + 1, f"is missing{many}" if many else "is missing")

    def _find(self, seq: int, what: str) -> None:
        self._tell(Finding(self.log, seq, what))

    def _fact(self, number: int, what: str) -> None:
        self._tell(Finding(self.log, number, what, "fact"))
