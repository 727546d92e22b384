"""sql/slots.sql: schedules locked by one node at a time, their slots written once."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from orbit.clock import DatabaseClock
from orbit.database.pool import Database
from orbit.database.queries import array, load
from tests.database.engine import Worker, count, only

SQL = load("slots")
AT = datetime(2026, 3, 29, 6, tzinfo=UTC)


@pytest.fixture
def worker(database: Database, clock: DatabaseClock) -> Worker:
    """A worker on the fresh database."""
    return Worker.new(database, clock)


async def sync(database: Database, *schedules: tuple[str, str, datetime | str]) -> None:
    """Makes these the schedules: run profile, definition, due."""
    await database.execute(
        SQL.sync_schedules,
        {
            "is_new": True,
            "namespace": array("brand-a" for _ in schedules),
            "run_profile_id": array(name for name, *_ in schedules),
            "definition": array(definition for _, definition, _ in schedules),
            "decided_until": array(AT for _ in schedules),
            "due_at": array(due for *_, due in schedules),
        },
    )


def slots(worker: Worker, outcome: str, **given: object) -> dict[str, object]:
    """One slot's row."""
    cycle_id = given.get("cycle_id")
    return {
        "node_id": worker.node_id,
        "namespace": array(["brand-a"]),
        "run_profile_id": array(["daily"]),
        "slot_at": array([AT]),
        "outcome": array([outcome]),
        "reason": array(["on time"]),
        "cycle_id": array([cycle_id]),
    }


async def test_an_unchanged_schedule_keeps_its_place(database: Database) -> None:
    """So that slots missed while no node ran are noticed; a changed one starts anew."""
    await sync(database, ("same", "d", AT), ("changed", "d", AT), ("gone", "d", AT))
    later = AT + timedelta(days=1)
    await sync(database, ("same", "d", later), ("changed", "e", later), ("new", "d", later))
    rows = await database.fetch_all(b"SELECT run_profile_id, due_at FROM schedule")
    found = {row["run_profile_id"]: row["due_at"] for row in rows}
    assert found == {"same": AT, "changed": later, "new": later}


async def test_the_first_due_schedule_is_known(database: Database) -> None:
    """The scheduler rests until then; one that never comes does not count."""
    assert (await only(database, SQL.next_due.decode()))["due_in_seconds"] is None
    await sync(database, ("never", "d", "infinity"))
    assert (await only(database, SQL.next_due.decode()))["due_in_seconds"] is None
    await sync(database, ("never", "d", "infinity"), ("past", "d", AT - timedelta(days=9999)))
    assert (await only(database, SQL.next_due.decode()))["due_in_seconds"] < 0


async def test_a_schedule_is_decided_by_one_node_at_a_time(database: Database) -> None:
    """What one transaction has locked another passes by, until the place is moved on."""
    past = AT - timedelta(days=9999)
    await sync(database, ("a", "d", past), ("b", "d", past))
    async with database.transaction() as one, database.transaction() as other:
        first = await (await one.execute(SQL.claim_schedules, {"limit": 1})).fetchall()
        second = await (await other.execute(SQL.claim_schedules, {"limit": 5})).fetchall()
        assert len(first) == len(second) == 1
        assert first[0]["run_profile_id"] != second[0]["run_profile_id"]
        for connection, rows in ((one, first), (other, second)):
            await connection.execute(
                SQL.move_schedules,
                {
                    "namespace": array(["brand-a"]),
                    "run_profile_id": array([rows[0]["run_profile_id"]]),
                    "decided_until": array([AT]),
                    "due_at": array(["infinity"]),
                },
            )
    assert await database.fetch_all(SQL.claim_schedules, {"limit": 5}) == []


async def test_the_oldest_active_cycle_is_named(worker: Worker) -> None:
    """An overlap names the cycle that is in the way; other run profiles are not."""
    first = await worker.begin(profile_id="nova", run_profile_id="daily")
    await worker.begin(profile_id="nova", run_profile_id="daily")
    rows = await worker.database.fetch_all(
        SQL.busy_run_profiles,
        {
            "namespace": array(["brand-a", "brand-a", "brand-b"]),
            "run_profile_id": array(["daily", "weekly", "daily"]),
        },
    )
    assert [(row["namespace"], row["cycle_id"]) for row in rows] == [("brand-a", first.cycle_id)]


async def test_a_slot_is_decided_once(worker: Worker) -> None:
    """The first decision stays, whoever writes again."""
    await worker.database.execute(SQL.insert_slots, slots(worker, "missed"))
    await worker.database.execute(SQL.insert_slots, slots(worker, "paused"))
    row = await only(worker.database, "SELECT outcome, cycle_id FROM schedule_slot")
    assert row == {"outcome": "missed", "cycle_id": None}


@pytest.mark.parametrize(("outcome", "has_cycle"), [("fired", False), ("missed", True)])
async def test_only_a_fired_slot_has_a_cycle(worker: Worker, outcome: str, has_cycle: bool) -> None:
    """A slot that fired names its cycle, and no other does: the database refuses the rest."""
    cycle_id = worker.node_id if has_cycle else None
    with pytest.raises(Exception, match="only_a_fired_slot_has_a_cycle"):
        await worker.database.execute(SQL.insert_slots, slots(worker, outcome, cycle_id=cycle_id))
    assert await count(worker.database, "schedule_slot") == 0
