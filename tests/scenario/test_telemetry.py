"""Telemetry over the API: replayed, streamed, bounded to namespaces; outcomes reported once."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from itertools import count
from typing import Any

import httpx
import psutil
import pytest
import uvicorn

from orbit.api import routes_telemetry, streams
from orbit.api.server import http_config
from orbit.app import Node
from orbit.database.pool import Database
from orbit.governance.actor import actor_here
from orbit.payload import Payload
from orbit.reading.telemetry import window
from orbit.services.janitor import Janitor
from orbit.telemetry.catalogue import EventType
from orbit.telemetry.emission import Event, emit
from orbit.telemetry.retention import Retention, retain
from tests.scenario.access import asking, bearer, key_of
from tests.scenario.conftest import Facts, MakeNode, SetTime, send, until


async def tell(node: Node, count: int, namespace: str = "brand-a") -> int:
    """Emits events, and waits until they have their positions; the last one."""
    async with node.database.transaction() as connection:
        one = Event(namespace, EventType.OUTCOME_REPORTED, {"metric": "m" * 200, "value": 1})
        await emit(connection, *[one] * count)

    async def numbered() -> Any:
        row = await node.database.fetch_one(
            b"SELECT NOT EXISTS (SELECT FROM telemetry_pending)"
            b" AS is_done, last_position FROM telemetry_sequencer"
        )
        return row["last_position"] if row and row["is_done"] else None

    return int(await until(numbered, "the positions"))


@asynccontextmanager
async def serving(node: Node) -> AsyncIterator[int]:
    """The node's API on a socket; its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(http_config(node.settings, node))
    task = asyncio.create_task(server.serve(sockets=[listener]))
    yield listener.getsockname()[1]
    server.force_exit = server.should_exit = True
    await task


async def frames(lines: AsyncIterator[str], count: int) -> list[tuple[int, dict[str, Any]]]:
    """So many frames of a stream: id and event."""
    found: list[tuple[int, dict[str, Any]]] = []
    position = 0
    async for line in lines:
        name, _, text = line.partition(": ")
        if name == "id":
            position = int(text)
        elif name == "data":
            found.append((position, json.loads(text)))
            if len(found) == count:
                return found
    return found


async def test_a_replay_pages_through_everything_once(make_node: MakeNode) -> None:
    """Pages of any size give the same dense positions, as CloudEvents."""
    node = await make_node()
    last = await tell(node, 25)
    async with asking(node) as client:
        found: list[dict[str, Any]] = []
        after = 0
        while after < last:
            page = (await client.get("/telemetry", params={"after": after, "limit": 4})).json()
            found += page["items"]
            after = page["position"]
    assert [one["position"] for one in found] == list(range(1, last + 1))
    assert len({one["id"] for one in found}) == last
    needed = {"specversion", "id", "source", "type", "time", "data", "position"}
    assert all(needed <= one.keys() for one in found)


async def test_a_bounded_key_sees_its_namespaces_only(make_node: MakeNode) -> None:
    """Neither a page nor a named namespace shows what does not exist for the key."""
    node = await make_node(auth="on")
    await tell(node, 3, "brand-a")
    await tell(node, 5, "brand-b")
    key = await key_of(node, "viewer", namespaces=["brand-b"])
    async with asking(node, key) as client:
        own = (await client.get("/telemetry")).json()["items"]
        other = (await client.get("/telemetry", params={"namespace": "brand-a"})).json()["items"]
    assert [one["source"] for one in own] == ["/namespaces/brand-b"] * 5
    assert other == []


async def test_a_stream_goes_on_after_the_last_event_id(make_node: MakeNode) -> None:
    """What was sent before comes once, what happens later comes by itself."""
    node = await make_node()
    last = await tell(node, 5)
    async with (
        serving(node) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
        client.stream("GET", "/telemetry/stream", headers={"Last-Event-ID": "2"}) as answer,
    ):
        lines = answer.aiter_lines()
        before = await frames(lines, last - 2)
        later = await tell(node, 2)
        after = await frames(lines, 2)
    assert [position for position, _ in before] == list(range(3, last + 1))
    assert [position for position, _ in after] == [later - 1, later]
    assert all(position == event["position"] for position, event in before + after)


async def test_a_stream_is_taken_up_again_before_its_first_event(make_node: MakeNode) -> None:
    """It begins with the place where it is: what happens while the client is away is not lost."""
    node = await make_node()
    last = await tell(node, 3)
    async with (
        serving(node) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        async with client.stream("GET", "/telemetry/stream") as answer:
            assert await anext(answer.aiter_lines()) == f"id: {last}"
        later = await tell(node, 2)
        back = {"Last-Event-ID": str(last)}
        async with client.stream("GET", "/telemetry/stream", headers=back) as answer:
            found = await frames(answer.aiter_lines(), 2)
    assert [position for position, _ in found] == [later - 1, later]


async def test_a_filtered_stream_says_how_far_it_has_looked(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its place goes on though nothing is for it: it ages into no gap."""
    monkeypatch.setattr(streams, "_BEAT_SECONDS", 0.0)
    node = await make_node()
    await tell(node, 1, "brand-a")
    async with (
        serving(node) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
        client.stream("GET", "/telemetry/stream?after=0&namespace=brand-a") as answer,
    ):
        lines = answer.aiter_lines()
        await frames(lines, 1)
        last = await tell(node, 5, "brand-b")
        async with asyncio.timeout(30):
            while await anext(lines) != f"id: {last}":
                pass


async def test_who_comes_back_too_late_is_told(make_node: MakeNode, facts: Facts) -> None:
    """A stream begins by saying that what comes next is not kept any more; else it says nothing."""
    facts("UPDATE telemetry_sequencer SET last_position = 500 RETURNING 1")
    node = await make_node()
    last = await tell(node, 3)
    async with (
        serving(node) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        for after, expected in ((400, "event: gap"), (500, "id: 501"), (last, f"id: {last}")):
            async with client.stream("GET", f"/telemetry/stream?after={after}") as answer:
                lines = answer.aiter_lines()
                assert await anext(lines) == expected
                if expected == "event: gap":
                    assert await anext(lines) == 'data: {"firstPosition":501}'
                    assert await anext(lines) == "id: 500"
                    assert (await frames(lines, 1))[0][0] == 501


@pytest.fixture
async def aged(make_node: MakeNode, set_time: SetTime) -> Node:
    """A node with six events of a week that is over for long, and four of now."""
    set_time(datetime(2026, 1, 7, tzinfo=UTC))
    node = await make_node()
    assert await tell(node, 6 - await tell(node, 1)) == 6
    set_time(datetime(2026, 3, 4, tzinfo=UTC))
    await Janitor(node.database, fact_retention_days=0).run_once()
    assert await tell(node, 4) == 10
    return node


def dropping(module: Any, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Lets retention pass right before a module's call for a window, the first being 1."""
    calls = count(1)

    async def late(database: Database, *given: Any, **named: Any) -> Any:
        if next(calls) == call:
            assert (await retain(database, Retention(30))).dropped
        return await window(database, *given, **named)

    monkeypatch.setattr(module, "window", late)


async def test_a_page_tells_of_what_is_dropped_meanwhile(
    aged: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`firstPosition` is of the moment in which the events were read."""
    dropping(routes_telemetry, monkeypatch, 1)
    async with asking(aged) as client:
        page = (await client.get("/telemetry", params={"after": 2})).json()
    assert [one["position"] for one in page["items"]] == [7, 8, 9, 10]
    assert (page["firstPosition"], page["position"], page["lastPosition"]) == (7, 10, 10)


async def test_a_stream_tells_of_what_is_dropped_meanwhile(
    aged: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader in the middle is told of the gap where it is, once."""
    monkeypatch.setattr(streams, "_PAGE", 2)
    dropping(streams, monkeypatch, 3)
    async with (
        serving(aged) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
        client.stream("GET", "/telemetry/stream?after=0") as answer,
    ):
        lines = answer.aiter_lines()
        assert [position for position, _ in await frames(lines, 4)] == [1, 2, 3, 4]
        await anext(lines)
        assert [await anext(lines) for _ in range(3)] == [
            "event: gap",
            'data: {"firstPosition":7}',
            "id: 6",
        ]
        assert [position for position, _ in await frames(lines, 4)] == [7, 8, 9, 10]


async def test_a_page_beyond_what_was_given_is_refused(make_node: MakeNode) -> None:
    """After a restore a reader is ahead: it is told, and does not pass over what comes next."""
    node = await make_node()
    last = await tell(node, 3)
    async with asking(node) as client:
        assert (await client.get("/telemetry", params={"after": last})).status_code == 200
        for after in (last + 1, last + 10):
            answer = await client.get("/telemetry", params={"after": after})
            assert (answer.status_code, answer.json()["code"]) == (409, "position_ahead")
            assert f"the last position is {last}" in answer.json()["detail"]


async def test_a_stream_beyond_what_was_given_begins_anew(make_node: MakeNode) -> None:
    """It says so, and then misses nothing, though positions are given again."""
    node = await make_node()
    last = await tell(node, 3)
    ahead = {"Last-Event-ID": str(last + 10)}
    async with (
        serving(node) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
        client.stream("GET", "/telemetry/stream", headers=ahead) as answer,
    ):
        lines = answer.aiter_lines()
        assert await anext(lines) == "event: reset"
        assert await anext(lines) == f'data: {{"lastPosition":{last}}}'
        await tell(node, 5)
        found = await frames(lines, 5)
    assert [position for position, _ in found] == list(range(last + 1, last + 6))


async def test_a_stream_is_told_when_the_database_goes_back(
    make_node: MakeNode, facts: Facts
) -> None:
    """A failover that lost what was committed ends no stream that waits: it is told there."""
    node = await make_node()
    last = await tell(node, 1)
    given = "UPDATE telemetry_sequencer SET last_position = %s RETURNING 1"
    facts(given, 500)
    async with (
        serving(node) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
        client.stream("GET", "/telemetry/stream?after=500") as answer,
    ):
        lines = answer.aiter_lines()
        await anext(lines)
        facts(given, last)
        await anext(lines)
        assert await anext(lines) == "event: reset"
        assert await anext(lines) == f'data: {{"lastPosition":{last}}}'
        await tell(node, 2)
        assert [position for position, _ in await frames(lines, 2)] == [last + 1, last + 2]


async def test_a_stream_of_many_pages_misses_and_doubles_nothing(make_node: MakeNode) -> None:
    """Pages are read ahead, and a namespace's own go on while others' events come between."""
    node = await make_node()
    third = await tell(node, 3000, "brand-a")
    other = await tell(node, 5001, "brand-b")
    last = await tell(node, 1500, "brand-a")
    async with (
        serving(node) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
        client.stream("GET", "/telemetry/stream?after=0") as whole,
        client.stream("GET", "/telemetry/stream?after=0&namespace=brand-a") as own,
    ):
        lines = own.aiter_lines()
        everything, before = await asyncio.gather(
            frames(whole.aiter_lines(), last), frames(lines, 4500)
        )
        await tell(node, 7, "brand-b")
        latest = await tell(node, 2, "brand-a")
        after = await frames(lines, 2)
    assert [position for position, _ in everything] == list(range(1, last + 1))
    assert [position for position, _ in before] == [
        *range(third - 2999, third + 1),
        *range(other + 1, last + 1),
    ]
    assert [position for position, _ in after] == [latest - 1, latest]
    assert {event["source"] for _, event in before + after} == {"/namespaces/brand-a"}


async def test_a_revoked_key_ends_its_stream(make_node: MakeNode) -> None:
    """A stream is over soon after its key."""
    node = await make_node(auth="on")
    key = await key_of(node, "viewer")
    last = await tell(node, 1)
    async with (
        serving(node) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
        client.stream("GET", "/telemetry/stream?after=0", headers=bearer(key)) as answer,
    ):
        lines = answer.aiter_lines()
        assert answer.status_code == 200
        assert len(await frames(lines, last)) == last
        await node.keys.revoke(actor_here(), key.key_id, None)
        async with asyncio.timeout(60):
            assert await frames(lines, 1_000_000) == []


async def test_a_slow_client_is_dropped(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who takes nothing is cut off before the end: the place is free, and the socket is gone."""
    monkeypatch.setattr(streams, "_TAKING_SECONDS", 5.0)
    monkeypatch.setattr(streams, "MOST_STREAMS", 1)
    node = await make_node()
    await tell(node, 40_000)
    async with (
        serving(node) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(b"GET /telemetry/stream?after=0 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await reader.readline()

        async def refused() -> bool:
            async with client.stream("GET", "/telemetry/stream?after=0") as answer:
                return answer.status_code == 429

        await until(refused, "the one place taken")

        async def taken() -> bool:
            return not await refused()

        await until(taken, "the place free again")
        ours = writer.get_extra_info("sockname")

        def is_gone() -> bool:
            return all(one.raddr != ours for one in psutil.Process().net_connections("tcp"))

        await until(is_gone, "the server's side of the socket closed")
        writer.close()


async def test_an_outcome_is_told_once(make_node: MakeNode) -> None:
    """The same report again changes nothing, another under its id is refused."""
    node = await make_node()
    cycle = await send(node, Payload(b"{}", "application/json"))
    body = {
        "namespace": cycle["namespace"],
        "outcomeId": "o-1",
        "metric": "quality",
        "value": 0.75,
        "runId": cycle["cycle_id"],
    }
    async with asking(node) as client:
        answers = [(await client.post("/outcomes", json=body)).json() for _ in range(2)]
        other = await client.post("/outcomes", json=body | {"value": 0.5})
        await tell(node, 1)
        items = (await client.get("/telemetry", params={"limit": 5000})).json()["items"]
    told = [one["data"] for one in items if one["data"].get("metric") == "quality"]
    assert [one["isNew"] for one in answers] == [True, False]
    assert other.json()["code"] == "idempotency_key_reused"
    assert [(one["value"], one["runId"]) for one in told] == [(0.75, cycle["cycle_id"])]


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"value": 1.5}, "request_invalid"),
        ({"value": -0.1}, "request_invalid"),
        ({"jobId": "00000000-0000-7000-8000-000000000001"}, "request_invalid"),
        ({"itemIndex": 7}, "not_found"),
        ({"namespace": "another"}, "not_found"),
    ],
)
async def test_an_outcome_that_is_none_is_refused(
    make_node: MakeNode, given: dict[str, Any], code: str
) -> None:
    """Scores out of range, and what an outcome cannot be of, are refused and leave no event."""
    node = await make_node()
    cycle = await send(node, Payload(b"{}", "application/json"))
    body = {
        "namespace": cycle["namespace"],
        "outcomeId": "o-1",
        "metric": "quality",
        "value": 0.5,
        "runId": cycle["cycle_id"],
    }
    async with asking(node) as client:
        answer = await client.post("/outcomes", json=body | given)
        huge = await client.post(
            "/outcomes",
            content=json.dumps(body).replace("0.5", "1e999"),
            headers={"Content-Type": "application/json"},
        )
    assert answer.json()["code"] == code
    assert huge.json()["code"] == "request_invalid"
    assert await node.database.fetch_all(b"SELECT FROM outcome_key") == []
