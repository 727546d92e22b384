"""Emits events that are rare enough to be told one by one, in the transaction of what they tell.

The hot statements write their own (see the catalogue). No answer is read, so `emit` may stand in
a pipelined batch; it waits for no lock. Nothing is numbered here: that is the sequencer's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orbit.database.pool import Connection
from orbit.database.queries import array, load
from orbit.telemetry.catalogue import CATALOGUE, EventType

SQL = load("telemetry")


@dataclass(frozen=True, slots=True)
class Event:
    """What happened, in which namespace (`*`: the installation), to whom; `run_id` is a cycle's."""

    namespace: str
    event_type: EventType
    metadata: Mapping[str, Any] = field(default_factory=dict)
    profile_id: str | None = None
    run_profile_id: str | None = None
    run_id: str | None = None


async def emit(connection: Connection, *events: Event) -> None:
    """Writes events; they exist if the caller's transaction commits.

    Raises ValueError for metadata that JSON cannot carry (NaN, infinity).
    """
    if not events:
        return
    rows = {
        "namespace": array(one.namespace for one in events),
        "event_type": array(one.event_type.value for one in events),
        "metadata": array(json.dumps(dict(one.metadata), allow_nan=False) for one in events),
        "profile_id": array(one.profile_id for one in events),
        "run_profile_id": array(one.run_profile_id for one in events),
        "run_id": array(one.run_id for one in events),
        "version": array(CATALOGUE[one.event_type].version for one in events),
    }
    await connection.execute(SQL.emit, rows)
