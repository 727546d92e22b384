"""One attempt on the wire: what goes out, and what became of it.

Nothing here is sent twice: the client's own resending is off, redirects are not followed, and
the body is read whole before the first byte leaves. The answer is read to a bound, in bytes and
in time. Whatever happens is a value: `not_sent` (no connection, so no byte left), `delivered`
and `failed` (an answer's status was seen), `unknown` (bytes may have left, no answer seen).
"""

from __future__ import annotations

import asyncio
import base64
import io
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import SimpleNamespace
from typing import Any

import aiohttp

from orbit import __version__
from orbit.vocabulary import printable

ANSWER_BYTES = 4096
_ANSWER_BYTES_READ = 65536  # a longer answer costs the connection, which is then not reused
_PIECE_BYTES = 65536


class Outcome(StrEnum):
    """What became of an attempt."""

    DELIVERED = "delivered"
    FAILED = "failed"
    NOT_SENT = "not_sent"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A request, ready to be sent. `timeout_seconds` bounds all of it.

    `secrets` are masked in what is kept of the answer, should the receiver repeat them.
    """

    method: str
    url: str
    headers: Mapping[str, str] = field(repr=False)
    content: bytes = field(repr=False)
    timeout_seconds: float
    secrets: Sequence[str] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class WireResult:
    """What became of one attempt.

    `cause` is short and the same for the same kind of failure; `error` says more. Seconds count
    from the beginning of the attempt. `answer` is the beginning of the answer's body.
    """

    outcome: Outcome
    status: int | None = None
    cause: str | None = None
    error: str | None = None
    connect_seconds: float | None = None
    first_byte_seconds: float | None = None
    total_seconds: float | None = None
    answer: bytes = b""
    answer_content_type: str | None = None
    retry_after: str | None = None


class Wire:
    """The HTTP client that all of a node's attempts share; its connections are kept alive."""

    def __init__(self, connections: int) -> None:
        trace = aiohttp.TraceConfig(_given)  # type: ignore[arg-type]  # any factory will do
        trace.on_connection_create_end.append(_connected)
        trace.on_connection_reuseconn.append(_connected)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=connections, ttl_dns_cache=30),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            timeout=aiohttp.ClientTimeout(),
            headers={"User-Agent": f"orbit/{__version__}", "Accept": "*/*"},
            skip_auto_headers=("Accept-Encoding",),
            trace_configs=[trace],
        )
        # The client sends idempotent methods again by itself when a kept-alive connection was
        # closed. Orbit counts every send, so it must not; there is no public switch.
        self._session._retry_connection = False  # noqa: SLF001

    async def close(self) -> None:
        await self._session.close()

    async def send(self, outgoing: Outgoing) -> WireResult:
        """Sends once. Never raises for what the network or the receiver does."""
        times = SimpleNamespace(started=time.monotonic(), connected=None, first_byte=None)
        answer = _Answer(outgoing.secrets)
        try:
            async with (
                asyncio.timeout(outgoing.timeout_seconds),
                self._session.request(
                    outgoing.method,
                    outgoing.url,
                    data=request_body(outgoing.content),
                    headers=outgoing.headers,
                    allow_redirects=False,
                    trace_request_ctx=times,
                ) as response,
            ):
                times.first_byte = time.monotonic()
                answer.see(response)
                await answer.read(response)
        except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
            return _ended(outgoing, times, answer, error)
        return _ended(outgoing, times, answer, None)


def request_body(content: bytes) -> bytes | io.BytesIO:
    """A body for the client; a large one goes out in pieces, at the pace of the connection."""
    return content if len(content) <= _PIECE_BYTES else io.BytesIO(content)


def request_headers(
    *, content_type: str, digest: str, job_id: str, token: str | None, given: Mapping[str, str]
) -> dict[str, str]:
    """The headers that every attempt of a job carries; `digest` is hexadecimal SHA-256."""
    headers = {
        **given,
        "Content-Type": content_type,
        "Idempotency-Key": job_id,
        "webhook-id": job_id,
        "Content-Digest": f"sha-256=:{base64.b64encode(bytes.fromhex(digest)).decode()}:",
    }
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    return headers


class _Answer:
    """As much of an answer as was seen, without the secrets of its request."""

    def __init__(self, secrets: Sequence[str]) -> None:
        self._secrets = [secret.encode() for secret in secrets if secret]
        # One that straddles the end of what is kept is seen whole, so that no half of it stays.
        self._bytes = ANSWER_BYTES + max(map(len, self._secrets), default=0)
        self.status: int | None = None
        self.content = b""
        self.content_type: str | None = None
        self.retry_after: str | None = None

    def see(self, response: aiohttp.ClientResponse) -> None:
        self.status = response.status
        content_type = response.headers.get("Content-Type", "")[:8192]
        self.content_type = self.described(content_type)[:255] or None
        self.retry_after = response.headers.get("Retry-After")

    async def read(self, response: aiohttp.ClientResponse) -> None:
        size = 0
        async for part in response.content.iter_any():
            if len(self.content) < self._bytes:
                self.content += part[: self._bytes - len(self.content)]
            size += len(part)
            if size > _ANSWER_BYTES_READ:
                response.close()
                return

    def kept(self) -> bytes:
        """The beginning of the body."""
        content = self.content
        for secret in self._secrets:
            content = content.replace(secret, b"***")
        return content[:ANSWER_BYTES]

    def described(self, text: str) -> str:
        """A text of the receiver's making, on one line."""
        for secret in self._secrets:
            text = text.replace(secret.decode(), "***")
        return printable(text)


def _given(trace_request_ctx: SimpleNamespace) -> SimpleNamespace:
    return trace_request_ctx


async def _connected(_session: Any, times: SimpleNamespace, _params: Any) -> None:
    times.connected = time.monotonic()


def _ended(
    outgoing: Outgoing, times: SimpleNamespace, answer: _Answer, error: Exception | None
) -> WireResult:
    outcome, cause = _outcome(times, answer, error)
    text = _explained(outgoing, answer, error)
    return WireResult(
        outcome=outcome,
        status=answer.status,
        cause=cause,
        error=text,
        connect_seconds=_since(times, times.connected),
        first_byte_seconds=_since(times, times.first_byte),
        total_seconds=time.monotonic() - times.started,
        answer=answer.kept(),
        answer_content_type=answer.content_type,
        retry_after=answer.retry_after,
    )


def _outcome(
    times: SimpleNamespace, answer: _Answer, error: Exception | None
) -> tuple[Outcome, str | None]:
    if answer.status is not None:  # an answer's body that breaks off does not unsay its status
        if 200 <= answer.status <= 299:
            return Outcome.DELIVERED, None
        return Outcome.FAILED, f"status {answer.status}"
    cause = _cause(error)
    return (Outcome.NOT_SENT if times.connected is None else Outcome.UNKNOWN), cause


_CAUSES: tuple[tuple[str, tuple[type[Exception], ...]], ...] = (
    ("timeout", (TimeoutError,)),
    ("name not resolved", (aiohttp.ClientConnectorDNSError, socket.gaierror)),
    ("tls", (aiohttp.ClientConnectorCertificateError, aiohttp.ClientSSLError)),
    ("cannot connect", (aiohttp.ClientConnectorError,)),
    ("connection lost", (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, OSError)),
    ("answer not understood", (aiohttp.ClientResponseError,)),
)


def _cause(error: Exception | None) -> str:
    """The first kind that the error is of; refused connections apart, since they say most."""
    if isinstance(error, aiohttp.ClientConnectorError) and isinstance(
        error.os_error, ConnectionRefusedError
    ):
        return "connection refused"
    kinds = (cause for cause, types in _CAUSES if isinstance(error, types))
    return next(kinds, "error")


def _explained(outgoing: Outgoing, answer: _Answer, error: Exception | None) -> str | None:
    if error is None:
        return None
    if isinstance(error, TimeoutError):
        return f"no complete answer within {outgoing.timeout_seconds:g} s"
    return answer.described((str(error) or type(error).__name__)[:8192])[:500]


def _since(times: SimpleNamespace, at: float | None) -> float | None:
    return None if at is None else at - times.started
