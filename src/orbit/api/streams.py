"""A stream of events to one client, which is dropped rather than buffered for.

One page is held at a time, and the next is read when the client has taken the last; one that
takes nothing for ten seconds is cut off, and goes on later where it was by `Last-Event-ID`. The
key is looked at again each second, so that a revoked one gets nothing more.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from http import HTTPStatus

import structlog
from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from orbit.api.access import actor_again
from orbit.api.problems import HttpRefusal
from orbit.app import Node
from orbit.database.pool import TRANSIENT, first_line
from orbit.governance.actor import Actor
from orbit.reading.telemetry import window

MOST_STREAMS = 64
_PAGE = 1000
_POLL_SECONDS = 0.1
_LOOK_SECONDS = 1.0
_BEAT_SECONDS = 15.0
_TAKING_SECONDS = 10.0
log = structlog.get_logger("orbit.telemetry")


class Streams:
    """The streams of one node: so many at once, each bounded."""

    def __init__(self, node: Node) -> None:
        self._node, self._open = node, 0

    def answer(self, request: Request, after: int, namespace: str | None) -> Response:
        """The stream after a position. Raises HttpRefusal where there are too many."""
        if self._open >= MOST_STREAMS:
            text = f"this node has {MOST_STREAMS} streams already; ask another, or page"
            raise HttpRefusal(HTTPStatus.TOO_MANY_REQUESTS, "too_many_streams", text)
        return _EventStream(self, self._node, request, after, namespace)

    def enter(self) -> None:
        """A stream begins."""
        self._open += 1

    def leave(self) -> None:
        """A stream has ended."""
        self._open -= 1


class _EventStream(Response):
    media_type = "text/event-stream"

    def __init__(
        self, streams: Streams, node: Node, request: Request, after: int, namespace: str | None
    ) -> None:
        super().__init__()
        del self.headers["content-length"]
        self.headers["X-Accel-Buffering"] = "no"
        self._streams, self._node, self._request = streams, node, request
        self._after, self._namespace = after, namespace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._streams.enter()
        sending = asyncio.create_task(self._run(send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._streams.leave()
            for task in (sending, gone):
                task.cancel()
        with suppress(asyncio.CancelledError):
            await sending

    async def _run(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(head)
        try:
            await self._frames(send)
        except TimeoutError:
            log.warning("slow_stream_dropped", position=self._after)
            return  # without an end, so that the server closes the connection
        except TRANSIENT as error:
            log.warning("stream_ended", error=first_line(error))
        await _send(send, "", is_more=False)

    async def _frames(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        actor: Actor | None = None
        looked_at, sent_at = float("-inf"), float("-inf")
        while not self._node.is_draining:
            if loop.time() >= looked_at + _LOOK_SECONDS:
                actor, looked_at = await actor_again(self._request), loop.time()
            if actor is None:
                return
            found = await window(
                self._node.database,
                self._after,
                _PAGE,
                namespace=self._namespace,
                within=actor.within,
                is_stream=True,
            )
            if found.events:
                await _send(send, found.text)
                self._after, sent_at = found.position, loop.time()
            elif loop.time() >= sent_at + _BEAT_SECONDS:
                await _send(send, ": \n\n")
                sent_at = loop.time()
            if found.events < _PAGE:
                await asyncio.sleep(_POLL_SECONDS)


async def _send(send: Send, text: str, *, is_more: bool = True) -> None:
    async with asyncio.timeout(_TAKING_SECONDS):
        body = {"type": "http.response.body", "body": text.encode(), "more_body": is_more}
        await send(body)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
