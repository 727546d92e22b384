"""From an origin to a connected socket: the name, the guard, the connection, a proxy's tunnel.

The guard judges what a name resolved to, never the name, and each address on its own; only those
that pass are tried (both families side by side, the quicker one wins). With a proxy it is the
proxy's address that is judged, and the receiver's host if it is an address itself; a name is
the proxy's to resolve. Nothing of a request has left when anything here fails.

Look-ups have threads of their own, so that names which don't answer hold up neither others nor the
process's end. Addresses are believed for 30 seconds; for three minutes more they are used while
they are asked for anew, also if that fails, unless the answer is that the name has none.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from ipaddress import IPv6Address, ip_address
from urllib.parse import quote, unquote, urlsplit

import aiohappyeyeballs

from orbit import __version__
from orbit.addresses import refusal

_FRESH_SECONDS = 30.0  # how long a name's addresses are believed
_STALE_SECONDS = 180.0  # how much longer they are used while they are looked up again
_LOOK_AGAIN_SECONDS = 5.0  # after a look-up that failed
_NAMES = 4096
_LOOK_UPS = 32
_NO_SUCH_NAME = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
_TRY_NEXT_SECONDS = 0.25  # RFC 8305: before the next address is tried beside the first
_TUNNEL_HEAD_BYTES = 16_384
_PORTS = {"http": 80, "https": 443}

Resolve = Callable[[str], Awaitable[Sequence[str]]]


class ConnectFailed(Exception):
    """No connection; `cause` is short and the same for the same kind of failure."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True, slots=True)
class Proxy:
    """A forward proxy; `authorization` is a line of a request's head, or nothing."""

    host: str
    port: int
    authorization: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where connections that can stand in for each other lead to."""

    is_secure: bool
    host: str
    port: int
    proxy: Proxy | None = None

    @property
    def authority(self) -> str:
        """Host and port as a tunnel is asked for."""
        return f"{_bracketed(self.host)}:{self.port}"


@dataclass(frozen=True, slots=True)
class Place:
    """An URL taken apart: its origin, what follows the method, and the line of the host."""

    origin: Origin
    target: str = field(repr=False)
    host_line: str


@functools.lru_cache(maxsize=4096)
def place_of(url: str, proxy: str | None) -> Place:
    """Takes an URL apart. Raises ValueError if it is none of HTTP's, without repeating it."""
    parts = urlsplit(url)
    if parts.scheme not in _PORTS or not parts.hostname:
        raise ValueError("an URL must begin with http:// or https:// and name a host")
    if "@" in parts.netloc:
        raise ValueError("an URL must not carry credentials")
    host = _ascii(parts.hostname)
    port = parts.port or _PORTS[parts.scheme]
    shown = _bracketed(host) + ("" if port == _PORTS[parts.scheme] else f":{port}")
    is_secure = parts.scheme == "https"
    via = None if proxy is None else _proxy_of(proxy)
    target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
    if parts.query:
        target += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~?[]")
    host_line = f"Host: {shown}\r\n"
    if via is not None and not is_secure:
        target, host_line = f"http://{shown}{target}", host_line + via.authorization
    return Place(Origin(is_secure, host, port, via), target, host_line)


def _proxy_of(url: str) -> Proxy:
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError("a proxy must be given as http://host:port")
    authorization = ""
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        encoded = base64.b64encode(pair.encode()).decode()
        authorization = f"Proxy-Authorization: Basic {encoded}\r\n"
    return Proxy(_ascii(parts.hostname), parts.port or 80, authorization)


def _ascii(host: str) -> str:
    found = host if host.isascii() else host.encode("idna").decode()
    if not found.isprintable() or " " in found:
        raise ValueError("an URL's host must be a name or an address")
    return found


@dataclass(frozen=True, slots=True)
class _Found:
    """A name's addresses, and by the monotonic clock how long they hold."""

    addresses: Sequence[str]
    fresh_until: float
    usable_until: float


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class Connector:
    """Opens sockets; names are looked up once for all who ask at a time.

    Args:
        allow_private: whether private and loopback addresses may be connected to.
        resolve: gives a name's addresses as text; the system's resolver if it is not given.
    """

    def __init__(self, *, allow_private: bool, resolve: Resolve | None = None) -> None:
        self._allow_private = allow_private
        self._resolve = resolve or functools.partial(_resolved, asyncio.Semaphore(_LOOK_UPS))
        self._names: dict[str, _Found] = {}
        self._lookups: dict[str, asyncio.Task[Sequence[str]]] = {}

    async def connect(self, origin: Origin) -> socket.socket:
        """A socket on which TLS, or a request, may begin. Raises ConnectFailed."""
        if origin.proxy is None:
            return await self._dial(origin.host, origin.port)
        literal = _literal(origin.host)
        if literal is not None:
            self._judged([literal])
        sock = None
        try:
            sock = await self._dial(origin.proxy.host, origin.proxy.port)
            if origin.is_secure:
                await _tunnel(sock, origin, origin.proxy)
        except BaseException as error:
            if sock is not None:
                sock.close()
            if isinstance(error, ConnectFailed) and error.cause != "address refused":
                raise ConnectFailed("proxy", f"the proxy: {error}") from error
            raise
        return sock

    async def _dial(self, host: str, port: int) -> socket.socket:
        allowed = self._judged(await self._addresses(host))
        loop = asyncio.get_running_loop()
        try:
            sock = await aiohappyeyeballs.start_connection(
                [_info(address, port) for address in allowed],
                happy_eyeballs_delay=_TRY_NEXT_SECONDS,
                interleave=1,
                loop=loop,
            )
        except ConnectionRefusedError as error:
            raise ConnectFailed("connection refused", str(error)) from error
        except (OSError, RuntimeError) as error:  # uvloop raises both
            raise ConnectFailed("cannot connect", str(error)) from error
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def _judged(self, addresses: Sequence[str]) -> list[str]:
        refused = {one: refusal(one, allow_private=self._allow_private) for one in addresses}
        allowed = [address for address, reason in refused.items() if reason is None]
        if not allowed:
            reasons = ", ".join(f"{address} is {reason}" for address, reason in refused.items())
            raise ConnectFailed("address refused", reasons)
        return allowed

    async def _addresses(self, host: str) -> Sequence[str]:
        try:
            return (str(ip_address(host)),)
        except ValueError:
            pass
        now, known = time.monotonic(), self._names.get(host)
        if known is not None and now < known.fresh_until:
            return known.addresses
        lookup = self._lookups.get(host)
        if lookup is None:
            lookup = asyncio.create_task(self._look_up(host), name="orbit-name")
            self._lookups[host] = lookup
            lookup.add_done_callback(functools.partial(self._looked_up, host))
        if known is not None and now < known.usable_until:
            return known.addresses
        return await asyncio.shield(lookup)

    async def _look_up(self, host: str) -> Sequence[str]:
        try:
            found = await self._resolve(host)
        except (OSError, RuntimeError, UnicodeError) as error:  # no thread is one of them
            self._not_found(host, error)
            raise ConnectFailed("name not resolved", str(error)) from error
        if not found:
            self._names.pop(host, None)
            raise ConnectFailed("name not resolved", "the name has no address")
        if len(self._names) >= _NAMES:
            self._names.clear()
        fresh_until = time.monotonic() + _FRESH_SECONDS
        self._names[host] = _Found(found, fresh_until, fresh_until + _STALE_SECONDS)
        return found

    def _not_found(self, host: str, error: Exception) -> None:
        """What was known goes if the name has no address; else it serves until its end."""
        known = self._names.pop(host, None)
        if known is None or getattr(error, "errno", None) in _NO_SUCH_NAME:
            return
        again_at = min(time.monotonic() + _LOOK_AGAIN_SECONDS, known.usable_until)
        self._names[host] = replace(known, fresh_until=again_at)

    def _looked_up(self, host: str, lookup: asyncio.Task[Sequence[str]]) -> None:
        self._lookups.pop(host, None)
        if not lookup.cancelled():
            lookup.exception()  # seen, also if all who asked have gone

    async def close(self) -> None:
        """Waits for nobody's answer: a look-up under way ends with its thread, unheard."""
        lookups = list(self._lookups.values())
        for lookup in lookups:
            lookup.cancel()
        await asyncio.gather(*lookups, return_exceptions=True)


async def _resolved(slots: asyncio.Semaphore, host: str) -> Sequence[str]:
    """The system's answer, in a thread that nothing waits for: look-ups can't be cancelled.

    The loop's threads, and those of an executor, are few, and are waited for at the end.
    """
    answer: Future[Sequence[str]] = Future()
    answer.set_running_or_notify_cancel()

    def look_up() -> None:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            answer.set_result([str(address[0]) for *_, address in found])
        except (OSError, ValueError) as error:
            answer.set_exception(error)

    async with slots:
        threading.Thread(target=look_up, name="orbit-name", daemon=True).start()
        return await asyncio.wrap_future(answer)


def _literal(host: str) -> str | None:
    """The address that a proxy may read in a host, short and numeric forms too; None for a name."""
    text = unquote(host).rstrip(".")
    try:
        return str(ip_address(text))
    except ValueError:
        pass
    try:
        return socket.inet_ntoa(socket.inet_aton(text))
    except (OSError, UnicodeError):
        return None


def _info(address: str, port: int) -> aiohappyeyeballs.AddrInfoType:
    if isinstance(ip_address(address), IPv6Address):
        where = (address, port, 0, 0)
        return socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", where
    return socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port)


async def _tunnel(sock: socket.socket, origin: Origin, proxy: Proxy) -> None:
    """Asks the proxy for a connection to the origin; anything but a plain 2xx is a refusal."""
    loop = asyncio.get_running_loop()
    where = origin.authority
    head = f"CONNECT {where} HTTP/1.1\r\nHost: {where}\r\nUser-Agent: orbit/{__version__}\r\n"
    answer = b""
    try:
        await loop.sock_sendall(sock, f"{head}{proxy.authorization}\r\n".encode())
        while b"\r\n\r\n" not in answer and len(answer) <= _TUNNEL_HEAD_BYTES:
            part = await loop.sock_recv(sock, 4096)
            if not part:
                break
            answer += part
    except OSError as error:
        raise ConnectFailed("proxy", f"the connection was lost: {error}") from error
    status = answer.split(b"\r\n", 1)[0].split(b" ")[1:2]
    if not answer.endswith(b"\r\n\r\n") or not status or not status[0].startswith(b"2"):
        said = b" ".join(status).decode("latin-1")[:20] or "nothing"
        raise ConnectFailed("proxy", f"no tunnel: it answered {said}")


@functools.cache
def trusted() -> ssl.SSLContext:
    """The system's certificate authorities, read once."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context
