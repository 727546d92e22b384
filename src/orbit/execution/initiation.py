"""The start of a cycle: its deterministic first object, and its acceptance.

A cycle's initiation is the canonical JSON of what asked for it; its SHA-256 is unique per run
profile for ever. What asks twice (a schedule slot on two nodes, a request repeated under its
Idempotency-Key, a commit whose answer was lost) has the same initiation, so it gets the id of
the cycle that is there already. The selector keeps no state.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from orbit import metrics, tracing
from orbit.audit.trail import Act, append
from orbit.canonical import canonical_json, sha256_hex
from orbit.database.group_commit import GroupCommit
from orbit.database.pool import Connection, Database
from orbit.database.queries import array, load
from orbit.errors import IdempotencyKeyReused, NamespaceHalted
from orbit.execution.context import Stage
from orbit.governance.fence import halted
from orbit.payload import Payload

SQL = load("cycle")


@dataclass(frozen=True, slots=True)
class Initiation:
    """The canonical JSON of a cycle's context, and its SHA-256 in hexadecimal."""

    context: str
    hash: str


@dataclass(frozen=True, slots=True)
class CopiedCheckpoint:
    """A checkpoint that a re-run takes over from the failed cycle."""

    stage: Stage
    payload: Payload | None
    detail: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class CycleRequest:
    """A trigger, ready to be accepted.

    `payload` is the cycle's first payload; None means its initiation object, unless
    `has_initiator`: then injected code makes it, and the cycle starts with its result.
    `idempotency_key` belongs to the caller and makes the request one for ever; so does
    `rerun_slot`, the first failed cycle and the number of its re-runs so far, which goes before.
    `caller` is the traceparent of whoever asks.
    """

    cycle_id: str
    namespace: str
    trigger: str
    run_profile_id: str = ""
    profile_id: str | None = None
    slot_at: datetime | None = None
    idempotency_key: str | None = None
    payload: Payload | None = None
    has_initiator: bool = False
    endpoint_keys: Sequence[str] | None = None
    revision: str | None = None
    value_tags: Mapping[str, Any] = field(default_factory=dict)
    rerun_of: str | None = None
    rerun_from: str | None = None
    rerun_slot: tuple[str, int] | None = None
    copied: Sequence[CopiedCheckpoint] = ()
    is_waiting: bool = False
    asked_by: str | None = None
    reason: str | None = None
    caller: str | None = None

    def digest(self) -> str:
        """What the request asks for, so that a key used for something else is noticed."""
        payload, keys = self.payload, self.endpoint_keys
        # A list of texts and nulls has one JSON form; no need for the slower canonical writer.
        asked = [
            None if payload is None else [payload.digest, payload.content_type],
            None if keys is None else list(keys),
            self.rerun_from,
        ]
        return sha256_hex(json.dumps(asked).encode())


@dataclass(frozen=True, slots=True)
class Accepted:
    """The answer to a request: the cycle it belongs to, and whether that is a new one."""

    cycle_id: str
    is_new: bool


Refusal = IdempotencyKeyReused | NamespaceHalted


class RevisionReplaced(Exception):
    """The configuration changed under a request; it is to be made anew from the current one."""


def select_initiation(request: CycleRequest) -> Initiation:
    """The initiation of a request: the same for the same slot, key or cycle id."""
    trigger: dict[str, Any] = {"kind": request.trigger}
    if request.slot_at is not None:
        trigger = {"kind": "schedule", "slotAt": request.slot_at.astimezone(UTC).isoformat()}
    elif request.rerun_slot is not None:
        first_id, number = request.rerun_slot
        trigger |= {"rerunOf": first_id, "number": number}
    elif request.idempotency_key is not None:
        trigger = {"kind": "request", "idempotencyKey": request.idempotency_key}
    else:
        trigger["cycleRunId"] = request.cycle_id
    if request.rerun_of and request.rerun_slot is None:
        trigger["rerunOf"] = request.rerun_of
    context = canonical_json(
        {
            "namespace": request.namespace,
            "profileId": request.profile_id,
            "runProfileId": request.run_profile_id or None,
            "trigger": trigger,
        }
    )
    return Initiation(context.decode(), sha256_hex(context))


async def accept(
    connection: Connection, node_id: str, requests: Sequence[CycleRequest]
) -> list[Accepted | Refusal | RevisionReplaced]:
    """Accepts requests in the open transaction; an answer for each, in order.

    An answer is an error where only that one request is refused. One that was accepted before
    gets its cycle, also while its namespace is halted: that starts nothing. Re-runs among them get
    their audit entry, so with them this is the last thing in the transaction.
    """
    initiations = [select_initiation(request) for request in requests]
    triggers = [_trigger(request) for request in requests]
    async with connection.pipeline():
        await connection.execute(SQL.share_configuration)
        cursor = await connection.execute(
            SQL.accept_cycles, _cycle_rows(node_id, requests, initiations, triggers)
        )
        payloads, checkpoints = _first_checkpoints(requests, initiations)
        if payloads:
            await connection.execute(SQL.accept_payloads, _payload_rows(payloads))
        if checkpoints:
            await connection.execute(SQL.accept_checkpoints, _checkpoint_rows(node_id, checkpoints))
        known = {row["cycle_id"]: row["is_halted"] for row in await cursor.fetchall()}
    for request, trigger in zip(requests, triggers, strict=True):
        if known.get(request.cycle_id) is False:
            trigger.accept()
    answers = [
        Accepted(request.cycle_id, True)
        if known.get(request.cycle_id) is False
        else await _existing(connection, request, initiation, is_halted=request.cycle_id in known)
        for request, initiation in zip(requests, initiations, strict=True)
    ]
    again = [one for one in requests if one.trigger == "rerun" and known.get(one.cycle_id) is False]
    await append(connection, *map(_rerun_act, again))
    return answers


def _trigger(request: CycleRequest) -> tracing.Trigger:
    attributes = {
        "orbit.namespace": request.namespace,
        "orbit.cycle.id": request.cycle_id,
        "orbit.run_profile.id": request.run_profile_id,
    }
    return tracing.Trigger(request.trigger, request.caller, attributes)


def _rerun_act(request: CycleRequest) -> Act:
    """A re-run is a person's act; other triggers are sealed with their cycle."""
    return Act(
        request.namespace,
        "cycle.rerun",
        request.asked_by or "api",
        request.reason,
        subject=request.cycle_id,
        detail={"rerunOf": request.rerun_of, "from": request.rerun_from},
    )


async def _existing(
    connection: Connection, request: CycleRequest, initiation: Initiation, *, is_halted: bool
) -> Accepted | Refusal | RevisionReplaced:
    cursor = await connection.execute(
        SQL.first_cycle,
        {
            "namespace": request.namespace,
            "run_profile_id": request.run_profile_id,
            "hash": initiation.hash,
        },
    )
    row = await cursor.fetchone()
    if row is None:
        return halted(request.namespace) if is_halted else RevisionReplaced()
    if row["cycle_id"] == request.cycle_id:
        return Accepted(request.cycle_id, True)
    if row["request_digest"] != request.digest():
        return IdempotencyKeyReused(
            "this Idempotency-Key was used before for another request", cycleRunId=row["cycle_id"]
        )
    return Accepted(row["cycle_id"], False)


class Intake:
    """Accepts triggers that come one by one, many in one commit.

    `wake` is called when cycles have been accepted, so that a worker here begins at once.
    """

    def __init__(self, database: Database, node_id: str, wake: Callable[[], None]) -> None:
        self._database, self._node_id, self._wake = database, node_id, wake
        self._group = GroupCommit(database, self._flush, weigh=_weight)

    async def accept(self, request: CycleRequest) -> Accepted:
        """Returns when the cycle exists, whatever happens next.

        Raises IdempotencyKeyReused, NamespaceHalted, and RevisionReplaced if the request is to be
        made anew.
        """
        if (caller := tracing.caller()) is not None:
            request = replace(request, caller=caller)
        answer = await self._group.commit(request)
        if isinstance(answer, Accepted):
            return answer
        raise answer

    async def _flush(
        self, requests: Sequence[CycleRequest]
    ) -> Sequence[Accepted | Refusal | RevisionReplaced]:
        async with self._database.transaction() as connection:
            answers = await accept(connection, self._node_id, requests)
        metrics.commit_entries.labels("cycles").observe(len(requests))
        for request, answer in zip(requests, answers, strict=True):
            if isinstance(answer, Accepted) and answer.is_new:
                metrics.cycles_accepted.labels(request.trigger).inc()
        self._wake()
        return answers


def _weight(request: CycleRequest) -> int:
    copied = sum(c.payload.size for c in request.copied if c.payload)
    return copied + (request.payload.size if request.payload else 0)


def _cycle_rows(
    node_id: str,
    requests: Sequence[CycleRequest],
    initiations: Sequence[Initiation],
    triggers: Sequence[tracing.Trigger],
) -> dict[str, Any]:
    return {
        "node_id": node_id,
        "namespace": array(r.namespace for r in requests),
        "cycle_id": array(r.cycle_id for r in requests),
        "profile_id": array(r.profile_id for r in requests),
        "run_profile_id": array(r.run_profile_id for r in requests),
        "trigger": array(r.trigger for r in requests),
        "slot_at": array(r.slot_at for r in requests),
        "idempotency_key": array(r.idempotency_key for r in requests),
        "revision": array(r.revision for r in requests),
        "endpoint_keys": array(
            None if r.endpoint_keys is None else ",".join(r.endpoint_keys) for r in requests
        ),
        "value_tags": array(json.dumps(dict(r.value_tags)) for r in requests),
        "traceparent": array(trigger.traceparent for trigger in triggers),
        "rerun_of": array(r.rerun_of for r in requests),
        "asked_by": array(r.asked_by for r in requests),
        "hash": array(i.hash for i in initiations),
        "context": array(i.context for i in initiations),
        "request_digest": array(r.digest() for r in requests),
        "is_waiting": array(r.is_waiting for r in requests),
    }


_Checkpoint = tuple[CycleRequest, Stage, Payload | None, Mapping[str, Any]]


def _first_checkpoints(
    requests: Sequence[CycleRequest], initiations: Sequence[Initiation]
) -> tuple[list[tuple[CycleRequest, Payload]], list[_Checkpoint]]:
    checkpoints: list[_Checkpoint] = []
    for request, initiation in zip(requests, initiations, strict=True):
        if request.copied:
            checkpoints += [(request, c.stage, c.payload, c.detail) for c in request.copied]
        elif not request.has_initiator:
            first = request.payload or Payload(initiation.context.encode(), "application/json")
            checkpoints.append((request, Stage.CYCLE_STARTED, first, {}))
    payloads = [(request, payload) for request, _, payload, _ in checkpoints if payload]
    return payloads, checkpoints


def _payload_rows(payloads: list[tuple[CycleRequest, Payload]]) -> dict[str, Any]:
    return {
        "namespace": array(request.namespace for request, _ in payloads),
        "cycle_id": array(request.cycle_id for request, _ in payloads),
        "digest": array(payload.digest for _, payload in payloads),
        "content": [payload.content for _, payload in payloads],
    }


def _checkpoint_rows(node_id: str, checkpoints: list[_Checkpoint]) -> dict[str, Any]:
    payloads = [payload for _, _, payload, _ in checkpoints]
    return {
        "node_id": node_id,
        "namespace": array(request.namespace for request, *_ in checkpoints),
        "cycle_id": array(request.cycle_id for request, *_ in checkpoints),
        "stage": array(stage.value for _, stage, *_ in checkpoints),
        "digest": array(payload and payload.digest for payload in payloads),
        "content_type": array(payload and payload.content_type for payload in payloads),
        "size": array(payload and payload.size for payload in payloads),
        "detail": array(json.dumps(dict(detail)) for *_, detail in checkpoints),
    }
