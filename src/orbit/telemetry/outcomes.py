"""Outcomes: what a cycle, an item or a job was worth, said later by whoever can judge it.

An outcome is an event; who reported it, and a digest of what was said, stay for ever, and are
sealed in the audit trail. It is reported under an id that its reporter chooses, once: the same
again changes nothing, something else under the same id is refused. However late,
it is taken while the cycle is kept here; afterwards there is nothing that it could be of. It names
the configuration that its cycle was pinned to, so that a late one counts for the profile as it was.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import isfinite

from orbit.canonical import canonical_json, sha256_hex
from orbit.database.pool import Connection
from orbit.errors import IdempotencyKeyReused, NotFound, RequestInvalid
from orbit.telemetry.catalogue import EventType
from orbit.telemetry.emission import SQL, Event, emit


@dataclass(frozen=True, slots=True)
class Outcome:
    """A metric's value: a score from 0 to 1, or with a unit any finite number.

    Of the cycle `run_id`, of one item of it, or of a job, which knows its cycle.
    """

    namespace: str
    outcome_id: str
    metric: str
    value: float
    unit: str | None = None
    run_id: str | None = None
    item_index: int | None = None
    job_id: str | None = None

    def check(self) -> None:
        """Raises RequestInvalid for a value or a subject that is none."""
        if not isfinite(self.value):
            raise RequestInvalid("/value: expected a finite number")
        if self.unit is None and not 0 <= self.value <= 1:
            raise RequestInvalid("/value: expected 0 to 1; a number of another kind needs a unit")
        if (self.run_id is None) == (self.job_id is None):
            raise RequestInvalid("expected either runId or jobId")
        if self.item_index is not None and self.run_id is None:
            raise RequestInvalid("/itemIndex: expected with the runId that it is of")


async def report(connection: Connection, outcome: Outcome, reported_by: str | None = None) -> bool:
    """Whether the outcome is new, in the open transaction. `reported_by`: the id of who says it.

    Raises RequestInvalid, NotFound where the cycle, item or job is not kept in the namespace, and
    IdempotencyKeyReused where its id was used for something else.
    """
    outcome.check()
    said = asdict(outcome)
    cursor = await connection.execute(SQL.outcome_subject, said)
    subject = await cursor.fetchone()
    if subject is None:
        raise NotFound("there is no such cycle, item or job in this namespace")
    key = {
        "namespace": outcome.namespace,
        "outcome_id": outcome.outcome_id,
        "digest": sha256_hex(canonical_json(said)),
        "cycle_id": subject["cycle_id"],
        "reported_by": reported_by,
    }
    if (await connection.execute(SQL.insert_outcome, key)).rowcount == 0:
        known = await (await connection.execute(SQL.known_outcome, key)).fetchone()
        if known is None or known["digest"] != key["digest"]:
            raise IdempotencyKeyReused("another outcome was reported under this id")
        return False
    told = {
        "metric": outcome.metric,
        "value": outcome.value,
        "unit": outcome.unit,
        "itemIndex": subject["item_index"],
        "jobId": outcome.job_id,
        "outcomeId": outcome.outcome_id,
        "reportedBy": reported_by,
        "revision": subject["revision"],
    }
    event = Event(
        outcome.namespace,
        EventType.OUTCOME_REPORTED,
        told,
        subject["profile_id"],
        subject["run_profile_id"],
        subject["cycle_id"],
    )
    await emit(connection, event)
    return True
