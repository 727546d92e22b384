"""Halting as a user meets it: triggers, slots, requeues, steps, the API and the command line."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web

from orbit.api.application import create_application
from orbit.app import Node
from orbit.audit.verification import verify
from orbit.errors import NamespaceHalted
from orbit.execution.context import ExecutionContext
from orbit.execution.dead_letters import Selection
from orbit.governance.actor import actor_here
from orbit.governance.halt import Order
from orbit.payload import Payload
from tests.scenario.access import asking, key_of
from tests.scenario.conftest import (
    SECRET_KEY,
    Arrival,
    Configure,
    Facts,
    MakeNode,
    Receiver,
    SetTime,
    decide_all,
    ended,
    policy,
    run_profile,
    scheduler_of,
    until,
)

ANN = Order("brand", "ann", "key-1", "a test")
gates: list[asyncio.Event] = []  # the test's own
calls: list[str] = []


async def waiting(payload: Payload, context: ExecutionContext) -> Payload:
    """A step that is under way until the test says so."""
    calls.append(f"{context.stage}:{context.step}")
    await gates[-1].wait()
    return payload


@pytest.fixture(autouse=True)
async def gate() -> asyncio.Event:
    """No calls, and a gate that is shut."""
    calls.clear()
    gates[:] = [asyncio.Event()]
    return gates[0]


async def client_of(node: Node) -> httpx.AsyncClient:
    """Asks the node's API in this process."""
    transport = httpx.ASGITransport(create_application(node))
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


@pytest.fixture
async def node(make_node: MakeNode, receiver: Receiver, configure: Configure) -> Node:
    """A node with a run profile in each of two namespaces."""
    step = policy(tier1=[f"{__name__}:waiting", f"{__name__}:waiting"])
    configure(
        run_profile("held", execution_policy=step),
        run_profile("quick"),
        run_profile("other", namespace="elsewhere"),
    )
    return await make_node(dispatch_endpoints=(receiver.endpoint("out"),))


@pytest.fixture
async def api(node: Node) -> AsyncIterator[httpx.AsyncClient]:
    """Its API."""
    client = await client_of(node)
    yield client
    await client.aclose()


async def test_a_halt_is_told_in_full(node: Node, api: httpx.AsyncClient) -> None:
    """What was asked for, whether it is proved, and the page that shows it; then its end."""
    path = "/governance/namespaces/brand"
    at = (node.clock.now() + timedelta(hours=1)).replace(microsecond=0)
    body = {"reason": "leak", "waitSeconds": 5, "until": at.isoformat()}
    answer = (await api.post(f"{path}/halt", json=body)).json()
    assert (answer["epoch"], answer["quiesced"], answer["inFlight"]) == (1, True, [])
    assert datetime.fromisoformat(answer["untilAt"]) == at
    state = (await api.get(path)).json()
    assert (state["state"], state["reason"], state["epoch"]) == ("halted", "leak", 1)
    status = (await api.get("/status")).json()
    assert [one["namespace"] for one in status["haltedNamespaces"]] == ["brand"]
    assert (await api.post(f"{path}/resume", json={})).status_code == 400
    assert (await api.post(f"{path}/resume", json={"reason": "mended"})).json()[
        "state"
    ] == "running"
    again = await api.post(f"{path}/resume", json={"reason": "mended"})
    assert (again.status_code, again.json()["code"]) == (409, "not_halted")
    state = (await api.get(path)).json()
    (past,) = state["history"]["items"]
    assert (state["state"], past["endedBy"], past["resumeReason"]) == (
        "running",
        "person",
        "mended",
    )


async def test_a_brake_needs_no_body_and_no_known_namespace(api: httpx.AsyncClient) -> None:
    """An emergency is no time for forms; what can be no namespace is refused."""
    answer = await api.post("/governance/namespaces/nobody-knows/halt")
    assert (answer.json()["quiesced"], answer.json()["known"]) == (True, False)
    bad = await api.post("/governance/namespaces/-bad/halt")
    assert bad.status_code == 404
    pages = [(await api.post("/governance/namespaces/nobody-knows/halt")).json() for _ in range(2)]
    assert [one["epoch"] for one in pages] == [2, 3]
    first = (await api.get("/governance/namespaces/nobody-knows", params={"limit": 2})).json()
    assert [one["epoch"] for one in first["history"]["items"]] == [3, 2]
    cursor = first["history"]["nextCursor"]
    rest = await api.get("/governance/namespaces/nobody-knows", params={"cursor": cursor})
    assert [one["epoch"] for one in rest.json()["history"]["items"]] == [1]


async def test_a_trigger_of_a_halted_namespace_is_refused(
    node: Node, api: httpx.AsyncClient, facts: Facts
) -> None:
    """409 and no cycle; of run profiles of several namespaces the others start."""
    await node.brake.halt(ANN)
    raw = await api.post("/cycles/trigger", json={"namespace": "brand"})
    assert (raw.status_code, raw.json()["code"]) == (409, "namespace_halted")
    named = await api.post("/run-profiles/trigger", json={"runProfileIds": ["quick"]})
    assert (named.status_code, named.json()["code"]) == (409, "namespace_halted")
    mixed = await api.post("/run-profiles/trigger", json={"runProfileIds": ["quick", "other"]})
    assert [one["state"] for one in mixed.json()["items"]] == ["skipped", "started"]
    assert "halted" in mixed.json()["items"][0]["reason"]
    assert {row["namespace"] for row in facts("SELECT namespace FROM cycle_run")} == {"elsewhere"}


async def test_a_running_step_may_end_and_no_next_one_begins(
    node: Node, receiver: Receiver, gate: asyncio.Event
) -> None:
    """It is in flight until then; after the resumption the cycle goes on to its end."""
    [answer] = await node.orchestration.trigger_run_profiles(["held"])
    await until(lambda: calls, "the step")
    found = await node.brake.halt(ANN, wait_seconds=0.1)
    assert not found.is_quiesced
    assert [(one.cycle_id, one.node_id) for one in found.in_flight] == [
        (answer.cycle_id, node.node_id)
    ]
    gate.set()
    assert (await node.brake.halt(ANN)).is_quiesced
    assert calls == ["tier1_complete:0"]
    assert receiver.arrivals == []
    await node.brake.resume(ANN)
    assert answer.cycle_id is not None
    assert (await ended(node, answer.cycle_id))["state"] == "finished"
    assert calls[-2:] == ["tier1_complete:0", "tier1_complete:1"]


async def test_what_waits_for_a_place_is_given_back(
    make_node: MakeNode, receiver: Receiver
) -> None:
    """What is on the wire is waited for; claimed jobs that had not begun are withheld, unspent."""
    done = asyncio.Event()

    async def slow(_: Arrival) -> web.Response:
        await done.wait()
        return web.Response()

    receiver.answers["/out"] = slow
    node = await make_node(dispatch_endpoints=(receiver.endpoint("out"),), dispatch_concurrency=2)
    for _ in range(6):
        await node.orchestration.trigger_raw(namespace="brand", endpoint_keys=["out"])
    await until(lambda: len(receiver.arrivals) == 2, "two requests")
    halting = asyncio.create_task(node.brake.halt(ANN))
    await until(lambda: node.fences._halted, "that the node hears of it")
    done.set()
    found = await halting
    assert found.is_quiesced
    assert {one.outcome for one in found.in_flight} <= {"delivered", "withheld"}
    assert len(receiver.arrivals) == 2
    await node.brake.resume(ANN)
    await until(lambda: len(receiver.arrivals) == 6, "the rest")
    assert {arrival.headers["Orbit-Attempt"] for arrival in receiver.arrivals} == {"1"}


async def test_slots_of_a_halt_are_recorded_and_never_caught_up(
    make_node: MakeNode,
    configure: Configure,
    receiver: Receiver,
    facts: Facts,
    set_time: SetTime,
) -> None:
    """Not while it lasts, nor afterwards if nobody was there to decide them; others fire."""
    catching_up = policy(schedule="0 * * * *", misfire="catch_up", catch_up_limit=10)
    configure(
        run_profile("daily", execution_policy=catching_up),
        run_profile("other", namespace="elsewhere", execution_policy=catching_up),
    )
    noon = datetime(2027, 3, 1, 12, 30, tzinfo=UTC)
    set_time(noon)
    endpoints = (receiver.endpoint("out"),)
    node = await make_node(is_started=False, dispatch_endpoints=endpoints)
    scheduler = await scheduler_of(node)
    await decide_all(scheduler)
    await node.brake.halt(ANN)
    set_time(noon + timedelta(hours=1))
    await decide_all(scheduler)
    set_time(noon + timedelta(hours=3))  # nobody decides meanwhile
    await node.brake.resume(ANN)
    set_time(noon + timedelta(hours=4))
    await decide_all(scheduler)
    query = "SELECT outcome, reason FROM schedule_slot WHERE namespace = %s ORDER BY slot_at"
    slots = facts(query, "brand")
    assert [slot["outcome"] for slot in slots] == ["halted", "halted", "halted", "fired"]
    assert slots[0]["reason"] == "namespace brand is halted (epoch 1)"
    assert slots[1]["reason"] == "namespace brand was halted (epoch 1)"
    assert {slot["outcome"] for slot in facts(query, "elsewhere")} == {"fired"}


async def test_nothing_is_requeued_into_a_halt(node: Node) -> None:
    """Neither one by one nor in bulk; it would be sent in a burst at the resumption."""
    await node.brake.halt(ANN)
    with pytest.raises(NamespaceHalted):
        await node.dead_letters.requeue_many(Selection("brand"), "again", limit=10)


async def test_a_namespace_does_not_loosen_the_rule_of_all(make_node: MakeNode) -> None:
    """Its admin says that one person is enough; where all need two, a halt still needs two."""
    node = await make_node(auth="on")
    path, why = "/governance/namespaces", {"reason": "mended"}
    async with asking(node, await key_of(node, "admin")) as everywhere:
        rule = why | {"twoPersonResume": True}
        assert (await everywhere.post(f"{path}/*/settings", json=rule)).status_code == 200
    async with asking(node, await key_of(node, "admin", namespaces=["brand"])) as own:
        rule = why | {"twoPersonResume": False}
        answer = await own.post(f"{path}/brand/settings", json=rule)
        assert answer.json()["twoPersonResume"] is True
        assert (await own.post(f"{path}/brand/halt")).status_code == 200
        asked = (await own.post(f"{path}/brand/resume", json=why)).json()
        assert (asked["state"], asked["askedBy"] is None) == ("halted", False)


async def test_two_persons_have_two_keys(
    make_node: MakeNode, receiver: Receiver, facts: Facts, dsn: str
) -> None:
    """A key rotated into another stays one person; who may only look, pulls and rules nothing."""
    node = await make_node(auth="on", dispatch_endpoints=(receiver.endpoint("out"),))
    path, why = "/governance/namespaces/brand", {"reason": "mended"}
    ann = await key_of(node, "operator")
    successor = await node.keys.rotate(actor_here(), ann.key_id, timedelta(hours=1))
    ben = await key_of(node, "operator", namespaces=["brand"])
    async with asking(node, await key_of(node, "viewer")) as viewer:
        for verb in ("halt", "resume", "settings"):
            rule = why | {"twoPersonResume": False} if verb == "settings" else why
            refused = await viewer.post(f"{path}/{verb}", json=rule)
            assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
    async with (
        asking(node, await key_of(node, "admin")) as admin,
        asking(node, ann) as first,
        asking(node, successor) as again,
        asking(node, ben) as second,
    ):
        rule = why | {"twoPersonResume": True}
        assert (await first.post(f"{path}/settings", json=rule)).status_code == 403
        assert (await admin.post(f"{path}/settings", json=rule)).status_code == 200
        assert (await first.post(f"{path}/halt")).json()["quiesced"] is True
        asked = (await first.post(f"{path}/resume", json=why)).json()
        assert (asked["state"], ann.key_id in asked["askedBy"]) == ("halted", True)
        for one in (first, again):
            refused = await one.post(f"{path}/resume", json=why)
            assert refused.json()["code"] == "second_person_required"
        assert (await second.post(f"{path}/resume", json=why)).json()["state"] == "running"
        items = (await admin.get("/audit", params={"namespace": "brand"})).json()["items"]
    others = ("key.", "access.")
    acts = [one["action"] for one in reversed(items) if not one["action"].startswith(others)]
    assert acts == ["setting", "halt", "resume.asked", "act.refused", "act.refused", "resume"]
    refusals = facts(
        "SELECT action, subject, reason, detail ->> 'code' AS code FROM audit_trail"
        " WHERE namespace = 'brand' AND action LIKE '%.refused' ORDER BY seq"
    )
    found = [(row["subject"].rpartition("/")[2], row["code"], row["reason"]) for row in refusals]
    assert found == [
        ("halt", "forbidden", None),
        ("resume", "forbidden", None),
        ("settings", "forbidden", None),
        ("settings", "forbidden", None),
        ("resume", "second_person_required", "mended"),
        ("resume", "second_person_required", "mended"),
    ]
    assert verify(dsn).findings == []


async def test_an_approver_agrees_and_does_not_begin(
    make_node: MakeNode, receiver: Receiver
) -> None:
    """What an operator asked for an approver ends; nothing before that, nor where one is enough."""
    node = await make_node(auth="on", dispatch_endpoints=(receiver.endpoint("out"),))
    path, why = "/governance/namespaces/brand", {"reason": "mended"}
    async with (
        asking(node, await key_of(node, "admin")) as admin,
        asking(node, await key_of(node, "operator")) as operator,
        asking(node, await key_of(node, "approver", namespaces=["brand"])) as approver,
    ):
        for number in (1, 2):
            await operator.post(f"{path}/halt")
            refused = await approver.post(f"{path}/resume", json=why)
            assert (refused.status_code, refused.json()["code"]) == (409, "operator_required")
            if number == 1:
                assert (await operator.post(f"{path}/resume", json=why)).status_code == 200
                rule = why | {"twoPersonResume": True}
                assert (await admin.post(f"{path}/settings", json=rule)).status_code == 200
        asked = await operator.post(f"{path}/resume", json=why)
        assert asked.json()["state"] == "halted"
        assert (await approver.post(f"{path}/resume", json=why)).json()["state"] == "running"


async def test_why_a_namespace_is_halted_outlasts_a_second_halt(
    node: Node, api: httpx.AsyncClient
) -> None:
    """Who halts again to wait on need not say it again; what was said before it ran is over."""
    path = "/governance/namespaces/brand"

    async def why() -> list[Any]:
        shown = (await api.get(path)).json()["reason"]
        (one,) = (await api.get("/status")).json()["haltedNamespaces"]
        return [shown, one["reason"]]

    await api.post(f"{path}/halt", json={"reason": "wrong prices"})
    assert (await api.post(f"{path}/halt")).json()["known"] is True
    assert await why() == ["wrong prices"] * 2
    await api.post(f"{path}/halt", json={"reason": "still wrong"})
    assert await why() == ["still wrong"] * 2
    await api.post(f"{path}/resume", json={"reason": "mended"})
    await api.post(f"{path}/halt")
    assert await why() == [None] * 2


async def test_until_resumes_by_itself(node: Node, facts: Facts) -> None:
    """Some node notices; the record says what ended it."""
    await node.brake.halt(ANN, until=node.clock.now() + timedelta(hours=1))
    facts("UPDATE namespace_fence SET until_at = orbit_now() - interval '1 second' RETURNING 1")
    await until(lambda: facts("SELECT cause FROM namespace_resume"), "the end of the halt")
    (row,) = facts("SELECT cause, actor FROM namespace_resume")
    assert row == {"cause": "until", "actor": "ann"}


async def orbit(dsn: str, *arguments: str, code: int = 0) -> str:
    """What a verb prints; it must end with the code."""
    out, _ = await said(dsn, *arguments, code=code)
    return out


async def said(dsn: str, *arguments: str, code: int, **given: str) -> tuple[str, str]:
    """What a verb prints on stdout and stderr; it must end with the code."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "orbit", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ
        | {"DATABASE_URL": dsn, "ORBIT_SECRET_KEYS": SECRET_KEY, "PORT": "1"}
        | given,
    )
    out, error = await process.communicate()
    assert process.returncode == code, (process.returncode, out, error)
    return out.decode(), error.decode()


async def test_halt_and_resume_without_a_node(dsn: str, facts: Facts) -> None:
    """The verbs work straight on the database, and end with the codes that scripts test for."""
    answer = json.loads(await orbit(dsn, "halt", "brand", "--reason", "leak", "--json"))
    assert answer["quiesced"] is True
    assert "brand (by " in await orbit(dsn, "status")
    refused = await orbit(dsn, "trigger", "--raw", "--namespace", "brand", "--json", code=4)
    assert json.loads(refused)["code"] == "namespace_halted"
    rule = ("policy", "brand", "--two-person-resume", "--reason", "r", "--direct")
    assert "two persons" in await orbit(dsn, *rule)
    await orbit(dsn, "resume", "brand", "--reason", "mended", "--epoch", "9", "--direct", code=3)
    await orbit(dsn, "resume", "brand", "--reason", "mended", "--direct", code=4)
    await orbit(dsn, "resume", "brand", "--reason", "mended", code=3)
    assert facts("SELECT step FROM namespace_resume") == [{"step": "asked"}]
    await orbit(dsn, "resume", "brand", "--reason", " ", code=2)
    assert "asks to resume it" in await orbit(dsn, "status")


async def test_a_verb_asks_for_a_time_as_people_say_it(
    make_node: MakeNode, receiver: Receiver, configure: Configure, dsn: str, config_dir: Path
) -> None:
    """From now, or with a zone; and a name that is misspelt is named, though it is halted."""
    configure(run_profile())
    await make_node(dispatch_endpoints=(receiver.endpoint("out"),))
    given = {"ORBIT_CONFIG_DIR": str(config_dir)}
    _, refused = await said(dsn, "halt", "brand", "--until", "tomorrow", code=2)
    assert "--until: expected a time with its zone (RFC 3339), or from now: 30m" in refused
    out, hint = await said(dsn, "halt", "brnad", "--until", "30m", code=0, **given)
    assert "is halted until" in out
    assert "did you mean brand?" in hint
    _, hint = await said(dsn, "halt", "brand", code=0, **given)
    assert "did you mean" not in hint


async def test_a_halt_waits_for_no_connection_of_the_pool(make_node: MakeNode) -> None:
    """Not even to find out who asks: every connection for work is taken."""
    node = await make_node(is_started=False, auth="on", database_pool_max=2)
    key = await key_of(node, "operator")
    async with asking(node, key) as client, node.database.connection(), node.database.connection():
        answer = await client.post("/governance/namespaces/brand/halt")
        resumed = await client.post("/governance/namespaces/brand/resume", json={"reason": "r"})
    assert (answer.status_code, answer.json()["quiesced"]) == (200, True)
    assert resumed.status_code == 200


async def test_the_signing_key_is_no_key_to_the_brake(
    dsn: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whoever cannot read it, since it is the service's alone, halts all the same."""
    monkeypatch.setenv("ORBIT_AUDIT_SIGNING_KEY_FILE", str(tmp_path / "not-there.key"))
    monkeypatch.setenv("ORBIT_AUDIT_CHECKPOINT_DIR", str(tmp_path))
    answer = json.loads(await orbit(dsn, "halt", "brand", "--direct", "--json"))
    assert answer["quiesced"] is True


async def test_a_halt_that_is_not_proved_in_time_ends_with_its_own_code(
    dsn: str, node: Node, gate: asyncio.Event
) -> None:
    """Code 6, with the node that still has something in hand."""
    await node.orchestration.trigger_run_profiles(["held"])
    await until(lambda: calls, "the step")
    out = await orbit(dsn, "halt", "brand", "--wait", "0.1", code=6)
    assert "NOT quiesced" in out
    assert node.node_id in out
    gate.set()
