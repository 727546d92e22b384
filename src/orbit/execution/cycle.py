"""The orchestrator: carries a claimed cycle from its last checkpoint to its next rest.

Design note. A cycle's stages run in order; each ends with a checkpoint that names its output,
committed together with everything else that the stage made, fenced by the lease number. So a
crash at any moment leaves a cycle at some checkpoint, and whoever claims it goes on from there.
Injected code runs between two commits, never within one. Stages that call nothing (an empty
tier, the no-op normaliser, the enqueueing) need no commit of their own: their checkpoints go
with the next one, in the same transaction.

Once its jobs are queued, nobody holds the cycle: the batch that settles its last job ends it. A
cycle that is taken over or given back again and again without a new checkpoint fails at a
bound, since something in it kills its workers, or nobody has what it needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from psycopg.errors import LockNotAvailable

from orbit.database.pool import Database
from orbit.database.queries import array, load
from orbit.errors import StepFailed
from orbit.execution.context import (
    TIERS,
    ClaimedCycle,
    ExecutionContext,
    ExecutionPlan,
    PlanSource,
    Stage,
    Step,
)
from orbit.execution.dispatch import INLINE_BYTES
from orbit.execution.memory import PayloadMemory, Reservation
from orbit.execution.normalization import Normalizer
from orbit.execution.recorder import Checkpoint, Recorder, StageResult
from orbit.execution.snapshots import Snapshots
from orbit.execution.transformation import Transformer
from orbit.payload import Payload
from orbit.vocabulary import DRILL_PREFIX

SQL = load("cycle")
MOST_FENCES = 200  # of a claim: the server's memory for locks is everybody's
_ORDER = list(Stage)


async def claim(
    database: Database,
    node_id: str,
    room: int,
    lease_seconds: float,
    *,
    only: str | None = None,
    is_paused: bool = False,
) -> list[ClaimedCycle]:
    """Takes the leases of at most `room` due cycles of namespaces that are not halted.

    Drills' are left out; with `only` it is a drill that asks, and nothing else is touched. Who
    `is_paused` lets no cycle begin that waits for another of its run profile.
    """
    fences = {"room": room, "most": MOST_FENCES, "only": only, "drills": DRILL_PREFIX}
    asked = {"node_id": node_id, "room": room, "lease_seconds": lease_seconds}
    try:
        async with database.batch() as connection:
            if only is None and not is_paused:
                await connection.execute(SQL.release_waiting)
            await connection.execute(SQL.share_fences, fences)
            cursor = await connection.execute(SQL.claim_cycles, asked, binary=True)
    except LockNotAvailable:  # another's claim, or a halt, has stopped in its middle
        return []
    leases = {(row["namespace"], row["cycle_id"]): row for row in await cursor.fetchall()}
    if not leases:
        return []
    claimed = {
        "namespace": array(namespace for namespace, _ in leases),
        "cycle_id": array(cycle_id for _, cycle_id in leases),
        "first": min(cycle_id for _, cycle_id in leases),
        "last": max(cycle_id for _, cycle_id in leases),
        "inline_bytes": INLINE_BYTES,
    }
    # Leases that nobody knows of would count as lost workers.
    rows = await database.persist(lambda: database.fetch_all(SQL.claimed_cycles, claimed))
    return [_claimed(row, leases[row["namespace"], row["cycle_id"]]) for row in rows]


def _claimed(row: dict[str, Any], lease: dict[str, Any]) -> ClaimedCycle:
    slot_at, stage = row["slot_at"], row["stage"]
    return ClaimedCycle(
        namespace=row["namespace"],
        cycle_id=row["cycle_id"],
        lease_number=lease["lease_number"],
        recoveries=lease["recoveries"],
        last_error=lease["last_error"],
        is_taken_over=lease["is_taken_over"],
        profile_id=row["profile_id"],
        run_profile_id=row["run_profile_id"],
        revision=row["revision"],
        endpoint_keys=row["endpoint_keys"],
        slot_at=slot_at.isoformat().replace("+00:00", "Z") if slot_at else None,
        traceparent=row["traceparent"],
        initiation=json.loads(row["context"]),
        stage=Stage(stage) if stage else None,
        digest=row["digest"],
        content_type=row["content_type"],
        size=row["size"],
        content=row["content"],
    )


@dataclass(slots=True)
class _Progress:
    """A cycle on its way: what it holds now, and what is done but not yet committed."""

    cycle: ClaimedCycle
    plan: ExecutionPlan
    payload: Payload | None
    result: StageResult
    memory: Reservation

    def is_past(self, stage: Stage) -> bool:
        """Whether the stage was checkpointed before this worker took over."""
        last = self.cycle.stage
        return last is not None and _ORDER.index(last) >= _ORDER.index(stage)

    def hold(self, payload: Payload) -> None:
        """Goes on with a stage's output."""
        self.payload = payload
        self.memory.resize(payload.size)

    def done(self, stage: Stage, payload: Payload | None, **detail: Any) -> None:
        self.result.checkpoints.append(Checkpoint(stage, payload, detail))


class Orchestrator:
    """Runs cycles; one instance serves all that a node has in flight."""

    def __init__(
        self,
        database: Database,
        recorder: Recorder,
        plans: PlanSource,
        transformer: Transformer,
        normalizer: Normalizer,
        snapshots: Snapshots,
        memory: PayloadMemory,
        max_recoveries: int,
    ) -> None:
        self._database, self._recorder, self._plans = database, recorder, plans
        self._transformer, self._normalizer, self._snapshots = transformer, normalizer, snapshots
        self._memory, self._max_recoveries = memory, max_recoveries

    async def run(self, cycle: ClaimedCycle) -> Stage | StepFailed:
        """Carries the cycle on; its last stage, or why it failed, when it needs no worker any more.

        Raises LeaseLost if another worker has it meanwhile, NotHere if another node may be able
        to carry it on, and NamespaceHalted before what a halted namespace does not begin.
        """
        async with self._memory.reserve(cycle.size or 0, owner=cycle.namespace) as memory:
            result = StageResult(cycle)
            try:
                self._refuse_deadly(cycle)
                plan = await self._plans.plan(cycle)
                progress = _Progress(cycle, plan, await self._payload(cycle), result, memory)
                return await self._advance(progress)
            except StepFailed as failure:
                await self._fail(cycle, result, failure)
                return failure

    def _refuse_deadly(self, cycle: ClaimedCycle) -> None:
        if cycle.recoveries > self._max_recoveries:
            count, error = cycle.recoveries, cycle.last_error
            raise StepFailed(
                f"its worker was lost {count} times in a row at this point "
                "(ORBIT_MAX_CYCLE_RECOVERIES)"
                if error is None
                else f"{error} (given up after {count} tries in a row at this point; "
                "ORBIT_MAX_CYCLE_RECOVERIES)",
                stage=cycle.stage.value if cycle.stage else Stage.CYCLE_STARTED.value,
                step=0,
                use="",
                attempts=cycle.recoveries,
            )

    async def _payload(self, cycle: ClaimedCycle) -> Payload | None:
        if cycle.digest is None:
            return None
        content = cycle.content
        if content is None:
            row = await self._database.persist(
                lambda: self._database.fetch_one(
                    SQL.payload_content,
                    {
                        "namespace": cycle.namespace,
                        "cycle_id": cycle.cycle_id,
                        "digest": cycle.digest,
                    },
                )
            )
            if row is None:
                raise LookupError(f"the payload {cycle.digest} of {cycle.cycle_id} is not stored")
            content = row["content"]
        return Payload(content, cycle.content_type or "")

    async def _advance(self, progress: _Progress) -> Stage:
        await self._start(progress)
        for stage, steps in zip(TIERS, progress.plan.tiers, strict=True):
            await self._tier(progress, stage, steps)
        return await self._dispatch(progress)

    async def _start(self, progress: _Progress) -> None:
        if progress.is_past(Stage.CYCLE_STARTED):
            return
        initiation = progress.plan.initiation
        if initiation is None:
            raise StepFailed(
                "its initiator is not in its configuration",
                stage=Stage.CYCLE_STARTED.value,
                step=0,
                use="",
                attempts=1,
            )
        where = _context(progress, Stage.CYCLE_STARTED, 0, initiation)
        progress.hold(await self._transformer.initiate(initiation, where, progress.result.records))
        progress.done(Stage.CYCLE_STARTED, progress.payload)
        await self._commit(progress)

    async def _tier(self, progress: _Progress, stage: Stage, steps: Sequence[Step]) -> None:
        if progress.is_past(stage):
            return
        payload = _present(progress)
        if steps and progress.result.checkpoints:
            await self._commit(progress)
        for number, step in enumerate(steps):
            where = _context(progress, stage, number, step)
            payload = await self._transformer.transform(
                step, payload, where, progress.result.records
            )
            progress.hold(payload)
        progress.done(stage, payload)
        if steps:
            await self._commit(progress)

    async def _dispatch(self, progress: _Progress) -> Stage:
        """Normalisation and enqueueing: the items and their jobs, in one transaction."""
        self._transformer.check_halted(progress.cycle.namespace)
        normalization = progress.plan.normalization
        step = normalization.normalize or normalization.split or Step("")
        where = _context(progress, Stage.NORMALIZATION_COMPLETE, 0, step)
        items = await self._normalizer.normalize(
            normalization, _present(progress), where, progress.result.records
        )
        progress.memory.resize(sum(item.size for item in items))
        jobs = await self._snapshots.jobs(progress.cycle, items, progress.plan.endpoint_keys)
        result = progress.result
        result.items, result.jobs, result.is_end = items, jobs, not jobs
        progress.done(Stage.NORMALIZATION_COMPLETE, None, items=len(items))
        progress.done(Stage.DISPATCH_ENQUEUED, None, jobs=len(jobs))
        if not jobs:
            totals = {"items": len(items), "jobs": 0, "delivered": 0, "deadLettered": 0}
            progress.done(Stage.DISPATCH_COMPLETE, None, **totals)
            progress.done(Stage.CYCLE_FINISHED, None, **totals)
        last = result.checkpoints[-1].stage
        await self._commit(progress)
        return last

    async def _commit(self, progress: _Progress) -> None:
        await self._recorder.record(progress.result)
        progress.result.checkpoints, progress.result.records = [], []

    async def _fail(self, cycle: ClaimedCycle, result: StageResult, failure: StepFailed) -> None:
        """Ends the cycle with the reason; what was done before, but not committed, goes along."""
        detail = {"reason": str(failure), **failure.details}
        result.items, result.jobs, result.is_end = None, (), True
        result.checkpoints.append(Checkpoint(Stage.CYCLE_FAILED, None, detail))
        await self._recorder.record(result)


def _present(progress: _Progress) -> Payload:
    if progress.payload is None:
        raise LookupError(f"cycle {progress.cycle.cycle_id} has no payload at its checkpoint")
    return progress.payload


def _context(progress: _Progress, stage: Stage, number: int, step: Step) -> ExecutionContext:
    cycle, plan = progress.cycle, progress.plan
    options: Mapping[str, Any] = step.options
    return ExecutionContext(
        namespace=cycle.namespace,
        cycle_id=cycle.cycle_id,
        profile_id=plan.profile_id,
        run_profile_id=plan.run_profile_id,
        stage=stage.value,
        step=number,
        attempt=1,
        idempotency_key=f"{cycle.cycle_id}:{stage.value}:{number}",
        instruction=plan.instruction,
        options=options,
        initiation=cycle.initiation,
        slot_at=cycle.slot_at,
        traceparent=cycle.traceparent,
    )
