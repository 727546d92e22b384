"""Signatures, judged by our code and by the published Standard Webhooks verifier alike."""

from __future__ import annotations

import base64
import datetime as dt
import json
from pathlib import Path
from typing import Any

import pytest
import standardwebhooks.webhooks
from cryptography.hazmat.primitives import hashes, hmac
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook, WebhookVerificationError

from orbit.webhooks import (
    ACCEPTED,
    SignatureMismatch,
    SignedContent,
    SigningKeys,
    TimestampOutsideWindow,
    sign,
    verify,
)

VECTORS = json.loads(Path(__file__).with_name("webhook_vectors.json").read_text())
SECRET = VECTORS["accepted"][0]["secret"]
IDS = st.from_regex(r"[A-Za-z0-9_:~-]{1,60}", fullmatch=True)
SECRETS = st.binary(min_size=24, max_size=64).map(
    lambda key: "whsec_" + base64.b64encode(key).decode()
)
INSTANTS = st.integers(0, 4_000_000_000)


def at(seconds: float) -> type[dt.datetime]:
    """A `datetime` whose present is the given Unix second."""

    class Then(dt.datetime):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> Then:
            return cls.fromtimestamp(seconds, tz)

    return Then


def published(vector: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    """What the published verifier says of a vector at its time; raises where it refuses."""
    patch.setattr(standardwebhooks.webhooks, "datetime", at(vector["now"]))
    headers = {f"webhook-{name}": vector[name] for name in ("id", "timestamp", "signature")}
    Webhook(vector["secret"]).verify(vector["body"].encode(), headers, json_parse=False)


def ours(vector: dict[str, Any]) -> None:
    """What our verifier says of a vector; raises where it refuses."""
    verify(
        vector["secret"],
        vector["id"],
        vector["timestamp"],
        vector["body"].encode(),
        vector["signature"],
        now=vector["now"],
    )


def name(vector: dict[str, Any]) -> str:
    """A vector's name, as the test's."""
    return str(vector["name"])


def test_the_published_example_is_reproduced() -> None:
    """Our signer writes the signature that the specification's authors publish."""
    vector = VECTORS["accepted"][0]
    signed = sign(vector["secret"], vector["id"], vector["now"], vector["body"].encode())
    assert signed == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize("vector", VECTORS["accepted"], ids=name)
def test_what_is_right_is_accepted_by_both(
    vector: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours and the published verifier agree, and our signature is in the header."""
    ours(vector)
    published(vector, monkeypatch)
    body = vector["body"].encode()
    signed = sign(vector["secret"], vector["id"], int(vector["timestamp"]), body)
    assert signed in vector["signature"].split()


@pytest.mark.parametrize("vector", VECTORS["refused"], ids=name)
def test_what_is_wrong_is_refused_by_both(
    vector: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours and the published verifier agree; no message shows a secret or a signature."""
    with pytest.raises((SignatureMismatch, TimestampOutsideWindow)) as refused:
        ours(vector)
    with pytest.raises(WebhookVerificationError):
        published(vector, monkeypatch)
    assert vector["secret"] not in str(refused.value)
    assert "g0hM9SsE" not in str(refused.value)


@pytest.mark.parametrize("vector", VECTORS["refused_by_orbit"], ids=name)
def test_what_only_orbit_refuses(vector: dict[str, Any]) -> None:
    """Ids that could be read in two ways, and timestamps in another notation, do not pass."""
    with pytest.raises(SignatureMismatch):
        ours(vector)


@given(SECRETS, IDS, INSTANTS, st.text())
def test_what_we_sign_the_published_verifier_accepts(
    secret: str, message_id: str, now: int, text: str
) -> None:
    """For any secret, id, time and text; that library reads no other bytes than UTF-8."""
    header = sign(secret, message_id, now, text.encode())
    vector = {"secret": secret, "id": message_id, "timestamp": str(now), "body": text}
    with pytest.MonkeyPatch.context() as patch:
        published(vector | {"signature": header, "now": now}, patch)


@given(SECRETS, IDS, INSTANTS, st.text(st.characters(codec="utf-8")))
def test_what_the_published_library_signs_we_accept(
    secret: str, message_id: str, now: int, text: str
) -> None:
    """The other way round."""
    then = dt.datetime.fromtimestamp(now, dt.UTC)
    header = Webhook(secret).sign(message_id, then, text)
    verify(secret, message_id, str(now), text.encode(), header, now=now)


@given(SECRETS, IDS, INSTANTS, st.binary(), st.integers(1, 7))
def test_any_bytes_are_signed_and_verified_whole_or_in_pieces(
    secret: str, message_id: str, now: int, body: bytes, step: int
) -> None:
    """Against the HMAC of `cryptography`, since the published verifier takes text only."""
    header = sign(SigningKeys.parse(secret), message_id, now, body)
    other = hmac.HMAC(SigningKeys.parse(secret).keys[0], hashes.SHA256())
    other.update(f"{message_id}.{now}.".encode() + body)
    assert header == "v1," + base64.b64encode(other.finalize()).decode()
    content = SignedContent(SigningKeys.parse(secret), message_id, str(now))
    for start in range(0, len(body), step):
        content.update(body[start : start + step])
    content.verify(header)
    with pytest.raises(SignatureMismatch):
        verify(secret, message_id, str(now), body + b"\0", header, now=now)


@given(SECRETS, SECRETS)
def test_while_a_secret_is_replaced_either_side_may_be_first(old: str, new: str) -> None:
    """Both signatures travel, and a receiver with one of the secrets, or both, accepts."""
    header = sign(f"{new} {old}", "m", 7, b"x")
    assert len(header.split()) == 2
    for known in (old, new, f"{new} {old}"):
        verify(known, "m", "7", b"x", header, now=7)
    verify(f"{new} {old}", "m", "7", b"x", sign(old, "m", 7, b"x"), now=7)


@pytest.mark.parametrize(
    "secret",
    [
        "",
        "whsec_",
        "whsec_abc=",
        "whsec_" + base64.b64encode(bytes(23)).decode(),
        "whsec_" + base64.b64encode(bytes(65)).decode(),
        SECRET.removeprefix("whsec_"),
        SECRET + "é",
        SECRET + "\n",
        f"{SECRET}  {SECRET}",
        " ".join([SECRET] * 5),
        "whsk_" + SECRET[6:],
    ],
)
def test_a_secret_that_cannot_be_used_is_refused_without_being_shown(secret: str) -> None:
    """The message says what is accepted and nothing else."""
    with pytest.raises(ValueError, match="whsec_ and the base64") as refused:
        SigningKeys.parse(secret)
    assert str(refused.value) == ACCEPTED


def test_keys_are_in_no_representation() -> None:
    """A log line with the keys in it shows none."""
    assert repr(SigningKeys.parse(SECRET)) == "SigningKeys()"


@pytest.mark.parametrize("message_id", ["", "a.b", "a b", "é", "a\n", "x" * 256])
def test_an_id_that_cannot_travel_is_not_signed(message_id: str) -> None:
    """A dot would let one message be read as another."""
    with pytest.raises(ValueError, match="webhook-id"):
        sign(SECRET, message_id, 7, b"")
