"""A change of ORBIT_SECRET_KEYS: what was enqueued under the old key, with it at hand and without.

Nodes come one after the other on one database, each with its own ring of keys. Jobs are left
over from the first by a receiver that refuses them until told otherwise.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from cryptography.fernet import Fernet, InvalidToken

from orbit.app import Node
from orbit.execution.dead_letters import SnapshotChoice
from orbit.payload import Payload
from orbit.reading.dead_letters import dead_letter, dead_letters
from orbit.vault import fingerprint
from tests.scenario.conftest import (
    SECRET_KEY,
    Arrival,
    Configure,
    Facts,
    MakeNode,
    Receiver,
    ended,
    send,
    until,
)

NEW_KEY = Fernet.generate_key().decode()
TOKEN = "token-under-the-old-key"
JOBS = 12  # more failures than a breaker takes
WAITS = {"dispatch_retry_base_seconds": 3600.0, "dispatch_retry_cap_seconds": 3600.0}


@dataclass(frozen=True, slots=True)
class Scene:
    """Jobs of the endpoint `out` that wait for their second attempt, enqueued under the old key."""

    make_node: MakeNode
    receiver: Receiver
    facts: Facts
    cycles: list[str]

    async def node(self, *keys: str, **given: Any) -> Node:
        """A node with these keys; the receiver is well from here on."""
        self.receiver.answers.clear()
        endpoints = tuple(self.receiver.endpoint(key, token=TOKEN) for key in ("out", "other"))
        return await self.make_node(
            **{"secret_keys": keys, "dispatch_endpoints": endpoints, **given}
        )

    def make_due(self) -> None:
        """Lets what waits for its retry begin."""
        rows = self.facts("UPDATE dispatch_lease SET due_at = orbit_now() RETURNING job_id")
        assert len(rows) == JOBS

    def snapshot_keys(self) -> list[str]:
        """Which of the two keys each stored snapshot can be read with, oldest first."""
        rows = self.facts("SELECT secrets_encrypted FROM endpoint_snapshot ORDER BY created_at")
        return [_key_of(bytes(row["secrets_encrypted"])) for row in rows]


def _key_of(token: bytes) -> str:
    found = []
    for name, key in (("old", SECRET_KEY), ("new", NEW_KEY)):
        try:
            Fernet(key).decrypt(token)
        except InvalidToken:
            continue
        found.append(name)
    [name] = found
    return name


@pytest.fixture
async def scene(
    configure: Configure, make_node: MakeNode, receiver: Receiver, facts: Facts
) -> Scene:
    """The first node has failed to deliver, and is gone."""

    async def refuse(arrival: Arrival) -> web.Response:
        return web.Response(status=503)

    receiver.answers["/out"] = refuse
    configure()
    endpoint = receiver.endpoint("out", token=TOKEN, breaker=None)
    node = await make_node(dispatch_endpoints=(endpoint,), max_dispatch_retries=1, **WAITS)
    cycles = []
    for number in range(JOBS):
        accepted = await node.orchestration.trigger_raw(
            payload=Payload(b"%d" % number), endpoint_keys=["out"]
        )
        cycles.append(accepted.cycle_id)
    await until(
        lambda: facts("SELECT count(*) FROM delivery_receipt") == [{"count": JOBS}], "the failures"
    )
    await node.drain()
    await node.close()
    receiver.arrivals.clear()
    return Scene(make_node, receiver, facts, cycles)


async def test_an_old_key_behind_the_new_one_still_reads_what_it_encrypted(scene: Scene) -> None:
    """Jobs of before go on with their token; what is enqueued now is under the new key."""
    node = await scene.node(NEW_KEY, SECRET_KEY)
    scene.make_due()
    for cycle in scene.cycles:
        assert (await ended(node, cycle))["detail"]["delivered"] == 1
    assert scene.snapshot_keys() == ["old"]
    await send(node, Payload(b"x"), endpoint_keys=["out"])
    assert scene.snapshot_keys() == ["old", "new"]
    sent_with = {arrival.headers["Authorization"] for arrival in scene.receiver.arrivals}
    assert sent_with == {f"Bearer {TOKEN}"}
    assert len(scene.receiver.arrivals) == JOBS + 1


async def test_after_a_rotation_the_old_key_can_be_dropped(scene: Scene) -> None:
    """What was enqueued under both keys needs only the new one, the endpoint being the same."""
    both = await scene.node(NEW_KEY, SECRET_KEY)
    scene.make_due()
    for cycle in scene.cycles:
        await ended(both, cycle)
    await send(both, Payload(b"x"), endpoint_keys=["out"])
    await both.drain()
    await both.close()
    node = await scene.node(NEW_KEY)
    last = await send(node, Payload(b"y"), endpoint_keys=["out"])
    assert last["detail"]["delivered"] == 1
    assert scene.receiver.arrivals[-1].body == b"y"


async def test_a_lost_key_is_told_job_by_job(
    scene: Scene, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each job under it fails with the reason, once per attempt; the others of its lane flow."""
    node = await scene.node(NEW_KEY)
    scene.make_due()
    for number, cycle in enumerate(scene.cycles):
        assert (await ended(node, cycle))["detail"]["deadLettered"] == 1
        key = ("out", "other")[number % 2]
        flowing = await send(node, Payload(b"new"), endpoint_keys=[key])
        assert flowing["detail"]["delivered"] == 1
    receipts = scene.facts(
        "SELECT outcome, status, error, attempt FROM delivery_receipt WHERE outcome <> 'delivered' "
        "AND attempt > 1"
    )
    assert len(receipts) == JOBS, "one attempt each: nothing is tried over and over"
    for receipt in receipts:
        assert (receipt["outcome"], receipt["status"], receipt["attempt"]) == ("not_sent", None, 2)
        assert "ORBIT_SECRET_KEYS lacks the key" in receipt["error"]
    letters = scene.facts("SELECT cause, attempts FROM dead_letter_dispatch")
    assert letters == [{"cause": "secret unreadable", "attempts": 2}] * JOBS
    assert scene.facts("SELECT change FROM lane_change") == []
    assert {arrival.body for arrival in scene.receiver.arrivals} == {b"new"}
    assert "Traceback" not in "".join(capfd.readouterr())


async def doctor(dsn: str, config_dir: Path, *keys: str) -> dict[str, Any]:
    """The checks of `orbit doctor` with these keys, by name."""
    ours = {
        "DATABASE_URL": dsn,
        "ORBIT_CONFIG_DIR": str(config_dir),
        "ORBIT_SECRET_KEYS": ",".join(keys),
    }
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "orbit", "doctor", "--json"),
        env={name: value for name, value in os.environ.items() if "ORBIT" not in name} | ours,
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await child.communicate()
    return {one["name"]: one for one in json.loads(output)["checks"]}


async def test_doctor_counts_what_the_keys_cannot_read(
    scene: Scene, dsn: str, config_dir: Path
) -> None:
    """Waiting jobs under a key that is not at hand are named by endpoint and fingerprint."""
    lost = (await doctor(dsn, config_dir, NEW_KEY))["endpoint out secrets"]
    assert lost["isGood"] is False
    assert lost["message"] == (
        f"{JOBS} waiting jobs cannot be read with these keys "
        f"(fingerprint {fingerprint(SECRET_KEY)}; at hand: {fingerprint(NEW_KEY)})"
    )
    assert "endpoint out secrets" not in await doctor(dsn, config_dir, NEW_KEY, SECRET_KEY)


@pytest.mark.parametrize(("token", "state"), [(None, "unchanged"), (TOKEN, "re_encrypted")])
async def test_a_rotation_is_no_change_of_the_endpoint(
    configure: Configure,
    make_node: MakeNode,
    receiver: Receiver,
    token: str | None,
    state: str,
) -> None:
    """A dead letter of before is told so; where nothing is secret, no key is needed either."""

    async def refuse(arrival: Arrival) -> web.Response:
        return web.Response(status=503)

    receiver.answers["/out"] = refuse
    configure()
    given = {"dispatch_endpoints": (receiver.endpoint("out", token=token),)}
    old = await make_node(**given, max_dispatch_retries=0)
    await send(old, Payload(b"x"), endpoint_keys=["out"])
    await old.drain()
    await old.close()
    receiver.answers.clear()
    node = await make_node(**given, secret_keys=(NEW_KEY,))
    await send(node, Payload(b"y"), endpoint_keys=["out"])
    (letter,) = (await dead_letters(node.database)).items
    told = (await dead_letter(node.database, letter.job_id, node.snapshots.ids)).snapshot
    assert (told.state, told.version, told.current_version) == (state, 1, 1)
    if token is None:
        await node.dead_letters.requeue(letter.job_id, "try", snapshot=SnapshotChoice.OLD)
        await until(lambda: receiver.arrivals[-1].body == b"x", "the requeued one")
