"""A backup is restored: what people did since is undone, and the guide's steps do it again.

The backup is pg_dump's, taken while a cycle waits that any node would carry on.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from orbit.database import embedded_place
from orbit.governance.actor import actor_here
from orbit.governance.halt import Order
from orbit.payload import Payload
from tests.conftest import TestServer
from tests.scenario.access import asking, key_of
from tests.scenario.conftest import MakeNode, Receiver, ended, send
from tests.scenario.test_halting import orbit

ANN = Order("brand", "ann", "key-1", "wrong prices")


@pytest.fixture
def empty(server: TestServer) -> Iterator[str]:
    """The name of a database with nothing in it."""
    name = f"orbit_restored_{os.getpid()}"
    server.run(f"CREATE DATABASE {name}")
    yield name
    server.run(f"DROP DATABASE {name} WITH (FORCE)")


async def run(program: Path, dsn: str, *arguments: str, given: bytes = b"") -> bytes:
    """What a program of PostgreSQL's prints of a database."""
    process = await asyncio.create_subprocess_exec(
        *(str(program), "--dbname", dsn, *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, error = await process.communicate(given)
    assert process.returncode == 0, error
    return out


async def test_a_restore_sends_nothing_and_lets_no_revoked_key_in(
    server: TestServer,
    empty: str,
    make_node: MakeNode,
    receiver: Receiver,
    dsn: str,
    owner_dsn: str,
    tmp_path: Path,
) -> None:
    """By the steps of docs/operations.md: halted and revoked since the backup, and so again."""
    binaries = embedded_place.find_place(tmp_path).binaries
    given = {"auth": "on", "dispatch_endpoints": (receiver.endpoint("out"),)}
    lost = await make_node(is_started=False, **given)
    stolen = await key_of(lost, "operator")
    waiting = await lost.orchestration.trigger_raw(
        namespace="brand", payload=Payload(b"wrong"), endpoint_keys=["out"]
    )
    backup = await run(binaries / "pg_dump", owner_dsn)
    await lost.brake.halt(ANN)
    await lost.keys.revoke(actor_here(), stolen.key_id, "stolen")

    strict = ("--no-psqlrc", "--quiet", "--set", "ON_ERROR_STOP=1")
    await run(binaries / "psql", server.owner(empty), *strict, given=backup)
    restored = server.app(empty)
    assert json.loads(await orbit(restored, "status", "--json"))["haltedNamespaces"] == []
    (good,) = json.loads(await orbit(restored, "keys", "list", "--direct", "--json"))["items"]
    assert (good["keyId"], good["state"]) == (stolen.key_id, "good")
    done = json.loads(await orbit(dsn, "audit", "ls", "--json"))["items"]
    halted = {one["namespace"] for one in done if one["action"] == "halt"}
    revoked = {
        one["subject"].removeprefix("key ") for one in done if one["action"] == "key.revoked"
    }
    assert (halted, revoked) == ({"brand"}, {stolen.key_id})
    await orbit(restored, "halt", *halted, "--direct")
    await orbit(restored, "keys", "revoke", *revoked, "--direct")

    node = await make_node(database_url=restored, **given)
    other = await send(node, Payload(b"right"), namespace="elsewhere", endpoint_keys=["out"])
    assert other["state"] == "finished"
    assert [one.body for one in receiver.arrivals] == [b"right"]
    async with asking(node, stolen) as thief:
        assert (await thief.get("/status")).status_code == 401
    await node.brake.resume(ANN)
    assert (await ended(node, waiting.cycle_id))["state"] == "finished"
    assert [one.body for one in receiver.arrivals] == [b"right", b"wrong"]
