"""Signals as they are kept: rebuilt to the same bytes, told once, fed once by two who ask."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import psycopg
import pytest

from orbit.database.pool import Connection, Database
from orbit.insight.feeding import Event, Feed, Stretch
from orbit.insight.keeping import BATCH_EVENTS, SignalKeeper
from tests.unit.test_insight_feeding import fleet

_LEASES = """
SELECT array_agg(namespace || position || state ORDER BY namespace)::text,
    (SELECT array_agg(profile_id || revision || metric || state
        ORDER BY profile_id, revision, metric) FROM signal_stream)::text FROM signal_feed
"""


class Recorded:
    """Events that were recorded, up to the position that is reached so far."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.events, self.reached = events, len(events)

    async def read(self, connection: Connection, namespace: str, after: int, limit: int) -> Stretch:
        found = self.events[after : min(after + limit, self.reached)]
        last = found[-1].position if found else after
        return Stretch(found, len(found), last, len(found) < limit)


@pytest.fixture(scope="module")
def events() -> Sequence[Event]:
    """Telemetry of a fleet in which one profile gets worse and one stops."""
    return fleet(1, 6, 300)


async def told(database: Database) -> list[dict[str, Any]]:
    """What is recorded, but for when."""
    found = await database.fetch_all(
        b"SELECT * FROM advisory_signal ORDER BY to_position, signal_id"
    )
    return [{name: one for name, one in row.items() if name != "computed_at"} for row in found]


async def test_state_that_is_lost_is_rebuilt_to_the_same_bytes(
    database: Database, events: Sequence[Event]
) -> None:
    """Fed in pieces by changing keepers; then deleted, and fed in one go: nothing differs."""
    source = Recorded(events)
    for source.reached in (1, 700, 701, 2300, len(events)):
        await SignalKeeper(database, source).feed("sea")
    before = await database.fetch_one(_LEASES.encode()), await told(database)
    assert before[1]
    await database.execute(b"DELETE FROM signal_stream")
    await database.execute(b"DELETE FROM signal_feed")
    fed = await SignalKeeper(database, source).feed("sea")
    assert (fed.events, fed.signals, fed.position) == (len(events), 0, len(events))
    assert (await database.fetch_one(_LEASES.encode()), await told(database)) == before


async def test_what_is_stored_is_what_the_events_say(
    database: Database, events: Sequence[Event]
) -> None:
    """The recorded signals are those of a feed that never touched a database."""
    expected = list(Feed().take(events))
    await SignalKeeper(database, Recorded(events)).feed("sea")
    found = await told(database)
    assert {
        (str(one.name), one.key.profile_id, one.key.metric, one.last_position) for one in expected
    }
    assert sorted(
        (str(one.name), one.key.profile_id, one.key.metric, one.last_position) for one in expected
    ) == sorted(
        (one["name"], one["profile_id"], one["metric"], one["to_position"]) for one in found
    )


async def test_of_two_who_feed_at_once_each_event_is_fed_once(
    database: Database, events: Sequence[Event]
) -> None:
    """Two keepers share the batches out between them, and end where one alone would."""
    keepers = [SignalKeeper(database, Recorded(events)) for _ in range(2)]
    fed = await asyncio.gather(*(keeper.feed("sea") for keeper in keepers))
    assert sum(one.events for one in fed) == len(events) > 2 * BATCH_EVENTS
    alone = SignalKeeper(database, Recorded(events))
    await alone.feed("air")
    rows = await database.fetch_all(b"SELECT position, state FROM signal_feed ORDER BY namespace")
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    "loss",
    [
        b"DELETE FROM signal_stream",
        b"DELETE FROM signal_stream WHERE profile_id = 'p3'",
        b"UPDATE signal_stream SET profile_id = 'other' WHERE profile_id = 'p3'",
        b"DELETE FROM signal_feed",
    ],
)
async def test_state_that_is_lost_by_half_is_rebuilt_too(
    database: Database, events: Sequence[Event], loss: bytes
) -> None:
    """Whoever notices begins anew, be it one who only asks: in the end nothing differs."""
    source = Recorded(events)
    await SignalKeeper(database, source).feed("sea")
    before = await database.fetch_one(_LEASES.encode()), await told(database)
    for _ in range(2):
        await database.execute(loss)
        assert await SignalKeeper(database, source).standings("sea", "p0") == []
    fed = await SignalKeeper(database, source).feed("sea")
    assert (fed.events, fed.signals) == (len(events), 0)
    assert (await database.fetch_one(_LEASES.encode()), await told(database)) == before


async def test_state_of_another_detector_is_built_anew_by_who_leads(
    database: Database, events: Sequence[Event]
) -> None:
    """It begins at the first event again; others leave it alone, and say that more is to come."""
    source = Recorded(events)
    keeper = SignalKeeper(database, source)
    await keeper.feed("sea")
    before = await database.fetch_one(_LEASES.encode()), await told(database)
    await database.execute(b"UPDATE signal_feed SET detector_version = 99, state = 'other'")
    other = await database.fetch_one(_LEASES.encode())
    for asked in (keeper, SignalKeeper(database, source)):
        fed = await asked.feed("sea")
        assert (fed.events, fed.is_up_to_date) == (0, False)
        assert await asked.standings("sea", "p0") == []
        assert (await asked.bases("sea", "p0", "r1"))[1] == []
    assert await database.fetch_one(_LEASES.encode()) == other
    await SignalKeeper(database, source).feed_batch("sea", is_leader=True)
    await keeper.feed("sea")
    assert (await database.fetch_one(_LEASES.encode()), await told(database)) == before


async def test_a_batch_that_fails_leaves_nothing(
    database: Database, owner_dsn: str, events: Sequence[Event]
) -> None:
    """Signals that cannot be recorded keep the feed where it was; the next try says them."""
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        owner.execute("ALTER TABLE advisory_signal ADD CONSTRAINT nothing CHECK (false) NOT VALID")
        keeper = SignalKeeper(database, Recorded(events))
        with pytest.raises(psycopg.errors.CheckViolation):
            await keeper.feed("sea")
        owner.execute("ALTER TABLE advisory_signal DROP CONSTRAINT nothing")
    assert not await told(database)
    row = await database.fetch_one(b"SELECT position FROM signal_feed")
    assert row is None or row["position"] < len(events)
    await keeper.feed("sea")
    assert len(await told(database)) == len(list(Feed().take(events)))
