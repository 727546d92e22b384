"""Overlays: a profile turned off at once, shown beside its file, and never silently lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import psycopg
import pytest

from orbit.app import Node
from orbit.audit.verification import verify
from orbit.database.repair import repair
from orbit.errors import OverlaysBroken
from orbit.execution.context import ExecutionContext
from orbit.governance.actor import ANYONE
from orbit.payload import Payload
from orbit.profiles.model import State
from orbit.profiles.overlays import Target
from tests.scenario.access import asking, key_of
from tests.scenario.conftest import (
    Configure,
    Facts,
    MakeNode,
    ended,
    policy,
    profile,
    run,
    run_profile,
    until,
)

STATES: tuple[State, ...] = ("disabled", "enabled")
begun: list[str] = []
may_end = asyncio.Event()


async def hold(payload: Payload, context: ExecutionContext) -> Payload:
    """A step that lasts until the test lets it end."""
    begun.append(context.cycle_id)
    await may_end.wait()
    return payload


@pytest.fixture(autouse=True)
async def _forget() -> AsyncIterator[None]:
    global may_end  # noqa: PLW0603 - an event belongs to one loop
    begun.clear()
    may_end = asyncio.Event()
    yield
    may_end.set()


def daily(**given: Any) -> dict[str, Any]:
    """Nova's run profile in `sea`, to nowhere."""
    return run_profile(namespace="sea", distribution_targets=[], **given)


async def turn(api: httpx.AsyncClient, path: str, **body: str) -> dict[str, Any]:
    """Turns something off or on."""
    answer = await api.post(path, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_a_profile_is_turned_off_at_once_while_its_cycle_runs(
    configure: Configure, make_node: MakeNode, facts: Facts, dsn: str
) -> None:
    """No reload, no waiting: the cycle goes on as it began, new ones are refused."""
    holding = policy(tier1=[f"{__name__}:hold"])
    configure(daily(execution_policy=holding))
    node, other = await make_node(), await make_node()
    [first] = await node.orchestration.trigger_run_profiles()
    await until(lambda: begun, "the step")
    async with asking(node) as api:
        found = await turn(api, "/profiles/nova/disable", reason="it publishes nonsense")
        assert (found["state"], found["declaredState"], found["isChanged"]) == (
            "disabled",
            "enabled",
            True,
        )
        assert (await turn(api, "/profiles/nova/disable"))["isChanged"] is False
        (shown,) = (await api.get("/profiles")).json()["items"]
        assert shown["state"] == "disabled"
        (laid,) = shown["overlays"]
        assert laid["changes"] == [{"path": "/state", "before": "enabled", "value": "disabled"}]
        assert (laid["origin"], laid["reason"]) == ("person", "it publishes nonsense")
        (where,) = (await api.get("/run-profiles")).json()["items"]
        who = "anyone (ORBIT_AUTH=off)"
        assert where["reason"] == f"profile nova is disabled (by {who}: it publishes nonsense)"
        config = (await api.get("/config")).json()
        assert config["isInStep"]
        assert config["declaredRevision"] == config["filesRevision"] != config["revision"]
        assert all(one["isInStep"] for one in (await api.get("/status")).json()["nodes"])
        [refused] = await other.orchestration.trigger_run_profiles()
        assert refused.reason == "profile nova is disabled"
        may_end.set()
        assert (await ended(node, first.cycle_id or ""))["state"] == "finished"
        found = await turn(api, "/profiles/nova/enable")
        assert (found["state"], found["declaredState"]) == ("enabled", "enabled")
        assert found["revision"] == config["declaredRevision"]
        assert (await api.get("/config")).json()["overlays"] == []
    assert (await run(other))["state"] == "finished"
    assert [one["ending"] for one in facts("SELECT ending FROM profile_overlay_end")] == ["undone"]
    told = facts("SELECT event_type FROM telemetry_event WHERE event_type LIKE 'overlay%'"
                 " AND namespace = 'sea' AND profile_id = 'nova' ORDER BY batch_id")  # fmt: skip
    assert [one["event_type"] for one in told] == ["overlay_added", "overlay_ended"]
    said = facts("SELECT action, reason FROM audit_trail WHERE action LIKE 'overlay%' ORDER BY seq")
    assert said[0] == {"action": "overlay.added", "reason": "it publishes nonsense"}
    assert verify(dsn).findings == []


async def test_a_run_profile_is_turned_on_whatever_its_file_says(
    configure: Configure, make_node: MakeNode
) -> None:
    """And off again by taking the overlay away; its profile stays as it is."""
    configure(daily(state="disabled"))
    node = await make_node()
    async with asking(node) as api:
        found = await turn(api, "/run-profiles/daily/enable")
        assert (found["state"], found["declaredState"]) == ("enabled", "disabled")
        (shown,) = (await api.get("/run-profiles")).json()["items"]
        assert (shown["effectiveState"], len(shown["overlays"])) == ("enabled", 1)
        assert (await run(node))["state"] == "finished"
        assert (await turn(api, "/run-profiles/daily/disable"))["state"] == "disabled"
        assert (await api.get("/config")).json()["overlays"] == []


async def test_an_overlay_stays_over_other_files_that_it_fits(
    configure: Configure, make_node: MakeNode, facts: Facts
) -> None:
    """A reload and a boot keep it; a file that says the same adopts it, which is written down."""
    configure(daily())
    node = await make_node()
    async with asking(node) as api:
        await turn(api, "/profiles/nova/disable")
    configure(daily(), profiles=[profile(label="Other")])
    await node.orchestration.reload()
    configure(daily(), profiles=[profile(label="Another")])
    later = await make_node()
    (nova,) = later.configuration.active.documents.profiles
    assert (nova.label, nova.state) == ("Another", "disabled")
    assert later.configuration.is_in_step
    configure(daily(), profiles=[profile(label="Another", state="disabled")])
    assert (await later.orchestration.reload())[1]
    assert later.configuration.force.overlays == ()
    assert later.configuration.active == later.configuration.force.declared
    assert facts("SELECT ending FROM profile_overlay_end") == [{"ending": "adopted"}]


async def test_files_that_an_overlay_does_not_fit_are_refused_unless_it_may_go(
    configure: Configure, make_node: MakeNode, facts: Facts, dsn: str
) -> None:
    """Boot, validate and reload say which, and change nothing; told so, they drop it, audited."""
    configure(daily())
    node = await make_node()
    async with asking(node) as api:
        await turn(api, "/profiles/nova/disable", reason="x")
        before = (await api.get("/config")).json()["revision"]
        configure(profiles=[profile("terra")])
        for path in ("/config/validate", "/config/reload"):
            answer = await api.post(path)
            assert (answer.status_code, answer.json()["code"]) == (409, "overlays_broken")
            (named,) = answer.json()["overlays"]
            assert named["why"] == "the files do not have it"
            assert "profile nova" in answer.json()["detail"]
            assert "--drop-overlays" in answer.json()["detail"]
        boot = await make_node(is_started=False)
        with pytest.raises(OverlaysBroken, match="profile nova"):
            await boot.start()
        assert (await api.get("/config")).json()["revision"] == before
        answer = await api.post("/config/validate", json={"dropOverlays": True})
        assert answer.status_code == 200
        assert facts("SELECT FROM profile_overlay_end") == []
        answer = await api.post("/config/reload", json={"dropOverlays": True})
        assert (answer.status_code, answer.json()["isChanged"]) == (200, True)
    assert facts("SELECT ending, actor FROM profile_overlay_end") == [
        {"ending": "dropped", "actor": "anyone (ORBIT_AUTH=off)"}
    ]
    assert verify(dsn).findings == []


async def test_a_node_told_to_drop_overlays_starts(
    configure: Configure, make_node: MakeNode, facts: Facts
) -> None:
    """As `orbit up --drop-overlays` does."""
    configure(daily())
    node = await make_node()
    async with asking(node) as api:
        await turn(api, "/run-profiles/daily/disable")
    configure()
    boot = Node(node.settings, is_dropping_overlays=True)
    await boot.open()
    try:
        await boot.start()
        assert facts("SELECT ending FROM profile_overlay_end") == [{"ending": "dropped"}]
        await boot.drain()
    finally:
        await boot.close()


async def test_who_has_no_say_everywhere_turns_nothing_off_that_reaches_elsewhere(
    configure: Configure, make_node: MakeNode
) -> None:
    """A run profile of one's own may be; what is not there for an asker answers as what is not."""
    configure(
        daily(),
        run_profile("moon", namespace="secret-moon", distribution_targets=[]),
        run_profile("far", namespace="secret-moon", profile_id="terra", distribution_targets=[]),
        profiles=[profile(), profile("terra")],
    )
    node = await make_node(auth="on")
    bound = await key_of(node, "operator", namespaces=["sea"])
    async with asking(node, bound) as api:
        answer = await api.post("/profiles/nova/disable", json={})
        assert (answer.status_code, answer.json()["code"]) == (409, "not_entitled")
        assert "moon" not in answer.text
        for verb in ("disable", "enable"):
            for path, foreign in (("profiles", "terra"), ("run-profiles", "moon")):
                answers = [
                    await api.post(f"/{path}/{name}/{verb}", json={}) for name in (foreign, "none")
                ]
                assert [one.status_code for one in answers] == [404, 404]
                assert answers[0].text.replace(foreign, "none") == answers[1].text
        assert (await turn(api, "/run-profiles/daily/disable"))["state"] == "disabled"
        assert len((await api.get("/config")).json()["overlays"]) == 1
    other = await key_of(node, "operator", namespaces=["air"])
    async with asking(node, other) as api:
        assert (await api.get("/config")).json()["overlays"] == []


async def test_of_many_who_turn_at_once_each_finds_what_the_others_made(
    configure: Configure, make_node: MakeNode, facts: Facts, dsn: str
) -> None:
    """Two nodes, one lock: states alternate, at most one overlay lies on a state."""
    configure(daily())
    nodes = [await make_node() for _ in range(2)]
    turns = [
        node.switch.turn(Target.PROFILE, "nova", state, ANYONE, None)
        for node in nodes
        for state in STATES * 4
    ]
    await asyncio.gather(*turns)
    laid = facts("SELECT count(*) AS n FROM profile_overlay")[0]["n"]
    gone = facts("SELECT count(*) AS n FROM profile_overlay_end")[0]["n"]
    assert laid - gone in (0, 1)
    for node in nodes:
        await node.configuration.refresh()
    assert nodes[0].configuration.active == nodes[1].configuration.active
    (nova,) = nodes[0].configuration.active.documents.profiles
    assert (nova.state == "disabled") == (laid - gone == 1)
    assert verify(dsn).findings == []


async def test_a_repair_puts_files_and_overlays_back_into_force(
    configure: Configure, make_node: MakeNode, owner_dsn: str
) -> None:
    """The one row that says what is in force is rebuilt from the last activation."""
    configure(daily())
    node = await make_node()
    async with asking(node) as api:
        await turn(api, "/profiles/nova/disable")
        before = (await api.get("/config")).json()
        with psycopg.connect(owner_dsn, autocommit=True) as owner:
            owner.execute("DELETE FROM config_active")
        assert (await repair(node.database))["configuration"] == 1
        assert (await api.get("/config")).json() == before
    later = await make_node()
    assert later.configuration.is_in_step
    assert later.configuration.force.active == node.configuration.force.active


async def test_no_cycle_begins_under_a_configuration_that_turned_it_off(
    configure: Configure, make_node: MakeNode, facts: Facts
) -> None:
    """Triggers on two nodes while a person turns the profile off and on: each cycle was allowed."""
    configure(daily())
    nodes = [await make_node() for _ in range(2)]

    async def toggle() -> None:
        for state in STATES * 10:
            await nodes[0].switch.turn(Target.PROFILE, "nova", state, ANYONE, None)

    async def trigger(node: Node) -> list[str | None]:
        answers = []
        while not toggling.done():
            answers += await node.orchestration.trigger_run_profiles()
        return [one.reason for one in answers]

    toggling = asyncio.create_task(toggle())
    one, other = await asyncio.gather(*map(trigger, nodes))
    await toggling
    assert {*one, *other} == {None, "profile nova is disabled"}
    revisions = {one["revision"] for one in facts("SELECT revision FROM cycle_run")}
    assert revisions
    for revision in revisions:
        (nova,) = (await nodes[0].configuration.read(revision)).documents.profiles
        assert nova.is_enabled
