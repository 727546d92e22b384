"""Canonical JSON: one value, one text, one digest."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orbit.canonical import canonical_digest, canonical_json, sha256_hex
from orbit.errors import RequestInvalid

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(-(2.0**53) + 1, 2.0**53 - 1)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
KEYS = st.text(st.characters(exclude_categories=["Cs"]))
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=20,
)


def shuffled(value: Any, chance: random.Random) -> Any:
    """The same value with every object's keys in another order."""
    if isinstance(value, list):
        return [shuffled(one, chance) for one in value]
    if isinstance(value, dict):
        items = [(key, shuffled(one, chance)) for key, one in value.items()]
        chance.shuffle(items)
        return dict(items)
    return value


@given(VALUES, st.randoms(use_true_random=False))
def test_the_order_of_keys_is_irrelevant(value: Any, chance: random.Random) -> None:
    """However an object was put together, its bytes and digest are the same."""
    other = shuffled(value, chance)
    assert canonical_json(other) == canonical_json(value)
    assert canonical_digest(other) == canonical_digest(value)


@given(VALUES)
def test_nothing_is_lost(value: Any) -> None:
    """The canonical text reads back as the value, and is canonical itself."""
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == text


@given(VALUES, VALUES)
def test_different_values_have_different_digests(one: Any, other: Any) -> None:
    """A digest stands for one value; 1 and 1.0 are one, as in JSON."""
    assert (canonical_json(one) == canonical_json(other)) == (
        canonical_digest(one) == canonical_digest(other)
    )


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), 2**53, {1: 2}, object(), b"x", "\ud800"]
)
def test_what_json_cannot_carry_is_refused(value: object) -> None:
    """No value is bent to fit: the error is the caller's."""
    with pytest.raises(RequestInvalid):
        canonical_json({"value": value})


def test_the_digest_is_sha256_in_hexadecimal() -> None:
    """The digest that receivers and auditors can check with any tool."""
    expected = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert canonical_digest({}) == expected == sha256_hex(b"{}")
