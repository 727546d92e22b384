-- Bulk requeues: begun by a person, carried on in steps by any node, ended once.
--
-- A step locks its requeue_lease before anything else; what it requeues and how far it is commit
-- together, so that whoever goes on after it begins where it ended.

-- name: insert_batch
-- What a person asked for, and the lease of its first step, which is due.
WITH batch AS (
    INSERT INTO requeue_batch (namespace, batch_id, endpoint_key, cause, run_profile_id, since_at,
        until_at, reason, asked_by, snapshot, canary, rate, is_stopping, size_limit, matching,
        node_id)
    VALUES (%(namespace)s, %(batch_id)s::uuid, %(endpoint_key)s::text, %(cause)s::text,
        %(run_profile_id)s::text, %(since)s::timestamptz, %(until)s::timestamptz, %(reason)s,
        %(asked_by)s::text, %(snapshot)s, %(canary)s::int, %(rate)s::float8, %(is_stopping)s,
        %(size_limit)s::int, %(matching)s::int, %(node_id)s::uuid)
    RETURNING namespace, batch_id, canary
)
INSERT INTO requeue_lease (namespace, batch_id, due_at, phase, stepped_at)
SELECT namespace, batch_id, orbit_now(), CASE WHEN canary > 0 THEN 'canary' ELSE 'flowing' END,
    orbit_now() - %(owed_seconds)s::float8 * interval '1 second'
FROM batch;

-- name: claim_batch
-- The batch that is due first, for a lease length, with how far it is; of a halted namespace
-- none. One whose worker is gone is due again by itself. requeue_lease_due serves it.
WITH due AS (
    SELECT namespace, batch_id FROM requeue_lease WHERE due_at <= orbit_now()
        AND NOT EXISTS (SELECT FROM namespace_fence fence
            WHERE fence.namespace = requeue_lease.namespace AND fence.is_halted)
    ORDER BY due_at LIMIT 1 FOR UPDATE SKIP LOCKED
), claimed AS (
    UPDATE requeue_lease lease SET lease_number = lease.lease_number + 1,
        node_id = %(node_id)s::uuid,
        due_at = orbit_now() + %(lease_seconds)s::float8 * interval '1 second'
    FROM due WHERE lease.namespace = due.namespace AND lease.batch_id = due.batch_id
    RETURNING lease.namespace, lease.batch_id, lease.lease_number, lease.phase, lease.requeued,
        lease.after_job_id, lease.watched_from, lease.is_exhausted, lease.stepped_at
)
SELECT namespace, batch_id, batch.endpoint_key, batch.cause, batch.run_profile_id, batch.since_at,
    batch.until_at, batch.reason, batch.asked_by, batch.snapshot, batch.canary, batch.rate,
    batch.is_stopping, batch.size_limit, claimed.lease_number, claimed.phase, claimed.requeued, claimed.after_job_id,
    claimed.watched_from, claimed.is_exhausted,
    extract(epoch FROM orbit_now() - claimed.stepped_at)::float8 AS elapsed_seconds
FROM claimed JOIN requeue_batch batch USING (namespace, batch_id);

-- name: next_due
-- In how many seconds the next step is due, of namespaces that are not halted.
-- requeue_lease_due serves it.
SELECT extract(epoch FROM due_at - orbit_now())::float8 AS seconds FROM requeue_lease
WHERE NOT EXISTS (SELECT FROM namespace_fence fence
    WHERE fence.namespace = requeue_lease.namespace AND fence.is_halted)
ORDER BY due_at LIMIT 1;

-- name: tally
-- How many jobs each given batch has, and what became of them by now.
-- dead_letter_decision_by_batch serves it.
SELECT asked.batch_id, jobs.*
FROM unnest(%(namespace)s::text[], %(batch_id)s::uuid[]) AS asked (namespace, batch_id)
CROSS JOIN LATERAL (
    SELECT count(*)::int AS requeued, count(*) FILTER (WHERE seen.is_delivered)::int AS delivered,
        count(*) FILTER (WHERE NOT seen.is_delivered AND seen.is_dead)::int AS failed,
        count(*) FILTER (WHERE NOT seen.is_delivered AND NOT seen.is_dead)::int AS pending
    FROM dead_letter_decision decision
    CROSS JOIN LATERAL (
        SELECT EXISTS (SELECT FROM delivery_receipt receipt
                WHERE receipt.namespace = decision.namespace
                    AND receipt.job_id = decision.new_job_id
                    AND receipt.outcome = 'delivered') AS is_delivered,
            EXISTS (SELECT FROM dead_letter_dispatch dead
                WHERE dead.namespace = decision.namespace
                    AND dead.job_id = decision.new_job_id) AS is_dead
    ) seen
    WHERE decision.namespace = asked.namespace AND decision.batch_id = asked.batch_id
) jobs;

-- name: first_pending
-- The first dead letter of a batch, from one on, whose job is still under way.
-- dead_letter_decision_by_batch serves it.
SELECT decision.job_id FROM dead_letter_decision decision
WHERE decision.namespace = %(namespace)s AND decision.batch_id = %(batch_id)s::uuid
    AND decision.job_id
        >= COALESCE(%(watched_from)s::uuid, '00000000-0000-0000-0000-000000000000')
    AND NOT EXISTS (SELECT FROM delivery_receipt receipt
        WHERE receipt.namespace = decision.namespace AND receipt.job_id = decision.new_job_id
            AND receipt.outcome = 'delivered')
    AND NOT EXISTS (SELECT FROM dead_letter_dispatch dead
        WHERE dead.namespace = decision.namespace AND dead.job_id = decision.new_job_id)
ORDER BY decision.job_id LIMIT 1;

-- name: first_failure
-- The job of a batch, from a dead letter on, whose attempt was the first to end otherwise than
-- delivered, or, if only those count, the first that is a dead letter again.
-- dead_letter_decision_by_batch serves it.
SELECT decision.new_job_id AS job_id, receipt.attempt, receipt.outcome, receipt.error, dead.cause
FROM dead_letter_decision decision
LEFT JOIN LATERAL (
    SELECT attempt, outcome, error, created_at FROM delivery_receipt
    WHERE delivery_receipt.namespace = decision.namespace
        AND delivery_receipt.job_id = decision.new_job_id
        AND delivery_receipt.outcome <> 'delivered'
    ORDER BY attempt LIMIT 1
) receipt ON true
LEFT JOIN dead_letter_dispatch dead
    ON dead.namespace = decision.namespace AND dead.job_id = decision.new_job_id
WHERE decision.namespace = %(namespace)s AND decision.batch_id = %(batch_id)s::uuid
    AND decision.job_id
        >= COALESCE(%(watched_from)s::uuid, '00000000-0000-0000-0000-000000000000')
    AND (dead.job_id IS NOT NULL OR (NOT %(is_dead_only)s AND receipt.attempt IS NOT NULL))
ORDER BY COALESCE(receipt.created_at, dead.created_at), decision.new_job_id LIMIT 1;

-- name: hold_lease
-- Locks the lease of a step; no row if it is not its owner's any more.
SELECT batch_id FROM requeue_lease
WHERE namespace = %(namespace)s AND batch_id = %(batch_id)s::uuid
    AND lease_number = %(lease_number)s::int AND node_id = %(node_id)s::uuid
FOR UPDATE;

-- name: lock_lease
-- Locks the lease of a batch, whoever works on it: the step under way ends first.
SELECT batch_id FROM requeue_lease
WHERE namespace = %(namespace)s AND batch_id = %(batch_id)s::uuid FOR UPDATE;

-- name: move_lease
-- How far a batch is after a step, and when the next is due. Run under the lease's lock.
UPDATE requeue_lease SET phase = %(phase)s, requeued = requeued + %(requeued)s::int,
    after_job_id = COALESCE(%(after_job_id)s::uuid, after_job_id),
    watched_from = COALESCE(%(watched_from)s::uuid, watched_from),
    is_exhausted = %(is_exhausted)s, node_id = NULL, last_error = NULL,
    stepped_at = orbit_now() - %(owed_seconds)s::float8 * interval '1 second',
    due_at = orbit_now() + %(rest_seconds)s::float8 * interval '1 second'
WHERE namespace = %(namespace)s AND batch_id = %(batch_id)s::uuid;

-- name: release_lease
-- Gives a step back that could not be done here; another node may.
UPDATE requeue_lease SET node_id = NULL, last_error = %(error)s,
    due_at = orbit_now() + %(rest_seconds)s::float8 * interval '1 second'
WHERE namespace = %(namespace)s AND batch_id = %(batch_id)s::uuid
    AND lease_number = %(lease_number)s::int AND node_id = %(node_id)s::uuid;

-- name: insert_end
-- How a batch ended; no row if it had ended before.
INSERT INTO requeue_batch_end (namespace, batch_id, state, requeued, delivered, failed, pending,
    why, job_id, node_id)
VALUES (%(namespace)s, %(batch_id)s::uuid, %(state)s, %(requeued)s::int, %(delivered)s::int,
    %(failed)s::int, %(pending)s::int, %(why)s, %(job_id)s::uuid, %(node_id)s::uuid)
ON CONFLICT DO NOTHING
RETURNING batch_id;

-- name: delete_lease
-- The lease of a batch that has ended.
DELETE FROM requeue_lease WHERE namespace = %(namespace)s AND batch_id = %(batch_id)s::uuid;

-- name: find_batch
-- Which namespace a batch is in, and how it ended if it has. requeue_batch_newest serves it.
SELECT batch.namespace, ended.state FROM requeue_batch batch
LEFT JOIN requeue_batch_end ended
    ON ended.namespace = batch.namespace AND ended.batch_id = batch.batch_id
WHERE batch.batch_id = %(batch_id)s::uuid;
