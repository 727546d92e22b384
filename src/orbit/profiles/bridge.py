"""The bridge from profiles into phase 1: plans for cycles, and requests for new ones.

Phase 1 asks it what a cycle is to do, and gets a plain plan from the revision that the cycle is
pinned to. A cycle without a run profile is raw: it has no step, and passes its payload on.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any

from orbit.clock import Clock, new_id
from orbit.errors import StepFailed
from orbit.execution.context import ClaimedCycle, ExecutionPlan, Normalization, Stage, Step
from orbit.execution.initiation import CycleRequest
from orbit.profiles.instruction import merged_tags, synthesize
from orbit.profiles.model import (
    NO_OP,
    Documents,
    InitiationSpec,
    NormalizationSpec,
    RunProfile,
    StepSpec,
)
from orbit.profiles.revision import Configuration, Revision

RAW_NAMESPACE = "default"
RAW_ENDPOINT = "default-endpoint"


class Bridge:
    """Knows what each cycle is to do; implements phase 1's PlanSource."""

    def __init__(self, configuration: Configuration, endpoint_keys: Collection[str]) -> None:
        self._configuration = configuration
        self._raw_endpoints = (RAW_ENDPOINT,) if RAW_ENDPOINT in endpoint_keys else ()
        self._plans: dict[tuple[str, str], ExecutionPlan] = {}

    async def plan(self, cycle: ClaimedCycle) -> ExecutionPlan:
        """The plan of a claimed cycle. Raises StepFailed if its revision has none."""
        if cycle.revision is None:
            return self._raw(cycle)
        key = (cycle.revision, cycle.run_profile_id)
        plan = self._plans.get(key)
        if plan is None:
            revision = await self._configuration.read(cycle.revision)
            plan = self._plans[key] = _plan(cycle, revision.documents)
        return plan

    def _raw(self, cycle: ClaimedCycle) -> ExecutionPlan:
        keys = cycle.endpoint_keys
        return ExecutionPlan(
            namespace=cycle.namespace,
            profile_id=None,
            run_profile_id=None,
            instruction={},
            endpoint_keys=self._raw_endpoints if keys is None else tuple(keys),
        )


def why_not_runnable(documents: Documents, run_profile: RunProfile) -> str | None:
    """Why a run profile does not run as configured, or None if it does."""
    if not run_profile.is_enabled:
        return f"run profile {run_profile.run_profile_id} is disabled"
    profile = documents.profile(run_profile.profile_id)
    if profile is None or not profile.is_enabled:
        return f"profile {run_profile.profile_id} is disabled"
    return None


def cycle_request(
    revision: Revision,
    run_profile: RunProfile,
    clock: Clock,
    trigger: str,
    **given: Any,
) -> CycleRequest:
    """A request for a new cycle of a run profile, pinned to the revision."""
    profile = revision.documents.profile(run_profile.profile_id)
    assert profile is not None, "checked when the documents were read"
    slot_at: datetime | None = given.get("slot_at")
    return CycleRequest(
        cycle_id=new_id(clock.now()),
        namespace=run_profile.namespace,
        trigger=trigger if slot_at is None else "schedule",
        run_profile_id=run_profile.run_profile_id,
        profile_id=run_profile.profile_id,
        has_initiator=run_profile.execution_policy.initiation is not None,
        revision=revision.revision,
        value_tags=merged_tags(profile, run_profile),
        **given,
    )


def _plan(cycle: ClaimedCycle, documents: Documents) -> ExecutionPlan:
    run_profile = documents.run_profile(cycle.run_profile_id)
    profile = documents.profile(cycle.profile_id or "")
    if run_profile is None or profile is None:
        raise StepFailed(
            f"run profile {cycle.run_profile_id} is not in its configuration",
            stage=Stage.CYCLE_STARTED.value,
            step=0,
            use="",
            attempts=1,
        )
    policy = run_profile.execution_policy
    tiers = policy.tiers
    return ExecutionPlan(
        namespace=cycle.namespace,
        profile_id=profile.profile_id,
        run_profile_id=run_profile.run_profile_id,
        instruction=synthesize(profile, run_profile),
        endpoint_keys=run_profile.distribution_targets,
        initiation=None if policy.initiation is None else _step(policy.initiation),
        tiers=tuple(tuple(map(_step, tier)) for tier in (tiers.tier1, tiers.tier2, tiers.tier3)),
        normalization=_normalization(policy.normalization),
    )


def _step(spec: StepSpec | InitiationSpec | NormalizationSpec) -> Step:
    return Step(
        use=spec.use,
        url=None if isinstance(spec, InitiationSpec) else spec.url,
        timeout_seconds=spec.timeout_seconds,
        options=spec.options,
        max_attempts=spec.retry.max_attempts,
        backoff=spec.retry.backoff,
    )


def _normalization(spec: NormalizationSpec) -> Normalization:
    step = _step(spec)
    split = (
        None
        if spec.split is None
        else Step(
            use=spec.split,
            timeout_seconds=spec.timeout_seconds,
            options=spec.options,
            max_attempts=spec.retry.max_attempts,
            backoff=spec.retry.backoff,
        )
    )
    return Normalization(None if spec.use == NO_OP else step, split, spec.batch_size)
