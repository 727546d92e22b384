-- The life of a dispatch job: claimed, sent, settled; retried, recovered, dead-lettered.
--
-- A claim raises the attempt's number and commits before a byte leaves. A lease with a node is
-- an attempt that may be on the wire; once its time is over it can only be settled as unknown.
-- Locks are taken in the order dispatch_lease, cycle_lease, lane; the last two each by key. Jobs'
-- leases need no order: who recovers takes those that nobody holds, and else only a job's owner
-- locks its lease. A claim begins with the fences of its namespaces and its lanes, and waits for no
-- other lock after them.
--
-- A lease is found by its key. `node_id IS NOT DISTINCT FROM` says what `=` would, but does not
-- imply that there is a node: the index of those would be taken for smaller than the key while
-- statistics say that nothing is under way, and each lease be looked for among all that are.

-- name: insert_snapshot
-- An endpoint as it stands now, once per definition.
INSERT INTO endpoint_snapshot (namespace, snapshot_id, endpoint_key, url, method,
    secrets_encrypted, token_fingerprint, timeout_seconds, permanent_statuses, on_unknown)
VALUES (%(namespace)s, %(snapshot_id)s, %(endpoint_key)s, %(url)s, %(method)s,
    %(secrets_encrypted)b, %(token_fingerprint)s, %(timeout_seconds)s,
    %(permanent_statuses)s::int[], %(on_unknown)s)
ON CONFLICT DO NOTHING;

-- name: snapshot
-- An endpoint as it stood.
SELECT endpoint_key, url, method, secrets_encrypted, timeout_seconds, permanent_statuses,
    on_unknown
FROM endpoint_snapshot WHERE namespace = %(namespace)s AND snapshot_id = %(snapshot_id)s;

-- name: busy_lanes
-- Every lane of namespaces that are not halted, if it has a job to send now or later: when the first is due, when the breaker lets
-- one through, and the rate's tokens. A loose scan of dispatch_lease_ready: its cost grows with
-- the lanes, not with the jobs.
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
SELECT lanes.namespace, lanes.endpoint_key, lane.namespace IS NOT NULL AS is_known,
    extract(epoch FROM first.due_at - orbit_now())::float8 AS due_in_seconds,
    extract(epoch FROM lane.probe_at - orbit_now())::float8 AS probe_in_seconds,
    lane.tokens, extract(epoch FROM orbit_now() - lane.tokens_at)::float8 AS tokens_age_seconds
FROM lanes CROSS JOIN LATERAL (
    SELECT min(class.due_at) AS due_at FROM (VALUES (false), (true)) AS kind (is_retry)
    CROSS JOIN LATERAL (
        SELECT due_at FROM dispatch_lease
        WHERE node_id IS NULL AND dispatch_lease.namespace = lanes.namespace
            AND dispatch_lease.endpoint_key = lanes.endpoint_key
            AND dispatch_lease.is_retry = kind.is_retry
        ORDER BY due_at LIMIT 1
    ) class
) first
LEFT JOIN LATERAL (
    SELECT * FROM lane WHERE lane.namespace = lanes.namespace
        AND lane.endpoint_key = lanes.endpoint_key OFFSET 0
) lane ON true
WHERE first.due_at < 'infinity' AND NOT EXISTS (SELECT FROM namespace_fence fence
    WHERE fence.namespace = lanes.namespace AND fence.is_halted);

-- name: insert_lanes
-- Lanes that had no job before.
INSERT INTO lane (namespace, endpoint_key)
SELECT * FROM unnest(%(namespace)s::text[], %(endpoint_key)s::text[])
    AS lane (namespace, endpoint_key)
ORDER BY namespace, endpoint_key
ON CONFLICT DO NOTHING;

-- name: share_fences
-- Takes the fences of namespaces in key order, and gives their epochs. To be sent before
-- hold_lanes and claim_jobs, which reads the flags: a halt waits for whoever holds its fence. So
-- no statement of the transaction waits long for a lock: one frozen claim is not to hold up the
-- halts of all that others claim for.
SELECT namespace, COALESCE((SELECT epoch FROM namespace_fence fence
        WHERE fence.namespace = asked.namespace), 0) AS epoch,
    pg_advisory_xact_lock_shared(orbit_fence_key(namespace)) AS taken
FROM (
    SELECT DISTINCT namespace, bound FROM unnest(%(namespace)s::text[]) AS lane (namespace)
    CROSS JOIN (SELECT set_config('lock_timeout', '450ms', true) AS bound OFFSET 0) bounded
    ORDER BY namespace OFFSET 0
) asked;

-- name: hold_lanes
-- Locks lanes in key order. To be sent before claim_jobs, as a statement of its own: what that
-- counts is then all that other nodes have claimed.
SELECT FROM lane JOIN unnest(%(namespace)s::text[], %(endpoint_key)s::text[])
    AS asked (namespace, endpoint_key)
    ON lane.namespace = asked.namespace AND lane.endpoint_key = asked.endpoint_key
ORDER BY lane.namespace, lane.endpoint_key
FOR NO KEY UPDATE OF lane;

-- name: claim_jobs
-- Opens the next attempt of due jobs: of each lane as many as the caller has room for and its cap
-- and tokens allow, or one probe of a held lane; an array for each column of what was claimed.
-- Later attempts come first up to their share, which of probes is one in four: a job that always
-- fails cannot keep others from being tried. dispatch_lease_ready and dispatch_lease_taken serve it.
WITH open_lane AS MATERIALIZED (
    SELECT asked.*, lane.probe_at IS NOT NULL AS is_probe, flying.retries,
        CASE WHEN asked.rate IS NOT NULL THEN LEAST(GREATEST(asked.rate, 1),
            COALESCE(lane.tokens, GREATEST(asked.rate, 1))
            + extract(epoch FROM orbit_now() - lane.tokens_at)::float8 * asked.rate) END AS tokens,
        CASE WHEN lane.probe_at IS NULL THEN LEAST(asked.room, asked.cap - flying.jobs)
            WHEN lane.probe_at <= orbit_now() AND flying.jobs = 0 THEN 1
            ELSE 0 END AS free
    FROM unnest(%(namespace)s::text[], %(endpoint_key)s::text[], %(room)s::int[],
        %(cap)s::int[], %(rate)s::float8[], %(has_breaker)s::boolean[])
        AS asked (namespace, endpoint_key, room, cap, rate, has_breaker)
    CROSS JOIN LATERAL (
        SELECT tokens, tokens_at, CASE WHEN asked.has_breaker THEN lane.probe_at END AS probe_at
        FROM lane WHERE lane.namespace = asked.namespace
            AND lane.endpoint_key = asked.endpoint_key OFFSET 0
    ) lane
    CROSS JOIN LATERAL (
        SELECT count(*)::int AS jobs, count(*) FILTER (WHERE is_retry)::int AS retries
        FROM dispatch_lease WHERE node_id IS NOT NULL
            AND dispatch_lease.namespace = asked.namespace
            AND dispatch_lease.endpoint_key = asked.endpoint_key
    ) flying
    WHERE NOT EXISTS (SELECT FROM namespace_fence fence
        WHERE fence.namespace = asked.namespace AND fence.is_halted)
), room AS MATERIALIZED (
    SELECT namespace, endpoint_key, cap, rate, is_probe, retries, tokens,
        LEAST(free, floor(tokens)::int) AS jobs
    FROM open_lane WHERE LEAST(free, floor(tokens)::int) > 0
), share AS MATERIALIZED (
    SELECT room.*, GREATEST(0, LEAST(jobs,
        floor(LEAST(cap, %(places)s) * %(retry_share)s::float8 + %(chance)s::float8)::int - retries,
        CASE WHEN rate IS NULL AND NOT is_probe THEN jobs
            ELSE floor(jobs * %(retry_share)s::float8 + %(chance)s::float8)::int END)) AS reserved
    FROM room
), due AS MATERIALIZED (
    SELECT ready.*, share.endpoint_key, share.is_probe FROM share CROSS JOIN LATERAL (
        WITH later AS MATERIALIZED (
            SELECT namespace, job_id, due_at FROM dispatch_lease
            WHERE node_id IS NULL AND dispatch_lease.namespace = share.namespace
                AND dispatch_lease.endpoint_key = share.endpoint_key AND is_retry
                AND due_at <= orbit_now()
            ORDER BY due_at LIMIT share.reserved
            FOR UPDATE SKIP LOCKED
        ), first AS MATERIALIZED (
            SELECT namespace, job_id, due_at FROM dispatch_lease
            WHERE node_id IS NULL AND dispatch_lease.namespace = share.namespace
                AND dispatch_lease.endpoint_key = share.endpoint_key AND NOT is_retry
                AND due_at <= orbit_now()
            ORDER BY due_at LIMIT share.jobs - (SELECT count(*) FROM later)
            FOR UPDATE SKIP LOCKED
        ), rest AS MATERIALIZED (
            SELECT namespace, job_id, due_at FROM dispatch_lease
            WHERE node_id IS NULL AND dispatch_lease.namespace = share.namespace
                AND dispatch_lease.endpoint_key = share.endpoint_key AND is_retry
                AND due_at <= orbit_now()
            ORDER BY due_at OFFSET share.reserved
            LIMIT share.jobs - (SELECT count(*) FROM later) - (SELECT count(*) FROM first)
            FOR UPDATE SKIP LOCKED
        )
        SELECT * FROM later UNION ALL SELECT * FROM first UNION ALL SELECT * FROM rest
    ) ready
), spent AS (
    UPDATE lane SET tokens = share.tokens - taken.jobs, tokens_at = orbit_now()
    FROM share JOIN (SELECT namespace, endpoint_key, count(*) AS jobs FROM due GROUP BY 1, 2)
        AS taken USING (namespace, endpoint_key)
    WHERE share.rate IS NOT NULL AND lane.namespace = share.namespace
        AND lane.endpoint_key = share.endpoint_key
), claimed AS (
    UPDATE dispatch_lease SET
        due_at = orbit_now() + %(lease_seconds)s * interval '1 second',
        lease_number = lease_number + 1, attempt = attempt + 1, node_id = %(node_id)s::uuid,
        is_probe = due.is_probe, spared = spared + due.is_probe::int
    FROM (SELECT * FROM due ORDER BY due_at) due  -- sorted, all are found before any is changed
    WHERE dispatch_lease.namespace = due.namespace AND dispatch_lease.job_id = due.job_id
    RETURNING dispatch_lease.namespace, dispatch_lease.job_id, dispatch_lease.cycle_id,
        dispatch_lease.endpoint_key, dispatch_lease.lease_number, dispatch_lease.attempt,
        dispatch_lease.is_probe, dispatch_lease.spared,
        extract(epoch FROM orbit_now() - due.due_at)::float8 AS queue_seconds
)
SELECT array_agg(namespace) AS namespace, array_agg(job_id::text) AS job_id,
    array_agg(cycle_id::text) AS cycle_id, array_agg(endpoint_key) AS endpoint_key,
    array_agg(lease_number) AS lease_number, array_agg(attempt) AS attempt,
    array_agg(is_probe) AS is_probe, array_agg(spared) AS spared,
    array_agg(queue_seconds) AS queue_seconds
FROM claimed;

-- name: claimed_jobs
-- What jobs are, with their bytes if there are few, one after the other, and what their cycles are:
-- in one row, since rows come in pieces that the reader is woken for. The bounds leave out the
-- partitions that hold none, however many there are; OFFSET 0 keeps the look-ups what they are, one
-- by its whole key for each job or cycle, whatever the planner believes of the tables' sizes.
WITH run AS MATERIALIZED (
    SELECT run.* FROM unnest(%(run_namespace)s::text[], %(run_id)s::uuid[])
        AS asked (namespace, cycle_id)
    CROSS JOIN LATERAL (
        SELECT cycle_id, profile_id, run_profile_id, traceparent FROM cycle_run
        WHERE cycle_run.namespace = asked.namespace AND cycle_run.cycle_id = asked.cycle_id
            AND cycle_run.cycle_id BETWEEN %(first_cycle)s::uuid AND %(last_cycle)s::uuid
        OFFSET 0
    ) run
)
SELECT array_agg(job.job_id::text) AS job_id, array_agg(job.snapshot_id) AS snapshot_id,
    array_agg(job.digest) AS digest, array_agg(job.content_type) AS content_type,
    array_agg(job.size) AS size, array_agg(job.max_attempts) AS max_attempts,
    array_agg(octet_length(payload.content)) AS length,
    string_agg(payload.content, '') AS contents,
    (SELECT array_agg(cycle_id::text) FROM run) AS run_id,
    (SELECT array_agg(profile_id) FROM run) AS profile_id,
    (SELECT array_agg(run_profile_id) FROM run) AS run_profile_id,
    (SELECT array_agg(traceparent) FROM run) AS traceparent
FROM unnest(%(namespace)s::text[], %(job_id)s::uuid[], %(cycle_id)s::uuid[])
    AS claimed (namespace, job_id, cycle_id)
CROSS JOIN LATERAL (
    SELECT * FROM dispatch_job
    WHERE dispatch_job.namespace = claimed.namespace AND dispatch_job.job_id = claimed.job_id
        AND dispatch_job.job_id BETWEEN %(first_job)s::uuid AND %(last_job)s::uuid
    OFFSET 0
) job
LEFT JOIN LATERAL (
    SELECT content FROM payload
    WHERE payload.namespace = claimed.namespace AND payload.cycle_id = claimed.cycle_id
        AND payload.digest = job.digest AND job.size <= %(inline_bytes)s
        AND payload.cycle_id BETWEEN %(first_cycle)s::uuid AND %(last_cycle)s::uuid
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
    WHERE lease.node_id IS NOT DISTINCT FROM %(node_id)s
    FOR NO KEY UPDATE OF lease SKIP LOCKED
)
UPDATE dispatch_lease SET due_at = orbit_now() + %(lease_seconds)s * interval '1 second'
FROM mine
WHERE dispatch_lease.namespace = mine.namespace AND dispatch_lease.job_id = mine.job_id
RETURNING dispatch_lease.job_id, dispatch_lease.lease_number;

-- name: release_jobs
-- Gives back jobs whose attempt was opened and never begun: no byte left, so the number is
-- given back too.
UPDATE dispatch_lease SET due_at = orbit_now(), node_id = NULL, attempt = attempt - 1,
    spared = spared - is_probe::int
FROM unnest(%(namespace)s::text[], %(job_id)s::uuid[], %(lease_number)s::int[])
    AS held (namespace, job_id, lease_number)
WHERE dispatch_lease.namespace = held.namespace AND dispatch_lease.job_id = held.job_id
    AND dispatch_lease.lease_number = held.lease_number
    AND dispatch_lease.node_id IS NOT DISTINCT FROM %(node_id)s;

-- name: release_unseen
-- Gives back the jobs of lanes whose attempt a node opened without hearing of it: the claim was
-- committed, and its answer lost. dispatch_lease_taken serves it.
UPDATE dispatch_lease SET due_at = orbit_now(), node_id = NULL, attempt = attempt - 1,
    spared = spared - is_probe::int
FROM unnest(%(lane_namespace)s::text[], %(lane_key)s::text[]) AS asked (namespace, endpoint_key)
WHERE dispatch_lease.namespace = asked.namespace
    AND dispatch_lease.endpoint_key = asked.endpoint_key
    AND dispatch_lease.node_id = %(node_id)s AND dispatch_lease.due_at > orbit_now()
    AND ((dispatch_lease.namespace, dispatch_lease.job_id, dispatch_lease.lease_number) IN (
        SELECT * FROM unnest(%(namespace)s::text[], %(job_id)s::uuid[], %(lease_number)s::int[])
    )) IS NOT TRUE;

-- name: expired_jobs
-- Attempts, of one namespace or all, whose worker let its lease run out, locked, so that they can be
-- settled as unknown in this transaction. A loose scan of dispatch_lease_taken over the lanes.
WITH RECURSIVE lanes AS (
    (SELECT namespace, endpoint_key FROM dispatch_lease
    WHERE node_id IS NOT NULL AND namespace >= COALESCE(%(namespace)s::text, '')
    ORDER BY namespace, endpoint_key LIMIT 1)
    UNION ALL
    SELECT next.* FROM lanes CROSS JOIN LATERAL (
        SELECT namespace, endpoint_key FROM dispatch_lease
        WHERE node_id IS NOT NULL AND (dispatch_lease.namespace, dispatch_lease.endpoint_key)
            > (lanes.namespace, lanes.endpoint_key)
        ORDER BY namespace, endpoint_key LIMIT 1
    ) next
    WHERE %(namespace)s::text IS NULL OR lanes.namespace = %(namespace)s::text
), expired AS MATERIALIZED (
    SELECT late.* FROM lanes CROSS JOIN LATERAL (
        SELECT namespace, job_id, cycle_id, endpoint_key, lease_number, attempt, is_probe, spared,
            node_id
        FROM dispatch_lease WHERE node_id IS NOT NULL
            AND dispatch_lease.namespace = lanes.namespace
            AND dispatch_lease.endpoint_key = lanes.endpoint_key AND due_at <= orbit_now()
        ORDER BY due_at LIMIT %(limit)s
        FOR UPDATE SKIP LOCKED
    ) late
    WHERE %(namespace)s::text IS NULL OR lanes.namespace = %(namespace)s::text
    LIMIT %(limit)s
)
SELECT expired.*, job.digest, job.size, job.max_attempts,
    COALESCE(snapshot.on_unknown, 'retry') AS on_unknown, run.profile_id,
    COALESCE(run.run_profile_id, '') AS run_profile_id
FROM expired CROSS JOIN LATERAL (
    SELECT digest, size, max_attempts, snapshot_id FROM dispatch_job job
    WHERE job.namespace = expired.namespace AND job.job_id = expired.job_id OFFSET 0
) job LEFT JOIN LATERAL (
    SELECT on_unknown FROM endpoint_snapshot snapshot
    WHERE snapshot.namespace = expired.namespace AND snapshot.snapshot_id = job.snapshot_id
    OFFSET 0
) snapshot ON true LEFT JOIN LATERAL (
    SELECT profile_id, run_profile_id FROM cycle_run run
    WHERE run.namespace = expired.namespace AND run.cycle_id = expired.cycle_id OFFSET 0
) run ON true;

-- name: settle_jobs
-- Moves on the leases that are still their worker's: done (delivered, or dead with its cause)
-- they go, else they wait for the next attempt. Counts the done ones in their cycles. Locks the
-- jobs' leases, then those of the cycles in key order: what is retried is counted only because a
-- change that nobody reads comes last.
WITH result AS MATERIALIZED (
    SELECT * FROM unnest(%(namespace)s::text[], %(job_id)s::uuid[], %(lease_number)s::int[],
        %(node_id)s::uuid[], %(attempt)s::int[], %(size)s::int[], %(retry_seconds)s::float8[],
        %(cause)s::text[], %(outcome)s::text[], %(is_unspared)s::boolean[],
        %(profile_id)s::text[], %(run_profile_id)s::text[])
        AS result (namespace, job_id, lease_number, node_id, attempt, size, retry_seconds, cause,
            outcome, is_unspared, profile_id, run_profile_id)
), done AS (
    DELETE FROM dispatch_lease lease USING result
    WHERE lease.namespace = result.namespace AND lease.job_id = result.job_id
        AND lease.lease_number = result.lease_number
        AND lease.node_id IS NOT DISTINCT FROM result.node_id
        AND result.retry_seconds IS NULL
    RETURNING lease.namespace, lease.job_id, lease.cycle_id, lease.endpoint_key,
        lease.is_requeued, result.attempt, result.size, result.cause, result.profile_id,
        result.run_profile_id, lease.unknown + (result.outcome = 'unknown')::int AS unknown
), retried AS (
    UPDATE dispatch_lease lease SET node_id = NULL, is_retry = true,
        due_at = orbit_now() + result.retry_seconds * interval '1 second',
        unknown = lease.unknown + (result.outcome = 'unknown')::int,
        spared = lease.spared - result.is_unspared::int
    FROM result
    WHERE lease.namespace = result.namespace AND lease.job_id = result.job_id
        AND lease.lease_number = result.lease_number
        AND lease.node_id IS NOT DISTINCT FROM result.node_id
        AND result.retry_seconds IS NOT NULL
    RETURNING 1
), dead AS (
    INSERT INTO dead_letter_dispatch (namespace, job_id, cycle_id, endpoint_key, cause, attempts)
    SELECT namespace, job_id, cycle_id, endpoint_key, cause, attempt FROM done
    WHERE cause IS NOT NULL
    ON CONFLICT DO NOTHING
    RETURNING namespace, job_id
), batch AS MATERIALIZED (
    SELECT orbit_new_batch() AS batch_id FROM dead LIMIT 1
), told AS (
    INSERT INTO telemetry_event (namespace, batch_id, ordinal, event_type, profile_id,
        run_profile_id, run_id, metadata)
    SELECT namespace, batch_id, row_number() OVER (PARTITION BY namespace), 'dead_lettered',
        profile_id, run_profile_id, cycle_id, jsonb_build_object('jobId', job_id,
            'endpointKey', endpoint_key, 'attempts', attempt)
    FROM done CROSS JOIN batch
    WHERE ((namespace, job_id) IN (SELECT namespace, job_id FROM dead)) IS TRUE
    RETURNING namespace, batch_id
), pending AS (
    INSERT INTO telemetry_pending (namespace, batch_id, events)
    SELECT namespace, batch_id, count(*) FROM told GROUP BY namespace, batch_id
), counted AS MATERIALIZED (
    SELECT namespace, cycle_id, count(*)::int AS jobs, count(cause)::int AS dead,
        sum(attempt)::int AS attempts, sum(attempt::bigint * size)::bigint AS bytes,
        sum(unknown)::int AS unknown
    FROM done WHERE NOT is_requeued GROUP BY namespace, cycle_id
), held AS MATERIALIZED (
    SELECT lease.namespace, lease.cycle_id FROM cycle_lease lease
    JOIN counted ON counted.namespace = lease.namespace AND counted.cycle_id = lease.cycle_id
    WHERE (SELECT count(*) FROM retried) >= 0
    ORDER BY lease.namespace, lease.cycle_id
    FOR NO KEY UPDATE OF lease
)
UPDATE cycle_lease SET outstanding = outstanding - counted.jobs,
    delivered = delivered + counted.jobs - counted.dead,
    dead_lettered = dead_lettered + counted.dead,
    attempts = cycle_lease.attempts + counted.attempts,
    bytes = cycle_lease.bytes + counted.bytes,
    unknown = cycle_lease.unknown + counted.unknown
FROM held JOIN counted ON counted.namespace = held.namespace AND counted.cycle_id = held.cycle_id
WHERE cycle_lease.namespace = held.namespace AND cycle_lease.cycle_id = held.cycle_id;

-- name: insert_receipts
-- What became of attempts. A receipt that exists stays: an attempt has one end. To follow
-- settle_jobs, whose locks keep two sessions from writing the same receipt at once. Tells of what
-- was written, and adds it to the lanes' tallies, in key order. "IN … IS TRUE" is looked up in a
-- hash; a join of the two would compare each with each, since sessions plan without hash joins.
WITH receipt AS MATERIALIZED (
    SELECT * FROM unnest(%(namespace)s::text[], %(job_id)s::uuid[], %(attempt)s::int[],
        %(endpoint_key)s::text[], %(outcome)s::text[], %(status)s::int[], %(error)s::text[],
        %(digest)s::text[], %(size)s::int[], %(queue_seconds)s::float8[],
        %(connect_seconds)s::float8[], %(first_byte_seconds)s::float8[],
        %(total_seconds)s::float8[], %(answer)b::bytea[], %(answer_content_type)s::text[],
        %(is_probe)s::boolean[], %(is_reused)s::boolean[], %(lease_number)s::int[],
        %(node_id)s::uuid[], %(started_at)s::timestamptz[], %(cycle_id)s::uuid[],
        %(profile_id)s::text[], %(run_profile_id)s::text[])
        AS receipt (namespace, job_id, attempt, endpoint_key, outcome, status, error, digest, size,
            queue_seconds, connect_seconds, first_byte_seconds, total_seconds, answer,
            answer_content_type, is_probe, is_reused, lease_number, node_id, started_at, cycle_id,
            profile_id, run_profile_id)
), written AS (
    INSERT INTO delivery_receipt (namespace, job_id, attempt, endpoint_key, outcome, status,
        error, digest, size, queue_seconds, connect_seconds, first_byte_seconds, total_seconds,
        answer, answer_content_type, is_probe, is_reused, lease_number, node_id, started_at)
    SELECT namespace, job_id, attempt, endpoint_key, outcome, status,
        error, digest, size, queue_seconds, connect_seconds, first_byte_seconds, total_seconds,
        answer, answer_content_type, is_probe, is_reused, lease_number, node_id, started_at
    FROM receipt
    ON CONFLICT DO NOTHING
    RETURNING namespace, job_id, attempt, endpoint_key, outcome
), batch AS MATERIALIZED (
    SELECT orbit_new_batch() AS batch_id
), told AS (
    INSERT INTO telemetry_event (namespace, batch_id, ordinal, event_type, profile_id,
        run_profile_id, run_id, metadata)
    SELECT namespace, batch_id, row_number() OVER (PARTITION BY namespace),
        CASE outcome WHEN 'delivered' THEN 'delivery_confirmed' ELSE 'delivery_' || outcome END,
        profile_id, run_profile_id, cycle_id, jsonb_build_object('jobId', job_id,
            'attempt', attempt, 'endpointKey', endpoint_key, 'status', status,
            'seconds', total_seconds)
    FROM receipt CROSS JOIN batch
    WHERE ((namespace, job_id, attempt)
        IN (SELECT namespace, job_id, attempt FROM written)) IS TRUE
    RETURNING namespace, batch_id
), pending AS (
    INSERT INTO telemetry_pending (namespace, batch_id, events)
    SELECT namespace, batch_id, count(*) FROM told GROUP BY namespace, batch_id
)
INSERT INTO lane_tally (namespace, endpoint_key, part, delivered, failed, not_sent, unknown)
SELECT namespace, endpoint_key, %(part)s,
    count(*) FILTER (WHERE outcome = 'delivered'), count(*) FILTER (WHERE outcome = 'failed'),
    count(*) FILTER (WHERE outcome = 'not_sent'), count(*) FILTER (WHERE outcome = 'unknown')
FROM written GROUP BY namespace, endpoint_key ORDER BY namespace, endpoint_key
ON CONFLICT (namespace, endpoint_key, part) DO UPDATE SET
    delivered = lane_tally.delivered + EXCLUDED.delivered,
    failed = lane_tally.failed + EXCLUDED.failed,
    not_sent = lane_tally.not_sent + EXCLUDED.not_sent,
    unknown = lane_tally.unknown + EXCLUDED.unknown;

-- name: judge_lanes
-- Counts the ends of attempts in their lanes' breakers, and opens, holds on or closes them; says
-- what changed. Lanes that are well and had no failure are only looked at, and so are those of which
-- this transaction wrote no receipt: they were judged when their attempts' were. Locks in key order,
-- after all else that a settlement locks. To follow insert_receipts.
WITH result AS MATERIALIZED (
    SELECT * FROM unnest(%(lane_namespace)s::text[], %(lane_key)s::text[], %(attempts)s::int[],
        %(failures)s::int[], %(last_failures)s::int[], %(has_success)s::boolean[],
        %(may_close)s::boolean[], %(has_probe_failed)s::boolean[], %(limit_failures)s::int[],
        %(limit_share)s::float8[],
        %(least)s::int[], %(window_seconds)s::float8[], %(hold_seconds)s::float8[],
        %(longest_hold_seconds)s::float8[])
        AS result (namespace, endpoint_key, attempts, failures, last_failures, has_success,
            may_close, has_probe_failed, limit_failures, limit_share, least, window_seconds,
            hold_seconds, longest_hold_seconds)
), held AS MATERIALIZED (
    SELECT lane.namespace, lane.endpoint_key, lane.holds, lane.probe_at, result.may_close,
        result.has_probe_failed, result.limit_failures, result.limit_share, result.least,
        result.hold_seconds, result.longest_hold_seconds,
        CASE WHEN result.has_success THEN result.last_failures
            ELSE lane.failures + result.failures END AS failures,
        window_at < orbit_now() - result.window_seconds * interval '1 second' AS is_over,
        lane.window_attempts, lane.window_failures, result.attempts AS new_attempts,
        result.failures AS new_failures
    FROM lane JOIN result
        ON lane.namespace = result.namespace AND lane.endpoint_key = result.endpoint_key
    WHERE (result.failures > 0 OR lane.failures > 0 OR lane.window_failures > 0
        OR lane.probe_at IS NOT NULL)
        AND EXISTS (SELECT FROM lane_tally tally WHERE tally.namespace = result.namespace
            AND tally.endpoint_key = result.endpoint_key AND tally.part = %(part)s
            AND tally.xmin = pg_current_xact_id()::xid)
    ORDER BY lane.namespace, lane.endpoint_key
    FOR NO KEY UPDATE OF lane
), counted AS MATERIALIZED (
    SELECT held.*,
        CASE WHEN is_over THEN 0 ELSE window_attempts END + new_attempts AS attempts_seen,
        CASE WHEN is_over THEN 0 ELSE window_failures END + new_failures AS failures_seen
    FROM held
), judged AS MATERIALIZED (
    SELECT counted.*, LEAST(longest_hold_seconds,
            hold_seconds * 2 ^ LEAST(holds, 30)) AS next_hold_seconds,
        CASE WHEN probe_at IS NOT NULL AND may_close THEN 'closed'
            WHEN probe_at IS NOT NULL AND has_probe_failed THEN 'held'
            WHEN probe_at IS NULL AND new_failures > 0 AND (failures >= limit_failures
                OR attempts_seen >= least AND failures_seen >= limit_share * attempts_seen)
                THEN 'opened' END AS change
    FROM counted
), moved AS (
    UPDATE lane SET
        failures = CASE WHEN judged.change = 'closed' THEN 0 ELSE judged.failures END,
        window_at = CASE WHEN judged.is_over OR judged.change = 'closed' THEN orbit_now()
            ELSE lane.window_at END,
        window_attempts = CASE WHEN judged.change = 'closed' THEN 0 ELSE attempts_seen END,
        window_failures = CASE WHEN judged.change = 'closed' THEN 0 ELSE failures_seen END,
        holds = CASE judged.change WHEN 'closed' THEN 0 WHEN 'opened' THEN 1
            WHEN 'held' THEN judged.holds + 1 ELSE judged.holds END,
        probe_at = CASE WHEN judged.change = 'closed' THEN NULL
            WHEN judged.change IS NULL THEN lane.probe_at
            ELSE orbit_now() + next_hold_seconds * interval '1 second' END
    FROM judged
    WHERE lane.namespace = judged.namespace AND lane.endpoint_key = judged.endpoint_key
), batch AS MATERIALIZED (
    SELECT orbit_new_batch() AS batch_id FROM judged WHERE change IS NOT NULL LIMIT 1
), told AS (
    INSERT INTO telemetry_event (namespace, batch_id, ordinal, event_type, metadata)
    SELECT namespace, batch_id, row_number() OVER (PARTITION BY namespace), 'lane_' || change,
        jsonb_build_object('endpointKey', endpoint_key, 'failures', failures, 'holdSeconds',
            CASE WHEN change <> 'closed' THEN next_hold_seconds END)
    FROM judged CROSS JOIN batch WHERE change IS NOT NULL
    RETURNING namespace, batch_id
), pending AS (
    INSERT INTO telemetry_pending (namespace, batch_id, events)
    SELECT namespace, batch_id, count(*) FROM told GROUP BY namespace, batch_id
)
INSERT INTO lane_change (namespace, endpoint_key, change, failures, window_attempts,
    window_failures, hold_seconds, node_id)
SELECT namespace, endpoint_key, change, failures, attempts_seen, failures_seen,
    CASE WHEN change <> 'closed' THEN next_hold_seconds END, %(settler_id)s::uuid
FROM judged WHERE change IS NOT NULL
RETURNING namespace, endpoint_key, change, failures, hold_seconds;
