"""An HTTP/1.1 client that sends once: what left, and what came back, is known exactly.

A request is written to one connection, kept alive or new, and never again: no resending, no
redirects, no cookies, no decompression, no header but its own and Host, Content-Length,
User-Agent, Accept. Whatever the network or the receiver does is a value, an `Exchange`. What is
sent by a lease leaves only while that is ours (`lapse`), and what ends early is reset.

A final status, once seen, stands, whatever happens to the answer's body. A connection is kept
only after a request that left whole and an answer that ended where it said; any byte that
arrives on an idle one ends it. llhttp (httptools) parses; the loop may be uvloop's or asyncio's.
"""

from __future__ import annotations

import asyncio
import functools
import re
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import httptools

from orbit import __version__
from orbit.execution.connector import (
    ConnectFailed,
    Connector,
    Origin,
    Resolve,
    place_of,
    trusted,
)
from orbit.execution.lapse import (
    LAPSED,
    Hold,
    Lapses,
    drop_unsent,
    has_room,
    is_acknowledged,
    keep_little_unsent,
)

_PIECE_BYTES = 16_384
_HEAD_BYTES = 65_536  # also of what may come at a stretch without any of the body
_TOO_LONG = f"more than {_HEAD_BYTES:,} bytes of headers"
_MAX_INTERIM = 16
_IDLE_SECONDS = 4.0  # common servers close at 5
_LONGEST_IDLE_SECONDS = 60.0
_SWEEP_SECONDS = 1.0
_METHODS = frozenset({"DELETE", "GET", "OPTIONS", "PATCH", "POST", "PUT"})
WITHHELD = "withheld"
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_OURS = frozenset(
    {"host", "content-length", "transfer-encoding", "connection", "expect", "proxy-authorization"}
)
_DEFAULTS = {"user-agent": f"User-Agent: orbit/{__version__}\r\n", "accept": "Accept: */*\r\n"}
_KEEP_ALIVE = re.compile(r"(?i)(?:^|[\s,])timeout\s*=\s*(\d{1,6})")


@dataclass(slots=True)
class Exchange:
    """What is known of one request and its answer; instants by `time.monotonic()`.

    `is_sent` tells whether any byte of the request was handed to the socket. `cause` is None if
    the answer came whole or was cut at the bound (`is_truncated`); otherwise it is one of: name
    not resolved, address refused, connection refused, cannot connect, tls, proxy, timeout,
    connection lost, answer not understood, request not valid, withheld, lease over; `error` says
    more. Headers have lower-case names; those that came several times are joined by a comma.
    """

    started_at: float
    is_sent: bool = False
    is_reused: bool = False
    connected_at: float | None = None
    first_byte_at: float | None = None
    ended_at: float | None = None
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    body: bytes = field(default=b"", repr=False)
    is_truncated: bool = False
    cause: str | None = None
    error: str | None = None


class Client:
    """Connections for all who ask; idle ones are kept, those in use are not limited.

    Args:
        allow_private: whether private and loopback addresses may be connected to.
        idle_connections: how many are kept at most.
        resolve: gives a name's addresses as text; the system's resolver if it is not given.
        tls: whom to trust; the system's authorities if it is not given.
    """

    def __init__(
        self,
        *,
        allow_private: bool = True,
        idle_connections: int = 256,
        resolve: Resolve | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._connector = Connector(allow_private=allow_private, resolve=resolve)
        self._tls, self._most_idle = tls, idle_connections
        self._idle: dict[Origin, list[_Connection]] = {}
        self._idle_count = 0
        self._open: set[_Connection] = set()
        self._lapses = Lapses(self._open)
        self._sweeping: asyncio.TimerHandle | None = None

    async def exchange(  # noqa: PLR0913 - all but the request have defaults
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        content: bytes,
        *,
        timeout_seconds: float | None,
        read_bytes: int,
        keep_bytes: int | None = None,
        proxy: str | None = None,
        hold: Hold | None = None,
    ) -> Exchange:
        """Sends once and reads the answer to `read_bytes`, of which `keep_bytes` are kept.

        `timeout_seconds` bounds all of it, names and connecting included. `hold` is asked when
        there is a connection, just before the first byte: after a no, nothing is sent; and before
        each further piece. Raises only what cancels it; the connection is then closed.
        """
        found = Exchange(time.monotonic())
        try:
            place = place_of(url, proxy)
            head = _head(method, place.target, place.host_line, headers, len(content))
        except (ValueError, UnicodeError) as error:
            return _failed(found, "request not valid", str(error))
        connection = self._take(place.origin)
        if connection is not None:
            found.is_reused = True
        else:
            connection = await self._connect(place.origin, found, timeout_seconds)
            if connection is None:
                return found
        found.connected_at = time.monotonic()
        if hold is not None and not hold.may_begin():
            self._keep(place.origin, connection, found.connected_at + _IDLE_SECONDS)
            return _failed(found, WITHHELD, "it may no longer be sent")
        left = timeout_seconds and max(timeout_seconds - (found.connected_at - found.started_at), 0)
        bounds = read_bytes, read_bytes if keep_bytes is None else keep_bytes
        if hold is not None:
            self._lapses.expect(hold)
        idle_seconds = await connection.exchange(found, head, content, bounds, left, hold)
        found.ended_at = time.monotonic()
        if idle_seconds > 0:
            self._keep(place.origin, connection, found.ended_at + idle_seconds)
        else:
            connection.abort()
        return found

    async def close(self) -> None:
        """Ends every connection, and returns when all are gone."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        self._lapses.stop()
        self._idle.clear()
        self._most_idle = 0
        await self._connector.close()
        ends = [connection.end for connection in self._open]
        for connection in list(self._open):
            connection.abort()
        await asyncio.gather(*ends)

    def _take(self, origin: Origin) -> _Connection | None:
        """The connection that was used last, if it still stands."""
        idle = self._idle.get(origin)
        while idle:
            connection = idle.pop()
            self._idle_count -= 1
            if connection.is_fresh(time.monotonic()):
                return connection
            connection.abort()
        return None

    def _keep(self, origin: Origin, connection: _Connection, until: float) -> None:
        if self._idle_count >= self._most_idle:
            connection.abort()
            return
        connection.idle_until = until
        self._idle.setdefault(origin, []).append(connection)
        self._idle_count += 1
        if self._sweeping is None:
            self._sweep_later()

    def _sweep_later(self) -> None:
        self._sweeping = asyncio.get_running_loop().call_later(_SWEEP_SECONDS, self._sweep)

    def _sweep(self) -> None:
        """Ends what has been idle for too long; no timer runs while nothing is idle."""
        now, self._sweeping = time.monotonic(), None
        for origin, idle in list(self._idle.items()):
            kept = [connection for connection in idle if connection.is_fresh(now)]
            for connection in set(idle).difference(kept):
                connection.abort()
            self._idle_count -= len(idle) - len(kept)
            if kept:
                self._idle[origin] = kept
            else:
                del self._idle[origin]
        if self._idle:
            self._sweep_later()

    async def _connect(
        self, origin: Origin, found: Exchange, timeout_seconds: float | None
    ) -> _Connection | None:
        """A new connection; None if there is none, and `found` then says why."""
        try:
            async with asyncio.timeout(timeout_seconds):
                return await self._begin(origin, await self._connector.connect(origin))
        except ConnectFailed as error:
            _failed(found, error.cause, str(error))
        except TimeoutError:
            _failed(found, "timeout", "no connection in time")
        except OSError as error:  # of a connected socket nothing but TLS can fail
            _failed(found, "tls" if origin.is_secure else "cannot connect", str(error))
        return None

    async def _begin(self, origin: Origin, sock: socket.socket) -> _Connection:
        loop = asyncio.get_running_loop()
        tls = (self._tls or trusted()) if origin.is_secure else None
        connection = _Connection(loop, sock, self._open, is_secure=tls is not None)
        await loop.create_connection(
            lambda: connection,
            sock=sock,
            ssl=tls,
            server_hostname=origin.host if tls is not None else None,
        )
        return connection


class _Connection(asyncio.Protocol):
    """One connection and the exchange that is on it, if there is one."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        open_ones: set[_Connection],
        *,
        is_secure: bool,
    ) -> None:
        self._loop, self._sock, self._all, self._is_secure = loop, sock, open_ones, is_secure
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport
        self.end: asyncio.Future[None] = loop.create_future()
        self._found: Exchange | None = None
        self._answered: asyncio.Future[None]
        self._room: asyncio.Future[None] | None = None
        self.hold: Hold | None = None
        self._is_lost = self._is_broken = self._is_spoiled = self._is_sending = False
        self.idle_until = 0.0

    # --- the exchange ---------------------------------------------------------------------

    def is_fresh(self, now: float) -> bool:
        """Whether an idle connection may be used: it stands, is not old, and nothing arrived.

        The socket itself is asked, since the loop may not have seen yet what came.
        """
        if self._is_lost or self._is_spoiled or now >= self.idle_until:
            return False
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return not self._transport.is_closing()
        except OSError:
            pass
        return False

    async def exchange(
        self,
        found: Exchange,
        head: bytes,
        content: bytes,
        bounds: tuple[int, int],
        seconds: float | None,
        hold: Hold | None,
    ) -> float:
        """Sends, and reads the answer into `found`; how long the connection may then be idle."""
        if self._is_lost or self._is_spoiled:  # by bytes that no request had asked for
            _failed(found, "connection lost", "the receiver did not wait for the request")
            return 0
        self._found, self._answered, self.hold = found, self._loop.create_future(), hold
        self._read_bytes, self._keep_bytes = bounds
        self._body: list[bytes] = []
        self._size = self._head_size = self._barren = self._interim = 0
        self._idle_seconds = 0.0
        timer = None if seconds is None else self._loop.call_later(seconds, self._expire)
        found.is_sent = self._is_sending = True
        try:
            if len(content) <= _PIECE_BYTES:
                first, content = head + content, b""
            else:
                first = head
                keep_little_unsent(self._sock, _PIECE_BYTES)
            taken = self._give(first)
            if content or taken < len(first):
                await self._send(first[taken:], content)
            else:
                self._is_sending = False
            await self._answered
        except BaseException:
            self.abort()
            raise
        finally:
            self._found = self.hold = None
            if timer is not None:
                timer.cancel()
        found.body = b"".join(self._body)
        self._body = []
        return 0 if self._is_spoiled or self._is_sending or self._is_lost else self._idle_seconds

    async def _send(self, *parts: bytes) -> None:
        """In pieces, at the receiver's pace; stops when it has refused the request."""
        for part in parts:
            rest = memoryview(part)
            while rest:
                if not await self._may_go_on():
                    return
                rest = rest[self._give(rest[:_PIECE_BYTES]) :]
        self._is_sending = False

    async def _may_go_on(self) -> bool:
        """Whether more is to be sent, as soon as the kernel takes more."""
        await self._await_room()
        if self._has_refused():
            return False
        if self.hold is not None and self.hold.seconds_left() <= 0:
            self.lapse()
            return False
        return True

    def _give(self, data: bytes | memoryview) -> int:
        """Hands bytes to the kernel, now; how many it took. What TLS makes of them is its own."""
        if self._is_secure:
            self._transport.write(data)
            return len(data)
        try:
            return self._sock.send(data)
        except BlockingIOError:
            return 0
        except OSError:  # whoever reads from the connection says why it is lost
            self._is_broken = True
            return 0

    async def _await_room(self) -> None:
        """Until the kernel takes more: nothing waits in between, where nobody looks at the lease.

        A second descriptor is watched, since the loop watches the first one for the transport.
        """
        await asyncio.sleep(0)  # so that an answer that is there is read before more is sent
        if self._has_refused() or has_room(self._sock):
            return
        self._room = self._loop.create_future()
        with self._sock.dup() as watched:
            self._loop.add_writer(watched, self._make_room)
            try:
                await self._room
            finally:
                self._loop.remove_writer(watched)

    def lapse(self) -> None:
        """Its lease is over: what the receiver's machine has not got, it does not get."""
        if self._found is None or self._is_spoiled:
            return
        if self._is_sending or not is_acknowledged(self._sock):
            self._end(LAPSED, "the lease was over before all of it had left")
            self.abort()
            self._make_room()

    def _has_refused(self) -> bool:
        """An early 2xx is no refusal: who says so may still read."""
        found = self._found
        if found is None or self._is_lost or self._is_broken or self._is_spoiled:
            return True
        return found.status is not None and not 200 <= found.status <= 299

    def _make_room(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def _end(self, cause: str | None = None, error: str | None = None) -> None:
        """The exchange is over; with a cause, so is the connection."""
        found = self._found
        if found is None or self._answered.done():
            return
        found.cause, found.error = cause, error
        self._answered.set_result(None)
        self._make_room()
        if cause is not None:
            self.abort()

    def _expire(self) -> None:
        """Also ends what goes on after an answer: a body that nobody takes."""
        self._end("timeout", "no complete answer in time")
        self.abort()
        self._make_room()

    def abort(self) -> None:
        """Ends the connection; of a request under way the rest is not sent any more."""
        self._is_spoiled = True
        if self._found is not None:
            drop_unsent(self._sock)
        self._transport.abort()

    # --- what the loop says ---------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._all.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._is_lost = True
        self._all.discard(self)
        self.end.set_result(None)
        if self._found is not None and not self._answered.done():
            if self._found.status is not None and self._is_until_end and error is None:
                self._end()
            else:
                self._end("connection lost", str(error or "the receiver closed the connection"))
        self._make_room()

    def data_received(self, data: bytes) -> None:
        found = self._found
        if found is None or self._answered.done():
            self.abort()
            return
        if found.first_byte_at is None:
            found.first_byte_at = time.monotonic()
        size = self._size
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._is_spoiled = True
            self._end("answer not understood", str(error))
            return
        self._barren = self._barren + len(data) if self._size == size else 0
        if self._barren > _HEAD_BYTES:
            self._end("answer not understood", _TOO_LONG)

    # --- what the parser says -------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._answered.done():
            self._is_spoiled = True
        self._headers: dict[str, str] = {}

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_size += len(name) + len(value) + 4
        if self._head_size > _HEAD_BYTES:
            self._end("answer not understood", _TOO_LONG)
            return
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        held = self._headers.get(key)
        self._headers[key] = text if held is None else f"{held}, {text}"

    def on_headers_complete(self) -> None:
        found, headers = self._found, self._headers
        if found is None or self._answered.done():
            return
        self._headers = {}  # what comes after the body is nobody's
        status = self._parser.get_status_code()
        if status < 200:
            self._interim += 1
            if status == 101 or self._interim > _MAX_INTERIM:
                self._end("answer not understood", f"interim answers without end ({status})")
            return
        found.status, found.headers = status, headers
        self._is_until_end = "content-length" not in headers and (
            "chunked" not in headers.get("transfer-encoding", "").lower()
        )
        if self._parser.should_keep_alive():
            self._idle_seconds = _idle_seconds(headers.get("keep-alive", ""))
        if self._is_sending and self._has_refused():
            self._make_room()

    def on_body(self, part: bytes) -> None:
        found = self._found
        if found is None or self._answered.done():
            return
        room = self._keep_bytes - min(self._size, self._keep_bytes)
        self._size += len(part)
        if room:
            self._body.append(part if len(part) <= room else part[:room])
        if self._size > self._read_bytes:
            found.is_truncated = self._is_spoiled = True
            self._end()

    def on_message_complete(self) -> None:
        if self._found is not None and self._found.status is not None:
            self._end()


def _head(method: str, target: str, host_line: str, headers: Mapping[str, str], size: int) -> bytes:
    """A request's head. Raises ValueError for what would not be read as it was written."""
    if method not in _METHODS:
        raise ValueError(f"a method must be one of {', '.join(sorted(_METHODS))}")
    defaults = _checked_names(tuple(headers))
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if lines.count("\n") != len(headers) or lines.count("\r") != len(headers) or "\0" in lines:
        raise ValueError("a header's value must not contain a line's end")
    start = f"{method} {target} HTTP/1.1\r\n{host_line}{defaults}"
    return f"{start}Content-Length: {size}\r\n{lines}\r\n".encode()


@functools.lru_cache(maxsize=1024)
def _checked_names(names: tuple[str, ...]) -> str:
    """The lines that go along unless they are given."""
    given = [name.lower() for name in names]
    for name in given:
        if not _TOKEN.fullmatch(name):
            raise ValueError("a header's name must be a token")
        if name in _OURS or given.count(name) > 1:
            raise ValueError(f"the header {name} must not be given, or not twice")
    return "".join(line for name, line in _DEFAULTS.items() if name not in given)


@functools.lru_cache(maxsize=256)
def _idle_seconds(keep_alive: str) -> float:
    """How long a connection may be idle, a second less than the receiver says it keeps it."""
    said = _KEEP_ALIVE.search(keep_alive)
    return _IDLE_SECONDS if said is None else min(int(said[1]) - 1.0, _LONGEST_IDLE_SECONDS)


def _failed(found: Exchange, cause: str, error: str) -> Exchange:
    found.cause, found.error, found.ended_at = cause, error, time.monotonic()
    return found
