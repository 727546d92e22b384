"""The reference receiver: takes deliveries, stores each once, shows what came.

Made for trying Orbit out and for testing it. It checks token, signature and digest, and can
fail on purpose: by chance, always, late, or by never answering. POST, PUT, PATCH and DELETE on
any path deliver; `GET /received` lists arrivals (`?since=POSITION&limit=N`), `GET /health` says
that it is up. A delivery is answered with 200 only when its body and its id are on the disk; a
repetition of it too. The same id with another body is answered with 409 and a loud line: a
sender must never do that. Large bodies go to a file as they come, never whole into memory.
SIGTERM and SIGINT end it with exit code 0.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from orbit.clock import Clock, SystemClock
from orbit.errors import AddressInUse
from orbit.receiver.arrivals import Arrival, Arrivals, IncomingBody
from orbit.receiver.seen import Verdict
from orbit.receiver.verify import (
    Delivery,
    DeliveryRefused,
    DeliverySignature,
    read_delivery,
    verify_bearer,
    verify_content_digest,
)
from orbit.webhooks import SigningKeys

DEFAULT_PORT = 8787
MAX_BODY_BYTES = 64 * 1024 * 1024
_LIST_LIMIT = 10_000
_DRAIN_SECONDS = 5
_KEEP_ALIVE_SECONDS = 120  # longer than senders keep theirs, so that they close first
_WITHOUT_BODY = {204, 205, 304}
_LOG = logging.getLogger("orbit.receiver")


@dataclass(frozen=True, slots=True)
class ReceiverOptions:
    """How a reference receiver behaves.

    `fail_rate` is the share (0 to 1) of deliveries answered with 500 and not stored; `seed`
    makes the same ones fail in every run, counted by arrival. `status` is the answer to all;
    outside 2xx nothing is stored. `latency_seconds` passes between storing and answering.
    `is_hanging` reads every delivery and never answers. `token` None admits everyone, except
    on the paths that `path_tokens` gives a token of their own. With a `signing_secret` (or
    several, with spaces between) every delivery must be signed.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    token: str | None = field(default=None, repr=False)
    path_tokens: Mapping[str, str] = field(default_factory=dict, repr=False)
    signing_secret: str | None = field(default=None, repr=False)
    store: Path = Path(".orbit/received")
    is_quiet: bool = False
    fail_rate: float = 0.0
    latency_seconds: float = 0.0
    status: int = 200
    is_hanging: bool = False
    seed: int | None = None
    max_body_bytes: int = MAX_BODY_BYTES

    def __post_init__(self) -> None:
        if not 0 <= self.fail_rate <= 1:
            raise ValueError("the fail rate is a number from 0 to 1")
        if self.latency_seconds < 0:
            raise ValueError("the latency is a number of seconds from 0")
        if not 200 <= self.status <= 599:
            raise ValueError("the status is a number from 200 to 599")
        if not 0 <= self.port <= 65535:
            raise ValueError("the port is a number from 0 (any free one) to 65535")
        if self.signing_secret is not None:
            _keys(self.signing_secret)


@dataclass(frozen=True, slots=True)
class _Result:
    """What became of one request; a reason is a stable code, a colon and words."""

    outcome: str
    status: int
    digest: str | None = None
    size: int = 0
    file: str | None = None
    reason: str = ""


class Receiver:
    """The ASGI application's state and handlers; `stopping` wakes what hangs on purpose."""

    def __init__(self, options: ReceiverOptions, clock: Clock | None = None) -> None:
        self._options = options
        self._clock = clock or SystemClock()
        self._arrivals = Arrivals(options.store)
        secret = options.signing_secret
        self._keys = None if secret is None else _keys(secret)
        self._chance = random.Random(options.seed)
        self.stopping = asyncio.Event()

    def close(self) -> None:
        """Closes the folder."""
        self._arrivals.close()

    async def health(self, request: Request) -> JSONResponse:
        """`GET /health`."""
        return JSONResponse({"status": "ok", "receiver": "orbit"})

    async def received(self, request: Request) -> JSONResponse:
        """`GET /received`: arrivals after `since`, newest last, and counts of all there were."""
        try:
            since = int(request.query_params.get("since", "0"))
            limit = max(1, int(request.query_params.get("limit", str(_LIST_LIMIT))))
        except ValueError:
            return _problem(400, "request_invalid", "since and limit are whole numbers")
        items = await asyncio.to_thread(self._arrivals.read, since, limit)
        counts = dict(self._arrivals.counts)
        position = self._arrivals.position
        return JSONResponse({"items": items, "counts": counts, "position": position})

    async def deliver(self, request: Request) -> Response:
        """A delivery, on any path: check, store once, record the arrival, answer."""
        body = self._arrivals.receive(self._options.max_body_bytes)
        try:
            delivery, result = await self._take(request, body)
        finally:
            body.discard()
        arrival = self._arrivals.append(
            **_said(request, delivery),
            at=self._clock.now().isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            digest=result.digest,
            size=result.size,
            duplicate=result.outcome == "duplicate",
            outcome=result.outcome,
            status=result.status,
            file=result.file,
            reason=result.reason,
        )
        self._show(arrival)
        await self._linger(result)
        return _answer(arrival)

    async def _take(self, request: Request, body: IncomingBody) -> tuple[Delivery, _Result]:
        delivery, digest = Delivery(id=""), None
        try:
            token = self._options.path_tokens.get(request.url.path, self._options.token)
            if token is not None:
                verify_bearer(request.headers.get("authorization"), token)
            signature = DeliverySignature(request.headers, self._keys) if self._keys else None
            async for chunk in request.stream():
                body.write(chunk)
                if signature:
                    signature.update(chunk)
            digest = body.sha256.hex()
            if signature:
                signature.verify()
            delivery = read_delivery(request.headers)
            verify_content_digest(request.headers.get("content-digest"), body.sha256)
            result = await self._settle(delivery, body, request)
        except DeliveryRefused as error:
            result = _Result("refused", error.status, reason=f"{error.code}: {error}")
        except OSError as error:
            result = _Result("failed", 507, reason=f"store_failed: {error.strerror or error}")
        except ClientDisconnect:
            result = _Result("broken_off", 499, reason="broken_off: the sender left")
        return delivery, replace(result, digest=digest, size=body.size)

    async def _settle(self, delivery: Delivery, body: IncomingBody, request: Request) -> _Result:
        """What a good delivery comes to: a failure on purpose, or stored once."""
        if self._options.is_hanging:
            return _Result("hung", 503, reason="hung: never answers, as asked")
        if self._chance.random() < self._options.fail_rate:
            return _Result("failed_on_purpose", 500, reason="failed_on_purpose: as asked")
        if self._options.status >= 300:
            return _Result(
                "failed_on_purpose", self._options.status, reason="failed_on_purpose: as asked"
            )
        content_type = request.headers.get("content-type", "")
        verdict, path = await asyncio.to_thread(self._arrivals.store, delivery, body, content_type)
        match verdict:
            case Verdict.NEW:
                return _Result("stored", self._options.status, file=path.as_posix())
            case Verdict.DUPLICATE:
                return _Result("duplicate", self._options.status)
            case Verdict.CONFLICT | Verdict.BUSY:  # which a store that waits is not
                reason = "id_conflict: this id came before with another body"
                return _Result("conflict", 409, reason=reason)

    async def _linger(self, result: _Result) -> None:
        """Answers late, or never, if asked to; the server's end ends the wait."""
        seconds = None if result.outcome == "hung" else self._options.latency_seconds
        if seconds != 0:
            try:
                await asyncio.wait_for(self.stopping.wait(), seconds)
            except TimeoutError:
                return

    def _show(self, arrival: Arrival) -> None:
        if arrival.outcome == "conflict":
            _LOG.critical(
                "CONFLICT: id %s came with another body than before (sha256 %s); the sender "
                "breaks its promise. Job %s, cycle %s.",
                *(arrival.id, arrival.digest, arrival.job_id or "?", arrival.cycle_run_id or "?"),
            )
        if not self._options.is_quiet:
            print(readable(arrival), flush=True)


def create_app(receiver: Receiver) -> Starlette:
    """The ASGI application around a receiver; closes it when the server ends."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        receiver.close()

    return Starlette(
        routes=[
            Route("/health", receiver.health, methods=["GET"]),
            Route("/received", receiver.received, methods=["GET"]),
            Route("/{path:path}", receiver.deliver, methods=["POST", "PUT", "PATCH", "DELETE"]),
        ],
        lifespan=lifespan,
    )


def run(options: ReceiverOptions) -> None:
    """Serves until SIGTERM or SIGINT. Port 0 takes a free one; the first line names it.

    Raises AddressInUse, SeenFileInUse, or OSError where the folder cannot be written.
    """
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    listener = _bind(options.host, options.port)
    with listener:
        receiver = Receiver(options)
        config = uvicorn.Config(
            create_app(receiver),
            log_config=None,
            access_log=False,
            http="h11",  # bounds what a head may be
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_DRAIN_SECONDS,
        )
        host, port = listener.getsockname()[:2]
        place = f"[{host}]" if ":" in host else host
        print(f"receiver on http://{place}:{port}, storing in {options.store}", flush=True)
        _Server(config, receiver.stopping).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Uvicorn that wakes what hangs on purpose, and exits 0 when asked to stop."""

    def __init__(self, config: uvicorn.Config, stopping: asyncio.Event) -> None:
        super().__init__(config)
        self._stopping = stopping

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Uvicorn would raise the signal again at its end, and so not exit with 0."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        is_ending = await super().on_tick(counter)
        if is_ending:
            self._stopping.set()
        return is_ending


def readable(arrival: Arrival) -> str:
    """One line for a person."""
    where = f"{arrival.namespace or '-'}/{arrival.run_profile_id or '-'}"
    attempt = f" attempt {arrival.attempt}" if arrival.attempt else ""
    digest = f" sha256 {arrival.digest[:12]}" if arrival.digest else ""
    reason = f" ({arrival.reason})" if arrival.reason else ""
    return (
        f"{arrival.at[11:19]} {arrival.status} {arrival.outcome:<9} {where} "
        f"job {arrival.job_id or arrival.id or '-'}{attempt} {arrival.size} B "
        f"{arrival.content_type or '-'}{digest} {arrival.method} {arrival.path}{reason}"
    )


def _said(request: Request, delivery: Delivery) -> dict[str, Any]:
    """What the request itself says, for its line among the arrivals."""
    content_type = request.headers.get("content-type", "")[:255]
    return {
        "id": delivery.id,
        "content_type": "".join(filter(str.isprintable, content_type)),
        "namespace": delivery.namespace,
        "profile_id": delivery.profile_id,
        "run_profile_id": delivery.run_profile_id,
        "cycle_run_id": delivery.cycle_run_id,
        "job_id": delivery.job_id,
        "attempt": delivery.attempt,
        "method": request.method,
        "path": "".join(filter(str.isprintable, request.url.path[:255])),
    }


def _answer(arrival: Arrival) -> Response:
    if arrival.status in _WITHOUT_BODY:
        return Response(status_code=arrival.status)
    if arrival.outcome in {"stored", "duplicate"}:
        content = {"id": arrival.id, "digest": arrival.digest, "duplicate": arrival.duplicate}
        return JSONResponse(content, arrival.status)
    code, _, detail = arrival.reason.partition(": ")
    answer = _problem(arrival.status, code, detail)
    if arrival.status == HTTPStatus.UNAUTHORIZED:
        answer.headers["WWW-Authenticate"] = "Bearer"
    return answer


def _keys(secret: str) -> SigningKeys:
    try:
        return SigningKeys.parse(secret)
    except ValueError as error:
        raise ValueError(f"the signing secret is {error}") from None


def _problem(status: int, code: str, detail: str) -> JSONResponse:
    content = {"status": status, "code": code, "detail": detail}
    return JSONResponse(content, status, media_type="application/problem+json")


def _bind(host: str, port: int) -> socket.socket:
    try:
        [(family, *_, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return socket.create_server((address[0], port), family=family, backlog=1024)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        hint = "stop what listens there, or choose another port with --port"
        raise AddressInUse(f"cannot listen on {host}:{port}: {why}; {hint}") from error
