"""The dispatch queue: one job per item and endpoint, sent at least once under a stable id.

Design note. A job is a fact; its lease says who may send it and when. A claim opens the next
attempt by raising its number, and commits before a byte leaves. Whoever holds the lease settles
the attempt: a receipt, and the lease is gone (delivered, or dead) or waits for the next attempt.
A worker that dies leaves an open attempt behind; once its lease is over, anybody settles it as
`unknown`, because bytes may have left. So every number up to the last has a receipt. A receipt
is written even if the lease is lost meanwhile, unless the attempt has one: it is the truth about
the wire. The lease is moved by its holder only.

A lane is a namespace's queue for an endpoint; all nodes share its cap, rate and breaker. While a
breaker is open one attempt at a time probes the lane, and is not counted against its job: an
outage, however long, costs a job at most the attempts that it made before the breaker opened.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import structlog

from orbit import metrics
from orbit.database.group_commit import GroupCommit
from orbit.database.pool import Connection, Database
from orbit.database.queries import array, load
from orbit.endpoints import Breaker, Endpoint
from orbit.execution.lapse import LAPSED
from orbit.execution.retry import Backoff, full_jitter, parse_retry_after, with_retry_after
from orbit.execution.wire import Outcome, WireResult
from orbit.vocabulary import is_drill

SQL = load("dispatch")
CYCLE_SQL = load("cycle")
INLINE_BYTES = 16384
RETRY_SHARE = 0.25  # of a lane's places and tokens, for later attempts while first ones wait
SECRET_UNREADABLE = "secret unreadable"  # noqa: S105 - a cause
NOT_PREPARED = "not prepared"
CUT_OFF = "cut off"
_NEVER_LEFT = frozenset({SECRET_UNREADABLE, NOT_PREPARED})  # no receiver was tried
_NOT_OF_LANE = _NEVER_LEFT | {CUT_OFF, LAPSED}  # say nothing of the receiver
_TALLY_PARTS = 8
_NEVER_OPENS = Breaker(failures=2**31 - 1, share=2.0)  # but closes, if it was open before
# Of a job whose endpoint this node does not know: nobody says how much its receiver bears.
_ANY_ENDPOINT = Endpoint(key="", url="", max_concurrency=1, rate_per_second=1.0, on_unknown="hold")
_log = structlog.get_logger("orbit.dispatch")

LaneKey = tuple[str, str]


class ClaimedJob(NamedTuple):
    """A job whose attempt `attempt` is open and ours. `content` is None if it is large.

    `spared` of the attempts, this one included, are not counted against the job. `epoch` is its
    namespace's as it was seen at the claim: the next halt's is higher. `queue_seconds` is None
    where nobody knows how long it waited.
    """

    namespace: str
    job_id: str
    cycle_id: str
    endpoint_key: str
    lease_number: int
    attempt: int
    is_probe: bool
    spared: int
    queue_seconds: float | None
    snapshot_id: str
    digest: str
    content_type: str
    size: int
    max_attempts: int
    profile_id: str | None
    run_profile_id: str
    traceparent: str
    content: bytes | None
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class Lane:
    """A lane with jobs waiting, and what holds it up.

    In how many seconds its first job is due, and its breaker lets one through (None: closed);
    what its rate's tokens were so many seconds ago (None: full).
    """

    namespace: str
    endpoint_key: str
    is_known: bool
    due_in_seconds: float
    probe_in_seconds: float | None
    tokens: float | None
    tokens_age_seconds: float | None

    @property
    def key(self) -> LaneKey:
        return self.namespace, self.endpoint_key

    def ready_in_seconds(self, endpoint: Endpoint) -> float:
        """When a claim may find something; with a rate, that is worth a claim."""
        is_held = self.probe_in_seconds is not None and endpoint.breaker is not None
        ready = max(self.due_in_seconds, (self.probe_in_seconds or 0.0) if is_held else 0.0)
        rate = endpoint.rate_per_second
        if rate is None or self.tokens is None:
            return ready
        missing = grain(rate) - self.tokens
        return max(ready, missing / rate - (self.tokens_age_seconds or 0.0))


def grain(rate: float) -> float:
    """How many tokens are gathered before they are worth a claim: a tenth of a second's."""
    return max(1.0, rate * 0.1)


@dataclass(frozen=True, slots=True)
class NextMove:
    """What becomes of a job after an attempt: the next one in `retry_seconds`, or it is done.

    A job that is done with a `cause` is dead.
    """

    retry_seconds: float | None
    cause: str | None


class Settlement(NamedTuple):
    """The end of one attempt of node `node_id`: what its receipt says, and the job's next move.

    `is_lane_well`: what it says of the lane. None: nothing, as when a payload is refused for good
    (unless it was a probe: the receiver is back) or when its worker died or was stopped.
    `is_unspared`: a probe that could not even be tried counts against its job after all.
    """

    job: ClaimedJob
    node_id: str
    result: WireResult
    started_at: datetime | None
    move: NextMove
    is_lane_well: bool | None = None
    is_unspared: bool = False

    @property
    def is_done(self) -> bool:
        """Whether the job has no further attempt."""
        return self.move.retry_seconds is None

    @property
    def lane(self) -> LaneKey:
        """The lane that the attempt was of."""
        return self.job.namespace, self.job.endpoint_key


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long a failed attempt's successor waits; `draw` is the source of chance."""

    backoff: Backoff
    draw: Callable[[], float]

    def next_move(
        self,
        result: WireResult,
        counted: int,
        max_attempts: int,
        now: datetime,
        *,
        permanent_statuses: Collection[int] = (),
        on_unknown: str = "retry",
    ) -> NextMove:
        """The move after the attempt; `counted` of the job's attempts count against it."""
        if result.outcome is Outcome.DELIVERED:
            return NextMove(None, None)
        cause = result.cause or result.outcome.value
        if result.outcome is Outcome.UNKNOWN and on_unknown == "hold":
            return NextMove(None, f"unknown, left to a person: {cause}")
        if counted >= max_attempts or result.status in permanent_statuses:
            return NextMove(None, cause)
        delay = full_jitter(self.backoff, max(counted, 1), self.draw)
        asked = parse_retry_after(result.retry_after, now) if result.retry_after else None
        return NextMove(with_retry_after(delay, asked, self.backoff.cap_seconds), None)


class DispatchQueue:
    """Claims, renews, settles and recovers jobs for one node, of all namespaces but drills'.

    With `only` it is a drill's worker: it sees that namespace, and recovers nothing.
    """

    def __init__(
        self,
        database: Database,
        node_id: str,
        lease_seconds: float,
        policy: RetryPolicy,
        endpoints: Mapping[str, Endpoint],
        *,
        only: str | None = None,
    ) -> None:
        self._database, self._node_id, self._only = database, node_id, only
        self._lease_seconds, self._policy, self._endpoints = lease_seconds, policy, endpoints
        self._part = zlib.crc32(node_id.encode()) % _TALLY_PARTS
        self._settlements = GroupCommit(database, self._flush, lanes=1)
        self.on_held: Callable[[Collection[LaneKey]], None] = lambda _: None  # told of such lanes

    def endpoint(self, key: str) -> Endpoint:
        """The endpoint as this node has it now, which the lane's limits are of."""
        return self._endpoints.get(key, _ANY_ENDPOINT)

    def is_held(self, lane: Lane) -> bool:
        """Whether only probes of it are sent."""
        return (
            lane.probe_in_seconds is not None
            and self.endpoint(lane.endpoint_key).breaker is not None
        )

    async def lanes(self) -> list[Lane]:
        """Every lane of its own that has a job, due now or later."""
        found = [Lane(**row) for row in await self._database.fetch_all(SQL.busy_lanes)]
        lanes = [lane for lane in found if self._is_ours(lane.namespace)]
        if new := [lane.key for lane in lanes if not lane.is_known]:
            await self._database.execute(SQL.insert_lanes, _keys(new))
        return lanes

    def _is_ours(self, namespace: str) -> bool:
        return namespace == self._only if self._only else not is_drill(namespace)

    async def claim(self, rooms: Mapping[LaneKey, int], places: int) -> list[ClaimedJob]:
        """Opens the next attempt of due jobs: of each lane as many as there is room for.

        That is the caller's room, or less if the lane's cap, rate or breaker says so; of a halted
        namespace nothing. `places`:
        how many the caller may have in flight in all, of which retries have their share.
        """
        endpoints = [self.endpoint(key) for _, key in rooms]
        asked = {
            **_keys(rooms),
            "room": array(rooms.values()),
            "cap": array(endpoint.max_concurrency for endpoint in endpoints),
            "rate": array(endpoint.rate_per_second for endpoint in endpoints),
            "has_breaker": array(endpoint.breaker is not None for endpoint in endpoints),
            "places": places,
            "retry_share": RETRY_SHARE,
            "chance": self._policy.draw(),
            "node_id": self._node_id,
            "lease_seconds": self._lease_seconds,
        }
        async with self._database.batch() as connection:
            fences = await connection.execute(SQL.share_fences, _keys(rooms))
            await connection.execute(SQL.hold_lanes, _keys(rooms))
            cursor = await connection.execute(SQL.claim_jobs, asked, binary=True)
        row = await cursor.fetchone()
        if row is None or row["job_id"] is None:
            return []
        leases = {lease[1]: lease for lease in zip(*row.values(), strict=True)}
        epochs = {fence["namespace"]: fence["epoch"] for fence in await fences.fetchall()}
        # Leases that nobody knows of would end as attempts of unknown outcome.
        return await self._database.persist(lambda: self._claimed(row, leases, epochs))

    async def _claimed(
        self,
        columns: Mapping[str, Any],
        leases: Mapping[str, tuple[Any, ...]],
        epochs: Mapping[str, int],
    ) -> list[ClaimedJob]:
        """The jobs of these leases; what they are never changes, so it is read apart."""
        runs = sorted({lease[2]: lease[0] for lease in leases.values()}.items())
        asked = {
            "namespace": array(columns["namespace"]),
            "job_id": array(columns["job_id"]),
            "cycle_id": array(columns["cycle_id"]),
            "first_job": min(leases),
            "last_job": max(leases),
            "run_namespace": array(namespace for _, namespace in runs),
            "run_id": array(cycle_id for cycle_id, _ in runs),
            "first_cycle": runs[0][0],
            "last_cycle": runs[-1][0],
            "inline_bytes": INLINE_BYTES,
        }
        row = await self._database.fetch_one(SQL.claimed_jobs, asked)
        if row is None or row["job_id"] is None or row["run_id"] is None:
            return []
        run_of = {cycle_id: run for cycle_id, *run in zip(*map(row.pop, _RUN), strict=True)}
        contents = _cut(row.pop("contents") or b"", row.pop("length"))
        return [
            ClaimedJob._make((*lease, *job, *run_of[lease[2]], content, epochs[lease[0]]))
            for job_id, *job, content in zip(*row.values(), contents, strict=True)
            if (lease := leases[job_id])[2] in run_of
        ]

    async def content(self, job: ClaimedJob) -> bytes:
        """The job's bytes."""
        if job.content is not None:
            return job.content
        row = await self._database.fetch_one(
            CYCLE_SQL.payload_content,
            {"namespace": job.namespace, "cycle_id": job.cycle_id, "digest": job.digest},
        )
        if row is None:
            raise LookupError(f"the payload of job {job.job_id} is not stored")
        return bytes(row["content"])

    async def settle(
        self,
        job: ClaimedJob,
        result: WireResult,
        started_at: datetime,
        now: datetime,
        *,
        permanent_statuses: Collection[int] = (),
        on_unknown: str = "retry",
    ) -> NextMove:
        """Returns when the attempt's receipt and the job's next move are committed."""
        is_unspared = job.is_probe and result.cause in _NEVER_LEFT
        move = self._policy.next_move(
            result,
            job.attempt - job.spared + is_unspared,
            job.max_attempts,
            now,
            permanent_statuses=permanent_statuses,
            on_unknown=on_unknown,
        )
        is_final = result.status in permanent_statuses
        is_well = _is_lane_well(result, is_final=is_final, is_probe=job.is_probe)
        await self._settlements.commit(
            Settlement(job, self._node_id, result, started_at, move, is_well, is_unspared)
        )
        return move

    async def recover(self, now: datetime, limit: int = 500, *, of: str | None = None) -> int:
        """Settles as unknown the attempts whose worker is gone; how many there were.

        `of`: those of one namespace only.
        """
        if self._only is not None:
            return 0
        async with self._database.batch() as connection:
            cursor = await connection.execute(SQL.expired_jobs, {"limit": limit, "namespace": of})
            lost = [self._lost(row, now) for row in await cursor.fetchall()]
            if not lost:
                return 0
            tell = await self._settle(connection, lost)
        await tell()
        return len(lost)

    def _lost(self, row: Mapping[str, Any], now: datetime) -> Settlement:
        lost = WireResult(Outcome.UNKNOWN, cause="worker lost", error="the worker's lease ran out")
        move = self._policy.next_move(
            lost,
            row["attempt"] - row["spared"],
            row["max_attempts"],
            now,
            on_unknown=row["on_unknown"],
        )
        job = ClaimedJob(**{name: row[name] for name in _LOST}, **_UNTOLD)
        return Settlement(job, row["node_id"], lost, None, move)

    async def renew(self, jobs: Sequence[ClaimedJob]) -> set[tuple[str, int]]:
        """Prolongs leases; the ids and lease numbers of those that were prolonged."""
        rows = await self._database.fetch_all(
            SQL.renew_jobs, {**self._leases(jobs), "lease_seconds": self._lease_seconds}
        )
        return {(row["job_id"], row["lease_number"]) for row in rows}

    async def release(self, jobs: Sequence[ClaimedJob]) -> None:
        """Gives back jobs of whose open attempt no byte has left."""
        await self._database.execute(SQL.release_jobs, self._leases(jobs))

    async def release_unseen(self, lanes: Collection[LaneKey], known: Sequence[ClaimedJob]) -> None:
        """Gives back this node's open attempts in lanes, but those that it knows of."""
        asked = {
            "lane_namespace": array(namespace for namespace, _ in lanes),
            "lane_key": array(key for _, key in lanes),
        }
        await self._database.execute(SQL.release_unseen, self._leases(known) | asked)

    async def drained(self) -> None:
        """Returns when no settlement is waiting to be committed."""
        await self._settlements.drained()

    def _leases(self, jobs: Sequence[ClaimedJob]) -> dict[str, Any]:
        return {
            "node_id": self._node_id,
            "namespace": array(job.namespace for job in jobs),
            "job_id": array(job.job_id for job in jobs),
            "lease_number": array(job.lease_number for job in jobs),
        }

    async def _flush(self, settlements: Sequence[Settlement]) -> Sequence[None]:
        async with self._database.batch() as connection:
            tell = await self._settle(connection, settlements)
        await tell()
        metrics.commit_entries.labels("settlements").observe(len(settlements))
        return [None] * len(settlements)

    async def _settle(
        self, connection: Connection, settlements: Sequence[Settlement]
    ) -> Callable[[], Awaitable[None]]:
        """Writes the ends of attempts; gives what is to be called after the commit."""
        rows = _rows(settlements) | {"part": self._part}
        await connection.execute(SQL.settle_jobs, rows)
        await connection.execute(SQL.insert_receipts, rows)
        ended = None
        if done := sorted({(s.job.namespace, s.job.cycle_id) for s in settlements if s.is_done}):
            touched = {
                "namespace": array(namespace for namespace, _ in done),
                "cycle_id": array(cycle_id for _, cycle_id in done),
                "first": min(cycle_id for _, cycle_id in done),
                "last": max(cycle_id for _, cycle_id in done),
                "node_id": self._node_id,
            }
            ended = await connection.execute(CYCLE_SQL.end_dispatched, touched)
        verdicts = self._lane_rows(settlements)
        changes = await connection.execute(SQL.judge_lanes, verdicts)

        async def tell() -> None:
            _count(settlements, 0 if ended is None else ended.rowcount)
            changed = await changes.fetchall()
            self.on_held({_lane_of(row) for row in changed if row["change"] != "closed"})
            for row in changed:
                metrics.lane_changes.labels(row["change"]).inc()
                _log.warning(f"lane_{row['change']}", **{name: row[name] for name in _TOLD})

        return tell

    def _lane_rows(self, settlements: Sequence[Settlement]) -> dict[str, Any]:
        """What the batch says of each lane, with its breaker's limits."""
        lanes: dict[LaneKey, list[Settlement]] = {}
        for settlement in settlements:
            lanes.setdefault(settlement.lane, []).append(settlement)
        of_lane = [self.endpoint(key).breaker for _, key in lanes]
        results = [
            _lane_result(ends, has_breaker=breaker is not None)
            for ends, breaker in zip(lanes.values(), of_lane, strict=True)
        ]
        breakers = [breaker or _NEVER_OPENS for breaker in of_lane]
        return {
            "lane_namespace": array(namespace for namespace, _ in lanes),
            "lane_key": array(key for _, key in lanes),
            **{name: array(r[name] for r in results) for name in _LANE_RESULT},
            "limit_failures": array(breaker.failures for breaker in breakers),
            "limit_share": array(breaker.share for breaker in breakers),
            "least": array(breaker.least for breaker in breakers),
            "window_seconds": array(breaker.window_seconds for breaker in breakers),
            "hold_seconds": array(breaker.hold_seconds for breaker in breakers),
            "longest_hold_seconds": array(breaker.longest_hold_seconds for breaker in breakers),
            "part": self._part,
            "settler_id": self._node_id,
        }


_RUN = ("run_id", "profile_id", "run_profile_id", "traceparent")
_LOST = (
    "namespace",
    "job_id",
    "cycle_id",
    "endpoint_key",
    "lease_number",
    "attempt",
    "is_probe",
    "spared",
    "digest",
    "size",
    "max_attempts",
    "profile_id",
    "run_profile_id",
)
_OF_JOB = (
    "namespace",
    "job_id",
    "cycle_id",
    "profile_id",
    "run_profile_id",
    "endpoint_key",
    "lease_number",
    "attempt",
    "is_probe",
    "digest",
    "size",
    "queue_seconds",
)
_OF_RESULT = (
    "status",
    "error",
    "connect_seconds",
    "first_byte_seconds",
    "total_seconds",
    "answer_content_type",
    "is_reused",
)
_UNTOLD: dict[str, Any] = {  # of an attempt that is only to be settled
    "queue_seconds": None,
    "snapshot_id": "",
    "content_type": "",
    "traceparent": "",
    "content": None,
}
_TOLD = ("namespace", "endpoint_key", "failures", "hold_seconds")
_LANE_RESULT = (
    "attempts",
    "failures",
    "last_failures",
    "has_success",
    "may_close",
    "has_probe_failed",
)


def _is_lane_well(result: WireResult, *, is_final: bool, is_probe: bool) -> bool | None:
    if result.outcome is Outcome.DELIVERED or (is_final and is_probe):
        return True
    return None if is_final or result.cause in _NOT_OF_LANE else False


def _lane_result(ends: Sequence[Settlement], *, has_breaker: bool) -> dict[str, int | bool]:
    """Counts of one lane's ends, in the order in which they came.

    What was sent before the breaker opened and arrives after it closes none.
    """
    verdicts = [end.is_lane_well for end in ends]
    last_failures = 0
    for is_well in verdicts:
        last_failures = 0 if is_well else last_failures + (is_well is False)
    probes = [end.is_lane_well for end in ends if end.job.is_probe]
    return {
        "attempts": len(verdicts) - verdicts.count(None),
        "failures": verdicts.count(False),
        "last_failures": last_failures,
        "has_success": True in verdicts,
        "may_close": True in (probes if has_breaker else verdicts),
        "has_probe_failed": False in probes,
    }


def _lane_of(row: Mapping[str, Any]) -> LaneKey:
    return row["namespace"], row["endpoint_key"]


def _cut(contents: bytes, lengths: Iterable[int | None]) -> Iterator[bytes | None]:
    """Of bytes one after the other, each for itself; None where there are none."""
    start = 0
    for length in lengths:
        end = start + (length or 0)
        yield None if length is None else contents[start:end]
        start = end


def _keys(lanes: Iterable[LaneKey]) -> dict[str, Any]:
    return {
        "namespace": array(namespace for namespace, _ in lanes),
        "endpoint_key": array(key for _, key in lanes),
    }


def _count(settlements: Sequence[Settlement], ended: int) -> None:
    for outcome, count in Counter(s.result.outcome for s in settlements).items():
        metrics.attempts.labels(outcome.value).inc(count)
    for is_reused, count in Counter(s.result.is_reused for s in settlements).items():
        if is_reused is not None:
            metrics.attempt_connections.labels("reused" if is_reused else "new").inc(count)
    taken = [s.result.total_seconds for s in settlements]
    metrics.attempt_seconds.observe(seconds for seconds in taken if seconds is not None)
    metrics.dead_letters.inc(sum(s.is_done and s.move.cause is not None for s in settlements))
    metrics.cycles_ended.labels("finished").inc(ended)


def _rows(settlements: Sequence[Settlement]) -> dict[str, Any]:
    """One array per column, for the receipts and for the leases."""
    job = _columns([s.job for s in settlements])
    result = _columns([s.result for s in settlements])
    return {
        **{name: array(job[name]) for name in _OF_JOB},
        **{name: array(result[name]) for name in _OF_RESULT},
        "outcome": array([outcome.value for outcome in result["outcome"]]),
        "answer": list(result["answer"]),
        "node_id": array([s.node_id for s in settlements]),
        "started_at": array([s.started_at for s in settlements]),
        "is_unspared": array([s.is_unspared for s in settlements]),
        "retry_seconds": array([s.move.retry_seconds for s in settlements]),
        "cause": array([s.move.cause for s in settlements]),
    }


def _columns(rows: Sequence[NamedTuple]) -> dict[str, tuple[Any, ...]]:
    return dict(zip(rows[0]._fields, zip(*rows, strict=True), strict=True))
