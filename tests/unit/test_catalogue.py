"""The catalogue of events, held against the SQL that writes them out."""

from __future__ import annotations

from orbit.database.queries import load
from orbit.telemetry.catalogue import CATALOGUE, EventType

ADDED = {"namespace", "profileId", "runProfileId", "runId"}


def test_every_type_is_described_once() -> None:
    """A type without a meaning is told to nobody who could read it."""
    assert CATALOGUE.keys() == set(EventType)
    assert all(kind.meaning.endswith(".") for kind in CATALOGUE.values())


def test_no_field_is_what_every_event_has_already() -> None:
    """`telemetry.window` writes those before the metadata: a second one would be one key twice."""
    assert not [name for name, kind in CATALOGUE.items() if ADDED & kind.fields.keys()]


def test_hot_statements_write_the_first_version() -> None:
    """They name none: who raises the version of what they tell has them name it."""
    files = [load(name) for name in ("cycle", "dispatch", "dead_letters")]
    text = b"".join(getattr(file, name) for file in files for name in file.names()).decode()
    told = [
        one
        for one in EventType
        if f"'{one}'" in text or ("_" in one and f"'{one.partition('_')[0]}_" in text)
    ]
    assert {EventType.REQUEUED, EventType.DELIVERY_UNKNOWN, EventType.STAGE_COMPLETED} <= {*told}
    assert {CATALOGUE[one].version for one in told} == {1}
