"""No hot statement reads a big table whole, whatever the planner has been told about it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import Connection

from orbit.database.pool import session_settings
from orbit.database.queries import array, load
from tests.conftest import TestServer
from tests.plans.explaining import (
    PLAN_MODES,
    STATISTICS,
    big_tables,
    explain,
    fill,
    forget,
    indexes,
    statement,
    walked_rows,
    whole_scans,
)

NODE = "01900000-0000-7000-8000-000000000000"
BATCH = 100


@pytest.fixture(scope="module")
def connection(server: TestServer) -> Iterator[Connection]:
    """An owner's session on a database with 200,000 cycles and jobs, all of them live."""
    name = f"orbit_plans_{os.getpid()}"
    server.run(f"CREATE DATABASE {name} TEMPLATE orbit_template_{os.getpid()}")
    fill(server.owner(name))
    with psycopg.connect(server.owner(name), prepare_threshold=None) as connection:
        yield connection
    server.run(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="module")
def sample(connection: Connection) -> dict[str, list[Any]]:
    """A batch of rows as a worker would hold them."""
    rows = connection.execute(
        "SELECT DISTINCT ON (md5(namespace || endpoint_key)) namespace, job_id, endpoint_key,"
        " cycle_id FROM dispatch_lease ORDER BY md5(namespace || endpoint_key), job_id LIMIT %s",
        (BATCH,),
    ).fetchall()
    connection.rollback()
    names = ("namespace", "job_id", "endpoint_key", "cycle_id")
    return {name: [str(row[place]) for row in rows] for place, name in enumerate(names)}


def keyed(sample: dict[str, list[Any]], *names: str, **constant: Any) -> dict[str, Any]:
    """Arrays of the sample's columns, and arrays of one value each."""
    size = len(sample["namespace"])
    columns = {name: array(sample[name]) for name in names}
    return {**columns, **{name: array([value] * size) for name, value in constant.items()}}


def parameters(sample: dict[str, list[Any]]) -> dict[str, dict[str, Any]]:
    """What each hot statement is called with."""
    size = len(sample["namespace"])
    cycles = keyed(sample, "namespace", "cycle_id", lease_number=0)
    jobs = keyed(sample, "namespace", "job_id", lease_number=0)
    held: dict[str, Any] = {**cycles, "node_id": NODE}
    one_cycle = {"namespace": sample["namespace"][0], "cycle_id": sample["cycle_id"][0]}
    one_job = {"namespace": sample["namespace"][0], "job_id": sample["job_id"][0]}
    checkpoints = keyed(
        sample, stage="tier1_complete", digest="d", content_type="c", size=1, detail="{}"
    )
    profile = keyed(sample, profile_id="p", run_profile_id="p-1")
    contents = [b"x"] * size
    profiles = keyed(sample, "namespace", run_profile_id="p-1")
    lanes = {
        "lane_namespace": array(sample["namespace"]),
        "lane_key": array(sample["endpoint_key"]),
    }
    verdicts = {
        **lanes,
        **keyed(
            sample, attempts=5, failures=3, last_failures=1, has_success="true", may_close="true"
        ),
        **keyed(sample, has_probe_failed="false", limit_failures=10, limit_share=0.7),
        **keyed(sample, least=20, window_seconds=60.0, hold_seconds=10.0),
        **keyed(sample, longest_hold_seconds=300.0),
    }
    last = "ffffffff-ffff-7fff-bfff-ffffffffffff"
    return {
        "cycle.share_fences": {"room": 64, "most": 200, "only": None, "drills": "orbit-drill-"},
        "cycle.claim_cycles": {
            "room": 64,
            "lease_seconds": 30.0,
            "node_id": NODE,
        },
        "cycle.claimed_cycles": {
            **keyed(sample, "namespace", "cycle_id"),
            "first": min(sample["cycle_id"]),
            "last": max(sample["cycle_id"]),
            "inline_bytes": 65536,
        },
        "cycle.release_waiting": {},
        "cycle.renew_cycles": {**held, "lease_seconds": 30.0},
        "cycle.release_cycles": {**held, "delay_seconds": 0.0, "error": None},
        "cycle.hold_cycles": held,
        "cycle.note_progress": held,
        "cycle.insert_payloads": {**held, **keyed(sample, digest="d"), "content": contents},
        "cycle.insert_checkpoints": {**held, **checkpoints, **profile},
        "cycle.insert_records": {
            **held,
            **keyed(
                sample, stage="s", step=0, attempt=1, name="n", outcome="succeeded", error=None
            ),
            **keyed(sample, duration_seconds=1.0, input_size=1, output_size=1),
        },
        "cycle.insert_items": {
            **held,
            **keyed(sample, item_index=0, digest="d", content_type="c", size=1),
        },
        "cycle.insert_jobs": {
            **held,
            **keyed(sample, "job_id", "endpoint_key", item_index=0, snapshot_id="s", digest="d"),
            **keyed(sample, content_type="c", size=1, max_attempts=4),
        },
        "cycle.await_dispatch": {**held, **keyed(sample, items=1, jobs=1)},
        "cycle.end_cycles": {**held, **keyed(sample, state="finished", items=1)},
        "cycle.end_dispatched": {
            **keyed(sample, "namespace", "cycle_id"),
            "first": min(sample["cycle_id"]),
            "last": max(sample["cycle_id"]),
            "node_id": NODE,
        },
        "cycle.accept_checkpoints": {
            **keyed(sample, "namespace", "cycle_id"),
            **checkpoints,
            "node_id": NODE,
        },
        "cycle.accept_payloads": {
            **keyed(sample, "namespace", "cycle_id", digest="d"),
            "content": contents,
        },
        "cycle.first_cycle": {
            "namespace": sample["namespace"][0],
            "run_profile_id": "p",
            "hash": "h",
        },
        "cycle.payload_content": {**one_cycle, "digest": "d"},
        "dispatch.busy_lanes": {},
        "dispatch.claim_jobs": {
            **keyed(sample, "namespace", "endpoint_key", room=5, cap=16, rate=None),
            **keyed(sample, has_breaker="true"),
            "places": 64,
            "retry_share": 0.25,
            "chance": 0.5,
            "lease_seconds": 30.0,
            "node_id": NODE,
        },
        "dispatch.claimed_jobs": {
            **keyed(sample, "namespace", "job_id", "cycle_id"),
            "run_namespace": array(sample["namespace"]),
            "run_id": array(sample["cycle_id"]),
            "first_job": min(sample["job_id"]),
            "last_job": max(sample["job_id"]),
            "first_cycle": min(sample["cycle_id"]),
            "last_cycle": max(sample["cycle_id"]),
            "inline_bytes": 65536,
        },
        "dispatch.share_fences": keyed(sample, "namespace"),
        "dispatch.hold_lanes": keyed(sample, "namespace", "endpoint_key"),
        "dispatch.renew_jobs": {**jobs, "node_id": NODE, "lease_seconds": 30.0},
        "dispatch.release_jobs": {**jobs, "node_id": NODE},
        "dispatch.release_unseen": {**jobs, **lanes, "node_id": NODE},
        "dispatch.expired_jobs": {"limit": 500, "namespace": None},
        "dispatch.settle_jobs": {
            **jobs,
            **keyed(sample, node_id=NODE, attempt=1, size=1, retry_seconds=None, cause=None),
            **keyed(sample, outcome="delivered", is_unspared="false"),
            **profile,
        },
        "dispatch.insert_receipts": {
            **jobs,
            **keyed(sample, "endpoint_key", node_id=NODE, attempt=1, size=1, error=None),
            **keyed(sample, outcome="delivered", status=200, digest="d", queue_seconds=0.1),
            **keyed(sample, connect_seconds=0.1, first_byte_seconds=0.1, total_seconds=0.1),
            **keyed(sample, answer_content_type="t", is_probe="false", is_reused="true"),
            **keyed(sample, "cycle_id", started_at="now"),
            **profile,
            "answer": contents,
            "part": 1,
        },
        "dispatch.judge_lanes": {**verdicts, "part": 1, "settler_id": NODE},
        "dispatch.snapshot": {"namespace": sample["namespace"][0], "snapshot_id": "s"},
        "halt.still_in_flight": {"namespace": sample["namespace"][0], "epoch": 1},
        "halt.attempts_in_flight": {"namespace": sample["namespace"][0]},
        "halt.cycles_in_flight": {"namespace": sample["namespace"][0]},
        "halt.free_expired_cycles": {"namespace": sample["namespace"][0]},
        "halt.halted": {},
        "drills.open_work": {"namespace": sample["namespace"][0]},
        "slots.next_due": {},
        "slots.claim_schedules": {"limit": 100},
        "slots.busy_run_profiles": profiles,
        "slots.move_schedules": {**profiles, **keyed(sample, decided_until="now", due_at="now")},
        "dead_letters.dead_letter": {"job_id": one_job["job_id"]},
        "dead_letters.open_dead_letters": {
            "namespace": sample["namespace"][0],
            **dict.fromkeys(("endpoint_key", "cause", "run_profile_id", "since", "until")),
            "after_job_id": one_job["job_id"],
            "limit": 1000,
        },
        "requeues.claim_batch": {"node_id": NODE, "lease_seconds": 30.0},
        "requeues.tally": {"namespace": array(sample["namespace"][:1]), "batch_id": array([NODE])},
        "requeues.first_failure": {
            "namespace": sample["namespace"][0],
            "batch_id": NODE,
            "watched_from": None,
            "is_dead_only": False,
        },
        "requeues.first_pending": {
            "namespace": sample["namespace"][0],
            "batch_id": NODE,
            "watched_from": one_job["job_id"],
        },
        **telemetry(sample),
        "reading.cycle_window": {"before": last, "count": 20, "drills": "orbit-drill-"},
        "reading.cycle_window_of_namespaces": {
            "namespaces": array(sample["namespace"][:1]),
            "before": last,
            "count": 20,
        },
        "reading.cycle_summaries": keyed(sample, "namespace", "cycle_id"),
        "reading.find_cycle": {"cycle_id": one_cycle["cycle_id"]},
        "reading.cycle_checkpoints": one_cycle,
        "reading.cycle_items": {**one_cycle, "count": 20},
        "reading.cycle_records": {**one_cycle, "count": 20},
        "reading.cycle_jobs": {
            **one_cycle,
            "first_id": sample["cycle_id"][0],
            "last_id": sample["cycle_id"][0][:14] + "ffff-bfff-ffffffffffff",
            "count": 20,
        },
        "reading.job_receipts": {
            "namespace": sample["namespace"][0],
            "job_id": array(sample["job_id"][:20]),
            "count": 20,
        },
        "reading.last_slots": profiles,
        "reading.failed_cycles": {"namespaces": None},
        "reading.waiting_lanes": {"namespaces": None},
        "reading.lane_states": keyed(sample, "namespace", "endpoint_key"),
        "reading.held_lanes": keyed(sample, "namespace", "endpoint_key"),
        "reading.lane_changes": {
            "namespace": sample["namespace"][0],
            "endpoint_key": sample["endpoint_key"][0],
            "count": 50,
        },
        "reading.dispatch_load": {},
        "reading.dead_letter_window": {"before_at": "infinity", "before": last, "count": 20},
        "reading.dead_letter_window_of_namespaces": {
            "namespaces": array(sample["namespace"][:1]),
            "before_at": "infinity",
            "before": last,
            "count": 20,
        },
        "reading.slot_window_of_namespaces": {
            "namespaces": array(sample["namespace"][:1]),
            "slot_at": "infinity",
            "namespace": "",
            "run_profile_id": "",
            "count": 20,
        },
        "reading.dead_letters": keyed(sample, "namespace", "job_id"),
        "reading.last_receipts": keyed(sample, "namespace", "job_id"),
        "reading.cycle_ledger": one_cycle,
        "reading.dead_letter_namespace": {"job_id": one_job["job_id"]},
    }


def telemetry(sample: dict[str, list[Any]]) -> dict[str, dict[str, Any]]:
    """What the statements of telemetry, and of those who follow it, are called with."""
    namespace = sample["namespace"][0]
    leader = {"node_id": NODE, "lease_seconds": 2.0}
    window = {"after": 100_000, "count": 1000, "is_stream": True}
    told = keyed(sample, "namespace", event_type="requeued", metadata="{}", run_id=NODE)
    told["version"] = array([1] * len(sample["namespace"]))
    return {
        "telemetry.emit": {**told, **keyed(sample, profile_id="p", run_profile_id="p-1")},
        "telemetry.look": leader,
        "telemetry.lead": leader,
        "telemetry.number_batches": {"node_id": NODE, "count": 2000},
        "telemetry.bounds": {},
        "telemetry.window": window,
        "telemetry.window_of_namespaces": {**window, "namespaces": array(sample["namespace"][:3])},
        "telemetry.outcome_subject": {
            "namespace": namespace,
            "run_id": None,
            "job_id": sample["job_id"][0],
            "item_index": 0,
        },
        "telemetry.add_consumer": {"name": "bi", "after": 1, "namespaces": None},
        "telemetry.move_consumer": {"name": "bi", "position": 1},
        "telemetry.consumers": {"after": "", "name": None, "within": None, "count": 50},
        "telemetry.behind": {"position": 199_000},
        "telemetry.week_lines": {"week": "2026-01-05", "after": 100_000, "count": 5000},
        "signals.behind": {"node_id": NODE, "version": 2},
        "signals.events_after": {
            "namespace": namespace,
            "after": 100_000,
            "count": 2000,
            "event_type": array(["execution_finished"]),
        },
        "signals.put_streams": {
            "namespace": namespace,
            **keyed(sample, profile_id="p", revision="r", metric="delivered", state="{}"),
        },
    }


# Takes away a tenth of a small table: a hash join would be right, had a node's sessions any.
AS_NODES_PLAN = {"telemetry.number_batches"}


def as_nodes_plan(connection: Connection, *, is_wanted: bool) -> None:
    """Has the planner do without what a node's sessions do without, or with all again."""
    for name, value in session_settings().items():
        if name.startswith("enable_"):
            connection.execute(f"SET LOCAL {name} = {value if is_wanted else 'on'}".encode())


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("mode", PLAN_MODES)
def test_no_hot_statement_reads_a_big_table_whole(
    connection: Connection, sample: dict[str, list[Any]], mode: str, statistics: str
) -> None:
    """Generic and custom plans use the indexes, also when the statistics know nothing yet."""
    big = big_tables(connection)
    assert {"cycle_lease", "dispatch_lease", "telemetry_pending", "signal_stream"} < big
    assert any(name.startswith("telemetry_event_p") for name in big)
    found = {}
    with connection.transaction(force_rollback=True):
        connection.execute(f"SET LOCAL plan_cache_mode = {mode}".encode())
        forget(connection, statistics)
        for name, params in parameters(sample).items():
            as_nodes_plan(connection, is_wanted=name in AS_NODES_PLAN)
            scans = sorted(set(whole_scans(explain(connection, name, params), big)))
            if scans:
                found[name] = scans
    assert found == {}


BY_KEY = (
    "cycle.renew_cycles",
    "cycle.release_cycles",
    "cycle.hold_cycles",
    "cycle.note_progress",
    "cycle.await_dispatch",
    "cycle.end_cycles",
    "dispatch.renew_jobs",
    "dispatch.release_jobs",
    "dispatch.settle_jobs",
)
KEYS = {"cycle_lease_pkey", "dispatch_lease_pkey"}


@pytest.fixture
def waiting(server: TestServer) -> Iterator[Connection]:
    """A session on a database that was analyzed while 5,000 jobs waited, and none was sent."""
    name = f"orbit_waiting_{os.getpid()}"
    server.run(f"CREATE DATABASE {name} TEMPLATE orbit_template_{os.getpid()}")
    with psycopg.connect(server.owner(name), autocommit=True) as connection:
        connection.execute(
            "INSERT INTO dispatch_lease (namespace, job_id, endpoint_key, cycle_id, due_at)"
            " SELECT 'n', gen_random_uuid(), 'e', gen_random_uuid(), orbit_now()"
            " FROM generate_series(1, 5000)"
        )
        connection.execute("ANALYZE dispatch_lease")
        yield connection
    server.run(f"DROP DATABASE {name} WITH (FORCE)")


def test_a_held_lease_is_found_by_its_key(
    waiting: Connection, sample: dict[str, list[Any]]
) -> None:
    """Not among all that are under way, whose index was empty when the plan was made."""
    asked = parameters(sample)
    waiting.execute("SET plan_cache_mode = force_generic_plan")
    plans = {name: explain(waiting, name, asked[name]) for name in BY_KEY}
    found = {name: indexes(plan, {"dispatch_lease", "cycle_lease"}) for name, plan in plans.items()}
    assert {name: used for name, used in found.items() if not used or used - KEYS} == {}


def test_the_check_sees_a_whole_scan(connection: Connection) -> None:
    """A statement that does read a whole table is found, so the test above can fail."""
    big = big_tables(connection)
    with connection.transaction(force_rollback=True):
        plan = explain(connection, "configuration.active_cycles", {"drills": "orbit-drill-"})
        (found,) = whole_scans(plan, big)
    assert found.endswith("on cycle_lease")


def test_statistics_that_are_right_are_left_alone(connection: Connection) -> None:
    """The heartbeat asks every few seconds; nothing is analyzed unless a table has outgrown it."""
    with connection.transaction(force_rollback=True):
        assert connection.execute("SELECT orbit_refresh_statistics()").fetchone() == ([],)


def of_nobody() -> dict[str, dict[str, Any]]:
    """What is asked for a key whose namespace has nothing, while 200 others have much."""
    asked: dict[str, Any] = {"namespaces": array(["nobody"])}
    newest: dict[str, Any] = {"before": "ffffffff-ffff-7fff-bfff-ffffffffffff", "count": 20}
    latest: dict[str, Any] = {"before_at": "infinity", **newest}
    place: dict[str, Any] = {
        "slot_at": "infinity",
        "namespace": "",
        "run_profile_id": "",
        "count": 20,
    }
    statements: dict[str, dict[str, Any]] = {
        "reading.cycle_window_of_namespaces": newest,
        "reading.cycle_window_of_running": newest,
        "reading.slot_window_of_namespaces": place,
        "reading.schedules": {"count": 20},
        "reading.dead_letter_window_of_namespaces": latest,
        "reading.dead_letter_groups": {"count": 20},
        "reading.requeue_window_of_namespaces": newest,
        "reading.active_cycles": {},
        "reading.active_stages": {},
        "reading.waiting_lanes": {},
        "reading.lane_window": {"namespace": "", "endpoint_key": "", "count": 20},
        "reading.in_flight": {},
        "reading.open_dead_letters": {},
        "reading.failed_cycles": {},
        "reading.slots_not_fired": {},
        "reading.halted_namespaces": {},
        "proposals.proposal_window": {
            "created_at": "infinity",
            "proposal_id": "f" * 32,
            "count": 20,
        },
        "telemetry.window_of_namespaces": {"after": 0, "count": 20, "is_stream": True},
        "signals.signal_window": {
            "profile_id": "p",
            "to_position": 2**62,
            "signal_id": "f" * 32,
            "count": 20,
        },
    }
    return {name: {**asked, **params} for name, params in statements.items()}


@pytest.mark.parametrize("statistics", STATISTICS)
def test_what_a_bound_key_asks_walks_no_row_of_another_namespace(
    connection: Connection, statistics: str
) -> None:
    """Neither the time of an answer nor its cost tells how much there is that is not shown."""
    asked = of_nobody()
    shown = ("reading", "proposals", "signals", "telemetry")
    names = (f"{concept}.{name}" for concept in shown for name in load(concept).names())
    bound = {name for name in names if b"%(namespaces)s" in statement(name)}
    assert bound - {"telemetry.add_consumer"} == set(asked)  # which writes, and reads nothing
    found = {}
    with connection.transaction(force_rollback=True):
        for setting, value in session_settings().items():
            known = "SELECT set_config(name, %s, true) FROM pg_settings WHERE name = %s"
            connection.execute(known, (value, setting))
        forget(connection, statistics)

        def walked(name: str, params: dict[str, Any]) -> list[tuple[str, int]]:
            return sorted(walked_rows(explain(connection, name, params, is_analyzed=True)))

        edge = walked("telemetry.bounds", {})  # of all, as each page says: a row of each week
        for name, params in asked.items():
            allowed = edge if name == "telemetry.window_of_namespaces" else []
            if (rows := walked(name, params)) != allowed:
                found[name] = rows
    assert max(count for _, count in edge) == 1
    assert found == {}


def test_the_check_sees_walked_rows(connection: Connection) -> None:
    """A statement that filters what others have is found, so the test above can fail."""
    with connection.transaction(force_rollback=True):
        plan = explain(
            connection, "configuration.active_cycles", {"drills": "n-"}, is_analyzed=True
        )
    assert dict(walked_rows(plan))["cycle_lease"] > 0
