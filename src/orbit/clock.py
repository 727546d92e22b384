"""Time, and the ids that carry it.

Stored time is the database's (`orbit_now()`). A node asks it now and then and counts on with
its own monotonic clock, so that a wall clock that jumps changes nothing. This is the only
file that may ask the operating system what time it is.
"""

from __future__ import annotations

import hashlib
import os
import time
from datetime import UTC, datetime, timedelta
from typing import Protocol
from uuid import UUID

_BOOTTIME: int | None = getattr(time, "CLOCK_BOOTTIME", None)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_VERSION_7 = 0x7 << 76
_VARIANT = 0x2 << 62
_RANDOM_74 = (1 << 74) - 1


class Clock(Protocol):
    """What code asks for the time; tests pass their own."""

    def now(self) -> datetime:
        """The time, UTC."""

    def monotonic(self) -> float:
        """Seconds that never go back, from an arbitrary start; a suspended machine's count too."""


class SystemClock:
    """The machine's own clock: for what has no database at hand."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return _steady()


class DatabaseClock:
    """The database's time, continued by this machine's monotonic clock between looks."""

    def __init__(self, at: datetime) -> None:
        self.anchor(at)

    def anchor(self, at: datetime) -> None:
        """Takes `at`, just read from `orbit_now()`, as the present."""
        self._at, self._steady = at, _steady()

    def now(self) -> datetime:
        return self._at + timedelta(seconds=_steady() - self._steady)

    def monotonic(self) -> float:
        return _steady()


def new_id(at: datetime) -> str:
    """A UUIDv7 (RFC 9562) in its canonical text: 48 bits of milliseconds, 74 random bits."""
    return _uuid7(_milliseconds(at), int.from_bytes(os.urandom(10), "big"))


def derived_id(parent: str, *parts: str) -> str:
    """The UUIDv7 that `parent` and `parts` always give: the parent's time, then their SHA-256.

    Whatever is made from a cycle has such an id, so making it twice is a key conflict, and it
    lies in the same time partition as its cycle.
    """
    text = "\x1f".join((parent, *parts)).encode()
    milliseconds = int(parent[:8] + parent[9:13], 16)
    return _uuid7(milliseconds, int.from_bytes(hashlib.sha256(text).digest()[:10], "big"))


def id_time(value: str) -> datetime:
    """When the id was made, to the millisecond."""
    return _EPOCH + timedelta(milliseconds=int(value[:8] + value[9:13], 16))


def _steady() -> float:
    # The usual monotonic clock stands still while a Linux machine is suspended; leases do not.
    return time.clock_gettime(_BOOTTIME) if _BOOTTIME is not None else time.monotonic()


def _milliseconds(at: datetime) -> int:
    return (at - _EPOCH) // timedelta(milliseconds=1)


def _uuid7(milliseconds: int, noise: int) -> str:
    noise &= _RANDOM_74
    high, low = noise >> 62, noise & ((1 << 62) - 1)
    return str(UUID(int=milliseconds << 80 | _VERSION_7 | high << 64 | _VARIANT | low))
