"""What people and their tools may ask for: triggers, re-runs, a new configuration.

Every request either starts something, with its id, or is refused with the reason; nothing in
between. A repeated Idempotency-Key gets the first answer's cycle.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orbit.clock import Clock, new_id
from orbit.database.pool import Database
from orbit.database.queries import load
from orbit.errors import (
    GlobalPause,
    IdempotencyKeyReused,
    NamespaceHalted,
    NotFound,
    NotRerunnable,
    PayloadTooLarge,
    RequestInvalid,
)
from orbit.execution.context import TIERS, Stage
from orbit.execution.initiation import (
    Accepted,
    CopiedCheckpoint,
    CycleRequest,
    Intake,
    RevisionReplaced,
)
from orbit.governance.fence import halted
from orbit.payload import Payload
from orbit.profiles.bridge import RAW_ENDPOINT, RAW_NAMESPACE, cycle_request, why_not_runnable
from orbit.profiles.documents import read_documents
from orbit.profiles.model import Documents, RunProfile
from orbit.profiles.revision import Configuration, Revision, revision_of
from orbit.settings import Settings
from orbit.vocabulary import DRILL_PREFIX, check_key, is_drill

SQL = load("rerun")
_COPIED = (Stage.CYCLE_STARTED, *TIERS)


@dataclass(frozen=True, slots=True)
class TriggerAnswer:
    """What became of one run profile's trigger: a cycle, or the reason why there is none."""

    run_profile_id: str
    namespace: str | None
    cycle_id: str | None = None
    is_new: bool = False
    reason: str | None = None
    is_halted: bool = False


class Orchestration:
    """The manual side of a node."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        clock: Clock,
        configuration: Configuration,
        intake: Intake,
    ) -> None:
        self._settings, self._database, self._clock = settings, database, clock
        self._configuration, self._intake = configuration, intake
        self._endpoint_keys = frozenset(e.key for e in settings.dispatch_endpoints)

    async def trigger_raw(
        self,
        *,
        namespace: str = RAW_NAMESPACE,
        payload: Payload | None = None,
        endpoint_keys: Sequence[str] | None = None,
        idempotency_key: str | None = None,
        trigger: str = "api",
        asked_by: str | None = None,
        is_bound: bool = False,
    ) -> Accepted:
        """Starts a cycle without a run profile.

        With `is_bound` it may go only where the namespace's own run profiles go, and to the
        endpoint that is every namespace's.
        Raises GlobalPause, NamespaceHalted, RequestInvalid, PayloadTooLarge or
        IdempotencyKeyReused.
        """
        self._refuse_while_paused()
        _check_id(namespace, "namespace")
        if is_drill(namespace):
            raise RequestInvalid(f"namespace: {DRILL_PREFIX}… is kept for drills")
        self._check_endpoints(endpoint_keys, namespace if is_bound else None)
        limit = self._settings.max_payload_bytes
        if payload is not None and payload.size > limit:
            raise PayloadTooLarge(
                f"the payload has {payload.size:,} bytes; at most {limit:,} are accepted "
                "(ORBIT_MAX_PAYLOAD_BYTES)"
            )
        return await self._intake.accept(
            CycleRequest(
                cycle_id=new_id(self._clock.now()),
                namespace=namespace,
                trigger=trigger,
                payload=payload,
                endpoint_keys=None if endpoint_keys is None else tuple(endpoint_keys),
                idempotency_key=idempotency_key,
                asked_by=asked_by,
            )
        )

    async def trigger_run_profiles(
        self,
        run_profile_ids: Collection[str] | None = None,
        *,
        idempotency_key: str | None = None,
        trigger: str = "api",
        asked_by: str | None = None,
        within: Sequence[str] | None = None,
    ) -> list[TriggerAnswer]:
        """Starts each run profile once, or those named; an answer for each, why not included.

        `within`: the namespaces that there are for who asks; None: all.
        Raises GlobalPause, NamespaceHalted if all of them are in halted namespaces, NotFound if a
        name is unknown (then nothing is started), and DatabaseUnavailable if the database does
        not know which configuration is in force.
        """
        self._refuse_while_paused()
        try:
            run_profiles = self._named(run_profile_ids, within)
        except NotFound:
            if not await self._configuration.refresh():
                raise
            run_profiles = self._named(run_profile_ids, within)
        triggers = (self._trigger(one, idempotency_key, trigger, asked_by) for one in run_profiles)
        answers = await asyncio.gather(*triggers)
        if answers and all(answer.is_halted for answer in answers):
            raise halted(answers[0].namespace or "")
        return answers

    async def rerun(
        self,
        cycle_id: str,
        *,
        is_from_start: bool = False,
        is_forced: bool = False,
        idempotency_key: str | None = None,
        asked_by: str | None = None,
        reason: str | None = None,
    ) -> Accepted:
        """A new cycle in place of a failed one: from the failed stage, or from the start.

        Refused, unless forced, while a re-run of it, or of what it is itself a re-run of, is
        running or has finished. Of several at once one starts, and the others get its id.
        Raises GlobalPause, NamespaceHalted, NotFound, NotRerunnable, and DatabaseUnavailable as
        a trigger does.
        """
        self._refuse_while_paused()
        row = await self._database.fetch_one(SQL.failed_cycle, {"cycle_id": cycle_id})
        if row is None:
            raise NotFound(f"there is no cycle {cycle_id}")
        if row["state"] != "failed":
            raise NotRerunnable(f"cycle {cycle_id} is {row['state']}; only a failed one runs again")
        key = {"namespace": row["namespace"], "cycle_id": cycle_id}
        family = await self._database.fetch_all(SQL.rerun_family, key)
        request = CycleRequest(
            cycle_id=new_id(self._clock.now()),
            namespace=row["namespace"],
            trigger="rerun",
            endpoint_keys=row["endpoint_keys"],
            idempotency_key=idempotency_key,
            rerun_of=cycle_id,
            rerun_from="start" if is_from_start else "stage",
            rerun_slot=None if is_forced else (family[0]["cycle_id"], len(family) - 1),
            asked_by=asked_by,
            reason=reason,
        )
        repeated = _repeated(family, request)
        if repeated is not None:
            return repeated
        if not is_forced:
            _refuse_second(family, cycle_id)
        copied = await self._copied(row["namespace"], cycle_id, is_from_start=is_from_start)
        return await self._accept_rerun(replace(request, copied=copied), row["run_profile_id"])

    def read_files(self, config_dir: Path | None = None) -> Documents:
        """The configuration files, checked whole. Raises ConfigurationInvalid."""
        return read_documents(
            config_dir or self._settings.config_dir, endpoint_keys=self._endpoint_keys
        )

    async def validate(self, *, is_dropping: bool = False) -> Revision:
        """The revision that the files are. Raises ConfigurationInvalid, and OverlaysBroken."""
        documents = await asyncio.to_thread(self.read_files)
        await self._configuration.check(documents, is_dropping=is_dropping)
        return revision_of(documents)

    async def reload(
        self, asked_by: str = "api", reason: str | None = None, *, is_dropping: bool = False
    ) -> tuple[Revision, bool]:
        """Puts the files into force; the revision in force, and whether anything was changed.

        Raises ConfigurationInvalid, CyclesActive, and OverlaysBroken unless `is_dropping`; then
        nothing is changed.
        """
        documents = await asyncio.to_thread(self.read_files)
        is_changed = await self._configuration.replace(
            documents, asked_by, reason, is_dropping=is_dropping
        )
        return self._configuration.active, is_changed

    async def _trigger(
        self,
        run_profile: RunProfile,
        idempotency_key: str | None,
        trigger: str,
        asked_by: str | None,
    ) -> TriggerAnswer:
        answer = TriggerAnswer(run_profile.run_profile_id, run_profile.namespace)
        while True:
            revision = self._configuration.active
            current = revision.documents.run_profile(run_profile.run_profile_id)
            if current is None or current.namespace != run_profile.namespace:
                return replace(answer, reason="it was removed from the configuration")
            reason = why_not_runnable(revision.documents, current)
            if reason is not None:
                if await self._configuration.refresh():  # it may have been turned on elsewhere
                    continue
                return replace(answer, reason=reason)
            request = cycle_request(
                revision, current, self._clock, trigger, idempotency_key=idempotency_key
            )
            try:
                accepted = await self._intake.accept(replace(request, asked_by=asked_by))
            except RevisionReplaced:
                await self._configuration.catch_up()
                continue
            except NamespaceHalted as error:
                return replace(answer, reason=str(error), is_halted=True)
            return replace(answer, cycle_id=accepted.cycle_id, is_new=accepted.is_new)

    async def _accept_rerun(self, request: CycleRequest, run_profile_id: str) -> Accepted:
        try:
            if not run_profile_id:
                return await self._intake.accept(request)
            return await self._accept_anew(request, run_profile_id)
        except IdempotencyKeyReused as error:
            if request.rerun_slot is None:
                raise
            raise _taken_over(request.rerun_of, error.details["cycleRunId"], "running") from error

    async def _accept_anew(self, request: CycleRequest, run_profile_id: str) -> Accepted:
        """Accepts a re-run under the configuration in force."""
        while True:
            revision, run_profile = self._of(run_profile_id, request.namespace)
            base = cycle_request(revision, run_profile, self._clock, "rerun")
            try:
                return await self._intake.accept(
                    replace(
                        base,
                        idempotency_key=request.idempotency_key,
                        rerun_of=request.rerun_of,
                        rerun_from=request.rerun_from,
                        rerun_slot=request.rerun_slot,
                        copied=request.copied,
                        asked_by=request.asked_by,
                        reason=request.reason,
                    )
                )
            except RevisionReplaced:
                await self._configuration.catch_up()

    def _named(self, ids: Collection[str] | None, within: Sequence[str] | None) -> list[RunProfile]:
        documents = self._configuration.active.documents
        there = [one for one in documents.run_profiles if within is None or one.namespace in within]
        if ids is None:
            return there
        found = {one.run_profile_id: one for one in there}
        unknown = [one for one in ids if one not in found]
        if unknown:
            raise NotFound(f"there is no run profile {', '.join(sorted(unknown))}")
        return [found[one] for one in dict.fromkeys(ids)]

    def _of(self, run_profile_id: str, namespace: str) -> tuple[Revision, RunProfile]:
        revision = self._configuration.active
        run_profile = revision.documents.run_profile(run_profile_id)
        if run_profile is None or run_profile.namespace != namespace:
            raise NotRerunnable(f"run profile {run_profile_id} is not configured any more")
        reason = why_not_runnable(revision.documents, run_profile)
        if reason is not None:
            raise NotRerunnable(reason)
        return revision, run_profile

    async def _copied(
        self, namespace: str, cycle_id: str, *, is_from_start: bool
    ) -> list[CopiedCheckpoint]:
        stages = _COPIED[:1] if is_from_start else _COPIED
        rows = await self._database.fetch_all(
            SQL.copied_checkpoints,
            {
                "namespace": namespace,
                "cycle_id": cycle_id,
                "stages": [stage.value for stage in stages],
            },
        )
        if any(row["content"] is None for row in rows):
            raise NotRerunnable(f"the payload of cycle {cycle_id} was dropped by retention")
        return [
            CopiedCheckpoint(
                Stage(row["stage"]),
                Payload(row["content"], row["content_type"]),
                {**row["detail"], "copiedFrom": cycle_id},
            )
            for row in rows
        ]

    def _refuse_while_paused(self) -> None:
        if self._settings.global_pause:
            raise GlobalPause("ORBIT_GLOBAL_PAUSE is set: no cycle starts")

    def _check_endpoints(self, keys: Sequence[str] | None, only_of: str | None) -> None:
        there = self._endpoint_keys if only_of is None else self._endpoints_of(only_of)
        unknown = sorted(set(keys or ()) - there)
        if unknown:
            known = ", ".join(sorted(there)) or "none"
            raise RequestInvalid(f"unknown endpoint {', '.join(unknown)}; known: {known}")

    def _endpoints_of(self, namespace: str) -> frozenset[str]:
        run_profiles = self._configuration.active.documents.run_profiles
        named = {
            key
            for one in run_profiles
            if one.namespace == namespace
            for key in one.distribution_targets
        }
        return self._endpoint_keys & (named | {RAW_ENDPOINT})


def _repeated(family: Sequence[Mapping[str, Any]], request: CycleRequest) -> Accepted | None:
    """The re-run that was started under the request's Idempotency-Key before, if any."""
    for one in family:
        if request.idempotency_key is None or one["rerun_of"] != request.rerun_of:
            continue
        if one["idempotency_key"] == request.idempotency_key:
            if one["request_digest"] != request.digest():
                raise IdempotencyKeyReused(
                    "this Idempotency-Key was used before for another request",
                    cycleRunId=one["cycle_id"],
                )
            return Accepted(one["cycle_id"], False)
    return None


def _refuse_second(family: Sequence[Mapping[str, Any]], cycle_id: str) -> None:
    for one in family:
        if one["state"] != "failed":
            raise _taken_over(cycle_id, one["cycle_id"], one["state"])


def _taken_over(cycle_id: str | None, rerun_id: str, state: str) -> NotRerunnable:
    what = "is running" if state == "running" else f"has {state}"
    return NotRerunnable(
        f"cycle {cycle_id} was run again as {rerun_id}, which {what}; force to run it once more",
        cycleRunId=rerun_id,
    )


def _check_id(value: str, name: str) -> None:
    try:
        check_key(value)
    except ValueError as error:
        raise RequestInvalid(f"{name}: {error}") from error
