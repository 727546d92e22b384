"""When a run profile is due, and what becomes of a slot that was not served in time.

Pure: no clock, no database; the present is an argument. UTC in, UTC out; an expression is
read in its own IANA zone. The slots of a schedule are one strictly increasing sequence, made
lazily, and cutting an interval anywhere neither loses nor doubles a slot.

Daylight saving as in Debian's cron. A job whose minute or hour field begins with `*` follows
the wall clock through each stretch of constant offset: it keeps its interval, and a repeated
hour has its slots twice. Any other job is fixed to a time of day: in a skipped hour it fires
once right after the gap, in a repeated hour once, the first time.
`cronsim` parses and matches on wall time; the mapping to UTC is done here, since its own
loses slots where clocks move by half an hour (docs/decisions/0003-schedules.md).
"""

from __future__ import annotations

import hashlib
import heapq
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from itertools import islice, pairwise, takewhile
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

MAX_EXPRESSION_LENGTH = 1000
MAX_CATCH_UP_LIMIT = 10_000

_FIELDS = {
    "minute": "0-59",
    "hour": "0-23",
    "day-of-month": "1-31 (of the months given), L or LW",
    "month": "1-12 or JAN-DEC",
    "day-of-week": "0-7 or SUN-SAT, also 5L and MON#2",
}
_NICKNAMES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
_ZONE_PREFIX = "CRON_TZ="
_INSTANT = timedelta(microseconds=1)
_SECOND = timedelta(seconds=1)
_DAY = timedelta(days=1)
_ANY_START = datetime(2000, 1, 1, tzinfo=UTC)


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
class CronJob:
    """A checked cron expression in its zone; `parse_cron` makes them."""

    expression: str
    zone: ZoneInfo
    is_fixed_time: bool

    def slots(self, after: datetime) -> Iterator[datetime]:
        """All slots later than `after`, as UTC; endless, never decreasing, perhaps repeating."""
        return self._fixed_slots(after) if self.is_fixed_time else self._interval_slots(after)

    def _fixed_slots(self, after: datetime) -> Iterator[datetime]:
        walls = CronSim(self.expression, _wall(after, self.zone))
        return (slot_at for wall in walls if (slot_at := _first_instant(wall, self.zone)) > after)

    def _interval_slots(self, after: datetime) -> Iterator[datetime]:
        while True:
            start = after + _INSTANT
            offset = _offset(start, self.zone)
            end = _end_of_offset(start, self.zone)
            # CronSim drops the microseconds and goes on a second later, so `end` itself is seen.
            for wall in CronSim(self.expression, _naive(after + offset)):
                slot_at = (wall - offset).replace(tzinfo=UTC)
                if slot_at >= end:
                    break
                yield slot_at
            else:
                return
            after = end - _INSTANT


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
        _zone(self.timezone)
        for expression in self.expressions:
            parse_cron(expression, self.timezone)


@lru_cache(maxsize=4096)
def parse_cron(expression: str, timezone: str) -> CronJob:
    """The checked job; ValueError names the field, or says that it never fires.

    Five fields, names and lists as in Debian's cron, `L`, `LW`, `5L`, `MON#2`, and nicknames
    (`@daily`). `CRON_TZ=Zone ` in front overrides `timezone`.
    """
    if len(expression) > MAX_EXPRESSION_LENGTH:
        raise ValueError(f"cron expression of more than {MAX_EXPRESSION_LENGTH} characters")
    text = expression.strip()
    if text.startswith(_ZONE_PREFIX):
        timezone, _, text = text.removeprefix(_ZONE_PREFIX).partition(" ")
    fields = _NICKNAMES.get(text.strip().lower(), text).split()
    if len(fields) != len(_FIELDS):
        raise ValueError(
            f'cron expression "{expression}" has {len(fields)} fields; expected five '
            "(minute hour day-of-month month day-of-week) or one of " + ", ".join(_NICKNAMES)
        )
    zone = _zone(timezone)
    plain = " ".join(fields)
    try:
        next(CronSim(plain, _ANY_START))
    except CronSimError as error:
        raise ValueError(_complaint(expression, fields, str(error))) from None
    except StopIteration:
        raise ValueError(f'cron expression "{expression}" never fires: no such day') from None
    is_fixed_time = not fields[0].startswith("*") and not fields[1].startswith("*")
    return CronJob(plain, zone, is_fixed_time)


def in_zone(expression: str, timezone: str) -> str:
    """The expression pinned to a zone, whatever zone the schedule has that it joins."""
    return f"{_ZONE_PREFIX}{timezone} {expression}"


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


def _complaint(expression: str, fields: Sequence[str], error: str) -> str:
    for (name, accepted), field in zip(_FIELDS.items(), fields, strict=True):
        if error == f"Bad {name}":
            return f'cron expression "{expression}": bad {name} "{field}"; expected {accepted}'
    return f'cron expression "{expression}": {error}'


def _zone(timezone: str) -> ZoneInfo:
    # An unknown name is a KeyError, a ValueError or an OSError (a folder). The first two names
    # refused here are files whose content is each machine's own affair.
    try:
        if timezone in {"localtime", "posixrules", "Factory"}:
            raise ValueError
        return ZoneInfo(timezone)
    except (KeyError, ValueError, OSError):
        message = f'unknown time zone "{timezone}"; expected an IANA name such as Europe/Zurich'
        raise ValueError(message) from None


def _utc(at: datetime) -> datetime:
    if at.tzinfo is None:
        raise ValueError("an instant needs a time zone; this one has none")
    return at.astimezone(UTC)


def _naive(at: datetime) -> datetime:
    return at.replace(tzinfo=None)


def _wall(at: datetime, zone: ZoneInfo) -> datetime:
    return _naive(at.astimezone(zone))


def _offset(at: datetime, zone: ZoneInfo) -> timedelta:
    return at.astimezone(zone).utcoffset() or timedelta(0)


def _first_instant(wall: datetime, zone: ZoneInfo) -> datetime:
    """The instant of a wall time: the first of two, or the end of the gap that swallows it."""
    before = wall.replace(tzinfo=zone).astimezone(UTC)
    if _wall(before, zone) == wall:
        return before
    # PEP 495: in a gap fold=1 takes the later offset, which gives an instant before the gap.
    return _end_of_offset(wall.replace(tzinfo=zone, fold=1).astimezone(UTC), zone)


def _end_of_offset(at: datetime, zone: ZoneInfo) -> datetime:
    """An instant up to which the offset at `at` holds: the next change, or the next year's end."""
    for year in (at.year, at.year + 1):
        transitions = _transitions(zone, year)
        index = bisect_right(transitions, at)
        if index < len(transitions):
            return transitions[index]
    return datetime(at.year + 2, 1, 1, tzinfo=UTC)


@lru_cache(maxsize=4096)
def _transitions(zone: ZoneInfo, year: int) -> tuple[datetime, ...]:
    """The instants in a UTC year at which the zone's offset changes; zoneinfo lists none."""
    found = []
    left, end = datetime(year, 1, 1, tzinfo=UTC) - _SECOND, datetime(year + 1, 1, 1, tzinfo=UTC)
    while left < end - _SECOND:
        right = min(left + _DAY, end - _SECOND)
        if _offset(left, zone) == _offset(right, zone):
            left = right
        else:
            left = _change_between(left, right, zone)
            found.append(left)
    return tuple(found)


def _change_between(left: datetime, right: datetime, zone: ZoneInfo) -> datetime:
    before = _offset(left, zone)
    while right - left > _SECOND:
        middle = left + (right - left) // 2 // _SECOND * _SECOND
        if _offset(middle, zone) == before:
            left = middle
        else:
            right = middle
    return right
