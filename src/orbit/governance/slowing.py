"""Slows down who fails again and again: a few tries at once, then one per growing pause.

Kept in memory, per node, for a bounded number of sources: the ones that failed longest ago are
forgotten first. It is there to spare the database and the audit trail; what makes guessing
hopeless is the length of a key. Tries during a pause do not lengthen it, so nobody is locked out.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from dataclasses import dataclass

from orbit.clock import Clock

FREE_FAILURES = 5
LONGEST_PAUSE_SECONDS = 60.0
_FORGOTTEN_SECONDS = 900.0
_MOST_SOURCES = 4096
_RATION_SECONDS = 60.0


@dataclass(slots=True)
class _Record:
    failures: int
    failed_at: float
    until: float
    refused: int = 0


class Slowing:
    """Failures by source."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._records: OrderedDict[str, _Record] = OrderedDict()

    def wait_seconds(self, source: str) -> float:
        """How long the source has to wait before its next try; 0: not at all."""
        record = self._records.get(source)
        left = 0.0 if record is None else record.until - self._clock.monotonic()
        if record is None or left <= 0:
            return 0.0
        record.refused += 1
        return left

    def is_slowed(self, source: str) -> bool:
        """Whether the source has used up lately what is free, in a pause or not."""
        record = self._records.get(source)
        if record is None or self._clock.monotonic() - record.failed_at > _FORGOTTEN_SECONDS:
            return False
        return record.failures >= FREE_FAILURES

    def failed(self, source: str) -> int:
        """Counts a failure; how many tries were refused unseen since the last one."""
        now = self._clock.monotonic()
        record = self._records.pop(source, None)
        if record is None or now - record.failed_at > _FORGOTTEN_SECONDS:
            record = _Record(0, now, now)
        refused, record.refused = record.refused, 0
        record.failures += 1
        record.failed_at = now
        over = record.failures - FREE_FAILURES
        record.until = now + (min(2.0**over, LONGEST_PAUSE_SECONDS) if over >= 0 else 0.0)
        self._records[source] = record
        if len(self._records) > _MOST_SOURCES:
            self._records.popitem(last=False)
        return refused


class Ration:
    """So many a minute, whoever they are about; the rest is counted."""

    def __init__(self, clock: Clock, most: int) -> None:
        self._clock, self._most = clock, most
        self._until, self._given, self._left_out = 0.0, 0, 0

    def take(self) -> int | None:
        """How many were left out since the last that was let through; None: so is this one."""
        now = self._clock.monotonic()
        if now >= self._until:
            self._until, self._given = now + _RATION_SECONDS, 0
        if self._given >= self._most:
            self._left_out += 1
            return None
        self._given += 1
        left_out, self._left_out = self._left_out, 0
        return left_out


def source_of(host: str | None) -> str:
    """What failures are counted by: an address; of IPv6 the network that one subscriber has."""
    try:
        address = ipaddress.ip_address((host or "").partition("%")[0])
    except ValueError:
        return host or "unknown"
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
