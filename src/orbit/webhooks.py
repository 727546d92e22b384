"""Signatures as in Standard Webhooks 1.0: what a sender adds and a receiver checks.

What is signed is `id.timestamp.body`, with HMAC-SHA256, under secrets written as `whsec_` and
base64. A header `webhook-signature` is a list of `v1,<base64>`, separated by spaces: one for
each secret, so that a secret can be replaced while both are in use. Ids with a dot are refused
on both sides, since a dot would let one message be read as another. Comparison takes the same
time wherever the difference is; no message of this file holds a secret or a signature.

Source: https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
from dataclasses import dataclass, field

from orbit.errors import OrbitError

ACCEPTED = (
    "whsec_ and the base64 of 24 to 64 bytes, or up to 4 such secrets with a space between, "
    "while one replaces another"
)
DEFAULT_TOLERANCE_SECONDS = 300.0
_PREFIX = "whsec_"
_MOST_SECRETS = 4
_MOST_SIGNATURES = 16
_MESSAGE_ID = re.compile(r"[!-\-/-~]{1,255}")
_TIMESTAMP = re.compile(r"0|[1-9][0-9]{0,11}")


class SignatureMismatch(OrbitError):
    """No signature in the header is one of this message under a secret of ours."""

    code = "signature_invalid"


class TimestampOutsideWindow(OrbitError):
    """The message was signed too long ago, or in the future: perhaps recorded and replayed."""

    code = "timestamp_outside_window"


@dataclass(frozen=True, slots=True)
class SigningKeys:
    """The bytes of one secret or, while it is being replaced, of several (newest first)."""

    keys: tuple[bytes, ...] = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> SigningKeys:
        """Reads secrets as they are written; raises ValueError that says what is accepted."""
        secrets = text.split(" ")
        if len(secrets) > _MOST_SECRETS:
            raise ValueError(ACCEPTED)
        return cls(tuple(map(_key, secrets)))


class SignedContent:
    """What a signature covers, taken in pieces: for bodies that are not held in memory."""

    def __init__(self, keys: SigningKeys, message_id: str, timestamp: str) -> None:
        """`timestamp` in Unix seconds, as in its header. Raises ValueError as `sign` does."""
        start = _start(message_id, timestamp)
        self._macs = [hmac.new(key, start, "sha256") for key in keys.keys]

    def update(self, chunk: bytes) -> None:
        """Takes the next bytes of the body."""
        for mac in self._macs:
            mac.update(chunk)

    def verify(self, header: str) -> None:
        """Compares with a `webhook-signature` header; raises SignatureMismatch."""
        expected = [mac.digest() for mac in self._macs]
        given = _signatures(header)
        fits = [hmac.compare_digest(ours, theirs) for ours in expected for theirs in given]
        if not any(fits):
            raise SignatureMismatch("no v1 signature in webhook-signature fits this message")


def sign(secret: SigningKeys | str, message_id: str, timestamp: int, body: bytes) -> str:
    """The `webhook-signature` header of one attempt; `timestamp` in Unix seconds.

    Keep the `SigningKeys` where many are signed: a secret given as text is parsed each time.
    Raises ValueError for a secret that cannot be used, or an id that is no visible ASCII or
    has a dot.
    """
    keys = SigningKeys.parse(secret) if isinstance(secret, str) else secret
    content = _start(message_id, str(timestamp)) + body
    return " ".join([_written(hmac.digest(key, content, "sha256")) for key in keys.keys])


def verify(
    secret: SigningKeys | str,
    message_id: str,
    timestamp: str,
    body: bytes,
    header: str,
    *,
    now: float,
    tolerance_seconds: float = DEFAULT_TOLERANCE_SECONDS,
) -> None:
    """Checks the three headers of a message against its body.

    `timestamp` and `header` as they came, `now` in Unix seconds. Raises SignatureMismatch,
    TimestampOutsideWindow, or ValueError for a secret that cannot be used.
    """
    keys = SigningKeys.parse(secret) if isinstance(secret, str) else secret
    try:
        content = SignedContent(keys, message_id, timestamp)
    except ValueError as error:
        raise SignatureMismatch(str(error)) from None
    content.update(body)
    content.verify(header)
    check_window(timestamp, now, tolerance_seconds)


def check_window(
    timestamp: str, now: float, tolerance_seconds: float = DEFAULT_TOLERANCE_SECONDS
) -> None:
    """Refuses what is older or newer than the tolerance; raises TimestampOutsideWindow."""
    late_by = now - int(timestamp)
    if abs(late_by) > tolerance_seconds:
        how = f"{late_by:.0f} s ago" if late_by > 0 else f"{-late_by:.0f} s in the future"
        raise TimestampOutsideWindow(
            f"signed {how} by this machine's clock; {tolerance_seconds:g} s are allowed"
        )


def _start(message_id: str, timestamp: str) -> bytes:
    if not _MESSAGE_ID.fullmatch(message_id):
        raise ValueError("webhook-id: expected 1 to 255 visible ASCII characters without a dot")
    if not _TIMESTAMP.fullmatch(timestamp):
        raise ValueError("webhook-timestamp: expected whole Unix seconds")
    return f"{message_id}.{timestamp}.".encode()


def _key(secret: str) -> bytes:
    try:
        key = base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(ACCEPTED) from None
    if not (secret.startswith(_PREFIX) and 24 <= len(key) <= 64):
        raise ValueError(ACCEPTED)
    return key


def _signatures(header: str) -> list[bytes]:
    """Every well-formed v1 signature; other versions and what is no base64 are passed over."""
    found = []
    for entry in header.split()[:_MOST_SIGNATURES]:
        version, _, text = entry.partition(",")
        try:
            signature = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            continue
        if version == "v1":
            found.append(signature)
    return found


def _written(signature: bytes) -> str:
    return "v1," + base64.b64encode(signature).decode()
