-- Rebuilds leases from facts. Nothing here changes a fact that is there; every statement leaves
-- alone what has its lease, so that all of it may run again at any time.
--
-- To be run in one transaction, in this order: what may change leases or drop facts is locked out
-- first (configuration, partitions, then requeue_lease, dispatch_lease and cycle_lease, as
-- everywhere). Fences are not: a namespace can be halted at any time.
-- These statements read whole tables; they are for a bad day, not for every day.

-- name: prepare
-- No statement of this transaction waits for a lock longer than this. Whole tables are read, so
-- it may take its time, and the planner may do here what it may not do elsewhere. What a server
-- does not know is left out.
SELECT set_config(name, wanted.value, true) FROM (VALUES ('lock_timeout', '10s'),
    ('transaction_timeout', '0'), ('enable_seqscan', 'on'), ('enable_hashjoin', 'on'),
    ('enable_mergejoin', 'on')) AS wanted (name, value) JOIN pg_settings USING (name);

-- name: lock_partitions
-- Keeps retention from dropping what is being read.
SELECT pg_advisory_xact_lock(hashtext('orbit.partitions'));

-- name: lock_leases
-- Waits for every transaction that moves a lease, and keeps others from beginning.
LOCK TABLE requeue_lease, dispatch_lease, cycle_lease IN SHARE ROW EXCLUSIVE MODE;

-- name: rebuild_configuration
-- The revision in force is the one that was activated last.
INSERT INTO config_active (revision, declared_revision)
SELECT revision, declared_revision FROM config_activation ORDER BY activated_at DESC, activation_id DESC LIMIT 1
ON CONFLICT DO NOTHING;

-- name: rebuild_jobs
-- A job that is neither delivered nor dead can be sent again at once. Its number is far above
-- any that is known: an owner from before, whose last number nobody knows, stays fenced out. A
-- job whose payload retention has dropped is history.
INSERT INTO dispatch_lease (namespace, job_id, endpoint_key, cycle_id, due_at, lease_number,
    attempt, is_retry, spared, is_requeued)
SELECT job.namespace, job.job_id, job.endpoint_key, job.cycle_id, orbit_now(),
    COALESCE(seen.lease_number, 0) + %(stride)s, COALESCE(seen.attempt, 0),
    COALESCE(seen.attempt, 0) > 0, COALESCE(seen.spared, 0), job.requeued_from IS NOT NULL
FROM dispatch_job job
LEFT JOIN (
    SELECT namespace, job_id, max(lease_number) AS lease_number, max(attempt) AS attempt,
        count(*) FILTER (WHERE is_probe)::int AS spared, bool_or(outcome = 'delivered') AS is_delivered
    FROM delivery_receipt GROUP BY namespace, job_id
) seen ON seen.namespace = job.namespace AND seen.job_id = job.job_id
WHERE seen.is_delivered IS NOT TRUE
    AND NOT EXISTS (SELECT FROM dead_letter_dispatch dead
        WHERE dead.namespace = job.namespace AND dead.job_id = job.job_id)
    AND NOT EXISTS (SELECT FROM dispatch_lease lease
        WHERE lease.namespace = job.namespace AND lease.job_id = job.job_id)
    AND EXISTS (SELECT FROM payload WHERE payload.namespace = job.namespace
        AND payload.cycle_id = job.cycle_id AND payload.digest = job.digest)
ORDER BY job.namespace, job.job_id;

-- name: rebuild_cycles
-- A cycle that has not ended can be claimed at once; one whose jobs are out waits for them, and
-- is left to recount_jobs by a count that cannot be right. A cycle whose payloads' partition
-- retention has dropped is history: payloads are dropped first.
INSERT INTO cycle_lease (namespace, cycle_id, run_profile_id, due_at, lease_number, items,
    outstanding)
SELECT run.namespace, run.cycle_id, run.run_profile_id,
    CASE WHEN seen.is_enqueued THEN 'infinity' ELSE orbit_now() END,
    GREATEST(seen.lease_number, called.lease_number, 0) + %(stride)s,
    (SELECT count(*) FROM normalized_item item
        WHERE item.namespace = run.namespace AND item.cycle_id = run.cycle_id),
    CASE WHEN seen.is_enqueued THEN -1 END
FROM cycle_run run
LEFT JOIN (
    SELECT namespace, cycle_id, max(lease_number) AS lease_number,
        bool_or(stage = 'dispatch_enqueued') AS is_enqueued,
        bool_or(stage IN ('cycle_finished', 'cycle_failed')) AS is_ended
    FROM cycle_checkpoint GROUP BY namespace, cycle_id
) seen ON seen.namespace = run.namespace AND seen.cycle_id = run.cycle_id
LEFT JOIN LATERAL (
    SELECT max(lease_number) AS lease_number FROM execution_record record
    WHERE record.namespace = run.namespace AND record.cycle_id = run.cycle_id
) called ON true
WHERE seen.is_ended IS NOT TRUE
    AND NOT EXISTS (SELECT FROM cycle_lease lease
        WHERE lease.namespace = run.namespace AND lease.cycle_id = run.cycle_id)
    AND to_regclass('payload_p' || to_char(date_trunc('week',
        orbit_id_time(run.cycle_id) AT TIME ZONE 'UTC'), 'YYYYMMDD')) IS NOT NULL
ORDER BY run.namespace, run.cycle_id;

-- name: recount_jobs
-- Sets right the counts of cycles that wait for their jobs: outstanding are those that have a
-- lease, since it is with the lease that a job is counted down. Requeued jobs do not count.
WITH counted AS MATERIALIZED (
    SELECT waiting.namespace, waiting.cycle_id, count(*)::int AS jobs,
        count(lease.job_id)::int AS outstanding,
        count(*) FILTER (WHERE lease.job_id IS NULL AND seen.is_delivered)::int AS delivered,
        count(*) FILTER (WHERE lease.job_id IS NULL
            AND seen.is_delivered IS NOT TRUE)::int AS dead_lettered,
        COALESCE(sum(seen.attempts) FILTER (WHERE lease.job_id IS NULL), 0)::int AS attempts,
        COALESCE(sum(seen.attempts * job.size) FILTER (WHERE lease.job_id IS NULL), 0)::bigint
            AS bytes
    FROM cycle_lease waiting
    JOIN dispatch_job job ON job.namespace = waiting.namespace
        AND job.cycle_id = waiting.cycle_id AND job.requeued_from IS NULL
    LEFT JOIN dispatch_lease lease
        ON lease.namespace = job.namespace AND lease.job_id = job.job_id
    LEFT JOIN LATERAL (
        SELECT max(attempt)::bigint AS attempts, bool_or(outcome = 'delivered') AS is_delivered
        FROM delivery_receipt receipt
        WHERE receipt.namespace = job.namespace AND receipt.job_id = job.job_id
    ) seen ON true
    WHERE waiting.outstanding IS NOT NULL
    GROUP BY waiting.namespace, waiting.cycle_id
)
UPDATE cycle_lease SET jobs = counted.jobs, outstanding = counted.outstanding,
    delivered = counted.delivered, dead_lettered = counted.dead_lettered,
    attempts = counted.attempts, bytes = counted.bytes
FROM counted
WHERE cycle_lease.namespace = counted.namespace AND cycle_lease.cycle_id = counted.cycle_id
    AND cycle_lease.outstanding <> counted.outstanding;

-- name: completed_cycles
-- The cycles whose jobs are all done: nobody else would end them.
SELECT namespace, cycle_id FROM cycle_lease WHERE outstanding = 0 ORDER BY namespace, cycle_id;

-- name: rebuild_heads
-- Forgets heads of the audit trail that do not name their log's last entry; the next act makes
-- them anew from it. Entries that were cut off do not come back: verification says so.
DELETE FROM audit_head head
WHERE (head.seq, head.hash) IS DISTINCT FROM (SELECT (entry.seq, entry.hash)
    FROM audit_trail_entry entry WHERE entry.log = head.log ORDER BY entry.seq DESC LIMIT 1);

-- name: rebuild_requeues
-- A bulk requeue that has not ended goes on from its first dead letter: those that it brought
-- back are decided. Its canaries are looked at again.
INSERT INTO requeue_lease (namespace, batch_id, due_at, lease_number, phase, requeued, stepped_at)
SELECT batch.namespace, batch.batch_id, orbit_now(), %(stride)s,
    CASE WHEN batch.canary > 0 THEN 'canary' ELSE 'flowing' END,
    (SELECT count(*) FROM dead_letter_decision decision
        WHERE decision.namespace = batch.namespace AND decision.batch_id = batch.batch_id),
    orbit_now()
FROM requeue_batch batch
WHERE NOT EXISTS (SELECT FROM requeue_batch_end ended
        WHERE ended.namespace = batch.namespace AND ended.batch_id = batch.batch_id)
    AND NOT EXISTS (SELECT FROM requeue_lease lease
        WHERE lease.namespace = batch.namespace AND lease.batch_id = batch.batch_id)
ORDER BY batch.namespace, batch.batch_id;

-- name: rebuild_fences
-- A namespace is halted if its last halt has not ended, until when the longest of the halts
-- since the last end said.
INSERT INTO namespace_fence (namespace, epoch, is_halted, until_at)
SELECT last.namespace, last.epoch, last.is_halted, CASE WHEN last.is_halted THEN (
    SELECT CASE WHEN bool_and(halt.until_at IS NOT NULL) THEN max(halt.until_at) END
    FROM namespace_halt halt WHERE halt.namespace = last.namespace AND halt.epoch > COALESCE(
        (SELECT max(resumed.epoch) FROM namespace_resume resumed
        WHERE resumed.namespace = last.namespace AND resumed.step = 'resumed'), 0)) END
FROM (
    SELECT halt.namespace, max(halt.epoch) AS epoch, NOT EXISTS (
        SELECT FROM namespace_resume resumed WHERE resumed.namespace = halt.namespace
            AND resumed.step = 'resumed' AND resumed.epoch = max(halt.epoch)) AS is_halted
    FROM namespace_halt halt GROUP BY halt.namespace
) last
ON CONFLICT DO NOTHING;

-- name: lock_sequencer
-- Lets nobody number until the transaction ends: to be sent before rebuild_pending, which would
-- otherwise bring back what is numbered meanwhile.
SELECT FROM telemetry_sequencer FOR UPDATE;

-- name: rebuild_pending
-- Events that have no position get their pending rows back; positions are given after the last.
INSERT INTO telemetry_pending (batch_id, namespace, events)
SELECT event.batch_id, event.namespace, count(*)
FROM telemetry_event event
WHERE NOT EXISTS (SELECT FROM telemetry_batch batch
    WHERE batch.namespace = event.namespace AND batch.batch_id = event.batch_id)
GROUP BY event.batch_id, event.namespace
ORDER BY event.batch_id, event.namespace
ON CONFLICT DO NOTHING;
