"""One attempt on the wire: what goes out, and what became of it.

Nothing here is sent twice: the client never sends again by itself and follows no redirect. The
answer is read to a bound, in bytes and in time. Whatever happens is a value: `not_sent` (no byte
of the request left), `delivered` and `failed` (an answer's status was seen), `unknown` (bytes
left, no answer seen).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from orbit.execution.http1 import Client, Exchange
from orbit.execution.lapse import Hold
from orbit.vocabulary import printable

ANSWER_BYTES = 4096
_ANSWER_BYTES_READ = 65536  # a longer answer costs the connection, which is then not reused


class Outcome(StrEnum):
    """What became of an attempt."""

    DELIVERED = "delivered"
    FAILED = "failed"
    NOT_SENT = "not_sent"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A request, ready to be sent. `timeout_seconds` bounds all of it.

    `secrets` are masked in what is kept of the answer, should the receiver repeat them. `proxy`
    is a forward proxy's URL; without one the request goes straight to its receiver.
    """

    method: str
    url: str
    headers: Mapping[str, str] = field(repr=False)
    content: bytes = field(repr=False)
    timeout_seconds: float
    secrets: Sequence[str] = field(default=(), repr=False)
    proxy: str | None = field(default=None, repr=False)


class WireResult(NamedTuple):
    """What became of one attempt.

    `cause` is short and the same for the same kind of failure; `error` says more. Seconds count
    from the beginning of the attempt. `answer` is the beginning of the answer's body. `is_reused`
    tells whether what was sent went out on a connection that an earlier request had used.
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
    is_reused: bool | None = None


class Wire:
    """Sends attempts over the client that a node's attempts and steps share."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def send(self, outgoing: Outgoing, hold: Hold | None = None) -> WireResult:
        """Sends once, if `hold` says so just before the first byte, and while it lasts.

        Never raises for what the network or the receiver does.
        """
        secrets = [secret for secret in outgoing.secrets if secret]
        # One that straddles the end of what is kept is seen whole, so that no half of it stays.
        margin = max((len(secret.encode()) for secret in secrets), default=0)
        found = await self._client.exchange(
            outgoing.method,
            outgoing.url,
            outgoing.headers,
            outgoing.content,
            timeout_seconds=outgoing.timeout_seconds,
            read_bytes=_ANSWER_BYTES_READ,
            keep_bytes=ANSWER_BYTES + margin,
            proxy=outgoing.proxy,
            hold=hold,
        )
        return _result(outgoing, found, secrets)


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


def _result(outgoing: Outgoing, found: Exchange, secrets: Sequence[str]) -> WireResult:
    outcome, cause = _outcome(found)
    answer, content_type = found.body, found.headers.get("content-type")
    for secret in secrets:
        answer = answer.replace(secret.encode(), b"***")
    if content_type is not None:
        content_type = _described(content_type[:8192], secrets)[:255] or None
    return WireResult(
        outcome=outcome,
        status=found.status,
        cause=cause,
        error=_explained(outgoing, found, secrets),
        connect_seconds=_since(found, found.connected_at),
        first_byte_seconds=_since(found, found.first_byte_at),
        total_seconds=_since(found, found.ended_at),
        answer=answer[:ANSWER_BYTES],
        answer_content_type=content_type,
        retry_after=found.headers.get("retry-after"),
        is_reused=found.is_reused if found.is_sent else None,
    )


def _outcome(found: Exchange) -> tuple[Outcome, str | None]:
    if found.status is not None:  # an answer's body that breaks off does not unsay its status
        if 200 <= found.status <= 299:
            return Outcome.DELIVERED, None
        return Outcome.FAILED, f"status {found.status}"
    return (Outcome.UNKNOWN if found.is_sent else Outcome.NOT_SENT), found.cause


def _explained(outgoing: Outgoing, found: Exchange, secrets: Sequence[str]) -> str | None:
    if found.cause is None:
        return None
    if found.cause == "timeout":
        return f"no complete answer within {outgoing.timeout_seconds:g} s"
    return _described((found.error or found.cause)[:8192], secrets)[:500]


def _described(text: str, secrets: Sequence[str]) -> str:
    """A text of the receiver's making, on one line."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return printable(text)


def _since(found: Exchange, at: float | None) -> float | None:
    return None if at is None else at - found.started_at
