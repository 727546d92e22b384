"""What a person does with dead letters: brings one back as a new job, or lets it be.

A requeue makes a new job that names the old one, with the same bytes, and a decision on the old
one in the same transaction; so a second requeue is refused, unless it is forced. The cycle has
ended for the job and is not counted again. Nothing here is ever done by Orbit itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from orbit.clock import derived_id
from orbit.database.pool import Database
from orbit.database.queries import array, load
from orbit.errors import AlreadyRequeued, MayHaveArrived, NotFound, Refused, RequestInvalid
from orbit.execution.dispatch import Snapshots

SQL = load("dead_letters")


class SnapshotChoice(StrEnum):
    """Where a requeued job goes: the endpoint as it is now, or as it stood for the old job."""

    CURRENT = "current"
    OLD = "old"


@dataclass(frozen=True, slots=True)
class Selection:
    """Open dead letters of one namespace, narrowed by endpoint and cause."""

    namespace: str
    endpoint_key: str | None = None
    cause: str | None = None


@dataclass(frozen=True, slots=True)
class Requeued:
    """A dead letter and the job that it came back as."""

    job_id: str
    new_job_id: str


@dataclass(frozen=True, slots=True)
class Found:
    """How many dead letters a bulk requeue finds, and how many it leaves out.

    Those left out may have arrived: somebody has to ask the receiver about each of them.
    """

    matching: int
    may_have_arrived: int


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
    ) -> Requeued:
        """Queues the dead letter's item again, for the same endpoint.

        Raises NotFound, AlreadyRequeued, RequestInvalid (no reason), MayHaveArrived if an attempt
        ended unknown (unless forced), and Refused if the endpoint or the payload is gone.
        """
        _check_reason(reason)
        row = await self._find(job_id)
        if row["sequence"] and not is_forced:
            raise _already(row)
        if row["unknown_attempt"] and not is_forced:
            raise MayHaveArrived(
                f"attempt {row['unknown_attempt']} may have arrived; ask the receiver, then force",
                attempt=row["unknown_attempt"],
            )
        if not row["has_payload"]:
            raise Refused(f"the payload of job {job_id} is past its retention")
        requeued = await self._requeue([row], reason, snapshot)
        if not requeued:
            raise _already(await self._find(job_id))
        return requeued[0]

    async def count(self, selection: Selection) -> Found:
        """How many dead letters a requeue of the selection would find, and leave out."""
        row = await self._database.fetch_one(SQL.count_open_dead_letters, _params(selection))
        return Found(**row) if row else Found(0, 0)

    async def requeue_many(
        self,
        selection: Selection,
        reason: str,
        *,
        limit: int,
        snapshot: SnapshotChoice = SnapshotChoice.CURRENT,
    ) -> list[Requeued]:
        """Queues the selection again, oldest first, at most `limit` of them, all or none.

        Those that may have arrived are left out.
        Raises RequestInvalid (no reason), and Refused if an endpoint is gone.
        """
        _check_reason(reason)
        rows = await self._database.fetch_all(
            SQL.open_dead_letters, {**_params(selection), "limit": limit}
        )
        return await self._requeue(rows, reason, snapshot) if rows else []

    async def discard(self, job_id: str, reason: str) -> None:
        """Notes that the dead letter stays one.

        Raises NotFound, AlreadyRequeued, and RequestInvalid if there is no reason.
        """
        _check_reason(reason)
        row = await self._find(job_id)
        key = {"namespace": row["namespace"], "job_id": row["job_id"], "reason": reason}
        if row["sequence"] or not await self._database.fetch_one(SQL.discard, key):
            raise _already(await self._find(job_id))

    async def _find(self, job_id: str) -> dict[str, Any]:
        row = await self._database.fetch_one(SQL.dead_letter, {"job_id": job_id})
        if row is None:
            raise NotFound(f"there is no dead letter {job_id}")
        return row

    async def _requeue(
        self, rows: Sequence[Mapping[str, Any]], reason: str, choice: SnapshotChoice
    ) -> list[Requeued]:
        params = {
            "namespace": array(row["namespace"] for row in rows),
            "job_id": array(row["job_id"] for row in rows),
            "sequence": array(row["sequence"] + 1 for row in rows),
            "new_job_id": array(_new_job_id(row) for row in rows),
            "snapshot_id": array([await self._snapshot(row, choice) for row in rows]),
            "reason": reason,
            "max_attempts": self._max_attempts,
        }
        found = await self._database.fetch_all(SQL.requeue, params)
        self._wake()
        return [Requeued(row["job_id"], row["new_job_id"]) for row in found]

    async def _snapshot(self, row: Mapping[str, Any], choice: SnapshotChoice) -> str:
        if choice is SnapshotChoice.OLD:
            return str(row["snapshot_id"])
        key = row["endpoint_key"]
        if key not in self._snapshots.keys:
            raise Refused(
                f"endpoint {key} is not configured any more; the old snapshot is where its jobs "
                "went before",
                endpointKey=key,
            )
        return await self._snapshots.store(row["namespace"], key)


def _new_job_id(row: Mapping[str, Any]) -> str:
    return derived_id(row["cycle_id"], "requeue", row["job_id"], str(row["sequence"] + 1))


def _params(selection: Selection) -> dict[str, Any]:
    return {
        "namespace": selection.namespace,
        "endpoint_key": selection.endpoint_key,
        "cause": selection.cause,
    }


def _check_reason(reason: str) -> None:
    if not reason.strip() or len(reason) > 1000 or "\x00" in reason:
        raise RequestInvalid("reason: expected 1 to 1000 characters that say why")


def _already(row: Mapping[str, Any]) -> AlreadyRequeued:
    return AlreadyRequeued(
        f"dead letter {row['job_id']} has been {row['decision']} before",
        decision=row["decision"],
        jobId=row["new_job_id"],
    )
