"""Draining and sharing: what a node does with work in hand when it leaves, or cannot send it."""

# ruff: noqa: D103 - the steps are what a user would write; their names say what they do

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from orbit.app import Node
from orbit.execution.context import ExecutionContext
from orbit.payload import Payload
from tests.conftest import TestServer
from tests.scenario.conftest import (
    Arrival,
    Configure,
    Facts,
    MakeNode,
    Receiver,
    policy,
    run_profile,
    until,
)

HERE = __name__
RECEIPTS = "SELECT attempt, outcome FROM delivery_receipt ORDER BY job_id, attempt"
FREE_LEASES = "SELECT attempt FROM dispatch_lease WHERE node_id IS NULL"


def cut(payload: Payload, context: ExecutionContext) -> Iterator[Payload]:
    return (Payload(b"%d" % number) for number in range(context.options["items"]))


async def hang(payload: Payload, context: ExecutionContext) -> Payload:
    return await asyncio.Future()


def items(count: int) -> dict[str, Any]:
    """A policy that makes so many items."""
    split = {"use": "orbit:no_op", "split": f"{HERE}:cut", "options": {"items": count}}
    return policy(normalization=split)


async def trigger(node: Node, *run_profile_ids: str) -> None:
    for answer in await node.orchestration.trigger_run_profiles(run_profile_ids):
        assert answer.cycle_id, answer.reason


async def enqueue(make_node: MakeNode, facts: Facts, jobs: int, *names: str, **given: Any) -> None:
    """Makes the jobs of cycles, on a node that never sends any."""
    node = await make_node(**given)
    assert node.dispatcher is not None
    node.dispatcher.halt()
    await trigger(node, *names)
    await until(lambda: len(facts(FREE_LEASES)) == jobs, "the jobs")
    await node.drain()


@contextmanager
def locked(owner_dsn: str, table: str, mode: str) -> Iterator[psycopg.Connection[Any]]:
    """Keeps everyone else from a table until the block ends."""
    with psycopg.connect(owner_dsn) as connection:
        connection.execute(f"LOCK TABLE {table} IN {mode} MODE".encode())
        yield connection
        connection.rollback()


def waiters(facts: Facts) -> list[int]:
    """The server's processes that wait for a lock in this database."""
    query = "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
    return [row["pid"] for row in facts(f"{query} AND wait_event_type = 'Lock'")]


class Gate:
    """A receiver's answers, given out one by one."""

    def __init__(self) -> None:
        self._answers = asyncio.Semaphore(0)

    def open(self, count: int = 1) -> None:
        for _ in range(count):
            self._answers.release()

    async def __call__(self, arrival: Arrival) -> None:
        await self._answers.acquire()


class Hanging:
    """Between a node and its database: forwards everything, until it hangs."""

    def __init__(self, dsn: str) -> None:
        self._upstream = conninfo_to_dict(dsn)
        self.is_open = asyncio.Event()
        self.is_open.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = str(self._upstream["host"]), int(self._upstream.get("port") or 5432)
        if host.startswith("/"):
            upstream = await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        else:
            upstream = await asyncio.open_connection(host, port)
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(
                    self._copy(reader, upstream[1]), self._copy(upstream[0], writer)
                )
        finally:
            writer.transport.abort()
            upstream[1].transport.abort()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(1 << 16):
                await self.is_open.wait()
                writer.write(chunk)
                await writer.drain()
        writer.transport.abort()


@asynccontextmanager
async def hanging(dsn: str) -> AsyncIterator[tuple[Hanging, str]]:
    proxy = Hanging(dsn)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    no_tls = {"sslmode": "disable", "gssencmode": "disable"}
    yield proxy, make_conninfo(dsn, host=host, port=port, **no_tls)
    proxy.is_open.set()
    server.close()


# --- draining -----------------------------------------------------------------------------


async def test_answers_seen_before_the_drain_is_over_are_kept(
    make_node: MakeNode, configure: Configure, receiver: Receiver, facts: Facts, owner_dsn: str
) -> None:
    """Only what is still on the wire is cut off; what waits to be committed is waited for."""
    gate = receiver.answers["/out"] = Gate()
    configure(run_profile(execution_policy=items(6)))
    node = await make_node(
        dispatch_endpoints=(receiver.endpoint("out"),), drain_timeout_seconds=0, lease_seconds=600
    )
    await trigger(node, "daily")
    await until(lambda: len(receiver.arrivals) == 6, "the sends")
    with locked(owner_dsn, "delivery_receipt", "EXCLUSIVE"):
        gate.open()
        await until(lambda: len(waiters(facts)) == 1, "a flush")  # the others wait behind it
        gate.open(4)
        assert node.dispatcher is not None
        under_way = node.dispatcher._sending
        await until(lambda: sum(s.is_over for s in under_way.values()) == 5, "the answers")
        draining = asyncio.create_task(node.drain())
        cut_off = receiver.arrivals[5].request
        await until(lambda: cut_off.transport is None, "the end of the last send")
    await draining
    outcomes = sorted(row["outcome"] for row in facts(RECEIPTS))
    assert outcomes == [*["delivered"] * 5, "unknown"]


async def test_nothing_is_claimed_while_a_cycle_uses_up_the_drain(
    make_node: MakeNode, configure: Configure, receiver: Receiver, facts: Facts
) -> None:
    """A send under way ends well, and the next one is left to other nodes, unbegun."""
    gate = receiver.answers["/out"] = Gate()
    stuck = policy(tier1=[f"{HERE}:hang"])
    configure(run_profile(execution_policy=items(2)), run_profile("stuck", execution_policy=stuck))
    node = await make_node(
        dispatch_endpoints=(receiver.endpoint("out", max_concurrency=1),), drain_timeout_seconds=5
    )
    await trigger(node, "stuck", "daily")
    await until(lambda: receiver.arrivals, "the first send")
    draining = asyncio.create_task(node.drain())
    await until(lambda: node.is_draining)
    gate.open(2)
    await draining
    assert facts(RECEIPTS) == [{"attempt": 1, "outcome": "delivered"}]
    assert facts(FREE_LEASES) == [{"attempt": 0}]
    assert len(receiver.arrivals) == 1


async def test_a_database_that_hangs_does_not_hold_up_the_drain(
    make_node: MakeNode, configure: Configure, receiver: Receiver, dsn: str, facts: Facts
) -> None:
    """With a cycle, sends and passes in hand the node ends in its time and a few seconds."""
    gate = receiver.answers["/out"] = Gate()
    stuck = policy(tier1=[f"{HERE}:hang"])
    configure(run_profile(execution_policy=items(3)), run_profile("stuck", execution_policy=stuck))
    async with hanging(dsn) as (proxy, url):
        node = await make_node(
            database_url=url,
            dispatch_endpoints=(receiver.endpoint("out"),),
            drain_timeout_seconds=1,
        )
        await trigger(node, "stuck", "daily")
        await until(lambda: len(receiver.arrivals) == 3, "the sends")
        proxy.is_open.clear()
        gate.open(2)
        began = time.monotonic()
        await node.drain()
        await node.close()
        assert time.monotonic() - began < 30  # the step and the sends would never end
    assert facts(RECEIPTS) == []


async def test_a_part_of_the_drain_that_fails_stops_no_other(
    make_node: MakeNode, configure: Configure, facts: Facts, owner_dsn: str, server: TestServer
) -> None:
    """The leases of cycles cannot be given back; the node leaves all the same."""
    stuck = policy(tier1=[f"{HERE}:hang"])
    configure(run_profile(execution_policy=stuck, distribution_targets=[]))
    node = await make_node()
    await trigger(node, "daily")
    held = "SELECT FROM cycle_lease WHERE node_id IS NOT NULL"
    await until(lambda: facts(held), "the cycle in hand")
    revoke = sql.SQL("REVOKE UPDATE ON cycle_lease FROM {}").format(sql.Identifier(server.app_role))
    with psycopg.connect(owner_dsn) as connection:
        connection.execute(revoke)
    await node.drain()
    assert facts(held)
    assert facts("SELECT FROM node") == []


# --- attempts that never began ------------------------------------------------------------


async def test_an_attempt_that_never_began_is_not_spent(
    make_node: MakeNode, configure: Configure, receiver: Receiver, facts: Facts, owner_dsn: str
) -> None:
    """The connection is lost before the request: the number is given back, and used again."""
    configure(run_profile())
    given = {"dispatch_endpoints": (receiver.endpoint("out"),), "lease_seconds": 600}
    await enqueue(make_node, facts, 1, "daily", **given)
    with locked(owner_dsn, "endpoint_snapshot", "ACCESS EXCLUSIVE") as connection:
        await make_node(**given)
        [waiting] = await until(lambda: waiters(facts), "the first look")
        connection.execute("SELECT pg_terminate_backend(%s)", [waiting])
        await until(lambda: set(waiters(facts)) - {waiting}, "the second look")
    await until(lambda: facts(RECEIPTS), "the receipt")
    assert facts(RECEIPTS) == [{"attempt": 1, "outcome": "delivered"}]


# --- one endpoint beside the others -------------------------------------------------------


@pytest.mark.parametrize(("places", "allowed"), [(64, 5), (8, 100)], ids=["its own", "a share"])
async def test_lanes_that_hang_hold_up_no_other(
    make_node: MakeNode,
    configure: Configure,
    receiver: Receiver,
    facts: Facts,
    places: int,
    allowed: int,
) -> None:
    """A lane has its own places, and all that hang together never have all of the node's."""
    gate = receiver.answers["/stuck"] = Gate()
    names = [f"stuck-{number}" for number in range(4)]
    stuck = (
        run_profile(n, namespace=n, execution_policy=items(20), distribution_targets=["stuck"])
        for n in names
    )
    configure(run_profile(execution_policy=items(40)), *stuck)
    hanging = receiver.endpoint("stuck", max_concurrency=allowed, timeout_seconds=600)
    endpoints = (hanging, receiver.endpoint("out"))
    await enqueue(make_node, facts, 120, "daily", *names, dispatch_endpoints=endpoints)
    await make_node(dispatch_endpoints=endpoints, dispatch_concurrency=places)
    await until(lambda: len(receiver.at("/out")) == 40, "the healthy endpoint's jobs")
    await until(lambda: len(facts(RECEIPTS)) >= 40, "their receipts")
    assert len(receiver.at("/stuck")) <= min(allowed * len(names), places - 1)
    gate.open(80)
    await until(lambda: len(facts(RECEIPTS)) == 120, "the others")
