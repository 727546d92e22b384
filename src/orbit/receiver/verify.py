"""Checks that a delivery is genuine and whole, before anything is done with it.

Plain functions over header values, for any web framework. A check returns nothing, or what it
read, and raises a `DeliveryRefused` that carries the HTTP status to answer with;
`verify_delivery` makes all of them. Headers are any mapping that is case-insensitive or has
lower-case names. No error text holds a token, a secret or a signature.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from orbit.clock import SystemClock
from orbit.errors import OrbitError
from orbit.webhooks import (
    DEFAULT_TOLERANCE_SECONDS,
    SignatureMismatch,
    SignedContent,
    SigningKeys,
    TimestampOutsideWindow,
    check_window,
)

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


class SignatureInvalid(DeliveryRefused):
    """The signature is absent, or not one of this delivery under a secret that we share."""

    code = "signature_invalid"
    status = 401


class TimestampStale(DeliveryRefused):
    """The delivery was signed too long ago, or in the future: perhaps recorded and replayed."""

    code = "timestamp_outside_window"
    status = 401


class BodyAltered(DeliveryRefused):
    """The body is not the one that the sender's `Content-Digest` names."""

    code = "body_altered"


class BodyTooLarge(DeliveryRefused):
    """The body is over the receiver's limit; what came of it has been thrown away."""

    code = "body_too_large"
    status = 413


class IdMissing(DeliveryRefused):
    """The delivery has no id, so that it cannot be told from a repetition."""

    code = "id_missing"


class HeaderInvalid(DeliveryRefused):
    """A header that names something carries what is not a name."""

    code = "header_invalid"


@dataclass(frozen=True, slots=True)
class Delivery:
    """Who sent what, as the headers say; every text matches `ID_PATTERN` or is empty.

    `attempt` counts the sender's sends of this job from 1; 0 means that it did not say. `epoch` is
    how many halts of the namespace there had been when the sender began with this attempt.
    """

    id: str
    namespace: str = ""
    profile_id: str = ""
    run_profile_id: str = ""
    cycle_run_id: str = ""
    job_id: str = ""
    attempt: int = 0
    epoch: int = 0


def verify_delivery(
    headers: Mapping[str, str],
    body: bytes,
    *,
    token: str | Sequence[str] | None = None,
    signing_secret: SigningKeys | str | None = None,
    tolerance_seconds: float = DEFAULT_TOLERANCE_SECONDS,
) -> Delivery:
    """Makes every check on a delivery and returns what it says of itself.

    `token` is one, or all that are valid while one replaces another; `signing_secret` likewise
    may be several with spaces between. A check whose secret is None is left out, but not both.
    Raises DeliveryRefused, or ValueError where there is nothing to check with.
    """
    tokens = valid_tokens(token)
    if not (tokens or signing_secret):
        raise ValueError("a token or a signing secret is needed to know who sends")
    if tokens:
        verify_bearer(headers.get("authorization"), *tokens)
    if signing_secret is not None:
        signature = DeliverySignature(headers, signing_secret, tolerance_seconds)
        signature.update(body)
        signature.verify()
    verify_content_digest(headers.get("content-digest"), hashlib.sha256(body).digest())
    return read_delivery(headers)


def valid_tokens(token: str | Sequence[str] | None) -> tuple[str, ...]:
    """One token, several or none, as a tuple; raises ValueError if one of them is empty."""
    tokens = (token,) if isinstance(token, str) else tuple(token or ())
    if not all(tokens):
        raise ValueError("a token is empty; is its variable set?")
    return tokens


def verify_bearer(authorization: str | None, *tokens: str) -> None:
    """Checks an `Authorization` header against the tokens that are valid, in constant time.

    Raises BearerInvalid.
    """
    scheme, _, text = (authorization or "").partition(" ")
    given = text.strip().encode()
    fits = [hmac.compare_digest(given, token.encode()) for token in tokens]  # all, in any case
    if scheme.lower() != "bearer" or not given or not any(fits):
        raise BearerInvalid("the bearer token is missing or wrong")


class DeliverySignature:
    """The signature of a delivery (Standard Webhooks), checked against a body in pieces.

    Made from the headers, before the body is read; raises SignatureInvalid where they are
    absent or malformed, ValueError where the secret cannot be used.
    """

    def __init__(
        self,
        headers: Mapping[str, str],
        signing_secret: SigningKeys | str,
        tolerance_seconds: float = DEFAULT_TOLERANCE_SECONDS,
    ) -> None:
        keys = signing_secret
        if isinstance(keys, str):
            keys = SigningKeys.parse(keys)
        self._signature = headers.get("webhook-signature", "")
        self._timestamp = headers.get("webhook-timestamp", "")
        self._tolerance_seconds = tolerance_seconds
        try:
            self._content = SignedContent(keys, headers.get("webhook-id", ""), self._timestamp)
        except ValueError as error:
            raise SignatureInvalid(str(error)) from None

    def update(self, chunk: bytes) -> None:
        """Takes the next bytes of the body."""
        self._content.update(chunk)

    def verify(self) -> None:
        """Checks what came, at its end; raises SignatureInvalid or TimestampStale."""
        try:
            self._content.verify(self._signature)
            now = SystemClock().now().timestamp()
            check_window(self._timestamp, now, self._tolerance_seconds)
        except SignatureMismatch as error:
            raise SignatureInvalid(str(error)) from None
        except TimestampOutsideWindow as error:
            raise TimestampStale(str(error)) from None


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
        attempt=_number(headers, "Orbit-Attempt"),
        epoch=_number(headers, "Orbit-Epoch"),
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


def _number(headers: Mapping[str, str], name: str) -> int:
    text = headers.get(name.lower(), "")
    if not text:
        return 0
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise HeaderInvalid(f"{name}: expected a whole number")
    return int(text)
