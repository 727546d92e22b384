"""The HTTP API over a whole node: real database, real receiver."""

import asyncio
import base64
import hashlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from aiohttp import web
from cryptography.fernet import Fernet

from orbit.api.application import create_application
from orbit.app import Node
from orbit.cli.status import why_not_running
from orbit.endpoints import Breaker
from orbit.settings import Endpoint, Settings

UNKNOWN = "01890000-0000-7000-8000-000000000000"
TOKEN = "token-that-nobody-may-see"
SECONDS = 60.0


class Receiver:
    """A receiver that keeps what came and answers as the path says."""

    def __init__(self) -> None:
        self.bodies: list[tuple[str, bytes]] = []
        self.status = 500

    async def deliver(self, request: web.Request) -> web.Response:
        body = await request.read()
        if request.path == "/ok":
            self.bodies.append((request.headers["Content-Type"], body))
            return web.Response(text="gräzi")
        if request.path == "/step" and self.status == 200:
            return web.Response(body=body, content_type="text/plain")
        return web.Response(status=self.status, body=b"\xff\x00no")


@pytest.fixture
async def receiver() -> AsyncIterator[tuple[Receiver, str]]:
    """A receiver, and its address."""
    made = Receiver()
    application = web.Application()
    application.router.add_route("*", "/{path}", made.deliver)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    yield made, f"http://{host}:{port}"
    await runner.cleanup()


def write_configuration(folder: Path, address: str, **policy: Any) -> None:
    """Two profiles, one disabled; four run profiles, two of which run."""
    step = {"use": "http", "url": f"{address}/step", "retry": {"max_attempts": 1}}
    profiles = [
        {"profile_id": "nova", "label": "Nova", "state": "enabled", "style_vector": {"a_b": 1}},
        {"profile_id": "off", "label": "Off", "state": "disabled"},
    ]
    run_profiles = [
        {
            "run_profile_id": name,
            "profile_id": profile,
            "namespace": "brand-a",
            "state": state,
            "execution_policy": {"tiers": tiers, **policy},
            "distribution_targets": ["good"],
            "value_tags": {"cost_center": "a"},
        }
        for name, profile, state, tiers in (
            ("daily", "nova", "enabled", {}),
            ("broken", "nova", "enabled", {"tier2": [step]}),
            ("resting", "nova", "disabled", {}),
            ("orphan", "off", "enabled", {}),
        )
    ]
    (folder / "profiles.json").write_text(json.dumps({"profiles": profiles}))
    (folder / "runProfiles.json").write_text(json.dumps({"run_profiles": run_profiles}))


@pytest.fixture
def settings(dsn: str, config_dir: Path, receiver: tuple[Receiver, str]) -> Settings:
    """A node's settings: one endpoint that takes everything, one that takes nothing."""
    write_configuration(config_dir, receiver[1])
    given: dict[str, Any] = {
        "database_url": dsn,
        "secret_keys": (Fernet.generate_key().decode(),),
        "config_dir": config_dir,
        "auth": "off",
        "cron_schedule": "",
        "max_dispatch_retries": 0,
        "max_payload_bytes": 200_000,
        "poll_seconds": 0.05,
        "dispatch_endpoints": (
            Endpoint("good", f"{receiver[1]}/ok?key=hidden", token=TOKEN),
            Endpoint("bad", f"{receiver[1]}/no", token=TOKEN),
        ),
    }
    return Settings(**given)


@pytest.fixture
async def node(settings: Settings) -> AsyncIterator[Node]:
    """A running node."""
    made = Node(settings)
    await made.open()
    await made.start()
    yield made
    await made.drain()
    await made.close()


def client_of(node: Node) -> httpx.AsyncClient:
    """A client of the node's API."""
    transport = httpx.ASGITransport(create_application(node))
    return httpx.AsyncClient(transport=transport, base_url="http://localhost:3000")


@pytest.fixture
async def api(node: Node) -> AsyncIterator[httpx.AsyncClient]:
    """The node's API."""
    async with client_of(node) as client:
        yield client


async def until(look: Callable[[], Awaitable[Any]]) -> Any:
    """What a look finds as soon as it finds something."""
    deadline = time.monotonic() + SECONDS
    while not (found := await look()):
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.02)
    return found


async def ended(api: httpx.AsyncClient, cycle_id: str) -> dict[str, Any]:
    """The lineage of a cycle that has ended."""

    async def look() -> dict[str, Any] | None:
        lineage: dict[str, Any] = (await api.get(f"/cycles/{cycle_id}")).json()
        return lineage if lineage["cycle"]["state"] != "running" else None

    found: dict[str, Any] = await until(look)
    return found


async def trigger(api: httpx.AsyncClient, **body: Any) -> str:
    """The id of a new raw cycle."""
    answer = await api.post("/cycles/trigger", json=body)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["cycleRunId"])


async def dead_letter(api: httpx.AsyncClient, namespace: str = "sea") -> str:
    """The id of a new dead letter."""
    cycle_id = await trigger(api, namespace=namespace, payload="x", endpointKeys=["bad"])
    return str((await ended(api, cycle_id))["jobs"][0]["jobId"])


def assert_problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """That an answer is this problem document."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = answer.json()
    assert document["code"] == code
    assert document["status"] == status
    assert document["title"]
    assert document["detail"]
    return document


# --- the node ----------------------------------------------------------------------------


async def test_health_ready_and_metrics(api: httpx.AsyncClient, node: Node) -> None:
    """The probes and the metrics say that the node is up."""
    health = (await api.get("/health")).json()
    ready = (await api.get("/ready")).json()
    assert health["status"] == "up"
    assert ready["status"] == "ready"
    assert ready["nodeId"] == node.node_id
    assert ready["revision"] == node.configuration.active.revision
    assert ready["isInStep"] is True
    text = await api.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain")
    assert "orbit_node_ready 1.0" in text.text
    found = await api.get("/metrics", headers={"Accept": "application/json"})
    names = {family["name"] for family in found.json()["items"]}
    assert {"orbit_node_ready", "orbit_cycles_in_hand", "orbit_attempts"} <= names


async def test_what_a_node_does_is_counted(api: httpx.AsyncClient) -> None:
    """Cycles, attempts and dead letters go up with what happened, and no id is a label."""

    async def counts() -> dict[str, float]:
        answer = await api.get("/metrics", headers={"Accept": "application/json"})
        return {
            sample["name"] + "".join(sample["labels"].values()): sample["value"]
            for family in answer.json()["items"]
            for sample in family["samples"]
        }

    before = await counts()
    job_id = await dead_letter(api, namespace="sea-and-land")
    after = await counts()
    for name in (
        "orbit_cycles_accepted_totalapi",
        "orbit_cycles_ended_totalfinished",
        "orbit_attempts_totalfailed",
        "orbit_dead_letters_total",
        "orbit_attempt_seconds_count",
    ):
        assert after[name] - before.get(name, 0) == 1, name
    kinds = [f"orbit_attempt_connections_total{kind}" for kind in ("new", "reused")]
    assert sum(after.get(kind, 0) - before.get(kind, 0) for kind in kinds) == 1
    text = (await api.get("/metrics")).text
    assert job_id not in text
    assert "sea-and-land" not in text


async def test_a_node_that_is_not_open_says_so(settings: Settings) -> None:
    """While a node opens it is healthy, not ready, and serves nothing else."""
    async with client_of(Node(settings)) as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/metrics")).status_code == 200
        assert_problem(await client.get("/ready"), 503, "not_started")
        assert_problem(await client.get("/cycles"), 503, "not_started")


async def test_a_draining_node_takes_no_triggers(api: httpx.AsyncClient, node: Node) -> None:
    """A node that leaves is not ready and accepts nothing."""
    await node.drain()
    assert_problem(await api.get("/ready"), 503, "draining")
    assert_problem(await api.post("/cycles/trigger"), 503, "draining")


async def test_status_is_the_overview(api: httpx.AsyncClient, node: Node) -> None:
    """The overview shows nodes, queues, dead letters and the database."""
    await dead_letter(api)
    status = (await api.get("/status")).json()
    (found,) = status["nodes"]
    assert found["nodeId"] == node.node_id
    assert found["isInStep"] is True
    assert found["isAlive"] is True
    assert status["openDeadLetters"] == 1
    assert status["cycles"] == {"active": 0, "waiting": 0, "byStage": {}}
    assert status["database"]["isSchemaCurrent"] is True
    assert status["database"]["partitionsUntil"] > status["now"]
    assert status["isPaused"] is False


async def test_the_database_away_is_a_503(dsn: str, settings: Settings, server: Any) -> None:
    """Without the database the node stays healthy, and says what is missing."""
    made = Node(settings)
    await made.open()
    made.is_ready = True
    try:
        name = dsn.split("dbname=")[1].split(maxsplit=1)[0]
        server.run(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        server.run(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
        )
        async with client_of(made) as client:
            metrics = await client.get("/metrics")
            assert "orbit_node_ready 1.0" in metrics.text
            assert "orbit_lanes_held" not in metrics.text, "it cannot be known"
            assert_problem(await client.get("/ready"), 503, "database_unavailable")
            assert_problem(await client.get("/cycles/recent"), 503, "database_unavailable")
            assert (await client.get("/health")).status_code == 200
    finally:
        server.run(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        await made.close()


# --- cycles ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "content", "content_type"),
    [
        ({"payload": "hällo"}, "hällo".encode(), "text/plain; charset=utf-8"),
        ({"payload": "# x", "contentType": "text/markdown"}, b"# x", "text/markdown"),
        ({"payload": {"b": [1, "ü"]}}, '{"b":[1,"ü"]}'.encode(), "application/json"),
        ({"payload": None}, b"null", "application/json"),
        (
            {"payloadBase64": base64.b64encode(b"\x00\xff").decode()},
            b"\x00\xff",
            "application/octet-stream",
        ),
        ({"payload": ""}, b"", "text/plain; charset=utf-8"),
    ],
)
async def test_a_payload_arrives_as_given(
    api: httpx.AsyncClient,
    receiver: tuple[Receiver, str],
    body: dict[str, Any],
    content: bytes,
    content_type: str,
) -> None:
    """Text goes as its bytes, JSON compact, base64 as what it stands for."""
    await ended(api, await trigger(api, endpointKeys=["good", "good"], **body))
    assert receiver[0].bodies == [(content_type, content)]


async def test_the_whole_lineage(api: httpx.AsyncClient) -> None:
    """A cycle shows everything from its initiation to the receiver's answer, and no secret."""
    cycle_id = await trigger(api, namespace="sea", payload="x", endpointKeys=["good", "bad"])
    lineage = await ended(api, cycle_id)
    cycle = lineage["cycle"]
    assert (cycle["state"], cycle["stage"]) == ("finished", "cycle_finished")
    assert cycle["deadLettered"] == 1
    assert cycle["initiation"]["context"]["namespace"] == "sea"
    assert cycle["createdAt"].endswith("Z")
    assert lineage["checkpoints"][0]["stage"] == "cycle_started"
    assert len(lineage["checkpoints"]) == 8
    (item,) = lineage["items"]
    assert item["digest"] == hashlib.sha256(b"x").hexdigest()
    bad, good = lineage["jobs"]
    assert (good["state"], bad["state"]) == ("delivered", "dead_lettered")
    assert bad["cause"] == "status 500"
    assert good["url"].endswith("/ok?…")
    (receipt,) = good["receipts"]
    assert receipt["answer"]["text"] == "gräzi"
    assert receipt["latency"]["totalSeconds"] > 0
    assert bad["receipts"][0]["answer"]["base64"] == base64.b64encode(b"\xff\x00no").decode()
    assert lineage["isComplete"] is True
    assert lineage["valueLedger"] is None
    assert TOKEN not in json.dumps(lineage)
    assert "hidden" not in json.dumps(lineage)


async def test_an_idempotency_key_makes_a_request_one(api: httpx.AsyncClient) -> None:
    """Repeated, a request gets the first one's cycle; with another body it is refused."""
    headers = {"Idempotency-Key": "once"}
    first = await api.post("/cycles/trigger", json={"payload": "a"}, headers=headers)
    again = await api.post("/cycles/trigger", json={"payload": "a"}, headers=headers)
    assert first.json()["isNew"] is True
    assert again.json() == {"cycleRunId": first.json()["cycleRunId"], "isNew": False}
    other = await api.post("/cycles/trigger", json={"payload": "b"}, headers=headers)
    problem = assert_problem(other, 422, "idempotency_key_reused")
    assert problem["cycleRunId"] == first.json()["cycleRunId"]
    for bad in (b"", b"a b", "é".encode(), b"x" * 256):
        answer = await api.post("/cycles/trigger", json={}, headers={b"Idempotency-Key": bad})
        assert_problem(answer, 400, "request_invalid")


async def test_cycles_are_listed_page_by_page(api: httpx.AsyncClient) -> None:
    """Pages follow each other without gap or repetition; filters narrow them."""
    made = [await trigger(api, namespace=f"n{number % 2}") for number in range(7)]
    for cycle_id in made:
        await ended(api, cycle_id)
    found: list[str] = []
    cursor: str | None = None
    while True:
        asked = {"limit": 3} | ({"cursor": cursor} if cursor else {})
        page = (await api.get("/cycles", params=asked)).json()
        found += [one["cycleRunId"] for one in page["items"]]
        cursor = page["nextCursor"]
        if cursor is None:
            break
    assert found == sorted(made, reverse=True)
    of_one = (await api.get("/cycles", params={"namespace": "n1", "state": "finished"})).json()
    assert [one["cycleRunId"] for one in of_one["items"]] == sorted(made[1::2], reverse=True)
    assert (await api.get("/cycles?state=failed")).json() == {"items": [], "nextCursor": None}
    assert (await api.get("/cycles?state=running")).json()["items"] == []
    recent = (await api.get("/cycles/recent")).json()
    assert len(recent["items"]) == 7


async def test_a_failed_cycle_runs_again(
    api: httpx.AsyncClient, receiver: tuple[Receiver, str]
) -> None:
    """A failed cycle says why; its re-run names it, and it the re-run."""
    body = {"runProfileIds": ["broken"]}
    answer = (await api.post("/run-profiles/trigger", json=body)).json()
    failed = await ended(api, answer["items"][0]["cycleRunId"])
    old = failed["cycle"]
    assert old["state"] == "failed"
    assert "500" in old["reason"]
    assert failed["records"][0]["outcome"] == "failed"
    assert failed["valueLedger"]["tags"] == {"cost_center": "a"}
    (shown,) = (await api.get("/cycles?state=failed")).json()["items"]
    assert shown["reason"] == old["reason"]
    receiver[0].status = 200
    path, headers = f"/cycles/{old['cycleRunId']}/rerun", {"Idempotency-Key": "again"}
    again = await api.post(path, json={"from": "failed"}, headers=headers)
    assert again.status_code == 202
    repeated = await api.post(path, json={"from": "failed"}, headers=headers)
    assert repeated.json() == {"cycleRunId": again.json()["cycleRunId"], "isNew": False}
    new = await ended(api, again.json()["cycleRunId"])
    assert new["cycle"]["state"] == "finished"
    assert new["cycle"]["rerunOf"] == old["cycleRunId"]
    reruns = (await api.get(f"/cycles/{old['cycleRunId']}")).json()["cycle"]["reruns"]
    assert reruns == [new["cycle"]["cycleRunId"]]
    refused = await api.post(f"/cycles/{new['cycle']['cycleRunId']}/rerun", json={"from": "start"})
    assert_problem(refused, 409, "not_rerunnable")
    second = assert_problem(await api.post(path), 409, "not_rerunnable")
    assert second["cycleRunId"] == new["cycle"]["cycleRunId"]
    assert new["cycle"]["cycleRunId"] in second["detail"]
    forced = await api.post(path, json={"force": True})
    assert forced.status_code == 202
    assert forced.json()["isNew"]


async def test_too_large_is_refused_before_anything_is_stored(
    api: httpx.AsyncClient, settings: Settings
) -> None:
    """A body over the limit is refused, announced or not, and so is a payload over its own."""
    limit = settings.max_payload_bytes * 4 // 3 + (64 << 10)

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(limit // 1000 + 2):
            yield b" " * 1000

    headers = {"Content-Type": "application/json"}
    announced = await api.post("/cycles/trigger", content=b" " * (limit + 1), headers=headers)
    streamed = await api.post("/cycles/trigger", content=chunks(), headers=headers)
    payload = await api.post("/cycles/trigger", json={"payload": "x" * 200_001})
    for answer in (announced, streamed, payload):
        assert_problem(answer, 413, "payload_too_large")
    assert (await api.get("/cycles")).json()["items"] == []


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b"7",
        b'"x"',
        b"\xff",
        b'{"payload": NaN}',
        b'{"payload": 1e999}',
        b'{"payload": "\\ud800"}',
        b'{"payload": 1, "payload": 2}',
        b'{"payload": 1, "payloadBase64": "AA=="}',
        b'{"payloadBase64": "A"}',
        b'{"payloadBase64": "\xc3\xa9"}',
        b'{"payload": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"payload": ' + b"9" * 5000 + b"}",
        b'{"namespace": "a b"}',
        b'{"namespace": "a\\u0000"}',
        b'{"namespace": 7}',
        b'{"endpointKeys": ["nobody"]}',
        b'{"endpointKeys": "good"}',
        b'{"contentType": "text/plain"}',
        b'{"payload": "x", "contentType": "a\\nb"}',
        b'{"payload": "x", "contentType": ""}',
        b'{"playload": "x"}',
        b'{"endpoint_keys": ["good"]}',
    ],
)
async def test_a_trigger_that_cannot_be_is_refused(api: httpx.AsyncClient, body: bytes) -> None:
    """What is no request is answered with 400 and what was expected, and starts nothing."""
    headers = {"Content-Type": "application/json"}
    answer = await api.post("/cycles/trigger", content=body, headers=headers)
    assert_problem(answer, 400, "request_invalid")
    assert (await api.get("/cycles")).json()["items"] == []


async def test_only_json_is_taken(api: httpx.AsyncClient) -> None:
    """Forms and plain text, which a web page could send, are refused."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        headers = {"Content-Type": kind}
        answer = await api.post("/cycles/trigger", content=b"{}", headers=headers)
        assert_problem(answer, 415, "unsupported_media_type")


async def test_paused_nothing_starts(settings: Settings) -> None:
    """While paused every trigger is refused."""
    made = Node(settings.model_copy(update={"global_pause": True}))
    await made.open()
    try:
        async with client_of(made) as client:
            for path in ("/cycles/trigger", "/run-profiles/trigger", f"/cycles/{UNKNOWN}/rerun"):
                assert_problem(await client.post(path), 409, "global_pause")
            assert (await client.get("/status")).json()["isPaused"] is True
    finally:
        await made.close()


# --- configuration -----------------------------------------------------------------------


async def test_profiles_and_run_profiles(api: httpx.AsyncClient) -> None:
    """Both are shown as configured, with what they come to."""
    who = {one["profileId"]: one for one in (await api.get("/profiles")).json()["items"]}
    assert who["nova"]["styleVector"] == {"a_b": 1}
    assert who["nova"]["runProfileIds"] == ["broken", "daily", "resting"]
    where = {one["runProfileId"]: one for one in (await api.get("/run-profiles")).json()["items"]}
    assert where["daily"]["effectiveState"] == "enabled"
    assert where["daily"]["executionPolicy"]["retry"]["maxAttempts"] == 3
    assert where["orphan"]["state"] == "enabled"
    assert where["orphan"]["effectiveState"] == "disabled"
    assert where["orphan"]["reason"] == "profile off is disabled"


async def test_every_run_profile_gets_an_answer(api: httpx.AsyncClient) -> None:
    """Enabled ones start, the others say why they do not."""
    answer = await api.post("/run-profiles/trigger")
    assert answer.status_code == 202
    items = {one["runProfileId"]: one for one in answer.json()["items"]}
    assert items["daily"]["state"] == "started"
    assert items["daily"]["isNew"] is True
    assert items["resting"]["state"] == "skipped"
    assert items["resting"]["reason"] == "run profile resting is disabled"
    assert items["orphan"]["reason"] == "profile off is disabled"
    await ended(api, items["daily"]["cycleRunId"])
    await ended(api, items["broken"]["cycleRunId"])
    where = {one["runProfileId"]: one for one in (await api.get("/run-profiles")).json()["items"]}
    assert where["daily"]["lastCycle"]["cycleRunId"] == items["daily"]["cycleRunId"]
    unknown = await api.post("/run-profiles/trigger", json={"runProfileIds": ["daily", "nobody"]})
    assert "nobody" in assert_problem(unknown, 404, "not_found")["detail"]


async def test_configuration_is_checked_and_reloaded(
    api: httpx.AsyncClient, node: Node, settings: Settings, receiver: tuple[Receiver, str]
) -> None:
    """Files that cannot be used change nothing; others come into force."""
    before = (await api.get("/config")).json()
    assert before["isInStep"] is True
    assert before["reason"] == "files at boot"
    (settings.config_dir / "profiles.json").write_text('{"profiles": [{"profile_id": 1}]}')
    for path in ("/config/validate", "/config/reload"):
        problem = assert_problem(await api.post(path), 422, "configuration_invalid")
        assert {"file", "line", "pointer", "message"} == set(problem["problems"][0])
    assert (await api.get("/config")).json() == before
    write_configuration(settings.config_dir, receiver[1], jitter_seconds=1)
    valid = await api.post("/config/validate")
    assert valid.status_code == 200
    reloaded = (await api.post("/config/reload")).json()
    assert reloaded == {"revision": valid.json()["revision"], "isChanged": True}
    assert (await api.get("/config")).json()["revision"] == reloaded["revision"]
    assert (await api.post("/config/reload")).json()["isChanged"] is False


async def test_a_reload_waits_for_active_cycles(
    settings: Settings, receiver: tuple[Receiver, str]
) -> None:
    """While a cycle is active a reload is refused, and names it."""
    made = Node(settings, roles=frozenset({"api"}))
    await made.open()
    await made.start()
    try:
        async with client_of(made) as client:
            cycle_id = await trigger(client)
            write_configuration(settings.config_dir, receiver[1], jitter_seconds=1)
            problem = assert_problem(await client.post("/config/reload"), 409, "cycles_active")
            assert [one["cycleRunId"] for one in problem["activeCycles"]] == [cycle_id]
            running = (await client.get("/cycles?state=running")).json()["items"]
            assert [one["cycleRunId"] for one in running] == [cycle_id]
            status = (await client.get("/status")).json()
            assert status["cycles"]["byStage"] == {"cycle_started": 1}
    finally:
        await made.drain()
        await made.close()


async def test_status_tells_of_failed_cycles(api: httpx.AsyncClient) -> None:
    """Failed cycles of the last day are counted, and the newest named with the reason."""
    assert (await api.get("/status")).json()["failedCycles"] == {"count": 0, "newest": []}
    cycle: dict[str, Any] = {}
    for _ in range(6):
        asked = {"runProfileIds": ["broken"]}
        [item] = (await api.post("/run-profiles/trigger", json=asked)).json()["items"]
        cycle = (await ended(api, item["cycleRunId"]))["cycle"]
    found = (await api.get("/status")).json()["failedCycles"]
    assert found["count"] == 6
    assert len(found["newest"]) == 5
    assert found["newest"][0]["cycleRunId"] == cycle["cycleRunId"]
    assert found["newest"][0]["runProfileId"] == "broken"
    assert found["newest"][0]["reason"] == cycle["reason"]


async def test_status_why_sees_an_older_cycle_that_is_active(
    settings: Settings, receiver: tuple[Receiver, str], owner_dsn: str
) -> None:
    """A run profile whose newest cycle has ended still runs while an older one does."""
    write_configuration(settings.config_dir, receiver[1], overlap="allow")
    made = Node(settings, roles=frozenset({"api"}))
    await made.open()
    await made.start()
    try:
        async with client_of(made) as client:
            asked = {"runProfileIds": ["daily"]}
            older, newer = [
                (await client.post("/run-profiles/trigger", json=asked)).json()["items"][0]
                for _ in range(2)
            ]
            with psycopg.connect(owner_dsn) as connection:
                connection.execute(
                    "DELETE FROM cycle_lease WHERE cycle_id = %s", (newer["cycleRunId"],)
                )
                connection.execute(
                    "INSERT INTO cycle_checkpoint (namespace, cycle_id, stage, lease_number, "
                    "node_id) VALUES ('brand-a', %s, 'cycle_finished', 0, %s)",
                    (newer["cycleRunId"], made.node_id),
                )
            items = (await client.get("/run-profiles")).json()["items"]
            daily = next(one for one in items if one["runProfileId"] == "daily")
            now = (await client.get("/status")).json()
            last = daily["lastCycle"]
            assert (last["cycleRunId"], last["state"]) == (newer["cycleRunId"], "finished")
            assert why_not_running(daily, now).startswith(f"it runs: {older['cycleRunId']}")
    finally:
        await made.drain()
        await made.close()


async def test_slots_are_listed(api: httpx.AsyncClient, owner_dsn: str, node: Node) -> None:
    """Slots come newest first, page by page and filtered."""
    await node.database.execute(
        b"INSERT INTO schedule_slot (namespace, run_profile_id, slot_at, outcome, reason, node_id) "
        b"SELECT 'brand-a', 'daily', now() - n * interval '1 hour', 'missed', 'late', %s::uuid "
        b"FROM generate_series(1, 5) AS n",
        (node.node_id,),
    )
    first = (await api.get("/slots", params={"limit": 3})).json()
    rest = (await api.get("/slots", params={"limit": 3, "cursor": first["nextCursor"]})).json()
    times = [one["slotAt"] for one in first["items"] + rest["items"]]
    assert len(times) == 5
    assert times == sorted(times, reverse=True)
    assert rest["nextCursor"] is None
    assert (await api.get("/slots?outcome=fired")).json()["items"] == []
    assert len((await api.get("/slots?runProfileId=daily")).json()["items"]) == 5
    assert len((await api.get("/status")).json()["slotsNotFired"]) == 5
    where = {one["runProfileId"]: one for one in (await api.get("/run-profiles")).json()["items"]}
    assert where["daily"]["lastSlot"]["outcome"] == "missed"


# --- lanes -------------------------------------------------------------------------------


@pytest.fixture
async def held(settings: Settings, receiver: tuple[Receiver, str]) -> AsyncIterator[Node]:
    """A running node whose endpoint `bad` is held after one failure, for ten minutes."""
    breaker = Breaker(failures=1, hold_seconds=600.0, longest_hold_seconds=600.0)
    bad = Endpoint("bad", f"{receiver[1]}/no", breaker=breaker, rate_per_second=50.0)
    endpoints = (settings.dispatch_endpoints[0], bad)
    given = {"dispatch_endpoints": endpoints, "max_dispatch_retries": 3}
    given |= {"dispatch_retry_base_seconds": 0.01, "dispatch_retry_cap_seconds": 0.01}
    made = Node(settings.model_copy(update=given))
    await made.open()
    await made.start()
    yield made
    await made.drain()
    await made.close()


async def test_a_held_lane_says_so_everywhere(held: Node) -> None:
    """Lane, overview, a job's story and the metrics say that it is held, and since when."""
    async with client_of(held) as api:
        good = await trigger(api, namespace="sea", payload="x", endpointKeys=["good"])
        lineage = await ended(api, good)
        assert lineage["jobs"][0]["held"] is None
        assert lineage["jobs"][0]["receipts"][0]["isProbe"] is False
        assert lineage["jobs"][0]["receipts"][0]["isReused"] is False
        cycle_id = await trigger(api, namespace="sea", payload="x", endpointKeys=["bad"])

        async def look() -> Any:
            answer = await api.get("/lanes/sea/bad")
            is_held = answer.is_success and answer.json()["lane"]["breaker"] == "open"
            return answer.json() if is_held else None

        found = await until(look)
        lane = found["lane"]
        assert (lane["breaker"], lane["failures"], lane["waiting"]) == ("open", 1, 1)
        assert lane["attempts"] == {"delivered": 0, "failed": 1, "notSent": 0, "unknown": 0}
        assert lane["probeAt"] > lane["openedAt"]
        (change,) = found["changes"]
        assert (change["change"], change["holdSeconds"]) == ("opened", 600)
        assert change["createdAt"] == lane["openedAt"]
        assert found["limits"]["breaker"]["failures"] == 1
        assert found["limits"]["ratePerSecond"] == 50
        (waiting,) = (await api.get("/status")).json()["lanes"]
        assert waiting == lane
        (job,) = (await api.get(f"/cycles/{cycle_id}")).json()["jobs"]
        assert job["state"] == "retrying"
        hold = {name: lane[name] for name in ("openedAt", "probeAt", "failures")}
        assert job["held"] == hold
        text = (await api.get("/metrics")).text
        assert "orbit_lanes_held 1.0" in text
        assert "orbit_jobs_waiting 1.0" in text
        assert "orbit_jobs_in_flight 0.0" in text


async def test_lanes_are_listed_page_by_page(api: httpx.AsyncClient) -> None:
    """Lanes come in the order of their key, filtered by namespace and endpoint; unknown: 404."""
    for namespace in ("land", "sea"):
        for key in ("good", "bad"):
            given = {"namespace": namespace, "payload": "x", "endpointKeys": [key]}
            await ended(api, await trigger(api, **given))
    every = [("land", "bad"), ("land", "good"), ("sea", "bad"), ("sea", "good")]

    async def listed(**query: Any) -> tuple[list[tuple[str, str]], str | None]:
        page = (await api.get("/lanes", params=query)).json()
        return [(one["namespace"], one["endpointKey"]) for one in page["items"]], page["nextCursor"]

    found, cursor = await listed(limit=3)
    assert found == every[:3]
    assert await listed(limit=3, cursor=cursor) == (every[3:], None)
    assert await listed(namespace="sea") == (every[2:], None)
    assert await listed(namespace="land", endpointKey="good") == (every[1:2], None)
    assert await listed(namespace="air") == ([], None)
    assert_problem(await api.get("/lanes/air/good"), 404, "not_found")
    (bad,) = (await api.get("/lanes", params={"namespace": "sea", "endpointKey": "bad"})).json()[
        "items"
    ]
    assert (bad["breaker"], bad["attempts"]["failed"], bad["waiting"]) == ("closed", 1, 0)


# --- dead letters ------------------------------------------------------------------------


async def test_a_dead_letter_comes_back_as_a_new_job(
    api: httpx.AsyncClient, receiver: tuple[Receiver, str]
) -> None:
    """A requeue makes a job that names the old; a second is refused unless it is forced."""
    job_id = await dead_letter(api)
    (listed,) = (await api.get("/dead-letters")).json()["items"]
    assert listed["jobId"] == job_id
    assert listed["state"] == "open"
    assert listed["cause"] == "status 500"
    assert listed["lastReceipt"]["status"] == 500
    assert listed["digest"] == hashlib.sha256(b"x").hexdigest()
    receiver[0].status = 200
    answer = await api.post(f"/dead-letters/{job_id}/requeue", json={"reason": "repaired"})
    assert answer.status_code == 202
    new = answer.json()
    assert new["requeuedFrom"] == job_id

    async def delivered() -> bool:
        lineage = (await api.get(f"/cycles/{listed['cycleRunId']}")).json()
        states = {one["jobId"]: one["state"] for one in lineage["jobs"]}
        return bool(states[new["jobId"]] == "delivered")

    await until(delivered)
    again = await api.post(f"/dead-letters/{job_id}/requeue", json={"reason": "again"})
    problem = assert_problem(again, 409, "already_requeued")
    assert problem["jobId"] == new["jobId"]
    forced = {"reason": "again", "force": True, "snapshot": "old"}
    third = await api.post(f"/dead-letters/{job_id}/requeue", json=forced)
    assert third.status_code == 202
    shown = (await api.get(f"/dead-letters/{job_id}")).json()
    assert [one["newJobId"] for one in shown["decisions"]] == [new["jobId"], third.json()["jobId"]]
    assert shown["deadLetter"]["state"] == "decided"
    assert len(shown["receipts"]) == 1
    assert TOKEN not in json.dumps(shown)


async def test_of_two_people_one_requeues(api: httpx.AsyncClient) -> None:
    """Two requeues at once make one job."""
    job_id = await dead_letter(api)
    body = {"reason": "now"}
    answers = await asyncio.gather(
        *(api.post(f"/dead-letters/{job_id}/requeue", json=body) for _ in range(6))
    )
    assert sorted(one.status_code for one in answers) == [202, 409, 409, 409, 409, 409]


async def test_a_dead_letter_is_discarded(api: httpx.AsyncClient) -> None:
    """Discarding needs a reason, happens once, and closes the dead letter."""
    job_id = await dead_letter(api)
    for body in ({}, {"reason": ""}, {"reason": "  "}, {"reason": "a\0"}):
        answer = await api.post(f"/dead-letters/{job_id}/discard", json=body)
        assert_problem(answer, 400, "request_invalid")
    done = await api.post(f"/dead-letters/{job_id}/discard", json={"reason": "stale"})
    assert done.json() == {"jobId": job_id, "decision": "discarded"}
    for verb in ("discard", "requeue"):
        answer = await api.post(f"/dead-letters/{job_id}/{verb}", json={"reason": "x"})
        assert_problem(answer, 409, "already_requeued")
    assert (await api.get("/dead-letters?state=open")).json()["items"] == []
    assert len((await api.get("/dead-letters?state=decided")).json()["items"]) == 1


async def test_many_dead_letters_come_back_at_once(api: httpx.AsyncClient) -> None:
    """A dry run counts exactly; the requeue takes the oldest of its namespace, up to the limit."""
    made = [await dead_letter(api) for _ in range(3)]
    await dead_letter(api, namespace="land")
    asked = {"namespace": "sea", "endpointKey": "bad", "cause": "status 500", "limit": 2}
    dry = await api.post("/dead-letters/requeue", json={**asked, "isDryRun": True})
    assert dry.status_code == 200
    bare = {"withoutPayload": 0, "snapshot": "current", "batchId": None, "items": []}
    counts = {"matching": 3, "selected": 2, "mayHaveArrived": 0}
    assert dry.json() == {"isDryRun": True, **counts, **bare}
    for reason in ({}, {"reason": " "}):
        unsaid = await api.post("/dead-letters/requeue", json={**asked, **reason})
        problem = assert_problem(unsaid, 400, "request_invalid")
        assert [one["pointer"] for one in problem["problems"]] == ["/reason"]
    done = (await api.post("/dead-letters/requeue", json={**asked, "reason": "up"})).json()
    assert done["matching"] == 3
    assert sorted(one["requeuedFrom"] for one in done["items"]) == sorted(made)[:2]
    other = {**asked, "cause": "status 404", "reason": "up"}
    none = (await api.post("/dead-letters/requeue", json=other)).json()
    counts = {"matching": 0, "selected": 0, "mayHaveArrived": 0}
    assert none == {"isDryRun": False, **counts, **bare}
    filters = {"namespace": "land", "endpointKey": "bad", "cause": "status 500"}
    assert len((await api.get("/dead-letters", params=filters)).json()["items"]) == 1


async def test_what_may_have_arrived_comes_back_by_force_alone(
    api: httpx.AsyncClient, node: Node
) -> None:
    """A requeue has a new id, so a receiver that had the old one could not tell."""
    job_id = await dead_letter(api)
    await node.database.execute(
        b"INSERT INTO delivery_receipt (namespace, job_id, attempt, outcome, digest, size, "
        b"lease_number, node_id) SELECT namespace, job_id, 9, 'unknown', digest, size, 9, node_id "
        b"FROM delivery_receipt WHERE job_id = %s",
        (job_id,),
    )
    (listed,) = (await api.get("/dead-letters")).json()["items"]
    assert listed["mayHaveArrived"] is True
    many = {"namespace": "sea", "reason": "up"}
    done = (await api.post("/dead-letters/requeue", json=many)).json()
    assert (done["matching"], done["mayHaveArrived"], done["items"]) == (0, 1, [])
    path = f"/dead-letters/{job_id}/requeue"
    problem = assert_problem(await api.post(path, json={"reason": "x"}), 409, "may_have_arrived")
    assert problem["detail"] == "attempt 9 may have arrived; ask the receiver, then force"
    assert (await api.post(path, json={"reason": "x", "force": True})).status_code == 202


# --- the gate, and what is no request ----------------------------------------------------


async def test_other_sites_change_nothing(api: httpx.AsyncClient) -> None:
    """A foreign Host (DNS rebinding) and a foreign Origin are refused."""
    for host in ("evil.example", "evil.example:3000", "", "127.0.0.1.evil.example", "["):
        answer = await api.get("/cycles", headers={"Host": host})
        assert_problem(answer, 421, "host_refused")
    for host in ("127.0.0.1:3000", "[::1]:3000", "LOCALHOST", "127.8.9.1"):
        assert (await api.get("/cycles", headers={"Host": host})).status_code == 200
    for origin in ("http://evil.example", "null", "http://localhost:4000", "http://["):
        answer = await api.post("/cycles/trigger", json={}, headers={"Origin": origin})
        assert_problem(answer, 403, "origin_refused")
    own = {"Origin": "http://localhost:3000"}
    assert (await api.post("/cycles/trigger", json={}, headers=own)).status_code == 202


async def test_answers_carry_safe_headers(api: httpx.AsyncClient) -> None:
    """No answer is cached, sniffed or framed; the page for people loads nothing from elsewhere."""
    for path in ("/health", "/cycles", "/nowhere"):
        headers = (await api.get(path)).headers
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["content-security-policy"].startswith("default-src 'none'")
    docs = await api.get("/docs")
    assert docs.headers["content-type"].startswith("text/html")
    assert "http" not in docs.text
    assert "<script" not in docs.text
    assert "/cycles/trigger" in docs.text


async def test_unknown_paths_and_methods_are_problems(api: httpx.AsyncClient) -> None:
    """What is not there, or not so, is told in the same form."""
    assert_problem(await api.get("/nowhere"), 404, "not_found")
    answer = await api.delete("/cycles")
    assert_problem(answer, 405, "method_not_allowed")
    assert "GET" in answer.headers["allow"]


GARBAGE_IDS = [
    "x",
    UNKNOWN,
    UNKNOWN.upper(),
    "%00",
    "%ED%A0%80",
    "' OR 1",
    "9" * 400,
    "{}",
    "..%2f",
]
GARBAGE_QUERIES = [
    "limit=0",
    "limit=201000",
    "limit=" + "9" * 5000,
    "limit=x",
    "limit=%00",
    "cursor=x",
    "cursor=%00",
    "cursor=WzFd",
    "cursor=WyJ4Il0",
    "cursor=WyJcdTAwMDAiLCJhIiwiYiJd",
    "namespace=%00",
    "namespace=a%20b",
    "state=x",
    "unknown=1",
]


async def test_every_operation_answers_garbage_with_a_problem(api: httpx.AsyncClient) -> None:
    """Whatever is sent, no operation answers with a 5xx, and every refusal is a problem."""
    schema = (await api.get("/openapi.json")).json()
    operations = [(path, verb) for path, verbs in schema["paths"].items() for verb in verbs]
    assert len(operations) >= 20
    for path, verb in operations:
        paths = [path]
        if "{" in path:
            before, _, after = path.partition("{")
            paths = [before + one + after.partition("}")[2] for one in GARBAGE_IDS]
            for one in paths:
                has_reason = any(
                    word in one for word in ("dead", "governance", "/proposals", "/arm")
                )
                needed = {"position": 0} if one.endswith("/commit") else {}
                given = {"reason": "x"} if has_reason else needed
                answer = await api.request(verb, one, json=given)
                if "governance" in one and answer.is_success:
                    continue  # any name may be a namespace's
                assert_problem(answer, answer.status_code, answer.json()["code"])
                is_no_more = {400, 409} if "governance" in one else set()
                assert answer.status_code in {404, 405} | is_no_more, (verb, one, answer.text)
        if verb == "get":
            for query in GARBAGE_QUERIES:
                # Also for the stream of events a bad place to begin, or it would be endless.
                answer = await api.get(f"{paths[-1]}?{query}", headers={"Last-Event-ID": "x"})
                assert answer.status_code < 500, (path, query, answer.text)
                if not answer.is_success:
                    assert_problem(answer, answer.status_code, answer.json()["code"])
            continue
        for body in (b"{", b"[1]", b"\x00", b'{"nobody": "\\u0000"}', b'{"from": 1e400}'):
            headers = {"Content-Type": "application/json"}
            answer = await api.request(verb, paths[-1], content=body, headers=headers)
            assert answer.status_code < 500, (path, body, answer.text)
            if "requestBody" in schema["paths"][path][verb] and "{" not in path:
                assert_problem(answer, 400, "request_invalid")


async def test_answers_are_as_described(api: httpx.AsyncClient) -> None:
    """Every operation says how it refuses, and is named once."""
    schema = (await api.get("/openapi.json")).json()
    operations = [one for verbs in schema["paths"].values() for one in verbs.values()]
    names = [one["operationId"] for one in operations]
    assert len(names) == len(set(names))
    for one in operations:
        assert "application/problem+json" in one["responses"]["4XX"]["content"]
        assert "422" not in one["responses"]
