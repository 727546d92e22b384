"""The source of observations: telemetry, read by position, of one namespace.

Only events that the feed can use are brought; over the others it passes. Batches of events are
read whole, so a feed always stands between two of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orbit.database.pool import Connection
from orbit.database.queries import array, load
from orbit.insight.feeding import FAILED, FINISHED, OUTCOME, Stretch

SQL = load("signals")


@dataclass(frozen=True, slots=True)
class TelemetryEvent:
    """An event as the feed reads it."""

    position: int
    event_type: str
    profile_id: str | None
    run_id: str | None
    metadata: Mapping[str, Any]


class TelemetrySource:
    """Reads what is stored of telemetry."""

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
        return Stretch(events, row["count"], row["last_position"] or after, row["count"] < limit)
