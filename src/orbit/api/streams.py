"""A stream of events to one client, which is dropped rather than buffered for.

It begins with an id, and sends one when there has been nothing else: the place up to which it has
looked, so that whoever is cut off before an event comes goes on there too. Two pages are held at
most: the next is read while the client takes one. A client that takes nothing for ten seconds is
cut off, and goes on later where it was by `Last-Event-ID`. The key is
looked at again each second, so that a revoked one gets nothing more. Who comes, or reads, too late
is told of the `gap`, by an event of that name; who is ahead, since the database went back in time,
gets the event `reset`, and what comes after the last position. Streams that wait look for that
together: one small query a twentieth of a second between them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from orbit.api.access import actor_again, actor_of
from orbit.api.problems import HttpRefusal
from orbit.app import Node
from orbit.database.pool import TRANSIENT, first_line
from orbit.reading.telemetry import bounds, window

MOST_STREAMS = 64
_PAGE = 2000
_POLL_SECONDS = 0.05
_LOOK_SECONDS = 1.0
_BEAT_SECONDS = 15.0
_TAKING_SECONDS = 10.0
log = structlog.get_logger("orbit.telemetry")


@dataclass(frozen=True, slots=True)
class _Page:
    """Frames, and up to where events have been looked for."""

    text: str
    position: int


class Streams:
    """The streams of one node: so many at once, each bounded."""

    def __init__(self, node: Node) -> None:
        self._node, self._open = node, 0
        self._edge, self._edge_at = 0, float("-inf")
        self._looking = asyncio.Lock()

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

    async def edge(self) -> int:
        """The last position given, as of the last twentieth of a second."""
        async with self._looking:
            now = asyncio.get_running_loop().time()
            if now >= self._edge_at + _POLL_SECONDS:
                self._edge = (await bounds(self._node.database)).last_position
                self._edge_at = now
            return self._edge


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
            if (abort := getattr(self._request.state, "abort", None)) is not None:
                abort()  # closed in order, it would first wait for ever to send what is buffered
            return
        except TRANSIENT as error:
            log.warning("stream_ended", error=first_line(error))
        await _send(send, "", is_more=False)

    async def _frames(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        looked_at, sent_at = loop.time(), float("-inf")
        ahead = self._ahead(self._page(self._after))
        try:
            while not self._node.is_draining:
                page = await ahead
                if loop.time() >= looked_at + _LOOK_SECONDS:
                    if await actor_again(self._request) is None:
                        return
                    looked_at = loop.time()
                ahead = self._ahead(self._following(page.position))
                if page.text or loop.time() >= sent_at + _BEAT_SECONDS:
                    await _send(send, page.text or f"id: {page.position}\n\n")
                    self._after, sent_at = page.position, loop.time()
        finally:
            ahead.cancel()

    def _ahead(self, work: Coroutine[Any, Any, _Page]) -> asyncio.Task[_Page]:
        """Begins to read a page."""
        task = asyncio.create_task(work)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    async def _following(self, place: int) -> _Page:
        """What follows a place; nothing if nothing came for a second."""
        loop = asyncio.get_running_loop()
        over_at = loop.time() + _LOOK_SECONDS
        while (edge := await self._streams.edge()) <= place:
            if loop.time() >= over_at or self._node.is_draining:
                if edge < place:  # it was looked at before the place was given, or that is lost
                    break
                return _Page("", place)
            await asyncio.sleep(_POLL_SECONDS)
        return await self._page(place)

    async def _page(self, place: int) -> _Page:
        """What there is after a place, and before it what there is no more."""
        found = await window(
            self._node.database,
            place,
            _PAGE,
            namespace=self._namespace,
            within=actor_of(self._request).within,
            is_stream=True,
        )
        text, edge = found.text, found.bounds
        if edge.last_position < place:
            last = edge.last_position
            return _Page(_notice("reset", "lastPosition", last, last), last)
        if (first := edge.first_position) > place + 1:
            text = _notice("gap", "firstPosition", first, first - 1) + text
        return _Page(text, found.position)


def _notice(name: str, field: str, position: int, place: int) -> str:
    """An event of the stream itself, and the place from which it goes on."""
    return f'event: {name}\ndata: {{"{field}":{position}}}\nid: {place}\n\n'


async def _send(send: Send, text: str, *, is_more: bool = True) -> None:
    async with asyncio.timeout(_TAKING_SECONDS):
        body = {"type": "http.response.body", "body": text.encode(), "more_body": is_more}
        await send(body)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
