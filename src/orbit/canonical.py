"""Canonical JSON (RFC 8785) and digests: the same value always gives the same bytes."""

from __future__ import annotations

import hashlib
from typing import Any

import rfc8785

from orbit.errors import RequestInvalid


def canonical_json(value: Any) -> bytes:
    """The RFC 8785 bytes of a JSON value.

    Raises RequestInvalid for what JSON cannot carry (NaN, integers beyond 2**53, other types).
    """
    try:
        return rfc8785.dumps(value)
    except rfc8785.CanonicalizationError as error:
        raise RequestInvalid(f"not expressible as canonical JSON: {error}") from error


def sha256_hex(content: bytes) -> str:
    """SHA-256 as 64 lower-case hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def canonical_digest(value: Any) -> str:
    """The SHA-256 of a JSON value's canonical bytes."""
    return sha256_hex(canonical_json(value))
