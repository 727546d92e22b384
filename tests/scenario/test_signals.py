"""Signals over a whole node: computed from recorded events, read, and hidden from others."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from aiohttp import web

from orbit.app import Node
from orbit.cli.signals import _show_signals, _show_streams
from orbit.governance.halt import Order
from orbit.insight.feeding import Event
from orbit.insight.keeping import SignalKeeper
from tests.database.test_signals import Recorded
from tests.scenario.access import asking, key_of
from tests.scenario.conftest import (
    Arrival,
    Configure,
    Facts,
    MakeNode,
    Receiver,
    ended,
    policy,
    profile,
    run,
    run_profile,
    until,
)
from tests.unit.test_insight_feeding import fleet


@pytest.fixture(scope="module")
def events() -> Sequence[Event]:
    """Of six profiles p0 gets worse and p1 stops."""
    return fleet(1, 6, 300)


@pytest.fixture
async def node(make_node: MakeNode, configure: Configure, receiver: Receiver) -> Node:
    """A node with p0 and p1 in one namespace and p2 in another."""
    places = {"p0": "sea", "p1": "sea", "p2": "air"}
    configure(
        *(run_profile(f"{one}-daily", profile_id=one, namespace=at) for one, at in places.items()),
        profiles=[profile(one) for one in places],
    )
    return await make_node(auth="on", dispatch_endpoints=(receiver.endpoint("out"),))


async def pages(api: httpx.AsyncClient, path: str, **params: Any) -> list[dict[str, Any]]:
    """A whole list, three at a time."""
    items: list[dict[str, Any]] = []
    cursor: dict[str, str] = {}
    while True:
        answer = (await api.get(path, params={"limit": 3, **params, **cursor})).json()
        items += answer["items"]
        if not answer["nextCursor"]:
            return items
        cursor = {"cursor": answer["nextCursor"]}


async def test_signals_are_computed_once_and_read_with_what_they_rest_on(
    node: Node, events: Sequence[Event]
) -> None:
    """The profile that got worse has its signal, the one that stopped its alarm."""
    node.signals = SignalKeeper(node.database, Recorded(events))
    async with asking(node, await key_of(node, "operator")) as api:
        (first,) = (await api.post("/profiles/p0/signals")).json()["items"]
        (again,) = (await api.post("/profiles/p0/signals")).json()["items"]
        found = await pages(api, "/profiles/p0/signals")
        low = await pages(api, "/profiles/p0/signals", name="low_performance", metric="delivered")
        stopped = await pages(api, "/profiles/p1/signals", name="no_data")
    assert (first["namespace"], first["events"], first["isUpToDate"]) == ("sea", len(events), True)
    assert first["newSignals"] > 0
    assert (again["events"], again["newSignals"]) == (0, 0)
    assert first["streams"] == again["streams"]
    assert {one["metric"] for one in first["streams"]} == {"clicks", "delivered", "latency"}
    assert len({one["signalId"] for one in found}) == len(found)
    assert [one["toPosition"] for one in found] == sorted(
        (one["toPosition"] for one in found), reverse=True
    )
    assert low
    assert all(one in found and one["evidence"] >= one["threshold"] for one in low)
    assert low[0]["baseline"]["kind"] in ("peers", "own-history")
    assert low[0]["alarmLevel"] in ("warning", "critical")
    assert "cycles" in {one["metric"] for one in stopped}
    assert all(one["confidence"] is None and one["missed"] for one in stopped)


async def test_who_may_only_look_computes_nothing(node: Node, events: Sequence[Event]) -> None:
    """A viewer reads; computing needs an operator."""
    async with asking(node, await key_of(node, "viewer")) as api:
        answer = await api.post("/profiles/p0/signals")
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
        assert (await api.get("/profiles/p0/signals")).json()["items"] == []
    async with asking(node, await key_of(node, "operator")) as api:
        answer = await api.post("/profiles/p0/signals")
        assert (answer.status_code, answer.json()["items"][0]["events"]) == (200, 0)


async def test_a_node_feeds_what_its_cycles_come_to(node: Node) -> None:
    """Cycles run, an outcome is reported; without being asked the node has taken them in."""
    (ran,) = await node.orchestration.trigger_run_profiles(["p2-daily"])
    run_id = ran.cycle_id
    assert run_id
    await ended(node, run_id)
    outcome = {"namespace": "air", "outcomeId": "one", "metric": "clicks", "value": 0.5}
    async with asking(node, await key_of(node, "operator")) as api:
        answer = await api.post("/outcomes", json={**outcome, "runId": run_id})
        assert answer.status_code in (200, 201)

    async def fed() -> list[dict[str, Any]] | None:
        found = await node.database.fetch_all(
            b"SELECT profile_id, metric, revision FROM signal_stream"
            b" WHERE namespace = 'air' ORDER BY metric"
        )
        return found if len(found) == 3 else None

    streams = await until(fed, "the streams")
    assert [one["metric"] for one in streams] == ["clicks", "delivered", "latency"]
    assert {one["profile_id"] for one in streams} == {"p2"}
    assert all(re.fullmatch("[0-9a-f]{64}", one["revision"]) for one in streams)
    told = await node.database.fetch_one(
        b"SELECT metadata->>'revision' AS revision FROM telemetry_event"
        b" WHERE event_type = 'outcome_reported' AND run_id = %s",
        [run_id],
    )
    assert told == {"revision": node.configuration.active.revision}


async def test_how_long_a_cycle_took_that_a_halt_held_up_says_nothing(
    make_node: MakeNode, configure: Configure, receiver: Receiver, facts: Facts
) -> None:
    """Of six cycles in flight at a halt, and one after it, one says how long it took."""
    configure(run_profile(execution_policy=policy(overlap="allow")))
    node = await make_node(auth="on", dispatch_endpoints=(receiver.endpoint("out"),))
    done = asyncio.Event()

    async def slow(_: Arrival) -> web.Response:
        await done.wait()
        return web.Response()

    receiver.answers["/out"] = slow
    for _ in range(6):
        await node.orchestration.trigger_run_profiles(["daily"])
    await until(lambda: len(receiver.arrivals) == 6, "the requests")
    order = Order("brand", "ann", "key-1", "a test")
    await node.brake.halt(order, wait_seconds=0)
    done.set()
    await node.brake.resume(order)
    told = "SELECT metadata -> 'halted' AS halted FROM telemetry_event WHERE event_type = %s"
    await until(lambda: len(facts(told, "execution_finished")) == 6, "their ends")
    await run(node)
    assert [one["halted"] for one in facts(told, "execution_finished")].count(False) == 1
    await until(lambda: not facts("SELECT FROM telemetry_pending"), "the positions")
    async with asking(node, await key_of(node, "operator")) as api:
        (found,) = (await api.post("/profiles/nova/signals")).json()["items"]
    assert {one["metric"]: one["needed"] for one in found["streams"]} == {
        "delivered": 93,
        "latency": 99,
    }


async def test_another_namespaces_profile_is_one_that_is_not_there(
    node: Node, events: Sequence[Event]
) -> None:
    """Its signals, their number and their existence: the answer of an unknown profile."""
    node.signals = SignalKeeper(node.database, Recorded(events))
    async with asking(node, await key_of(node, "operator")) as api:
        assert (await api.post("/profiles/p0/signals")).status_code == 200
    async with asking(node, await key_of(node, "operator", namespaces=["air"])) as api:
        for ask in (api.get, api.post):
            answers = [await ask(f"/profiles/{one}/signals") for one in ("p0", "nobody")]
            assert [one.status_code for one in answers] == [404, 404]
            assert answers[0].text.replace("p0", "nobody") == answers[1].text
        answer = await api.get("/profiles/p0/signals", params={"namespace": "sea"})
        assert answer.status_code == 404


async def test_a_cursor_that_is_none_is_refused(node: Node) -> None:
    """What was not handed out as a cursor is a bad request."""
    async with asking(node, await key_of(node, "viewer")) as api:
        answer = await api.get("/profiles/p0/signals", params={"cursor": "WyIxIiwieCJd"})
        assert (answer.status_code, answer.json()["code"]) == (400, "request_invalid")


async def test_the_terminal_shows_streams_and_signals(
    node: Node, events: Sequence[Event], capsys: pytest.CaptureFixture[str]
) -> None:
    """What the API answers is shown: a line a stream, a line a signal, the newest in words."""
    node.signals = SignalKeeper(node.database, Recorded(events))
    async with asking(node, await key_of(node, "operator")) as api:
        _show_streams((await api.post("/profiles/p0/signals")).json()["items"])
        answer = (await api.get("/profiles/p0/signals", params={"metric": "delivered"})).json()
    _show_signals(answer)
    shown = capsys.readouterr().out
    assert "delivered" in shown
    assert "low_performance" in shown
    assert answer["items"][0]["recommendation"][:30] in " ".join(shown.split())
