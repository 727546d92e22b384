"""A hostile receiver beside a healthy one: only its own jobs feel it, and all is accounted for.

In every case some jobs go to the hostile endpoint first, then others to the healthy one. The
healthy jobs are all delivered while the hostile ones wait for their retries, which lie an hour
away. These are then made due at once, and what became of every attempt is reconciled with what
the hostile server saw.
"""

from __future__ import annotations

import asyncio
import random
import re
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from orbit.app import Node
from orbit.execution.connector import trusted
from orbit.payload import Payload
from orbit.settings import Endpoint
from tests.scenario.conftest import Configure, Facts, MakeNode, Receiver, ended, send, until
from tests.scenario.hostility import HOSTILE, NOT_IN_TIME, SENT_BYTES, Hostile, read_head, redirect
from tests.unit.certificates import Authority
from tests.unit.talking import OK, Server, always, reset, serving

HOSTILE_JOBS = 3
HEALTHY_JOBS = 8
CAP_SECONDS = 3600.0
METADATA = "http://169.254.169.254/latest/meta-data/"


@dataclass(frozen=True, slots=True)
class Scene:
    """A node with two endpoints, `well` and `hostile`, and all that can be asked of it."""

    configure: Configure
    make_node: MakeNode
    receiver: Receiver
    facts: Facts

    async def start(self, url: str, timeout_seconds: float = 60.0, **given: Any) -> Node:
        """The node; each of its jobs may be retried once."""
        self.configure()
        endpoints = (
            self.receiver.endpoint("well"),
            Endpoint(key="hostile", url=url, timeout_seconds=timeout_seconds),
        )
        waits = {
            "dispatch_retry_base_seconds": CAP_SECONDS,
            "dispatch_retry_cap_seconds": CAP_SECONDS,
        }
        node = await self.make_node(
            dispatch_endpoints=endpoints, **{"max_dispatch_retries": 1, **waits, **given}
        )
        assert node.dispatcher is not None
        queue = node.dispatcher._queue  # no draw may be so small that a retry is due in the test
        queue._policy = replace(queue._policy, draw=lambda: 0.9)
        return node

    def receipts(self) -> list[dict[str, Any]]:
        """Those of the hostile endpoint."""
        return self.facts(
            "SELECT * FROM delivery_receipt WHERE endpoint_key = 'hostile' ORDER BY job_id, attempt"
        )

    def leases(self) -> list[dict[str, Any]]:
        """Jobs of the hostile endpoint that are not done; how long each still waits."""
        return self.facts(
            "SELECT job_id, attempt, node_id, extract(epoch FROM due_at - orbit_now())::float8 "
            "AS wait_seconds FROM dispatch_lease WHERE endpoint_key = 'hostile'"
        )

    async def harm(self, node: Node) -> list[str]:
        """Jobs for the hostile endpoint, all begun, and then healthy ones, all delivered."""
        content = Payload(bytes(SENT_BYTES))
        cycles = [await trigger(node, content, "hostile") for _ in range(HOSTILE_JOBS)]
        await until(self._has_begun, "the first hostile attempts")
        healthy = [
            await trigger(node, Payload(b"%d" % number), "well") for number in range(HEALTHY_JOBS)
        ]
        for cycle in healthy:
            assert (await ended(node, cycle))["detail"]["delivered"] == 1
        arrived = sorted(arrival.body for arrival in self.receiver.at("/well"))
        assert arrived == sorted(b"%d" % number for number in range(HEALTHY_JOBS))
        return cycles

    def _has_begun(self) -> bool:
        begun = {row["job_id"] for row in self.leases() if row["attempt"] > 0}
        return len(begun | {row["job_id"] for row in self.receipts()}) == HOSTILE_JOBS

    async def retried(self, node: Node) -> None:
        """Returns when each hostile job's first attempt is over, and has made its retry due."""

        def are_waiting() -> bool:
            rows = self.leases()
            return len(rows) == HOSTILE_JOBS and not any(row["node_id"] for row in rows)

        await until(are_waiting, "the retries")
        assert all(0 < row["wait_seconds"] <= CAP_SECONDS for row in self.leases())
        self.facts(
            "UPDATE dispatch_lease SET due_at = orbit_now() "
            "WHERE endpoint_key = 'hostile' RETURNING job_id"
        )


async def trigger(node: Node, payload: Payload, key: str) -> str:
    """A raw cycle of one job; its id."""
    accepted = await node.orchestration.trigger_raw(payload=payload, endpoint_keys=[key])
    return accepted.cycle_id


@pytest.fixture
def scene(configure: Configure, make_node: MakeNode, receiver: Receiver, facts: Facts) -> Scene:
    """Not started yet."""
    return Scene(configure, make_node, receiver, facts)


def attempts_seen(server: Server) -> list[tuple[str, int]]:
    """The job and the attempt of each request that a server saw the head of."""
    heads = [request.partition(b"\r\n\r\n")[0].decode("latin-1") for request in server.requests]
    found = []
    for head in heads:
        job = re.search(r"(?i)^orbit-job-id: (\S+)", head, re.MULTILINE)
        attempt = re.search(r"(?i)^orbit-attempt: (\d+)", head, re.MULTILINE)
        assert job
        assert attempt
        found.append((job[1], int(attempt[1])))
    return sorted(found)


def assert_accounted_for(scene: Scene, server: Server, hostile: Hostile) -> None:
    """One receipt per attempt, as expected, and bytes left exactly where they were seen."""
    receipts = scene.receipts()
    attempts = 1 if hostile.outcome == "delivered" else 2
    by_job = Counter(row["job_id"] for row in receipts)
    assert sorted(by_job.values()) == [attempts] * HOSTILE_JOBS
    assert {(row["outcome"], row["status"]) for row in receipts} == {
        (hostile.outcome, hostile.status)
    }
    for row in receipts:
        assert re.search(hostile.error or "^$", row["error"] or ""), row["error"]
        assert len(row["answer"] or b"") <= 4096
        assert row["size"] == SENT_BYTES
    left = sorted(
        (row["job_id"], row["attempt"]) for row in receipts if row["outcome"] != "not_sent"
    )
    assert attempts_seen(server) == left


def assert_dead(scene: Scene, cause: str | None) -> None:
    """Every hostile job is a dead letter with the cause, after both of its attempts, or none is."""
    letters = scene.facts("SELECT endpoint_key, cause, attempts FROM dead_letter_dispatch")
    letter = {"endpoint_key": "hostile", "cause": cause, "attempts": 2}
    assert letters == ([] if cause is None else [letter] * HOSTILE_JOBS)
    assert scene.facts("SELECT FROM dispatch_lease") == []


async def prove(scene: Scene, url: str, server: Server, hostile: Hostile) -> None:
    """The whole case, against whatever stands at the URL."""
    node = await scene.start(url, hostile.timeout_seconds)
    cycles = await scene.harm(node)
    if hostile.outcome != "delivered":
        assert len(scene.leases()) == HOSTILE_JOBS, "the healthy jobs did not wait for these"
        await scene.retried(node)
    for cycle in cycles:
        detail = (await ended(node, cycle))["detail"]
        assert (detail["delivered"], detail["deadLettered"]) == (
            (1, 0) if hostile.cause is None else (0, 1)
        )
    assert_accounted_for(scene, server, hostile)
    assert_dead(scene, hostile.cause)


# --- what it answers ----------------------------------------------------------------------


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: hostile.name)
async def test_only_its_own_jobs_feel_a_hostile_receiver(scene: Scene, hostile: Hostile) -> None:
    """Whatever it does to a request, the lane beside it flows, and no attempt is forgotten."""
    server = Server()
    async with serving(hostile.talk(server), server):
        await prove(scene, server.url, server, hostile)


@pytest.mark.parametrize("status", [301, 302, 307])
@pytest.mark.parametrize("to", ["elsewhere", METADATA])
async def test_a_redirect_is_not_followed(scene: Scene, status: int, to: str) -> None:
    """It fails with its status; the place that it names never hears of the payload."""
    server, elsewhere = Server(), Server()
    async with serving(always(elsewhere, OK), elsewhere):
        hostile = redirect(status, elsewhere.url if to == "elsewhere" else to)
        async with serving(hostile.talk(server), server):
            await prove(scene, server.url, server, hostile)
        assert elsewhere.connections == 0


@pytest.mark.parametrize(
    ("value", "is_capped"),
    [("Thu, 01 Jan 2099 00:00:00 GMT", True), ("86400000", True), ("9" * 400, True),
     ("-1", False), ("soon", False), ("Thu, 01 Jan 1970 00:00:00 GMT", False)],
)  # fmt: skip
async def test_retry_after_can_only_delay_and_is_capped(
    scene: Scene, value: str, is_capped: bool
) -> None:
    """A wait of decades becomes the cap; what cannot be a wait leaves the retry's own delay."""
    server = Server()
    answer = f"HTTP/1.1 429 X\r\nRetry-After: {value}\r\nContent-Length: 0\r\n\r\n"
    async with serving(always(server, answer.encode()), server):
        node = await scene.start(
            server.url, dispatch_retry_base_seconds=60.0, dispatch_retry_cap_seconds=CAP_SECONDS
        )
        await scene.harm(node)
        waits = scene.facts(
            "SELECT extract(epoch FROM lease.due_at - receipt.created_at)::float8 AS seconds "
            "FROM dispatch_lease lease JOIN delivery_receipt receipt USING (namespace, job_id)"
        )
    seconds = [row["seconds"] for row in waits]
    assert len(seconds) == HOSTILE_JOBS
    if is_capped:
        assert seconds == pytest.approx([CAP_SECONDS] * HOSTILE_JOBS, abs=5)
    else:
        assert all(0 < one <= 60.0 for one in seconds)


async def test_the_beginning_of_an_answer_is_kept_as_it_came(scene: Scene) -> None:
    """Bytes that are no UTF-8 are in the receipt, and of a compressed answer what was sent."""
    answer = (
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\xff\xfe\x00\xc3"
    )
    server = Server()
    async with serving(always(server, answer), server):
        await scene.harm(await scene.start(server.url))
        await until(lambda: len(scene.receipts()) == HOSTILE_JOBS, "the receipts")
    assert [bytes(row["answer"]) for row in scene.receipts()] == [b"\xff\xfe\x00\xc3"] * 3


# --- connections --------------------------------------------------------------------------


@asynccontextmanager
async def full_backlog() -> AsyncIterator[str]:
    """The URL of a socket that listens, accepts nothing, and has no room for more."""
    waiting = [socket.socket() for _ in range(4)]
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        yield f"http://127.0.0.1:{full.getsockname()[1]}/"
    for one in waiting:
        one.close()


def not_sent(cause: str, error: str) -> Hostile:
    """No byte of any attempt left."""

    async def say_nothing(server: Server, reader: Any, writer: Any) -> None:
        await read_head(server, reader)

    return Hostile(cause, say_nothing, "not_sent", None, cause, error)


async def test_a_receiver_that_never_accepts(scene: Scene) -> None:
    """Its backlog is full: no connection in time, so nothing was sent."""
    async with full_backlog() as url:
        await prove(scene, url, Server(), not_sent("timeout", NOT_IN_TIME))


@pytest.mark.parametrize(
    ("url", "cause", "error"),
    [
        ("http://no-such-host.invalid/", "name not resolved", "."),
        (METADATA, "address refused", "a metadata address"),
        ("http://169.254.7.7/", "address refused", "link-local"),
        ("http://[fe80::1]/", "address refused", "link-local"),
    ],
)
async def test_an_address_that_cannot_be_gone_to(
    scene: Scene, url: str, cause: str, error: str
) -> None:
    """A name without an address, or an address that is refused: nothing was sent."""
    await prove(scene, url, Server(), not_sent(cause, error))


@pytest.mark.parametrize(
    ("address", "error"), [("169.254.169.254", "a metadata address"), ("fe80::1", "link-local")]
)
async def test_a_name_that_leads_to_a_forbidden_address(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, address: str, error: str
) -> None:
    """Whoever answers for the name decides nothing: where it leads is judged before connecting."""
    system = socket.getaddrinfo

    def answer(host: str, *given: Any, **more: Any) -> Any:
        return system(address if host == "rebound.example" else host, *given, **more)

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    url = "http://rebound.example/latest/meta-data/"
    await prove(scene, url, Server(), not_sent("address refused", error))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_private_addresses_are_refused_where_the_setting_says_so(
    scene: Scene, facts: Facts, host: str
) -> None:
    """In the URL or behind a name: the server sees no connection, the job says why."""
    server = Server()
    async with serving(always(server, OK), server):
        url = f"http://{host}:{server.port}/"
        node = await scene.start(url, private_addresses="refuse", max_dispatch_retries=0)
        cycle = await send(node, Payload(b"x"), endpoint_keys=["hostile"])
        assert server.connections == 0
    assert cycle["detail"]["deadLettered"] == 1
    [receipt] = scene.receipts()
    assert receipt["outcome"] == "not_sent"
    assert "is loopback" in receipt["error"]
    assert facts("SELECT cause FROM dead_letter_dispatch") == [{"cause": "address refused"}]


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Authority]:
    """An authority that the node takes for one of the system's."""
    found = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(found.file))
    trusted.cache_clear()
    yield found
    trusted.cache_clear()


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"name": "localhost", "days": -1}, "certificate has expired"),
        ({"name": "localhost", "is_own": True}, "self[- ]signed certificate"),
        ({"name": "other.example"}, "certificate is not valid for 'localhost'"),
    ],
    ids=["expired", "self-signed", "another name"],
)
async def test_a_certificate_that_proves_nothing(
    scene: Scene, authority: Authority, given: dict[str, Any], error: str
) -> None:
    """TLS fails before a byte of the request leaves, and the receipt says why."""
    server = Server()
    async with serving(always(server, OK), server, authority.server(**given)):
        url = f"https://localhost:{server.port}/"
        await prove(scene, url, server, not_sent("tls", error))


async def test_a_certificate_that_proves_the_name(scene: Scene, authority: Authority) -> None:
    """The other three fail for what is wrong with them, not for the authority."""
    server = Server()
    async with serving(always(server, OK), server, authority.server("localhost")):
        await scene.harm(await scene.start(f"https://localhost:{server.port}/"))
        await until(lambda: len(scene.receipts()) == HOSTILE_JOBS, "the receipts")
    assert {row["outcome"] for row in scene.receipts()} == {"delivered"}


def _capricious(server: Server, chance: random.Random) -> Callable[[Any, Any], Any]:
    """Ends connections at a moment of chance: before, amid or after a request, or its answer."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            caprice = chance.randrange(8)
            if caprice == 0:
                break
            await server.read(reader)
            if caprice == 1:
                break
            writer.write(OK[:9] if caprice == 2 else OK)
            await writer.drain()
            if caprice <= 3:
                break
        if chance.random() < 0.5:
            reset(writer)

    return talk


async def test_connections_that_end_at_random_are_never_sent_on_twice(scene: Scene) -> None:
    """Every attempt arrives once at most, none unrecorded, and every job in the end."""
    server, count = Server(), 40
    quick = {"dispatch_retry_base_seconds": 0.01, "dispatch_retry_cap_seconds": 0.02}
    async with serving(_capricious(server, random.Random(7)), server):
        node = await scene.start(server.url, max_dispatch_retries=60, **quick)
        cycles = [await trigger(node, Payload(b"x"), "hostile") for _ in range(count)]
        await deliver_beside(node)
        for cycle in cycles:
            assert (await ended(node, cycle))["detail"]["delivered"] == 1
    receipts = scene.receipts()
    seen = attempts_seen(server)
    assert len(seen) == len(set(seen)), "no attempt arrived twice"
    by_outcome: dict[str, set[tuple[str, int]]] = {}
    for row in receipts:
        by_outcome.setdefault(row["outcome"], set()).add((row["job_id"], row["attempt"]))
    assert by_outcome.keys() <= {"delivered", "unknown", "not_sent"}
    assert by_outcome["delivered"] <= set(seen)
    assert set(seen) <= by_outcome["delivered"] | by_outcome["unknown"]
    assert len(by_outcome["delivered"]) == count
    assert by_outcome["unknown"], "some connections ended with a request on them"


async def deliver_beside(node: Node) -> None:
    """The lane beside delivers."""
    assert (await send(node, Payload(b"x"), endpoint_keys=["well"]))["detail"]["delivered"] == 1
