"""The reference receiver as a process: stores once, survives kill -9, fails when told to."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from orbit.clock import SystemClock
from orbit.webhooks import sign
from tests.scenario.test_cli import wait_for

BODY = b'{"headline":"Good morning"}'


class Receiver:
    """A receiver process and a client for it."""

    def __init__(self, store: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "orbit.receiver", "--port", "0", "--store", str(store)]
        self.store = store
        self.process = subprocess.Popen(
            [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        first_line = self.read_line()
        assert first_line.startswith("receiver on "), first_line
        self.url = first_line.split()[2].rstrip(",")
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def read_line(self) -> str:
        """The next line that the process prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def post(self, key: str, body: bytes = BODY, path: str = "/social", **headers: str) -> int:
        """Delivers once; returns the status. Keyword `orbit_job_id` is header `Orbit-Job-Id`."""
        sent = {"Idempotency-Key": key, "Content-Type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        return self.client.post(path, content=body, headers=sent).status_code

    def arrivals(self) -> list[dict[str, Any]]:
        """The lines of `received.jsonl`."""
        text = (self.store / "received.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def bodies(self) -> dict[str, bytes]:
        """What is stored, by its path below the folder."""
        files = (path for path in self.store.glob("[!.]*/*/*") if path.is_file())
        return {path.relative_to(self.store).as_posix(): path.read_bytes() for path in files}

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Sends a signal, unless it has ended, and waits; returns the exit code."""
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(300)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


Start = Callable[..., Receiver]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts receivers on one folder; kills those that a test left."""
    started: list[Receiver] = []

    def start_one(*arguments: str) -> Receiver:
        started.append(Receiver(tmp_path / "store", *arguments))
        return started[-1]

    yield start_one
    for receiver in started:
        receiver.stop(signal.SIGKILL)


def test_a_delivery_is_stored_under_its_names_and_listed(start: Start) -> None:
    """Body, line in the log, line on the screen and `GET /received` agree."""
    receiver = start()
    names = {"Orbit_Namespace": "brand-a", "Orbit_Run_Profile_Id": "nova-daily"}
    names |= {"Orbit_Job_Id": "job-1", "Orbit_Attempt": "2", "Orbit_Cycle_Run_Id": "c1"}
    assert receiver.post("job-1", BODY, "/social", **names) == 200
    assert receiver.bodies() == {"brand-a/nova-daily/job-1.json": BODY}
    [line] = receiver.arrivals()
    expected = {
        "id": "job-1",
        "digest": hashlib.sha256(BODY).hexdigest(),
        "size": len(BODY),
        "namespace": "brand-a",
        "cycleRunId": "c1",
        "attempt": 2,
        "duplicate": False,
        "outcome": "stored",
        "status": 200,
        "path": "/social",
        "file": "brand-a/nova-daily/job-1.json",
    }
    assert expected.items() <= line.items()
    assert "stored    brand-a/nova-daily job job-1 attempt 2" in receiver.read_line()
    answer = receiver.client.get("/received").json()
    assert answer == {"items": [line], "counts": {"stored": 1}, "position": 1}
    assert receiver.client.get("/received", params={"since": 1}).json()["items"] == []


def test_every_delivering_method_on_any_path_is_accepted(start: Start) -> None:
    """PUT, PATCH and DELETE deliver as POST does; GET elsewhere does not."""
    receiver = start("--quiet")
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        headers = {"Idempotency-Key": method}
        request = receiver.client.build_request(method, "/a/b", content=BODY, headers=headers)
        assert receiver.client.send(request).status_code == 200
    assert receiver.client.get("/a/b").status_code == 405
    assert receiver.client.get("/health").json()["status"] == "ok"


def test_a_repetition_is_accepted_stored_once_and_survives_kill_9(start: Start) -> None:
    """After kill -9 the ids are known, positions go on, and a torn log line is gone."""
    receiver = start("--quiet")
    assert receiver.post("a") == receiver.post("a") == 200
    assert receiver.stop(signal.SIGKILL) == -signal.SIGKILL
    with (receiver.store / "received.jsonl").open("a") as log:
        log.write('{"position":3,"at"')
    receiver = start("--quiet")
    assert receiver.post("a") == receiver.post("b") == 200
    outcomes = [(line["position"], line["outcome"]) for line in receiver.arrivals()]
    assert outcomes == [(1, "stored"), (2, "duplicate"), (3, "duplicate"), (4, "stored")]
    assert receiver.client.get("/received").json()["counts"] == {"stored": 2, "duplicate": 2}
    assert set(receiver.bodies()) == {"_/_/a.json", "_/_/b.json"}


def test_the_same_id_with_another_body_is_a_conflict_said_loudly(start: Start) -> None:
    """409, the first body stays, and a line that nobody misses."""
    receiver = start("--quiet")
    assert receiver.post("a", BODY) == 200
    assert receiver.post("a", b"{}") == 409
    assert receiver.bodies() == {"_/_/a.json": BODY}
    assert receiver.read_line().startswith("CONFLICT: id a came with another body")


def test_concurrent_posts_of_one_id_store_once(start: Start) -> None:
    """Sixteen at a time, all answered 200: one stored, the rest duplicates."""
    receiver = start("--quiet")
    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(receiver.post, ["a"] * 64)) == {200}
    counts = receiver.client.get("/received").json()["counts"]
    assert counts == {"stored": 1, "duplicate": 63}


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({}, 400, "id_missing"),
        ({"Idempotency-Key": "../../etc"}, 400, "header_invalid"),
        ({"Idempotency-Key": "a", "Orbit-Namespace": "../.."}, 400, "header_invalid"),
        ({"Idempotency-Key": "a", "Content-Digest": "sha-256=:QUJD:"}, 400, "header_invalid"),
        (
            {
                "Idempotency-Key": "a",
                "Content-Digest": f"sha-256=:{base64.b64encode(bytes(32)).decode()}:",
            },
            400,
            "body_altered",
        ),
    ],
)
def test_a_bad_delivery_is_refused_counted_and_not_stored(
    start: Start, headers: dict[str, str], status: int, code: str
) -> None:
    """The answer names the reason; the arrival is on record with its digest."""
    receiver = start("--quiet")
    answer = receiver.client.post("/x", content=BODY, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    [line] = receiver.arrivals()
    assert (line["outcome"], line["digest"]) == ("refused", hashlib.sha256(BODY).hexdigest())
    assert receiver.bodies() == {}


def test_a_right_digest_and_token_pass_and_a_wrong_token_does_not(start: Start) -> None:
    """With `--token`, only who knows it is let in."""
    receiver = start("--quiet", "--token", "s3cret")
    digest = f"sha-256=:{base64.b64encode(hashlib.sha256(BODY).digest()).decode()}:"
    assert receiver.post("a", Authorization="Bearer s3cret", Content_Digest=digest) == 200
    assert receiver.post("a", Authorization="Bearer other") == 401
    assert [line["outcome"] for line in receiver.arrivals()] == ["stored", "refused"]


def test_a_path_may_have_a_token_of_its_own(start: Start) -> None:
    """`--path-token` guards one path and leaves the others open."""
    receiver = start("--quiet", "--path-token", "/newsletter=s3cret")
    assert receiver.post("a", BODY, "/social") == 200
    assert receiver.post("b", BODY, "/newsletter") == 401
    assert receiver.post("b", BODY, "/newsletter", Authorization="Bearer s3cret") == 200


@pytest.mark.parametrize("is_given_by_environment", [False, True])
def test_with_a_signing_secret_only_what_is_signed_is_stored(
    start: Start, monkeypatch: pytest.MonkeyPatch, is_given_by_environment: bool
) -> None:
    """Large and small bodies alike; a wrong, stale or absent signature is a 401."""
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    if is_given_by_environment:
        monkeypatch.setenv("ORBIT_RECEIVER_SIGNING_SECRET", secret)
        receiver = start("--quiet")
    else:
        receiver = start("--quiet", "--signing-secret", secret)
    now = int(SystemClock().now().timestamp())

    def post(key: str, body: bytes, signed: bytes, at: int = now) -> int:
        names = {"webhook_id": key, "webhook_timestamp": str(at)}
        signature = sign(secret, key, at, signed)
        return receiver.post(key, body, webhook_signature=signature, **names)

    large = os.urandom(1 << 20)
    assert post("a", BODY, BODY) == post("b", large, large) == 200
    assert post("c", large, large[:-1]) == post("c", BODY, BODY, now - 3600) == 401
    assert receiver.post("c") == 401
    outcomes = [line["outcome"] for line in receiver.arrivals()]
    assert outcomes == ["stored"] * 2 + ["refused"] * 3
    assert receiver.bodies() == {"_/_/a.json": BODY, "_/_/b.json": large}


def test_a_signing_secret_that_cannot_be_used_is_a_clear_line() -> None:
    """Exit code 2 and what is accepted; the value is not shown."""
    command = [sys.executable, "-m", "orbit.receiver", "--signing-secret", "whsec_hunter2"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 2
    assert "the signing secret is whsec_ and the base64 of 24 to 64 bytes" in ended.stderr
    assert "hunter2" not in ended.stderr


def failures(receiver: Receiver, count: int) -> list[int]:
    """The statuses of as many deliveries with ids of their own."""
    return [receiver.post(f"id{number}") for number in range(count)]


def test_failing_by_chance_repeats_with_its_seed(start: Start, tmp_path: Path) -> None:
    """The same seed fails the same arrivals; what failed is not stored and works later."""
    first = start("--quiet", "--fail-rate", "0.3", "--seed", "7")
    statuses = failures(first, 40)
    assert {200, 500} == set(statuses)
    stored = [line["id"] for line in first.arrivals() if line["outcome"] == "stored"]
    assert stored == [f"id{n}" for n, status in enumerate(statuses) if status == 200]
    assert len(first.bodies()) == len(stored)
    second = Receiver(tmp_path / "other", "--quiet", "--fail-rate", "0.3", "--seed", "7")
    try:
        assert failures(second, 40) == statuses
    finally:
        second.stop()


def test_a_status_for_all_decides_whether_anything_is_stored(start: Start) -> None:
    """202 stores and 503 does not."""
    receiver = start("--quiet", "--status", "503")
    assert receiver.post("a") == 503
    assert receiver.bodies() == {}
    assert receiver.stop() == 0
    receiver = start("--quiet", "--status", "204")
    assert receiver.post("a") == 204
    assert receiver.bodies() == {"_/_/a.json": BODY}


def test_latency_stores_first_and_answers_late(start: Start) -> None:
    """Who gives up too early finds the delivery stored: the hard case for a sender."""
    receiver = start("--quiet", "--latency", "30")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{receiver.url}/x",
            headers={"Idempotency-Key": "a"},
            timeout=httpx.Timeout(60, read=1),
        )
    wait_for(lambda: bool(receiver.arrivals()), "the arrival", 20)  # of the 30 s
    assert [line["outcome"] for line in receiver.arrivals()] == ["stored"]


def test_sigterm_ends_a_receiver_that_hangs_on_purpose(start: Start) -> None:
    """It never answers, records the arrival, and still exits 0 when asked to stop."""
    receiver = start("--hang")
    answers: list[int] = []
    waiting = threading.Thread(target=lambda: answers.append(receiver.post("a")))
    waiting.start()
    assert "503 hung" in receiver.read_line()
    assert answers == []
    receiver.process.send_signal(signal.SIGTERM)
    assert receiver.process.wait(300) == 0
    waiting.join(60)
    assert answers == [503]


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory in KiB is Linux's notation")
def test_large_bodies_are_streamed_and_too_large_ones_refused(start: Start) -> None:
    """60 MiB are stored with memory bounded; over 64 MiB is a 413 that leaves no file."""
    receiver = start("--quiet")
    body = os.urandom(1 << 20) * 60
    assert receiver.post("a", body) == 200
    assert hashlib.sha256(receiver.bodies()["_/_/a.json"]).digest() == hashlib.sha256(body).digest()
    too_large = (bytes(1 << 20) for _ in range(65))
    try:
        headers = {"Idempotency-Key": "b"}
        answer = receiver.client.post("/x", content=too_large, headers=headers)
        assert answer.status_code == 413
    except (httpx.WriteError, httpx.RemoteProtocolError):
        pass  # The server may close before it has read what it refused.
    assert [line["status"] for line in receiver.arrivals()] == [200, 413]
    assert list((receiver.store / ".incoming").iterdir()) == []
    status = Path(f"/proc/{receiver.process.pid}/status")
    if status.exists():  # Linux
        peak_kib = int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0])
        assert peak_kib < 110 * 1024
    assert receiver.stop() == 0


def test_a_taken_port_or_folder_gives_one_clear_line(start: Start, tmp_path: Path) -> None:
    """Exit code 1 and what is in the way."""
    receiver = start("--quiet")
    port = receiver.url.rpartition(":")[2]
    for arguments, words in [
        (
            ["--port", port, "--store", str(tmp_path / "other")],
            f"cannot listen on 127.0.0.1:{port}",
        ),
        (["--port", "0", "--store", str(receiver.store)], "is in use by another process"),
    ]:
        command = [sys.executable, "-m", "orbit.receiver", *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert ended.returncode == 1
        assert words in ended.stderr
        assert ended.stderr.count("\n") == 1
    ended = subprocess.run(
        [sys.executable, "-m", "orbit.receiver", "--fail-rate", "7"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 2
    assert "the fail rate is a number from 0 to 1" in ended.stderr
