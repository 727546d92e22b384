"""ASGI middleware that lets an application see only genuine deliveries, each once.

It reads a delivery's body up to a bound, makes every check of `verify_delivery`, claims the id
and only then calls the application, which finds the raw body unchanged and the delivery as
`request.state.delivery`. What it refuses is answered with a problem document (RFC 9457). Paths
are compared so that no other spelling of one reaches the application unverified.

An answer outside 2xx, and an exception, are not remembered: the sender comes again and the
application is called again. The answer is held back until the id is durable, so that a sender
never sees a 2xx that was not. A delivery that comes while the same id is being worked on waits
for that to end, then counts as a duplicate if it succeeded and is tried if not; after
`wait_seconds` it is told to come again. The application never works on one id twice at a time.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orbit.clock import SystemClock
from orbit.receiver.seen import Claim, MemorySeen, Seen, Verdict
from orbit.receiver.verify import (
    BodyTooLarge,
    Delivery,
    DeliveryRefused,
    valid_tokens,
    verify_bearer,
    verify_delivery,
)
from orbit.webhooks import SigningKeys

MAX_BODY_BYTES = 16 * 1024 * 1024
_METHODS_THAT_PASS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
_LARGE_BYTES = 256 * 1024
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.02, 0.5
_LOG = logging.getLogger("orbit.receiver")


class OrbitDeliveries:
    """`app.add_middleware(OrbitDeliveries, token=…, signing_secret=…, seen=…)`.

    `token` and `signing_secret` are as for `verify_delivery`. `seen` remembers ids: MemorySeen
    unless given, FileSeen, PostgresSeen, or your own. Whatever comes on `path` and below it is a
    delivery, but for GET, HEAD, OPTIONS and TRACE; other paths pass untouched. `path` is looked
    for in the whole path and in what follows `root_path` or some of it, without regard to case,
    doubled slashes and white space around a segment. Raises ValueError where there is nothing
    to check with, or a secret cannot be used.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | Sequence[str] | None = None,
        signing_secret: str | None = None,
        seen: Seen | None = None,
        path: str = "/",
        max_body_bytes: int = MAX_BODY_BYTES,
        wait_seconds: float = 5.0,
    ) -> None:
        self._app = app
        self._tokens = valid_tokens(token)
        self._keys = None if signing_secret is None else SigningKeys.parse(signing_secret)
        if not (self._tokens or self._keys):
            raise ValueError("a token or a signing secret is needed to know who sends")
        self._seen: Seen = MemorySeen() if seen is None else seen
        self._place = _segments(path)
        self._max_body_bytes = max_body_bytes
        self._wait_seconds = wait_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection's request."""
        if not self._is_delivery(scope):
            await self._app(scope, receive, send)
            return
        headers = _headers(scope)
        try:
            body = await self._read(headers, receive)
            if body is None:
                return
            large = len(body) > _LARGE_BYTES
            delivery = (
                await asyncio.to_thread(self._verify, headers, body)
                if large
                else self._verify(headers, body)
            )
        except DeliveryRefused as error:
            answer = _problem(error.status, error.code, str(error))
        else:
            answer = await self._settle(delivery, body, scope, receive)
        for message in answer:
            await send(message)

    def _is_delivery(self, scope: Scope) -> bool:
        if scope["type"] != "http" or scope["method"] in _METHODS_THAT_PASS:
            return False
        path, mounted = scope["path"], _segments(scope.get("root_path", ""))
        return any(
            self._is_at(_segments(reading), mounted) for reading in (path, posixpath.normpath(path))
        )

    def _is_at(self, segments: Sequence[str], mounted: Sequence[str]) -> bool:
        """Also below a mount that is itself a part of `path`, or not known to who gave it."""
        depth = len(mounted) if segments[: len(mounted)] == mounted else 0
        length = len(self._place)
        return any(segments[at : at + length] == self._place for at in range(depth + 1))

    async def _read(self, headers: Mapping[str, str], receive: Receive) -> bytes | None:
        """The body, None if the sender left; who has no token is not listened to."""
        if self._tokens:
            verify_bearer(headers.get("authorization"), *self._tokens)
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._max_body_bytes:
            raise BodyTooLarge(f"the body is over {self._max_body_bytes} bytes")
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                raise BodyTooLarge(f"the body is over {self._max_body_bytes} bytes")
            if not message.get("more_body", False):
                return bytes(body)

    def _verify(self, headers: Mapping[str, str], body: bytes) -> Delivery:
        return verify_delivery(headers, body, token=self._tokens, signing_secret=self._keys)

    async def _settle(
        self, delivery: Delivery, body: bytes, scope: Scope, receive: Receive
    ) -> list[Message]:
        """The answer to a good delivery, once whatever it did is durable."""
        digest = hashlib.sha256(body).hexdigest()
        clock, pause = SystemClock(), _FIRST_WAIT_SECONDS
        deadline = clock.monotonic() + self._wait_seconds
        while True:
            async with self._seen.claim(delivery.id, digest) as claim:
                if claim.verdict is Verdict.NEW:
                    answer = await self._call(_with_state(scope, delivery, claim), body, receive)
                    if _is_success(answer):
                        claim.keep()
                else:
                    answer = _answer_to(claim.verdict, delivery, digest)
            if claim.verdict is not Verdict.BUSY or clock.monotonic() > deadline:
                return answer
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_WAIT_SECONDS)

    async def _call(self, scope: Scope, body: bytes, receive: Receive) -> list[Message]:
        """Calls the application with the body that was read; returns what it would send."""
        answer: list[Message] = []
        is_given = False

        async def read() -> Message:
            nonlocal is_given
            if is_given:
                return await receive()
            is_given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def hold_back(message: Message) -> None:
            answer.append(message)

        await self._app(scope, read, hold_back)
        return answer


def _segments(path: str) -> list[str]:
    """Spellings that some router takes for the same are the same here.

    White space, because `$` in a router's pattern matches before a newline at the end.
    """
    return [part for each in path.casefold().split("/") if (part := each.strip())]


def _headers(scope: Scope) -> dict[str, str]:
    """Lower-case names; a header that came twice is joined, so that no check can miss one."""
    found: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        found[name] = f"{found[name]}, {value}" if name in found else value
    return found


def _with_state(scope: Scope, delivery: Delivery, claim: Claim) -> Scope:
    state = {**scope.get("state", {}), "delivery": delivery, "connection": claim.connection}
    return {**scope, "state": state}


def _is_success(answer: list[Message]) -> bool:
    statuses = [part["status"] for part in answer if part["type"] == "http.response.start"]
    return bool(statuses) and 200 <= statuses[-1] < 300


def _answer_to(verdict: Verdict, delivery: Delivery, digest: str) -> list[Message]:
    """What a delivery gets that the application is not asked about."""
    if verdict is Verdict.DUPLICATE:
        return _json(200, {"id": delivery.id, "digest": digest, "duplicate": True})
    if verdict is Verdict.CONFLICT:
        _LOG.error(
            "id %s came with another body than before; the sender breaks its promise", delivery.id
        )
        return _problem(409, "id_conflict", "this id came before with another body")
    return _problem(
        503, "id_busy", "this id is being worked on; come again", ((b"retry-after", b"1"),)
    )


def _problem(
    status: int, code: str, detail: str, headers: Sequence[tuple[bytes, bytes]] = ()
) -> list[Message]:
    if status == 401:
        headers = [*headers, (b"www-authenticate", b"Bearer")]
    content = {"status": status, "code": code, "detail": detail}
    return _json(status, content, b"application/problem+json", headers)


def _json(
    status: int,
    content: dict[str, Any],
    media_type: bytes = b"application/json",
    headers: Sequence[tuple[bytes, bytes]] = (),
) -> list[Message]:
    body = json.dumps(content).encode()
    length = (b"content-length", str(len(body)).encode())
    start = [(b"content-type", media_type), length, *headers]
    return [
        {"type": "http.response.start", "status": status, "headers": start},
        {"type": "http.response.body", "body": body},
    ]
