"""The source of observations: telemetry, read by position, of one namespace.

Only events that the feed can use are brought; over the others it passes. Batches of events are
read whole, so a feed always stands between two of them.

An event names the revision of the whole configuration. A profile's baseline is to outlive changes
of others, so the event of a cycle's end is given its profile's own, `profileRevision`: the digest
of the profile with its run profiles, as that configuration has them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orbit.canonical import canonical_json, sha256_hex
from orbit.database.pool import Connection
from orbit.database.queries import array, load
from orbit.insight.feeding import FAILED, FINISHED, OUTCOME, Stretch

SQL = load("signals")
CONFIGURATION_SQL = load("configuration")
_KEPT_REVISIONS = 16


@dataclass(frozen=True, slots=True)
class TelemetryEvent:
    """An event as the feed reads it."""

    position: int
    event_type: str
    profile_id: str | None
    run_id: str | None
    metadata: dict[str, Any]


class TelemetrySource:
    """Reads what is stored of telemetry."""

    def __init__(self) -> None:
        self._profiles: dict[str, dict[str, str]] = {}

    async def read(self, connection: Connection, namespace: str, after: int, limit: int) -> Stretch:
        """Whole batches until there are `limit` events or no more."""
        asked = {
            "namespace": namespace,
            "after": after,
            "count": limit,
            "event_type": array((FINISHED, FAILED, OUTCOME)),
        }
        row = await (await connection.execute(SQL.events_after, asked)).fetchone()
        assert row is not None
        events = [TelemetryEvent(*one) for one in json.loads(row["events"] or "[]")]
        for event in events:
            await self._add_profile_revision(connection, event)
        return Stretch(events, row["count"], row["last_position"] or after, row["count"] < limit)

    async def _add_profile_revision(self, connection: Connection, event: TelemetryEvent) -> None:
        revision = event.metadata.get("revision")
        if event.profile_id is None or not isinstance(revision, str):
            return
        known = self._profiles.get(revision)
        if known is None:
            cursor = await connection.execute(
                CONFIGURATION_SQL.revision_body, {"revision": revision}
            )
            row = await cursor.fetchone()
            known = {} if row is None else profile_revisions(json.loads(row["body"]))
            while len(self._profiles) >= _KEPT_REVISIONS:
                del self._profiles[next(iter(self._profiles))]
            self._profiles[revision] = known
        if (found := known.get(event.profile_id)) is not None:
            event.metadata["profileRevision"] = found


def profile_revisions(body: Mapping[str, Any]) -> dict[str, str]:
    """Of each profile of a stored configuration the digest of what is said of it."""
    said: dict[str, list[Any]] = {one["profile_id"]: [one] for one in body["profiles"]}
    for run_profile in sorted(body["run_profiles"], key=lambda one: str(one["run_profile_id"])):
        said.setdefault(run_profile["profile_id"], []).append(run_profile)
    return {name: sha256_hex(canonical_json(parts)) for name, parts in said.items()}
