"""The audit trail's pace: facts sealed in a second, and a trail of a million verified.

Facts are written in transactions of some hundred, as settlements write them, and sealed by the
node's own passes; entries are appended in batches. `orbit audit verify` then runs as its users
run it, in a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from typing import Any

from bench.program import Bench
from orbit.audit.sealing import seal
from orbit.audit.trail import Act, append
from orbit.database.embedded import APPLICATION_ROLE
from orbit.database.pool import Database
from orbit.database.upgrade import upgrade

_NODE = "00000000-0000-7000-8000-000000000001"
_PER_TRANSACTION = 250
_PER_APPEND = 1000
_RECEIPTS = b"""INSERT INTO delivery_receipt (namespace, job_id, attempt, endpoint_key, outcome,
    status, digest, size, queue_seconds, connect_seconds, first_byte_seconds, total_seconds, answer,
    lease_number, node_id, started_at)
SELECT 'space', orbit_new_batch(), 1, 'sink', 'delivered', 200, repeat('0', 64), 1024, 0.01, 0.001,
    0.002, 0.003, '', 1, %(node_id)s, now()
FROM generate_series(1, %(count)s)"""


def audit(facts: int = 1_000_000, entries: int = 1_000_000) -> dict[str, Any]:
    """Sealed facts in a second, and how long the whole takes to verify."""
    bench = Bench()
    with bench.database() as connection:
        upgrade(connection.info.dsn, APPLICATION_ROLE)
        found = asyncio.run(_filled(connection.info.dsn, facts, entries))
        began = time.monotonic()
        command = [sys.executable, "-m", "orbit", "audit", "verify", "--json"]
        done = subprocess.run(
            command, env=bench.environment, cwd=bench.folder, capture_output=True, check=False
        )
        found["verify_s"] = round(time.monotonic() - began, 2)
    bench.close()
    if done.returncode != 0:
        raise RuntimeError((done.stdout + done.stderr).decode())
    report = json.loads(done.stdout)
    return {**found, "facts": facts, "entries": entries, "report": report}


async def _filled(dsn: str, facts: int, entries: int) -> dict[str, Any]:
    database = Database(dsn, minimum=1, maximum=2)
    await database.open()
    for _ in range(facts // _PER_TRANSACTION):
        await database.execute(_RECEIPTS, {"node_id": _NODE, "count": _PER_TRANSACTION})
    began, sealed = time.monotonic(), 0
    while sealed < facts:
        sealed += (await seal(database, _NODE)).sealed
    seconds = time.monotonic() - began
    began = time.monotonic()
    act = Act("space", "access.failed", "bench", detail={"source": "10.0.0.1"})
    for _ in range(entries // _PER_APPEND):
        async with database.transaction() as connection:
            await append(connection, *[act] * _PER_APPEND)
    appended = time.monotonic() - began
    await database.close()
    return {
        "sealed_per_s": round(sealed / max(seconds, 1e-9)),
        "appended_per_s": round(entries / max(appended, 1e-9)),
    }
