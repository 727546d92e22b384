"""What a person does with dead letters: brings one back as a new job, or lets it be.

A requeue makes a new job that names the old one, with the same bytes, and a decision on the old
one in the same transaction; so a second requeue is refused, unless it is forced. The cycle has
ended for the job and is not counted again. Nothing here is ever done by Orbit itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from orbit.audit.trail import Act, append
from orbit.clock import derived_id
from orbit.database.pool import Connection, Database
from orbit.database.queries import array, load
from orbit.errors import AlreadyRequeued, MayHaveArrived, NotFound, Refused, RequestInvalid
from orbit.execution.snapshots import Snapshots
from orbit.governance.fence import halted

SQL = load("dead_letters")
HALT_SQL = load("halt")


class SnapshotChoice(StrEnum):
    """Where a requeued job goes: the endpoint as it is now, or as it stood for the old job."""

    CURRENT = "current"
    OLD = "old"


@dataclass(frozen=True, slots=True)
class Selection:
    """Open dead letters of one namespace, narrowed as far as is said.

    `since` and `until` are about when they became dead letters: from the one, before the other.
    """

    namespace: str
    endpoint_key: str | None = None
    cause: str | None = None
    run_profile_id: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    @property
    def params(self) -> dict[str, Any]:
        """As the statements that select dead letters take it."""
        return {
            "namespace": self.namespace,
            "endpoint_key": self.endpoint_key,
            "cause": self.cause,
            "run_profile_id": self.run_profile_id,
            "since": self.since,
            "until": self.until,
        }


@dataclass(frozen=True, slots=True)
class Requeued:
    """A dead letter and the job that it came back as."""

    job_id: str
    new_job_id: str


@dataclass(frozen=True, slots=True)
class Found:
    """How many dead letters a bulk requeue finds, and how many it leaves out.

    Of those left out some may have arrived: somebody has to ask the receiver about each of them.
    Others have no payload any more. `endpoint_keys` are those of the matching ones.
    """

    matching: int
    may_have_arrived: int
    without_payload: int
    endpoint_keys: Sequence[str] = ()


class DeadLetters:
    """Requeues and discards.

    Args:
        max_attempts: sends at most of a requeued job.
        wake: called when jobs have been queued, so that dispatch begins at once.
    """

    def __init__(
        self,
        database: Database,
        snapshots: Snapshots,
        max_attempts: int,
        wake: Callable[[], None],
    ) -> None:
        self._database, self._snapshots = database, snapshots
        self._max_attempts, self._wake = max_attempts, wake

    async def requeue(
        self,
        job_id: str,
        reason: str,
        *,
        is_forced: bool = False,
        snapshot: SnapshotChoice = SnapshotChoice.CURRENT,
        asked_by: str = "api",
    ) -> Requeued:
        """Queues the dead letter's item again, for the same endpoint.

        Raises NotFound, AlreadyRequeued, RequestInvalid (no reason), MayHaveArrived if an attempt
        ended unknown (unless forced), NamespaceHalted, and Refused if the endpoint or the payload
        is gone.
        """
        check_reason(reason)
        row = await self._find(job_id)
        await self.refuse_while_halted(row["namespace"])
        if row["sequence"] and not is_forced:
            raise _already(row)
        if row["unknown_attempt"] and not is_forced:
            raise MayHaveArrived(
                f"attempt {row['unknown_attempt']} may have arrived; ask the receiver, then force",
                attempt=row["unknown_attempt"],
            )
        if not row["has_payload"]:
            raise Refused(f"the payload of job {job_id} is past its retention")
        requeued = await self._requeue([row], reason, snapshot, asked_by)
        if not requeued:
            raise _already(await self._find(job_id))
        return requeued[0]

    async def count(self, selection: Selection) -> Found:
        """How many dead letters a requeue of the selection would find, and leave out."""
        row = await self._database.fetch_one(SQL.count_open_dead_letters, selection.params)
        return Found(**row) if row else Found(0, 0, 0)

    def check_endpoints(self, keys: Iterable[str], choice: SnapshotChoice) -> None:
        """Raises Refused if jobs are to go where an endpoint stands now, and it is gone."""
        for key in keys if choice is SnapshotChoice.CURRENT else ():
            if key not in self._snapshots.keys:
                raise Refused(
                    f"endpoint {key} is not configured any more; the old snapshot is where its "
                    "jobs went before",
                    endpointKey=key,
                )

    async def requeue_many(
        self,
        selection: Selection,
        reason: str,
        *,
        limit: int,
        snapshot: SnapshotChoice = SnapshotChoice.CURRENT,
        asked_by: str = "api",
    ) -> list[Requeued]:
        """Queues the selection again, oldest first, at most `limit` of them, all or none.

        Those that may have arrived are left out.
        Raises RequestInvalid (no reason), NamespaceHalted, and Refused if an endpoint is gone.
        """
        check_reason(reason)
        await self.refuse_while_halted(selection.namespace)
        rows = await self.open(selection, limit)
        return await self._requeue(rows, reason, snapshot, asked_by) if rows else []

    async def refuse_while_halted(self, namespace: str) -> None:
        """Raises NamespaceHalted: what is halted is not queued up for its end."""
        asked = {"namespaces": [namespace]}
        if await self._database.fetch_one(HALT_SQL.halted_among, asked) is not None:
            raise halted(namespace)

    async def open(
        self, selection: Selection, limit: int, after_job_id: str | None = None
    ) -> list[dict[str, Any]]:
        """The selection's dead letters that can be requeued, in the order of their ids."""
        return await self._database.fetch_all(
            SQL.open_dead_letters,
            {**selection.params, "limit": limit, "after_job_id": after_job_id},
        )

    async def snapshot_ids(
        self, rows: Sequence[Mapping[str, Any]], choice: SnapshotChoice
    ) -> list[str]:
        """Where each of the dead letters goes. Raises Refused for an endpoint that is gone."""
        if choice is SnapshotChoice.OLD:
            return [str(row["snapshot_id"]) for row in rows]
        self.check_endpoints({row["endpoint_key"]: None for row in rows}, choice)
        return [await self._snapshots.store(row["namespace"], row["endpoint_key"]) for row in rows]

    async def queue_again(
        self,
        connection: Connection,
        rows: Sequence[Mapping[str, Any]],
        snapshot_ids: Sequence[str],
        reason: str,
        batch_id: str | None = None,
    ) -> list[Requeued]:
        """Decides on dead letters and queues their new jobs; those decided meanwhile are left out.

        The caller owns the transaction, appends the acts to the trail, and calls `wake` after it.
        """
        params = {
            "namespace": array(row["namespace"] for row in rows),
            "job_id": array(row["job_id"] for row in rows),
            "sequence": array(row["sequence"] + 1 for row in rows),
            "new_job_id": array(_new_job_id(row) for row in rows),
            "snapshot_id": array(snapshot_ids),
            "reason": reason,
            "max_attempts": self._max_attempts,
            "batch_id": batch_id,
        }
        cursor = await connection.execute(SQL.requeue, params, binary=True)
        return [Requeued(row["job_id"], row["new_job_id"]) for row in await cursor.fetchall()]

    def wake(self) -> None:
        """Says that jobs have been queued."""
        self._wake()

    async def discard(self, job_id: str, reason: str, asked_by: str = "api") -> None:
        """Notes that the dead letter stays one.

        Raises NotFound, AlreadyRequeued, and RequestInvalid if there is no reason.
        """
        check_reason(reason)
        row = await self._find(job_id)
        key = {"namespace": row["namespace"], "job_id": row["job_id"], "reason": reason}
        if row["sequence"] or not await self._discard(key, asked_by):
            raise _already(await self._find(job_id))

    async def _discard(self, key: Mapping[str, Any], asked_by: str) -> bool:
        act = Act(
            key["namespace"],
            "dead_letter.discarded",
            asked_by,
            key["reason"],
            f"{key['job_id']}/1",
        )
        async with self._database.transaction() as connection:
            cursor = await connection.execute(SQL.discard, key)
            if await cursor.fetchone() is None:
                return False
            await append(connection, act)
        return True

    async def _find(self, job_id: str) -> dict[str, Any]:
        row = await self._database.fetch_one(SQL.dead_letter, {"job_id": job_id})
        if row is None:
            raise NotFound(f"there is no dead letter {job_id}")
        return row

    async def _requeue(
        self,
        rows: Sequence[Mapping[str, Any]],
        reason: str,
        choice: SnapshotChoice,
        asked_by: str,
    ) -> list[Requeued]:
        snapshot_ids = await self.snapshot_ids(rows, choice)
        async with self._database.transaction() as connection:
            requeued = await self.queue_again(connection, rows, snapshot_ids, reason)
            await append(connection, *requeue_acts(rows, requeued, asked_by, reason))
        self._wake()
        return requeued


def _new_job_id(row: Mapping[str, Any]) -> str:
    return derived_id(row["cycle_id"], "requeue", row["job_id"], str(row["sequence"] + 1))


def requeue_acts(
    rows: Sequence[Mapping[str, Any]],
    requeued: Iterable[Requeued],
    asked_by: str,
    reason: str,
    batch_id: str | None = None,
) -> list[Act]:
    """The audit entries of a requeue: one for each namespace, which names every decision."""
    found = {row["job_id"]: row for row in rows}
    subjects: dict[str, list[str]] = {}
    for one in requeued:
        row = found[one.job_id]
        subjects.setdefault(row["namespace"], []).append(f"{one.job_id}/{row['sequence'] + 1}")
    return [_requeue_act(*one, asked_by, reason, batch_id) for one in subjects.items()]


def _requeue_act(
    namespace: str, subjects: list[str], asked_by: str, reason: str, batch_id: str | None
) -> Act:
    detail = {"batchId": batch_id} if batch_id else {}
    action = "dead_letter.requeued"
    if len(subjects) == 1:
        return Act(namespace, action, asked_by, reason, subjects[0], detail)
    return Act(namespace, action, asked_by, reason, detail={**detail, "subjects": subjects})


def check_reason(reason: str) -> None:
    """Raises RequestInvalid for what says nothing."""
    if not reason.strip() or len(reason) > 1000 or "\x00" in reason:
        text = "expected 1 to 1000 characters that say why"
        problems = [{"pointer": "/reason", "message": text}]
        raise RequestInvalid(f"/reason: {text}", problems=problems)


def _already(row: Mapping[str, Any]) -> AlreadyRequeued:
    return AlreadyRequeued(
        f"dead letter {row['job_id']} has been {row['decision']} before",
        decision=row["decision"],
        jobId=row["new_job_id"],
    )
