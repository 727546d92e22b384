"""Kill -9 at every point of a send, with what receiver and database say reconciled.

Points inside the node are boundaries (boundaries.py). Points on the wire are the receiver's: it
reads as much of the first request as the point says, kills the node, and then takes in what had
left by that time: if the point is before the body's end, that is not all of it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psycopg
import pytest

from orbit.canonical import sha256_hex
from tests.chaos.harness import NodeProcess, Nodes, scene
from tests.chaos.proof import Evidence, finished, read_evidence
from tests.unit.talking import OK

BODY = random.Random(3).randbytes(8 << 20)
CONTENT_TYPE = "application/octet-stream; part=1"


@dataclass(frozen=True, slots=True)
class Point:
    """Where the node dies: at a boundary of its own, or when so many bytes have been read.

    `heads` and `wholes`: of the attempt that is cut off, what the receiver gets to see.
    """

    name: str
    boundary: tuple[str, str] | None = None
    body_bytes: int | None = None
    heads: int = 1
    wholes: int = 1
    is_recorded: bool = False


POINTS = (
    Point("before its claim's commit", ("claim_job", "before"), heads=0, wholes=0),
    Point("before connecting", ("send", "before"), heads=0, wholes=0),
    Point("after the head left", body_bytes=0, wholes=0),
    Point("amid the body", body_bytes=1 << 20, wholes=0),
    Point("after the body left", body_bytes=len(BODY)),
    Point("after the answer came", ("send", "after")),
    Point("before the receipt's commit", ("receipt", "before")),
    Point("after the receipt's commit", ("receipt", "after"), is_recorded=True),
)
# A claim that was never committed opened no attempt: the next owner's is the first.
UNOPENED = POINTS[0]


@dataclass(slots=True)
class Striker:
    """A receiver that kills `victim` in its first request, if a point says how far in."""

    body_bytes: int | None
    victim: NodeProcess | None = None
    url: str = ""
    cut_bytes: int | None = None
    heads: list[tuple[str, int]] = field(default_factory=list)
    wholes: list[tuple[str, int, str]] = field(default_factory=list)

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                await self._serve(reader, writer)
        writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        who = _header(head, "Orbit-Job-Id"), int(_header(head, "Orbit-Attempt"))
        assert _header(head, "Idempotency-Key") == _header(head, "webhook-id") == who[0]
        assert _header(head, "Content-Type") == CONTENT_TYPE
        is_first, size = not self.heads, int(_header(head, "Content-Length"))
        self.heads.append(who)
        early = self.body_bytes if is_first and self.body_bytes is not None else size
        body = await reader.readexactly(early)
        if early == size:
            self.wholes.append((*who, sha256_hex(body)))
        if is_first and self.body_bytes is not None:
            assert self.victim is not None
            await self.victim.kill()
            self.cut_bytes = early + len(await reader.read())
            raise ConnectionAbortedError
        writer.write(OK)
        await writer.drain()


def _header(head: str, name: str) -> str:
    found = re.search(rf"^{name}: (.*)\r$", head, re.MULTILINE)
    assert found, f"{name} is missing"
    return found[1]


@asynccontextmanager
async def striking(point: Point) -> AsyncIterator[Striker]:
    """The receiver on a free port."""
    striker = Striker(point.body_bytes)
    listener = socket.create_server(("127.0.0.1", 0))
    # A small window: else the kernels' buffers may take the whole body before anybody reads it.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    server = await asyncio.start_server(striker.talk, sock=listener, limit=1 << 16)
    striker.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/in"
    yield striker
    server.close()


async def _send(node: NodeProcess) -> None:
    """Triggers one cycle of one job; the node may die before its answer is out."""
    body = {
        "payloadBase64": base64.b64encode(BODY).decode(),
        "contentType": CONTENT_TYPE,
        "endpointKeys": ["in"],
    }
    with contextlib.suppress(httpx.TransportError):
        async with httpx.AsyncClient(timeout=60) as client:
            answer = await client.post(f"{node.address}/cycles/trigger", json=body)
            assert answer.status_code == 202, answer.text


async def _killed(nodes: Nodes, striker: Striker, point: Point) -> None:
    """A node that gets to the point, and no further."""
    node = await nodes.start(point.boundary)
    striker.victim = node
    await _send(node)
    assert await node.ended() == -9, node.tail()


def _let_leases_end(owner_dsn: str) -> None:
    """What the dead node held is free: a lease that really ended might do so amid a slow send."""
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        for table in ("cycle_lease", "dispatch_lease"):
            owner.execute(
                f"UPDATE {table} SET due_at = orbit_now() - interval '1 second'"
                " WHERE node_id IS NOT NULL"
            )


async def _struck(
    folder: Path, dsn: str, owner_dsn: str, point: Point, **endpoint: str
) -> tuple[Striker, Evidence]:
    """A send that is cut off at the point, and what another node makes of it."""
    async with striking(point) as striker:
        endpoints = json.dumps([{"key": "in", "url": striker.url, **endpoint}])
        given = {"ORBIT_DISPATCH_ENDPOINTS": endpoints, "ORBIT_LEASE_SECONDS": "600"}
        async with scene(folder, (), dsn, **given) as stage:
            await _killed(stage.nodes, striker, point)
            _let_leases_end(owner_dsn)
            await stage.nodes.start()
            await finished(owner_dsn)
    if point.body_bytes is not None:
        assert striker.cut_bytes is not None
        assert (striker.cut_bytes == len(BODY)) is (point.body_bytes == len(BODY))
    return striker, read_evidence(owner_dsn)


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
async def test_a_send_cut_off_is_unknown_and_goes_on_under_its_id(
    dsn: str, owner_dsn: str, tmp_path: Path, point: Point
) -> None:
    """Recorded by the next owner, sent again with the next number; nothing lost, none doubled."""
    striker, evidence = await _struck(tmp_path, dsn, owner_dsn, point)
    [job] = evidence.jobs
    is_cut_off = not point.is_recorded and point is not UNOPENED
    receipts = [(row["attempt"], row["outcome"]) for row in evidence.receipts]
    assert receipts == ([(1, "unknown"), (2, "delivered")] if is_cut_off else [(1, "delivered")])
    last = len(receipts)
    if is_cut_off:
        lost, sent = evidence.receipts
        assert (lost["status"], lost["error"]) == (None, "the worker's lease ran out")
        assert lost["node_id"] != sent["node_id"]
    first = [(job["job_id"], 1)]
    again = [] if point.is_recorded else [(job["job_id"], last)]
    assert striker.heads == first * point.heads + again
    digest = (sha256_hex(BODY),)
    assert striker.wholes == [(*who, *digest) for who in first * point.wholes + again]
    assert len({job_id for job_id, *_ in striker.wholes}) == 1, "one, once a receiver dedupes"
    assert evidence.dead_letters == []
    assert [cycle["detail"]["delivered"] for cycle in evidence.cycles] == [1]


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
async def test_a_job_that_must_not_go_twice_is_left_to_a_person(
    dsn: str, owner_dsn: str, tmp_path: Path, point: Point
) -> None:
    """With on_unknown "hold" an attempt that may have arrived is the last: a dead letter."""
    striker, evidence = await _struck(tmp_path, dsn, owner_dsn, point, on_unknown="hold")
    [job] = evidence.jobs
    receipts = [(row["attempt"], row["outcome"]) for row in evidence.receipts]
    letters = [(row["job_id"], row["cause"], row["attempts"]) for row in evidence.dead_letters]
    if point.is_recorded or point is UNOPENED:
        assert (receipts, letters) == ([(1, "delivered")], [])
        assert len(striker.wholes) == 1
        return
    assert receipts == [(1, "unknown")]
    assert letters == [(job["job_id"], "unknown, left to a person: worker lost", 1)]
    assert striker.heads == [(job["job_id"], 1)] * point.heads
    assert [cycle["detail"]["deadLettered"] for cycle in evidence.cycles] == [1]
