"""From an origin to a connected socket: the name, the guard, the connection, a proxy's tunnel.

The guard judges what a name resolved to, never the name, and each address on its own; only those
that pass are tried (both families side by side, the quicker one wins). With a proxy it is the
proxy's address that is judged. Nothing of a request has left when anything here fails.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address
from urllib.parse import quote, unquote, urlsplit

import aiohappyeyeballs

from orbit import __version__
from orbit.addresses import refusal

_NAMES_SECONDS = 30.0  # how long a name's addresses are believed
_NAMES = 4096
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
        self._resolve = _resolved if resolve is None else resolve
        self._names: dict[str, tuple[float, Sequence[str]]] = {}
        self._lookups: dict[str, asyncio.Task[Sequence[str]]] = {}

    async def connect(self, origin: Origin) -> socket.socket:
        """A socket on which TLS, or a request, may begin. Raises ConnectFailed."""
        if origin.proxy is None:
            return await self._dial(origin.host, origin.port)
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
        until, found = self._names.get(host, (0.0, ()))
        if time.monotonic() < until:
            return found
        lookup = self._lookups.get(host)
        if lookup is None:
            lookup = asyncio.create_task(self._look_up(host), name="orbit-name")
            self._lookups[host] = lookup
            lookup.add_done_callback(functools.partial(self._looked_up, host))
        return await asyncio.shield(lookup)

    async def _look_up(self, host: str) -> Sequence[str]:
        try:
            found = await self._resolve(host)
        except (OSError, UnicodeError) as error:
            raise ConnectFailed("name not resolved", str(error)) from error
        if not found:
            raise ConnectFailed("name not resolved", "the name has no address")
        if len(self._names) >= _NAMES:
            self._names.clear()
        self._names[host] = time.monotonic() + _NAMES_SECONDS, found
        return found

    def _looked_up(self, host: str, lookup: asyncio.Task[Sequence[str]]) -> None:
        self._lookups.pop(host, None)
        if not lookup.cancelled():
            lookup.exception()  # seen, also if all who asked have gone

    async def close(self) -> None:
        lookups = list(self._lookups.values())
        for lookup in lookups:
            lookup.cancel()
        await asyncio.gather(*lookups, return_exceptions=True)


async def _resolved(host: str) -> Sequence[str]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


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
