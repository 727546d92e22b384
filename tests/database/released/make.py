"""Makes the dump of a released schema with data in it: NNNN.sql.gz, beside this file.

Run once for each release that changes the schema, with that release's program on the path:

    PYTHONPATH=path/to/the/release/src python tests/database/released/make.py

A node of that program, on its own embedded server, ends a cycle, fails one, leaves a dead letter,
and is killed amid a step of a fourth cycle while a job of a fifth waits for its next attempt. What
pg_dump then says is the dump. test_released_schemas.py upgrades it and goes on with the work.
"""

from __future__ import annotations

import gzip
import json
import os
import re
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

from orbit.database import embedded_place
from orbit.database.embedded import EmbeddedServer, erase
from orbit.database.upgrade import HEAD

HERE = Path(__file__).parent
SECRET_KEY = "Y2hhbmdlIG1lOiBrZXkgb2YgdGhlIHJlbGVhc2VkIGQ="
RUN_PROFILES = ("ends", "fails", "refused", "slow", "waits")
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
    """Five run profiles, each of which comes to another state."""
    steps = {"fails": "steps:broken", "slow": "steps:slow"}
    run_profiles = [
        {
            "run_profile_id": name,
            "profile_id": "nova",
            "namespace": "brand-a",
            "state": "enabled",
            "execution_policy": {
                "tiers": {"tier1": [{"use": steps[name]}] if name in steps else []},
                "retry": {"max_attempts": 1},
            },
            "distribution_targets": [{"refused": "refusing", "waits": "closed"}.get(name, "open")],
            "value_tags": {"cost_center": "brand-a"},
        }
        for name in RUN_PROFILES
    ]
    profile = {"profile_id": "nova", "label": "Nova", "state": "enabled"}
    (folder / "config").mkdir(parents=True)
    (folder / "config" / "profiles.json").write_text(json.dumps({"profiles": [profile]}))
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
        }
        node = _start(folder, settings, "up")
        stack.callback(node.kill)
        _wait(lambda: "Orbit is ready" in (folder / "up.log").read_text(), node)
        _start(folder, settings, "trigger").wait(60)
        _wait(lambda: _has_come_to_rest(server.owner_dsn), node)
        node.kill()
        node.wait()
    binaries = embedded_place.find_place(server.home.parent).binaries
    command = [str(binaries / "pg_dump"), "--no-owner", "--dbname", server.owner_dsn]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = re.sub(r"^\\(un)?restrict .*\n", "", text, flags=re.MULTILINE)
    (HERE / f"{HEAD}.sql.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    server.leave()
    erase(folder / ".orbit")
    print(f"{HEAD}.sql.gz: {len(text)} characters")  # noqa: T201


def _start(folder: Path, settings: dict[str, str], *verb: str) -> subprocess.Popen[bytes]:
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    with (folder / f"{verb[0]}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "orbit", *verb],
            cwd=folder,
            env=kept | settings,
            stdout=log,
            stderr=log,
        )


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
