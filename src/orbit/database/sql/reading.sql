-- What people and tools ask for. Read only, and bounded: a list scans a window of an index and
-- goes on where the last page ended; nothing counts over history.
--
-- Who asks for some namespaces (`namespaces`; NULL is all) gets an arm of its own, which an index
-- leads to these: no row of another namespace is walked, so neither time nor cost tells of one.

-- name: probe
-- Whether the database answers, and which schema it has.
SELECT (SELECT max(version_num) FROM alembic_version) AS schema_revision;

-- name: cycle_window
-- The cycles before one, newest first, over all namespaces but drills'. cycle_run_newest serves it.
SELECT namespace, cycle_id, run_profile_id FROM cycle_run
WHERE cycle_id < %(before)s::uuid AND NOT starts_with(namespace, %(drills)s::text)
ORDER BY cycle_id DESC LIMIT %(count)s;

-- name: cycle_window_of_namespaces
-- The same in some namespaces. The primary key serves it, once for each.
SELECT found.* FROM unnest(%(namespaces)s::text[]) AS asked (namespace)
CROSS JOIN LATERAL (
    SELECT namespace, cycle_id, run_profile_id FROM cycle_run
    WHERE cycle_run.namespace = asked.namespace AND cycle_id < %(before)s::uuid
    ORDER BY cycle_id DESC LIMIT %(count)s
) found
ORDER BY found.cycle_id DESC LIMIT %(count)s;

-- name: cycle_window_of_running
-- The same of active cycles only, in some namespaces or all: those that have a lease. The primary
-- key serves it.
(SELECT namespace, cycle_id, run_profile_id FROM cycle_lease
WHERE %(namespaces)s::text[] IS NULL AND cycle_id < %(before)s::uuid
ORDER BY cycle_id DESC LIMIT %(count)s)
UNION ALL
(SELECT found.* FROM unnest(%(namespaces)s::text[]) AS asked (namespace)
CROSS JOIN LATERAL (
    SELECT namespace, cycle_id, run_profile_id FROM cycle_lease
    WHERE cycle_lease.namespace = asked.namespace AND cycle_id < %(before)s::uuid
    ORDER BY cycle_id DESC LIMIT %(count)s
) found
ORDER BY found.cycle_id DESC LIMIT %(count)s);

-- name: cycle_summaries
-- Given cycles with their state, newest first. The primary keys serve it.
SELECT status.cycle_id AS cycle_run_id, status.namespace, status.profile_id,
    NULLIF(status.run_profile_id, '') AS run_profile_id, status.trigger, status.slot_at,
    status.state, status.stage, status.stage_at, status.created_at, status.ended_at,
    status.dead_lettered, status.is_waiting, status.rerun_of,
    CASE WHEN status.state = 'failed' THEN status.detail ->> 'reason' END AS reason
FROM unnest(%(namespace)s::text[], %(cycle_id)s::uuid[]) AS asked (namespace, cycle_id)
JOIN cycle_status status
    ON status.namespace = asked.namespace AND status.cycle_id = asked.cycle_id
ORDER BY status.cycle_id DESC;

-- name: find_cycle
-- One cycle by its id alone, with what it began from. cycle_run_newest serves it.
SELECT run.cycle_id AS cycle_run_id, run.namespace, run.profile_id,
    NULLIF(run.run_profile_id, '') AS run_profile_id, run.trigger, run.slot_at,
    run.idempotency_key, run.revision, run.endpoint_keys, run.value_tags, run.traceparent,
    run.rerun_of, run.node_id, run.created_at, initiation.hash, initiation.context
FROM cycle_run run
JOIN initiation ON initiation.namespace = run.namespace AND initiation.cycle_id = run.cycle_id
WHERE run.cycle_id = %(cycle_id)s::uuid;

-- name: cycle_namespace
-- Which namespace a cycle is in. cycle_run_newest serves it.
SELECT namespace FROM cycle_run WHERE cycle_id = %(cycle_id)s::uuid;

-- name: cycle_reruns
-- The cycles that were started in place of a failed one: they are younger than it.
SELECT cycle_id FROM cycle_run
WHERE rerun_of = %(cycle_id)s::uuid AND namespace = %(namespace)s
    AND cycle_id > %(cycle_id)s::uuid
ORDER BY cycle_id LIMIT 100;

-- name: cycle_checkpoints
-- The stages of a cycle that are done, in order.
SELECT stage, digest, content_type, size, detail, lease_number, node_id, created_at
FROM cycle_checkpoint WHERE namespace = %(namespace)s AND cycle_id = %(cycle_id)s::uuid
ORDER BY orbit_stage_number(stage);

-- name: cycle_items
-- The normalised items of a cycle.
SELECT item_index, digest, content_type, size, created_at FROM normalized_item
WHERE namespace = %(namespace)s AND cycle_id = %(cycle_id)s::uuid
ORDER BY item_index LIMIT %(count)s;

-- name: cycle_records
-- The calls of a cycle's steps.
SELECT stage, step, attempt, name, outcome, error, duration_seconds, input_size, output_size,
    lease_number, node_id, created_at
FROM execution_record WHERE namespace = %(namespace)s AND cycle_id = %(cycle_id)s::uuid
ORDER BY orbit_stage_number(stage), step, lease_number, attempt LIMIT %(count)s;

-- name: cycle_jobs
-- The jobs of a cycle. Their ids begin with the cycle's time, which bounds the partitions that
-- are looked into; dispatch_job_by_cycle serves it.
SELECT status.job_id, status.item_index, status.endpoint_key, status.url, status.method,
    status.token_fingerprint, status.digest, status.content_type, status.size, status.state,
    status.attempts, status.max_attempts, status.requeued_from,
    NULLIF(status.due_at, 'infinity') AS due_at, status.created_at, dead.cause
FROM job_status status
LEFT JOIN dead_letter_dispatch dead
    ON dead.namespace = status.namespace AND dead.job_id = status.job_id
WHERE status.namespace = %(namespace)s AND status.cycle_id = %(cycle_id)s::uuid
    AND status.job_id BETWEEN %(first_id)s::uuid AND %(last_id)s::uuid
ORDER BY status.item_index, status.endpoint_key, status.job_id LIMIT %(count)s;

-- name: job_receipts
-- What became of the attempts of given jobs. The primary key serves it.
SELECT job_id, attempt, outcome, status, error, digest, size, queue_seconds, connect_seconds,
    first_byte_seconds, total_seconds, answer, answer_content_type, is_probe, is_reused, node_id,
    started_at, created_at
FROM delivery_receipt
WHERE namespace = %(namespace)s AND job_id = ANY (%(job_id)s::uuid[])
ORDER BY job_id, attempt LIMIT %(count)s;

-- name: cycle_ledger
-- What a run profile's execution was for, and what it took.
SELECT state, tags, items, jobs, delivered, dead_lettered, attempts, bytes, wall_seconds,
    created_at
FROM value_ledger_entry WHERE namespace = %(namespace)s AND cycle_id = %(cycle_id)s::uuid;

-- name: find_slot
-- One slot of one schedule.
SELECT namespace, NULLIF(run_profile_id, '') AS run_profile_id, slot_at, outcome, reason,
    cycle_id AS cycle_run_id, decided_at
FROM schedule_slot WHERE namespace = %(namespace)s AND run_profile_id = %(run_profile_id)s
    AND slot_at = %(slot_at)s::timestamptz;

-- name: slot_window
-- The slots before one, newest first. schedule_slot_by_time serves it.
SELECT namespace, run_profile_id, slot_at, outcome, reason, cycle_id AS cycle_run_id, decided_at
FROM schedule_slot
WHERE (slot_at, namespace, run_profile_id)
    < (%(slot_at)s::timestamptz, %(namespace)s, %(run_profile_id)s)
ORDER BY slot_at DESC, namespace DESC, run_profile_id DESC LIMIT %(count)s;

-- name: slot_window_of_namespaces
-- The same in some namespaces. schedule_slot_of_namespace serves it, once for each.
SELECT found.* FROM unnest(%(namespaces)s::text[]) AS asked (namespace)
CROSS JOIN LATERAL (
    SELECT namespace, run_profile_id, slot_at, outcome, reason, cycle_id AS cycle_run_id,
        decided_at
    FROM schedule_slot slot
    WHERE slot.namespace = asked.namespace AND slot_at <= %(slot_at)s::timestamptz
        AND (slot_at, slot.namespace, run_profile_id)
            < (%(slot_at)s::timestamptz, %(namespace)s, %(run_profile_id)s)
    ORDER BY slot_at DESC, run_profile_id DESC LIMIT %(count)s
) found
ORDER BY found.slot_at DESC, found.namespace DESC, found.run_profile_id DESC LIMIT %(count)s;

-- name: last_slots
-- The last slot of each given schedule. The primary key serves it.
SELECT asked.namespace, asked.run_profile_id, last.slot_at, last.outcome, last.reason,
    last.cycle_id AS cycle_run_id, last.decided_at
FROM unnest(%(namespace)s::text[], %(run_profile_id)s::text[])
    AS asked (namespace, run_profile_id)
CROSS JOIN LATERAL (
    SELECT slot_at, outcome, reason, cycle_id, decided_at FROM schedule_slot slot
    WHERE slot.namespace = asked.namespace AND slot.run_profile_id = asked.run_profile_id
    ORDER BY slot_at DESC LIMIT 1
) last;

-- name: schedules
-- The schedules, in some namespaces or all, whose next slot is to be decided first. schedule_due
-- and the primary key serve it.
(SELECT namespace, run_profile_id, NULLIF(due_at, 'infinity') AS due_at FROM schedule
WHERE %(namespaces)s::text[] IS NULL
ORDER BY schedule.due_at, namespace, run_profile_id LIMIT %(count)s)
UNION ALL
(SELECT found.namespace, found.run_profile_id, NULLIF(found.due_at, 'infinity') AS due_at
FROM unnest(%(namespaces)s::text[]) AS asked (namespace)
CROSS JOIN LATERAL (
    SELECT namespace, run_profile_id, due_at FROM schedule
    WHERE schedule.namespace = asked.namespace OFFSET 0
) found
ORDER BY found.due_at, found.namespace, found.run_profile_id LIMIT %(count)s);

-- name: schedules_of_run_profiles
-- When the next slot of each given schedule is to be decided. The primary key serves it.
SELECT namespace, run_profile_id, NULLIF(due_at, 'infinity') AS due_at
FROM unnest(%(namespace)s::text[], %(run_profile_id)s::text[])
    AS asked (namespace, run_profile_id)
JOIN schedule USING (namespace, run_profile_id);

-- name: dead_letter_window
-- The dead letters that died before one, newest first. dead_letter_dispatch_by_time serves it.
SELECT dead.namespace, dead.job_id, dead.cycle_id, dead.endpoint_key, dead.cause,
    dead.created_at, decided.decision IS NULL AS is_open,
    (SELECT NULLIF(run_profile_id, '') FROM cycle_run
        WHERE cycle_run.namespace = dead.namespace
            AND cycle_run.cycle_id = dead.cycle_id) AS run_profile_id
FROM dead_letter_dispatch dead
LEFT JOIN LATERAL (
    SELECT decision FROM dead_letter_decision
    WHERE dead_letter_decision.namespace = dead.namespace
        AND dead_letter_decision.job_id = dead.job_id
    LIMIT 1
) decided ON true
WHERE (dead.created_at, dead.job_id) < (%(before_at)s::timestamptz, %(before)s::uuid)
ORDER BY dead.created_at DESC, dead.job_id DESC LIMIT %(count)s;

-- name: dead_letter_window_of_namespaces
-- The same in some namespaces. dead_letter_dispatch_of_namespace serves it, once for each.
SELECT dead.namespace, dead.job_id, dead.cycle_id, dead.endpoint_key, dead.cause,
    dead.created_at, decided.decision IS NULL AS is_open,
    (SELECT NULLIF(run_profile_id, '') FROM cycle_run
        WHERE cycle_run.namespace = dead.namespace
            AND cycle_run.cycle_id = dead.cycle_id) AS run_profile_id
FROM unnest(%(namespaces)s::text[]) AS asked (namespace)
CROSS JOIN LATERAL (
    SELECT namespace, job_id, cycle_id, endpoint_key, cause, created_at
    FROM dead_letter_dispatch letter
    WHERE letter.namespace = asked.namespace
        AND (created_at, job_id) < (%(before_at)s::timestamptz, %(before)s::uuid)
    ORDER BY created_at DESC, job_id DESC LIMIT %(count)s
) dead
LEFT JOIN LATERAL (
    SELECT decision FROM dead_letter_decision
    WHERE dead_letter_decision.namespace = dead.namespace
        AND dead_letter_decision.job_id = dead.job_id
    LIMIT 1
) decided ON true
ORDER BY dead.created_at DESC, dead.job_id DESC LIMIT %(count)s;

-- name: dead_letter_groups
-- The open dead letters by namespace, endpoint and cause, the most first. It reads them all.
SELECT dead.namespace, dead.endpoint_key, dead.cause, count(*)::int AS open,
    count(*) FILTER (WHERE EXISTS (SELECT FROM delivery_receipt receipt
        WHERE receipt.namespace = dead.namespace AND receipt.job_id = dead.job_id
            AND receipt.outcome = 'unknown'))::int AS may_have_arrived,
    min(dead.created_at) AS oldest_at, max(dead.created_at) AS newest_at
FROM (
    SELECT namespace, job_id, endpoint_key, cause, created_at FROM dead_letter_dispatch
    WHERE %(namespaces)s::text[] IS NULL
    UNION ALL
    SELECT namespace, job_id, endpoint_key, cause, created_at FROM dead_letter_dispatch
    WHERE namespace = ANY (%(namespaces)s::text[])
) dead
WHERE NOT EXISTS (SELECT FROM dead_letter_decision decision
    WHERE decision.namespace = dead.namespace AND decision.job_id = dead.job_id)
GROUP BY dead.namespace, dead.endpoint_key, dead.cause
ORDER BY open DESC, dead.namespace, dead.endpoint_key, dead.cause LIMIT %(count)s;

-- name: dead_letters
-- Given dead letters with their job, run profile and last decision, newest first. The primary
-- keys serve it.
SELECT dead.job_id, dead.namespace, dead.cycle_id AS cycle_run_id, dead.endpoint_key, dead.cause,
    dead.attempts, dead.created_at, job.item_index, job.digest, job.content_type, job.size,
    (SELECT NULLIF(run_profile_id, '') FROM cycle_run
        WHERE cycle_run.namespace = dead.namespace
            AND cycle_run.cycle_id = dead.cycle_id) AS run_profile_id,
    job.snapshot_id, job.requeued_from, snapshot.url, snapshot.method, decided.decision, decided.new_job_id,
    decided.reason AS decision_reason, decided.batch_id, decided.decided_at,
    EXISTS (SELECT FROM delivery_receipt receipt WHERE receipt.namespace = dead.namespace
        AND receipt.job_id = dead.job_id AND receipt.outcome = 'unknown') AS may_have_arrived
FROM unnest(%(namespace)s::text[], %(job_id)s::uuid[]) AS asked (namespace, job_id)
JOIN dead_letter_dispatch dead
    ON dead.namespace = asked.namespace AND dead.job_id = asked.job_id
LEFT JOIN dispatch_job job ON job.namespace = asked.namespace AND job.job_id = asked.job_id
LEFT JOIN endpoint_snapshot snapshot
    ON snapshot.namespace = job.namespace AND snapshot.snapshot_id = job.snapshot_id
LEFT JOIN LATERAL (
    SELECT decision, new_job_id, reason, batch_id, decided_at FROM dead_letter_decision decision
    WHERE decision.namespace = asked.namespace AND decision.job_id = asked.job_id
    ORDER BY sequence DESC LIMIT 1
) decided ON true
ORDER BY dead.created_at DESC, dead.job_id DESC;

-- name: dead_letter_namespace
-- Which namespace a dead letter is in. dead_letter_dispatch_newest serves it.
SELECT namespace FROM dead_letter_dispatch WHERE job_id = %(job_id)s::uuid;

-- name: dead_letter_decisions
-- What people decided about a dead letter, in order.
SELECT sequence, decision, new_job_id, reason, batch_id, decided_at FROM dead_letter_decision
WHERE namespace = %(namespace)s AND job_id = %(job_id)s::uuid ORDER BY sequence;

-- name: snapshot_versions
-- The definitions of an endpoint in a namespace, in the order of their first use: version 1, 2,
-- ... One that was encrypted anew under another key, which a snapshot's id ends in, stays the same.
SELECT split_part(snapshot_id, '.', 1) AS definition FROM endpoint_snapshot
WHERE namespace = %(namespace)s AND endpoint_key = %(endpoint_key)s
GROUP BY definition ORDER BY min(created_at), definition LIMIT %(count)s;

-- name: requeue_window
-- The bulk requeues before one, newest first. requeue_batch_newest serves it.
SELECT batch.namespace, batch.batch_id, COALESCE(ended.state, 'running') AS state
FROM requeue_batch batch
LEFT JOIN requeue_batch_end ended
    ON ended.namespace = batch.namespace AND ended.batch_id = batch.batch_id
WHERE batch.batch_id < %(before)s::uuid ORDER BY batch.batch_id DESC LIMIT %(count)s;

-- name: requeue_window_of_namespaces
-- The same in some namespaces. The primary key serves it, once for each.
SELECT batch.namespace, batch.batch_id, COALESCE(ended.state, 'running') AS state
FROM unnest(%(namespaces)s::text[]) AS asked (namespace)
CROSS JOIN LATERAL (
    SELECT namespace, batch_id FROM requeue_batch
    WHERE requeue_batch.namespace = asked.namespace AND batch_id < %(before)s::uuid
    ORDER BY batch_id DESC LIMIT %(count)s
) batch
LEFT JOIN requeue_batch_end ended
    ON ended.namespace = batch.namespace AND ended.batch_id = batch.batch_id
ORDER BY batch.batch_id DESC LIMIT %(count)s;

-- name: requeue_batches
-- Given bulk requeues, newest first, how far they are, and how many jobs those that have ended
-- had; the jobs of the others are counted by requeues.tally. The primary keys serve it.
SELECT batch.batch_id, batch.namespace, batch.endpoint_key, batch.cause, batch.run_profile_id,
    batch.since_at, batch.until_at, batch.reason, batch.asked_by, batch.snapshot, batch.canary,
    batch.rate, batch.is_stopping AS stop_on_failure, batch.size_limit, batch.matching,
    batch.created_at, COALESCE(ended.state, 'running') AS state, lease.phase, lease.last_error,
    ended.requeued, ended.delivered, ended.failed, ended.pending, ended.why, ended.job_id,
    ended.ended_at
FROM unnest(%(namespace)s::text[], %(batch_id)s::uuid[]) AS asked (namespace, batch_id)
JOIN requeue_batch batch
    ON batch.namespace = asked.namespace AND batch.batch_id = asked.batch_id
LEFT JOIN requeue_batch_end ended
    ON ended.namespace = asked.namespace AND ended.batch_id = asked.batch_id
LEFT JOIN requeue_lease lease
    ON lease.namespace = asked.namespace AND lease.batch_id = asked.batch_id
ORDER BY batch.batch_id DESC;

-- name: last_receipts
-- The last receipt of each given job. The primary key serves it.
SELECT last.* FROM unnest(%(namespace)s::text[], %(job_id)s::uuid[]) AS asked (namespace, job_id)
CROSS JOIN LATERAL (
    SELECT job_id, attempt, outcome, status, error, digest, size, queue_seconds, connect_seconds,
        first_byte_seconds, total_seconds, answer, answer_content_type, is_probe, is_reused,
        node_id, started_at, created_at
    FROM delivery_receipt receipt
    WHERE receipt.namespace = asked.namespace AND receipt.job_id = asked.job_id
    ORDER BY attempt DESC LIMIT 1
) last;

-- name: nodes
-- The nodes, and whether each was seen within a lease length.
SELECT node_id, name, address, roles, version, files_revision, is_draining, started_at, seen_at,
    seen_at > orbit_now() - %(lease_seconds)s * interval '1 second' AS is_alive
FROM node ORDER BY started_at LIMIT 200;

-- name: active_cycles
-- How many cycles are active, in some namespaces or all, counted up to 10,000.
SELECT count(*)::int AS active, count(*) FILTER (WHERE is_waiting)::int AS waiting
FROM (
    SELECT is_waiting FROM cycle_lease WHERE %(namespaces)s::text[] IS NULL
    UNION ALL
    SELECT is_waiting FROM cycle_lease WHERE namespace = ANY (%(namespaces)s::text[])
    LIMIT 10000
) live;

-- name: active_stages
-- The stages at which up to 1,000 active cycles are, in some namespaces or all. The primary keys
-- serve it.
SELECT last.stage, count(*)::int AS cycles
FROM (
    SELECT namespace, cycle_id FROM cycle_lease WHERE %(namespaces)s::text[] IS NULL
    UNION ALL
    SELECT namespace, cycle_id FROM cycle_lease WHERE namespace = ANY (%(namespaces)s::text[])
    LIMIT 1000
) live
LEFT JOIN LATERAL (
    SELECT stage FROM cycle_checkpoint checkpoint
    WHERE checkpoint.namespace = live.namespace AND checkpoint.cycle_id = live.cycle_id
    ORDER BY orbit_stage_number(stage) DESC LIMIT 1
) last ON true
GROUP BY last.stage;

-- name: waiting_lanes
-- The lanes with jobs to send, up to 200, of all namespaces or of each that is asked for: loose
-- scans of dispatch_lease_ready.
WITH RECURSIVE lanes AS (
    (SELECT namespace, endpoint_key FROM dispatch_lease
    WHERE %(namespaces)s::text[] IS NULL AND node_id IS NULL
    ORDER BY namespace, endpoint_key LIMIT 1)
    UNION ALL
    SELECT next.* FROM lanes CROSS JOIN LATERAL (
        SELECT namespace, endpoint_key FROM dispatch_lease
        WHERE node_id IS NULL AND (dispatch_lease.namespace, dispatch_lease.endpoint_key)
            > (lanes.namespace, lanes.endpoint_key)
        ORDER BY namespace, endpoint_key LIMIT 1
    ) next
), lanes_asked AS (
    SELECT namespace, '' AS endpoint_key
    FROM unnest(%(namespaces)s::text[]) AS asked (namespace)
    UNION ALL
    SELECT lanes_asked.namespace, next.endpoint_key FROM lanes_asked CROSS JOIN LATERAL (
        SELECT endpoint_key FROM dispatch_lease
        WHERE node_id IS NULL AND dispatch_lease.namespace = lanes_asked.namespace
            AND dispatch_lease.endpoint_key > lanes_asked.endpoint_key
        ORDER BY namespace, endpoint_key LIMIT 1
    ) next
)
(SELECT namespace, endpoint_key FROM lanes LIMIT 200)
UNION ALL
(SELECT namespace, endpoint_key FROM lanes_asked WHERE endpoint_key <> '' LIMIT 200);

-- name: lane_window
-- The lanes after one, in some namespaces or all, in the order of their key. The primary key
-- serves it.
(SELECT namespace, endpoint_key FROM lane
WHERE %(namespaces)s::text[] IS NULL
    AND (namespace, endpoint_key) > (%(namespace)s, %(endpoint_key)s)
ORDER BY namespace, endpoint_key LIMIT %(count)s)
UNION ALL
(SELECT found.* FROM unnest(%(namespaces)s::text[]) AS asked (namespace)
CROSS JOIN LATERAL (
    SELECT namespace, endpoint_key FROM lane
    WHERE lane.namespace = asked.namespace
        AND (lane.namespace, endpoint_key) > (%(namespace)s, %(endpoint_key)s)
    ORDER BY namespace, endpoint_key LIMIT %(count)s
) found
ORDER BY found.namespace, found.endpoint_key LIMIT %(count)s);

-- name: lane_states
-- Given lanes: breaker, queue (waiting and in flight, each counted up to 1,000; when the first
-- is due), and what attempts came to. Indexes of dispatch_lease, the primary keys and
-- lane_change_newest serve it.
SELECT asked.namespace, asked.endpoint_key, lane.namespace IS NOT NULL AS is_known,
    CASE WHEN lane.probe_at IS NULL THEN 'closed' ELSE 'open' END AS breaker,
    opened.created_at AS opened_at, lane.probe_at, COALESCE(lane.failures, 0) AS failures,
    COALESCE(lane.window_attempts, 0) AS window_attempts,
    COALESCE(lane.window_failures, 0) AS window_failures, depth.waiting, flying.in_flight,
    NULLIF(first.due_at, 'infinity') AS due_at,
    tally.delivered, tally.failed, tally.not_sent, tally.unknown
FROM unnest(%(namespace)s::text[], %(endpoint_key)s::text[]) AS asked (namespace, endpoint_key)
LEFT JOIN lane ON lane.namespace = asked.namespace AND lane.endpoint_key = asked.endpoint_key
LEFT JOIN LATERAL (
    SELECT created_at FROM lane_change WHERE lane_change.namespace = lane.namespace
        AND lane_change.endpoint_key = lane.endpoint_key AND change = 'opened'
        AND lane.probe_at IS NOT NULL
    ORDER BY created_at DESC LIMIT 1
) opened ON true
CROSS JOIN LATERAL (
    SELECT count(*)::int AS waiting FROM (
        SELECT FROM dispatch_lease WHERE node_id IS NULL
            AND dispatch_lease.namespace = asked.namespace
            AND dispatch_lease.endpoint_key = asked.endpoint_key
        LIMIT 1000) waiting
) depth
CROSS JOIN LATERAL (
    SELECT count(*)::int AS in_flight FROM (
        SELECT FROM dispatch_lease WHERE node_id IS NOT NULL
            AND dispatch_lease.namespace = asked.namespace
            AND dispatch_lease.endpoint_key = asked.endpoint_key
        LIMIT 1000) taken
) flying
CROSS JOIN LATERAL (
    SELECT min(class.due_at) AS due_at FROM (VALUES (false), (true)) AS kind (is_retry)
    CROSS JOIN LATERAL (
        SELECT due_at FROM dispatch_lease WHERE node_id IS NULL
            AND dispatch_lease.namespace = asked.namespace
            AND dispatch_lease.endpoint_key = asked.endpoint_key
            AND dispatch_lease.is_retry = kind.is_retry
        ORDER BY due_at LIMIT 1
    ) class
) first
CROSS JOIN LATERAL (
    SELECT COALESCE(sum(delivered), 0)::bigint AS delivered,
        COALESCE(sum(failed), 0)::bigint AS failed,
        COALESCE(sum(not_sent), 0)::bigint AS not_sent,
        COALESCE(sum(unknown), 0)::bigint AS unknown
    FROM lane_tally WHERE lane_tally.namespace = asked.namespace
        AND lane_tally.endpoint_key = asked.endpoint_key
) tally
ORDER BY asked.namespace, asked.endpoint_key;

-- name: held_lanes
-- Those of given lanes that their breaker holds: since when, and until the next probe. The
-- primary key and lane_change_newest serve it.
SELECT lane.endpoint_key, opened.created_at AS opened_at, lane.probe_at, lane.failures
FROM unnest(%(namespace)s::text[], %(endpoint_key)s::text[]) AS asked (namespace, endpoint_key)
JOIN lane ON lane.namespace = asked.namespace AND lane.endpoint_key = asked.endpoint_key
LEFT JOIN LATERAL (
    SELECT created_at FROM lane_change WHERE lane_change.namespace = lane.namespace
        AND lane_change.endpoint_key = lane.endpoint_key AND change = 'opened'
    ORDER BY created_at DESC LIMIT 1
) opened ON true
WHERE lane.probe_at IS NOT NULL;

-- name: lane_changes
-- What a lane's breaker did, the newest first. lane_change_newest serves it.
SELECT change, failures, window_attempts, window_failures, hold_seconds, node_id, created_at
FROM lane_change
WHERE namespace = %(namespace)s AND endpoint_key = %(endpoint_key)s
ORDER BY created_at DESC LIMIT %(count)s;

-- name: dispatch_load
-- What all nodes have to dispatch: lanes held, jobs that wait and attempts that are open, each
-- counted up to 10,000 by an index.
SELECT (SELECT count(probe_at) FROM (SELECT probe_at FROM lane LIMIT 10000) lanes)::int
        AS lanes_held,
    (SELECT count(*) FROM (SELECT FROM dispatch_lease WHERE node_id IS NULL
        ORDER BY namespace, endpoint_key LIMIT 10000) ready)::int AS waiting,
    (SELECT count(*) FROM (SELECT FROM dispatch_lease WHERE node_id IS NOT NULL
        ORDER BY namespace, endpoint_key LIMIT 10000) taken)::int AS in_flight;

-- name: in_flight
-- How many attempts are on the wire, in some namespaces or all, counted up to 10,000.
-- dispatch_lease_taken serves it.
SELECT count(*)::int AS attempts
FROM (
    SELECT FROM dispatch_lease WHERE %(namespaces)s::text[] IS NULL AND node_id IS NOT NULL
    UNION ALL
    SELECT FROM dispatch_lease
    WHERE namespace = ANY (%(namespaces)s::text[]) AND node_id IS NOT NULL
    LIMIT 10000
) taken;

-- name: unreadable_jobs
-- Of up to 100,000 jobs under way those whose snapshot is encrypted under none of the given keys,
-- by endpoint and key; the key's fingerprint is what a snapshot's id ends in. The primary keys
-- serve it.
SELECT lease.endpoint_key, split_part(job.snapshot_id, '.', 2) AS fingerprint,
    count(*)::int AS jobs
FROM (SELECT namespace, job_id, endpoint_key FROM dispatch_lease LIMIT 100000) lease
CROSS JOIN LATERAL (
    SELECT snapshot_id FROM dispatch_job
    WHERE dispatch_job.namespace = lease.namespace AND dispatch_job.job_id = lease.job_id OFFSET 0
) job
WHERE job.snapshot_id LIKE '%%.%%'
    AND split_part(job.snapshot_id, '.', 2) <> ALL (%(fingerprints)s::text[])
GROUP BY lease.endpoint_key, fingerprint ORDER BY lease.endpoint_key, fingerprint;

-- name: open_dead_letters
-- How many of the newest 5,000 dead letters, of all namespaces or of each that is asked for, nobody
-- has decided on. dead_letter_dispatch_newest and the primary keys serve it.
SELECT count(*)::int AS open FROM (
    (SELECT namespace, job_id FROM dead_letter_dispatch
    WHERE %(namespaces)s::text[] IS NULL ORDER BY job_id DESC LIMIT 5000)
    UNION ALL
    SELECT newest.* FROM unnest(%(namespaces)s::text[]) AS asked (namespace)
    CROSS JOIN LATERAL (
        SELECT namespace, job_id FROM dead_letter_dispatch letter
        WHERE letter.namespace = asked.namespace ORDER BY job_id DESC LIMIT 5000
    ) newest
) dead
WHERE NOT EXISTS (SELECT FROM dead_letter_decision decision
    WHERE decision.namespace = dead.namespace AND decision.job_id = dead.job_id);

-- name: failed_cycles
-- The failed ones among the newest 1,000 cycles of the last 24 hours, of all namespaces or of each
-- that is asked for: the newest five, and how many there are. cycle_run_newest and the primary
-- keys serve it.
SELECT recent.cycle_id AS cycle_run_id, recent.namespace,
    NULLIF(recent.run_profile_id, '') AS run_profile_id, failed.created_at AS failed_at,
    failed.reason, count(*) OVER ()::int AS failed
FROM (
    (SELECT namespace, cycle_id, run_profile_id FROM cycle_run
    WHERE %(namespaces)s::text[] IS NULL
        AND cycle_id >= orbit_first_id(orbit_now() - interval '24 hours')
    ORDER BY cycle_id DESC LIMIT 1000)
    UNION ALL
    SELECT newest.* FROM unnest(%(namespaces)s::text[]) AS asked (namespace)
    CROSS JOIN LATERAL (
        SELECT namespace, cycle_id, run_profile_id FROM cycle_run
        WHERE cycle_run.namespace = asked.namespace
            AND cycle_id >= orbit_first_id(orbit_now() - interval '24 hours')
        ORDER BY cycle_id DESC LIMIT 1000
    ) newest
) recent
CROSS JOIN LATERAL (
    SELECT created_at, detail ->> 'reason' AS reason FROM cycle_checkpoint checkpoint
    WHERE checkpoint.namespace = recent.namespace AND checkpoint.cycle_id = recent.cycle_id
        AND stage = 'cycle_failed'
    LIMIT 1
) failed
ORDER BY recent.cycle_id DESC LIMIT 5;

-- name: slots_not_fired
-- Which of the newest 1,000 slots, of all namespaces or of each that is asked for, did not fire.
-- schedule_slot_by_time and schedule_slot_of_namespace serve it.
SELECT namespace, NULLIF(run_profile_id, '') AS run_profile_id, slot_at, outcome, reason,
    cycle_id AS cycle_run_id, decided_at
FROM (
    (SELECT * FROM schedule_slot WHERE %(namespaces)s::text[] IS NULL
    ORDER BY slot_at DESC LIMIT 1000)
    UNION ALL
    SELECT newest.* FROM unnest(%(namespaces)s::text[]) AS asked (namespace)
    CROSS JOIN LATERAL (
        SELECT * FROM schedule_slot slot WHERE slot.namespace = asked.namespace
        ORDER BY slot_at DESC LIMIT 1000
    ) newest
) recent
WHERE outcome <> 'fired' ORDER BY slot_at DESC LIMIT 20;

-- name: store
-- What the database is: its version, its schema, and until when its partitions reach.
SELECT current_setting('server_version') AS server_version,
    (SELECT max(version_num) FROM alembic_version) AS schema_revision,
    (SELECT (to_date(max(right(child.relname, 8)), 'YYYYMMDD') + 7)::timestamp AT TIME ZONE 'UTC'
    FROM pg_inherits JOIN pg_class child ON child.oid = inhrelid
    WHERE inhparent = to_regclass('cycle_run')) AS partitions_until,
    (SELECT revision FROM config_active) AS revision,
    (SELECT COALESCE(declared_revision, revision) FROM config_active) AS declared_revision,
    orbit_now() AS now;

-- name: last_activation
-- When the configuration in force came into force, and why.
SELECT revision, reason, activated_at FROM config_activation
ORDER BY activation_id DESC LIMIT 1;

-- name: recent_cycles_of_run_profiles
-- The last cycle of each run profile among the newest 1,000 cycles of its namespace, however much
-- others run. The primary key serves it.
SELECT DISTINCT ON (namespace, run_profile_id) namespace, run_profile_id, cycle_id
FROM (SELECT DISTINCT unnest(%(namespace)s::text[]) AS namespace) asked
CROSS JOIN LATERAL (
    SELECT run_profile_id, cycle_id FROM cycle_run
    WHERE cycle_run.namespace = asked.namespace ORDER BY cycle_id DESC LIMIT 1000
) recent
WHERE run_profile_id <> '' ORDER BY namespace, run_profile_id, cycle_id DESC;

-- name: halted_namespaces
-- The namespaces that are halted, of some or all, with why. namespace_fence_halted and the primary
-- keys serve it.
SELECT status.namespace, status.epoch, status.halted_at, status.until_at, status.reason,
    status.actor, status.resume_asked_by
FROM (
    (SELECT namespace FROM namespace_fence WHERE %(namespaces)s::text[] IS NULL AND is_halted
    ORDER BY namespace LIMIT 200)
    UNION ALL
    (SELECT namespace FROM namespace_fence
    WHERE namespace = ANY (%(namespaces)s::text[]) AND is_halted
    ORDER BY namespace LIMIT 200)
) halted
JOIN namespace_status status ON status.namespace = halted.namespace
ORDER BY status.namespace;

-- name: namespace_state
-- One namespace, if it was ever halted.
SELECT namespace, state, epoch, halted_at, until_at, reason, actor, resume_asked_by,
    resume_asked_at, resumed_at
FROM namespace_status WHERE namespace = %(namespace)s;

-- name: namespace_halts
-- A namespace's halts before an epoch, newest first, each with how it ended.
SELECT halt.epoch, halt.created_at AS halted_at, halt.reason, halt.actor, halt.until_at,
    asked.actor AS resume_asked_by, resumed.created_at AS resumed_at, resumed.cause AS ended_by,
    resumed.actor AS resumed_by, resumed.reason AS resume_reason
FROM namespace_halt halt
LEFT JOIN namespace_resume asked ON asked.namespace = halt.namespace
    AND asked.epoch = halt.epoch AND asked.step = 'asked'
LEFT JOIN namespace_resume resumed ON resumed.namespace = halt.namespace
    AND resumed.epoch = halt.epoch AND resumed.step = 'resumed'
WHERE halt.namespace = %(namespace)s AND halt.epoch < %(before)s::bigint
ORDER BY halt.epoch DESC LIMIT %(count)s;
