"""Schedules: slots over daylight-saving changes, misfire decisions over pages, jitter, plan.

Three judges: tables of what Debian's cron does at each kind of change; a minute-by-minute
oracle written here, which knows no cron library; and croniter. croniter differs from Debian in
two places, and only there: it runs a fixed-time job in both passes of a repeated hour, and it
runs a `*`-minute job of a skipped hour at the gap's end. The comparison removes exactly these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from croniter import croniter
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orbit.cron import in_zone, parse_cron
from orbit.profiles.schedule import (
    MAX_CATCH_UP_LIMIT,
    Misfire,
    Overlap,
    Schedule,
    SlotDecision,
    SlotOutcome,
    Verdict,
    decide,
    jitter,
    next_slot,
    plan,
    slots_between,
)

ZONES = (
    "Europe/Zurich",
    "America/New_York",
    "Australia/Lord_Howe",
    "Africa/Casablanca",
    "UTC",
    "Asia/Kathmandu",
)
# Days around which a clock moves in one of the zones, both ways, and an ordinary one.
EVES = tuple(
    datetime(*date, tzinfo=UTC)
    for date in (
        (2026, 3, 28),
        (2026, 10, 24),
        (2026, 3, 7),
        (2026, 10, 31),
        (2026, 4, 4),
        (2026, 10, 3),
        (2026, 2, 14),
        (2026, 3, 21),
        (2027, 12, 31),
    )
)
MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)

exactly = settings(derandomize=True, deadline=None, max_examples=60)
thoroughly = settings(exactly, max_examples=100)


def utc(text: str) -> datetime:
    """The instant that the text names, in UTC."""
    return datetime.fromisoformat(text).astimezone(UTC)


def local(slots: list[datetime], zone: str) -> list[str]:
    """Slots as day, wall time and offset."""
    return [slot.astimezone(ZoneInfo(zone)).strftime("%d %H:%M %z") for slot in slots]


@dataclass(frozen=True)
class Field:
    """One cron field as text, and the values it stands for."""

    text: str
    values: frozenset[int]


@dataclass(frozen=True)
class Expression:
    """Five fields, matched without any cron library."""

    minute: Field
    hour: Field
    day: Field
    month: Field
    weekday: Field

    @property
    def text(self) -> str:
        fields = (self.minute, self.hour, self.day, self.month, self.weekday)
        return " ".join(field.text for field in fields)

    @property
    def is_fixed_time(self) -> bool:
        return not (self.minute.text.startswith("*") or self.hour.text.startswith("*"))

    def matches(self, wall: datetime) -> bool:
        is_day = wall.day in self.day.values
        is_weekday = wall.isoweekday() % 7 in self.weekday.values
        is_both = self.day.text.startswith("*") or self.weekday.text.startswith("*")
        return (
            wall.minute in self.minute.values
            and wall.hour in self.hour.values
            and wall.month in self.month.values
            and (is_day and is_weekday if is_both else is_day or is_weekday)
        )


@st.composite
def fields(draw: st.DrawFn, low: int, high: int, end: int | None = None) -> Field:
    """A star, stepped star, value, range, stepped range or list; numbers end at `high`.

    `end` is where a star ends, if numbers are kept below that.
    """
    everything = range(low, (end or high) + 1)
    form = draw(st.sampled_from(("star", "step", "value", "range", "list")))
    if form == "star":
        return Field("*", frozenset(everything))
    if form == "step":
        step = draw(st.integers(1, high))
        return Field(f"*/{step}", frozenset(everything[::step]))
    if form == "value":
        value = draw(st.integers(low, high))
        return Field(str(value), frozenset((value,)))
    if form == "range":
        first = draw(st.integers(low, high - 1))
        last, step = draw(st.integers(first + 1, high)), draw(st.integers(1, 5))
        text = f"{first}-{last}/{step}" if step > 1 else f"{first}-{last}"
        return Field(text, frozenset(range(first, last + 1, step)))
    values = draw(st.lists(st.integers(low, high), min_size=2, max_size=5, unique=True))
    return Field(",".join(map(str, values)), frozenset(values))


def star(low: int, high: int) -> Field:
    """The field that any value matches."""
    return Field("*", frozenset(range(low, high + 1)))


@st.composite
def expressions(draw: st.DrawFn, *, is_any_day: bool = False) -> Expression:
    """An expression with dense hours, so that most come near a change of clocks."""
    minute, hour = draw(fields(0, 59)), draw(st.one_of(fields(0, 23), fields(0, 4, 23)))
    if is_any_day:
        return Expression(minute, hour, star(1, 31), star(1, 12), star(0, 6))
    day = draw(st.one_of(st.just(star(1, 31)), fields(1, 28, 31)))
    weekday = draw(st.one_of(st.just(star(0, 6)), fields(0, 6)))
    return Expression(minute, hour, day, star(1, 12), weekday)


def oracle(expression: Expression, zone: str, after: datetime, until: datetime) -> list[datetime]:
    """Debian's rules, minute by minute, with nothing but the zone's wall time."""
    return list(_oracle(expression, ZoneInfo(zone), after, until))


def _oracle(
    expression: Expression, zone: ZoneInfo, after: datetime, until: datetime
) -> Iterator[datetime]:
    instant = after.replace(second=0, microsecond=0)
    expected_wall = instant.astimezone(zone).replace(tzinfo=None)
    while (instant := instant + MINUTE) <= until:
        here = instant.astimezone(zone)
        wall = here.replace(tzinfo=None)
        expected_wall += MINUTE
        is_due = expression.matches(wall) and not (expression.is_fixed_time and here.fold)
        while expected_wall < wall:
            is_due |= expression.is_fixed_time and expression.matches(expected_wall)
            expected_wall += MINUTE
        expected_wall = wall
        if is_due:
            yield instant


# Daylight saving: what Debian's cron does, as tables.

ZURICH, NEW_YORK, LORD_HOWE, CASABLANCA = ZONES[:4]
GAP_AND_FOLD = [
    # A fixed time in the skipped hour fires once, right after the gap.
    (ZURICH, "30 2 * * *", "2026-03-28T12:00Z", ["29 03:00 +0200", "30 02:30 +0200"]),
    (ZURICH, "0,30 2 * * *", "2026-03-28T12:00Z", ["29 03:00 +0200", "30 02:00 +0200"]),
    (ZURICH, "30 2,3 * * *", "2026-03-28T12:00Z", ["29 03:00 +0200", "29 03:30 +0200"]),
    (NEW_YORK, "5 2 * * *", "2026-03-07T12:00Z", ["08 03:00 -0400", "09 02:05 -0400"]),
    (LORD_HOWE, "10 2 * * *", "2026-10-03T12:00Z", ["04 02:30 +1100", "05 02:10 +1100"]),
    (CASABLANCA, "0 2 * * *", "2026-03-21T12:00Z", ["22 03:00 +0100", "23 02:00 +0100"]),
    # A gap that ends at midnight: right after it is the next day.
    ("America/Nuuk", "30 23 * * *", "2026-03-28T12:00Z", ["29 00:00 -0100", "29 23:30 -0100"]),
    # A fixed time in the repeated hour fires once, in the first pass.
    (ZURICH, "30 2 * * *", "2026-10-24T12:00Z", ["25 02:30 +0200", "26 02:30 +0100"]),
    (NEW_YORK, "0 1 * * *", "2026-10-31T12:00Z", ["01 01:00 -0400", "02 01:00 -0500"]),
    (LORD_HOWE, "45 1 * * *", "2026-04-04T03:00Z", ["05 01:45 +1100", "06 01:45 +1030"]),
    (CASABLANCA, "59 2 * * *", "2026-02-14T12:00Z", ["15 02:59 +0100", "16 02:59 +0000"]),
    # A wildcard hour keeps its interval through both.
    (ZURICH, "0 * * * *", "2026-03-29T00:00Z", ["29 03:00 +0200", "29 04:00 +0200"]),
    (ZURICH, "0 * * * *", "2026-10-24T23:30Z", ["25 02:00 +0200", "25 02:00 +0100"]),
    (LORD_HOWE, "45 * * * *", "2026-04-04T14:00Z", ["05 01:45 +1100", "05 01:45 +1030"]),
    (LORD_HOWE, "0 */3 * * *", "2026-10-03T14:00Z", ["04 03:00 +1100", "04 06:00 +1100"]),
    # A wildcard minute is an interval too: nothing of it is made up for, the fold repeats it.
    (ZURICH, "*/30 2 * * *", "2026-03-28T12:00Z", ["30 02:00 +0200", "30 02:30 +0200"]),
    (ZURICH, "*/30 2 * * *", "2026-10-25T00:00Z", ["25 02:30 +0200", "25 02:00 +0100"]),
]  # fmt: skip


@pytest.mark.parametrize(("zone", "expression", "after", "expected"), GAP_AND_FOLD)
def test_daylight_saving_table(zone: str, expression: str, after: str, expected: list[str]) -> None:
    """At every kind of clock change a job fires when Debian's cron would."""
    start = utc(after)
    slots = slots_between(Schedule((expression,), zone), start, start + 5 * DAY, limit=2)
    assert local(slots, zone) == expected


def test_a_cursor_in_the_second_pass_does_not_fire_again() -> None:
    """A fixed job fired in the first pass stays quiet when asked from within the second."""
    schedule = Schedule(("30 2 * * *",), "Europe/Zurich")
    second_pass = utc("2026-10-25T02:10+01:00")
    assert next_slot(schedule, second_pass) == utc("2026-10-26T02:30+01:00")


@thoroughly
@given(expressions(), st.sampled_from(ZONES), st.sampled_from(EVES))
def test_slots_are_those_of_the_oracle(expression: Expression, zone: str, eve: datetime) -> None:
    """Over three days around a change, no slot is missing, none is extra."""
    until = eve + 3 * DAY
    slots = slots_between(Schedule((expression.text,), zone), eve, until)
    assert slots == oracle(expression, zone, eve, until)


@thoroughly
@given(expressions(is_any_day=True), st.sampled_from(ZONES), st.sampled_from(EVES))
def test_slots_agree_with_croniter(expression: Expression, zone: str, eve: datetime) -> None:
    """The slots are those of croniter, its two deliberate differences taken out."""
    tz, until = ZoneInfo(zone), eve + 2 * DAY
    theirs: list[datetime] = []
    iterator = croniter(expression.text, eve.astimezone(tz))
    while (slot := iterator.get_next(datetime).astimezone(UTC)) <= until:
        here = slot.astimezone(tz)
        is_repeat = expression.is_fixed_time and here.fold == 1
        is_made_up = not expression.is_fixed_time and not expression.matches(here)
        if not (is_repeat or is_made_up):
            theirs.append(slot)
    assert slots_between(Schedule((expression.text,), zone), eve, until) == theirs


@exactly
@given(expressions(), st.sampled_from(ZONES), st.sampled_from(EVES))
def test_each_slot_matches_its_expression(expression: Expression, zone: str, eve: datetime) -> None:
    """In local time a slot matches its expression, unless it stands right after a gap."""
    tz = ZoneInfo(zone)
    for slot in slots_between(Schedule((expression.text,), zone), eve, eve + 30 * DAY, 400):
        wall = slot.astimezone(tz)
        is_after_gap = wall.utcoffset() != (slot - MINUTE).astimezone(tz).utcoffset()
        assert expression.matches(wall) or (expression.is_fixed_time and is_after_gap)


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("time_of_day", ["0 6", "30 2", "15 2", "45 1", "0 3"])
def test_a_daily_job_fires_once_a_day_for_ten_years(zone: str, time_of_day: str) -> None:
    """A fixed daily job has exactly one slot on each local day of ten years."""
    tz = ZoneInfo(zone)
    first, last = datetime(2025, 1, 1, tzinfo=tz), datetime(2034, 12, 31, 23, 59, tzinfo=tz)
    slots = slots_between(Schedule((f"{time_of_day} * * *",), zone), first, last)
    days = [slot.astimezone(tz).date() for slot in slots]
    assert days == [first.date() + n * DAY for n in range(3652)]


# The sequence: order, cuts, pages, several expressions.

merged_schedules = st.builds(
    lambda own, common, zone, common_zone: Schedule(
        (own.text, in_zone(common.text, common_zone)), zone
    ),
    expressions(),
    expressions(),
    st.sampled_from(ZONES),
    st.sampled_from(ZONES),
)
instants = st.integers(0, 3 * 365 * 86_400).map(
    lambda seconds: utc("2026-01-01T00:00Z") + timedelta(seconds=seconds)
)
spans = st.timedeltas(timedelta(0), 3 * DAY)


@thoroughly
@given(merged_schedules, st.one_of(instants, st.sampled_from(EVES)), spans, spans)
def test_cutting_an_interval_changes_nothing(
    schedule: Schedule, start: datetime, first: timedelta, second: timedelta
) -> None:
    """Slots of (a, c] are those of (a, b] and then those of (b, c], strictly increasing."""
    cut, end = start + first, start + first + second
    whole = slots_between(schedule, start, end)
    assert whole == slots_between(schedule, start, cut) + slots_between(schedule, cut, end)
    assert all(earlier < later for earlier, later in pairwise(whole))
    assert all(start < slot <= end and slot.tzinfo is UTC for slot in whole)


@exactly
@given(merged_schedules, st.sampled_from(EVES), st.integers(1, 50))
def test_pages_add_up_to_the_whole(schedule: Schedule, start: datetime, size: int) -> None:
    """Reading page by page from the last slot seen gives each slot once."""
    end, cursor, paged = start + DAY, start, list[datetime]()
    while page := slots_between(schedule, cursor, end, size):
        assert len(page) <= size
        paged += page
        cursor = page[-1]
    assert paged == slots_between(schedule, start, end)


@exactly
@given(expressions(), expressions(), st.sampled_from(ZONES), st.sampled_from(EVES))
def test_several_expressions_make_one_sequence(
    own: Expression, common: Expression, zone: str, eve: datetime
) -> None:
    """Two expressions, each in its zone, give the sorted union of their slots."""
    schedule = Schedule((own.text, in_zone(common.text, "Asia/Kathmandu")), zone)
    end = eve + 2 * DAY
    union = {*oracle(own, zone, eve, end), *oracle(common, "Asia/Kathmandu", eve, end)}
    assert slots_between(schedule, eve, end) == sorted(union)


def test_a_page_costs_no_more_than_its_slots() -> None:
    """The first page of a backlog of thousands of years is there at once."""
    schedule = Schedule(("* * * * *",), "Europe/Zurich")
    start = utc("2026-01-01T00:00Z")
    page = slots_between(schedule, start, utc("9000-01-01T00:00Z"), limit=3)
    assert page == [start + n * MINUTE for n in (1, 2, 3)]


def test_next_slot_is_later_than_its_argument() -> None:
    """The slot after a slot is the following one; a schedule without expressions has none."""
    schedule = Schedule(("0 6 * * *",), "Europe/Zurich")
    six = utc("2026-07-01T06:00+02:00")
    assert next_slot(schedule, six - timedelta(microseconds=1)) == six
    assert next_slot(schedule, six) == six + DAY
    assert next_slot(Schedule(()), six) is None


def test_a_rare_expression_is_found() -> None:
    """A leap day that is a Monday is found 28 years ahead, and in its own zone."""
    schedule = Schedule(("0 0 */28 2 MON#5",), "Europe/Zurich")
    assert next_slot(schedule, utc("2016-03-01T00:00Z")) == utc("2044-02-29T00:00+01:00")


def test_an_instant_without_a_zone_is_refused() -> None:
    """A naive datetime never becomes a slot by guesswork."""
    with pytest.raises(ValueError, match="time zone"):
        next_slot(Schedule(("0 6 * * *",)), utc("2026-01-01T00:00Z").replace(tzinfo=None))


# Expressions and zones that cannot be used.


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("60 * * * *", 'bad minute "60"; expected 0-59'),
        ("0 24 * * *", 'bad hour "24"; expected 0-23'),
        ("0 0 0 * *", 'bad day-of-month "0"'),
        ("0 0 1 13 *", 'bad month "13"; expected 1-12'),
        ("0 0 * * MOO", 'bad day-of-week "MOO"'),
        ("*/0 * * * *", 'bad minute "\\*/0"'),
        ("5-1 * * * *", 'bad minute "5-1"'),
        ("0 0 30 2 *", 'bad day-of-month "30".*of the months given'),
        ("0 0 31 4,6 *", 'bad day-of-month "31"'),
        ("0 0 */31 * MON#5", "never fires"),
        ("", "has 0 fields"),
        ("* * * *", "has 4 fields"),
        ("0 * * * * *", "has 6 fields"),
        ("@reboot", "@daily"),
        ("CRON_TZ=Mars/Olympus 0 6 * * *", 'unknown time zone "Mars/Olympus"'),
        ("1," * 501 + "1 * * * *", "more than 1000 characters"),
    ],
)
def test_a_bad_expression_names_the_field(expression: str, message: str) -> None:
    """Each kind of bad expression is refused with the field, or that it never fires."""
    with pytest.raises(ValueError, match=message):
        parse_cron(expression, "UTC")


@pytest.mark.parametrize(
    "zone", ["", "Mars/Olympus", "Europe", "../UTC", "/etc/passwd", "localtime", "\0", "x" * 400]
)
def test_a_bad_zone_is_named(zone: str) -> None:
    """What is no IANA zone, or is each machine's own, is refused in one sentence."""
    with pytest.raises(ValueError, match="unknown time zone"):
        parse_cron("0 6 * * *", zone)


@thoroughly
@given(st.text("0123456789*/-,#@ LWMONTCRZ_=", max_size=30) | st.text(max_size=30))
@example("9" * 990 + " * * * *")
def test_any_text_is_a_job_or_a_value_error(text: str) -> None:
    """Parsing never fails in another way, and a parsed job has a next slot."""
    try:
        parse_cron(text, "UTC")
    except ValueError:
        return
    assert next_slot(Schedule((text,)), utc("2026-01-01T00:00Z")) is not None


@pytest.mark.parametrize(
    ("nickname", "first"),
    [
        ("@hourly", "2026-01-01T01:00Z"),
        ("@Daily", "2026-01-02T00:00Z"),
        ("@midnight", "2026-01-02T00:00Z"),
        ("@weekly", "2026-01-04T00:00Z"),
        ("@monthly", "2026-02-01T00:00Z"),
        ("@yearly", "2027-01-01T00:00Z"),
        ("@annually", "2027-01-01T00:00Z"),
    ],
)
def test_nicknames(nickname: str, first: str) -> None:
    """Cron's nicknames mean what they mean everywhere."""
    assert next_slot(Schedule((nickname,)), utc("2026-01-01T00:00Z")) == utc(first)


def test_days_are_joined_as_in_debian() -> None:
    """Day and weekday both given mean either; with a star in one of them, both."""
    start = utc("2026-01-01T00:00Z")
    either = slots_between(Schedule(("0 0 13 * FRI",)), start, start + 14 * DAY)
    both = slots_between(Schedule(("0 0 */13 * FRI",)), start, start + 100 * DAY)
    assert [slot.day for slot in either] == [2, 9, 13]
    assert [(slot.month, slot.day) for slot in both] == [(2, 27), (3, 27)]


@pytest.mark.parametrize("limit", [-1, MAX_CATCH_UP_LIMIT + 1])
def test_a_catch_up_limit_is_bounded(limit: int) -> None:
    """A limit that no pass could honour is refused."""
    with pytest.raises(ValueError, match="catch_up_limit"):
        Schedule(("0 6 * * *",), catch_up_limit=limit)


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_a_senseless_jitter_is_refused(seconds: float) -> None:
    """Jitter is a finite number of seconds, not below zero."""
    with pytest.raises(ValueError, match="jitter_seconds"):
        Schedule(("0 6 * * *",), jitter_seconds=seconds)


# Misfires.

GRACE = timedelta(seconds=60)
HOURLY = ("0 * * * *",)
SKIP = Schedule(HOURLY, misfire=Misfire.SKIP)
LATE_SKIP = replace(SKIP, jitter_seconds=1800)
FIRE_ONCE = Schedule(HOURLY, misfire=Misfire.FIRE_ONCE)
CATCH_UP_2 = Schedule(HOURLY, misfire=Misfire.CATCH_UP, catch_up_limit=2)
CATCH_UP_0, CATCH_UP_99 = (replace(CATCH_UP_2, catch_up_limit=limit) for limit in (0, 99))
SIX = utc("2026-07-01T06:00Z")


def verdicts(schedule: Schedule, due: list[datetime], now: datetime) -> list[str]:
    """The verdicts alone, on a page with nothing after it."""
    return [str(made.outcome) for made in decide(schedule, due, now, GRACE, more=False)]


@pytest.mark.parametrize(
    ("schedule", "minutes_past_six", "expected"),
    [
        (SKIP, 30, ["missed"] * 4),
        (SKIP, 0, ["missed"] * 3 + ["fire"]),
        (FIRE_ONCE, 30, ["coalesced"] * 3 + ["fire"]),
        # The outage ends within the grace of a slot: that slot's run serves for all of them.
        (FIRE_ONCE, 1, ["coalesced"] * 3 + ["fire"]),
        (CATCH_UP_2, 30, ["missed"] * 2 + ["fire"] * 2),
        # A slot that is on time does not use up the limit.
        (CATCH_UP_2, 1, ["missed"] + ["fire"] * 3),
        (CATCH_UP_0, 30, ["missed"] * 4),
        (CATCH_UP_99, 30, ["fire"] * 4),
        # Jitter may delay a slot, so that long it is not late.
        (LATE_SKIP, 30, ["missed"] * 3 + ["fire"]),
    ],
)
def test_misfire_table(schedule: Schedule, minutes_past_six: int, expected: list[str]) -> None:
    """After three hours of outage each policy does what its name says."""
    now = SIX + minutes_past_six * MINUTE
    due = slots_between(schedule, SIX - 4 * HOUR, now)
    assert verdicts(schedule, due, now) == expected


def test_the_grace_ends_after_its_last_instant() -> None:
    """A slot is on time at exactly the grace and late a microsecond after."""
    assert verdicts(SKIP, [SIX], SIX + GRACE) == ["fire"]
    assert verdicts(SKIP, [SIX], SIX + GRACE + timedelta(microseconds=1)) == ["missed"]


def test_reasons_tell_the_policy_and_the_lateness() -> None:
    """The reason that an operator reads says why, and how late the slot was."""
    schedule = Schedule(HOURLY, misfire=Misfire.CATCH_UP, catch_up_limit=1)
    made = decide(schedule, [SIX - HOUR, SIX], SIX + 90 * MINUTE, GRACE, more=False)
    assert made == [
        SlotDecision(
            SIX - HOUR, Verdict.MISSED, "beyond the catch-up limit of 1 (late by 2:30:00)"
        ),
        SlotDecision(SIX, Verdict.FIRE, "within the catch-up limit of 1 (late by 1:30:00)"),
    ]


def test_a_slot_ahead_of_its_time_is_refused() -> None:
    """With a clock that went back, nothing fires early; nor does a page out of order."""
    schedule = Schedule(HOURLY)
    with pytest.raises(ValueError, match="not due"):
        decide(schedule, [SIX], SIX - MINUTE, GRACE, more=False)
    with pytest.raises(ValueError, match="increasing"):
        decide(schedule, [SIX, SIX], SIX, GRACE, more=False)


outages = st.builds(
    lambda start, length: (start, start + length), instants, st.timedeltas(MINUTE, DAY)
)
policies = st.builds(
    Schedule,
    st.sampled_from((("*/7 * * * *",), ("0 * * * *", "13 */2 * * *"), ("30 2 * * *",))),
    st.sampled_from(ZONES),
    misfire=st.sampled_from(Misfire),
    catch_up_limit=st.integers(0, 30),
    jitter_seconds=st.sampled_from((0, 30, 600)),
)
graces = st.timedeltas(timedelta(0), 2 * HOUR)


@thoroughly
@given(policies, outages, graces, st.integers(1, 40))
def test_pages_decide_as_the_whole_would(
    schedule: Schedule, outage: tuple[datetime, datetime], grace: timedelta, size: int
) -> None:
    """A backlog read in pages of any size gets the very decisions of one read at once."""
    cursor, now = outage
    whole = decide(schedule, slots_between(schedule, cursor, now), now, grace, more=False)
    paged: list[SlotDecision] = []
    while page := slots_between(schedule, cursor, now, size):
        cursor = page[-1]
        more = bool(slots_between(schedule, cursor, now, 1))
        paged += decide(schedule, page, now, grace, more=more)
    assert paged == whole


@thoroughly
@given(policies, outages, graces)
def test_every_due_slot_has_one_verdict_of_its_policy(
    schedule: Schedule, outage: tuple[datetime, datetime], grace: timedelta
) -> None:
    """No slot is left out; on-time ones fire; the late ones fire as many as the policy allows."""
    start, now = outage
    due = slots_between(schedule, start, now)
    made = decide(schedule, due, now, grace, more=False)
    assert [decision.slot_at for decision in made] == due
    allowed = grace + timedelta(seconds=schedule.jitter_seconds)
    on_time = [made.outcome for made in made if now - made.slot_at <= allowed]
    late = [made.outcome for made in made if now - made.slot_at > allowed]
    fired = late.count(Verdict.FIRE)
    assert set(on_time) <= {Verdict.FIRE}
    assert late[len(late) - fired :] == [Verdict.FIRE] * fired
    match schedule.misfire:
        case Misfire.SKIP:
            assert set(late) <= {Verdict.MISSED}
        case Misfire.FIRE_ONCE:
            assert fired == (1 if late and not on_time else 0)
            assert Verdict.MISSED not in late
        case Misfire.CATCH_UP:
            assert fired == min(schedule.catch_up_limit, len(late))
            assert Verdict.COALESCED not in late


# Jitter, plan, vocabulary.


@exactly
@given(st.text(max_size=20), instants, st.floats(0, 86_400))
def test_jitter_is_the_same_everywhere_and_bounded(
    identity: str, slot_at: datetime, seconds: float
) -> None:
    """Every node computes the same delay, whatever zone it has the instant in."""
    delay = jitter(identity, slot_at, seconds)
    assert timedelta(0) <= delay < timedelta(seconds=seconds) or delay == timedelta(0)
    assert delay == jitter(identity, slot_at.astimezone(ZoneInfo("Asia/Kathmandu")), seconds)


def test_jitter_spreads_and_stays() -> None:
    """Delays fill their range evenly, and a release does not move them."""
    delays = [jitter(f"brand-a/{n}", SIX, 100).total_seconds() for n in range(1000)]
    assert 45 < sum(delays) / len(delays) < 55
    assert min(delays) < 2
    assert max(delays) > 98
    assert jitter("brand-a/nova-daily", SIX, 60) == timedelta(microseconds=58_213_709)


def test_plan_is_in_time_order_and_complete() -> None:
    """The plan lists each schedule's slots, by time and then by name, and no further."""
    schedules = {
        "b": Schedule(("0 */6 * * *",)),
        "a": Schedule(("0 6 * * *",), "Europe/Zurich"),
        "c": Schedule(("0 12 * * *",)),
        "idle": Schedule(()),
    }
    entries = plan(schedules, SIX - HOUR - HOUR, SIX + 6 * HOUR)
    assert entries == [(SIX, "b"), (SIX + 6 * HOUR, "b"), (SIX + 6 * HOUR, "c")]
    assert plan(schedules, SIX - 3 * HOUR, SIX, limit=1) == [(SIX - 2 * HOUR, "a")]


def test_a_short_plan_of_an_endless_span_is_there_at_once() -> None:
    """The plan makes no more slots than it shows."""
    schedules = {str(n): Schedule(("* * * * *",)) for n in range(10)}
    assert len(plan(schedules, SIX, utc("9000-01-01T00:00Z"), limit=25)) == 25


def test_the_vocabulary_of_slot_rows() -> None:
    """The words stored in slot rows and read from configuration are fixed."""
    assert set(SlotOutcome) == {
        "fired", "missed", "coalesced", "paused", "halted", "overlapped", "disabled",
    }  # fmt: skip
    assert set(Misfire) == {"skip", "fire_once", "catch_up"}
    assert set(Overlap) == {"skip", "queue", "allow"}
