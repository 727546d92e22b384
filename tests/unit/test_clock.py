"""Time and ids: a clock that only counts on, ids that carry their time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orbit.clock import DatabaseClock, derived_id, id_time, new_id

INSTANTS = st.datetimes(
    datetime(1970, 1, 1),  # noqa: DTZ001 - the zone is drawn apart
    datetime(9999, 1, 1),  # noqa: DTZ001
    timezones=st.just(UTC),
)
TEXTS = st.lists(st.text(max_size=20), max_size=4)


@given(INSTANTS)
def test_an_id_is_a_uuid_of_its_millisecond(at: datetime) -> None:
    """A new id is a version 7 UUID in canonical text, and gives its time back."""
    made = new_id(at)
    parsed = UUID(made)
    assert str(parsed) == made
    assert (parsed.version, parsed.variant) == (7, "specified in RFC 4122")
    assert timedelta() <= at - id_time(made) < timedelta(milliseconds=1)


@given(INSTANTS, INSTANTS)
def test_ids_sort_by_their_time(first: datetime, second: datetime) -> None:
    """What is made a millisecond later sorts later, as text and in the database alike."""
    one, other = new_id(first), new_id(second)
    if id_time(one) != id_time(other):
        assert (one < other) == (first < second)


def test_ids_of_one_moment_differ() -> None:
    """74 random bits tell ids of the same millisecond apart."""
    at = datetime(2026, 1, 1, tzinfo=UTC)
    assert len({new_id(at) for _ in range(10_000)}) == 10_000


@given(INSTANTS, TEXTS)
def test_a_derived_id_is_always_the_same(at: datetime, parts: list[str]) -> None:
    """Parent and parts give the same id each time: version 7, of the parent's millisecond."""
    parent = new_id(at)
    made = derived_id(parent, *parts)
    assert made == derived_id(parent, *parts)
    assert UUID(made).version == 7
    assert id_time(made) == id_time(parent)
    assert made != parent


@given(INSTANTS, st.integers(0, 10_000), st.integers(0, 10_000))
def test_derived_ids_differ_by_what_they_are_made_from(at: datetime, one: int, other: int) -> None:
    """Another item, another endpoint or another parent is another id."""
    parent = new_id(at)
    if one != other:
        assert derived_id(parent, "job", str(one), "a") != derived_id(
            parent, "job", str(other), "a"
        )
    assert derived_id(parent, "job", str(one), "a") != derived_id(new_id(at), "job", str(one), "a")
    assert derived_id(parent, "job", str(one), "a") != derived_id(parent, "job", str(one), "b")
    assert derived_id(parent, "a", "b") != derived_id(parent, "ab")


@pytest.mark.parametrize("at", [datetime(2001, 1, 1, tzinfo=UTC), datetime(2090, 1, 1, tzinfo=UTC)])
def test_the_database_clock_goes_by_the_database(at: datetime) -> None:
    """Whatever this machine thinks the time is, the clock counts on from what it was told."""
    clock = DatabaseClock(at)
    first, second = clock.now(), clock.now()
    assert at <= first <= second < at + timedelta(minutes=1)
    clock.anchor(at - timedelta(days=1))
    assert clock.now() < at
