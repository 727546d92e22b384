"""services/dispatcher.py on a database: what it gives back, and what it knows best."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psycopg
import pytest
from cryptography.fernet import Fernet

from orbit.clock import DatabaseClock
from orbit.database.pool import Database
from orbit.endpoints import Breaker, Endpoint
from orbit.execution.context import Stage
from orbit.execution.dispatch import ClaimedJob, Lane, LaneKey, Settlement
from orbit.execution.http1 import WITHHELD
from orbit.execution.lapse import Hold
from orbit.execution.memory import PayloadMemory
from orbit.execution.recorder import Checkpoint, StageResult
from orbit.execution.snapshots import Snapshots
from orbit.execution.wire import Outcome, Outgoing, Wire, WireResult
from orbit.governance.fence import Fences
from orbit.payload import Payload
from orbit.services.dispatcher import Dispatcher
from orbit.vault import Vault
from tests.chaos.harness import eventually
from tests.database.engine import DELIVERED, FAILED, Worker, count, expire, only

LANE = ("brand-a", "one")
PLACES = 4
BREAKER = Breaker(failures=3, hold_seconds=600.0, longest_hold_seconds=600.0)
ENDPOINT = Endpoint("one", "http://127.0.0.1:9/", max_concurrency=100, breaker=BREAKER)
VAULT = Vault([Fernet.generate_key().decode()])


class _Receiver(Wire):
    """Has what began to be sent, and answers when it is told to."""

    def __init__(self) -> None:
        self.arrived: list[str] = []
        self.answers: asyncio.Queue[WireResult] = asyncio.Queue()

    async def send(self, outgoing: Outgoing, hold: Hold | None = None) -> WireResult:
        """The next answer; none if the attempt may not begin."""
        assert hold is not None
        if not hold.may_begin():
            return WireResult(Outcome.NOT_SENT, cause=WITHHELD)
        self.arrived.append(outgoing.headers["Orbit-Job-Id"])
        return await self.answers.get()

    async def has(self, number: int) -> None:
        """Returns when so many arrived."""

        async def look() -> bool:
            return len(self.arrived) >= number

        await eventually(look, f"{number} arrived")


@dataclass(frozen=True, slots=True)
class _Node:
    worker: Worker
    receiver: _Receiver
    fences: Fences
    dispatcher: Dispatcher

    @classmethod
    def new(cls, database: Database, clock: DatabaseClock) -> _Node:
        worker, receiver, fences = (
            Worker.new(database, clock, endpoint=ENDPOINT),
            _Receiver(),
            Fences(),
        )
        dispatcher = Dispatcher(
            database,
            worker.queue,
            Snapshots(database, VAULT, [ENDPOINT], 4),
            receiver,
            PayloadMemory(1 << 20),
            clock,
            fences,
            concurrency=PLACES,
            lease_seconds=600.0,
            poll_seconds=600.0,
        )
        return cls(worker, receiver, fences, dispatcher)

    async def queue(self, number: int) -> None:
        """One cycle's jobs."""
        cycle = await self.worker.begin()
        items = [Payload(b"an item", "text/plain")] * number
        jobs = await self.dispatcher._snapshots.jobs(cycle, items, ["one"])
        stages = (Stage.NORMALIZATION_COMPLETE, Stage.DISPATCH_ENQUEUED)
        made = StageResult(cycle, [Checkpoint(stage) for stage in stages], items=items, jobs=jobs)
        await self.worker.recorder.record(made)
        await self.worker.queue.lanes()

    async def close(self) -> None:
        """Ends what is under way."""
        for _ in range(self.dispatcher.in_flight):
            self.receiver.answers.put_nowait(DELIVERED)
        await self.dispatcher.drain(60)


@pytest.fixture
async def node(database: Database, clock: DatabaseClock) -> _Node:
    """A node that sends, up to four at once, when it is told to look."""
    return _Node.new(database, clock)


async def waiting(database: Database) -> int:
    """Jobs that nobody holds, and of which no attempt was made."""
    return await count(database, "dispatch_lease", "node_id IS NULL AND attempt = 0")


async def test_a_halt_takes_no_place_from_the_node(node: _Node, database: Database) -> None:
    """Not even of an attempt that was to begin in the very turn in which the halt is heard of."""
    await node.queue(6)
    await node.dispatcher.run_once()
    assert node.dispatcher.in_flight == PLACES
    node.fences.learn([{"namespace": "brand-a", "epoch": 1}])
    await node.dispatcher.recall()
    assert node.receiver.arrived == []
    assert (node.dispatcher.in_flight, node.dispatcher._places.free) == (0, PLACES)
    assert await waiting(database) == 6


async def test_a_node_never_ends_as_lost_what_it_holds(
    node: _Node, database: Database, clock: DatabaseClock
) -> None:
    """The database was away for longer than a lease: what was delivered is written as delivered."""
    await node.queue(1)
    await node.dispatcher.run_once()
    await node.receiver.has(1)
    is_back, flush = asyncio.Event(), node.worker.queue._settlements._flush

    async def late(entries: Sequence[Settlement]) -> Sequence[None]:
        await is_back.wait()
        return await flush(entries)

    node.worker.queue._settlements._flush = late
    node.receiver.answers.put_nowait(DELIVERED)
    await expire(database, "dispatch_lease")
    for sending in node.dispatcher._sending.values():
        sending.expires = clock.monotonic() - 1
    node.dispatcher._recover_at = 0.0
    await node.dispatcher.run_once()
    assert await Worker.new(database, clock).queue.recover(clock.now()) == 0
    is_back.set()
    await node.close()
    assert (await only(database, "SELECT outcome FROM delivery_receipt"))["outcome"] == "delivered"


async def test_others_write_first_what_they_know(
    node: _Node, database: Database, clock: DatabaseClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the database was away, a node waits before it ends what others seem to have lost."""
    await node.queue(1)
    (job,) = await Worker.new(database, clock, endpoint=ENDPOINT).take("one")
    queue, lanes = node.worker.queue, node.worker.queue.lanes

    async def away() -> list[Lane]:
        raise psycopg.OperationalError("the connection is lost")

    monkeypatch.setattr(queue, "lanes", away)
    with pytest.raises(psycopg.OperationalError):
        await node.dispatcher.run_once()
    monkeypatch.setattr(queue, "lanes", lanes)
    await expire(database, "dispatch_lease")
    await node.dispatcher.run_once()
    assert await count(database, "delivery_receipt") == 0
    node.dispatcher._recover_at = 0.0
    await node.dispatcher.run_once()
    assert await count(database, "delivery_receipt", "outcome = 'unknown'") == 1
    node.dispatcher.wake()
    await node.dispatcher.run_once()
    await node.receiver.has(1)
    assert node.receiver.arrived == [job.job_id]
    await node.close()


async def test_what_was_claimed_ahead_waits_while_the_lane_is_held(
    node: _Node, database: Database, clock: DatabaseClock
) -> None:
    """On the node that saw the breaker open, and on others when they look: no attempt is spent."""
    other = _Node.new(database, clock)
    await node.queue(40)
    await node.dispatcher._claim({LANE: 20})
    await other.dispatcher._claim({LANE: 20})
    await node.receiver.has(PLACES)
    await other.receiver.has(PLACES)
    for _ in range(BREAKER.failures):
        node.receiver.answers.put_nowait(FAILED)

    async def is_open() -> bool:
        return await count(database, "lane", "probe_at IS NOT NULL") == 1

    await eventually(is_open, "the breaker is open")
    await node.dispatcher.run_once()
    await other.dispatcher.run_once()  # looks, and lets them begin no more
    await other.dispatcher.run_once()  # gives them back
    begun = len(node.receiver.arrived) + len(other.receiver.arrived)
    assert 2 * PLACES <= begun <= 2 * PLACES + BREAKER.failures
    assert await waiting(database) == 40 - begun
    assert node.dispatcher.in_flight == other.dispatcher.in_flight == PLACES
    await node.close()
    await other.close()
    assert await count(database, "delivery_receipt") == begun


@pytest.mark.parametrize("is_sure", [True, False])
async def test_a_claim_whose_answer_is_lost_is_given_back(
    node: _Node, database: Database, monkeypatch: pytest.MonkeyPatch, *, is_sure: bool
) -> None:
    """Unsent, and its number with it; not if one that was sent may be among them."""
    await node.queue(2 * PLACES)
    await node.dispatcher._claim({LANE: PLACES})
    await node.receiver.has(PLACES)
    claim = node.worker.queue.claim

    async def lost(rooms: Mapping[LaneKey, int], places: int) -> list[ClaimedJob]:
        await claim(rooms, places)
        raise psycopg.OperationalError("the connection is lost")

    monkeypatch.setattr(node.worker.queue, "claim", lost)
    if not is_sure:
        node.dispatcher._unsure_until = math.inf
    with pytest.raises(psycopg.OperationalError):
        await node.dispatcher._claim({LANE: PLACES})
    assert await waiting(database) == (PLACES if is_sure else 0)
    assert await count(database, "dispatch_lease", "attempt = 1") == PLACES * (1 if is_sure else 2)
    await node.close()
    assert await count(database, "delivery_receipt", "outcome = 'delivered'") == PLACES
