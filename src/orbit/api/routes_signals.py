"""Signals of a profile: read, and computed up to now.

A signal is advice: neither route changes what runs. Computing feeds the detector with the events
that it has not seen; asked again it finds nothing new.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Path, Query, Request

from orbit.api.access import actor_of, require
from orbit.api.bodies import Key, PageFilter
from orbit.app import Node
from orbit.errors import NotFound
from orbit.insight.keeping import Fed, SignalKeeper
from orbit.insight.signals import Standing
from orbit.reading.configured import visible
from orbit.reading.signals import SignalView, signals
from orbit.reading.view import Page, View

ProfileKey = Annotated[str, Path(alias="profileId")]
MOST_BATCHES = 20


class SignalFilter(PageFilter):
    """Which signals are listed."""

    namespace: Key | None = None
    metric: Key | None = None
    name: Literal["elevated_performance", "low_performance", "stable", "no_data"] | None = None


@dataclass(frozen=True, slots=True)
class StreamView(View):
    """How a stream stands: `status` is its last signal, `no_data` or `insufficient_data`.

    `needed` cycles are lacking until there is a baseline; the evidence is compared with 1,000.
    """

    revision: str
    metric: str
    status: str
    needed: int
    observations: int
    low_evidence: float
    elevated_evidence: float
    interval: list[float]
    missed: int


@dataclass(frozen=True, slots=True)
class Computed(View):
    """What a namespace's new `events` came to; `new_signals` are those of all its profiles.

    Without `is_up_to_date` there are more events: ask again.
    """

    namespace: str
    events: int
    new_signals: int
    position: int
    is_up_to_date: bool
    streams: list[StreamView]


def signals_router(node: Node) -> APIRouter:
    """The routes, for one node."""
    router = APIRouter(prefix="/profiles", tags=["signals"])

    @router.get(
        "/{profileId}/signals",
        dependencies=[Depends(require("viewer"))],
        summary="A profile's signals, newest first",
    )
    async def listed(
        request: Request, profile_id: ProfileKey, asked: Annotated[SignalFilter, Query()]
    ) -> Page[SignalView]:
        """Also of a profile that is configured no longer; 404 where nothing is known of one."""
        if "\x00" in profile_id:
            raise _not_found(profile_id)  # what the database cannot even be asked for
        within = actor_of(request).within
        page = await signals(node.database, profile_id, **asked.model_dump(), within=within)
        if not page.items:
            await namespaces_of(node, request, profile_id)
        return page

    @router.post(
        "/{profileId}/signals",
        dependencies=[Depends(require("operator"))],
        summary="Compute a profile's signals up to now",
    )
    async def computed(request: Request, profile_id: ProfileKey) -> Page[Computed]:
        """One entry for each namespace that the profile runs in."""
        namespaces = await namespaces_of(node, request, profile_id)
        return Page([await _computed(node.signals, one, profile_id) for one in namespaces])

    return router


async def namespaces_of(node: Node, request: Request, profile_id: str) -> list[str]:
    """Where the profile runs, of what there is for who asks. Raises NotFound."""
    await node.configuration.refresh()
    documents = visible(node.configuration.active.documents, actor_of(request).within)
    if profile_id not in {one.profile_id for one in documents.profiles}:
        raise _not_found(profile_id)
    used = {one.namespace for one in documents.run_profiles if one.profile_id == profile_id}
    return sorted(used)


def _not_found(profile_id: str) -> NotFound:
    return NotFound(f"there is no profile {profile_id}")


async def _computed(keeper: SignalKeeper, namespace: str, profile_id: str) -> Computed:
    fed: Fed = await keeper.feed(namespace, MOST_BATCHES)
    standings = await keeper.standings(namespace, profile_id)
    return Computed(
        namespace=namespace,
        events=fed.events,
        new_signals=fed.signals,
        position=fed.position,
        is_up_to_date=fed.is_up_to_date,
        streams=[_stream(one) for one in standings],
    )


def _stream(one: Standing) -> StreamView:
    return StreamView(
        revision=one.key.revision,
        metric=one.key.metric,
        status=one.status,
        needed=one.needed,
        observations=one.count,
        low_evidence=one.low_evidence,
        elevated_evidence=one.elevated_evidence,
        interval=list(one.interval),
        missed=one.missed,
    )
