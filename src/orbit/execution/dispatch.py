"""The dispatch queue: one job per item and endpoint, sent at least once under a stable id.

Design note. A job is a fact; its lease says who may send it and when. A claim opens the next
attempt by raising its number, and commits before a byte leaves. Whoever holds the lease settles
the attempt: a receipt, and the lease is gone (delivered, or dead) or waits for the next attempt.
A worker that dies leaves an open attempt behind; once its lease is over, anybody settles it as
`unknown`, because bytes may have left. So every number up to the last has a receipt. A receipt
is written even if the lease is lost meanwhile, unless the attempt has one: it is the truth about
the wire. The lease is moved by its holder only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from urllib.parse import unquote_plus, urlsplit

from orbit import metrics
from orbit.canonical import canonical_digest
from orbit.clock import derived_id
from orbit.database.group_commit import GroupCommit
from orbit.database.pool import Connection, Database
from orbit.database.queries import array, load
from orbit.endpoints import Endpoint, without_query
from orbit.errors import NotHere
from orbit.execution.context import ClaimedCycle
from orbit.execution.recorder import NewJob
from orbit.execution.retry import Backoff, full_jitter, parse_retry_after, with_retry_after
from orbit.execution.wire import Outcome, WireResult
from orbit.payload import Payload
from orbit.vault import Vault, fingerprint

SQL = load("dispatch")
CYCLE_SQL = load("cycle")
INLINE_BYTES = 65536
_SECRET_CHARACTERS = 8


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An endpoint as it stood when a job was enqueued."""

    endpoint_key: str
    url: str = field(repr=False)
    method: str
    token: str | None = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)
    timeout_seconds: float
    permanent_statuses: frozenset[int]

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must not be kept of an answer; short values of headers and queries are none."""
        query = urlsplit(self.url).query
        raw = [pair.partition("=")[2] for pair in query.split("&")]
        given = [query, *raw, *map(unquote_plus, raw), *self.headers.values()]
        values = [value for value in given if len(value) >= _SECRET_CHARACTERS]
        return (*values, *([self.token] if self.token else []))


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A job whose attempt `attempt` is open and ours. `content` is None if it is large."""

    namespace: str
    job_id: str
    cycle_id: str
    endpoint_key: str
    lease_number: int
    attempt: int
    queue_seconds: float
    snapshot_id: str
    digest: str
    content_type: str
    size: int
    max_attempts: int
    profile_id: str | None
    run_profile_id: str
    traceparent: str
    content: bytes | None


@dataclass(frozen=True, slots=True)
class Lane:
    """A namespace's queue for an endpoint, and in how many seconds its first job is due."""

    namespace: str
    endpoint_key: str
    due_in_seconds: float


@dataclass(frozen=True, slots=True)
class Settlement:
    """The end of one attempt: its receipt, and the job's next move.

    `retry_seconds` None means that the job is done: delivered, or dead if there is a cause.
    """

    namespace: str
    job_id: str
    cycle_id: str
    lease_number: int
    node_id: str
    attempt: int
    digest: str
    size: int
    result: WireResult
    queue_seconds: float | None
    started_at: datetime | None
    retry_seconds: float | None
    cause: str | None


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long a failed attempt's successor waits; `draw` is the source of chance."""

    backoff: Backoff
    draw: Callable[[], float]

    def next_move(
        self,
        result: WireResult,
        attempt: int,
        max_attempts: int,
        permanent_statuses: Collection[int],
        now: datetime,
    ) -> tuple[float | None, str | None]:
        """Seconds until the next attempt or None, and the cause if the job is dead."""
        if result.outcome is Outcome.DELIVERED:
            return None, None
        if attempt >= max_attempts or result.status in permanent_statuses:
            return None, result.cause or result.outcome.value
        delay = full_jitter(self.backoff, attempt, self.draw)
        asked = parse_retry_after(result.retry_after, now) if result.retry_after else None
        return with_retry_after(delay, asked, self.backoff.cap_seconds), None


class Snapshots:
    """Endpoints as this node knows them, and as they stood for jobs that exist.

    A definition is stored once under its digest, which takes in a fingerprint of the secrets.
    """

    def __init__(
        self, database: Database, vault: Vault, endpoints: Sequence[Endpoint], max_attempts: int
    ) -> None:
        self._database, self._vault, self._max_attempts = database, vault, max_attempts
        self._endpoints = {endpoint.key: endpoint for endpoint in endpoints}
        self._ids = {key: self._digest(endpoint) for key, endpoint in self._endpoints.items()}
        self._stored: set[tuple[str, str]] = set()
        self._read: dict[tuple[str, str], Snapshot] = {}

    @property
    def keys(self) -> frozenset[str]:
        """The endpoints that jobs can be made for."""
        return frozenset(self._endpoints)

    async def jobs(
        self, cycle: ClaimedCycle, items: Sequence[Payload], endpoint_keys: Sequence[str]
    ) -> list[NewJob]:
        """One job per item and endpoint, with ids that are the same each time.

        Raises NotHere for an endpoint that this node does not know.
        """
        for key in endpoint_keys if items else ():
            await self.store(cycle.namespace, key)
        return [
            NewJob(
                job_id=derived_id(cycle.cycle_id, "job", str(index), key),
                item_index=index,
                endpoint_key=key,
                snapshot_id=self._ids[key],
                max_attempts=self._max_attempts,
            )
            for index in range(len(items))
            for key in endpoint_keys
        ]

    async def store(self, namespace: str, key: str) -> str:
        """Makes sure that the endpoint's snapshot is stored; its id. Raises NotHere."""
        endpoint = self._endpoints.get(key)
        if endpoint is None:
            known = ", ".join(sorted(self._endpoints)) or "none"
            raise NotHere(
                f"endpoint {key!r} is not configured on this node (known: {known}; "
                "ORBIT_DISPATCH_ENDPOINTS)"
            )
        snapshot_id = self._ids[key]
        if (namespace, snapshot_id) not in self._stored:
            row = self._row(namespace, snapshot_id, endpoint)
            await self._database.persist(lambda: self._database.execute(SQL.insert_snapshot, row))
            self._stored.add((namespace, snapshot_id))
        return snapshot_id

    async def read(self, namespace: str, snapshot_id: str) -> Snapshot:
        """The endpoint as it stood. Raises SecretUnreadable if its key is gone."""
        found = self._read.get((namespace, snapshot_id))
        if found is None:
            row = await self._database.fetch_one(
                SQL.snapshot, {"namespace": namespace, "snapshot_id": snapshot_id}
            )
            if row is None:
                raise LookupError(f"snapshot {snapshot_id} is not stored")
            secrets = json.loads(self._vault.decrypt(row["secrets_encrypted"]))
            found = Snapshot(
                endpoint_key=row["endpoint_key"],
                url=secrets["url"],
                method=row["method"],
                token=secrets["token"],
                headers=secrets["headers"],
                timeout_seconds=row["timeout_seconds"],
                permanent_statuses=frozenset(row["permanent_statuses"]),
            )
            self._read[namespace, snapshot_id] = found
        return found

    def _digest(self, endpoint: Endpoint) -> str:
        return canonical_digest(
            {
                "key": endpoint.key,
                "url": without_query(endpoint.url),
                "method": endpoint.method,
                "secrets": fingerprint(_secrets(endpoint)),
                "timeoutSeconds": endpoint.timeout_seconds,
                "permanentStatuses": sorted(endpoint.permanent_statuses),
            }
        )

    def _row(self, namespace: str, snapshot_id: str, endpoint: Endpoint) -> dict[str, Any]:
        token = endpoint.token
        return {
            "namespace": namespace,
            "snapshot_id": snapshot_id,
            "endpoint_key": endpoint.key,
            "url": without_query(endpoint.url),
            "method": endpoint.method,
            "secrets_encrypted": self._vault.encrypt(_secrets(endpoint)),
            "token_fingerprint": None if token is None else fingerprint(token),
            "timeout_seconds": endpoint.timeout_seconds,
            "permanent_statuses": array(sorted(endpoint.permanent_statuses)),
        }


class DispatchQueue:
    """Claims, renews, settles and recovers jobs for one node."""

    def __init__(
        self, database: Database, node_id: str, lease_seconds: float, policy: RetryPolicy
    ) -> None:
        self._database, self._node_id = database, node_id
        self._lease_seconds, self._policy = lease_seconds, policy
        self._settlements = GroupCommit(database, self._flush)

    async def lanes(self) -> list[Lane]:
        """Every lane that has a job, due now or later."""
        return [Lane(**row) for row in await self._database.fetch_all(SQL.busy_lanes)]

    async def claim(self, rooms: Mapping[tuple[str, str], int]) -> list[ClaimedJob]:
        """Opens the next attempt of due jobs: of each lane as many as it has room for."""
        rows = await self._database.fetch_all(
            SQL.claim_jobs,
            {
                "namespace": array(namespace for namespace, _ in rooms),
                "endpoint_key": array(key for _, key in rooms),
                "room": array(rooms.values()),
                "node_id": self._node_id,
                "lease_seconds": self._lease_seconds,
                "inline_bytes": INLINE_BYTES,
            },
        )
        return [ClaimedJob(**row) for row in rows]

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
        permanent_statuses: Collection[int],
        started_at: datetime,
        now: datetime,
    ) -> None:
        """Returns when the attempt's receipt and the job's next move are committed."""
        retry_seconds, cause = self._policy.next_move(
            result, job.attempt, job.max_attempts, permanent_statuses, now
        )
        await self._settlements.commit(
            Settlement(
                namespace=job.namespace,
                job_id=job.job_id,
                cycle_id=job.cycle_id,
                lease_number=job.lease_number,
                node_id=self._node_id,
                attempt=job.attempt,
                digest=job.digest,
                size=job.size,
                result=result,
                queue_seconds=job.queue_seconds,
                started_at=started_at,
                retry_seconds=retry_seconds,
                cause=cause,
            )
        )

    async def recover(self, now: datetime, limit: int = 500) -> int:
        """Settles as unknown the attempts whose worker is gone; how many there were."""
        lost = WireResult(Outcome.UNKNOWN, cause="worker lost", error="the worker's lease ran out")
        async with self._database.transaction() as connection:
            cursor = await connection.execute(SQL.expired_jobs, {"limit": limit})
            settlements = []
            for row in await cursor.fetchall():
                retry_seconds, cause = self._policy.next_move(
                    lost, row["attempt"], row["max_attempts"], (), now
                )
                settlements.append(
                    Settlement(
                        namespace=row["namespace"],
                        job_id=row["job_id"],
                        cycle_id=row["cycle_id"],
                        lease_number=row["lease_number"],
                        node_id=row["node_id"],
                        attempt=row["attempt"],
                        digest=row["digest"],
                        size=row["size"],
                        result=lost,
                        queue_seconds=None,
                        started_at=None,
                        retry_seconds=retry_seconds,
                        cause=cause,
                    )
                )
            ended = await self._settle(connection, settlements) if settlements else 0
        _count(settlements, ended)
        return len(settlements)

    async def renew(self, jobs: Sequence[ClaimedJob]) -> set[tuple[str, int]]:
        """Prolongs leases; the ids and lease numbers of those that were prolonged."""
        rows = await self._database.fetch_all(
            SQL.renew_jobs, {**self._leases(jobs), "lease_seconds": self._lease_seconds}
        )
        return {(row["job_id"], row["lease_number"]) for row in rows}

    async def release(self, jobs: Sequence[ClaimedJob]) -> None:
        """Gives back jobs of whose open attempt no byte has left."""
        await self._database.execute(SQL.release_jobs, self._leases(jobs))

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
        async with self._database.transaction() as connection:
            ended = await self._settle(connection, settlements)
        metrics.commit_entries.labels("settlements").observe(len(settlements))
        _count(settlements, ended)
        return [None] * len(settlements)

    async def _settle(self, connection: Connection, settlements: Sequence[Settlement]) -> int:
        """Writes the ends of attempts; how many cycles ended with them."""
        cursor = None
        cycles = sorted({(s.namespace, s.cycle_id) for s in settlements if s.retry_seconds is None})
        async with connection.pipeline():
            await connection.execute(SQL.settle_jobs, _settlement_rows(settlements))
            await connection.execute(SQL.insert_receipts, _receipt_rows(settlements))
            if cycles:
                touched = {
                    "namespace": array(namespace for namespace, _ in cycles),
                    "cycle_id": array(cycle_id for _, cycle_id in cycles),
                    "node_id": self._node_id,
                }
                cursor = await connection.execute(CYCLE_SQL.end_dispatched, touched)
        return 0 if cursor is None else cursor.rowcount


def _count(settlements: Sequence[Settlement], ended: int) -> None:
    for settlement in settlements:
        result = settlement.result
        metrics.attempts.labels(result.outcome.value).inc()
        if result.total_seconds is not None:
            metrics.attempt_seconds.observe(result.total_seconds)
        if settlement.retry_seconds is None and settlement.cause is not None:
            metrics.dead_letters.inc()
    metrics.cycles_ended.labels("finished").inc(ended)


def _secrets(endpoint: Endpoint) -> str:
    """What is kept encrypted; the URL is among it since its query may hold a key."""
    secrets = {"token": endpoint.token, "headers": dict(endpoint.headers), "url": endpoint.url}
    return json.dumps(secrets, sort_keys=True)


def _receipt_rows(settlements: Sequence[Settlement]) -> dict[str, Any]:
    results = [s.result for s in settlements]
    return {
        **_job_rows(settlements),
        "outcome": array(r.outcome.value for r in results),
        "status": array(r.status for r in results),
        "error": array(r.error for r in results),
        "digest": array(s.digest for s in settlements),
        "queue_seconds": array(s.queue_seconds for s in settlements),
        "connect_seconds": array(r.connect_seconds for r in results),
        "first_byte_seconds": array(r.first_byte_seconds for r in results),
        "total_seconds": array(r.total_seconds for r in results),
        "answer": [r.answer for r in results],
        "answer_content_type": array(r.answer_content_type for r in results),
        "started_at": array(s.started_at for s in settlements),
    }


def _settlement_rows(settlements: Sequence[Settlement]) -> dict[str, Any]:
    return {
        **_job_rows(settlements),
        "retry_seconds": array(s.retry_seconds for s in settlements),
        "cause": array(s.cause for s in settlements),
    }


def _job_rows(settlements: Sequence[Settlement]) -> dict[str, Any]:
    return {
        "namespace": array(s.namespace for s in settlements),
        "job_id": array(s.job_id for s in settlements),
        "lease_number": array(s.lease_number for s in settlements),
        "node_id": array(s.node_id for s in settlements),
        "attempt": array(s.attempt for s in settlements),
        "size": array(s.size for s in settlements),
    }
