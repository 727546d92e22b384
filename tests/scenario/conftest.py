"""What scenarios share: real nodes on a fresh database, a real receiver, and moved time.

A node is the whole program without its API. Its steps are functions of the test modules. Facts
are read as the database's owner, so that a test sees what any user's query would see.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from aiohttp import web
from cryptography.fernet import Fernet
from psycopg.rows import dict_row

from orbit.app import Node
from orbit.database.pool import Database
from orbit.payload import Payload
from orbit.services.janitor import Janitor
from orbit.services.scheduler import Scheduler
from orbit.settings import Endpoint, Settings

DEADLINE_SECONDS = 60  # a test waits so long only when something is wrong
SECRET_KEY = Fernet.generate_key().decode()

Answer = Callable[["Arrival"], Awaitable[web.StreamResponse | None]]


@dataclass(frozen=True)
class Arrival:
    """A request as it came in."""

    request: web.Request
    body: bytes

    @property
    def path(self) -> str:
        return self.request.path

    @property
    def headers(self) -> Mapping[str, str]:
        return self.request.headers


class Receiver:
    """A real HTTP server that keeps what it gets; `answers` says what a path does."""

    def __init__(self) -> None:
        self.arrivals: list[Arrival] = []
        self.answers: dict[str, Answer] = {}
        self.url = ""

    def at(self, path: str) -> list[Arrival]:
        """What came to a path."""
        return [arrival for arrival in self.arrivals if arrival.path == path]

    def endpoint(self, key: str, path: str | None = None, **given: Any) -> Endpoint:
        """An endpoint of this server."""
        return Endpoint(key=key, url=self.url + (path or f"/{key}"), **given)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        arrival = Arrival(request, await request.read())
        self.arrivals.append(arrival)
        answer = self.answers.get(arrival.path)
        response = None if answer is None else await answer(arrival)
        return response or web.Response()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """A receiver on a free port of the loopback."""
    found = Receiver()
    application = web.Application(client_max_size=1 << 30)
    application.router.add_route("*", "/{path:.*}", found.handle)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    found.url = f"http://{host}:{port}"
    yield found
    await runner.cleanup()


def profile(profile_id: str = "nova", **given: Any) -> dict[str, Any]:
    """A profile as a file has it."""
    return {"profile_id": profile_id, "label": profile_id, "state": "enabled", **given}


def run_profile(run_profile_id: str = "daily", **given: Any) -> dict[str, Any]:
    """A run profile as a file has it, to the endpoint `out` unless told otherwise."""
    return {
        "run_profile_id": run_profile_id,
        "profile_id": "nova",
        "namespace": "brand",
        "state": "enabled",
        "distribution_targets": ["out"],
        **given,
    }


def policy(**tiers: Any) -> dict[str, Any]:
    """An execution policy with quick retries; tiers are lists of steps or of `module:name`."""
    names = ("tier1", "tier2", "tier3")
    found = {name: list(map(_step, tiers.pop(name))) for name in names if name in tiers}
    quick = {"max_attempts": 1, "base_seconds": 0.01, "cap_seconds": 0.02}
    return {"tiers": found, "retry": quick, **tiers}


def _step(step: str | dict[str, Any]) -> dict[str, Any]:
    return {"use": step} if isinstance(step, str) else step


Configure = Callable[..., None]


@pytest.fixture
def configure(config_dir: Path) -> Configure:
    """Writes the configuration files: run profiles, and profiles (default: nova)."""

    def write(
        *run_profiles: Mapping[str, Any], profiles: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        found = {"profiles": [profile()] if profiles is None else list(profiles)}
        (config_dir / "profiles.json").write_text(json.dumps(found))
        text = json.dumps({"run_profiles": list(run_profiles)})
        (config_dir / "runProfiles.json").write_text(text)

    return write


MakeNode = Callable[..., Awaitable[Node]]


@pytest.fixture
async def make_node(dsn: str, config_dir: Path) -> AsyncIterator[MakeNode]:
    """Opens nodes on the fresh database, started unless told otherwise; ends them all."""
    nodes: list[Node] = []

    async def make(*, is_started: bool = True, **given: Any) -> Node:
        node = Node(Settings(**_defaults(dsn, config_dir) | given))
        nodes.append(node)
        await node.open()
        if is_started:
            await node.start()
        return node

    yield make
    for node in nodes:
        if node.is_ready:
            await node.drain()
        await node.close()


def _defaults(dsn: str, config_dir: Path) -> dict[str, Any]:
    return {
        "database_url": dsn,
        "secret_keys": (SECRET_KEY,),
        "config_dir": config_dir,
        "auth": "off",
        "cron_schedule": "",
        "poll_seconds": 0.05,
        "drain_timeout_seconds": 0.2,
        "dispatch_retry_base_seconds": 0.01,
        "dispatch_retry_cap_seconds": 0.05,
        "database_pool_max": 4,
    }


Facts = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def facts(owner_dsn: str) -> Facts:
    """Runs a query as the database's owner; its rows, with ids as text."""

    def query(statement: str, *values: Any) -> list[dict[str, Any]]:
        with psycopg.connect(owner_dsn, autocommit=True, row_factory=dict_row) as connection:
            connection.adapters.register_loader("uuid", psycopg.types.string.TextLoader)
            return connection.execute(statement.encode(), values or None).fetchall()

    return query


SetTime = Callable[..., None]


@pytest.fixture
def set_time(owner_dsn: str) -> SetTime:
    """Sets the database's time, which goes on from there, unless it `is_still`."""

    def to(at: datetime, *, is_still: bool = False) -> None:
        with psycopg.connect(owner_dsn, autocommit=True) as connection:
            now = connection.execute("SELECT statement_timestamp()").fetchone()[0]  # type: ignore[index]
            then = (
                "{}::timestamptz" if is_still else "statement_timestamp() + ({}::timestamptz - {})"
            )
            connection.execute(
                psycopg.sql.SQL(
                    "CREATE OR REPLACE FUNCTION orbit_now() RETURNS timestamptz LANGUAGE sql "
                    f"STABLE PARALLEL SAFE RETURN {then}"
                ).format(at, now)
            )

    return to


async def until(condition: Callable[[], Any], what: str = "the condition") -> Any:
    """The condition's first true value; fails after the deadline."""
    end = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < end:
        found = condition()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        await asyncio.sleep(0.01)
    raise AssertionError(f"{what} did not come within {DEADLINE_SECONDS} s")


async def ended(node: Node, cycle_id: str) -> dict[str, Any]:
    """The row of `cycle_status` once the cycle has ended."""
    query = b"SELECT * FROM cycle_status WHERE cycle_id = %s AND state <> 'running'"
    found = await until(
        lambda: node.database.fetch_one(query, [cycle_id]), f"the end of cycle {cycle_id}"
    )
    return dict(found)


async def run(node: Node, run_profile_id: str = "daily") -> dict[str, Any]:
    """Triggers a run profile; its cycle's row once it has ended."""
    [answer] = await node.orchestration.trigger_run_profiles([run_profile_id])
    assert answer.cycle_id, answer.reason
    return await ended(node, answer.cycle_id)


async def send(node: Node, payload: Payload | None, **given: Any) -> dict[str, Any]:
    """Triggers a raw cycle; its row once it has ended."""
    accepted = await node.orchestration.trigger_raw(payload=payload, **given)
    return await ended(node, accepted.cycle_id)


async def scheduler_of(node: Node) -> Scheduler:
    """The scheduler of an opened node that is not started, with partitions and configuration."""
    await Janitor(node.database, fact_retention_days=0).run_once()
    await node.configuration.propose(node.orchestration.read_files())
    return Scheduler(
        node.database,
        node.configuration,
        node.clock,
        node.settings,
        node.node_id,
        lambda: None,
    )


async def decide_all(scheduler: Scheduler) -> int:
    """Passes until the scheduler may rest; how many passes there were."""
    for count in range(1, 1000):
        if await scheduler.run_once() > 0:
            return count
    raise AssertionError("the scheduler never rests")


async def database_now(database: Database) -> datetime:
    """The database's time."""
    row = await database.fetch_one(b"SELECT orbit_now() AS now")
    assert row is not None
    at: datetime = row["now"]
    return at.astimezone(UTC)
