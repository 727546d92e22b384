"""Checks that a delivery is genuine and whole, before anything is done with it.

Plain functions over header values, for any web framework. A check returns nothing, or what it
read, and raises a `DeliveryRefused` that carries the HTTP status to answer with. Headers are
any mapping that is case-insensitive or has lower-case names. No error text holds a token.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from orbit.errors import OrbitError

ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:~-]{0,127}")
_DIGEST_MEMBER = re.compile(r"([a-z*][a-z0-9_.*-]*)=:([A-Za-z0-9+/]*={0,2}):(?:;.*)?")
_SHA256_BYTES = 32


class DeliveryRefused(OrbitError):
    """A delivery that must not take effect; `status` is the answer it gets."""

    code = "delivery_refused"
    status: ClassVar[int] = 400


class BearerInvalid(DeliveryRefused):
    """The bearer token is absent or another one."""

    code = "bearer_invalid"
    status = 401


class BodyAltered(DeliveryRefused):
    """The body is not the one that the sender's `Content-Digest` names."""

    code = "body_altered"


class IdMissing(DeliveryRefused):
    """The delivery has no id, so that it cannot be told from a repetition."""

    code = "id_missing"


class HeaderInvalid(DeliveryRefused):
    """A header that names something carries what is not a name."""

    code = "header_invalid"


@dataclass(frozen=True, slots=True)
class Delivery:
    """Who sent what, as the headers say; every text matches `ID_PATTERN` or is empty.

    `attempt` counts the sender's sends of this job from 1; 0 means that it did not say.
    """

    id: str
    namespace: str = ""
    profile_id: str = ""
    run_profile_id: str = ""
    cycle_run_id: str = ""
    job_id: str = ""
    attempt: int = 0


def verify_bearer(authorization: str | None, token: str) -> None:
    """Checks an `Authorization` header against the token, in constant time.

    Raises BearerInvalid.
    """
    scheme, _, given = (authorization or "").partition(" ")
    is_right = hmac.compare_digest(given.strip().encode(), token.encode())
    if scheme.lower() != "bearer" or not is_right:
        raise BearerInvalid("the bearer token is missing or wrong")


def verify_content_digest(content_digest: str | None, sha256: bytes) -> bool:
    """Checks a `Content-Digest` header (RFC 9530) against the body's SHA-256 (32 bytes).

    Returns whether there was a `sha-256` to compare; other algorithms are passed over.
    Raises BodyAltered when it differs, HeaderInvalid when it cannot be read.
    """
    if content_digest is None:
        return False
    claimed = _parse_digests(content_digest).get("sha-256")
    if claimed is None:
        return False
    if len(claimed) != _SHA256_BYTES:
        raise HeaderInvalid("Content-Digest: sha-256 is not 32 bytes long")
    if not hmac.compare_digest(claimed, sha256):
        raise BodyAltered("the body is not the one that Content-Digest names")
    return True


def delivery_id(headers: Mapping[str, str]) -> str:
    """The id that all attempts of a job share: `Idempotency-Key`, or else `webhook-id`.

    The key may stand in double quotes (as a structured field) or bare. Raises IdMissing, or
    HeaderInvalid where it is no id or the two headers disagree.
    """
    key = _unquoted(headers.get("idempotency-key", ""))
    webhook_id = headers.get("webhook-id", "").strip()
    if not (key or webhook_id):
        raise IdMissing("neither Idempotency-Key nor webhook-id is given")
    if key and webhook_id and key != webhook_id:
        raise HeaderInvalid("Idempotency-Key and webhook-id differ")
    return _checked("Idempotency-Key", key or webhook_id)


def read_delivery(headers: Mapping[str, str]) -> Delivery:
    """Reads what the sender says of a delivery; every value is safe to log and to compare.

    Raises IdMissing or HeaderInvalid.
    """
    return Delivery(
        id=delivery_id(headers),
        namespace=_optional(headers, "Orbit-Namespace"),
        profile_id=_optional(headers, "Orbit-Profile-Id"),
        run_profile_id=_optional(headers, "Orbit-Run-Profile-Id"),
        cycle_run_id=_optional(headers, "Orbit-Cycle-Run-Id"),
        job_id=_optional(headers, "Orbit-Job-Id"),
        attempt=_attempt(headers.get("orbit-attempt", "")),
    )


def _parse_digests(header: str) -> dict[str, bytes]:
    digests: dict[str, bytes] = {}
    for member in header.split(","):
        match = _DIGEST_MEMBER.fullmatch(member.strip())
        if match is None:
            raise HeaderInvalid("Content-Digest: expected algorithm=:base64:, e.g. sha-256=:…:")
        try:
            digests[match[1]] = base64.b64decode(match[2], validate=True)
        except binascii.Error as error:
            raise HeaderInvalid(f"Content-Digest: {match[1]} is not base64") from error
    return digests


def _unquoted(text: str) -> str:
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text


def _optional(headers: Mapping[str, str], name: str) -> str:
    text = headers.get(name.lower(), "").strip()
    return _checked(name, text) if text else ""


def _checked(name: str, text: str) -> str:
    if not ID_PATTERN.fullmatch(text):
        raise HeaderInvalid(
            f"{name}: expected 1 to 128 of A-Z a-z 0-9 . _ : ~ - that begin with a letter or digit"
        )
    return text


def _attempt(text: str) -> int:
    if not text:
        return 0
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise HeaderInvalid("Orbit-Attempt: expected a whole number from 1")
    return int(text)
