-- What people decide about dead letters: brought back as a new job, or let be.
--
-- A decision's number is its key: the first two people to decide cannot both be first.

-- name: dead_letter
-- One dead letter with its job, and what was decided last. dead_letter_dispatch_newest serves it.
SELECT dead.namespace, dead.job_id, dead.cycle_id, dead.endpoint_key, job.snapshot_id,
    COALESCE(decided.sequence, 0) AS sequence, decided.decision, decided.new_job_id,
    EXISTS (SELECT FROM payload WHERE payload.namespace = dead.namespace
        AND payload.cycle_id = dead.cycle_id AND payload.digest = job.digest) AS has_payload,
    (SELECT max(attempt) FROM delivery_receipt receipt WHERE receipt.namespace = dead.namespace
        AND receipt.job_id = dead.job_id AND receipt.outcome = 'unknown') AS unknown_attempt
FROM dead_letter_dispatch dead
LEFT JOIN dispatch_job job ON job.namespace = dead.namespace AND job.job_id = dead.job_id
LEFT JOIN LATERAL (
    SELECT sequence, decision, new_job_id FROM dead_letter_decision decision
    WHERE decision.namespace = dead.namespace AND decision.job_id = dead.job_id
    ORDER BY sequence DESC LIMIT 1
) decided ON true
WHERE dead.job_id = %(job_id)s::uuid;

-- name: open_dead_letters
-- The undecided dead letters of a namespace that can be sent again, in the order of their ids,
-- after one; without those that may have arrived. The primary keys serve it.
SELECT dead.namespace, dead.job_id, dead.cycle_id, dead.endpoint_key, job.snapshot_id,
    0 AS sequence
FROM dead_letter_dispatch dead
JOIN dispatch_job job ON job.namespace = dead.namespace AND job.job_id = dead.job_id
WHERE dead.namespace = %(namespace)s
    AND dead.job_id > COALESCE(%(after_job_id)s::uuid, '00000000-0000-0000-0000-000000000000')
    AND (%(endpoint_key)s::text IS NULL OR dead.endpoint_key = %(endpoint_key)s)
    AND (%(cause)s::text IS NULL OR dead.cause = %(cause)s)
    AND (%(since)s::timestamptz IS NULL OR dead.created_at >= %(since)s)
    AND (%(until)s::timestamptz IS NULL OR dead.created_at < %(until)s)
    AND (%(run_profile_id)s::text IS NULL OR EXISTS (SELECT FROM cycle_run
        WHERE cycle_run.namespace = dead.namespace AND cycle_run.cycle_id = dead.cycle_id
            AND cycle_run.run_profile_id = %(run_profile_id)s))
    AND EXISTS (SELECT FROM payload WHERE payload.namespace = dead.namespace
        AND payload.cycle_id = dead.cycle_id AND payload.digest = job.digest)
    AND NOT EXISTS (SELECT FROM dead_letter_decision decision
        WHERE decision.namespace = dead.namespace AND decision.job_id = dead.job_id)
    AND NOT EXISTS (SELECT FROM delivery_receipt receipt
        WHERE receipt.namespace = dead.namespace AND receipt.job_id = dead.job_id
            AND receipt.outcome = 'unknown')
ORDER BY dead.job_id LIMIT %(limit)s;

-- name: count_open_dead_letters
-- How many those are in all and for which endpoints; how many are left out, since they may have
-- arrived or since their payload is past its retention. The primary keys serve it.
SELECT count(*) FILTER (WHERE seen.has_payload AND NOT seen.is_unknown)::int AS matching,
    count(*) FILTER (WHERE seen.has_payload AND seen.is_unknown)::int AS may_have_arrived,
    count(*) FILTER (WHERE NOT seen.has_payload)::int AS without_payload,
    COALESCE(array_agg(DISTINCT dead.endpoint_key)
        FILTER (WHERE seen.has_payload AND NOT seen.is_unknown), '{}') AS endpoint_keys
FROM dead_letter_dispatch dead
LEFT JOIN dispatch_job job ON job.namespace = dead.namespace AND job.job_id = dead.job_id
CROSS JOIN LATERAL (
    SELECT EXISTS (SELECT FROM delivery_receipt
            WHERE delivery_receipt.namespace = dead.namespace
                AND delivery_receipt.job_id = dead.job_id AND outcome = 'unknown') AS is_unknown,
        EXISTS (SELECT FROM payload WHERE payload.namespace = dead.namespace
            AND payload.cycle_id = dead.cycle_id AND payload.digest = job.digest) AS has_payload
) seen
WHERE dead.namespace = %(namespace)s
    AND (%(endpoint_key)s::text IS NULL OR dead.endpoint_key = %(endpoint_key)s)
    AND (%(cause)s::text IS NULL OR dead.cause = %(cause)s)
    AND (%(since)s::timestamptz IS NULL OR dead.created_at >= %(since)s)
    AND (%(until)s::timestamptz IS NULL OR dead.created_at < %(until)s)
    AND (%(run_profile_id)s::text IS NULL OR EXISTS (SELECT FROM cycle_run
        WHERE cycle_run.namespace = dead.namespace AND cycle_run.cycle_id = dead.cycle_id
            AND cycle_run.run_profile_id = %(run_profile_id)s))
    AND NOT EXISTS (SELECT FROM dead_letter_decision decision
        WHERE decision.namespace = dead.namespace AND decision.job_id = dead.job_id);

-- name: requeue
-- Decides on dead letters and queues a new job for each, with the old one's bytes. One whose
-- decision of that number exists is left out of the answer, and gets no job.
WITH asked AS MATERIALIZED (
    SELECT * FROM unnest(%(namespace)s::text[], %(job_id)s::uuid[], %(sequence)s::int[],
        %(new_job_id)s::uuid[], %(snapshot_id)s::text[])
        AS asked (namespace, job_id, sequence, new_job_id, snapshot_id)
), decided AS (
    INSERT INTO dead_letter_decision (namespace, job_id, sequence, decision, new_job_id, reason,
        batch_id)
    SELECT namespace, job_id, sequence, 'requeued', new_job_id, %(reason)s, %(batch_id)s::uuid
    FROM asked
    ORDER BY namespace, job_id
    ON CONFLICT DO NOTHING
    RETURNING namespace, job_id, new_job_id
), job AS (
    INSERT INTO dispatch_job (namespace, job_id, cycle_id, item_index, endpoint_key, snapshot_id,
        digest, content_type, size, max_attempts, requeued_from)
    SELECT old.namespace, decided.new_job_id, old.cycle_id, old.item_index, old.endpoint_key,
        asked.snapshot_id, old.digest, old.content_type, old.size, %(max_attempts)s, old.job_id
    FROM decided
    JOIN asked USING (namespace, job_id)
    JOIN dispatch_job old ON old.namespace = decided.namespace AND old.job_id = decided.job_id
    RETURNING namespace, job_id, endpoint_key, cycle_id, requeued_from
), lease AS (
    INSERT INTO dispatch_lease (namespace, job_id, endpoint_key, cycle_id, due_at, is_requeued)
    SELECT namespace, job_id, endpoint_key, cycle_id, orbit_now(), true FROM job
), batch AS MATERIALIZED (
    SELECT orbit_new_batch() AS batch_id FROM job LIMIT 1
), told AS (
    INSERT INTO telemetry_event (namespace, batch_id, ordinal, event_type, profile_id,
        run_profile_id, run_id, metadata)
    SELECT job.namespace, batch.batch_id, row_number() OVER (PARTITION BY job.namespace),
        'requeued', run.profile_id, run.run_profile_id, job.cycle_id,
        jsonb_build_object('jobId', job.requeued_from, 'newJobId', job.job_id,
            'endpointKey', job.endpoint_key)
    FROM job CROSS JOIN batch
    LEFT JOIN LATERAL (
        SELECT profile_id, run_profile_id FROM cycle_run
        WHERE cycle_run.namespace = job.namespace AND cycle_run.cycle_id = job.cycle_id OFFSET 0
    ) run ON true
    RETURNING namespace, batch_id
), pending AS (
    INSERT INTO telemetry_pending (namespace, batch_id, events)
    SELECT namespace, batch_id, count(*) FROM told GROUP BY namespace, batch_id
)
SELECT namespace, job_id, new_job_id FROM decided;

-- name: discard
-- Decides that a dead letter stays one. No row if somebody has decided before.
INSERT INTO dead_letter_decision (namespace, job_id, sequence, decision, reason)
VALUES (%(namespace)s, %(job_id)s, 1, 'discarded', %(reason)s)
ON CONFLICT DO NOTHING
RETURNING job_id;
