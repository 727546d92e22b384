"""Keeping: a namespace's feed is stored, moved on over new events, and what it says is recorded.

One transaction for each batch: the feed's row is locked, events after its position are read over
the same connection, and position, streams and signals commit together or not at all. So no event
is fed twice, whoever asks for it and on however many nodes, and a node that dies loses nothing.

State of which something is lost is built anew from the events that are kept, by whoever notices.
That of another detector version is too, but by the node that numbers events alone: nodes of two
releases do not undo each other's work, and whoever asks the others meanwhile is told that there is
more to come. What is said again has the same id and is not recorded again. Whatever takes long (the
detector, JSON) is done in a thread, so that a node's event loop goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from orbit import metrics
from orbit.canonical import canonical_json, sha256_hex
from orbit.database.pool import Connection, Database
from orbit.database.queries import array, load
from orbit.errors import RequestInvalid
from orbit.insight.confidence import is_strong
from orbit.insight.feeding import Feed, Said, Stretch
from orbit.insight.signals import (
    DETECTOR_VERSION,
    Basis,
    Signal,
    Standing,
    StreamKey,
    alarm_level,
)

SQL = load("signals")
BATCH_EVENTS = 2000
_KEPT_STREAMS = 20_000
_ID_DIGITS = 32
log = structlog.get_logger(__name__)


class EventSource(Protocol):
    """Where events are read: those of a namespace after a position, in the order of positions."""

    async def read(self, connection: Connection, namespace: str, after: int, limit: int) -> Stretch:
        """About `limit` events; the stretch says whether there may be more."""
        ...


@dataclass(frozen=True, slots=True)
class Fed:
    """What came of feeding: events read, signals that were new, and the position reached.

    Without `is_up_to_date` there may be more events.
    """

    events: int
    signals: int
    position: int
    is_up_to_date: bool


@dataclass(frozen=True, slots=True)
class _Moved:
    """What a stretch of events changes: the statements' parameters, None where there is nothing."""

    gone: dict[str, Any] | None
    kept: dict[str, Any] | None
    head: dict[str, Any]
    signals: dict[str, Any] | None


class SignalKeeper:
    """The stored feeds of all namespaces, fed from one source."""

    def __init__(self, database: Database, source: EventSource) -> None:
        self._database, self.source = database, source
        self._feeds: dict[str, Feed] = {}  # as they are stored; one that is in use is not in it

    async def behind(self, node_id: str) -> list[str]:
        """The namespaces with events that were not fed; none unless the node numbers events.

        So one node feeds, as long as it lives, and need not fetch what it has in memory.
        """
        asked = {"node_id": node_id, "version": DETECTOR_VERSION}
        return [row["namespace"] for row in await self._database.fetch_all(SQL.behind, asked)]

    async def feed(self, namespace: str, most_batches: int | None = None) -> Fed:
        """Feeds the events that there are; ends when there are no more, or at the bound."""
        fed = await self.feed_batch(namespace)
        events, signals, batches = fed.events, fed.signals, 1
        while fed.events and not fed.is_up_to_date and batches != most_batches:
            fed = await self.feed_batch(namespace)
            events, signals, batches = events + fed.events, signals + fed.signals, batches + 1
        return Fed(events, signals, fed.position, fed.is_up_to_date)

    async def feed_batch(self, namespace: str, *, is_leader: bool = False) -> Fed:
        """Feeds about `BATCH_EVENTS` events in a transaction of their own.

        Nothing where another detector version's state is, unless this node numbers events.
        """
        new: list[str] = []
        async with self._database.transaction() as connection:
            feed = await self._locked(connection, namespace, is_leader=is_leader)
            if feed is None:
                return Fed(0, 0, 0, is_up_to_date=False)
            found = await self.source.read(connection, namespace, feed.position, BATCH_EVENTS)
            if found.last_position > feed.position:
                moved = await asyncio.to_thread(_moved, namespace, feed, found)
                new = await _store(connection, namespace, moved)
        self._keep(namespace, feed)
        for name in new:
            metrics.signals.labels(name=name).inc()
        return Fed(found.count, len(new), feed.position, found.is_last)

    async def standings(self, namespace: str, profile_id: str) -> list[Standing]:
        """How the profile's streams stand as of the position that was fed last."""
        async with self._database.transaction() as connection:
            feed = await self._locked(connection, namespace)
            if feed is None:
                return []
            keys = (key for key in feed.detector.stream_keys() if key.profile_id == profile_id)
            found = [feed.detector.standing(key) for key in keys]
        self._keep(namespace, feed)
        return found

    async def bases(
        self, namespace: str, profile_id: str, revision: str
    ) -> tuple[int, list[Basis]]:
        """What a change of the profile can be held against, as of the position fed last."""
        async with self._database.transaction() as connection:
            feed = await self._locked(connection, namespace)
            if feed is None:
                return 0, []
            detector = feed.detector
            keys = [
                key
                for key in detector.stream_keys()
                if (key.profile_id, key.revision) == (profile_id, revision)
            ]
            found = [basis for key in keys if (basis := detector.basis(key)) is not None]
        self._keep(namespace, feed)
        return feed.position, found

    async def _locked(
        self, connection: Connection, namespace: str, *, is_leader: bool = False
    ) -> Feed | None:
        """The namespace's feed, locked; None where another version's is not ours to drop."""
        asked = {"namespace": namespace, "version": DETECTOR_VERSION}
        await connection.execute(SQL.enter_feed, asked)
        row = await (await connection.execute(SQL.lock_feed, asked)).fetchone()
        assert row is not None
        known = self._feeds.pop(namespace, None)
        is_ours = row["detector_version"] == DETECTOR_VERSION
        if not is_ours and not is_leader:
            return None
        if is_ours and row["state"] is not None:
            if known is not None and known.position == row["position"]:
                return known
            rows = await (await connection.execute(SQL.streams, asked)).fetchall()
            try:
                return await asyncio.to_thread(_fetched, row["state"], rows)
            except RequestInvalid as error:
                log.warning("signals_rebuilt", namespace=namespace, error=str(error))
        await connection.execute(SQL.reset_feed, asked)
        return Feed()

    def _keep(self, namespace: str, feed: Feed) -> None:
        """Keeps the feed at hand; of all at hand the longest unused go, if it is too much."""
        self._feeds[namespace] = feed
        kept = sum(one.detector.size for one in self._feeds.values())
        while kept > _KEPT_STREAMS and len(self._feeds) > 1:
            kept -= self._feeds.pop(next(iter(self._feeds))).detector.size


def signal_id(namespace: str, said: Said) -> str:
    """The id of what was said: the same whenever the same is said again."""
    key = said.key
    told = [
        namespace,
        key.profile_id,
        key.revision,
        key.metric,
        said.name,
        said.last_position,
        said.detector_version,
    ]
    return sha256_hex(canonical_json(told))[:_ID_DIGITS]


def _fetched(head: str, rows: Iterable[Mapping[str, Any]]) -> Feed:
    streams = (
        (StreamKey(one["profile_id"], one["revision"], one["metric"]), json.loads(one["state"]))
        for one in rows
    )
    return Feed.assembled(json.loads(head), streams)


def _moved(namespace: str, feed: Feed, found: Stretch) -> _Moved:
    """Feeds a stretch; what is to be stored of it."""
    said = list(feed.take(found.events))
    feed.pass_over(found.last_position)
    detector = feed.detector
    states = {key: detector.stream_state(key) for key in sorted(detector.changed())}
    gone = [key for key, state in states.items() if state is None]
    kept = {key: state for key, state in states.items() if state is not None}
    bodies = array(canonical_json(state).decode() for state in kept.values())
    rows = [_row(namespace, one) for one in said]
    return _Moved(
        _keys(gone) if gone else None,
        {"state": bodies, **_keys(kept)} if kept else None,
        {
            "version": DETECTOR_VERSION,
            "position": feed.position,
            "state": canonical_json(feed.head()).decode(),
        },
        {name: array(row[name] for row in rows) for name in rows[0]} if rows else None,
    )


async def _store(connection: Connection, namespace: str, moved: _Moved) -> list[str]:
    """Stores what changed; the names of the signals that are new."""
    within = {"namespace": namespace}
    if moved.gone:
        await connection.execute(SQL.drop_streams, moved.gone | within)
    if moved.kept:
        await connection.execute(SQL.put_streams, moved.kept | within)
    await connection.execute(SQL.move_feed, moved.head | within)
    if not moved.signals:
        return []
    cursor = await connection.execute(SQL.add_signals, moved.signals | within)
    return [row["name"] for row in await cursor.fetchall()]


def _row(namespace: str, said: Said) -> Mapping[str, Any]:
    strong = isinstance(said, Signal) and is_strong(said.name, said.evidence)
    return {
        "signal_id": signal_id(namespace, said),
        "profile_id": said.key.profile_id,
        "revision": said.key.revision,
        "metric": said.key.metric,
        "name": str(said.name),
        "alarm_level": alarm_level(said, is_strong=strong),
        "confidence": said.confidence if isinstance(said, Signal) else None,
        "from_position": said.first_position,
        "to_position": said.last_position,
        "detector_version": said.detector_version,
        "body": canonical_json(said.as_json()).decode(),
    }


def _keys(keys: Iterable[StreamKey]) -> dict[str, str]:
    found = list(keys)
    return {
        "profile_id": array(key.profile_id for key in found),
        "revision": array(key.revision for key in found),
        "metric": array(key.metric for key in found),
    }
