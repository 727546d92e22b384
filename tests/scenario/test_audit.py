"""The trail in the running program: each governed act has its entry, each fact its number."""

from __future__ import annotations

import asyncio
import fcntl
import json
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from starlette.requests import ClientDisconnect
from structlog.testing import capture_logs

from orbit.api.application import create_application
from orbit.api.exports import Exports
from orbit.api.problems import HttpRefusal
from orbit.app import Node
from orbit.audit.export import verify_export
from orbit.audit.keys import load_public_key, load_signing_key
from orbit.audit.verification import Report, verify
from orbit.cli.program import main
from orbit.errors import AuditKeyInvalid
from orbit.governance.actor import ANYONE
from orbit.payload import Payload
from tests.scenario.access import asking
from tests.scenario.conftest import (
    SECRET_KEY,
    Configure,
    Facts,
    MakeNode,
    Receiver,
    policy,
    run,
    run_profile,
    send,
    until,
)

BROKEN = f"{__name__}:broken"


async def broken(_context: object, _payload: Payload) -> Payload:
    """A step that always fails."""
    raise ValueError("no")


@pytest.fixture
def audit_settings(tmp_path: Path) -> Mapping[str, Any]:
    """A key and a folder of checkpoints, as an operator would name them."""
    path = tmp_path / "audit.key"
    key = Ed25519PrivateKey.generate()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)
    return {
        "audit_signing_key_file": path,
        "audit_checkpoint_dir": tmp_path / "checkpoints",
        "audit_checkpoint_seconds": 1,
    }


@pytest.fixture
async def node(
    make_node: MakeNode,
    receiver: Receiver,
    configure: Configure,
    audit_settings: Mapping[str, Any],
) -> Node:
    """A node whose endpoint refuses everything."""

    async def refuse(_arrival: object) -> Any:
        return web.Response(status=500)

    receiver.answers["/out"] = refuse
    configure(run_profile(execution_policy=policy(tier1=[BROKEN])))
    endpoint = receiver.endpoint("out", breaker=None)
    return await make_node(dispatch_endpoints=(endpoint,), max_dispatch_retries=1, **audit_settings)


@pytest.fixture
async def api(node: Node) -> AsyncIterator[httpx.AsyncClient]:
    """The node's API."""
    transport = httpx.ASGITransport(create_application(node))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


async def whole(dsn: str) -> Report:
    """The report once every fact has its number."""

    def sealed() -> Report | None:
        report = verify(dsn)
        return report if report.unsealed == 0 else None

    found: Report = await until(sealed, "every fact's number")
    return found


async def dead_letters(node: Node, count: int) -> list[str]:
    """Cycles whose job dies; the jobs' ids."""
    for _ in range(count):
        ended = await send(node, Payload(b"x"), namespace="brand", endpoint_keys=["out"])
        assert ended["dead_lettered"] == 1
    rows = await node.database.fetch_all(b"SELECT job_id FROM dead_letter_dispatch ORDER BY job_id")
    return [row["job_id"] for row in rows]


async def test_every_governed_act_has_its_entry_and_the_reverse(
    node: Node, api: httpx.AsyncClient, owner_dsn: str, configure: Configure
) -> None:
    """Requeue, bulk, batch, cancel, discard, re-run and reload; then a lie in either direction."""
    first, second, third, *_ = await dead_letters(node, 5)
    why = {"reason": "mended"}
    posts: list[tuple[str, dict[str, Any]]] = [
        (f"/dead-letters/{first}/requeue", why),
        (f"/dead-letters/{second}/discard", why),
        ("/dead-letters/requeue", {"namespace": "brand", "limit": 2, **why}),
        ("/dead-letters/requeue", {"namespace": "brand", "rate": 0.001, **why}),
    ]
    answers = [await api.post(path, json=body) for path, body in posts]
    assert [one.status_code for one in answers] == [202, 200, 202, 202], answers[2].text
    batch_id = answers[3].json()["batchId"]
    answer = await api.post(f"/dead-letters/requeues/{batch_id}/cancel", json=why)
    assert answer.status_code == 200, answer.text
    failed = await run(node)
    rerun = f"/cycles/{failed['cycle_id']}/rerun"
    assert (await api.post(rerun, json={"reason": "the notes are back"})).status_code == 202
    await until(lambda: _is_idle(node), "the re-run's end")
    configure(run_profile(state="disabled"))
    assert (await api.post("/config/reload")).json()["isChanged"]

    report = await whole(owner_dsn)
    assert report.findings == []
    listed = (await api.get("/audit", params={"limit": 200})).json()["items"]
    actions = {one["action"] for one in listed}
    reasons = [one["reason"] for one in listed if one["action"] == "cycle.rerun"]
    assert reasons == ["the notes are back"]
    assert actions >= {
        "trail.begun",
        "configuration.activated",
        "dead_letter.requeued",
        "dead_letter.discarded",
        "requeue.begun",
        "requeue.cancelled",
        "cycle.rerun",
        "facts.sealed",
    }
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        owner.execute("ALTER TABLE dead_letter_decision DISABLE TRIGGER append_only")
        owner.execute("DELETE FROM dead_letter_decision WHERE decision = 'discarded'")
        owner.execute(
            "INSERT INTO dead_letter_decision (namespace, job_id, sequence, decision, reason)"
            " VALUES ('brand', %s, 7, 'discarded', 'quietly')",
            (third,),
        )
        owner.execute(
            "INSERT INTO dead_letter_decision (namespace, job_id, sequence, decision, reason,"
            " decided_at) VALUES ('brand', %s, 8, 'discarded', 'before', '2020-01-01')",
            (third,),
        )
    text = "\n".join(map(str, verify(owner_dsn).findings))
    assert f"dead_letter.discarded: what it is about ({second}/1) is not there" in text
    assert f"dead_letter_decision {third}/7 has no entry dead_letter.discarded" in text
    assert "dead_letter_decision had 0 changes when the trail began, and has 1" in text


async def _is_idle(node: Node) -> bool:
    return await node.database.fetch_one(b"SELECT FROM cycle_lease LIMIT 1") is None


async def test_every_failed_attempt_and_dead_letter_is_sealed(
    node: Node, owner_dsn: str, facts: Facts
) -> None:
    """So are the calls of steps and the cycles themselves, with who asked for them."""
    await dead_letters(node, 3)
    await run(node)
    assert (await whole(owner_dsn)).findings == []
    counted = facts(
        "SELECT fact, count(*)::int AS n FROM audit_sealed_fact GROUP BY fact ORDER BY fact"
    )
    assert {row["fact"]: row["n"] for row in counted} == {
        "cycle_run": 4,
        "dead_letter_dispatch": 3,
        "delivery_receipt": 6,
        "execution_record": 1,
    }


async def test_who_reported_an_outcome_is_sealed(
    node: Node, api: httpx.AsyncClient, owner_dsn: str, facts: Facts
) -> None:
    """It stays when the event has gone, and whoever puts another name to it is found."""
    await dead_letters(node, 1)
    (cycle,) = facts("SELECT cycle_id::text FROM cycle_run")
    body = {"namespace": "brand", "metric": "quality", "value": 0.5, "runId": cycle["cycle_id"]}
    for outcome_id in ("o-1", "o-1", "o-2"):
        answer = await api.post("/outcomes", json={"outcomeId": outcome_id, **body})
        assert answer.status_code == 200
    assert (await whole(owner_dsn)).findings == []
    sealed = facts(
        "SELECT part, fact_id::text, reported_by FROM audit_sealed_fact JOIN outcome_key"
        " ON log = namespace AND part = outcome_id WHERE fact = 'outcome_key' ORDER BY part"
    )
    assert [tuple(row.values()) for row in sealed] == [
        (outcome_id, cycle["cycle_id"], ANYONE.id) for outcome_id in ("o-1", "o-2")
    ]
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        owner.execute("ALTER TABLE outcome_key DISABLE TRIGGER append_only")
        for tampering, words in (
            ("UPDATE outcome_key SET reported_by = 'ann' WHERE outcome_id = 'o-1'", "was altered"),
            ("DELETE FROM outcome_key WHERE outcome_id = 'o-2'", "/o-2 is missing"),
            (
                (
                    "INSERT INTO outcome_key SELECT namespace, 'o-3', digest, created_at, cycle_id,"
                    " reported_by, '9' FROM outcome_key"
                ),
                "/o-3 has no number: it was added",
            ),
        ):
            owner.execute(tampering.encode())
            assert words in "\n".join(map(str, verify(owner_dsn).findings))


async def test_entries_are_listed_page_by_page_and_narrowed(
    node: Node, api: httpx.AsyncClient, owner_dsn: str
) -> None:
    """Keyset paging in both orders, filters, and what is no cursor or namespace is refused."""
    for job_id in await dead_letters(node, 3):
        await api.post(f"/dead-letters/{job_id}/discard", json={"reason": "old"})
    await whole(owner_dsn)
    pages: list[Any] = []
    for given in ({}, {"namespace": "brand"}):
        pages = []
        cursor: dict[str, str] = {}
        while True:
            page = (await api.get("/audit", params={"limit": 1, **given, **cursor})).json()
            pages += page["items"]
            if not page.get("nextCursor"):
                break
            cursor = {"cursor": page["nextCursor"]}
        places = [(one["namespace"], one["seq"]) for one in pages]
        assert len(set(places)) == len(places) >= 4
        assert [one["at"] for one in pages] == sorted((o["at"] for o in pages), reverse=True)
    asked = {"action": "dead_letter.discarded", "actor": ANYONE.name, "since": pages[-1]["at"]}
    found = (await api.get("/audit", params=asked)).json()["items"]
    assert [one["reason"] for one in found] == ["old"] * 3
    none = (await api.get("/audit", params={"until": "2020-01-01T00:00:00Z"})).json()
    assert none["items"] == []
    for wrong in ({"cursor": "x"}, {"namespace": "a b"}, {"since": "soon"}):
        assert (await api.get("/audit", params=wrong)).status_code == 400


async def test_the_command_line_verifies_and_exports(
    node: Node,
    api: httpx.AsyncClient,
    dsn: str,
    owner_dsn: str,
    audit_settings: Mapping[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Code 0 for what is whole and 6 for what is not, with the database and without it."""
    monkeypatch.setenv("DATABASE_URL", dsn)
    monkeypatch.setenv("ORBIT_SECRET_KEYS", SECRET_KEY)
    for name, value in audit_settings.items():
        monkeypatch.setenv(f"ORBIT_{name.upper()}", str(value))
    monkeypatch.chdir(tmp_path)
    await dead_letters(node, 1)
    await whole(owner_dsn)
    out, public = tmp_path / "trail.jsonl", audit_settings["audit_checkpoint_dir"]

    async def orbit(*arguments: str) -> int:
        return await asyncio.to_thread(main, ["audit", *arguments])

    assert await orbit("export", "--out", str(out)) == 0
    assert await orbit("verify") == 0
    offline = ("verify", "--export", str(out), "--public-key", str(public / "public-key.pem"))
    capsys.readouterr()
    assert await orbit(*offline) == 0
    told = capsys.readouterr().out
    assert "Exported at 20" in told
    assert re.search(r"^brand: [12] entr(y|ies), vouched for up to [12] at 20", told, re.MULTILINE)
    streamed = await api.get("/audit/export", params={"namespace": "brand"})
    lines = streamed.content.splitlines(keepends=True)
    report = verify_export(lines, load_public_key(public / "public-key.pem"))
    assert report.findings == []
    assert report.entries in (1, 2)  # as many passes as its facts took

    out.write_bytes(out.read_bytes().replace(rb"\"failed\"", rb"\"missed\""))
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        owner.execute("ALTER TABLE audit_trail_entry DISABLE TRIGGER append_only")
        owner.execute("UPDATE audit_trail_entry SET body = body || ' ' WHERE log = 'brand'")
    assert await orbit(*offline) == 6
    assert "brand fact" in capsys.readouterr().out
    assert await orbit("verify", "--json") == 6
    told = json.loads(capsys.readouterr().out)
    assert told["findings"][0] == {
        "namespace": "brand",
        "kind": "entry",
        "number": 1,
        "what": "was altered: its hash is not that of its bytes",
    }


async def test_exports_are_few_at_a_time_and_hold_no_connection(
    node: Node, api: httpx.AsyncClient, owner_dsn: str
) -> None:
    """Who does not read has no snapshot open, and is told to come later; a halt finds its place."""
    exports = Exports(node)
    first = await exports.answer(ANYONE, None)
    with pytest.raises(HttpRefusal) as refused:
        await exports.answer(ANYONE, None)
    assert (refused.value.status, refused.value.headers["Retry-After"]) == (429, "10")
    second = await exports.answer(replace(ANYONE, id="another"), "brand")
    with psycopg.connect(owner_dsn) as owner:
        found = owner.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'orbit audit'"
            " AND datname = current_database() AND state LIKE 'idle in transaction%'"
        ).fetchone()
    assert found == (0,)
    halt = await api.post("/governance/namespaces/brand/halt", json={"waitSeconds": 1})
    assert halt.json()["quiesced"]
    for answer in (first, second, None):  # who is gone leaves room for the next
        sent = answer or await exports.answer(ANYONE, None)
        with pytest.RaisesGroup(ClientDisconnect, flatten_subgroups=True, allow_unwrapped=True):
            await sent({"type": "http", "asgi": {"spec_version": "2.4"}}, _silent, _gone)


async def _silent() -> Any:
    """A client of whom nothing is heard."""
    await asyncio.Event().wait()


async def _gone(_message: object) -> None:
    """A client that is gone when something is sent."""
    raise OSError("gone")


async def test_a_node_says_that_the_trail_contradicts_what_it_signed(
    node: Node, api: httpx.AsyncClient, owner_dsn: str
) -> None:
    """A tail that is cut after a checkpoint shows in /ready, /status and the metrics."""
    await dead_letters(node, 1)
    await whole(owner_dsn)
    assert node.signer is not None
    folder = node.settings.audit_checkpoint_dir
    assert folder is not None
    await until((folder / "brand.jsonl").exists, "a checkpoint")
    assert (await api.get("/ready")).json()["auditContradictions"] == 0
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        owner.execute("ALTER TABLE audit_trail_entry DISABLE TRIGGER append_only")
        owner.execute("DELETE FROM audit_trail_entry WHERE log = 'brand'")
        owner.execute("DELETE FROM audit_head")

    async def told() -> Any:
        return (await api.get("/status")).json()["auditContradictions"].get("brand")

    assert "is not there" in await until(told, "the contradiction")
    assert (await api.get("/ready")).json()["auditContradictions"] == 1
    assert "orbit_audit_contradictions 1.0" in (await api.get("/metrics")).text


async def test_a_signer_that_fails_shows(
    node: Node, api: httpx.AsyncClient, tmp_path: Path
) -> None:
    """The age of what was last signed goes on growing, and falls once it can sign again."""

    async def age() -> float:
        text = (await api.get("/metrics")).text
        found = re.search(r"^orbit_audit_checkpoint_age_seconds ([\d.e-]+)$", text, re.MULTILINE)
        assert found is not None
        return float(found[1])

    folder = node.settings.audit_checkpoint_dir
    assert folder is not None
    await until((folder / "%2A.jsonl").exists, "the first checkpoint")
    aside = tmp_path / "aside"
    with (folder / ".lock").open("ab") as lock:  # waits for a signer that is at it
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder.rename(aside)
        folder.write_bytes(b"no folder")
    before = await age()

    async def is_older() -> bool:
        return await age() > before + 3  # three times as long as it may take

    await until(is_older, "a growing age")
    failed_for = await age()
    folder.unlink()
    aside.rename(folder)

    async def is_younger() -> bool:
        return await age() < failed_for

    await until(is_younger, "a pass that signs")


async def test_what_is_not_signed_is_said(
    make_node: MakeNode,
    dsn: str,
    config_dir: Path,
    audit_settings: Mapping[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the node at its start, by doctor, and by who verifies; a key that is no good too."""
    with capture_logs() as logs:
        node = await make_node()
    assert "audit_unsigned" in [one["event"] for one in logs if one["log_level"] == "warning"]
    async with asking(node) as api:
        assert "\norbit_audit_checkpoint_age_seconds" not in (await api.get("/metrics")).text
    monkeypatch.setenv("DATABASE_URL", dsn)
    monkeypatch.setenv("ORBIT_SECRET_KEYS", SECRET_KEY)
    monkeypatch.setenv("ORBIT_CONFIG_DIR", str(config_dir))
    monkeypatch.chdir(tmp_path)

    async def told(*arguments: str) -> str:
        await asyncio.to_thread(main, list(arguments))
        return capsys.readouterr().out

    assert "! audit trail: nothing is signed" in await told("doctor")
    assert "! NOTHING VOUCHES for " in await told("audit", "verify")
    assert (
        "--checkpoints: there is no folder"
        in (
            await asyncio.to_thread(main, ["audit", "verify", "--checkpoints", "nowhere"]),
            capsys.readouterr().err,
        )[1]
    )
    for name, value in audit_settings.items():
        monkeypatch.setenv(f"ORBIT_{name.upper()}", str(value))
    assert "✓ audit trail: checkpoints are signed every 1 s, into " in await told("doctor")
    audit_settings["audit_signing_key_file"].chmod(0o644)
    assert "✗ audit trail: others than its owner can read" in await told("doctor")


async def test_the_verb_makes_a_key_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It prints the public half each time, and changes nothing that is there."""
    path = tmp_path / "audit.key"
    assert await asyncio.to_thread(main, ["audit", "key", str(path)]) == 0
    first, made = capsys.readouterr().out, path.read_bytes()
    assert first.startswith("-----BEGIN PUBLIC KEY-----")
    assert path.stat().st_mode & 0o777 == 0o600
    assert await asyncio.to_thread(main, ["audit", "key", str(path)]) == 0
    assert (capsys.readouterr().out, path.read_bytes()) == (first, made)


def test_a_signing_key_is_made_once_and_kept_from_others(tmp_path: Path) -> None:
    """Mode 0600; a key that others can read, or that is none, is refused."""
    path = tmp_path / "data" / "audit.key"
    made = load_signing_key(path, is_made=True)
    again = load_signing_key(path, is_made=True)
    assert made.private_bytes_raw() == again.private_bytes_raw()
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    with pytest.raises(AuditKeyInvalid, match="chmod 600"):
        load_signing_key(path)
    path.chmod(0o600)
    path.write_text("no key")
    with pytest.raises(AuditKeyInvalid, match="no Ed25519"):
        load_signing_key(path)
