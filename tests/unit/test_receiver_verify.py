"""What a receiving service checks, and what it remembers."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orbit.clock import SystemClock
from orbit.receiver import (
    BearerInvalid,
    BodyAltered,
    Delivery,
    DeliveryRefused,
    FileSeen,
    HeaderInvalid,
    IdMissing,
    MemorySeen,
    SeenFileInUse,
    SignatureInvalid,
    TimestampStale,
    Verdict,
    delivery_id,
    read_delivery,
    verify_bearer,
    verify_content_digest,
    verify_delivery,
)
from orbit.receiver.arrivals import payload_path
from orbit.receiver.verify import ID_PATTERN
from orbit.webhooks import sign

BODY = b"good morning"
SHA256 = hashlib.sha256(BODY).digest()
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OTHER_SECRET = "whsec_" + base64.b64encode(bytes(24)).decode()
DIGEST_HEADER = f"sha-256=:{base64.b64encode(SHA256).decode()}:"


def nothing() -> None:
    """An effect that has none."""


def failing() -> None:
    """An effect that does not come about."""
    raise ZeroDivisionError


def test_the_right_token_passes_whatever_the_case_of_the_scheme() -> None:
    """`Bearer` is compared without case, the token exactly."""
    verify_bearer("Bearer s3cret", "s3cret")
    verify_bearer("bearer  s3cret", "s3cret")


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Bearer S3cret", "Basic s3cret", "s3cret", "Bearer é"]
)
def test_another_token_is_refused_without_being_shown(header: str | None) -> None:
    """Anything but the token is a 401 whose text holds no token."""
    with pytest.raises(BearerInvalid) as refused:
        verify_bearer(header, "s3cret")
    assert refused.value.status == 401
    assert "s3cret" not in str(refused.value).lower()


@given(st.text(), st.text(alphabet="abc", min_size=1))
def test_a_bearer_check_never_fails_otherwise(header: str, token: str) -> None:
    """Any header either passes or raises BearerInvalid."""
    try:
        verify_bearer(header, token)
    except BearerInvalid:
        return
    assert header.rsplit(maxsplit=1)[-1] == token


@pytest.mark.parametrize(
    "header",
    [
        DIGEST_HEADER,
        f"sha-512=:AAAA:, {DIGEST_HEADER}",
        f"{DIGEST_HEADER};note=1 , unixsum=:Kg==:",
    ],
)
def test_the_right_digest_is_found(header: str) -> None:
    """The sha-256 member counts, among others and with parameters."""
    assert verify_content_digest(header, SHA256)


def test_where_there_is_no_sha256_nothing_was_compared() -> None:
    """The function says that it could not check."""
    assert not verify_content_digest(None, SHA256)
    assert not verify_content_digest("sha-512=:AAAA:", SHA256)


@given(st.binary(min_size=32, max_size=32).filter(lambda other: other != SHA256))
def test_another_digest_is_refused(other: bytes) -> None:
    """A body that is not the one named is a 400."""
    with pytest.raises(BodyAltered):
        verify_content_digest(f"sha-256=:{base64.b64encode(other).decode()}:", SHA256)


@pytest.mark.parametrize(
    "header", ["", "sha-256", "sha-256=abc", "sha-256=:abc:", "sha-256=:QUJD:", "SHA-256=:QUJD:"]
)
def test_an_unreadable_digest_is_refused(header: str) -> None:
    """What is no RFC 9530 dictionary, or too short, is not passed over."""
    with pytest.raises(HeaderInvalid):
        verify_content_digest(header, SHA256)


def test_the_id_comes_from_either_header() -> None:
    """`Idempotency-Key` bare or quoted, else `webhook-id`."""
    assert delivery_id({"idempotency-key": "a1"}) == "a1"
    assert delivery_id({"idempotency-key": '"a1"', "webhook-id": "a1"}) == "a1"
    assert delivery_id({"webhook-id": "a1"}) == "a1"


def test_a_delivery_without_id_is_refused() -> None:
    """It could not be told from a repetition."""
    with pytest.raises(IdMissing):
        delivery_id({"idempotency-key": " "})


def test_two_different_ids_are_refused() -> None:
    """A proxy that changed one of the headers does not go unnoticed."""
    with pytest.raises(HeaderInvalid):
        delivery_id({"idempotency-key": "a1", "webhook-id": "a2"})


def test_a_delivery_is_read_whole() -> None:
    """Every header lands in its field."""
    headers = {
        "idempotency-key": "k",
        "orbit-namespace": "brand-a",
        "orbit-profile-id": "nova",
        "orbit-run-profile-id": "nova-daily",
        "orbit-cycle-run-id": "c",
        "orbit-job-id": "j",
        "orbit-attempt": "3",
        "orbit-epoch": "2",
    }
    assert read_delivery(headers) == Delivery("k", "brand-a", "nova", "nova-daily", "c", "j", 3, 2)


@given(st.text(min_size=1))
def test_what_is_read_from_headers_can_never_leave_the_folder(text: str) -> None:
    """Any namespace, run profile or job either is refused or gives a path below the folder."""
    headers = {
        "idempotency-key": "k",
        "orbit-namespace": text,
        "orbit-run-profile-id": text,
        "orbit-job-id": text,
    }
    try:
        delivery = read_delivery(headers)
    except DeliveryRefused:
        return
    path = payload_path(delivery, "application/json")
    assert len(path.parts) == 3
    assert all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._~%+-]*", part) for part in path.parts)


@pytest.mark.parametrize("hostile", ["../x", "..", "a/b", "a\\b", ".x", "a b", "a\n", "x" * 129])
def test_a_name_that_is_no_id_is_refused(hostile: str) -> None:
    """Path traversal is refused before any path is made."""
    headers = {"idempotency-key": "k", "orbit-namespace": f"{hostile}|"}
    with pytest.raises(HeaderInvalid):
        read_delivery(headers)
    assert not ID_PATTERN.fullmatch(hostile)


def test_two_deliveries_never_share_a_file() -> None:
    """Where job and delivery id differ, the file's name has both."""
    one = payload_path(Delivery("k1", job_id="j"), "text/markdown; charset=utf-8")
    two = payload_path(Delivery("k2", job_id="j"), "text/markdown; charset=utf-8")
    assert one != two
    assert payload_path(Delivery("j", "n", job_id="j"), "application/json").as_posix() == (
        "n/_/j.json"
    )


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_an_id_takes_effect_once_and_conflicts_are_seen(kind: str, tmp_path: Path) -> None:
    """New, then duplicate, then conflict, in memory and on disk alike."""
    seen = MemorySeen() if kind == "memory" else FileSeen(tmp_path / "index")
    effects: list[str] = []
    verdicts = [seen.once("a", digest, lambda: effects.append("a")) for digest in "dde"]
    assert verdicts == [Verdict.NEW, Verdict.DUPLICATE, Verdict.CONFLICT]
    assert effects == ["a"]


def test_an_effect_that_fails_is_not_remembered() -> None:
    """The sender comes again, and then it takes effect."""
    seen = MemorySeen()
    with pytest.raises(ZeroDivisionError):
        seen.once("a", "d", failing)
    assert seen.once("a", "d", nothing) is Verdict.NEW


def test_concurrent_posts_of_one_id_take_effect_once(tmp_path: Path) -> None:
    """Eight threads with one id: one effect, seven duplicates, for each of 50 ids."""
    seen, gate, effects = FileSeen(tmp_path / "index"), threading.Barrier(8), []

    def post(key: str) -> Verdict:
        gate.wait(60)
        return seen.once(key, "d", lambda: effects.append(key))

    with ThreadPoolExecutor(8) as pool:
        for number in range(50):
            verdicts = list(pool.map(post, [f"id{number}"] * 8))
            assert sorted(v.value for v in verdicts) == ["duplicate"] * 7 + ["new"]
    assert effects == [f"id{number}" for number in range(50)]


def test_different_ids_do_not_wait_for_each_other() -> None:
    """A slow effect of one id holds nobody else up."""
    seen, is_other_done = MemorySeen(), threading.Event()

    def slow() -> None:
        assert is_other_done.wait(60)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(seen.once, "a", "d", slow)
        pool.submit(seen.once, "b", "d", is_other_done.set)
        assert first.result(60) is Verdict.NEW


def test_memory_is_bounded_and_forgets_the_oldest() -> None:
    """Three ids with a limit of two: the first is new again, the last is not."""
    seen = MemorySeen(limit=2)
    for key in "abc":
        seen.once(key, "d", nothing)
    assert len(seen) == 2
    assert seen.once("c", "d", nothing) is Verdict.DUPLICATE
    assert seen.once("a", "d", nothing) is Verdict.NEW


def test_what_was_seen_survives_a_restart_with_a_torn_line(tmp_path: Path) -> None:
    """A line cut short by a crash is dropped, the whole ones count, and writing goes on."""
    path = tmp_path / "index"
    seen = FileSeen(path)
    seen.once("a", "d1", nothing)
    seen.close()
    path.write_bytes(path.read_bytes() + b"d2 b")
    seen = FileSeen(path)
    assert seen.once("a", "d1", nothing) is Verdict.DUPLICATE
    assert seen.once("b", "d2", nothing) is Verdict.NEW
    assert path.read_bytes() == b"d1 a\nd2 b\n"


def test_two_processes_cannot_share_an_index(tmp_path: Path) -> None:
    """The second one is told, instead of both storing."""
    first = FileSeen(tmp_path / "index")
    with pytest.raises(SeenFileInUse):
        FileSeen(tmp_path / "index")
    first.close()
    FileSeen(tmp_path / "index").close()


@pytest.mark.parametrize("key", ["", "a b", "a\n"])
def test_an_id_that_would_break_the_index_is_refused(key: str) -> None:
    """Nothing takes effect under a name that could not be read back."""
    with pytest.raises(ValueError, match="single words"):
        MemorySeen().once(key, "d", nothing)


def signed(body: bytes = BODY, age_seconds: int = 0, secret: str = SECRET) -> dict[str, str]:
    """All headers of a genuine delivery, as old as asked for."""
    at = int(SystemClock().now().timestamp()) - age_seconds
    return {
        "authorization": "Bearer t",
        "idempotency-key": "j1",
        "webhook-id": "j1",
        "webhook-timestamp": str(at),
        "webhook-signature": sign(secret, "j1", at, body),
        "content-digest": DIGEST_HEADER,
        "orbit-attempt": "2",
    }


def test_a_genuine_delivery_passes_every_check() -> None:
    """Token, signature, window and digest in one call, which says what came."""
    found = verify_delivery(signed(), BODY, token="t", signing_secret=SECRET)
    assert found == Delivery("j1", attempt=2)


def test_while_secrets_are_replaced_both_are_good() -> None:
    """Two tokens and two signing secrets are valid at once."""
    secrets = f"{OTHER_SECRET} {SECRET}"
    assert verify_delivery(signed(), BODY, token=["new", "t"], signing_secret=secrets).id == "j1"


@pytest.mark.parametrize(
    ("headers", "error"),
    [
        ({"authorization": "Bearer x"}, BearerInvalid),
        ({"webhook-signature": ""}, SignatureInvalid),
        ({"webhook-signature": "v1,AAAA"}, SignatureInvalid),
        ({"webhook-id": "j2"}, SignatureInvalid),
        ({"webhook-id": ""}, SignatureInvalid),
        ({"webhook-timestamp": "7"}, SignatureInvalid),
        ({"webhook-timestamp": "soon"}, SignatureInvalid),
        ({"idempotency-key": "j2"}, HeaderInvalid),
        ({"content-digest": f"sha-256=:{base64.b64encode(bytes(32)).decode()}:"}, BodyAltered),
        (signed(age_seconds=86_400), TimestampStale),  # made when tests are gathered
        (signed(age_seconds=-86_400), TimestampStale),
        (signed(b"another body"), SignatureInvalid),
        (signed(secret=OTHER_SECRET), SignatureInvalid),
    ],
)
def test_anything_amiss_is_refused(headers: dict[str, str], error: type[DeliveryRefused]) -> None:
    """Each check by itself stops a delivery that is right otherwise."""
    with pytest.raises(error) as refused:
        verify_delivery(signed() | headers, BODY, token="t", signing_secret=SECRET)
    assert refused.value.status in {400, 401}


@pytest.mark.parametrize(
    ("token", "signing_secret"), [(None, None), ((), None), ("", SECRET), (["t", ""], None)]
)
def test_without_a_secret_nothing_is_verified_by_mistake(
    token: str | list[str] | None, signing_secret: str | None
) -> None:
    """An unset variable does not open the door, nor does an empty bearer token."""
    with pytest.raises(ValueError, match="token"):
        verify_delivery(signed(), BODY, token=token, signing_secret=signing_secret)
    with pytest.raises(BearerInvalid):
        verify_bearer("Bearer ", "")


@pytest.mark.parametrize("kind", ["memory", "file"])
async def test_an_id_that_is_held_is_busy_and_kept_only_if_told_to(
    kind: str, tmp_path: Path
) -> None:
    """A block that ends without keep, or raises, leaves the id new."""
    seen = MemorySeen() if kind == "memory" else FileSeen(tmp_path / "index")
    async with seen.claim("a", "d") as first, seen.claim("a", "d") as second:
        assert (first.verdict, second.verdict) == (Verdict.NEW, Verdict.BUSY)
    with contextlib.suppress(ZeroDivisionError):
        async with seen.claim("a", "d") as claim:
            claim.keep()
            failing()
    async with seen.claim("a", "d") as claim:
        assert claim.verdict is Verdict.NEW
        claim.keep()
    async with seen.claim("a", "d") as again, seen.claim("b", "d") as other:
        assert (again.verdict, other.verdict) == (Verdict.DUPLICATE, Verdict.NEW)
    async with seen.claim("a", "e") as conflict:
        assert conflict.verdict is Verdict.CONFLICT


def test_the_receivers_side_needs_nothing_of_the_senders() -> None:
    """Importing it loads no database driver and no other part of Orbit."""
    code = (
        "import sys, orbit.receiver; "
        "print(*sorted(m for m in sys.modules if m.startswith(('orbit.', 'psycopg', 'sqlalch'))))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    above = [m for m in ended.stdout.split() if not m.startswith("orbit.receiver")]
    assert above == ["orbit.clock", "orbit.errors", "orbit.webhooks"]


def test_an_index_of_mostly_forgotten_ids_is_written_anew(tmp_path: Path) -> None:
    """More than twice the limit when it is opened: the newest ids are left, and more can follow."""
    path = tmp_path / "index"
    lines = [f"d id-{number}\n" for number in range(9)]
    path.write_text("".join(lines) + "d torn")
    path.chmod(0o640)
    seen = FileSeen(path, limit=4)
    assert path.read_text() == "".join(lines[-4:])
    assert path.stat().st_mode & 0o777 == 0o640
    with pytest.raises(SeenFileInUse):
        FileSeen(path, limit=4)
    assert seen.once("id-8", "d", nothing) is Verdict.DUPLICATE
    assert seen.once("new", "d", nothing) is Verdict.NEW
    seen.close()
    again = FileSeen(path, limit=4)
    assert again.once("new", "d", nothing) is Verdict.DUPLICATE
    again.close()
    assert path.read_text() == "".join([*lines[-4:], "d new\n"])
    assert list(tmp_path.iterdir()) == [path]


def test_an_index_of_twice_its_limit_is_left_alone(tmp_path: Path) -> None:
    """Restarts do not each rewrite the file."""
    path = tmp_path / "index"
    path.write_text("".join(f"d id-{number}\n" for number in range(8)))
    before = path.stat().st_ino
    FileSeen(path, limit=4).close()
    assert (path.stat().st_ino, path.read_text().count("\n")) == (before, 8)


def test_an_index_that_cannot_be_written_anew_serves_as_it_is(tmp_path: Path) -> None:
    """What stands in the way of the new file does not stop the receiver."""
    path = tmp_path / "index"
    path.write_text("".join(f"d id-{number}\n" for number in range(9)))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "index.new").symlink_to(tmp_path / "elsewhere")
    seen = FileSeen(path, limit=4)
    assert seen.once("new", "d", nothing) is Verdict.NEW
    seen.close()
    assert path.read_text().count("\n") == 10
