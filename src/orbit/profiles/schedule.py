"""When a run profile is due, and what becomes of a slot that was not served in time.

Pure: no clock, no database; the present is an argument. UTC in, UTC out; an expression is
read in its own IANA zone. The slots of a schedule are one strictly increasing sequence, made
lazily, and cutting an interval anywhere neither loses nor doubles a slot. What one expression
means, also where clocks change, is `orbit.cron`'s.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from itertools import islice, pairwise, takewhile

from orbit.cron import parse_cron, time_zone

MAX_CATCH_UP_LIMIT = 10_000
_INSTANT = timedelta(microseconds=1)
_SECOND = timedelta(seconds=1)


class Misfire(StrEnum):
    """What to do with slots that were not served within the grace."""

    SKIP = "skip"
    FIRE_ONCE = "fire_once"
    CATCH_UP = "catch_up"


class Overlap(StrEnum):
    """What to do with a slot while an earlier cycle of the same run profile is active."""

    SKIP = "skip"
    QUEUE = "queue"
    ALLOW = "allow"


class SlotOutcome(StrEnum):
    """What the stored row of a slot says became of it."""

    FIRED = "fired"
    MISSED = "missed"
    COALESCED = "coalesced"
    PAUSED = "paused"
    HALTED = "halted"
    OVERLAPPED = "overlapped"
    DISABLED = "disabled"


class Verdict(StrEnum):
    """What the misfire policy says of a slot; a pause, halt or overlap may still stop a FIRE."""

    FIRE = "fire"
    MISSED = "missed"
    COALESCED = "coalesced"


@dataclass(frozen=True, slots=True)
class SlotDecision:
    """The verdict on one slot, with the reason that its row will show."""

    slot_at: datetime
    outcome: Verdict
    reason: str


@dataclass(frozen=True, slots=True)
class Schedule:
    """When a run profile runs and by which policies; raises ValueError if any part is unusable.

    Several expressions make one sequence of slots: a run profile's own cron and the one for
    all run profiles meet in a single slot. An expression may carry its own zone in front
    (`in_zone`). No expression: no slot. `jitter_seconds` delays each slot by less than that.
    """

    expressions: tuple[str, ...]
    timezone: str = "UTC"
    misfire: Misfire = Misfire.FIRE_ONCE
    catch_up_limit: int = 24
    overlap: Overlap = Overlap.SKIP
    jitter_seconds: float = 0

    def __post_init__(self) -> None:
        Misfire(self.misfire)
        Overlap(self.overlap)
        if not 0 <= self.catch_up_limit <= MAX_CATCH_UP_LIMIT:
            raise ValueError(
                f"catch_up_limit is {self.catch_up_limit}; expected 0 to {MAX_CATCH_UP_LIMIT}"
            )
        if not (math.isfinite(self.jitter_seconds) and self.jitter_seconds >= 0):
            raise ValueError(f"jitter_seconds is {self.jitter_seconds}; expected 0 or more")
        time_zone(self.timezone)
        for expression in self.expressions:
            parse_cron(expression, self.timezone)


def iterate_slots(schedule: Schedule, after: datetime) -> Iterator[datetime]:
    """All slots later than `after`, in UTC, strictly increasing, made one by one; endless."""
    start = _utc(after)
    jobs = [parse_cron(expression, schedule.timezone) for expression in schedule.expressions]
    latest = start
    for slot_at in heapq.merge(*(job.slots(start) for job in jobs)):
        if slot_at > latest:
            latest = slot_at
            yield slot_at


def slots_between(
    schedule: Schedule, after: datetime, until: datetime, limit: int | None = None
) -> list[datetime]:
    """The slots in (after, until], at most the first `limit` of them; work grows with the result.

    A long backlog is read in pages: pass the last slot of a page as the next page's `after`.
    """
    end = _utc(until)
    slots = takewhile(lambda slot_at: slot_at <= end, iterate_slots(schedule, after))
    return list(islice(slots, limit))


def next_slot(schedule: Schedule, after: datetime) -> datetime | None:
    """The first slot later than `after`; None if the schedule has no expression."""
    return next(iterate_slots(schedule, after), None)


def plan(
    schedules: Mapping[str, Schedule], start: datetime, end: datetime, limit: int | None = None
) -> list[tuple[datetime, str]]:
    """What is due in (start, end], over all schedules: (slot, name), by time, then by name."""
    until = _utc(end)
    merged = heapq.merge(*(_named(name, schedules[name], start) for name in schedules))
    return list(islice(takewhile(lambda entry: entry[0] <= until, merged), limit))


def jitter(identity: str, slot_at: datetime, jitter_seconds: float) -> timedelta:
    """The delay in [0, jitter_seconds) of one slot of one run profile: the same on every node."""
    text = f"{identity}\x1f{_utc(slot_at).isoformat()}".encode()
    share = int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
    microseconds = timedelta(seconds=jitter_seconds) // _INSTANT
    return timedelta(microseconds=share * microseconds >> 64)


def decide(
    schedule: Schedule, due: Sequence[datetime], now: datetime, grace: timedelta, *, more: bool
) -> list[SlotDecision]:
    """The verdict on each of `due`, one page of the schedule's slots up to `now`, oldest first.

    A slot is on time up to the grace plus the schedule's jitter after it, and fires. Late ones:
    skip: all are missed. fire_once: all coalesce into the latest due slot, late or on time, so
    that an outage costs one run and not two at once. catch_up: the last `catch_up_limit` fire,
    in order, older ones are missed. `more` says that due slots follow on the next page; the
    backlog is then looked into as far as the policy needs, so pages decide as the whole would.
    Raises ValueError if `due` is not strictly increasing or reaches beyond `now`.
    """
    _check_due(due, now)
    tolerance = grace + timedelta(seconds=schedule.jitter_seconds)
    late = sum(now - slot_at > tolerance for slot_at in due)
    firing = _late_to_fire(schedule, due, late, now - tolerance, more=more)
    decisions = [
        _decide_late(schedule, slot_at, now - slot_at, is_firing=index >= late - firing)
        for index, slot_at in enumerate(due[:late])
    ]
    return decisions + [SlotDecision(at, Verdict.FIRE, "on time") for at in due[late:]]


def _late_to_fire(
    schedule: Schedule, due: Sequence[datetime], late: int, horizon: datetime, *, more: bool
) -> int:
    """How many of the page's late slots, counted from its latest, are to fire."""
    if late == 0 or schedule.misfire == Misfire.SKIP:
        return 0
    if schedule.misfire == Misfire.FIRE_ONCE:
        return int(late == len(due) and not more)
    following = 0
    if more and late == len(due):
        limit = schedule.catch_up_limit
        following = len(slots_between(schedule, due[-1], horizon - _INSTANT, limit))
    return min(late, schedule.catch_up_limit - following)


def _decide_late(
    schedule: Schedule, slot_at: datetime, lateness: timedelta, *, is_firing: bool
) -> SlotDecision:
    limit = schedule.catch_up_limit
    match schedule.misfire, is_firing:
        case Misfire.FIRE_ONCE, True:
            verdict, why = Verdict.FIRE, "the latest due slot, for all that were late"
        case Misfire.FIRE_ONCE, False:
            verdict, why = Verdict.COALESCED, "a later due slot runs in its place"
        case Misfire.CATCH_UP, True:
            verdict, why = Verdict.FIRE, f"within the catch-up limit of {limit}"
        case Misfire.CATCH_UP, False:
            verdict, why = Verdict.MISSED, f"beyond the catch-up limit of {limit}"
        case _:
            verdict, why = Verdict.MISSED, "late slots are skipped"
    whole_seconds = lateness // _SECOND * _SECOND
    return SlotDecision(slot_at, verdict, f"{why} (late by {whole_seconds})")


def _check_due(due: Sequence[datetime], now: datetime) -> None:
    if any(later <= earlier for earlier, later in pairwise(due)):
        raise ValueError("due slots must be strictly increasing")
    if due and due[-1] > now:
        raise ValueError(f"slot {due[-1].isoformat()} is not due at {now.isoformat()}")


def _named(name: str, schedule: Schedule, start: datetime) -> Iterator[tuple[datetime, str]]:
    return ((slot_at, name) for slot_at in iterate_slots(schedule, start))


def _utc(at: datetime) -> datetime:
    if at.tzinfo is None:
        raise ValueError("an instant needs a time zone; this one has none")
    return at.astimezone(UTC)
