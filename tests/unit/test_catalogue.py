"""The catalogue of events, held against the SQL that writes them out."""

from __future__ import annotations

from orbit.telemetry.catalogue import CATALOGUE, EventType

ADDED = {"namespace", "profileId", "runProfileId", "runId"}


def test_every_type_is_described_once() -> None:
    """A type without a meaning is told to nobody who could read it."""
    assert CATALOGUE.keys() == set(EventType)
    assert all(kind.meaning.endswith(".") for kind in CATALOGUE.values())


def test_no_field_is_what_every_event_has_already() -> None:
    """`telemetry.window` writes those before the metadata: a second one would be one key twice."""
    assert not [name for name, kind in CATALOGUE.items() if ADDED & kind.fields.keys()]


def test_versions_are_those_that_are_written() -> None:
    """`telemetry.window` writes v1; who raises a version has old events keep theirs."""
    assert {kind.version for kind in CATALOGUE.values()} == {1}
