"""What was enqueued is what is sent, byte for byte; and no secret is anywhere it may not be."""

# ruff: noqa: D103 - the steps are what a user would write; their names say what they do

from __future__ import annotations

import base64
import gzip
import hashlib
import hmac
import re
from collections.abc import Iterator
from typing import Any

import httpx
import psycopg
import pytest
from aiohttp import web
from psycopg import sql
from standardwebhooks import Webhook, WebhookVerificationError

from orbit.api.application import create_application
from orbit.app import Node
from orbit.errors import PayloadTooLarge
from orbit.execution.context import ExecutionContext
from orbit.payload import Payload
from tests.scenario.conftest import (
    Arrival,
    Configure,
    Facts,
    MakeNode,
    Receiver,
    ended,
    policy,
    run,
    run_profile,
    send,
)

MIB = 1 << 20
HERE = __name__
TOKEN = "tok_never-to-be-seen_7Qx2"
HEADER_SECRET = "key_never-to-be-seen_9Zb4"
QUERY_SECRET = "sig_never+to-be-seen_3Kd8"
SIGNING_KEY = bytes(range(32))
SIGNING_SECRET = "whsec_" + base64.b64encode(SIGNING_KEY).decode()
BOUNDARY = 'multipart/mixed; boundary="a b=c"; charset=utf-8'


async def relabel(payload: Payload, context: ExecutionContext) -> Payload:
    return Payload(payload.content, "text/markdown; variant=GFM")


async def raise_with_options(payload: Payload, context: ExecutionContext) -> Payload:
    raise RuntimeError("failed")


async def send_over_api(node: Node, payload: Payload) -> dict[str, Any]:
    """Triggers a raw cycle as any program would; its row once it has ended."""
    body = {
        "payloadBase64": base64.b64encode(payload.content).decode(),
        "contentType": payload.content_type,
        "endpointKeys": ["out"],
    }
    transport = httpx.ASGITransport(create_application(node))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:3000") as client:
        answer = await client.post("/cycles/trigger", json=body)
    assert answer.status_code == 202, answer.text
    return await ended(node, answer.json()["cycleRunId"])


@pytest.mark.parametrize(
    "payload",
    [
        Payload(b"", "text/plain"),
        Payload(bytes(range(256)) * 3, "application/octet-stream"),
        Payload(b"\xff\xfe\x00caf\xc3", "text/plain; charset=utf-8"),
        Payload(gzip.compress(b"news" * 1000), "application/gzip"),
        Payload(b"--a b=c\r\n\r\n", BOUNDARY),
        Payload(hashlib.sha256(b"seed").digest() * (10 * MIB // 32), "video/mp4"),
    ],
    ids=["empty", "every byte", "not UTF-8", "gzip", "type with parameters", "10 MiB"],
)
async def test_a_payload_arrives_byte_for_byte(
    configure: Configure, make_node: MakeNode, receiver: Receiver, payload: Payload, facts: Facts
) -> None:
    """Body, type and digest are those of the trigger, in the request, the job and the receipt."""
    configure()
    node = await make_node(dispatch_endpoints=(receiver.endpoint("out"),))
    cycle = await send_over_api(node, payload)
    assert cycle["detail"]["delivered"] == 1
    [arrival] = receiver.arrivals
    assert arrival.body == payload.content
    assert arrival.headers["Content-Type"] == payload.content_type
    assert arrival.headers["Content-Length"] == str(payload.size)
    digest = base64.b64encode(hashlib.sha256(payload.content).digest()).decode()
    assert arrival.headers["Content-Digest"] == f"sha-256=:{digest}:"
    for table in ("dispatch_job", "delivery_receipt", "normalized_item"):
        assert facts(f"SELECT digest, size FROM {table}") == [
            {"digest": payload.digest, "size": payload.size}
        ]


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE"])
async def test_every_method_carries_the_body(
    configure: Configure, make_node: MakeNode, receiver: Receiver, method: str
) -> None:
    """The endpoint's method is used, with the payload as it is."""
    configure()
    node = await make_node(dispatch_endpoints=(receiver.endpoint("out", method=method),))
    await send(node, Payload(b"x" * 100_000), endpoint_keys=["out"])
    [arrival] = receiver.arrivals
    assert (arrival.request.method, arrival.body) == (method, b"x" * 100_000)


async def test_a_payload_over_the_limit_is_refused_before_anything_is_stored(
    configure: Configure, make_node: MakeNode, facts: Facts
) -> None:
    """One byte too many: a refusal that names the limit, and not a row anywhere."""
    configure()
    node = await make_node(max_payload_bytes=1000, payload_memory_bytes=MIB)
    with pytest.raises(PayloadTooLarge, match=r"1,001 bytes; at most 1,000 are accepted"):
        await node.orchestration.trigger_raw(payload=Payload(bytes(1001)), idempotency_key="k")
    for table in ("cycle_run", "initiation_key", "payload", "cycle_checkpoint", "cycle_lease"):
        assert facts(f"SELECT count(*) FROM {table}") == [{"count": 0}]
    assert (await send(node, Payload(bytes(1000)), idempotency_key="k"))["state"] == "finished"


async def test_a_type_that_changes_between_tiers_is_kept_and_the_bytes_are_stored_once(
    configure: Configure, make_node: MakeNode, receiver: Receiver, facts: Facts
) -> None:
    """The same bytes under another type: one stored payload, the new type from there on."""
    tiers = policy(tier1=["orbit:no_op"], tier2=[f"{HERE}:relabel"], tier3=["orbit:no_op"])
    configure(run_profile(execution_policy=tiers))
    node = await make_node(dispatch_endpoints=(receiver.endpoint("out"),))
    await run(node)
    assert [one.headers["Content-Type"] for one in receiver.arrivals] == [
        "text/markdown; variant=GFM"
    ]
    assert facts(
        "SELECT stage, content_type FROM cycle_checkpoint WHERE digest IS NOT NULL "
        "ORDER BY orbit_stage_number(stage)"
    ) == [
        {"stage": "cycle_started", "content_type": "application/json"},
        {"stage": "tier1_complete", "content_type": "application/json"},
        {"stage": "tier2_complete", "content_type": "text/markdown; variant=GFM"},
        {"stage": "tier3_complete", "content_type": "text/markdown; variant=GFM"},
    ]
    assert facts("SELECT count(*) FROM payload") == [{"count": 1}]


async def test_five_endpoints_share_one_stored_payload(
    configure: Configure, make_node: MakeNode, receiver: Receiver, facts: Facts
) -> None:
    """The bytes are written once per cycle under their digest, and arrive five times."""
    configure()
    keys = [f"out{number}" for number in range(5)]
    node = await make_node(dispatch_endpoints=tuple(map(receiver.endpoint, keys)))
    payload = Payload(b"x" * 200_000)
    cycle = await send(node, payload, endpoint_keys=keys)
    assert cycle["detail"]["delivered"] == 5
    assert {one.path for one in receiver.arrivals} == {f"/{key}" for key in keys}
    assert {one.body for one in receiver.arrivals} == {payload.content}
    assert facts("SELECT cycle_id, digest FROM payload") == [
        {"cycle_id": cycle["cycle_id"], "digest": payload.digest}
    ]


async def test_a_delivery_says_whose_it_is(
    configure: Configure, make_node: MakeNode, receiver: Receiver, facts: Facts
) -> None:
    """Token, ids, attempt and trace travel as headers; the id is the same for all attempts."""

    async def fail_once(arrival: Arrival) -> web.Response:
        return web.Response(status=200 if len(receiver.arrivals) > 1 else 503)

    receiver.answers["/out"] = fail_once
    configure(run_profile())
    endpoint = receiver.endpoint("out", token=TOKEN, headers={"X-Api-Key": HEADER_SECRET})
    node = await make_node(dispatch_endpoints=(endpoint,))
    cycle = await run(node)
    [job] = facts("SELECT job_id FROM dispatch_job")
    first, second = receiver.arrivals
    for number, arrival in enumerate((first, second), start=1):
        headers = {name.lower(): value for name, value in arrival.headers.items()}
        expected = {
            "authorization": f"Bearer {TOKEN}",
            "x-api-key": HEADER_SECRET,
            "idempotency-key": job["job_id"],
            "webhook-id": job["job_id"],
            "orbit-namespace": "brand",
            "orbit-profile-id": "nova",
            "orbit-run-profile-id": "daily",
            "orbit-cycle-run-id": cycle["cycle_id"],
            "orbit-job-id": job["job_id"],
            "orbit-attempt": str(number),
        }
        assert {name: headers.get(name) for name in expected} == expected
        trace = re.fullmatch(
            r"00-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}", headers["traceparent"]
        )
        assert trace
        assert trace[1].strip("0")
        assert trace[2].strip("0")
    assert first.body == second.body
    receipts = facts("SELECT attempt, outcome, status FROM delivery_receipt ORDER BY attempt")
    assert receipts == [
        {"attempt": 1, "outcome": "failed", "status": 503},
        {"attempt": 2, "outcome": "delivered", "status": 200},
    ]


@pytest.mark.parametrize(
    "content", ["grüße".encode(), b"", bytes(range(256))], ids=["text", "empty", "binary"]
)
async def test_each_attempt_is_signed_anew_under_the_same_id(
    configure: Configure, make_node: MakeNode, receiver: Receiver, content: bytes
) -> None:
    """Standard Webhooks: a timestamp for each attempt, and a signature that fits just that."""

    async def fail_once(arrival: Arrival) -> web.Response | None:
        slow_down = {"Retry-After": "1.1"}  # seconds: until the next timestamp
        return web.Response(status=503, headers=slow_down) if len(receiver.arrivals) == 1 else None

    receiver.answers["/out"] = fail_once
    configure()
    endpoint = receiver.endpoint("out", signing_secret=SIGNING_SECRET)
    node = await make_node(dispatch_endpoints=(endpoint,), dispatch_retry_cap_seconds=2.0)
    await send(node, Payload(content, "text/plain"), endpoint_keys=["out"])
    first, second = ({k.lower(): v for k, v in one.headers.items()} for one in receiver.arrivals)
    assert first["webhook-id"] == second["webhook-id"] == first["idempotency-key"]
    assert int(first["webhook-timestamp"]) < int(second["webhook-timestamp"])
    assert first["webhook-signature"] != second["webhook-signature"]
    for headers in (first, second):
        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + content
        mac = hmac.digest(SIGNING_KEY, signed, "sha256")
        assert headers["webhook-signature"] == f"v1,{base64.b64encode(mac).decode()}"
        if content != bytes(range(256)):  # the published verifier takes text only
            Webhook(SIGNING_SECRET).verify(content, headers, json_parse=False)
    with pytest.raises(WebhookVerificationError):
        Webhook(SIGNING_SECRET).verify(b"another", first, json_parse=False)


async def test_a_delivery_belongs_to_the_trace_of_its_cycle(
    configure: Configure, make_node: MakeNode, receiver: Receiver, facts: Facts
) -> None:
    """The trace that the cycle was started with goes along unchanged."""
    configure()
    node = await make_node(dispatch_endpoints=(receiver.endpoint("out"),))
    await send_over_api(node, Payload(b"x", "text/plain"))
    assert facts("SELECT traceparent FROM cycle_run") == [
        {"traceparent": receiver.arrivals[0].headers["traceparent"]}
    ]


async def test_a_raw_delivery_names_no_profile(
    configure: Configure, make_node: MakeNode, receiver: Receiver
) -> None:
    """Without a run profile and a token those headers are absent, not empty."""
    configure()
    node = await make_node(dispatch_endpoints=(receiver.endpoint("out"),))
    await send(node, Payload(b"x"), endpoint_keys=["out"])
    headers = receiver.arrivals[0].headers
    assert headers["Orbit-Namespace"] == "default"
    for name in ("Authorization", "Orbit-Profile-Id", "Orbit-Run-Profile-Id"):
        assert name not in headers


# --- secrets ------------------------------------------------------------------------------


async def echo(arrival: Arrival) -> web.Response:
    """A receiver that repeats everything that it was sent, in its answer and its type."""
    text = "\n".join(f"{name}: {value}" for name, value in arrival.headers.items())
    body = f"{text}\n{arrival.request.rel_url}\n{arrival.request.query}\n".encode()
    body += b"." * (4096 - len(body) - len(TOKEN) // 2) + TOKEN.encode()
    return web.Response(
        status=500, body=body, headers={"Content-Type": f"text/plain; x={TOKEN}"}, reason=TOKEN
    )


async def test_a_token_is_nowhere_in_clear_text(
    configure: Configure,
    make_node: MakeNode,
    receiver: Receiver,
    owner_dsn: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Not in any column of any table, not in any log line, though the receiver repeats it."""
    receiver.answers["/out"] = echo
    configure(
        run_profile(),
        run_profile("failing", execution_policy=policy(tier1=[f"{HERE}:raise_with_options"])),
    )
    secrets: dict[str, Any] = {"token": TOKEN, "headers": {"X-Api-Key": HEADER_SECRET}}
    node = await make_node(
        dispatch_endpoints=(
            receiver.endpoint("out", f"/out?key={QUERY_SECRET}", **secrets),
            # Nothing listens there: an attempt without an answer has an error text of its own.
            receiver.endpoint("gone", **secrets).__class__(
                key="gone", url=f"http://127.0.0.1:1/x?key={QUERY_SECRET}", **secrets
            ),
        ),
        max_dispatch_retries=1,
    )
    await run(node)
    await run(node, "failing")
    cycle = await send(node, Payload(b"x"), endpoint_keys=["gone", "out"])
    assert cycle["detail"]["deadLettered"] == 2
    values = list(_everything(owner_dsn))
    assert any(b"Orbit-Job-Id" in value for value in values), "the receiver's answer is kept"
    assert any(b"fernet" not in value and value.startswith(b"gAAAA") for value in values)
    assert receiver.at("/out")[-1].request.raw_path == f"/out?key={QUERY_SECRET}"
    for part in (TOKEN, TOKEN[:12], HEADER_SECRET, QUERY_SECRET, QUERY_SECRET.replace("+", " ")):
        found = [value[:200] for value in values if part.encode() in value]
        assert not found
    out, err = capfd.readouterr()
    assert "status=500" in out + err, "the attempts are logged"
    for part in (TOKEN[:12], HEADER_SECRET, QUERY_SECRET):
        assert part not in out + err
        assert part not in repr(node.settings) + repr(node.settings.dispatch_endpoints)


async def test_a_secret_does_not_show_in_what_carries_it(
    configure: Configure, make_node: MakeNode, receiver: Receiver, facts: Facts
) -> None:
    """The objects that hold a token leave it out of their own description."""
    configure()
    node = await make_node(dispatch_endpoints=(receiver.endpoint("out", token=TOKEN),))
    await send(node, Payload(b"x"), endpoint_keys=["out"])
    [row] = facts("SELECT namespace, snapshot_id FROM endpoint_snapshot")
    snapshot = await node.snapshots.read(row["namespace"], row["snapshot_id"])
    assert snapshot.token == TOKEN
    assert TOKEN not in repr(snapshot)


def _everything(owner_dsn: str) -> Iterator[bytes]:
    """Every value of every column of every table of the database, as bytes."""
    with psycopg.connect(owner_dsn) as connection:
        tables = connection.execute(
            "SELECT relname FROM pg_class WHERE relkind IN ('r', 'm') "
            "AND relnamespace = current_schema()::regnamespace"
        ).fetchall()
        assert len(tables) > 20
        for (table,) in tables:
            query = sql.SQL("SELECT * FROM {}").format(sql.Identifier(table))
            for row in connection.execute(query):
                for value in row:
                    yield bytes(value) if isinstance(value, bytes) else str(value).encode()
