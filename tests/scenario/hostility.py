"""Hostile receivers: what each does to a request, and what must become of every attempt on it.

Each reads a request's head before it turns hostile, so that what it saw can be held against the
receipts. Nothing here is random or waits for a time.
"""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tests.unit.talking import Server, Talk, reset

Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter
Do = Callable[[Server, Reader, Writer], Awaitable[None]]

SENT_BYTES = 300_000  # more than any socket's buffers take in at once, so that a body has a middle
GIB = 1 << 30
NOT_IN_TIME = "within 3 s"
_PIECE = bytes(1 << 16)


@dataclass(frozen=True, slots=True)
class Hostile:
    """`do` has one connection; `error` is looked for in every receipt. `cause` None: delivered."""

    name: str
    do: Do
    outcome: str
    status: int | None = None
    cause: str | None = None
    error: str | None = None

    @property
    def timeout_seconds(self) -> float:
        """Short where the time's end is what is waited for, else long enough for any machine."""
        return 3.0 if NOT_IN_TIME in (self.error or "") else 60.0

    def talk(self, server: Server) -> Talk:
        async def talk(reader: Reader, writer: Writer) -> None:
            await self.do(server, reader, writer)

        return talk


async def read_head(server: Server, reader: Reader) -> None:
    """A request's head, which is kept, and none of its body."""
    server.requests.append(await reader.readuntil(b"\r\n\r\n"))


# --- the ways of a receiver ---------------------------------------------------------------


async def _say_nothing(server: Server, reader: Reader, writer: Writer) -> None:
    await server.read(reader)
    await asyncio.Event().wait()


async def _read_nothing(server: Server, reader: Reader, writer: Writer) -> None:
    await read_head(server, reader)
    await asyncio.Event().wait()


def _drip(head: bytes) -> Do:
    async def do(server: Server, reader: Reader, writer: Writer) -> None:
        await server.read(reader)
        writer.write(head)
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)

    return do


async def _say_wait_for_ever(server: Server, reader: Reader, writer: Writer) -> None:
    await server.read(reader)
    while True:
        writer.write(b"HTTP/1.1 102 Processing\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.001)


def _pour(status: int) -> Do:
    """1 GiB, or as much of it as is taken."""

    async def do(server: Server, reader: Reader, writer: Writer) -> None:
        await server.read(reader)
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, GIB))
        for _ in range(GIB // len(_PIECE)):
            writer.write(_PIECE)
            await writer.drain()

    return do


def _answer(head: str, body: bytes = b"", *, length: int | None = None) -> Do:
    """Answers every request of a connection so, and ends it if the length is a lie."""
    said = len(body) if length is None else length
    answer = f"HTTP/1.1 {head}\r\nContent-Length: {said}\r\n\r\n".encode("latin-1") + body

    async def do(server: Server, reader: Reader, writer: Writer) -> None:
        while True:
            await server.read(reader)
            writer.write(answer)
            await writer.drain()
            if said > len(body):
                return

    return do


def _reset(when: str) -> Do:
    async def do(server: Server, reader: Reader, writer: Writer) -> None:
        if when == "before the body":
            await read_head(server, reader)
        elif when == "amid the body":
            await read_head(server, reader)
            await reader.readexactly(SENT_BYTES // 3)
        else:
            await server.read(reader)
        if when == "amid the answer":
            writer.write(b"HTTP/1.1 50")
            await writer.drain()
        reset(writer)

    return do


def _retry_after(value: str) -> Do:
    return _answer(f"429 Slow Down\r\nRetry-After: {value}")


def redirect(status: int, to: str) -> Hostile:
    """To elsewhere, where nothing may ever arrive."""
    do = _answer(f"{status} Elsewhere\r\nLocation: {to}")
    return Hostile(f"{status}", do, "failed", status, f"status {status}")


def unknown(name: str, do: Do, cause: str, error: str) -> Hostile:
    """Bytes left, and no status was seen."""
    return Hostile(name, do, "unknown", None, cause, error)


_BOMB = gzip.compress(bytes(50 << 20))

HOSTILE = (
    unknown("never answers", _say_nothing, "timeout", NOT_IN_TIME),
    unknown("never reads", _read_nothing, "timeout", NOT_IN_TIME),
    unknown("drips a head", _drip(b"HTTP/1.1 200 "), "timeout", NOT_IN_TIME),
    Hostile(
        "drips a body",
        _drip(b"HTTP/1.1 500 X\r\nContent-Length: 1000000\r\n\r\n"),
        *("failed", 500, "status 500", NOT_IN_TIME),
    ),
    Hostile(
        "drips a body and well",
        _drip(b"HTTP/1.1 200 X\r\nContent-Length: 1000000\r\n\r\n"),
        *("delivered", 200, None, NOT_IN_TIME),
    ),
    unknown("endless 1xx", _say_wait_for_ever, "answer not understood", "interim answers"),
    Hostile("1 GiB and well", _pour(200), "delivered", 200),
    Hostile("1 GiB and not well", _pour(500), "failed", 500, "status 500"),
    Hostile(
        "gzip bomb", _answer("200 OK\r\nContent-Encoding: gzip", _BOMB), outcome="delivered",
        status=200,
    ),
    Hostile(
        "promises more", _answer("200 OK", b"short", length=100), "delivered", 200,
        error="closed the connection",
    ),
    Hostile("sends more", _answer("200 OK", b"long" * 100, length=2), "delivered", 200),
    unknown(
        "negative length", _answer("200 OK", length=-1), "answer not understood", "Content-Length"
    ),
    *(
        unknown(f"reset {when}", _reset(when), "connection lost", ".")
        for when in ("before the body", "amid the body", "after the body", "amid the answer")
    ),
    *(
        Hostile(f"Retry-After {value}", _retry_after(value), "failed", 429, "status 429")
        for value in (
            "Thu, 01 Jan 2099 00:00:00 GMT", "9" * 400, "-1", "soon", "nan", "Thu, 99 Foo",
        )
    ),
    Hostile("not UTF-8", _answer("200 \xff\r\nContent-Type: t/\xfe", b"\xff\xfe\x00\xc3"),
        "delivered", 200),
    unknown(
        "header of 1 MiB", _answer("200 OK\r\nX: " + "x" * (1 << 20)), "answer not understood",
        "65,536 bytes of headers",
    ),
)  # fmt: skip
