"""Nothing of a halted namespace arrives, from any node: three under load, and one that froze.

The receiver is in the test's own process, so that what it saw and when a halt answered are told
by one clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import random
import signal
import socket
import ssl
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from tests.chaos.harness import NodeProcess, RunProfileShape, Scene, eventually, scene
from tests.chaos.steps import LAST_WORD
from tests.unit.certificates import Authority

log = logging.getLogger(__name__)  # figures: pytest --log-cli-level=info

HALTS = 100  # of each of two namespaces
_LEASE_SECONDS = "6"  # a halt is written sooner after a node froze, on a busy machine too
SPACES = ("east", "west")
SHAPES = [
    RunProfileShape(f"in-{space}", space, steps=(0, 1, 0), items=100, endpoint_keys=("alpha",))
    for space in SPACES
]


async def ask(node: NodeProcess, path: str, body: dict[str, Any]) -> httpx.Response:
    """One request to a node."""
    async with httpx.AsyncClient(base_url=node.address, timeout=120) as client:
        return await client.post(path, json=body)


async def halt(node: NodeProcess, space: str, seconds: float = 60) -> dict[str, Any]:
    """Halts a namespace through a node."""
    body = {"reason": "a test", "waitSeconds": seconds}
    answer = await ask(node, f"/governance/namespaces/{space}/halt", body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def resume(node: NodeProcess, space: str) -> None:
    """Lets it go on."""
    answer = await ask(node, f"/governance/namespaces/{space}/resume", {"reason": "a test"})
    assert answer.status_code == 200, answer.text


class Load:
    """Keeps jobs waiting in both namespaces, and knows which cycle is of which."""

    def __init__(self, stage: Scene, owner_dsn: str) -> None:
        self._stage, self._owner_dsn = stage, owner_dsn
        self.spaces: dict[str, str] = {}
        self.is_over = False

    async def run(self) -> None:
        """Triggers what runs low, through any node."""
        async with await psycopg.AsyncConnection.connect(
            self._owner_dsn, autocommit=True
        ) as connection:
            for node in itertools.cycle(self._stage.nodes.alive):
                if self.is_over:
                    return
                for space in SPACES:
                    cursor = await connection.execute(
                        "SELECT count(*) FROM cycle_lease WHERE namespace = %s", [space]
                    )
                    row = await cursor.fetchone()
                    if row is not None and row[0] < 3:
                        await self._trigger(node, space)
                await asyncio.sleep(0.01)

    async def _trigger(self, node: NodeProcess, space: str) -> None:
        answer = await ask(node, "/run-profiles/trigger", {"runProfileIds": [f"in-{space}"]})
        if answer.status_code == 409:
            assert answer.json()["code"] == "namespace_halted"
            return
        (item,) = answer.json()["items"]
        self.spaces[item["cycleRunId"]] = space


async def test_nothing_arrives_between_quiesced_and_resume(
    dsn: str, owner_dsn: str, tmp_path: Path
) -> None:
    """Three nodes under load, 200 halts over two namespaces, counted at the receiver.

    By the time at which a request came, and by the epoch that it was claimed under: none from
    before a halt comes once that was quiesced, not even after the resumption.
    """
    chance = random.Random(11)
    quiet: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    in_flight = 0

    async def brake(stage: Scene, space: str) -> None:
        nonlocal in_flight
        for number in range(HALTS):
            node = stage.nodes.alive[number % 3]
            seen = len(stage.receiver.arrivals)
            await eventually(_more(stage, seen + chance.randrange(1, 20)), "load")
            answer = await halt(node, space)
            began = time.monotonic()
            assert answer["quiesced"], answer
            assert all(one["outcome"] for one in answer["inFlight"])
            in_flight += answer["inFlightCount"]
            assert answer["epoch"] == number + 1
            await asyncio.sleep(chance.random() * 0.1)  # how long it stays halted
            quiet[space].append((began, time.monotonic()))
            await resume(stage.nodes.alive[(number + 1) % 3], space)

    async with scene(tmp_path, SHAPES, dsn, ORBIT_LEASE_SECONDS="5") as stage:
        stage.receiver.pause_seconds = 0.02
        for _ in range(3):
            await stage.nodes.start()
        load = Load(stage, owner_dsn)
        loading = asyncio.create_task(load.run())
        await asyncio.gather(*[brake(stage, space) for space in SPACES])
        load.is_over = True
        await loading
        arrivals = list(stage.receiver.arrivals)
    late = [
        arrival
        for arrival in arrivals
        for began, ended in quiet[load.spaces[arrival.cycle_id]]
        if began < arrival.at < ended
    ]
    assert late == []
    outdated = [
        arrival
        for arrival in arrivals
        if arrival.epoch
        < sum(began < arrival.at for began, _ in quiet[load.spaces[arrival.cycle_id]])
    ]
    assert outdated == []
    assert max(arrival.epoch for arrival in arrivals) >= HALTS - 1
    assert sum(map(len, quiet.values())) == HALTS * len(SPACES)
    assert in_flight > HALTS, "the halts met with nothing"
    log.info("%d arrivals, %d in flight when halted, 0 late", len(arrivals), in_flight)


def _more(stage: Scene, number: int) -> Any:
    async def have_arrived() -> bool:
        return len(stage.receiver.arrivals) >= number

    return have_arrived


class SilentServer:
    """Takes connections, and lets TLS begin only when it is told to; keeps what then comes."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.may_speak, self.accepted = threading.Event(), 0
        self.ends: list[bytes] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.may_speak.set()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        self.may_speak.wait()
        found = b""
        try:
            with self._context.wrap_socket(connection, server_side=True) as secure:
                while chunk := secure.recv(65536):
                    found += chunk
                    if b"\r\n\r\n" in found:
                        secure.sendall(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
                        break
        except OSError:  # the node's end of it is gone: what was said until then counts
            pass
        self.ends.append(found)


@pytest.mark.parametrize("what", ["job", "step"])
async def test_a_node_that_froze_before_its_first_byte_never_sends_it(
    dsn: str, tmp_path: Path, what: str
) -> None:
    """SIGSTOP while TLS waits, longer than the lease: halted and quiesced, it wakes up too late."""
    authority = Authority(tmp_path)
    server = SilentServer(authority.server("localhost"))
    url = f"https://localhost:{server.port}/in"
    endpoints = json.dumps([{"key": "alpha", "url": url, "timeout_seconds": 60}])
    shape = RunProfileShape("only", "east", steps=(0, 0, 0), endpoint_keys=("alpha",))
    given = {"ORBIT_DISPATCH_ENDPOINTS": endpoints, "SSL_CERT_FILE": str(authority.file)}
    async with scene(tmp_path, [shape], dsn, ORBIT_LEASE_SECONDS=_LEASE_SECONDS, **given) as stage:
        if what == "step":
            _add_http_step(tmp_path, url)
        frozen = await stage.nodes.start()
        await stage.client.trigger("only")

        async def is_connected() -> bool:
            return server.accepted >= 1

        await eventually(is_connected, "a connection")
        other = await stage.nodes.start()  # first: it may take longer to start than a lease lasts
        frozen.signal(signal.SIGSTOP)
        answer = await halt(other, "east")
        assert answer["quiesced"], answer
        assert [one["outcome"] for one in answer["inFlight"]] == [
            "unknown" if what == "job" else "released"
        ]
        server.may_speak.set()
        frozen.signal(signal.SIGCONT)

        async def has_ended() -> bool:
            return bool(server.ends)

        await eventually(has_ended, "the end of the frozen node's connection")
        assert server.ends[0] == b"", "the request left after all"
        await resume(other, "east")

        async def has_arrived() -> bool:
            return any(b"Orbit-Attempt" in end for end in server.ends)

        await eventually(has_arrived, "the request, after the resumption")
    server.close()
    sent = [end for end in server.ends if end]
    if what == "job":
        assert all(b"Orbit-Attempt: 2\r\n" in end for end in sent)


async def test_a_node_that_froze_longer_than_its_lease_does_not_send_afterwards(
    dsn: str, tmp_path: Path
) -> None:
    """Nobody halted, so its own clock alone tells it; another node has the job, and sends it."""
    authority = Authority(tmp_path)
    server = SilentServer(authority.server("localhost"))
    url = f"https://localhost:{server.port}/in"
    endpoints = json.dumps([{"key": "alpha", "url": url, "timeout_seconds": 60}])
    shape = RunProfileShape("only", "east", steps=(0, 0, 0), endpoint_keys=("alpha",))
    given = {"ORBIT_DISPATCH_ENDPOINTS": endpoints, "SSL_CERT_FILE": str(authority.file)}

    async def are_connected() -> bool:
        return server.accepted >= len(stage.nodes.alive)

    async def have_ended() -> bool:
        return len(server.ends) >= 2 and any(server.ends)

    async with scene(tmp_path, [shape], dsn, ORBIT_LEASE_SECONDS=_LEASE_SECONDS, **given) as stage:
        frozen = await stage.nodes.start()
        await stage.client.trigger("only")
        await eventually(are_connected, "a connection")
        frozen.signal(signal.SIGSTOP)
        await stage.nodes.start()
        await eventually(are_connected, "the connection of who took it over")
        server.may_speak.set()
        frozen.signal(signal.SIGCONT)
        await eventually(have_ended, "the end of both connections")
    server.close()
    assert not [end for end in server.ends if b"Orbit-Attempt: 1\r\n" in end]


class SlowReader:
    """Takes connections and little of what comes; reads to the end when it is told to."""

    def __init__(self) -> None:
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self.port = self._listener.getsockname()[1]
        self.may_read, self.begun = threading.Event(), 0
        self.ends: list[tuple[bytes, bool]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.may_read.set()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        found = connection.recv(4096)
        self.begun += 1
        self.may_read.wait()
        with connection, contextlib.suppress(OSError):
            while not found.endswith(LAST_WORD) and (part := connection.recv(65_536)):
                found += part
            connection.sendall(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        self.ends.append((found[:4096], found.endswith(LAST_WORD)))


@pytest.mark.parametrize("size", [60_000, 6_000_000])
@pytest.mark.parametrize("what", ["job", "step"])
async def test_a_node_that_froze_amid_a_body_does_not_complete_it(
    dsn: str, tmp_path: Path, what: str, size: int
) -> None:
    """SIGSTOP amid the body, longer than the lease: quiesced, and the rest never comes."""
    server = SlowReader()
    url = f"http://127.0.0.1:{server.port}/in"
    endpoints = json.dumps([{"key": "alpha", "url": url, "timeout_seconds": 60}])
    shape = RunProfileShape("only", "east", steps=(0, 0, 0), endpoint_keys=("alpha",))
    given = {"ORBIT_DISPATCH_ENDPOINTS": endpoints, "ORBIT_LEASE_SECONDS": _LEASE_SECONDS}
    async with scene(tmp_path, [shape], dsn, **given) as stage:
        _add_large_steps(tmp_path, size, url if what == "step" else None)
        frozen = await stage.nodes.start()
        await stage.client.trigger("only")

        async def is_begun() -> bool:
            return server.begun >= 1

        await eventually(is_begun, "the beginning of a request")
        other = await stage.nodes.start()  # first: it may take longer to start than a lease lasts
        frozen.signal(signal.SIGSTOP)
        answer = await halt(other, "east")
        assert answer["quiesced"], answer
        frozen.signal(signal.SIGCONT)
        server.may_read.set()

        async def has_ended() -> bool:
            return bool(server.ends)

        await eventually(has_ended, "the end of the frozen node's request")
        assert [is_whole for _, is_whole in server.ends] == [False]
        await resume(other, "east")

        async def has_arrived() -> bool:
            return any(is_whole for _, is_whole in server.ends)

        await eventually(has_arrived, "the whole request, after the resumption")
    server.close()
    if what == "job":
        assert b"Orbit-Epoch: 0\r\n" in server.ends[0][0]
        assert b"Orbit-Epoch: 1\r\n" in server.ends[1][0]


def _add_large_steps(folder: Path, size: int, url: str | None) -> None:
    """A payload of so many bytes, and then a step at an address, if there is one."""
    file = folder / "config" / "runProfiles.json"
    document = json.loads(file.read_text())
    (run_profile,) = document["run_profiles"]
    swell = {"use": "tests.chaos.steps:swell", "options": {"size": size}}
    steps = [swell] if url is None else [swell, {"use": "http", "url": url, "timeout_seconds": 60}]
    run_profile["execution_policy"]["tiers"]["tier1"] = steps
    file.write_text(json.dumps(document))


def _add_http_step(folder: Path, url: str) -> None:
    file = folder / "config" / "runProfiles.json"
    document = json.loads(file.read_text())
    (run_profile,) = document["run_profiles"]
    step = {"use": "http", "url": url, "timeout_seconds": 60}
    run_profile["execution_policy"]["tiers"]["tier1"] = [step]
    file.write_text(json.dumps(document))
