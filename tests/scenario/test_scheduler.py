"""Every slot of every schedule is decided exactly once, by the database's time alone.

Time is moved in the database; schedulers are asked for their passes by hand, so nothing waits.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import pairwise
from typing import Any

import pytest

from orbit.app import Node
from orbit.execution.context import ExecutionContext
from orbit.payload import Payload
from orbit.profiles.schedule import jitter
from orbit.services.scheduler import Scheduler
from tests.scenario.conftest import (
    Configure,
    Facts,
    MakeNode,
    Receiver,
    SetTime,
    decide_all,
    ended,
    policy,
    profile,
    run_profile,
    scheduler_of,
    until,
)

HERE = __name__
NOON = datetime(2031, 3, 12, 12, 0, tzinfo=UTC)  # a Wednesday: far from a partition's bounds
SECOND, MINUTE, HOUR = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1)

begun: list[str] = []
may_end = asyncio.Event()


async def hold(payload: Payload, context: ExecutionContext) -> Payload:
    """A step that lasts until the test lets it end."""
    begun.append(context.cycle_id)
    await may_end.wait()
    return payload


@pytest.fixture(autouse=True)
def _forget() -> None:
    global may_end  # noqa: PLW0603 - an event belongs to one loop
    begun.clear()
    may_end = asyncio.Event()


def scheduled(cron: str, run_profile_id: str = "daily", **given: Any) -> dict[str, Any]:
    """A run profile with a schedule and nothing to do."""
    targets: dict[str, list[str]] = {"distribution_targets": []}
    return run_profile(run_profile_id, execution_policy=policy(schedule=cron, **given), **targets)


def slots(facts: Facts) -> list[tuple[datetime, str]]:
    """Every slot decided, in order: when, and what became of it."""
    rows = facts("SELECT slot_at, outcome FROM schedule_slot ORDER BY slot_at, run_profile_id")
    return [(row["slot_at"].astimezone(UTC), row["outcome"]) for row in rows]


Schedule = tuple[Node, Scheduler]


async def begin(make_node: MakeNode, set_time: SetTime, at: datetime, **given: Any) -> Schedule:
    """A node at a time, with its schedules in place."""
    set_time(at)
    node = await make_node(is_started=False, **given)
    scheduler = await scheduler_of(node)
    await decide_all(scheduler)
    return node, scheduler


async def move(scheduled_by: Schedule, set_time: SetTime, at: datetime) -> None:
    """Lets the time be `at`, and all that is due be decided."""
    node, scheduler = scheduled_by
    set_time(at)
    node.clock.anchor(at)  # as the heartbeat does
    await decide_all(scheduler)


async def test_a_slot_fires_on_time_and_once(
    configure: Configure, make_node: MakeNode, set_time: SetTime, facts: Facts
) -> None:
    """Nothing before its time, one cycle at it, nothing more after it."""
    configure(scheduled("0 12 * * *"))
    began = await begin(make_node, set_time, NOON - HOUR)
    await move(began, set_time, NOON - 30 * SECOND)
    assert slots(facts) == []
    for _ in range(3):
        await move(began, set_time, NOON + SECOND)
    assert slots(facts) == [(NOON, "fired")]
    [cycle] = facts("SELECT cycle_id, trigger, slot_at, run_profile_id FROM cycle_run")
    assert (cycle["trigger"], cycle["slot_at"]) == ("schedule", NOON)
    assert facts("SELECT cycle_id, reason FROM schedule_slot") == [
        {"cycle_id": cycle["cycle_id"], "reason": "on time"}
    ]


async def test_two_nodes_never_fire_a_slot_twice(
    configure: Configure, make_node: MakeNode, set_time: SetTime, facts: Facts
) -> None:
    """Fifty run profiles, a dozen minutes, two nodes at once: one cycle and one row a slot."""
    names = [f"rp-{number}" for number in range(50)]
    configure(*(scheduled("* * * * *", name, overlap="allow") for name in names))
    first, one = await begin(make_node, set_time, NOON - 30 * SECOND)
    second, two = await begin(make_node, set_time, NOON - 30 * SECOND)
    for minute in range(12):
        at = NOON + minute * MINUTE + SECOND
        set_time(at)
        for node in (first, second):
            node.clock.anchor(at)
        await asyncio.gather(*(decide_all(scheduler) for scheduler in (one, two, one, two)))
    assert Counter(outcome for _, outcome in slots(facts)) == {"fired": 50 * 12}
    query = "SELECT count(*), count(DISTINCT (run_profile_id, slot_at)) AS once FROM cycle_run"
    assert facts(query) == [{"count": 600, "once": 600}]
    deciders = facts("SELECT DISTINCT node_id FROM schedule_slot")
    assert {row["node_id"] for row in deciders} <= {first.node_id, second.node_id}


@pytest.mark.parametrize(
    ("given", "outcomes"),
    [
        ({"misfire": "skip"}, ["missed", "missed", "missed", "missed"]),
        ({"misfire": "fire_once"}, ["coalesced", "coalesced", "coalesced", "fired"]),
        ({"misfire": "catch_up", "catch_up_limit": 2}, ["missed", "missed", "fired", "fired"]),
        ({"misfire": "catch_up"}, ["missed", "fired", "fired", "fired"]),
    ],
)
async def test_late_slots_follow_the_misfire_policy(
    configure: Configure,
    make_node: MakeNode,
    set_time: SetTime,
    facts: Facts,
    given: dict[str, Any],
    outcomes: list[str],
) -> None:
    """Four slots that nobody served in time: each has its row, with the policy's outcome."""
    configure(scheduled("0 * * * *", **given))
    began = await begin(make_node, set_time, NOON - 210 * MINUTE, catch_up_limit=3)
    await move(began, set_time, NOON + 30 * MINUTE)
    assert slots(facts) == [
        (NOON - back * HOUR, outcome) for back, outcome in zip((3, 2, 1, 0), outcomes, strict=True)
    ]
    assert all(row["reason"] for row in facts("SELECT reason FROM schedule_slot"))
    leases = facts(
        "SELECT is_waiting, slot_at FROM cycle_lease JOIN cycle_run USING (namespace, cycle_id) "
        "ORDER BY cycle_id"
    )
    assert [row["is_waiting"] for row in leases] == [False, True, True][: outcomes.count("fired")]
    fired_at = [row["slot_at"] for row in leases]
    assert fired_at == sorted(fired_at), "those that wait begin in the order of their slots"


async def test_a_slot_that_may_not_start_says_why(
    configure: Configure, make_node: MakeNode, set_time: SetTime, facts: Facts
) -> None:
    """Disabled run profile, disabled profile, overlap: no cycle, but a row with the reason."""
    off = scheduled("0 * * * *", "off") | {"state": "disabled"}
    orphan = scheduled("0 * * * *", "orphan") | {"profile_id": "dormant"}
    configure(
        off,
        orphan,
        scheduled("0 * * * *", "slow"),
        profiles=[profile(), profile("dormant", state="disabled")],
    )
    began = await begin(make_node, set_time, NOON - MINUTE)
    await move(began, set_time, NOON + SECOND)
    await move(began, set_time, NOON + HOUR + SECOND)
    rows = facts(
        "SELECT run_profile_id AS id, outcome, reason, cycle_id FROM schedule_slot "
        "ORDER BY run_profile_id, slot_at"
    )
    [cycle] = facts("SELECT cycle_id FROM cycle_run")
    assert [(row["id"], row["outcome"], row["reason"]) for row in rows] == [
        ("off", "disabled", "run profile off is disabled"),
        ("off", "disabled", "run profile off is disabled"),
        ("orphan", "disabled", "profile dormant is disabled"),
        ("orphan", "disabled", "profile dormant is disabled"),
        ("slow", "fired", "on time"),
        ("slow", "overlapped", f"cycle {cycle['cycle_id']} is still active"),
    ]


async def test_a_paused_node_records_its_slots(
    configure: Configure, make_node: MakeNode, set_time: SetTime, facts: Facts
) -> None:
    """Under ORBIT_GLOBAL_PAUSE a slot starts nothing and is written down as paused."""
    configure(scheduled("0 * * * *"))
    began = await begin(make_node, set_time, NOON - MINUTE, global_pause=True)
    await move(began, set_time, NOON + SECOND)
    assert facts("SELECT outcome, reason, cycle_id FROM schedule_slot") == [
        {"outcome": "paused", "reason": "ORBIT_GLOBAL_PAUSE is set", "cycle_id": None}
    ]
    assert facts("SELECT count(*) FROM cycle_run") == [{"count": 0}]


@pytest.mark.parametrize("overlap", ["queue", "allow"])
async def test_a_slot_queues_behind_an_active_cycle_or_runs_beside_it(
    configure: Configure,
    make_node: MakeNode,
    set_time: SetTime,
    facts: Facts,
    overlap: str,
) -> None:
    """With `queue` the second cycle begins when the first has ended, with `allow` at once."""
    tiers: dict[str, Any] = {"tier1": [f"{HERE}:hold"]}
    configure(scheduled("*/10 * * * *", overlap=overlap, **tiers))
    set_time(NOON - MINUTE)
    node = await make_node(roles=frozenset({"worker"}), lease_seconds=3600)
    began = node, await scheduler_of(node)
    await decide_all(began[1])
    await move(began, set_time, NOON + SECOND)
    await until(lambda: begun, "the first cycle's step")
    await move(began, set_time, NOON + 10 * MINUTE + SECOND)
    assert [outcome for _, outcome in slots(facts)] == ["fired", "fired"]
    first, second = (
        row["cycle_id"] for row in facts("SELECT cycle_id FROM schedule_slot ORDER BY slot_at")
    )
    if overlap == "allow":
        await until(lambda: len(begun) == 2, "the second cycle beside the first")
    else:
        assert node.runner is not None
        await node.runner.run_once()
        assert begun == [first]
        [lease] = facts("SELECT is_waiting FROM cycle_lease WHERE cycle_id = %s", second)
        assert lease["is_waiting"]
    may_end.set()
    one, other = await ended(node, first), await ended(node, second)
    assert begun == [first, second]
    if overlap == "queue":
        [start] = facts(
            "SELECT created_at - duration_seconds * interval '1 second' AS at "
            "FROM execution_record WHERE cycle_id = %s",
            second,
        )
        assert one["ended_at"] <= start["at"] + timedelta(milliseconds=1)
    assert other["state"] == "finished"


async def test_jitter_delays_a_slot_by_the_same_time_on_every_node(
    configure: Configure, make_node: MakeNode, set_time: SetTime, facts: Facts
) -> None:
    """The delay follows from run profile and slot; the slot keeps its own time."""
    configure(scheduled("0 * * * *", jitter_seconds=1200))
    delay = jitter("brand\x1fdaily", NOON, 1200)
    assert MINUTE < delay < 20 * MINUTE
    began = await begin(make_node, set_time, NOON - MINUTE)
    due = "SELECT due_at FROM schedule"
    assert facts(due) == [{"due_at": NOON + delay}]
    await begin(make_node, set_time, NOON - MINUTE)
    assert facts(due) == [{"due_at": NOON + delay}]
    await move(began, set_time, NOON + delay - 30 * SECOND)
    assert slots(facts) == []
    await move(began, set_time, NOON + delay + SECOND)
    assert slots(facts) == [(NOON, "fired")]


@pytest.mark.parametrize(
    ("day", "fixed_time", "hours"),
    [
        (datetime(2031, 3, 30, tzinfo=UTC), datetime(2031, 3, 30, 1, 0, tzinfo=UTC), 23),
        (datetime(2031, 10, 26, tzinfo=UTC), datetime(2031, 10, 26, 0, 30, tzinfo=UTC), 25),
    ],
    ids=["spring", "autumn"],
)
async def test_clocks_that_change_neither_lose_nor_double_a_slot(
    configure: Configure,
    make_node: MakeNode,
    set_time: SetTime,
    facts: Facts,
    day: datetime,
    fixed_time: datetime,
    hours: int,
) -> None:
    """Europe/Zurich, watched all day: 02:30 fires once, every hour of the day once."""
    zurich = {"timezone": "Europe/Zurich", "overlap": "allow"}
    configure(
        scheduled("30 2 * * *", "fixed", **zurich), scheduled("0 * * * *", "hourly", **zurich)
    )
    start = day - (1 if hours == 23 else 2) * HOUR  # midnight in Zurich
    began = await begin(make_node, set_time, start - 30 * SECOND)
    for half_hours in range(2 * hours):
        await move(began, set_time, start + half_hours * HOUR / 2 + SECOND)
    rows = facts(
        "SELECT run_profile_id AS id, slot_at, outcome FROM schedule_slot ORDER BY slot_at"
    )
    assert {row["outcome"] for row in rows} == {"fired"}
    assert [row["slot_at"] for row in rows if row["id"] == "fixed"] == [fixed_time]
    hourly = [row["slot_at"] for row in rows if row["id"] == "hourly"]
    assert len(hourly) == hours
    assert {later - earlier for earlier, later in pairwise(hourly)} == {HOUR}


async def test_a_changed_schedule_begins_with_its_next_slot_and_a_removed_one_ends(
    configure: Configure, make_node: MakeNode, set_time: SetTime, facts: Facts
) -> None:
    """A reload never makes slots of the past; without a schedule there are none at all."""
    configure(scheduled("0 * * * *", overlap="allow"))
    node, scheduler = began = await begin(make_node, set_time, NOON - MINUTE)
    await move(began, set_time, NOON + SECOND)
    await move(began, set_time, NOON + 35 * MINUTE)
    configure(scheduled("*/10 * * * *", overlap="allow"))
    await node.configuration.propose(node.orchestration.read_files())
    await decide_all(scheduler)
    assert slots(facts) == [(NOON, "fired")]
    await move(began, set_time, NOON + 40 * MINUTE + SECOND)
    assert slots(facts) == [(NOON, "fired"), (NOON + 40 * MINUTE, "fired")]
    configure()
    await node.configuration.propose(node.orchestration.read_files())
    await move(began, set_time, NOON + 3 * HOUR)
    assert len(slots(facts)) == 2
    assert facts("SELECT count(*) FROM schedule") == [{"count": 0}]


async def test_slots_missed_while_no_node_ran_are_noticed(
    configure: Configure, make_node: MakeNode, set_time: SetTime, facts: Facts
) -> None:
    """A schedule that stays the same keeps its place over a restart."""
    configure(scheduled("0 * * * *", misfire="skip"))
    await begin(make_node, set_time, NOON - MINUTE)
    await begin(make_node, set_time, NOON + 2 * HOUR + 30 * SECOND)
    assert slots(facts) == [
        (NOON, "missed"),
        (NOON + HOUR, "missed"),
        (NOON + 2 * HOUR, "fired"),
    ]


async def test_a_schedule_whose_row_is_lost_goes_on_where_it_was(
    configure: Configure, make_node: MakeNode, set_time: SetTime, facts: Facts
) -> None:
    """Within a minute a node that knew it brings it back; no slot is passed over or doubled."""
    configure(scheduled("0 * * * *"), scheduled("0 0 1 1 *", "yearly"))
    began = await begin(make_node, set_time, NOON - MINUTE)
    await move(began, set_time, NOON + SECOND)
    facts("DELETE FROM schedule WHERE run_profile_id = 'daily' RETURNING 1")
    await move(began, set_time, NOON + 40 * SECOND)
    assert facts("SELECT FROM schedule WHERE run_profile_id = 'daily'") == []
    await move(began, set_time, NOON + 2 * HOUR + SECOND)
    await decide_all(began[1])
    assert [at for at, _ in slots(facts)] == [NOON, NOON + HOUR, NOON + 2 * HOUR]
    facts("DELETE FROM schedule WHERE run_profile_id = 'daily' RETURNING 1")
    await move(began, set_time, NOON + 2 * HOUR + 2 * MINUTE)
    await decide_all(began[1])
    [row] = facts("SELECT decided_until FROM schedule WHERE run_profile_id = 'daily'")
    assert row["decided_until"] == NOON + 2 * HOUR
    assert len(slots(facts)) == 3


async def test_nodes_with_different_settings_pass_over_no_slot(
    configure: Configure, make_node: MakeNode, set_time: SetTime, facts: Facts
) -> None:
    """In a rolling change each takes the schedule over, at most once a minute, where it stands."""
    configure()
    old = await begin(make_node, set_time, NOON - 10 * MINUTE, cron_schedule="0 * * * *")
    new = await begin(make_node, set_time, NOON - 9 * MINUTE, cron_schedule="30 * * * *")
    await move(old, set_time, NOON + SECOND)
    await decide_all(old[1])
    assert slots(facts) == [(NOON, "fired")]
    await move(new, set_time, NOON + 20 * SECOND)
    held = facts("SELECT definition, due_at FROM schedule")
    await move(old, set_time, NOON + 25 * SECOND)
    assert facts("SELECT definition, due_at FROM schedule") == held
    assert held[0]["due_at"] == NOON + HOUR / 2
    for both in (new, old):
        await move(both, set_time, NOON + HOUR + 5 * SECOND)
        await decide_all(both[1])
    assert [at for at, _ in slots(facts)] == [NOON, NOON + HOUR / 2, NOON + HOUR]


async def test_a_row_of_no_node_goes_when_nobody_decides_it(
    configure: Configure, make_node: MakeNode, set_time: SetTime, facts: Facts
) -> None:
    """Another node may still want it until it is overdue by a minute; then it stands for nobody."""
    configure(scheduled("0 0 1 1 *", "yearly"))
    began = await begin(make_node, set_time, NOON - MINUTE)
    facts("INSERT INTO schedule VALUES ('x', '', 'other', %s, %s) RETURNING 1", NOON, NOON + HOUR)
    others = "SELECT namespace FROM schedule WHERE definition = 'other'"
    await move(began, set_time, NOON + HOUR + SECOND)
    assert len(facts(others)) == 1
    await move(began, set_time, NOON + HOUR + 2 * MINUTE)
    assert facts(others) == []


@pytest.mark.parametrize("hours", [-7, 7])
async def test_a_node_whose_own_clock_is_wrong_changes_nothing(
    configure: Configure, make_node: MakeNode, set_time: SetTime, facts: Facts, hours: int
) -> None:
    """Hours ahead or behind: what is due follows the database's time."""
    configure(scheduled("0 * * * *"))
    set_time(NOON - MINUTE)
    node = await make_node(is_started=False)
    scheduler = await scheduler_of(node)
    node.clock.anchor(NOON + hours * HOUR)
    await decide_all(scheduler)
    assert slots(facts) == []
    set_time(NOON + SECOND)
    await decide_all(scheduler)
    assert slots(facts) == [(NOON, "fired")]
    assert facts("SELECT due_at FROM schedule") == [{"due_at": NOON + HOUR}]


async def test_a_backlog_of_ten_days_is_decided_page_by_page(
    configure: Configure, make_node: MakeNode, set_time: SetTime, facts: Facts
) -> None:
    """14,400 minutely slots: each has a row, one cycle starts, and it comes to an end."""
    configure(scheduled("* * * * *"))
    began = await begin(make_node, set_time, NOON - 30 * SECOND)
    still = partial(set_time, is_still=True)  # to decide them may take a minute
    await move(began, still, NOON + timedelta(days=10) - MINUTE + SECOND)
    found = slots(facts)
    assert [at for at, _ in found] == [NOON + minute * MINUTE for minute in range(14_400)]
    assert Counter(outcome for _, outcome in found) == {"coalesced": 14_399, "fired": 1}
    assert found[-1][1] == "fired"


async def test_a_common_schedule_and_ones_own_meet_in_one_slot(
    configure: Configure, make_node: MakeNode, set_time: SetTime, facts: Facts
) -> None:
    """ORBIT_RUN_PROFILE_CRON_SCHEDULE, in its own zone, and the run profile's: one sequence."""
    configure(scheduled("0 12 * * *", overlap="allow"))
    began = await begin(
        make_node,
        set_time,
        NOON - MINUTE,
        run_profile_cron_schedule="0 13,14 * * *",
        timezone="Europe/Zurich",
    )
    await move(began, set_time, NOON + SECOND)
    await move(began, set_time, NOON + HOUR + SECOND)
    assert slots(facts) == [(NOON, "fired"), (NOON + HOUR, "fired")]
    assert facts("SELECT count(*) FROM cycle_run") == [{"count": 2}]


async def test_a_raw_cycle_on_schedule_sends_its_initiation(
    configure: Configure,
    make_node: MakeNode,
    set_time: SetTime,
    facts: Facts,
    receiver: Receiver,
) -> None:
    """ORBIT_CRON_SCHEDULE starts a cycle without run profile; what goes out is what began it."""
    configure()
    set_time(NOON - MINUTE)
    node = await make_node(
        roles=frozenset({"worker"}),
        cron_schedule="0 * * * *",
        dispatch_endpoints=(receiver.endpoint("default-endpoint"),),
    )
    began = node, await scheduler_of(node)
    await decide_all(began[1])
    await move(began, set_time, NOON + SECOND)
    [slot] = facts("SELECT namespace, run_profile_id, cycle_id FROM schedule_slot")
    assert (slot["namespace"], slot["run_profile_id"]) == ("default", "")
    assert (await ended(node, slot["cycle_id"]))["state"] == "finished"
    [arrival] = receiver.arrivals
    assert json.loads(arrival.body) == {
        "namespace": "default",
        "profileId": None,
        "runProfileId": None,
        "trigger": {"kind": "schedule", "slotAt": NOON.isoformat()},
    }
    [row] = facts("SELECT context FROM initiation")
    assert arrival.body == row["context"].encode()
    assert arrival.headers["Content-Type"] == "application/json"


async def test_the_janitor_keeps_partitions_ahead_of_time(
    configure: Configure, make_node: MakeNode, set_time: SetTime, facts: Facts
) -> None:
    """Five weeks later a cycle's rows still have a place, and so have the next three weeks'."""
    configure(scheduled("0 12 * * *"))
    began = await begin(make_node, set_time, NOON - MINUTE)
    later = NOON + timedelta(weeks=5)
    set_time(later - MINUTE)
    await scheduler_of(began[0])  # the janitor's pass, as a running node has it every hour
    await move(began, set_time, later + SECOND)
    assert slots(facts)[-1] == (later, "fired")
    [cycle] = facts("SELECT tableoid::regclass::text AS partition FROM cycle_run")
    monday = later - timedelta(days=later.weekday())
    assert cycle["partition"] == f"cycle_run_p{monday:%Y%m%d}"
    last = monday + timedelta(weeks=3)
    assert facts("SELECT to_regclass(%s) IS NOT NULL AS made", f"cycle_run_p{last:%Y%m%d}") == [
        {"made": True}
    ]
