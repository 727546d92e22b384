"""Drills of a halt, as operators meet them: what passes, what fails, and what is left alone."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from orbit.app import Node
from orbit.audit.verification import verify
from orbit.clock import DatabaseClock, new_id
from orbit.drills.halt import REQUESTS, HaltDrill
from orbit.errors import DrillUnderWay, RequestInvalid
from orbit.execution.cycle import claim
from orbit.execution.initiation import CycleRequest, accept
from orbit.execution.recorder import Recorder
from orbit.governance.halt import Order
from orbit.governance.rules import set_two_persons
from orbit.services.janitor import Janitor
from orbit.services.leftovers import Leftovers
from orbit.vocabulary import DRILL_ENDPOINT, DRILL_LIFE_SECONDS
from tests.database.engine import add_snapshot, enqueued
from tests.scenario.access import asking
from tests.scenario.conftest import SECRET_KEY, Facts, MakeNode, Receiver, ended

SPACE = "orbit-drill-left"
BREAK_THE_FENCE = """
CREATE FUNCTION let_go() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN NEW.is_halted := false; NEW.until_at := NULL; RETURN NEW; END';
CREATE TRIGGER let_go BEFORE INSERT OR UPDATE ON namespace_fence
    FOR EACH ROW EXECUTE FUNCTION let_go();
"""
REFUSE_THE_HALT = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN RAISE EXCEPTION ''no halt today''; END';
CREATE TRIGGER refuse BEFORE INSERT ON namespace_halt FOR EACH ROW EXECUTE FUNCTION refuse();
"""


async def orbit_drill(dsn: str, *arguments: str) -> tuple[int | None, str]:
    """The exit code of `orbit drill halt`, and what it prints."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "orbit", "drill", "halt", "--watch", "0.3", *arguments),
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"DATABASE_URL": dsn, "ORBIT_SECRET_KEYS": SECRET_KEY, "PORT": "1"},
    )
    out, _ = await process.communicate()
    return process.returncode, out.decode()


async def test_a_drill_passes_beside_running_nodes(
    make_node: MakeNode, receiver: Receiver, facts: Facts
) -> None:
    """The halt came amid the requests; no other node took one, and other work went on.

    A rule of two persons for all does not hold a drill up.
    """
    endpoints = (receiver.endpoint("out"),)
    node, other = [await make_node(dispatch_endpoints=endpoints) for _ in range(2)]
    rule = Order("*", "ann", "key-1", "a test")
    await set_two_persons(node.database, node.node_id, rule, is_wanted=True)
    drilling = asyncio.create_task(HaltDrill(node).run("ann", "key-1", watch_seconds=0.5))
    sent = await other.orchestration.trigger_raw(namespace="brand", endpoint_keys=["out"])
    assert (await ended(other, sent.cycle_id))["state"] == "finished"
    found = await drilling
    assert found.has_passed
    assert (found.is_quiesced, found.arrived_halted, found.is_refused) == (True, 0, True)
    assert found.arrived_before + found.arrived_after == found.requests == REQUESTS
    assert len(receiver.arrivals) == 1
    (row,) = facts("SELECT * FROM halt_drill")
    assert (row["namespace"], row["has_passed"], row["actor"]) == (found.namespace, True, "ann")
    query = "SELECT DISTINCT node_id FROM delivery_receipt WHERE namespace = %s"
    (hand,) = facts(query, found.namespace)
    assert hand["node_id"] not in {node.node_id, other.node_id}
    assert facts("SELECT FROM cycle_lease UNION ALL SELECT FROM dispatch_lease") == []
    assert facts("SELECT FROM namespace_fence WHERE is_halted") == []
    async with asking(node) as api:  # what an operator looks at is what it was before
        (shown,) = (await api.get("/cycles/recent")).json()["items"]
        assert shown["cycleRunId"] == sent.cycle_id
        lanes = (await api.get("/lanes")).json()["items"]
        assert [one["namespace"] for one in lanes] == ["brand"]
        asked: dict[str, Any] = {"namespace": found.namespace, "limit": 200}
        drilled = (await api.get("/cycles", params=asked)).json()["items"]
        assert len(drilled) == REQUESTS
    assert facts("SELECT FROM lane_tally WHERE namespace = %s", found.namespace) == []


async def test_a_drill_without_a_node(dsn: str, facts: Facts) -> None:
    """Straight on the database, the verb tells each step, and ends with 0."""
    code, out = await orbit_drill(dsn, "--direct")
    assert code == 0, out
    assert "arrived in the 0.3 s after that answer: 0" in out
    assert out.endswith("the drill passed\n")
    assert facts("SELECT has_passed FROM halt_drill") == [{"has_passed": True}]
    assert verify(dsn).findings == []


async def test_a_drill_that_breaks_off_is_told(dsn: str, owner_dsn: str, facts: Facts) -> None:
    """A database that refuses the halt: no result that a row could hold, and an entry."""
    with psycopg.connect(owner_dsn, autocommit=True) as connection:
        connection.execute(REFUSE_THE_HALT)
    code, out = await orbit_drill(dsn, "--direct")
    assert code == 1, out
    assert facts("SELECT FROM halt_drill") == []
    (told,) = facts(
        "SELECT namespace, subject, detail FROM audit_trail WHERE action LIKE 'drill.%%'"
    )
    assert (told["namespace"], told["detail"]) == ("*", {"why": "RaiseException"})
    assert told["subject"].startswith("orbit-drill-")
    assert facts("SELECT FROM cycle_lease UNION ALL SELECT FROM dispatch_lease") == []
    assert verify(dsn).findings == []


async def test_a_fence_that_does_not_hold_fails_the_drill(
    dsn: str, owner_dsn: str, facts: Facts
) -> None:
    """With a flag that the database drops, code 6 and a fact that says so; nothing is left."""
    with psycopg.connect(owner_dsn, autocommit=True) as connection:
        connection.execute(BREAK_THE_FENCE)
    code, out = await orbit_drill(dsn, "--direct", "--json", "--watch", "3")
    assert code == 6, out
    answer = json.loads(out)
    assert answer["hasPassed"] is False
    assert answer["arrivedHalted"] > 0
    assert answer["isRefused"] is False
    assert facts("SELECT has_passed FROM halt_drill") == [{"has_passed": False}]
    assert facts("SELECT FROM cycle_lease UNION ALL SELECT FROM dispatch_lease") == []


async def test_one_drill_at_a_time(make_node: MakeNode) -> None:
    """A second on the same node is refused while the first goes on to its end."""
    drill = HaltDrill(await make_node(is_started=False))
    first = asyncio.create_task(drill.run("ann", "key-1", watch_seconds=0.1))
    await asyncio.sleep(0)  # it has begun
    with pytest.raises(DrillUnderWay):
        await drill.run("ben", "key-2")
    assert (await first).has_passed


async def test_what_a_killed_drill_leaves_is_taken_by_no_node(make_node: MakeNode) -> None:
    """Its receiver's port may be another's by now; a drill takes nothing of others either."""
    node = await make_node(is_started=False)
    brand, left = await started(node, "brand"), await started(node, SPACE)
    by_drill = await claim(node.database, node.node_id, 10, 30, only=SPACE)
    assert [cycle.cycle_id for cycle in by_drill] == [left]
    await started(node, SPACE)
    by_node = await claim(node.database, node.node_id, 10, 30)
    assert [cycle.cycle_id for cycle in by_node] == [brand]


async def test_what_a_killed_drill_leaves_ends(make_node: MakeNode, facts: Facts) -> None:
    """The janitor ends it unsent, once it can be no drill's any more; it leaves others alone."""
    node = await make_node(is_started=False)
    brand = await started(node, "brand")
    for _ in range(2):
        await started(node, SPACE)
    (cycle,) = await claim(node.database, node.node_id, 1, 30, only=SPACE)
    await add_snapshot(node.database, SPACE)
    await Recorder(node.database, node.node_id).record(enqueued(cycle, [DRILL_ENDPOINT], 1))
    assert await node.leftovers().end_old() == 0
    later = DatabaseClock(node.clock.now() + timedelta(seconds=2 * DRILL_LIFE_SECONDS + 60))
    leftovers = Leftovers(node.database, node.node_id, later, node.dead_letters, 30)
    await Janitor(node.database, fact_retention_days=0, leftovers=leftovers).run_once()
    left = "SELECT cycle_id::text FROM cycle_lease"
    assert [row["cycle_id"] for row in facts(left)] == [brand]
    assert facts("SELECT FROM dispatch_lease") == []
    (dead,) = facts("SELECT * FROM dead_letter_dispatch")
    assert dead["cause"] == "the drill ended before it was sent"
    assert facts("SELECT FROM lane UNION ALL SELECT FROM lane_tally") == []
    (decision,) = facts("SELECT * FROM dead_letter_decision")
    assert (decision["namespace"], decision["job_id"]) == (SPACE, dead["job_id"])


async def started(node: Node, namespace: str) -> str:
    """A cycle's id; nobody carries it on."""
    request = CycleRequest(new_id(node.clock.now()), namespace, "api", endpoint_keys=())
    async with node.database.transaction() as connection:
        await accept(connection, node.node_id, [request])
    return request.cycle_id


async def test_a_drills_name_is_for_drills(make_node: MakeNode) -> None:
    """Nobody's trigger can have it."""
    node = await make_node(is_started=False)
    with pytest.raises(RequestInvalid, match="kept for drills"):
        await node.orchestration.trigger_raw(namespace=SPACE)
