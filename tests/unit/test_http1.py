"""The HTTP client against real sockets and hostile receivers: sent once, bounded, accounted for."""

from __future__ import annotations

import asyncio
import gzip
import random
import socket
import ssl
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from orbit.execution import connector
from orbit.execution.http1 import Client, Exchange, _idle_seconds
from orbit.execution.lapse import Hold, is_acknowledged
from tests.unit.certificates import Authority
from tests.unit.talking import OK, Server, always, reset, serving

MIB = 1 << 20
Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    """A client that may go to this machine."""
    found = Client()
    yield found
    await found.close()


async def post(client: Client, url: str, content: bytes = b"body", **given: Any) -> Exchange:
    """One request; answers are read to 64 KiB."""
    method, headers = given.pop("method", "POST"), given.pop("headers", {})
    values = {"timeout_seconds": 60.0, "read_bytes": 65_536, **given}
    return await client.exchange(method, url, headers, content, **values)


def holding(
    may_begin: Callable[[], bool] = lambda: True, seconds_left: Callable[[], float] = lambda: 60.0
) -> Hold:
    """The right to send, for as long as it is said."""
    return Hold(may_begin, seconds_left)


async def answered(client: Client, *parts: bytes, **given: Any) -> tuple[Exchange, Server]:
    """What comes of a request to a server that answers so and closes."""
    server = Server()

    async def talk(reader: Reader, writer: Writer) -> None:
        await server.read(reader)
        for part in parts:
            writer.write(part)
            await writer.drain()

    async with serving(talk, server):
        return await post(client, server.url, **given), server


def resolving(*addresses: str, asked: list[str] | None = None) -> Any:
    """A resolver that gives these for every name."""

    async def resolve(host: str) -> Sequence[str]:
        if asked is not None:
            asked.append(host)
        await asyncio.sleep(0)
        return addresses

    return resolve


# --- what goes out ------------------------------------------------------------------------


async def test_a_small_request_byte_for_byte(client: Client) -> None:
    """The whole of what leaves: line, host, three headers of its own, those given, the body."""
    server = Server()
    headers = {"Content-Type": 'text/plain; charset="utf-8"', "X-Key": "k"}
    async with serving(always(server, OK), server):
        await post(client, server.url + "a b/ä?q=1&r=%20", headers=headers)
    start, *lines = server.requests[0].split(b"\r\n")
    assert start == b"POST /a%20b/%C3%A4?q=1&r=%20 HTTP/1.1"
    assert lines[0] == b"Host: 127.0.0.1:%d" % server.port
    assert lines[1].startswith(b"User-Agent: orbit/")
    assert lines[2:] == [
        b"Accept: */*",
        b"Content-Length: 4",
        b'Content-Type: text/plain; charset="utf-8"',
        b"X-Key: k",
        b"",
        b"body",
    ]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        bytes(range(256)),
        b"\xff\xfe\xc3",
        gzip.compress(b"x"),
        random.Random(1).randbytes(10 * MIB),
    ],
    ids=["empty", "all bytes", "no UTF-8", "gzip", "10 MiB"],
)
async def test_a_body_arrives_as_it_is(client: Client, content: bytes) -> None:
    """Any bytes, of any size, whole and unchanged; the connection can be used again."""
    server = Server()
    async with serving(always(server, OK), server):
        for _ in range(2):
            found = await post(client, server.url, content)
            assert (found.status, found.body, found.cause) == (200, b"ok", None)
    assert [one.partition(b"\r\n\r\n")[2] for one in server.requests] == [content] * 2
    assert server.connections == 1


@pytest.mark.parametrize(
    "given",
    [
        {"headers": {"X": "a\r\nY: b"}},
        {"headers": {"X": "a\nb"}},
        {"headers": {"X": "a\rb"}},
        {"headers": {"X": "a\0b"}},
        {"headers": {"X\r\nY": "a"}},
        {"headers": {"X Y": "a"}},
        {"headers": {"": "a"}},
        {"headers": {"Content-length": "9"}},
        {"headers": {"Transfer-Encoding": "chunked"}},
        {"headers": {"host": "elsewhere"}},
        {"headers": {"X": "a", "x": "b"}},
        {"headers": {"X": "\ud800"}},
        {"method": "CONNECT"},
        {"method": "POST / HTTP/1.1\r\n"},
        {"proxy": "socks5://127.0.0.1:1"},
    ],
    ids=str,
)
async def test_a_request_that_would_be_read_otherwise_is_not_sent(
    client: Client, given: dict[str, Any]
) -> None:
    """No line's end in a header, no second length or host, no method with a meaning of its own."""
    server = Server()
    async with serving(always(server, OK), server):
        found = await post(client, server.url, **given)
    assert (found.cause, found.is_sent, server.connections) == ("request not valid", False, 0)


@pytest.mark.parametrize(
    "url", ["ftp://h/", "http://", "http://u:p@127.0.0.1/", "http://h:99999/", "http://a b/", "x"]
)
async def test_a_url_that_is_none_is_not_tried(client: Client, url: str) -> None:
    """Another scheme, no host, credentials, a port that is none."""
    found = await post(client, url)
    assert (found.cause, found.is_sent) == ("request not valid", False)
    assert "u:p" not in (found.error or "")


# --- what comes back ----------------------------------------------------------------------


async def test_an_answer_with_its_headers(client: Client) -> None:
    """Names in lower case, repeated ones joined, bytes that are no UTF-8 kept as Latin-1."""
    head = (
        b"HTTP/1.1 200 \xff\r\nX-One: a\r\nx-one: b\r\nX-Two: \xe4\xff\r\nContent-Length: 2\r\n\r\n"
    )
    found, _ = await answered(client, head, b"\xff\xfe")
    assert found.headers == {"x-one": "a, b", "x-two": "äÿ", "content-length": "2"}
    assert (found.status, found.body, found.is_truncated) == (200, b"\xff\xfe", False)
    assert found.is_sent
    times = (found.started_at, found.connected_at, found.first_byte_at, found.ended_at)
    assert list(times) == sorted(time or 0 for time in times)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\nto the end", b"to the end"),
        (b"HTTP/1.0 200 OK\r\n\r\n", b""),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        (CHUNKED + b"2\r\nab\r\n1;x=y\r\nc\r\n0\r\nTrailer: t\r\n\r\n", b"abc"),
        (b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\n" * 16 + OK, b"ok"),
    ],
    ids=["until the end", "HTTP/1.0", "no body", "chunked", "interim"],
)
@pytest.mark.parametrize("is_dripped", [False, True], ids=["at once", "byte by byte"])
async def test_answers_of_every_kind(
    client: Client, answer: bytes, body: bytes, is_dripped: bool
) -> None:
    """However it is framed and cut, the answer is the same, without what is not its own."""
    parts = [answer[i : i + 1] for i in range(len(answer))] if is_dripped else [answer]
    found, _ = await answered(client, *parts)
    assert (found.body, found.cause, found.is_truncated) == (body, None, False)
    assert not {"link", "trailer"} & set(found.headers)


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort", "connection lost"),
        (CHUNKED + b"2\r\nab\r\n", "connection lost"),
        (CHUNKED + b"2\r\nab\r\nzz\r\n", "answer not understood"),
        (CHUNKED + b"0\r\n" + b"X: y\r\n" * 200_000 + b"\r\n", "answer not understood"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok and more", None),
    ],
    ids=["too short", "cut off", "garbage", "endless trailers", "too long"],
)
async def test_a_final_status_stands_whatever_the_body_does(
    client: Client, answer: bytes, cause: str | None
) -> None:
    """A body that lies says why it is not whole, and does not unsay the status."""
    found, server = await answered(client, answer)
    assert (found.status, found.cause, len(server.requests)) == (200, cause, 1)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 100 Continue\r\n\r\n" * 17 + OK,
        b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n" + OK,
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * MIB + b"\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 15_000 + b"Content-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\nok",
        b"SSH-2.0-OpenSSH_9.9\r\n\r\n",
        b"\x15\x03\x01\x00\x02\x02\x16",
    ],
    ids=["17 interim", "101", "1 MiB", "many", "two lengths", "two framings", "SSH", "TLS"],
)
async def test_an_answer_that_cannot_be_trusted_is_none(client: Client, answer: bytes) -> None:
    """Sent, and no status: nobody knows what became of the request."""
    found, _ = await answered(client, answer)
    assert (found.status, found.cause) == (None, "answer not understood")
    assert found.is_sent


async def test_interim_answers_without_end_come_to_one(client: Client) -> None:
    """The server writes them for ever; the client goes, long before its time is up."""
    server, is_gone = Server(), asyncio.Event()

    async def talk(reader: Reader, writer: Writer) -> None:
        await server.read(reader)
        try:
            while True:
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                await writer.drain()
        finally:
            is_gone.set()

    async with serving(talk, server):
        found = await post(client, server.url, timeout_seconds=60.0)
        assert (found.status, found.cause) == (None, "answer not understood")
        await is_gone.wait()


async def test_an_answer_of_1_gib_is_not_read(client: Client) -> None:
    """Of its beginning so much is kept as was asked; the server gets rid of little more."""
    server, written = Server(), 0

    async def talk(reader: Reader, writer: Writer) -> None:
        nonlocal written
        await server.read(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (1 << 30))
        while written < 1 << 30:
            writer.write(bytes(65_536))
            await writer.drain()
            written += 65_536

    async with serving(talk, server):
        found = await post(client, server.url, keep_bytes=100)
    assert (found.status, found.body, found.is_truncated) == (200, bytes(100), True)
    assert written < 64 * MIB


async def test_nothing_is_unpacked(client: Client) -> None:
    """A gzip bomb is kept as the bytes that came."""
    bomb = gzip.compress(bytes(20 * MIB))
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb)
    found, _ = await answered(client, head + bomb)
    assert bomb.startswith(found.body)
    assert 0 < len(found.body) <= 65_536


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("place", ["http://127.0.0.1:{}/", "http://169.254.169.254/latest/"])
async def test_a_redirect_is_an_answer_and_no_more(client: Client, status: int, place: str) -> None:
    """The place that it names gets nothing, whether it is another server or a cloud's secrets."""
    other = Server()
    async with serving(always(other, OK), other):
        to = place.format(other.port)
        head = f"HTTP/1.1 {status} X\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n"
        found, server = await answered(client, head.encode())
    assert (found.status, found.headers["location"], found.cause) == (status, to, None)
    assert (len(server.requests), other.connections) == (1, 0)


# --- receivers that fail ------------------------------------------------------------------


@pytest.mark.parametrize("when", ["at once", "amid the body", "after the body", "amid the head"])
async def test_a_connection_that_is_reset_leaves_the_outcome_open(
    client: Client, when: str
) -> None:
    """Bytes had left and no status came: one request, on one connection, and the cause."""
    server = Server()

    async def talk(reader: Reader, writer: Writer) -> None:
        if when == "amid the body":
            await reader.readexactly(100_000)
        elif when != "at once":
            await server.read(reader)
        if when == "amid the head":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-")
            await writer.drain()
        reset(writer)

    async with serving(talk, server):
        found = await post(client, server.url, bytes(8 * MIB))
    assert (found.status, found.cause, server.connections) == (None, "connection lost", 1)


async def test_a_reset_after_the_head_does_not_unsay_it(client: Client) -> None:
    """The status was seen before the connection broke."""
    server = Server()

    async def talk(reader: Reader, writer: Writer) -> None:
        await server.read(reader)
        writer.write(b"HTTP/1.1 503 X\r\nContent-Length: 10\r\n\r\nhalf")
        await writer.drain()
        await reader.read(1)

    async with serving(talk, server):
        found = await post(client, server.url, timeout_seconds=2.0)
    assert (found.status, found.body, found.cause) == (503, b"half", "timeout")


@pytest.mark.parametrize("drip", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\n"])
async def test_a_receiver_without_end_is_cut_off(client: Client, drip: bytes) -> None:
    """It answers nothing, or drips a head or a body: the deadline ends it and the connection."""
    server, is_gone = Server(), asyncio.Event()

    async def talk(reader: Reader, writer: Writer) -> None:
        await server.read(reader)
        writer.write(drip)
        while not is_gone.is_set():
            writer.write(b"." if drip else b"")
            with suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    await is_gone.wait()

    async with serving(talk, server):
        found = await post(client, server.url, timeout_seconds=2.0)
        is_gone.set()
    is_begun = drip.endswith(b"\r\n\r\n")
    assert found.cause == "timeout"
    assert (found.status, found.is_sent) == (200 if is_begun else None, True)


async def test_a_receiver_that_does_not_accept(client: Client) -> None:
    """A full backlog: no connection in time, and nothing sent."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}/"
        found = await post(client, url, timeout_seconds=0.3)
        for one in waiting:
            one.close()
    assert (found.cause, found.is_sent, found.connected_at) == ("timeout", False, None)


async def test_an_upload_that_nobody_reads_is_cut_off(client: Client) -> None:
    """The receiver takes the head and no more: the deadline ends the sending too."""
    server = Server()

    async def talk(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.Event().wait()

    async with serving(talk, server):
        found = await post(client, server.url, bytes(64 * MIB), timeout_seconds=2.0)
    assert (found.status, found.cause, found.is_sent) == (None, "timeout", True)


@pytest.mark.parametrize("is_closing", [True, False])
async def test_an_early_refusal_ends_the_upload(client: Client, is_closing: bool) -> None:
    """413 amid 10 MiB: its status is taken and the rest is not sent, on whatever connection."""
    server, size = Server(), 0

    async def talk(reader: Reader, writer: Writer) -> None:
        nonlocal size
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
        await writer.drain()
        while not is_closing and (part := await reader.read(65_536)):
            size += len(part)

    async with serving(talk, server):
        found = await post(client, server.url, bytes(10 * MIB))
        again = await post(client, server.url)
    assert (found.status, found.body, found.cause) == (413, b"big", None)
    assert size < 10 * MIB
    assert not again.is_reused


async def test_an_early_acceptance_does_not(client: Client) -> None:
    """Who says 200 first may still read: the body is sent whole all the same."""
    server = Server()

    async def talk(reader: Reader, writer: Writer) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)
        await writer.drain()
        server.requests.append(head + await reader.readexactly(10 * MIB))
        received.set()

    received = asyncio.Event()
    async with serving(talk, server):
        found = await post(client, server.url, bytes(10 * MIB))
        await received.wait()
    assert (found.status, found.body) == (200, b"ok")
    assert server.requests[0].endswith(bytes(10 * MIB))


async def test_who_gives_up_closes_the_connection(client: Client) -> None:
    """A cancelled request leaves nothing behind that could still be sent or read."""
    server, is_here, is_gone = Server(), asyncio.Event(), asyncio.Event()

    async def talk(reader: Reader, writer: Writer) -> None:
        await server.read(reader)
        is_here.set()
        with suppress(OSError):
            assert await reader.read() == b""
        is_gone.set()

    async with serving(talk, server):
        task = asyncio.create_task(post(client, server.url))
        await is_here.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await is_gone.wait()


# --- never twice --------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
async def test_a_receiver_that_drops_connections_sees_no_request_twice(
    client: Client, method: str
) -> None:
    """At random it closes before reading, after reading, or after answering: each id comes once."""
    server, chance = Server(), random.Random(7)

    async def talk(reader: Reader, writer: Writer) -> None:
        while chance.random() > 0.2:
            await server.read(reader)
            if chance.random() < 0.2:
                break
            writer.write(OK)
            await writer.drain()
        if chance.random() < 0.5:
            reset(writer)

    async def send(number: int) -> Exchange:
        return await post(client, server.url, b"id-%d" % number, method=method)

    async with serving(talk, server):
        found = [
            one
            for start in range(0, 300, 10)
            for one in await asyncio.gather(*map(send, range(start, start + 10)))
        ]
    seen = Counter(request.partition(b"\r\n\r\n")[2] for request in server.requests)
    assert set(seen.values()) == {1}
    for number, one in enumerate(found):
        if one.status is not None:
            assert seen[b"id-%d" % number] == 1
        else:
            assert one.is_sent
            assert one.cause == "connection lost"
    assert sum(one.is_reused for one in found) > 50
    assert server.connections == sum(not one.is_reused for one in found)


async def test_what_may_no_longer_be_sent_does_not_leave(client: Client) -> None:
    """It is asked once there is a connection; after a no it is kept, and serves the next."""
    server = Server()
    async with serving(always(server, OK), server):
        held = await post(client, server.url, hold=holding(lambda: server.connections > 1))
        assert (held.is_sent, held.cause, held.is_reused) == (False, "withheld", False)
        sent = await post(client, server.url, hold=holding(lambda: True))
        assert (sent.status, sent.is_reused) == (200, True)
        held = await post(client, server.url, hold=holding(lambda: False))
        assert (held.is_sent, held.cause, held.is_reused) == (False, "withheld", True)
        assert (server.connections, len(server.requests)) == (1, 1)


# --- what goes no further -------------------------------------------------------------------


class Reluctant:
    """A receiver with little room that reads only when it is told to; then to the end."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        scheme = "http" if tls is None else "https"
        self.url = f"{scheme}://good.example:{self._listener.getsockname()[1]}/"
        self.may_read, self.begun = threading.Event(), threading.Event()
        self.may_answer, self.found = threading.Event(), b""
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def end(self) -> bytes:
        """All that arrived."""
        self.may_read.set()
        self.may_answer.set()
        self._thread.join(10)
        self._listener.close()
        return self.found

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with suppress(OSError):
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
            self.found = connection.recv(1024)
            self.begun.set()
            self.may_read.wait(10)
            while part := connection.recv(65_536):
                self.found += part
                if self.found.endswith(b"END"):
                    self.may_answer.wait(10)
                    connection.sendall(OK)
        connection.close()


@pytest.fixture(params=["plain", "tls"])
def reluctant(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Reluctant, Client]]:
    """It, and a client that trusts it."""
    authority = Authority(tmp_path)
    is_secure = request.param == "tls"
    server = Reluctant(authority.server("good.example") if is_secure else None)
    yield server, Client(tls=authority.trust, resolve=resolving("127.0.0.1"))
    server.end()


@pytest.mark.parametrize("size", [60_000, 8 * MIB])
@pytest.mark.parametrize("how", ["lease", "timeout", "cancelled"])
async def test_what_ends_amid_the_body_is_never_completed(
    reluctant: tuple[Reluctant, Client], how: str, size: int
) -> None:
    """The receiver reads on afterwards, and finds neither the rest nor a clean end of it."""
    server, client = reluctant
    is_over = False
    content = b"x" * size + b"END"
    hold = holding(seconds_left=lambda: 0.0 if is_over else 0.02)
    asking = asyncio.create_task(
        post(
            client, server.url, content, hold=hold, timeout_seconds=2.0 if how == "timeout" else 60
        )
    )
    assert await asyncio.to_thread(server.begun.wait, 10)
    if how == "cancelled":
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking
    else:
        is_over = how == "lease"
        found = await asking
        assert (found.is_sent, found.status) == (True, None)
        assert found.cause == ("lease over" if is_over else "timeout")
    assert not (await asyncio.to_thread(server.end)).endswith(b"END")
    await client.close()


async def test_what_has_arrived_whole_is_waited_for(
    reluctant: tuple[Reluctant, Client],
) -> None:
    """A lease that ends then takes nothing back: the answer is heard."""
    server, client = reluctant

    def seconds_left() -> float:
        (connection,) = client._open
        is_whole = server.found.endswith(b"END") and is_acknowledged(connection._sock)
        asyncio.get_running_loop().call_later(0, server.may_answer.set if is_whole else int)
        return 0.0 if is_whole else 0.01

    server.may_read.set()
    found = await post(
        client, server.url, b"x" * MIB + b"END", hold=holding(seconds_left=seconds_left)
    )
    assert (found.status, found.cause) == (200, None)
    await client.close()


# --- kept connections ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "is_kept"),
    [
        (OK, True),
        (OK.replace(b"\r\n", b"\r\nKeep-Alive: timeout=20\r\n", 1), True),
        (OK.replace(b"\r\n", b"\r\nKeep-Alive: timeout=1\r\n", 1), False),
        (OK.replace(b"\r\n", b"\r\nConnection: close\r\n", 1), False),
        (OK.replace(b"1.1", b"1.0", 1), False),
        (OK + b"H", False),
        (OK + OK, False),
    ],
    ids=["plain", "20 s", "1 s", "close", "HTTP/1.0", "a byte more", "an answer more"],
)
async def test_a_connection_is_kept_only_if_it_is_sound(
    client: Client, answer: bytes, is_kept: bool
) -> None:
    """As the receiver says, and never with bytes on it that belong to nothing."""
    server = Server()
    async with serving(always(server, answer), server):
        found = [await post(client, server.url) for _ in range(3)]
    assert [one.status for one in found] == [200] * 3
    assert [one.is_reused for one in found] == [False, is_kept, is_kept]
    assert server.connections == (1 if is_kept else 3)


@pytest.mark.parametrize("late", [b"", b"HTTP/1.1 500 Late\r\nContent-Length: 0\r\n\r\n"])
async def test_what_arrives_on_an_idle_connection_ends_it(client: Client, late: bytes) -> None:
    """An end or an answer to nothing: the next request takes another connection, and its own."""
    server, is_late, is_done = Server(), asyncio.Event(), asyncio.Event()

    async def talk(reader: Reader, writer: Writer) -> None:
        await server.read(reader)
        writer.write(OK)
        await writer.drain()
        await is_late.wait()
        writer.write(late)
        await writer.drain()
        if not late:
            writer.close()
            await writer.wait_closed()
        is_done.set()
        await reader.read()

    async with serving(talk, server):
        await post(client, server.url)
        is_late.set()
        await is_done.wait()
        is_late.clear()
        found = await post(client, server.url)
    assert (found.status, found.is_reused, server.connections) == (200, False, 2)


async def test_an_idle_connection_is_closed_in_time(client: Client) -> None:
    """A second before the receiver would: it sees the end, and no request on the way."""
    server, is_gone = Server(), asyncio.Event()

    async def talk(reader: Reader, writer: Writer) -> None:
        await server.read(reader)
        writer.write(OK.replace(b"\r\n", b"\r\nKeep-Alive: timeout=2, max=9\r\n", 1))
        assert await reader.read() == b""
        is_gone.set()

    async with serving(talk, server):
        await post(client, server.url)
        await is_gone.wait()


async def test_idle_connections_are_bounded() -> None:
    """What is over the number is closed after its answer."""
    client, server = Client(idle_connections=2), Server()
    async with serving(always(server, OK), server):
        await asyncio.gather(*[post(client, server.url) for _ in range(5)])
        found = await asyncio.gather(*[post(client, server.url) for _ in range(5)])
    await client.close()
    assert sum(one.is_reused for one in found) == 2
    assert server.connections == 5 + 3


@pytest.mark.parametrize(
    ("said", "seconds"),
    [("", 4), ("timeout=5", 4), ("max=100, Timeout=15", 14), ("timeout=999999", 60),
     ("timeout=1", 0), ("timeout=0", -1), ("timeout=x", 4), ("xtimeout=9", 4)],
)  # fmt: skip
def test_how_long_a_connection_is_kept(said: str, seconds: float) -> None:
    """A second less than the receiver keeps it; at most a minute; four seconds unasked."""
    assert _idle_seconds(said) == seconds


# --- names and addresses ------------------------------------------------------------------


async def test_a_name_that_does_not_resolve(client: Client) -> None:
    """Nothing was sent, and the cause is the name."""
    found = await post(client, "http://no-such-host.invalid/")
    assert (found.cause, found.is_sent) == ("name not resolved", False)


@pytest.mark.parametrize(
    ("addresses", "allow_private"),
    [
        (["127.0.0.1"], False),
        (["10.0.0.1", "::1"], False),
        (["169.254.169.254"], True),
        (["::ffff:169.254.169.254", "fe80::1"], True),
        (["not an address"], True),
    ],
)
async def test_a_name_is_judged_by_what_it_resolves_to(
    addresses: list[str], allow_private: bool
) -> None:
    """A harmless name for a refused address is refused, and nothing is connected to."""
    server = Server()
    client = Client(allow_private=allow_private, resolve=resolving(*addresses))
    async with serving(always(server, OK), server):
        found = await post(client, f"http://harmless.example:{server.port}/")
    await client.close()
    assert (found.cause, found.is_sent, server.connections) == ("address refused", False, 0)


async def test_an_address_in_the_url_is_judged_too() -> None:
    """Also as a number that only the resolver takes for an address."""
    client = Client(allow_private=False)
    for host in ("127.0.0.1", "[::1]", "2130706433", "localhost", "[::ffff:127.0.0.1]"):
        found = await post(client, f"http://{host}:9/")
        assert (found.cause, found.is_sent) == ("address refused", False), host
    await client.close()


async def test_only_the_addresses_that_pass_are_tried() -> None:
    """Of a name with several the refused ones are left out."""
    server = Server()
    client = Client(resolve=resolving("169.254.169.254", "127.0.0.1"))
    async with serving(always(server, OK), server):
        found = await post(client, f"http://harmless.example:{server.port}/")
    await client.close()
    assert (found.status, server.requests[0].split(b"\r\n")[1]) == (
        200,
        b"Host: harmless.example:%d" % server.port,
    )


async def test_a_name_is_looked_up_once_for_all() -> None:
    """Ten requests at a time and ten more: one question."""
    server, asked = Server(), list[str]()
    client = Client(idle_connections=0, resolve=resolving("127.0.0.1", asked=asked))
    async with serving(always(server, OK), server):
        for _ in range(2):
            url = f"http://harmless.example:{server.port}/"
            await asyncio.gather(*[post(client, url) for _ in range(10)])
    await client.close()
    assert asked == ["harmless.example"]


async def test_a_resolver_that_hangs_is_cut_off() -> None:
    """The deadline counts from the beginning, names included."""

    async def resolve(host: str) -> Sequence[str]:
        await asyncio.Event().wait()
        return []

    client = Client(resolve=resolve)
    found = await post(client, "http://slow.example/", timeout_seconds=0.3)
    await client.close()
    assert (found.cause, found.is_sent) == ("timeout", False)


# --- TLS and proxies ----------------------------------------------------------------------


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """One for the test alone."""
    return Authority(tmp_path)


async def test_tls_and_its_connections_are_kept(authority: Authority) -> None:
    """A certificate of the right name, and one handshake for several requests."""
    server = Server()
    client = Client(tls=authority.trust, resolve=resolving("127.0.0.1"))
    async with serving(always(server, OK), server, authority.server("good.example")):
        url = f"https://good.example:{server.port}/"
        found = [await post(client, url, bytes(100_000)) for _ in range(3)]
    await client.close()
    assert [(one.status, one.cause) for one in found] == [(200, None)] * 3
    assert server.connections == 1


@pytest.mark.parametrize(
    "given",
    [
        {"name": "good.example", "days": -1},
        {"name": "good.example", "is_own": True},
        {"name": "other.example"},
    ],
    ids=["expired", "self-signed", "other name"],
)
async def test_a_certificate_that_is_not_right_ends_it(
    authority: Authority, given: dict[str, Any]
) -> None:
    """Nothing of the request has left, and the cause is TLS."""
    server = Server()
    client = Client(tls=authority.trust, resolve=resolving("127.0.0.1"))
    async with serving(always(server, OK), server, authority.server(**given)):
        found = await post(client, f"https://good.example:{server.port}/")
    await client.close()
    assert (found.cause, found.is_sent, server.requests) == ("tls", False, [])
    assert found.error


@pytest.mark.parametrize("greeting", [OK, b""])
async def test_a_receiver_without_tls(client: Client, greeting: bytes) -> None:
    """Plain HTTP where TLS was asked for, or an end: nothing of the request has left."""
    server = Server()

    async def talk(reader: Reader, writer: Writer) -> None:
        await reader.read(100)
        writer.write(greeting)

    async with serving(talk, server):
        found = await post(client, server.url.replace("http:", "https:"))
    assert (found.cause, found.is_sent) == ("tls", False)


async def test_a_handshake_that_hangs_is_cut_off(client: Client) -> None:
    """The deadline counts for TLS too."""
    server = Server()

    async def talk(reader: Reader, writer: Writer) -> None:
        await asyncio.Event().wait()

    async with serving(talk, server):
        url = server.url.replace("http:", "https:")
        found = await post(client, url, timeout_seconds=0.3)
    assert (found.cause, found.is_sent) == ("timeout", False)


async def test_a_plain_request_through_a_proxy(client: Client) -> None:
    """The whole URL and the proxy's credentials; the receiver's name is the proxy's to resolve."""
    proxy = Server()
    async with serving(always(proxy, OK), proxy):
        via = proxy.url.replace("//", "//user:p%40ss@")
        found = [await post(client, "http://there.invalid:81/a?b", proxy=via) for _ in range(2)]
    assert [(one.status, one.is_reused) for one in found] == [(200, False), (200, True)]
    assert proxy.requests[0].split(b"\r\n")[:3] == [
        b"POST http://there.invalid:81/a?b HTTP/1.1",
        b"Host: there.invalid:81",
        b"Proxy-Authorization: Basic dXNlcjpwQHNz",
    ]


def tunnelling(to: Server, answer: bytes, asked: list[bytes]) -> Any:
    """A proxy that answers CONNECT so, and then passes bytes on."""

    async def passing(reader: Reader, writer: Writer) -> None:
        while part := await reader.read(65_536):
            writer.write(part)
            await writer.drain()

    async def talk(reader: Reader, writer: Writer) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(answer)
        there, back = await asyncio.open_connection("127.0.0.1", to.port)
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(passing(reader, back))
                both.create_task(passing(there, writer))
        finally:
            back.close()

    return talk


async def test_a_request_through_a_proxys_tunnel(authority: Authority) -> None:
    """TLS is spoken with the receiver, whom the proxy connects to; the tunnel is kept."""
    server, proxy, asked = Server(), Server(), list[bytes]()
    client = Client(tls=authority.trust)
    made = b"HTTP/1.1 200 Connection established\r\n\r\n"
    async with (
        serving(always(server, OK), server, authority.server("good.example")),
        serving(tunnelling(server, made, asked), proxy),
    ):
        via = proxy.url.replace("//", "//user:pass@")
        url = f"https://good.example:{server.port}/in"
        found = [await post(client, url, proxy=via) for _ in range(2)]
        await client.close()
    assert [(one.status, one.is_reused) for one in found] == [(200, False), (200, True)]
    lines = asked[0].split(b"\r\n")
    assert lines[0] == b"CONNECT good.example:%d HTTP/1.1" % server.port
    assert b"Proxy-Authorization: Basic dXNlcjpwYXNz" in lines
    assert all(b"Proxy-Authorization" not in one for one in server.requests)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 502 Bad Gateway\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nsmuggled",
        b"nonsense\r\n\r\n",
        b"x" * 100_000,
        b"",
    ],
    ids=["407", "502", "more than a head", "nonsense", "endless", "closed"],
)
async def test_a_proxy_that_makes_no_tunnel(client: Client, answer: bytes) -> None:
    """Nothing of the request has left, and the cause is the proxy."""
    proxy = Server()

    async def talk(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()

    async with serving(talk, proxy):
        found = await post(client, "https://there.invalid/", proxy=proxy.url)
    assert (found.cause, found.is_sent) == ("proxy", False)


async def test_the_proxys_address_is_judged() -> None:
    """A proxy on this machine is not reached where private addresses are refused."""
    proxy, client = Server(), Client(allow_private=False)
    async with serving(always(proxy, OK), proxy):
        found = await post(client, "http://there.invalid/", proxy=proxy.url)
    await client.close()
    assert (found.cause, proxy.connections) == ("address refused", 0)


async def test_a_proxy_that_is_not_there(client: Client) -> None:
    """The cause is the proxy, not the receiver."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    found = await post(client, "http://there.invalid/", proxy=f"http://127.0.0.1:{port}")
    assert (found.cause, found.is_sent) == ("proxy", False)


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254", "169.254.169.254.", "169.254.43518", "0xa9fea9fe", "2852039166",
        "169%2E254.169.254", "[fe80::1]", "[::ffff:169.254.169.254]", "[64:ff9b:1::a9fe:a9fe]",
    ],
)  # fmt: skip
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_proxy_is_not_asked_for_an_address_that_is_never_reached(
    client: Client, scheme: str, host: str
) -> None:
    """A host that is an address itself is judged, in every way that a proxy may read one."""
    proxy = Server()
    async with serving(always(proxy, OK), proxy):
        found = await post(client, f"{scheme}://{host}/latest/", proxy=proxy.url)
    assert (found.cause, found.is_sent, proxy.connections) == ("address refused", False, 0)


# --- names that stop answering ------------------------------------------------------------


class Names:
    """A resolver whose answers a test sets: addresses, an error, or None until it is let go."""

    def __init__(self) -> None:
        self.answer: Sequence[str] | OSError | None = ["127.0.0.1"]
        self.asked = 0
        self.let_go, self.answered = asyncio.Event(), asyncio.Event()

    async def __call__(self, host: str) -> Sequence[str]:
        self.asked += 1
        if self.answer is None:
            await self.let_go.wait()
        self.answered.set()
        if isinstance(self.answer, OSError):
            raise self.answer
        return self.answer or ["127.0.0.2"]


@pytest.mark.parametrize("answer", [None, socket.gaierror(socket.EAI_AGAIN, "no answer")])
async def test_addresses_serve_on_while_they_are_looked_up_again(
    answer: OSError | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resolver that hangs or fails stops nobody who has been to the receiver just now."""
    monkeypatch.setattr(connector, "_FRESH_SECONDS", 0.0)
    server, names = Server(), Names()
    client = Client(idle_connections=0, resolve=names)
    async with serving(always(server, OK), server):
        url = f"http://harmless.example:{server.port}/"
        found = [await post(client, url)]
        names.answer = answer
        found += [await post(client, url) for _ in range(3)]
    await client.close()
    assert [one.status for one in found] == [200] * 4
    assert names.asked == 2


@pytest.mark.parametrize(
    ("stale_seconds", "answer"),
    [
        (0.0, socket.gaierror(socket.EAI_AGAIN, "no answer")),
        (180.0, socket.gaierror(socket.EAI_NONAME, "no such name")),
    ],
    ids=["after their time", "after the name is gone"],
)
async def test_old_addresses_do_not_serve_for_ever(
    stale_seconds: float, answer: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They end with their time, and at once when the answer is that there is no such name."""
    monkeypatch.setattr(connector, "_FRESH_SECONDS", 0.0)
    monkeypatch.setattr(connector, "_STALE_SECONDS", stale_seconds)
    server, names = Server(), Names()
    client = Client(idle_connections=0, resolve=names)
    async with serving(always(server, OK), server):
        url = f"http://harmless.example:{server.port}/"
        assert (await post(client, url)).status == 200
        names.answer = answer
        names.answered.clear()
        await post(client, url)
        await names.answered.wait()
        found = await post(client, url)
    await client.close()
    assert (found.cause, found.is_sent) == ("name not resolved", False)


_WITH_NAMES_THAT_HANG = """
import asyncio, socket, sys, threading
from orbit.execution.http1 import Client

system, hung = socket.getaddrinfo, threading.Semaphore(0)

def answer(host, *rest, **given):
    if host.startswith("dead"):
        hung.release()
        threading.Event().wait()
    return system(host, *rest, **given)

socket.getaddrinfo = answer

async def main():
    client = Client()

    async def status(host):
        url, limit = f"http://{host}:{sys.argv[1]}/", 30
        found = await client.exchange("GET", url, {}, b"", timeout_seconds=limit, read_bytes=9)
        return found.status

    dead = [asyncio.create_task(status(f"dead-{n}.example")) for n in range(24)]
    await asyncio.sleep(0)
    print(await status("localhost"), hung.acquire(timeout=9), flush=True)
    await client.close()
    await asyncio.gather(*dead, return_exceptions=True)

asyncio.run(main())
"""


async def test_names_that_hang_hold_up_neither_others_nor_the_end() -> None:
    """With 24 look-ups that never end another name resolves, and the process exits."""
    server = Server()

    async with serving(always(server, OK), server):
        code = [sys.executable, "-c", _WITH_NAMES_THAT_HANG, str(server.port)]
        ended = await asyncio.to_thread(
            subprocess.run, code, capture_output=True, text=True, timeout=60, check=False
        )
    assert (ended.stdout, ended.returncode) == ("200 True\n", 0), ended.stderr
