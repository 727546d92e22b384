"""The catalogue of events: every type that Orbit emits, its version, and what its metadata holds.

A type's version goes up when a field changes its meaning or goes; a new field changes nothing.
Most events are written by the SQL of what they tell (`cycle.sql`, `dispatch.sql`,
`dead_letters.sql`), under these names. Metadata never holds a payload, an answer, an error's text
or a person's words: a reader of telemetry may see less than a reader of the facts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

SPEC_VERSION = "1.0"  # of CloudEvents
INSTALLATION = "*"  # the namespace of what concerns all


class EventType(StrEnum):
    """The types' names as they are stored."""

    EXECUTION_STARTED = "execution_started"
    STAGE_COMPLETED = "stage_completed"
    EXECUTION_FINISHED = "execution_finished"
    EXECUTION_FAILED = "execution_failed"
    DELIVERY_CONFIRMED = "delivery_confirmed"
    DELIVERY_FAILED = "delivery_failed"
    DELIVERY_NOT_SENT = "delivery_not_sent"
    DELIVERY_UNKNOWN = "delivery_unknown"
    DEAD_LETTERED = "dead_lettered"
    REQUEUED = "requeued"
    LANE_OPENED = "lane_opened"
    LANE_HELD = "lane_held"
    LANE_CLOSED = "lane_closed"
    NAMESPACE_HALTED = "namespace_halted"
    NAMESPACE_RESUMED = "namespace_resumed"
    CONFIGURATION_ACTIVATED = "configuration_activated"
    OVERLAY_ADDED = "overlay_added"
    OVERLAY_ENDED = "overlay_ended"
    OUTCOME_REPORTED = "outcome_reported"
    PROPOSAL_MADE = "proposal_made"
    PROPOSAL_DECIDED = "proposal_decided"
    AUTONOMY_SET = "autonomy_set"
    AUTONOMY_SKIPPED = "autonomy_skipped"
    AUTONOMY_SHADOWED = "autonomy_shadowed"
    AUTONOMY_JUDGED = "autonomy_judged"
    TELEMETRY_DROPPED = "telemetry_dropped"


@dataclass(frozen=True, slots=True)
class Kind:
    """What an event of a type says; `fields` are its metadata's names with what they hold."""

    meaning: str
    fields: MappingProxyType[str, str] = field(default_factory=lambda: MappingProxyType({}))
    version: int = 1


def _kind(meaning: str, **fields: str) -> Kind:
    return Kind(meaning, MappingProxyType(fields))


_ATTEMPT = {
    "jobId": "the job",
    "attempt": "its number, from 1",
    "endpointKey": "the endpoint",
    "status": "the answer's HTTP status, or null",
    "seconds": "from the attempt's beginning to the end of the answer, or null",
}
_END = {
    "items": "how many items the cycle made",
    "jobs": "how many jobs",
    "delivered": "jobs delivered",
    "dead": "jobs dead-lettered",
    "attempts": "attempts of all jobs",
    "unknown": "attempts nobody knows the end of",
    "bytes": "bytes of the attempts' bodies",
    "durationSeconds": "from acceptance to the end",
    "halted": "whether its namespace was halted meanwhile",
    "revision": "the configuration's revision that it was pinned to, or null",
}
_OVERLAY = {
    "overlayId": "which",
    "target": "profile or run_profile: what it lies on",
    "targetId": "which one",
}
_LANE = {
    "endpointKey": "the lane's endpoint",
    "failures": "failures in a row",
    "holdSeconds": "until the next probe, or null",
}

CATALOGUE = MappingProxyType(
    {
        EventType.EXECUTION_STARTED: _kind(
            "A cycle was accepted.",
            trigger="what began it",
            revision="the configuration's revision, or null",
            rerunOf="the cycle that it runs again, or null",
        ),
        EventType.STAGE_COMPLETED: _kind(
            "A cycle has a further checkpoint.",
            stage="which",
            size="bytes of its output, or null",
        ),
        EventType.EXECUTION_FINISHED: _kind("A cycle's last job is done.", **_END),
        EventType.EXECUTION_FAILED: _kind("A cycle failed before it had jobs.", **_END),
        EventType.DELIVERY_CONFIRMED: _kind("An attempt was answered with 2xx.", **_ATTEMPT),
        EventType.DELIVERY_FAILED: _kind("An attempt failed.", **_ATTEMPT),
        EventType.DELIVERY_NOT_SENT: _kind("Of an attempt no byte left.", **_ATTEMPT),
        EventType.DELIVERY_UNKNOWN: _kind("Nobody knows what became of an attempt.", **_ATTEMPT),
        EventType.DEAD_LETTERED: _kind(
            "A job is out of attempts.",
            jobId="the job",
            endpointKey="its endpoint",
            attempts="how many it had",
        ),
        EventType.REQUEUED: _kind(
            "A dead letter was brought back.",
            jobId="the dead job",
            newJobId="the job in its place",
            endpointKey="its endpoint",
        ),
        EventType.LANE_OPENED: _kind("A lane's breaker opened.", **_LANE),
        EventType.LANE_HELD: _kind("A probe failed: the lane is held on.", **_LANE),
        EventType.LANE_CLOSED: _kind("A lane is well again.", **_LANE),
        EventType.NAMESPACE_HALTED: _kind("A namespace was halted.", epoch="of the halt"),
        EventType.NAMESPACE_RESUMED: _kind(
            "A namespace runs again.", epoch="of the halt", cause="a person, or until"
        ),
        EventType.CONFIGURATION_ACTIVATED: _kind(
            "A configuration came into force.", revision="which"
        ),
        EventType.OVERLAY_ADDED: _kind(
            "A change was laid over the files.", **_OVERLAY, origin="a person, or autonomy"
        ),
        EventType.OVERLAY_ENDED: _kind(
            "A change over the files is there no more.",
            **_OVERLAY,
            ending="undone, adopted, dropped, rolled_back or reverted",
        ),
        EventType.OUTCOME_REPORTED: _kind(
            "Somebody said what a cycle, item or job was worth.",
            metric="what was measured",
            value="a score from 0 to 1, or with a unit any number",
            unit="of the value, or null for a score",
            itemIndex="the item, or null",
            jobId="the job, or null",
            outcomeId="under which it was reported",
            reportedBy="the id of the key's holder that reported it",
            revision="the configuration's revision that its cycle was pinned to, or null",
        ),
        EventType.PROPOSAL_MADE: _kind(
            "A change of a profile was suggested.",
            proposalId="the proposal",
            rule="which rule suggests it",
        ),
        EventType.PROPOSAL_DECIDED: _kind(
            "A proposal was decided on, or ended by itself.",
            proposalId="the proposal",
            rule="which rule suggested it",
            decision="approved, rejected, expired or superseded",
        ),
        EventType.AUTONOMY_SET: _kind(
            "What autonomy may do with a profile is another.",
            mode="armed, shadow or disarmed",
            cause="person, halt, rollback, revert or reach",
        ),
        EventType.AUTONOMY_SKIPPED: _kind(
            "A function of autonomy did nothing; once a day for each reason.",
            function="arm, shadow, apply or judge",
            why="the reason's code",
        ),
        EventType.AUTONOMY_SHADOWED: _kind(
            "What autonomy would have done with a proposal.",
            proposalId="the proposal",
            wouldApply="whether it would have applied it",
            why="the reason's code where not, or null",
        ),
        EventType.AUTONOMY_JUDGED: _kind(
            "A change's probation has ended.",
            overlayId="the change",
            verdict="breached, kept or inconclusive",
        ),
        EventType.TELEMETRY_DROPPED: _kind(
            "Events were dropped before every stored consumer had read them.",
            week="the Monday of their week",
            lastPosition="of the last one",
            consumers="who had not read them",
        ),
    }
)
