"""Keeping: a namespace's feed is stored, moved on over new events, and what it says is recorded.

One transaction for each batch: the feed's row is locked, events after its position are read over
the same connection, and position, streams and signals commit together or not at all. So no event
is fed twice, whoever asks for it and on however many nodes, and a node that dies loses nothing.

State of another detector version is dropped and built anew from the events that are kept. What
is said again has the same id and is not recorded again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from orbit.canonical import canonical_json, sha256_hex
from orbit.database.pool import Connection, Database
from orbit.database.queries import array, load
from orbit.insight.confidence import is_strong
from orbit.insight.feeding import Event, Feed, Said
from orbit.insight.signals import (
    DETECTOR_VERSION,
    Signal,
    Standing,
    StreamKey,
    alarm_level,
)

SQL = load("signals")
BATCH_EVENTS = 1000
_KEPT_FEEDS = 32
_ID_DIGITS = 32


class EventSource(Protocol):
    """Where events are read: those of a namespace after a position, in the order of positions."""

    async def read(
        self, connection: Connection, namespace: str, after: int, limit: int
    ) -> Sequence[Event]:
        """Up to `limit` events; none means that there are no more as yet."""
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


class SignalKeeper:
    """The stored feeds of all namespaces, fed from one source."""

    def __init__(self, database: Database, source: EventSource) -> None:
        self._database, self._source = database, source
        self._feeds: dict[str, Feed] = {}

    async def feed(self, namespace: str, most_batches: int | None = None) -> Fed:
        """Feeds the events that there are; ends at a batch that is not full, or at the bound."""
        fed = await self.feed_batch(namespace)
        events, signals, batches = fed.events, fed.signals, 1
        while not fed.is_up_to_date and batches != most_batches:
            fed = await self.feed_batch(namespace)
            events, signals, batches = events + fed.events, signals + fed.signals, batches + 1
        return Fed(events, signals, fed.position, fed.is_up_to_date)

    async def feed_batch(self, namespace: str) -> Fed:
        """Feeds up to `BATCH_EVENTS` events in a transaction of their own."""
        async with self._database.transaction() as connection:
            feed = await self._locked(connection, namespace)
            found = await self._source.read(connection, namespace, feed.position, BATCH_EVENTS)
            said = list(feed.take(found))
            if found:
                await _store(connection, namespace, feed)
            new = await _record(connection, namespace, said)
        while len(self._feeds) >= _KEPT_FEEDS:
            del self._feeds[next(iter(self._feeds))]
        self._feeds[namespace] = feed
        return Fed(len(found), new, feed.position, len(found) < BATCH_EVENTS)

    async def standings(self, namespace: str, profile_id: str) -> list[Standing]:
        """How the profile's streams stand as of the position that was fed last."""
        async with self._database.transaction() as connection:
            feed = await self._locked(connection, namespace)
        keys = (key for key in feed.detector.stream_keys() if key.profile_id == profile_id)
        return [feed.detector.standing(key) for key in keys]

    async def _locked(self, connection: Connection, namespace: str) -> Feed:
        """The namespace's feed, locked; built anew where another detector left it."""
        asked = {"namespace": namespace, "version": DETECTOR_VERSION}
        await connection.execute(SQL.enter_feed, asked)
        row = await (await connection.execute(SQL.lock_feed, asked)).fetchone()
        assert row is not None
        known = self._feeds.pop(namespace, None)
        if row["detector_version"] != DETECTOR_VERSION:
            await connection.execute(SQL.drop_streams, {**_keys(()), **asked, "is_all": True})
            return Feed()
        if row["state"] is None:
            return Feed()
        if known is not None and known.position == row["position"]:
            return known
        rows = await (await connection.execute(SQL.streams, asked)).fetchall()
        streams = (
            (StreamKey(one["profile_id"], one["revision"], one["metric"]), json.loads(one["state"]))
            for one in rows
        )
        return Feed.assembled(json.loads(row["state"]), streams)


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


async def _store(connection: Connection, namespace: str, feed: Feed) -> None:
    detector = feed.detector
    states = {key: detector.stream_state(key) for key in sorted(detector.changed())}
    gone = [key for key, state in states.items() if state is None]
    kept = {key: state for key, state in states.items() if state is not None}
    if gone:
        asked = {"namespace": namespace, "is_all": False, **_keys(gone)}
        await connection.execute(SQL.drop_streams, asked)
    if kept:
        bodies = array(canonical_json(state).decode() for state in kept.values())
        asked = {"namespace": namespace, "state": bodies, **_keys(kept)}
        await connection.execute(SQL.put_streams, asked)
    head = {
        "namespace": namespace,
        "version": DETECTOR_VERSION,
        "position": feed.position,
        "state": canonical_json(feed.head()).decode(),
    }
    await connection.execute(SQL.move_feed, head)


async def _record(connection: Connection, namespace: str, said: Sequence[Said]) -> int:
    if not said:
        return 0
    rows = [_row(namespace, one) for one in said]
    columns = {name: array(row[name] for row in rows) for name in rows[0]}
    cursor = await connection.execute(SQL.add_signals, {**columns, "namespace": namespace})
    return cursor.rowcount


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
