"""How an endpoint is reached, a piece at a time: name, connection, TLS, one answer.

Each piece takes at most LIMIT_SECONDS, and what the network does is a value, never an exception.
Connections go to an address that was resolved (and judged) before, or to the endpoint's proxy;
proxy variables of the environment play no part. Certificates are verified as dispatch verifies
them, by the system's authorities. No reason repeats what the other side sent, since that may
hold what was sent to it.
"""

from __future__ import annotations

import asyncio
import base64
import os
import socket
import ssl
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, unquote, urlsplit

from orbit import __version__
from orbit.clock import SystemClock

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

LIMIT_SECONDS = 3.0
_UNKNOWN_ISSUER = "of an issuer that is not known here, or not sent along"
_VERIFICATION = {
    2: _UNKNOWN_ISSUER,
    18: "self-signed",
    19: "from an authority that this machine does not trust",
    20: _UNKNOWN_ISSUER,
    21: _UNKNOWN_ISSUER,
}
_NO_ANSWER = f"no answer within {LIMIT_SECONDS:g} s"


@dataclass(frozen=True, slots=True)
class Target:
    """Where a URL leads: its host and port, and where the connection goes (a proxy, or there)."""

    scheme: str
    host: str
    port: int
    proxy: str | None = field(default=None, repr=False)

    @classmethod
    def of(cls, url: str, proxy: str | None) -> Target:
        """The target of an http:// or https:// URL."""
        parts = urlsplit(url)
        return cls(parts.scheme, parts.hostname or "", _port(parts), proxy)

    @property
    def is_tls(self) -> bool:
        """Whether the URL asks for TLS."""
        return self.scheme == "https"

    @property
    def authority(self) -> str:
        """`host:port`."""
        return authority(self.host, self.port)

    @property
    def first_hop(self) -> tuple[str, int]:
        """Host and port that a connection is made to."""
        if self.proxy is None:
            return self.host, self.port
        parts = urlsplit(self.proxy)
        return parts.hostname or "", _port(parts)


@dataclass(frozen=True, slots=True)
class Handshake:
    """How a TLS handshake ended: with a certificate's expiry, or the reason why not."""

    expires_at: datetime | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Heard:
    """What one request was answered with: a status, or the reason why there is none.

    `skew_seconds` is by how much this machine's clock is ahead of the answer's `Date`.
    """

    status: int | None = None
    reason: str | None = None
    skew_seconds: float | None = None


def authority(host: str, port: int) -> str:
    """`host:port`, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def resolve(host: str, port: int) -> tuple[list[str], str]:
    """The host's addresses, each once and in order; none, and why."""
    # A lookup cannot be cancelled, and the loop would wait for its own threads at the end.
    looked_up: Future[list[str]] = Future()
    looked_up.set_running_or_notify_cancel()

    def look_up() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            looked_up.set_result(list(dict.fromkeys(str(one[4][0]) for one in found)))
        except (OSError, UnicodeError) as error:
            looked_up.set_exception(error)

    threading.Thread(target=look_up, daemon=True).start()
    try:
        async with asyncio.timeout(LIMIT_SECONDS):
            return await asyncio.wrap_future(looked_up), ""
    except TimeoutError:
        return [], _NO_ANSWER
    except (OSError, UnicodeError) as error:
        return [], _words(error)


async def connect(addresses: Sequence[str], port: int) -> dict[str, str | None]:
    """Connects to all addresses at once, and hangs up: for each the reason why not, or None."""
    reasons = await asyncio.gather(*(_connected(address, port) for address in addresses))
    return dict(zip(addresses, reasons, strict=True))


async def _connected(address: str, port: int) -> str | None:
    try:
        async with asyncio.timeout(LIMIT_SECONDS):
            _, writer = await asyncio.open_connection(address, port)
    except TimeoutError:
        return _NO_ANSWER
    except OSError as error:
        return _words(error)
    await _hang_up(writer)
    return None


async def handshake(target: Target, address: str) -> Handshake:
    """Begins TLS with the target over an address of its first hop, verified as dispatch does."""
    try:
        certificate = await _certificate(target, address, ssl.create_default_context())
    except TimeoutError:
        return Handshake(reason=_NO_ANSWER)
    except ssl.SSLCertVerificationError as error:
        return Handshake(reason=await _verification(target, address, error))
    except ssl.SSLError as error:
        return Handshake(reason=f"it does not speak TLS as this machine does ({error.reason})")
    except _TunnelRefused as error:
        return Handshake(reason=str(error))
    except (OSError, EOFError, ValueError, asyncio.LimitOverrunError):
        return Handshake(reason="the connection broke during the handshake")
    return Handshake(expires_at=certificate.not_valid_after_utc)


class _TunnelRefused(Exception):
    """A proxy did not open a tunnel; the message says how it answered."""


async def _certificate(target: Target, address: str, context: ssl.SSLContext) -> Certificate:
    from cryptography.x509 import load_der_x509_certificate

    async with asyncio.timeout(LIMIT_SECONDS):
        reader, writer = await asyncio.open_connection(address, target.first_hop[1])
        try:
            if target.proxy is not None:
                await _tunnel(target, reader, writer)
            await writer.start_tls(context, server_hostname=target.host)
            encoded = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        finally:
            await _hang_up(writer)
    return load_der_x509_certificate(encoded)


async def _tunnel(
    target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """CONNECT (RFC 9110, 9.3.6). Raises _TunnelRefused unless the proxy says 2xx."""
    lines = [f"CONNECT {target.authority} HTTP/1.1", f"Host: {target.authority}"]
    parts = urlsplit(target.proxy or "")
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        lines.append(f"Proxy-Authorization: Basic {base64.b64encode(pair.encode()).decode()}")
    writer.write("".join(f"{line}\r\n" for line in (*lines, "")).encode())
    status = (await reader.readuntil(b"\r\n\r\n")).split(None, 2)[1]
    if not status.startswith(b"2"):
        raise _TunnelRefused(
            f"the proxy answers with status {status[:3].decode('ascii', 'replace')}"
        )


async def _verification(target: Target, address: str, error: ssl.SSLCertVerificationError) -> str:
    """Why a certificate was not accepted, in plain words, with what stands in it.

    The numbers are OpenSSL's X509_V_ERR codes, which never change.
    """
    unverified = ssl.create_default_context()
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    shown = None
    with suppress(OSError, EOFError, ValueError, asyncio.LimitOverrunError, _TunnelRefused):
        shown = await _certificate(target, address, unverified)
    match error.verify_code:
        case 10:
            at = f" on {shown.not_valid_after_utc:%Y-%m-%d}" if shown else ""
            return f"its certificate expired{at}"
        case 9:
            at = f"before {shown.not_valid_before_utc:%Y-%m-%d}" if shown else "yet"
            return f"its certificate is not valid {at}"
        case 62 | 64:
            names = _names(shown) if shown else ""
            return f"its certificate is for {names or 'another name'}, not for {target.host}"
        case _:
            known = _VERIFICATION.get(error.verify_code)
            return f"its certificate is {known or f'not accepted: {error.verify_message}'}"


def _names(certificate: Certificate) -> str:
    from cryptography.x509 import ExtensionNotFound, SubjectAlternativeName

    try:
        extension = certificate.extensions.get_extension_for_class(SubjectAlternativeName)
    except (ExtensionNotFound, ValueError):
        return ""
    names = [str(one.value) for one in extension.value]
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


async def ask(
    method: str, url: str, headers: Mapping[str, str], *, proxy: str | None, address: str
) -> Heard:
    """One request without a body, over this address of the first hop; redirects not followed."""
    import httpx

    asked = httpx.URL(url)
    given = {"User-Agent": f"orbit/{__version__}", "Accept": "*/*", **headers}
    extensions = {}
    if proxy is None:  # goes to the address that was judged, not to what a second lookup says
        given["Host"] = asked.netloc.decode()
        extensions["sni_hostname"] = asked.host
        asked = asked.copy_with(host=address)
    clock = SystemClock()
    try:
        async with (
            asyncio.timeout(LIMIT_SECONDS),
            httpx.AsyncClient(
                verify=ssl.create_default_context(),
                proxy=proxy,
                trust_env=False,
                follow_redirects=False,
                timeout=LIMIT_SECONDS,
            ) as client,
        ):
            before = clock.now()
            async with client.stream(
                method, asked, headers=given, extensions=extensions
            ) as response:
                middle = before + (clock.now() - before) / 2
                skew = _skew(middle, response.headers.get("Date"))
                return Heard(response.status_code, None, skew)
    except (TimeoutError, httpx.TimeoutException):
        return Heard(reason=_NO_ANSWER)
    except httpx.ProxyError:
        return Heard(reason="the proxy refuses")
    except httpx.ConnectError as error:
        is_tls = isinstance(_root(error), ssl.SSLError)
        return Heard(reason="no TLS connection" if is_tls else "no connection")
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError):
        return Heard(reason="no HTTP answer came back")


def _skew(middle: datetime, date: str | None) -> float | None:
    """Seconds; a `Date` has whole ones, so half of one is what it leaves out on average."""
    try:
        at = parsedate_to_datetime(date or "")
        at = at.replace(tzinfo=UTC) if at.tzinfo is None else at
        return (middle - at).total_seconds() - 0.5
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def _root(error: BaseException) -> BaseException:
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


async def _hang_up(writer: asyncio.StreamWriter) -> None:
    """Closes at once. Amid a handshake the writer would wait for ever to be told that it is."""
    writer.transport.abort()
    await asyncio.sleep(0)


def _port(parts: SplitResult) -> int:
    return parts.port or (443 if parts.scheme == "https" else 80)


def _words(error: Exception) -> str:
    """The system's words for an error, without numbers and addresses."""
    number = getattr(error, "errno", None)
    if isinstance(error, OSError) and not isinstance(error, socket.gaierror) and number:
        return os.strerror(number)
    return getattr(error, "strerror", None) or str(error)
