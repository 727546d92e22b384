"""Orbit's side of the peer benchmark: an adapter of the peers' protocol (`common.py`).

W1 and W4: one worker drains the jobs of cycles of 100 items, 64 requests in flight; W4 on the
finished jobs of `history.sql`. W2: whole cycles of a run profile whose initiator, three tiers and
normaliser each do one step's work, then one POST. Everything is the program's own: schema,
intake, runner, dispatcher, receipts, fences.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import structlog
from common import Peer, chunks, concurrency, dsn, main, sink_url, step_work, wait_count

from orbit.app import Node, spare_the_collector
from orbit.database.upgrade import upgrade
from orbit.execution.context import ExecutionContext
from orbit.payload import Payload
from orbit.settings import Settings, load_settings

JOBS: dict[str, str] = {}
_PROFILE = {"profile_id": "bench", "label": "Benchmark", "state": "enabled"}


def _step(name: str) -> dict[str, Any]:
    return {"use": f"peer_orbit:{name}"}


_RUN_PROFILE = {
    "run_profile_id": "bench",
    "profile_id": "bench",
    "namespace": "bench",
    "state": "enabled",
    "execution_policy": {
        "initiation": _step("initiate"),
        "tiers": {"tier1": [_step("tier1")], "tier2": [_step("tier2")], "tier3": [_step("tier3")]},
        "normalization": {"use": "peer_orbit:normalize"},
    },
    "distribution_targets": ["sink"],
}


_BULK = {
    "run_profile_id": "bulk",
    "profile_id": "bench",
    "namespace": "bench",
    "state": "enabled",
    "execution_policy": {
        "initiation": _step("gather"),
        "tiers": {},
        "normalization": {"split": "peer_orbit:split", "use": "orbit:no_op"},
    },
    "distribution_targets": ["sink"],
}


async def gather(context: ExecutionContext) -> Payload:
    return Payload(JOBS[context.initiation["trigger"]["idempotencyKey"]].encode(), "text/plain")


def split(payload: Payload, _context: ExecutionContext) -> list[Payload]:
    return [Payload(body.encode(), "application/json") for body in payload.text().splitlines()]


async def initiate(context: ExecutionContext) -> Payload:
    body = JOBS[context.initiation["trigger"]["idempotencyKey"]]
    return _worked(Payload(body.encode(), "application/json"), 0)


async def tier1(payload: Payload, _context: ExecutionContext) -> Payload:
    return _worked(payload, 1)


async def tier2(payload: Payload, _context: ExecutionContext) -> Payload:
    return _worked(payload, 2)


async def tier3(payload: Payload, _context: ExecutionContext) -> Payload:
    return _worked(payload, 3)


async def normalize(batch: Sequence[Payload], _context: ExecutionContext) -> list[Payload]:
    return [_worked(payload, 4) for payload in batch]


def _worked(payload: Payload, number: int) -> Payload:
    return Payload(step_work(payload.text(), number).encode(), payload.content_type)


def settings() -> Settings:
    """A node on the benchmark's database, with the benchmark's sink as its endpoint."""
    folder = Path(tempfile.mkdtemp(prefix="orbit-bench-"))
    (folder / "profiles.json").write_text(json.dumps({"profiles": [_PROFILE]}))
    (folder / "runProfiles.json").write_text(json.dumps({"run_profiles": [_RUN_PROFILE, _BULK]}))
    in_flight = str(concurrency())
    endpoint = {"key": "sink", "url": sink_url(), "token": "t" * 40}
    endpoint["max_concurrency"] = 10_000  # the node's own limit is what counts here
    return load_settings(
        {
            "DATABASE_URL": dsn(),
            "ORBIT_SECRET_KEYS": _secret_key(),
            "ORBIT_CONFIG_DIR": str(folder),
            "ORBIT_CRON_SCHEDULE": "",
            "ORBIT_AUTH": "off",
            "ORBIT_WORKER_CONCURRENCY": in_flight,
            "ORBIT_DISPATCH_CONCURRENCY": in_flight,
            "ORBIT_DISPATCH_ENDPOINTS": json.dumps([endpoint]),
        },
        env_file=None,
    )


def _secret_key() -> str:
    """The same for the process that enqueues and the one that sends."""
    return base64.urlsafe_b64encode(hashlib.sha256(dsn().encode()).digest()).decode()


class OrbitPeer(Peer):
    """Orbit, as one node with the worker's role."""

    name = "orbit"
    packages = ("orbit-control-plane", "psycopg", "httptools")
    settings = {"all": "64 cycles and 64 requests in flight, defaults otherwise"}
    done_sql = "SELECT count(*) FROM delivery_receipt WHERE outcome = 'delivered'"
    cycles_done_sql = "SELECT count(*) FROM value_ledger_entry WHERE state = 'finished'"
    seed_sql = Path(__file__).with_name("history.sql").read_text()

    def setup(self) -> None:
        upgrade(dsn())

    async def open_producer(self) -> None:
        self.node = await self._open()

    async def enqueue(self, jobs: list[dict[str, Any]]) -> None:
        """Cycles of 100 items, carried to dispatch by a node that sends nothing."""
        for number, part in enumerate(chunks(jobs, 100)):
            JOBS[f"part-{number}"] = "\n".join(job["body"] for job in part)
        node = self.node
        await node.start()
        assert node.dispatcher is not None
        await node.dispatcher.stop()
        trigger = node.orchestration.trigger_run_profiles
        await asyncio.gather(*(trigger(["bulk"], idempotency_key=key) for key in JOBS))
        await wait_count("SELECT count(*) FROM dispatch_lease", len(jobs))
        await node.drain()

    async def defer(self, job: dict[str, Any]) -> None:
        payload = Payload(job["body"].encode(), "application/json")
        await self.node.orchestration.trigger_raw(payload=payload, endpoint_keys=["sink"])

    async def open(self) -> None:
        """Before the clock runs: a node, and for W2 its services, which have nothing to do yet."""
        self.node = await self._open()
        if "cycles" in sys.argv:
            await self.node.start()

    async def work(self) -> None:
        await self.node.start()
        await asyncio.Event().wait()  # until it is killed

    async def cycles(self, jobs: list[dict[str, Any]]) -> Node:
        JOBS.update({str(job["id"]): job["body"] for job in jobs})
        trigger = self.node.orchestration.trigger_run_profiles
        await asyncio.gather(*(trigger(["bench"], idempotency_key=key) for key in JOBS))
        await wait_count(self.cycles_done_sql, len(jobs))
        return self.node

    async def _open(self) -> Node:
        node = Node(settings(), frozenset({"worker"}))
        await node.open()
        spare_the_collector()
        return node


if __name__ == "__main__":
    sys.modules["peer_orbit"] = sys.modules["__main__"]
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    main(OrbitPeer, use_uvloop=True)
