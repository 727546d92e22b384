"""Makes the dump of a released schema with data in it: NNNN.sql.gz, beside this file.

Run once for each release that changes the schema, with that release's program on the path:

    PYTHONPATH=path/to/the/release/src python tests/database/released/make.py

A node of that program, on its own embedded server, halts a namespace, has a profile turned off and
another changed on probation, a second key and a reader whose place is stored. It ends a cycle,
fails one, leaves a dead letter, and is killed amid a step of a fourth cycle while a job of a fifth
waits for its next attempt. What pg_dump then says is the dump, with the key above it.
test_released_schemas.py upgrades it and goes on with the work.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

from orbit.database import embedded_place
from orbit.database.embedded import EmbeddedServer, erase
from orbit.database.upgrade import HEAD
from orbit.telemetry.catalogue import EventType
from orbit.telemetry.emission import Event, emit

HERE = Path(__file__).parent
SECRET_KEY = "Y2hhbmdlIG1lOiBrZXkgb2YgdGhlIHJlbGVhc2VkIGQ="
RUN_PROFILES = ("ends", "fails", "refused", "slow", "waits")
GOVERNED = {
    "halted": ("nova", "brand-b"),
    "off": ("luna", "brand-a"),
    "moved": ("terra", "brand-c"),
}
"""More run profiles, of which none has a cycle: each one's profile and namespace."""
STEPS = '''
"""What the cycles of a released schema do."""

import asyncio
import pathlib


async def broken(payload, context):
    raise RuntimeError("this step is broken")


async def slow(payload, context):
    pathlib.Path("slow-began").touch()
    while not pathlib.Path("go").exists():
        await asyncio.sleep(0.02)
    return payload
'''


def write_project(folder: Path) -> None:
    """Five run profiles, each of which comes to another state, and three that are governed."""
    steps = {"fails": "steps:broken", "slow": "steps:slow"}
    placed = dict.fromkeys(RUN_PROFILES, ("nova", "brand-a")) | GOVERNED
    run_profiles = [
        {
            "run_profile_id": name,
            "profile_id": profile_id,
            "namespace": namespace,
            "state": "enabled",
            "execution_policy": {
                "tiers": {"tier1": [{"use": steps[name]}] if name in steps else []},
                "retry": {"max_attempts": 1},
            },
            "distribution_targets": [{"refused": "refusing", "waits": "closed"}.get(name, "open")],
            "value_tags": {"cost_center": "brand-a"},
        }
        for name, (profile_id, namespace) in placed.items()
    ]
    allowed = {"path": "/execution_rules/intensity", "minimum": 1, "maximum": 10, "step": 2}
    moved = {
        "execution_rules": {"intensity": 5},
        "autonomy": {"allow": [{**allowed, "per_day": 4, "on": {"low_performance": -1}}]},
    }
    profiles = [
        {"profile_id": name, "label": name, "state": "enabled", **more}
        for name, more in (("nova", {}), ("luna", {}), ("terra", moved))
    ]
    (folder / "config").mkdir(parents=True)
    (folder / "config" / "profiles.json").write_text(json.dumps({"profiles": profiles}))
    text = json.dumps({"run_profiles": run_profiles})
    (folder / "config" / "runProfiles.json").write_text(text)
    (folder / "steps.py").write_text(STEPS)


def endpoints(good: str, refusing: str, closed: str) -> str:
    """ORBIT_DISPATCH_ENDPOINTS; each has a token, which is stored encrypted."""
    urls = {"open": good, "refusing": refusing, "closed": closed}
    return json.dumps(
        [
            {"key": key, "url": url, "token": "a-token", "permanent_statuses": [422]}
            for key, url in urls.items()
        ]
    )


def main() -> None:
    """Makes the dump with the program that `import orbit` finds."""
    outer = Path(tempfile.mkdtemp(prefix="orbit-released-"))
    outer.chmod(0o755)
    folder = outer / "project"
    write_project(folder)
    server = EmbeddedServer.start(folder / ".orbit")
    with ExitStack() as stack:
        for undo in (lambda: shutil.rmtree(outer), lambda: erase(folder / ".orbit"), server.leave):
            stack.callback(undo)
        ports = [_free_port() for _ in range(3)]
        for port, status in ((ports[1], "200"), (ports[2], "422")):
            options = ("--port", str(port), "--status", status, "--store", f"received-{status}")
            stack.callback(_start(folder, {}, "receiver", *options).kill)
        urls = [f"http://127.0.0.1:{port}/posts" for port in (*ports[1:], 9)]
        settings = {
            "PORT": str(ports[0]),
            "ORBIT_CRON_SCHEDULE": "",
            "ORBIT_SECRET_KEYS": SECRET_KEY,
            "ORBIT_DISPATCH_ENDPOINTS": endpoints(*urls),
            "ORBIT_DISPATCH_RETRY_BASE_SECONDS": "60",
            "ORBIT_PHASE4_ENABLED": "true",
            "ORBIT_PHASE4_ALLOW_MUTATION": "true",
            "ORBIT_PROBATION_HOURS": "8760",
            "ORBIT_TELEMETRY_RETENTION_DAYS": "0",
        }
        node = _start(folder, settings, "up")
        stack.callback(node.wait)
        stack.callback(node.kill)
        _wait(lambda: "Orbit is ready" in (folder / "up.log").read_text(), node)
        asyncio.run(_tell_a_past(server.owner_dsn))
        key = _govern(folder, settings, node)
        _wait(lambda: _is_on_probation(server.owner_dsn), node)
        _start(folder, settings, "trigger", *RUN_PROFILES).wait(60)
        _wait(lambda: _has_come_to_rest(server.owner_dsn), node)
        node.kill()
        node.wait()
        binaries = embedded_place.find_place(server.home.parent).binaries
        command = [str(binaries / "pg_dump"), "--no-owner", "--dbname", server.owner_dsn]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        text = re.sub(r"^\\(un)?restrict .*\n", "", text, flags=re.MULTILINE)
        text = f"-- key: {key}\n{text}"
        (HERE / f"{HEAD}.sql.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    print(f"{HEAD}.sql.gz: {len(text)} characters")  # noqa: T201


def _start(folder: Path, settings: dict[str, str], *verb: str) -> subprocess.Popen[bytes]:
    command, environment = _command(settings, *verb)
    with (folder / f"{verb[0]}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


def _command(settings: dict[str, str], *verb: str) -> tuple[list[str], dict[str, str]]:
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    return [sys.executable, "-m", "orbit", *verb], kept | settings


async def _tell_a_past(dsn: str) -> None:
    """The events that terra's cycles would have left: a hundred as ever, then some far worse."""
    connect = psycopg.AsyncConnection.connect(dsn, row_factory=dict_row)
    async with await connect as connection:
        found = await connection.execute(b"SELECT revision FROM config_revision")
        [active] = await found.fetchall()
        delivered = [9 - (number % 10 == 0) for number in range(100)] + [3] * 40
        told = [{"jobs": 10, "delivered": one, **active} for one in delivered]
        kind = EventType.EXECUTION_FINISHED
        await emit(connection, *[Event("brand-c", kind, one, "terra") for one in told])


def _govern(folder: Path, settings: dict[str, str], node: subprocess.Popen[bytes]) -> str:
    """What people do by the command line, two where it takes two; the second one's key."""

    def ok(*verb: str, **given: str) -> str:
        command, environment = _command(settings | given, *verb)
        told = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        if told.returncode:
            raise SystemExit(f"{verb}: {told.stdout}{told.stderr}")
        return told.stdout

    key = ok("keys", "create", "bob", "--scope", "admin").strip()
    ok("halt", "brand-b", "--reason", "wrong prices")
    ok("profiles", "disable", "luna", "--reason", "nonsense")
    ok("telemetry", "consumers", "add", "reader")
    read = ("telemetry", "replay", "--namespace", "brand-b", "--consumer", "reader")
    _wait(lambda: "namespace_halted" in ok(*read), node)
    ok("signals", "terra", "--compute")
    made = json.loads(ok("proposals", "make", "terra", "--json"))
    [proposal] = [proposal for one in made["items"] for proposal in one["made"]]
    ok("proposals", "approve", proposal, ORBIT_API_KEY=key)
    ok("autonomy", "arm", "terra", "--reason", "calm")
    return key


def _is_on_probation(dsn: str) -> bool:
    query = b"SELECT count(*) FROM profile_overlay WHERE origin = 'autonomy'"
    with psycopg.connect(dsn) as connection:
        return connection.execute(query).fetchone() == (1,)


def _has_come_to_rest(dsn: str) -> bool:
    """One ended, one failed, one dead letter, one in a step, one tried in vain."""
    queries = (
        "SELECT count(*) FROM cycle_status WHERE state = 'finished'",
        "SELECT count(*) FROM cycle_status WHERE state = 'failed'",
        "SELECT count(*) FROM dead_letter_dispatch",
        "SELECT count(*) FROM delivery_receipt WHERE outcome = 'not_sent'",
    )
    with psycopg.connect(dsn) as connection:
        counts = [connection.execute(query.encode()).fetchone() for query in queries]
    return [row and row[0] for row in counts] == [2, 1, 1, 1]


def _wait(condition: Callable[[], Any], node: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if node.poll() is not None or time.monotonic() > deadline:
            raise SystemExit("the node ended, or did not come so far")
        time.sleep(0.05)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
