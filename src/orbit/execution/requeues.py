"""Bulk requeues that take their time: a few canaries first, then so many a second.

Design note. A batch is a fact that a person made; its lease says who may do the next step. A step
is claimed and committed, thought out without a lock, and then done in one transaction that first
locks the lease by number and node: its new jobs, how far the batch is, and when it goes on. So a
worker may die anywhere: the next one begins where the last commit ended, and nothing is requeued
twice, since a decision on a dead letter has its key, whichever batch or person makes it.

While its namespace is halted a batch rests: its steps are not claimed.

A batch never takes dead letters younger than itself, so what it brings back and what dies again
is not its own food. It refuses to go on after a failure unless told so, and ends with a fact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import structlog

from orbit.audit.trail import Act, append
from orbit.clock import Clock, new_id
from orbit.database.pool import Connection, Database
from orbit.database.queries import array, load
from orbit.errors import NotFound, NotHere, Refused
from orbit.execution.dead_letters import (
    DeadLetters,
    Found,
    Requeued,
    Selection,
    SnapshotChoice,
    check_reason,
    requeue_acts,
)

SQL = load("requeues")
NODE_SQL = load("node")
TICK_SECONDS = 1.0
_ROUNDING = 1e-9
LARGEST_STEP = 1000
_ELSEWHERE_SECONDS = 5.0  # until another try at what this node could not do

log = structlog.get_logger(__name__)


class Phase(StrEnum):
    """Whether a batch still waits for its canaries."""

    CANARY = "canary"
    FLOWING = "flowing"


class BatchState(StrEnum):
    """How a batch ended; while it has no end it is running."""

    FINISHED = "finished"
    STOPPED = "stopped"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Pace:
    """How a batch goes on.

    `canary` jobs go first, and all have to be delivered before any other; 0 is none. `rate` is in
    jobs per second, None without limit. With `is_stopping` the first attempt that ends otherwise
    than delivered stops the batch; without it only a canary that dies does.
    """

    canary: int = 0
    rate: float | None = None
    is_stopping: bool = True
    size_limit: int | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a batch is; `is_pending` while a job of it is under way.

    `elapsed_seconds` are those that the rate counts.
    """

    phase: Phase
    requeued: int
    is_exhausted: bool
    is_pending: bool
    elapsed_seconds: float


@dataclass(frozen=True, slots=True)
class End:
    """The batch ends; `job_id` is the job that stopped it."""

    state: BatchState
    why: str
    job_id: str | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """The batch requeues so many (0: it only waits) and rests.

    `owed_seconds` is the time that the rate has not used up.
    """

    phase: Phase
    count: int
    rest_seconds: float
    owed_seconds: float = 0.0


def next_move(pace: Pace, progress: Progress) -> Step | End:
    """What a batch that nothing has stopped does next."""
    left = LARGEST_STEP
    if pace.size_limit is not None:
        left = min(left, pace.size_limit - progress.requeued)
    is_through = progress.is_exhausted or left <= 0
    if progress.phase is Phase.CANARY:
        canaries = min(left, pace.canary - progress.requeued)
        if canaries > 0 and not is_through:
            return Step(Phase.CANARY, canaries, 0.0)
        if progress.is_pending:
            return Step(Phase.CANARY, 0, TICK_SECONDS)
    if is_through:
        if progress.is_pending:
            return Step(progress.phase, 0, TICK_SECONDS)
        return End(BatchState.FINISHED, "every dead letter of the selection was gone through")
    return _flow(pace.rate, left, progress.elapsed_seconds)


def _flow(rate: float | None, left: int, elapsed_seconds: float) -> Step:
    """What the rate allows. A worker that comes late makes up for a tick at most, or one job."""
    if rate is None:
        return Step(Phase.FLOWING, left, 0.0)
    tokens = min(rate * elapsed_seconds, max(1.0, rate * TICK_SECONDS))
    # rate * (1 / rate) may fall short of 1 by a rounding: such a token is whole.
    count = min(left, int(tokens + _ROUNDING))
    owed_seconds = max(0.0, tokens - count) / rate
    return Step(Phase.FLOWING, count, max(TICK_SECONDS, 1 / rate) - owed_seconds, owed_seconds)


class Requeues:
    """Begins, cancels and carries on batches.

    Args:
        lease_seconds: how long a step may take before another node does it.
    """

    def __init__(
        self,
        database: Database,
        clock: Clock,
        letters: DeadLetters,
        node_id: str,
        lease_seconds: float,
    ) -> None:
        self._database, self._clock, self._letters = database, clock, letters
        self._node_id, self._lease_seconds = node_id, lease_seconds

    async def begin(
        self,
        selection: Selection,
        reason: str,
        pace: Pace,
        *,
        snapshot: SnapshotChoice = SnapshotChoice.CURRENT,
        asked_by: str | None = None,
    ) -> tuple[str | None, Found]:
        """A new batch's id, and what it found: dead letters from before now.

        There is no batch if nothing matches. Raises RequestInvalid (no reason), NamespaceHalted,
        and Refused if an endpoint is gone.
        """
        check_reason(reason)
        await self._letters.refuse_while_halted(selection.namespace)
        row = await self._database.fetch_one(NODE_SQL.now)
        assert row is not None
        until = min(selection.until, row["now"]) if selection.until else row["now"]
        params = {**selection.params, "until": until}
        found = await self._letters.count(Selection(**params))
        if not found.matching:
            return None, found
        self._letters.check_endpoints(found.endpoint_keys, snapshot)
        batch_id = new_id(self._clock.now())
        params |= {
            "batch_id": batch_id,
            "reason": reason,
            "asked_by": asked_by,
            "snapshot": snapshot.value,
            "canary": pace.canary,
            "rate": pace.rate,
            "is_stopping": pace.is_stopping,
            "size_limit": pace.size_limit,
            "matching": found.matching,
            "node_id": self._node_id,
            "owed_seconds": max(TICK_SECONDS, 1 / pace.rate) if pace.rate else 0.0,
        }
        async with self._database.batch() as connection:
            await connection.execute(SQL.insert_batch, params)
            await append(connection, _begun(params, asked_by))
        return batch_id, found

    async def cancel(self, batch_id: str, reason: str, asked_by: str = "api") -> None:
        """Ends a batch; what it has not requeued stays a dead letter.

        Raises NotFound, RequestInvalid (no reason), and Refused if it has ended.
        """
        check_reason(reason)
        row = await self._database.fetch_one(SQL.find_batch, {"batch_id": batch_id})
        if row is None:
            raise NotFound(f"there is no bulk requeue {batch_id}")
        key = {"namespace": row["namespace"], "batch_id": batch_id}
        async with self._database.transaction() as connection:
            await connection.execute(SQL.lock_lease, key)
            is_ended = await self._end(connection, key, End(BatchState.CANCELLED, reason))
            if is_ended:
                act = Act(row["namespace"], "requeue.cancelled", asked_by, reason, batch_id)
                await append(connection, act)
        if not is_ended:
            row = await self._database.fetch_one(SQL.find_batch, {"batch_id": batch_id})
            state = row["state"] if row else None
            raise Refused(f"bulk requeue {batch_id} has {state} before", state=state)

    async def next_due(self) -> float | None:
        """In how many seconds a step is due; None if there is no batch."""
        row = await self._database.fetch_one(SQL.next_due)
        return None if row is None else max(float(row["seconds"]), 0.0)

    async def step(self) -> bool:
        """Does the step that is due first; whether there was one."""
        claimed = await self.claim()
        if claimed is None:
            return False
        await self.carry_on(claimed)
        return True

    async def claim(self) -> Mapping[str, Any] | None:
        """The batch that is due first, leased to this node: its row, and how far it is."""
        return await self._database.fetch_one(
            SQL.claim_batch, {"node_id": self._node_id, "lease_seconds": self._lease_seconds}
        )

    async def carry_on(self, claimed: Mapping[str, Any]) -> None:
        """Does the next step of a claimed batch; nothing if the lease was lost meanwhile."""
        # Looked for before failures are: what is settled here has its failure seen there.
        pending = await self._database.fetch_one(SQL.first_pending, _watched(claimed))
        match await self._decided(claimed, is_pending=pending is not None):
            case End() as end:
                async with self._database.transaction() as connection:
                    is_ended = await self._holds(connection, claimed) and await self._end(
                        connection, _key(claimed), end
                    )
                if is_ended:
                    log.info("bulk_requeue_ended", batch=claimed["batch_id"], state=str(end.state))
            case Step() as step:
                watched_from = pending["job_id"] if pending else claimed["after_job_id"]
                try:
                    await self._requeue(claimed, step, watched_from)
                except (NotHere, Refused) as error:
                    log.warning("bulk_requeue_held", batch=claimed["batch_id"], error=str(error))
                    await self._release(claimed, str(error))

    async def _decided(self, claimed: Mapping[str, Any], *, is_pending: bool) -> Step | End:
        phase = Phase(claimed["phase"])
        if claimed["is_stopping"] or phase is Phase.CANARY:
            asked = {**_watched(claimed), "is_dead_only": not claimed["is_stopping"]}
            failure = await self._database.fetch_one(SQL.first_failure, asked)
            if failure is not None:
                return End(BatchState.STOPPED, _why(failure), failure["job_id"])
        pace = Pace(
            claimed["canary"], claimed["rate"], claimed["is_stopping"], claimed["size_limit"]
        )
        progress = Progress(
            phase,
            claimed["requeued"],
            claimed["is_exhausted"],
            is_pending,
            claimed["elapsed_seconds"],
        )
        return next_move(pace, progress)

    async def _requeue(
        self, claimed: Mapping[str, Any], step: Step, watched_from: str | None
    ) -> None:
        rows = await self._letters.open(_selection(claimed), step.count, claimed["after_job_id"])
        snapshots = await self._letters.snapshot_ids(rows, SnapshotChoice(claimed["snapshot"]))
        requeued: list[Requeued] = []
        async with self._database.transaction() as connection:
            if not await self._holds(connection, claimed):
                return
            if rows:
                requeued = await self._letters.queue_again(
                    connection, rows, snapshots, claimed["reason"], claimed["batch_id"]
                )
            moved = {
                "phase": step.phase.value,
                "requeued": len(requeued),
                "after_job_id": rows[-1]["job_id"] if rows else None,
                "watched_from": watched_from,
                "is_exhausted": claimed["is_exhausted"] or len(rows) < step.count,
                "rest_seconds": step.rest_seconds,
                "owed_seconds": step.owed_seconds,
            }
            await connection.execute(SQL.move_lease, {**_key(claimed), **moved})
            asked_by = claimed["asked_by"] or "api"
            acts = requeue_acts(rows, requeued, asked_by, claimed["reason"], claimed["batch_id"])
            await append(connection, *acts)
        if requeued:
            self._letters.wake()

    async def _holds(self, connection: Connection, claimed: Mapping[str, Any]) -> bool:
        held = {
            **_key(claimed),
            "lease_number": claimed["lease_number"],
            "node_id": self._node_id,
        }
        return (await connection.execute(SQL.hold_lease, held)).rowcount > 0

    async def _end(self, connection: Connection, key: Mapping[str, Any], end: End) -> bool:
        asked = {name: array([value]) for name, value in key.items()}
        tally = await (await connection.execute(SQL.tally, asked)).fetchone()
        assert tally is not None
        row = {
            **key,
            **tally,
            "state": end.state.value,
            "why": end.why,
            "job_id": end.job_id,
            "node_id": self._node_id,
        }
        is_ended = (await connection.execute(SQL.insert_end, row)).rowcount > 0
        await connection.execute(SQL.delete_lease, key)
        return is_ended

    async def _release(self, claimed: Mapping[str, Any], error: str) -> None:
        released = {
            **_key(claimed),
            "lease_number": claimed["lease_number"],
            "node_id": self._node_id,
            "error": error,
            "rest_seconds": _ELSEWHERE_SECONDS,
        }
        await self._database.execute(SQL.release_lease, released)


def _begun(params: Mapping[str, Any], asked_by: str | None) -> Act:
    chosen = ("endpoint_key", "cause", "run_profile_id", "snapshot", "matching")
    return Act(
        params["namespace"],
        "requeue.begun",
        asked_by or "api",
        params["reason"],
        params["batch_id"],
        {name: params[name] for name in chosen if params[name] is not None},
    )


def _key(claimed: Mapping[str, Any]) -> dict[str, Any]:
    return {"namespace": claimed["namespace"], "batch_id": claimed["batch_id"]}


def _selection(claimed: Mapping[str, Any]) -> Selection:
    return Selection(
        claimed["namespace"],
        claimed["endpoint_key"],
        claimed["cause"],
        claimed["run_profile_id"],
        claimed["since_at"],
        claimed["until_at"],
    )


def _watched(claimed: Mapping[str, Any]) -> dict[str, Any]:
    return {**_key(claimed), "watched_from": claimed["watched_from"]}


def _why(failure: Mapping[str, Any]) -> str:
    if failure["attempt"] is None:
        return f"job {failure['job_id']} is a dead letter: {failure['cause']}"
    error = failure["error"] or failure["cause"] or failure["outcome"]
    return f"attempt {failure['attempt']} of job {failure['job_id']}: {error}"
