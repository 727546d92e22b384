"""The correlator over real telemetry: what is read of it, and who feeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from uuid import UUID, uuid5

import psycopg
import pytest

from orbit.clock import DatabaseClock, new_id
from orbit.database.pool import Database
from orbit.insight.feeding import Feed
from orbit.insight.keeping import BATCH_EVENTS, SignalKeeper
from orbit.insight.source import TelemetrySource
from orbit.services.correlator import Correlator
from orbit.telemetry.catalogue import EventType
from orbit.telemetry.emission import Event, emit
from orbit.telemetry.sequencing import sequence
from tests.unit.test_insight_feeding import Told, fleet

_EACH = 60  # events of one transaction
_RUNS = UUID(int=5)


@pytest.fixture(scope="module")
def events() -> Sequence[Told]:
    """Telemetry of a fleet in which one profile gets worse and one stops."""
    return fleet(2, 5, 240)


def emitted(one: Told, namespace: str) -> Event:
    """The event as its writer tells it."""
    run_id = one.run_id and str(uuid5(_RUNS, one.run_id))
    kind = EventType(one.event_type)
    return Event(namespace, kind, one.metadata, one.profile_id, None, run_id)


async def tell(database: Database, node_id: str, *told: Event) -> None:
    """Emits events in transactions of some, noise of others between, and numbers them."""
    noise = Event("*", EventType.CONFIGURATION_ACTIVATED, {"revision": "r1"})
    for start in range(0, len(told), _EACH):
        async with database.transaction() as connection:
            await emit(connection, *told[start : start + _EACH], noise)
    while (await sequence(database, node_id)).events:
        pass


@pytest.fixture
async def node_id(database: Database) -> str:
    """The id of the node that numbers events."""
    return await fresh_id(database)


async def fresh_id(database: Database) -> str:
    """An id of the database's present."""
    row = await database.fetch_one(b"SELECT orbit_now() AS now")
    assert row is not None
    return new_id(DatabaseClock(row["now"]).now())


async def states(database: Database) -> list[tuple[str, str]]:
    """What is stored of the streams."""
    rows = await database.fetch_all(
        b"SELECT profile_id || revision || metric AS stream, state FROM signal_stream ORDER BY 1"
    )
    return [(row["stream"], row["state"]) for row in rows]


async def drained(correlator: Correlator) -> int:
    """Runs passes until one would rest; how many there were."""
    passes = 1
    while await correlator.run_once() == 0.0:
        passes += 1
    return passes


async def test_events_are_fed_as_they_were_told(
    database: Database, node_id: str, events: Sequence[Told]
) -> None:
    """Over the database, in batches, amid noise: what a feed of the same events has and says."""
    await tell(database, node_id, *(emitted(one, "sea") for one in events))
    keeper = SignalKeeper(database, TelemetrySource())
    assert len(events) > BATCH_EVENTS
    assert await drained(Correlator(database, keeper, node_id)) > 1
    rows = await database.fetch_all(
        b"SELECT position, event_type, profile_id, run_id::text, metadata FROM telemetry_stream"
        b" WHERE namespace = 'sea' ORDER BY position"
    )
    alone = Feed()
    stored = [replace(events[place], **row) for place, row in enumerate(rows)]
    said = list(alone.take(stored))
    told = await database.fetch_all(b"SELECT name, to_position FROM advisory_signal ORDER BY 2, 1")
    assert said
    assert sorted((one.last_position, str(one.name)) for one in said) == [
        (row["to_position"], row["name"]) for row in told
    ]
    feed = await database.fetch_one(b"SELECT * FROM signal_feed")
    assert feed is not None
    assert feed["namespace"] == "sea"
    assert json.loads(feed["state"]) == json.loads(json.dumps(alone.head()))
    assert await keeper.behind(node_id) == []


async def test_only_the_node_that_numbers_feeds_and_another_takes_over(
    database: Database, node_id: str, events: Sequence[Told]
) -> None:
    """A second node rests; once it numbers, it goes on where the first was, to the same state."""
    half = len(events) // 2
    await tell(database, node_id, *(emitted(one, "sea") for one in events[:half]))
    other = await fresh_id(database)
    first, second = (
        Correlator(database, SignalKeeper(database, TelemetrySource()), one)
        for one in (node_id, other)
    )
    assert await second.run_once() > 0
    assert await states(database) == []
    await drained(first)
    await database.execute(b"UPDATE telemetry_sequencer SET due_at = '-infinity'")
    await tell(database, other, *(emitted(one, "sea") for one in events[half:]))
    assert await first.run_once() > 0
    await drained(second)
    found = await states(database)
    await database.execute(b"DELETE FROM signal_stream")
    await database.execute(b"DELETE FROM signal_feed")
    await drained(second)
    assert found == await states(database) != []


async def test_a_namespace_that_cannot_be_fed_holds_up_no_other(
    database: Database, owner_dsn: str, node_id: str, events: Sequence[Told]
) -> None:
    """One is refused by the database; the next is fed; the first once it can be."""
    some = events[:100]
    for namespace in ("air", "sea"):
        await tell(database, node_id, *(emitted(one, namespace) for one in some))
    correlator = Correlator(database, SignalKeeper(database, TelemetrySource()), node_id)
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        owner.execute("ALTER TABLE signal_feed ADD CONSTRAINT sea CHECK (namespace <> 'air')")
        assert await correlator.run_once() > 1
        rows = await database.fetch_all(b"SELECT namespace FROM signal_feed")
        assert [row["namespace"] for row in rows] == ["sea"]
        owner.execute("ALTER TABLE signal_feed DROP CONSTRAINT sea")
    await drained(correlator)
    rows = await database.fetch_all(b"SELECT namespace FROM signal_feed ORDER BY 1")
    assert [row["namespace"] for row in rows] == ["air", "sea"]


async def test_drills_and_the_installation_have_no_feed(database: Database, node_id: str) -> None:
    """Their events are passed over; so are those of a namespace without a profile."""
    told = Event("orbit-drill-x", EventType.EXECUTION_STARTED)
    await tell(database, node_id, told, replace(told, namespace="sea"))
    correlator = Correlator(database, SignalKeeper(database, TelemetrySource()), node_id)
    await drained(correlator)
    rows = await database.fetch_all(b"SELECT namespace, position > 0 AS is_passed FROM signal_feed")
    assert [(row["namespace"], row["is_passed"]) for row in rows] == [("sea", True)]


async def test_a_change_elsewhere_does_not_begin_a_profiles_history_anew(
    database: Database, node_id: str
) -> None:
    """The whole configuration's revision changed: one profile with it, the other not."""
    old, new, unknown = ("a" * 64, "b" * 64, "c" * 64)
    await store_revision(database, old, {"steady": 1, "changed": 1})
    await store_revision(database, new, {"steady": 1, "changed": 2})
    told = [
        Event("sea", EventType.EXECUTION_FINISHED, {"jobs": 1, "revision": revision}, profile)
        for revision in (old, new, unknown)
        for profile in ("steady", "changed")
    ]
    await tell(database, node_id, *told)
    async with database.transaction() as connection:
        stretch = await TelemetrySource().read(connection, "sea", 0, 100)
    found: dict[str | None, list[object]] = {}
    for event in stretch.events:
        found.setdefault(event.profile_id, []).append(event.metadata.get("profileRevision"))
    before, after, nothing = found["steady"]
    assert before == after is not None
    assert nothing is None
    before, after, nothing = found["changed"]
    assert None not in (before, after)
    assert before != after
    assert nothing is None


async def store_revision(database: Database, revision: str, tiers: dict[str, int]) -> None:
    """A configuration as it is stored, of profiles that differ in one number."""
    body = {
        "profiles": [{"profile_id": name, "tier": tier} for name, tier in tiers.items()],
        "run_profiles": [{"run_profile_id": f"{name}-run", "profile_id": name} for name in tiers],
    }
    await database.execute(
        b"INSERT INTO config_revision (revision, body, node_id)"
        b" VALUES (%(revision)s, %(body)s, %(node_id)s)",
        {"revision": revision, "body": json.dumps(body), "node_id": str(_RUNS)},
    )
