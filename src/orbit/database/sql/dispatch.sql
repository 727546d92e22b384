-- The life of a dispatch job: claimed, sent, settled; retried, recovered, dead-lettered.
--
-- A claim raises the attempt's number and commits before a byte leaves. A lease with a node is
-- an attempt that may be on the wire; once its time is over it can only be settled as unknown.
-- Locks are taken in the order dispatch_lease, then cycle_lease by key.

-- name: insert_snapshot
-- An endpoint as it stands now, once per definition.
INSERT INTO endpoint_snapshot (namespace, snapshot_id, endpoint_key, url, method,
    secrets_encrypted, token_fingerprint, timeout_seconds, permanent_statuses)
VALUES (%(namespace)s, %(snapshot_id)s, %(endpoint_key)s, %(url)s, %(method)s,
    %(secrets_encrypted)b, %(token_fingerprint)s, %(timeout_seconds)s,
    %(permanent_statuses)s::int[])
ON CONFLICT DO NOTHING;

-- name: snapshot
-- An endpoint as it stood.
SELECT endpoint_key, url, method, secrets_encrypted, timeout_seconds, permanent_statuses
FROM endpoint_snapshot WHERE namespace = %(namespace)s AND snapshot_id = %(snapshot_id)s;

-- name: busy_lanes
-- Every lane that has a job to send now or later, and when the first is due. A loose scan of
-- dispatch_lease_ready: its cost grows with the lanes, not with the jobs.
WITH RECURSIVE lanes AS (
    (SELECT namespace, endpoint_key FROM dispatch_lease WHERE node_id IS NULL
    ORDER BY namespace, endpoint_key LIMIT 1)
    UNION ALL
    SELECT next.* FROM lanes CROSS JOIN LATERAL (
        SELECT namespace, endpoint_key FROM dispatch_lease
        WHERE node_id IS NULL AND (dispatch_lease.namespace, dispatch_lease.endpoint_key)
            > (lanes.namespace, lanes.endpoint_key)
        ORDER BY namespace, endpoint_key LIMIT 1
    ) next
)
SELECT lanes.namespace, lanes.endpoint_key,
    extract(epoch FROM first.due_at - orbit_now())::float8 AS due_in_seconds
FROM lanes CROSS JOIN LATERAL (
    SELECT due_at FROM dispatch_lease
    WHERE node_id IS NULL AND dispatch_lease.namespace = lanes.namespace
        AND dispatch_lease.endpoint_key = lanes.endpoint_key
    ORDER BY due_at LIMIT 1
) first
WHERE first.due_at < 'infinity';

-- name: claim_jobs
-- Takes due jobs of the given lanes, as many of each as the caller has room for, and opens
-- their next attempt. dispatch_lease_ready serves it. OFFSET 0 keeps the look-ups what they are,
-- one by its whole key for each job, whatever the planner believes of the tables' sizes.
WITH lane AS MATERIALIZED (
    SELECT * FROM unnest(%(namespace)s::text[], %(endpoint_key)s::text[], %(room)s::int[])
        AS lane (namespace, endpoint_key, room)
), due AS MATERIALIZED (
    SELECT ready.* FROM lane CROSS JOIN LATERAL (
        SELECT namespace, job_id, due_at FROM dispatch_lease
        WHERE node_id IS NULL AND dispatch_lease.namespace = lane.namespace
            AND dispatch_lease.endpoint_key = lane.endpoint_key AND due_at <= orbit_now()
        ORDER BY due_at LIMIT lane.room
        FOR UPDATE SKIP LOCKED
    ) ready
), claimed AS (
    UPDATE dispatch_lease SET
        due_at = orbit_now() + %(lease_seconds)s * interval '1 second',
        lease_number = lease_number + 1, attempt = attempt + 1, node_id = %(node_id)s::uuid
    FROM due
    WHERE dispatch_lease.namespace = due.namespace AND dispatch_lease.job_id = due.job_id
    RETURNING dispatch_lease.namespace, dispatch_lease.job_id, dispatch_lease.cycle_id,
        dispatch_lease.endpoint_key, dispatch_lease.lease_number, dispatch_lease.attempt,
        extract(epoch FROM orbit_now() - due.due_at)::float8 AS queue_seconds
)
SELECT claimed.*, job.snapshot_id, job.digest, job.content_type, job.size, job.max_attempts,
    run.profile_id, run.run_profile_id, run.traceparent, payload.content
FROM claimed
CROSS JOIN LATERAL (
    SELECT snapshot_id, digest, content_type, size, max_attempts FROM dispatch_job
    WHERE dispatch_job.namespace = claimed.namespace AND dispatch_job.job_id = claimed.job_id
    OFFSET 0
) job
CROSS JOIN LATERAL (
    SELECT profile_id, run_profile_id, traceparent FROM cycle_run
    WHERE cycle_run.namespace = claimed.namespace AND cycle_run.cycle_id = claimed.cycle_id
    OFFSET 0
) run
LEFT JOIN LATERAL (
    SELECT content FROM payload
    WHERE payload.namespace = claimed.namespace AND payload.cycle_id = claimed.cycle_id
        AND payload.digest = job.digest AND job.size <= %(inline_bytes)s
    OFFSET 0
) payload ON true;

-- name: renew_jobs
-- The heartbeat of attempts on the wire; says which were prolonged. One that is locked is being
-- settled, so it is left out, and nothing is waited for.
WITH mine AS MATERIALIZED (
    SELECT lease.namespace, lease.job_id FROM dispatch_lease lease
    JOIN unnest(%(namespace)s::text[], %(job_id)s::uuid[], %(lease_number)s::int[])
        AS held (namespace, job_id, lease_number)
        ON lease.namespace = held.namespace AND lease.job_id = held.job_id
        AND lease.lease_number = held.lease_number
    WHERE lease.node_id = %(node_id)s
    FOR NO KEY UPDATE OF lease SKIP LOCKED
)
UPDATE dispatch_lease SET due_at = orbit_now() + %(lease_seconds)s * interval '1 second'
FROM mine
WHERE dispatch_lease.namespace = mine.namespace AND dispatch_lease.job_id = mine.job_id
RETURNING dispatch_lease.job_id, dispatch_lease.lease_number;

-- name: release_jobs
-- Gives back jobs whose attempt was opened and never begun: no byte left, so the number is
-- given back too.
UPDATE dispatch_lease SET due_at = orbit_now(), node_id = NULL, attempt = attempt - 1
FROM unnest(%(namespace)s::text[], %(job_id)s::uuid[], %(lease_number)s::int[])
    AS held (namespace, job_id, lease_number)
WHERE dispatch_lease.namespace = held.namespace AND dispatch_lease.job_id = held.job_id
    AND dispatch_lease.lease_number = held.lease_number
    AND dispatch_lease.node_id = %(node_id)s;

-- name: expired_jobs
-- Attempts whose worker let its lease run out, locked, so that they can be settled as unknown
-- in this transaction. dispatch_lease_taken serves it.
WITH expired AS MATERIALIZED (
    SELECT namespace, job_id, cycle_id, endpoint_key, lease_number, attempt, node_id
    FROM dispatch_lease WHERE node_id IS NOT NULL AND due_at <= orbit_now()
    ORDER BY due_at LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
)
SELECT expired.*, job.digest, job.size, job.max_attempts
FROM expired CROSS JOIN LATERAL (
    SELECT digest, size, max_attempts FROM dispatch_job job
    WHERE job.namespace = expired.namespace AND job.job_id = expired.job_id OFFSET 0
) job;

-- name: insert_receipts
-- What became of attempts. A receipt that exists stays: an attempt has one end. To follow
-- settle_jobs, whose locks keep two sessions from writing the same receipt at once.
INSERT INTO delivery_receipt (namespace, job_id, attempt, outcome, status, error, digest, size,
    queue_seconds, connect_seconds, first_byte_seconds, total_seconds, answer,
    answer_content_type, lease_number, node_id, started_at)
SELECT namespace, job_id, attempt, outcome, status, error, digest, size, queue_seconds,
    connect_seconds, first_byte_seconds, total_seconds, answer, answer_content_type,
    lease_number, node_id, started_at
FROM unnest(%(namespace)s::text[], %(job_id)s::uuid[], %(attempt)s::int[], %(outcome)s::text[],
    %(status)s::int[], %(error)s::text[], %(digest)s::text[], %(size)s::int[],
    %(queue_seconds)s::float8[], %(connect_seconds)s::float8[],
    %(first_byte_seconds)s::float8[], %(total_seconds)s::float8[], %(answer)b::bytea[],
    %(answer_content_type)s::text[], %(lease_number)s::int[], %(node_id)s::uuid[],
    %(started_at)s::timestamptz[])
    AS receipt (namespace, job_id, attempt, outcome, status, error, digest, size, queue_seconds,
        connect_seconds, first_byte_seconds, total_seconds, answer, answer_content_type,
        lease_number, node_id, started_at)
ON CONFLICT DO NOTHING;

-- name: settle_jobs
-- Moves on the leases that are still their worker's: done (delivered, or dead with its cause)
-- they go, else they wait for the next attempt. Counts the done ones in their cycles. Locks the
-- jobs' leases in key order, then those of the cycles in key order.
WITH result AS MATERIALIZED (
    SELECT * FROM unnest(%(namespace)s::text[], %(job_id)s::uuid[], %(lease_number)s::int[],
        %(node_id)s::uuid[], %(attempt)s::int[], %(size)s::int[], %(retry_seconds)s::float8[],
        %(cause)s::text[])
        AS result (namespace, job_id, lease_number, node_id, attempt, size, retry_seconds, cause)
), mine AS MATERIALIZED (
    SELECT result.* FROM dispatch_lease lease JOIN result
        ON lease.namespace = result.namespace AND lease.job_id = result.job_id
        AND lease.lease_number = result.lease_number AND lease.node_id = result.node_id
    ORDER BY lease.namespace, lease.job_id
    FOR UPDATE OF lease
), done AS (
    DELETE FROM dispatch_lease USING mine
    WHERE dispatch_lease.namespace = mine.namespace AND dispatch_lease.job_id = mine.job_id
        AND mine.retry_seconds IS NULL
    RETURNING dispatch_lease.namespace, dispatch_lease.job_id, dispatch_lease.cycle_id,
        dispatch_lease.endpoint_key, dispatch_lease.is_requeued, mine.attempt, mine.size,
        mine.cause
), retried AS (
    UPDATE dispatch_lease SET node_id = NULL,
        due_at = orbit_now() + mine.retry_seconds * interval '1 second'
    FROM mine
    WHERE dispatch_lease.namespace = mine.namespace AND dispatch_lease.job_id = mine.job_id
        AND mine.retry_seconds IS NOT NULL
), dead AS (
    INSERT INTO dead_letter_dispatch (namespace, job_id, cycle_id, endpoint_key, cause, attempts)
    SELECT namespace, job_id, cycle_id, endpoint_key, cause, attempt FROM done
    WHERE cause IS NOT NULL
    ON CONFLICT DO NOTHING
), counted AS MATERIALIZED (
    SELECT namespace, cycle_id, count(*)::int AS jobs, count(cause)::int AS dead,
        sum(attempt)::int AS attempts, sum(attempt::bigint * size)::bigint AS bytes
    FROM done WHERE NOT is_requeued GROUP BY namespace, cycle_id
), held AS MATERIALIZED (
    SELECT lease.namespace, lease.cycle_id FROM cycle_lease lease
    JOIN counted ON counted.namespace = lease.namespace AND counted.cycle_id = lease.cycle_id
    ORDER BY lease.namespace, lease.cycle_id
    FOR NO KEY UPDATE OF lease
)
UPDATE cycle_lease SET outstanding = outstanding - counted.jobs,
    delivered = delivered + counted.jobs - counted.dead,
    dead_lettered = dead_lettered + counted.dead,
    attempts = cycle_lease.attempts + counted.attempts,
    bytes = cycle_lease.bytes + counted.bytes
FROM held JOIN counted ON counted.namespace = held.namespace AND counted.cycle_id = held.cycle_id
WHERE cycle_lease.namespace = held.namespace AND cycle_lease.cycle_id = held.cycle_id;
