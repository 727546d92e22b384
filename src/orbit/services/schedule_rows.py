"""What a schedule's row says: which schedule it is, up to when it is decided, when to look next.

Pure: all nodes compute the same from the same configuration and settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from orbit.canonical import canonical_digest
from orbit.profiles.schedule import Schedule, jitter, next_slot

_NEVER = "infinity"

Key = tuple[str, str]  # namespace and run profile, which is '' for raw cycles


def definition_of(schedule: Schedule) -> str:
    """What a schedule is, so that a change of it is noticed."""
    return canonical_digest(
        {
            "expressions": list(schedule.expressions),
            "timezone": schedule.timezone,
            "misfire": schedule.misfire.value,
            "catchUpLimit": schedule.catch_up_limit,
            "overlap": schedule.overlap.value,
            "jitterSeconds": schedule.jitter_seconds,
        }
    )


def place_of(
    row: Mapping[str, Any] | None, definition: str, known: datetime | None, now: datetime
) -> datetime:
    """Up to when a schedule is decided: by its row, as this node last knew it, or up to now."""
    if row is not None and (known is not None or row["definition"] == definition):
        at: datetime = row["decided_until"]
        return at.astimezone(UTC)
    return known or now


def due_at(key: Key, schedule: Schedule, after: datetime) -> datetime | str:
    """When the first slot later than `after` is to be decided: the slot and its jitter."""
    slot_at = next_slot(schedule, after)
    if slot_at is None:
        return _NEVER
    return slot_at + jitter_of(key, slot_at, schedule)


def jitter_of(key: Key, slot_at: datetime, schedule: Schedule) -> timedelta:
    """By how much a slot is decided after its time."""
    return jitter("\x1f".join(key), slot_at, schedule.jitter_seconds)
