"""The initiation: the same for what asks twice, another for everything else."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from orbit.canonical import canonical_digest, sha256_hex
from orbit.execution.initiation import CycleRequest, select_initiation
from orbit.payload import Payload

KEYS = st.text("abc-", min_size=1, max_size=4)
SLOTS = st.none() | st.datetimes(
    datetime(2020, 1, 1),  # noqa: DTZ001 - the zone is drawn apart
    datetime(2030, 1, 1),  # noqa: DTZ001
    timezones=st.just(UTC),
)


@st.composite
def requests(draw: st.DrawFn) -> CycleRequest:
    """Triggers of any kind."""
    given_values: dict[str, Any] = {
        "cycle_id": draw(KEYS),
        "namespace": draw(KEYS),
        "trigger": draw(st.sampled_from(["api", "cli"])),
        "run_profile_id": draw(st.just("") | KEYS),
        "profile_id": draw(st.none() | KEYS),
        "slot_at": draw(SLOTS),
        "idempotency_key": draw(st.none() | KEYS),
        "rerun_of": draw(st.none() | KEYS),
    }
    return CycleRequest(**given_values)


def identity(request: CycleRequest) -> tuple[object, ...]:
    """What makes a request the one that it is."""
    if request.slot_at is not None:
        by: tuple[object, ...] = ("slot", request.slot_at)
    elif request.idempotency_key is not None:
        by = ("key", request.idempotency_key)
    else:
        by = ("id", request.trigger, request.cycle_id)
    who = (request.namespace, request.profile_id, request.run_profile_id)
    return (*who, *by, request.rerun_of)


@given(requests(), requests())
def test_one_hash_for_one_request(one: CycleRequest, other: CycleRequest) -> None:
    """Two triggers share an initiation exactly if they are the same slot, key or id."""
    first, second = select_initiation(one), select_initiation(other)
    assert (first.hash == second.hash) == (identity(one) == identity(other))


@given(requests(), KEYS)
def test_a_slot_or_key_says_it_all(request: CycleRequest, cycle_id: str) -> None:
    """With a slot or a key, another node's attempt, under an id of its own, is the same."""
    repeated = replace(request, cycle_id=cycle_id, payload=Payload(b"x"))
    is_same = select_initiation(repeated) == select_initiation(request)
    is_named = request.slot_at is not None or request.idempotency_key is not None
    assert is_same == (is_named or cycle_id == request.cycle_id)


@given(requests())
def test_the_hash_is_of_the_canonical_context(request: CycleRequest) -> None:
    """Stable: the SHA-256 of the context's canonical JSON, in whatever order it is read."""
    initiation = select_initiation(request)
    context = json.loads(initiation.context)
    assert initiation.hash == sha256_hex(initiation.context.encode())
    assert initiation.hash == canonical_digest(dict(reversed(context.items())))
    assert select_initiation(request) == initiation


def test_a_hash_of_today_is_a_hash_of_tomorrow() -> None:
    """Hashes are kept for ever: a change of how they are made would run slots twice."""
    request = CycleRequest(
        cycle_id="c",
        namespace="brand-a",
        trigger="schedule",
        profile_id="nova",
        run_profile_id="nova-daily",
        slot_at=datetime(2026, 3, 29, 1, tzinfo=UTC),
    )
    assert select_initiation(request).context == (
        '{"namespace":"brand-a","profileId":"nova","runProfileId":"nova-daily",'
        '"trigger":{"kind":"schedule","slotAt":"2026-03-29T01:00:00+00:00"}}'
    )


@given(st.binary(max_size=5), st.binary(max_size=5))
def test_a_requests_digest_is_of_what_it_asks_for(one: bytes, other: bytes) -> None:
    """A key used again for another payload or other endpoints is noticed."""
    base = CycleRequest(cycle_id="c", namespace="a", trigger="api", payload=Payload(one))
    again = replace(base, cycle_id="d", payload=Payload(other))
    assert (base.digest() == again.digest()) == (one == other)
    asked = [
        base,
        replace(base, endpoint_keys=()),
        replace(base, endpoint_keys=("x",)),
        replace(base, endpoint_keys=("x", "y")),
        replace(base, rerun_from="start"),
        replace(base, rerun_from="stage"),
        replace(base, payload=None),
    ]
    assert len({one.digest() for one in asked}) == len(asked)
    assert base.digest() != replace(base, payload=Payload(one, "text/plain")).digest()


def test_reruns_of_one_slot_are_one_whatever_their_keys() -> None:
    """The first failed cycle and the number of re-runs decide; neither id nor key does."""
    base = CycleRequest(
        cycle_id="c", namespace="a", trigger="rerun", rerun_of="b", rerun_slot=("a", 1)
    )
    same = replace(base, cycle_id="d", idempotency_key="k", rerun_of="a")
    assert select_initiation(base) == select_initiation(same)
    assert select_initiation(base) != select_initiation(replace(base, rerun_slot=("a", 2)))


def test_a_slot_in_another_zone_is_the_same_moment() -> None:
    """The scheduler hands slots over in UTC; a zone would make another text of the same slot."""
    at = datetime(2026, 1, 1, tzinfo=UTC)
    request = CycleRequest(cycle_id="c", namespace="a", trigger="schedule", slot_at=at)
    zoned = replace(request, slot_at=at.astimezone(timezone(timedelta(hours=2))))
    assert select_initiation(request) == select_initiation(zoned)
