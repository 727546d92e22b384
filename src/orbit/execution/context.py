"""The words of phase 1: stages, steps, plans, and what a step is told.

Phase 1 knows nothing of profiles. Whoever asks for a cycle hands it a plan: plain steps, plain
endpoints, and an instruction that only the user's code reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from orbit.execution.retry import Backoff


class Stage(StrEnum):
    """A cycle's stages in their order; a cycle's state is the last it has a checkpoint of."""

    CYCLE_STARTED = "cycle_started"
    TIER1_COMPLETE = "tier1_complete"
    TIER2_COMPLETE = "tier2_complete"
    TIER3_COMPLETE = "tier3_complete"
    NORMALIZATION_COMPLETE = "normalization_complete"
    DISPATCH_ENQUEUED = "dispatch_enqueued"
    DISPATCH_COMPLETE = "dispatch_complete"
    CYCLE_FINISHED = "cycle_finished"
    CYCLE_FAILED = "cycle_failed"


TIERS = (Stage.TIER1_COMPLETE, Stage.TIER2_COMPLETE, Stage.TIER3_COMPLETE)


@dataclass(frozen=True, slots=True)
class Step:
    """One call of injected code: where it is, how long it may take, how often it is tried."""

    use: str
    url: str | None = None
    timeout_seconds: float = 60.0
    options: Mapping[str, Any] = field(default_factory=dict)
    max_attempts: int = 3
    backoff: Backoff = Backoff(0.5, 2.0, 30.0)


@dataclass(frozen=True, slots=True)
class Normalization:
    """How the last tier's payload becomes items: split (optional), then normalise in batches."""

    normalize: Step | None = None
    split: Step | None = None
    batch_size: int = 100


@dataclass(frozen=True, slots=True)
class ExecutionPlan:
    """Everything that a cycle needs to run; the same for each owner of its lease."""

    namespace: str
    profile_id: str | None
    run_profile_id: str | None
    instruction: Mapping[str, Any]
    endpoint_keys: tuple[str, ...]
    initiation: Step | None = None
    tiers: tuple[tuple[Step, ...], ...] = ((), (), ())
    normalization: Normalization = Normalization()


@dataclass(frozen=True, slots=True)
class ExecutionContext:
    """What a step is told beside the payload.

    `idempotency_key` is the same for every attempt of the step in its cycle, also after a
    crash; a step with effects of its own passes it on. `attempt` counts from 1 and begins
    anew after a crash. `traceparent` is a W3C trace context.
    """

    namespace: str
    cycle_id: str
    profile_id: str | None
    run_profile_id: str | None
    stage: str
    step: int
    attempt: int
    idempotency_key: str
    instruction: Mapping[str, Any]
    options: Mapping[str, Any]
    initiation: Mapping[str, Any]
    slot_at: str | None
    traceparent: str


@dataclass(frozen=True, slots=True)
class ClaimedCycle:
    """A cycle whose lease this node holds, as it stands at its last checkpoint.

    `content` is None where there is no output yet, or it is too large to come with the claim.
    `last_error` is why it was given back the last time without having got further;
    `is_taken_over`: its former worker was lost with the lease in hand.
    """

    namespace: str
    cycle_id: str
    lease_number: int
    recoveries: int
    profile_id: str | None
    run_profile_id: str
    revision: str | None
    endpoint_keys: Sequence[str] | None
    slot_at: str | None
    traceparent: str
    initiation: Mapping[str, Any]
    stage: Stage | None
    digest: str | None
    content_type: str | None
    size: int | None
    content: bytes | None
    last_error: str | None = None
    is_taken_over: bool = False


class PlanSource(Protocol):
    """Whoever knows what a cycle is to do; phase 2's bridge, in the whole program."""

    async def plan(self, cycle: ClaimedCycle) -> ExecutionPlan:
        """The plan of a cycle, by the revision that it is pinned to.

        Raises StepFailed if it cannot be carried out on any node.
        """
