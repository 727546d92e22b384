"""Telemetry: replayed by position, or streamed as it comes; events are CloudEvents 1.0."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from pydantic import Field

from orbit.api.access import actor_of, require
from orbit.api.bodies import Filter
from orbit.api.streams import Streams
from orbit.app import Node
from orbit.errors import PositionAhead, RequestInvalid
from orbit.reading.telemetry import bounds, window

_LARGEST = 2**63 - 1
Place = Annotated[int, Field(ge=0, le=_LARGEST)]
Log = Annotated[str, Field(min_length=1, max_length=128)]


class StreamFilter(Filter):
    """After which position, and of which namespace (`*`: the installation's)."""

    after: Place | None = None
    namespace: Log | None = None


class ReplayFilter(StreamFilter):
    """A page of a replay."""

    limit: int = Field(1000, ge=1, le=5000)


def telemetry_router(node: Node) -> APIRouter:
    """The routes, for one node."""
    router = APIRouter(prefix="/telemetry", tags=["telemetry"])
    streams = Streams(node)

    @router.get(
        "", dependencies=[Depends(require("viewer"))], summary="Events after a position, in order"
    )
    async def replayed(request: Request, asked: Annotated[ReplayFilter, Query()]) -> Response:
        """`position` is to be given as `after` the next time, `firstPosition` what is kept here.

        Every committed event comes once, in an order that does not change. 409 `position_ahead`
        where `after` is beyond the last position: the database was taken back to before it.
        """
        within = actor_of(request).within
        after = asked.after or 0
        found = await window(
            node.database, after, asked.limit, namespace=asked.namespace, within=within
        )
        edge = found.bounds
        if after > edge.last_position:
            raise PositionAhead(
                f"after: {after} was not given; the last position is {edge.last_position}. "
                "If it was read before a restore, what happened since may have positions up to it"
            )
        text = (
            f'{{"items":{found.text},"position":{found.position},'
            f'"firstPosition":{edge.first_position},"lastPosition":{edge.last_position}}}'
        )
        return Response(text, media_type="application/json")

    @router.get(
        "/stream",
        dependencies=[Depends(require("viewer"))],
        summary="Events as they come, by server-sent events",
        response_class=Response,
        responses={200: {"content": {"text/event-stream": {}}}},
    )
    async def streamed(
        request: Request,
        asked: Annotated[StreamFilter, Query()],
        last_event_id: Annotated[str | None, Header()] = None,
    ) -> Response:
        """An event's id is its position; `Last-Event-ID` goes before `after`.

        Without either it begins with what comes next.
        """
        after = asked.after if last_event_id is None else _position(last_event_id)
        if after is None:
            after = (await bounds(node.database)).last_position
        return streams.answer(request, after, asked.namespace)

    return router


def _position(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise RequestInvalid("Last-Event-ID: expected the id of an event of this stream")
    return int(text)
