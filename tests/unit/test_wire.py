"""One attempt on the wire against real sockets: sent once, bounded, and always an outcome."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import socket
from collections.abc import AsyncIterator

import pytest

from orbit.execution.http1 import Client
from orbit.execution.wire import (
    ANSWER_BYTES,
    Outcome,
    Outgoing,
    Wire,
    WireResult,
    request_headers,
)
from tests.unit.talking import OK, Server, always, serving


@pytest.fixture
async def wire() -> AsyncIterator[Wire]:
    """A client as a node has it."""
    client = Client()
    yield Wire(client)
    await client.close()


def outgoing(url: str, **given: object) -> Outgoing:
    """A request of a small body."""
    values = {
        "method": "POST",
        "url": url,
        "headers": {"Content-Type": "text/plain"},
        "content": b"body",
        "timeout_seconds": 60.0,
    }
    return Outgoing(**{**values, **given})  # type: ignore[arg-type]


async def answer(wire: Wire, *parts: bytes, **given: object) -> tuple[WireResult, Server]:
    """What comes of an attempt against a server that answers so and closes."""
    server = Server()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.read(reader)
        for part in parts:
            writer.write(part)
            await writer.drain()

    async with serving(talk, server):
        return await wire.send(outgoing(server.url, **given)), server


# --- outcomes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "outcome"),
    [(200, "delivered"), (204, "delivered"), (299, "delivered"), (301, "failed"), (302, "failed"),
     (307, "failed"), (400, "failed"), (429, "failed"), (500, "failed"), (599, "failed")],
)  # fmt: skip
async def test_an_answers_status_decides(wire: Wire, status: int, outcome: str) -> None:
    """2xx is delivered, everything else failed; a redirect is not followed."""
    head = f"HTTP/1.1 {status} X\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n"
    result, server = await answer(wire, head.encode())
    assert (result.outcome, result.status) == (outcome, status)
    assert result.cause == (None if outcome == "delivered" else f"status {status}")
    assert len(server.requests) == 1


async def test_a_refused_connection_means_that_nothing_was_sent(wire: Wire) -> None:
    """Nobody listens: not sent, with the cause."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    result = await wire.send(outgoing(f"http://127.0.0.1:{port}/"))
    assert (result.outcome, result.cause) == (Outcome.NOT_SENT, "connection refused")
    assert result.connect_seconds is None


async def test_a_name_that_does_not_resolve_means_that_nothing_was_sent(wire: Wire) -> None:
    """No address: not sent, with the cause."""
    result = await wire.send(outgoing("http://no-such-host.invalid/"))
    assert (result.outcome, result.cause) == (Outcome.NOT_SENT, "name not resolved")


async def test_a_server_without_tls_is_named(wire: Wire) -> None:
    """TLS to a port that speaks plain HTTP: an outcome with the cause, never an exception."""
    server = Server()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(OK)

    async with serving(talk, server):
        result = await wire.send(outgoing(server.url.replace("http:", "https:")))
    assert (result.outcome, result.cause) == (Outcome.NOT_SENT, "tls")


async def test_silence_is_cut_off_and_unknown(wire: Wire) -> None:
    """Accepted and never answered: bytes left, so nobody knows; the timeout bounds it."""
    server = Server()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async with serving(talk, server):
        result = await wire.send(outgoing(server.url, timeout_seconds=2.0))
    assert (result.outcome, result.cause) == (Outcome.UNKNOWN, "timeout")
    assert result.connect_seconds is not None


@pytest.mark.parametrize(
    ("parts", "cause"),
    [
        ((), "connection lost"),
        ((b"HTTP/1.1 20",), "connection lost"),
        ((b"SSH-2.0-OpenSSH\r\n\r\n",), "answer not understood"),
        ((b"HTTP/1.1 200 OK\r\nX: " + b"x" * (1 << 20) + b"\r\n\r\n",), "answer not understood"),
        ((b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",), "answer not understood"),
    ],
    ids=["closed", "half a line", "another protocol", "header of 1 MiB", "bad length"],
)
async def test_no_answer_that_can_be_understood_is_unknown(
    wire: Wire, parts: tuple[bytes, ...], cause: str
) -> None:
    """The bytes left, and no status was seen."""
    result, server = await answer(wire, *parts)
    assert (result.outcome, result.status, result.cause) == (Outcome.UNKNOWN, None, cause)
    assert len(server.requests) == 1


async def test_a_body_that_breaks_off_does_not_unsay_the_status(wire: Wire) -> None:
    """Fewer bytes than promised after a 200: delivered, since its status was seen."""
    result, _ = await answer(wire, b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort")
    assert (result.outcome, result.status, result.answer) == (Outcome.DELIVERED, 200, b"short")


async def test_a_body_that_drips_for_ever_is_cut_off(wire: Wire) -> None:
    """The timeout bounds the whole attempt; the status was seen."""
    server = Server()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.read(reader)
        writer.write(b"HTTP/1.1 500 X\r\nContent-Length: 1000000\r\n\r\n")
        while True:
            writer.write(b".")
            await writer.drain()
            await asyncio.sleep(0.01)

    async with serving(talk, server):
        result = await wire.send(outgoing(server.url, timeout_seconds=2.0))
    assert (result.outcome, result.status) == (Outcome.FAILED, 500)
    assert result.error == "no complete answer within 2 s"


async def test_a_huge_answer_is_read_to_a_bound(wire: Wire) -> None:
    """Of 1 GiB the beginning is kept, and the connection is given up."""
    server, written = Server(), 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        await server.read(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (1 << 30))
        while written < 1 << 30:
            writer.write(bytes(1 << 16))
            await writer.drain()
            written += 1 << 16

    async with serving(talk, server):
        result = await wire.send(outgoing(server.url))
    assert result.outcome is Outcome.DELIVERED
    assert result.answer == bytes(ANSWER_BYTES)
    assert written < 64 << 20


async def test_a_compressed_answer_is_kept_as_it_came(wire: Wire) -> None:
    """A gzip bomb stays small: nothing is unpacked."""
    bomb = gzip.compress(bytes(50 << 20))
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb)
    result, _ = await answer(wire, head, bomb)
    assert result.answer == bomb[:ANSWER_BYTES]


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 500 \xff\xfe\r\nContent-Type: text/\xff\xfe; x=\xc3\r\n",
        b"HTTP/1.1 500 X\r\nContent-Type: text/plain; " + b"x" * 5000 + b"\r\n",
    ],
)
async def test_what_a_receiver_says_of_itself_can_be_stored(wire: Wire, head: bytes) -> None:
    """A type that is no UTF-8, or endless, comes out as short printable text."""
    result, _ = await answer(wire, head + b"Content-Length: 2\r\n\r\n\xff\x00")
    assert (result.outcome, result.answer) == (Outcome.FAILED, b"\xff\x00")
    for text in (result.answer_content_type, result.error, result.cause):
        assert text is None or (text.isprintable() and len(text) <= 500)
        assert text is None or text.encode()


async def test_secrets_in_an_answer_are_masked(wire: Wire) -> None:
    """A receiver that repeats the token, even across the end of what is kept, reveals nothing."""
    token = "tok_" + "x" * 30
    body = token.encode() + b"." * (ANSWER_BYTES - 50) + token.encode()
    head = f"HTTP/1.1 401 X\r\nContent-Type: t/{token}\r\nContent-Length: {len(body)}\r\n\r\n"
    result, _ = await answer(wire, head.encode() + body, secrets=(token, ""))
    assert result.answer.startswith(b"***....")
    assert b"tok_" not in result.answer
    assert result.answer_content_type == "t/***"
    assert len(result.answer) <= ANSWER_BYTES


# --- what goes out ------------------------------------------------------------------------


async def test_the_body_goes_out_whole_with_its_length(wire: Wire) -> None:
    """Small and large bodies alike, as they are: never chunked, never changed."""
    for content in (b"", b"x" * 100, bytes(range(256)) * 1024):
        result, server = await answer(wire, OK, content=content)
        assert result.outcome is Outcome.DELIVERED
        head, _, body = server.requests[0].partition(b"\r\n\r\n")
        assert body == content
        assert b"content-length: %d" % len(content) in head.lower()
        assert b"transfer-encoding" not in head.lower()


async def test_only_its_own_headers_go_along(wire: Wire) -> None:
    """No accepted encoding, no cookie of an earlier answer; the agent names itself."""
    server = Server()
    cookie = OK.replace(b"\r\n", b"\r\nSet-Cookie: a=b\r\n", 1)
    async with serving(always(server, cookie), server):
        for _ in range(2):
            await wire.send(outgoing(server.url))
    lines = server.requests[1].split(b"\r\n\r\n")[0].split(b"\r\n")
    names = {line.split(b":")[0].lower() for line in lines[1:]}
    assert names == {b"host", b"user-agent", b"accept", b"content-type", b"content-length"}


def test_the_headers_of_a_job() -> None:
    """Digest, ids and token; what the endpoint adds cannot replace them."""
    digest = hashlib.sha256(b"body").hexdigest()
    given = {"X-Key": "k"}
    headers = request_headers(
        content_type="text/plain", digest=digest, job_id="j", token="t", given=given
    )
    assert headers == {
        "X-Key": "k",
        "Content-Type": "text/plain",
        "Idempotency-Key": "j",
        "webhook-id": "j",
        "Content-Digest": "sha-256=:Iw2DWNyOiJC0xY3utikS7i8gNXrpKlzIYbmOaP4xrLU=:",
        "Authorization": "Bearer t",
    }


# --- never twice --------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize("is_read", [True, False], ids=["after the request", "before it"])
async def test_a_kept_connection_that_drops_is_never_used_to_send_again(
    wire: Wire, method: str, is_read: bool
) -> None:
    """The server closes a reused connection, before or after reading: one attempt, one request."""
    server = Server()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.read(reader)
        writer.write(OK)
        await writer.drain()
        if is_read:
            await server.read(reader)
        else:
            await reader.read(1)
        writer.transport.abort()

    async with serving(talk, server):
        first = await wire.send(outgoing(server.url, method=method))
        second = await wire.send(outgoing(server.url, method=method))
    assert first.outcome is Outcome.DELIVERED
    assert (second.outcome, second.cause) == (Outcome.UNKNOWN, "connection lost")
    assert server.connections == 1, "the client opened no second connection to send again"
    assert len(server.requests) == (2 if is_read else 1)


async def test_connections_are_reused(wire: Wire) -> None:
    """Ten attempts one after the other share a connection."""
    server = Server()
    async with serving(always(server, OK), server):
        results = [await wire.send(outgoing(server.url)) for _ in range(10)]
    assert {one.outcome for one in results} == {Outcome.DELIVERED}
    assert server.connections == 1
    assert [one.is_reused for one in results] == [False] + [True] * 9


async def test_a_refused_address_means_that_nothing_was_sent() -> None:
    """Where private addresses are refused, a receiver on this machine is not reached."""
    server = Server()
    client = Client(allow_private=False)
    async with serving(always(server, OK), server):
        result = await Wire(client).send(outgoing(server.url))
    await client.close()
    assert (result.outcome, result.cause) == (Outcome.NOT_SENT, "address refused")
    assert (result.is_reused, server.connections) == (None, 0)


async def test_a_proxy_is_used_only_by_who_asks_for_it(wire: Wire) -> None:
    """The proxy gets the whole URL of the attempt that names it, and nothing of the other."""
    proxy, receiver = Server(), Server()
    async with (
        serving(always(proxy, OK), proxy),
        serving(always(receiver, OK), receiver),
    ):
        await wire.send(outgoing(receiver.url))
        result = await wire.send(outgoing("http://receiver.invalid/in", proxy=proxy.url))
    assert result.outcome is Outcome.DELIVERED
    assert len(receiver.requests) == len(proxy.requests) == 1
    assert proxy.requests[0].startswith(b"POST http://receiver.invalid/in HTTP/1.1\r\n")
