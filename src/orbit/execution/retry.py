"""How long to wait before a retry: pure arithmetic, no clock, no source of chance of its own.

Exponential backoff with full jitter over a small floor: the n-th retry waits a random time
between the floor and `min(cap, base * factor ** (n - 1))`. After Marc Brooker, "Exponential
Backoff And Jitter", AWS Architecture Blog, 2015: of the variants compared there, full jitter
needs the fewest calls to get contending clients through. The floor keeps a lucky draw from
retrying in the same instant.

No delay of its own making is ever above the cap, however large the retry's number.
A receiver's `Retry-After` can lengthen a delay, never shorten it, and only up to a cap.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import NamedTuple

FLOOR_SECONDS = 0.05

_DELAY_SECONDS = re.compile(r"[0-9]+(\.[0-9]+)?")
_LARGEST_EXPONENT = 2**53  # beyond it an int is no exact float, and factor 1 must stay 1


@dataclass(frozen=True, slots=True)
class Backoff:
    """Seconds before the first retry, growth per retry, and the most to wait.

    Raises ValueError unless base >= 0, factor >= 1 and cap >= 0, all finite.
    """

    base_seconds: float
    factor: float
    cap_seconds: float

    def __post_init__(self) -> None:
        for name, least in (("base_seconds", 0.0), ("factor", 1.0), ("cap_seconds", 0.0)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= least):
                raise ValueError(f"{name} is {value}; expected a finite number from {least:g} up")

    def ceiling_seconds(self, retry: int) -> float:
        """The longest that retry number `retry` (from 1) may wait; never above the cap."""
        if retry < 1:
            raise ValueError(f"retry is {retry}; the first retry is 1")
        if self.base_seconds == 0:
            return 0.0
        try:
            growth = self.factor ** min(retry - 1, _LARGEST_EXPONENT)
        except OverflowError:
            return self.cap_seconds
        return min(self.cap_seconds, self.base_seconds * growth)


class RetrySpan(NamedTuple):
    """How far apart the first attempt and the last retry lie, in seconds of waiting."""

    shortest_seconds: float
    expected_seconds: float
    longest_seconds: float


def full_jitter(
    backoff: Backoff,
    retry: int,
    random: Callable[[], float],
    floor_seconds: float = FLOOR_SECONDS,
) -> float:
    """Seconds to wait before retry number `retry` (from 1).

    `random` draws from [0, 1). The result lies between the floor and the retry's ceiling; a
    ceiling below the floor wins, so that a cap of zero means no wait.
    """
    ceiling = backoff.ceiling_seconds(retry)
    floor = min(floor_seconds, ceiling)
    return min(ceiling, floor + random() * (ceiling - floor))


def retry_span(backoff: Backoff, retries: int, floor_seconds: float = FLOOR_SECONDS) -> RetrySpan:
    """The waits of `retries` retries added up: shortest, expected and longest, in seconds.

    The time the attempts themselves take comes on top.
    """
    shortest = longest = 0.0
    for retry in range(1, retries + 1):
        ceiling = backoff.ceiling_seconds(retry)
        is_steady = ceiling >= backoff.cap_seconds or ceiling == 0 or backoff.factor == 1
        times = retries - retry + 1 if is_steady else 1
        shortest += min(floor_seconds, ceiling) * times
        longest += ceiling * times
        if is_steady:
            break
    return RetrySpan(shortest, (shortest + longest) / 2, longest)


def with_retry_after(
    delay_seconds: float, retry_after_seconds: float | None, cap_seconds: float
) -> float:
    """The delay, lengthened to what the receiver asked for, but by it never beyond the cap.

    Nothing, NaN and negative values are ignored.
    """
    if retry_after_seconds is None or not retry_after_seconds >= 0:
        return delay_seconds
    return max(delay_seconds, min(retry_after_seconds, cap_seconds))


def parse_retry_after(value: str, now: datetime) -> float | None:
    """A `Retry-After` header (RFC 9110, 10.2.3) as seconds from `now`; None if unreadable.

    Takes seconds (a fraction is tolerated) and HTTP dates in all three forms; a date in the
    past is 0. A number beyond all floats is infinity, for `with_retry_after` to cap.
    """
    text = value.strip()
    if _DELAY_SECONDS.fullmatch(text):
        return float(text)
    try:
        at = parsedate_to_datetime(text)
        at = at.replace(tzinfo=UTC) if at.tzinfo is None else at
        return max(0.0, (at - now).total_seconds())
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
