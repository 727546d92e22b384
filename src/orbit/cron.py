"""Cron expressions: checked once, read in an IANA zone, turned into instants.

Settings and configuration files check with the same functions, so they accept the same. A job's
slots are UTC instants, made lazily.

Daylight saving as in Debian's cron. A job whose minute or hour field begins with `*` follows
the wall clock through each stretch of constant offset: it keeps its interval, and a repeated
hour has its slots twice. Any other job is fixed to a time of day: in a skipped hour it fires
once right after the gap, in a repeated hour once, the first time.
`cronsim` parses and matches on wall time; the mapping to UTC is done here, since its own
loses slots where clocks move by half an hour (docs/decisions/0003-schedules.md).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from orbit.vocabulary import printable

MAX_EXPRESSION_LENGTH = 1000

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


@lru_cache(maxsize=4096)
def parse_cron(expression: str, timezone: str) -> CronJob:
    """The checked job; ValueError names the field, or says that it never fires.

    Five fields, names and lists as in Debian's cron, `L`, `LW`, `5L`, `MON#2`, and nicknames
    (`@daily`). `CRON_TZ=Zone ` in front overrides `timezone`.
    """
    if len(expression) > MAX_EXPRESSION_LENGTH:
        raise ValueError(f"cron expression of more than {MAX_EXPRESSION_LENGTH} characters")
    shown, text = printable(expression), expression.strip()
    if text.startswith(_ZONE_PREFIX):
        timezone, _, text = text.removeprefix(_ZONE_PREFIX).partition(" ")
    fields = _NICKNAMES.get(text.strip().lower(), text).split()
    if len(fields) != len(_FIELDS):
        raise ValueError(
            f'cron expression "{shown}" has {len(fields)} fields; expected five '
            "(minute hour day-of-month month day-of-week) or one of " + ", ".join(_NICKNAMES)
        )
    zone = time_zone(timezone)
    plain = " ".join(fields)
    try:
        next(CronSim(plain, _ANY_START))
    except CronSimError as error:
        raise ValueError(_complaint(shown, fields, str(error))) from None
    except StopIteration:
        raise ValueError(f'cron expression "{shown}" never fires: no such day') from None
    is_fixed_time = not fields[0].startswith("*") and not fields[1].startswith("*")
    return CronJob(plain, zone, is_fixed_time)


def in_zone(expression: str, timezone: str) -> str:
    """The expression pinned to a zone, whatever zone the schedule has that it joins."""
    return f"{_ZONE_PREFIX}{timezone} {expression}"


def _complaint(expression: str, fields: Sequence[str], error: str) -> str:
    for (name, accepted), field in zip(_FIELDS.items(), fields, strict=True):
        if error == f"Bad {name}":
            return f'cron expression "{expression}": bad {name} "{field}"; expected {accepted}'
    return f'cron expression "{expression}": {error}'


def time_zone(timezone: str) -> ZoneInfo:
    """The IANA time zone of that name; ValueError says what is accepted."""
    # An unknown name is a KeyError, a ValueError or an OSError (a folder). The first two names
    # refused here are files whose content is each machine's own affair.
    try:
        if timezone in {"localtime", "posixrules", "Factory"}:
            raise ValueError
        return ZoneInfo(timezone)
    except (KeyError, ValueError, OSError):
        raise ValueError(
            f'unknown time zone "{printable(timezone)}"; '
            "expected an IANA time zone such as Europe/Zurich"
        ) from None


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
