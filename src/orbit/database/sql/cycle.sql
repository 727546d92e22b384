-- The life of a cycle: accepted, claimed, carried through its stages, ended.
--
-- Whoever works on a cycle holds its lease under a number. Every write of a stage joins the
-- lease by that number and node, after hold_cycles has locked it: a worker that lost its lease
-- changes nothing. Locks are taken in the order dispatch_lease, then cycle_lease by key.

-- name: share_configuration
-- Keeps the configuration from being replaced until this transaction ends. To be sent before,
-- and apart from, the statement that reads which revision is in force.
SELECT pg_advisory_xact_lock_shared(hashtext('orbit.configuration'));

-- name: accept_cycles
-- Accepts triggers: a cycle exists from here on, and will end. One whose initiation is known
-- already, or whose revision is not in force any more, is left out of the answer; so is one of a
-- halted namespace, but for its name. Keys go in in their order, since a session waits for
-- another that inserts the same one.
WITH request AS MATERIALIZED (
    SELECT request.*, EXISTS (SELECT FROM namespace_fence fence
        WHERE fence.namespace = request.namespace AND fence.is_halted) AS is_halted
    FROM unnest(
        %(namespace)s::text[], %(cycle_id)s::uuid[], %(profile_id)s::text[],
        %(run_profile_id)s::text[], %(trigger)s::text[], %(slot_at)s::timestamptz[],
        %(idempotency_key)s::text[], %(revision)s::text[], %(endpoint_keys)s::text[],
        %(value_tags)s::jsonb[], %(traceparent)s::text[], %(rerun_of)s::uuid[],
        %(hash)s::text[], %(context)s::text[], %(request_digest)s::text[],
        %(is_waiting)s::boolean[], %(asked_by)s::text[]
    ) WITH ORDINALITY AS request (
        namespace, cycle_id, profile_id, run_profile_id, trigger, slot_at, idempotency_key,
        revision, endpoint_keys, value_tags, traceparent, rerun_of, hash, context,
        request_digest, is_waiting, asked_by, place)
    WHERE request.revision IS NULL OR request.revision = (SELECT revision FROM config_active)
), fresh AS (
    INSERT INTO initiation_key (namespace, run_profile_id, hash, cycle_id, request_digest)
    SELECT namespace, run_profile_id, hash, cycle_id, request_digest FROM request
    WHERE NOT is_halted
    ORDER BY namespace, run_profile_id, hash, place
    ON CONFLICT DO NOTHING
    RETURNING namespace, cycle_id
), accepted AS MATERIALIZED (
    SELECT request.* FROM request JOIN fresh USING (namespace, cycle_id)
), runs AS (
    INSERT INTO cycle_run (namespace, cycle_id, profile_id, run_profile_id, trigger, slot_at,
        idempotency_key, revision, endpoint_keys, value_tags, traceparent, rerun_of, asked_by,
        node_id)
    SELECT namespace, cycle_id, profile_id, run_profile_id, trigger, slot_at, idempotency_key,
        revision, string_to_array(endpoint_keys, ','), value_tags, traceparent, rerun_of,
        asked_by, %(node_id)s::uuid
    FROM accepted
), initiations AS (
    INSERT INTO initiation (namespace, cycle_id, hash, context)
    SELECT namespace, cycle_id, hash, context FROM accepted
), leases AS (
    INSERT INTO cycle_lease (namespace, cycle_id, run_profile_id, due_at, is_waiting)
    SELECT namespace, cycle_id, run_profile_id,
        CASE WHEN is_waiting THEN 'infinity' ELSE orbit_now() END, is_waiting
    FROM accepted
), batch AS MATERIALIZED (
    SELECT orbit_new_batch() AS batch_id FROM accepted LIMIT 1
), told AS (
    INSERT INTO telemetry_event (namespace, batch_id, ordinal, event_type, profile_id,
        run_profile_id, run_id, metadata)
    SELECT namespace, batch_id, row_number() OVER (PARTITION BY namespace ORDER BY place),
        'execution_started', profile_id, run_profile_id, cycle_id,
        jsonb_build_object('trigger', trigger, 'revision', revision, 'rerunOf', rerun_of)
    FROM accepted CROSS JOIN batch
    RETURNING namespace, batch_id
), pending AS (
    INSERT INTO telemetry_pending (namespace, batch_id, events)
    SELECT namespace, batch_id, count(*) FROM told GROUP BY namespace, batch_id
)
SELECT cycle_id, false AS is_halted FROM accepted
UNION ALL SELECT cycle_id, true FROM request WHERE is_halted;

-- name: accept_checkpoints
-- The checkpoints that a cycle has from its acceptance: its start, and for a re-run the stages
-- copied from the failed cycle. Only for cycles that this transaction accepted.
INSERT INTO cycle_checkpoint (namespace, cycle_id, stage, digest, content_type, size, detail,
    lease_number, node_id)
SELECT done.namespace, done.cycle_id, done.stage, done.digest, done.content_type, done.size,
    done.detail, 0, %(node_id)s::uuid
FROM unnest(%(namespace)s::text[], %(cycle_id)s::uuid[], %(stage)s::text[], %(digest)s::text[],
    %(content_type)s::text[], %(size)s::int[], %(detail)s::jsonb[]
) AS done (namespace, cycle_id, stage, digest, content_type, size, detail)
JOIN cycle_lease lease USING (namespace, cycle_id)
WHERE lease.lease_number = 0
ON CONFLICT DO NOTHING;

-- name: accept_payloads
-- The payloads that those checkpoints name.
INSERT INTO payload (namespace, cycle_id, digest, content)
SELECT DISTINCT ON (given.namespace, given.cycle_id, given.digest)
    given.namespace, given.cycle_id, given.digest, given.content
FROM unnest(%(namespace)s::text[], %(cycle_id)s::uuid[], %(digest)s::text[],
    %(content)b::bytea[]) AS given (namespace, cycle_id, digest, content)
JOIN cycle_lease lease USING (namespace, cycle_id)
WHERE lease.lease_number = 0
ON CONFLICT DO NOTHING;

-- name: first_cycle
-- Which cycle an initiation belongs to.
SELECT cycle_id, request_digest FROM initiation_key
WHERE namespace = %(namespace)s AND run_profile_id = %(run_profile_id)s AND hash = %(hash)s;

-- name: active_revision
-- Which configuration is in force.
SELECT revision FROM config_active;

-- name: share_fences
-- Takes the fences of the namespaces with due cycles, those that wait longest, in key order; for
-- claim_cycles, which reads the flags after it and keeps to these. No statement of the
-- transaction then waits long for a lock, since halts wait for who holds a fence. A drill's namespace is taken by
-- the drill that asks for it only. cycle_lease_due serves the loose scan over namespaces.
WITH RECURSIVE namespaces AS (
    (SELECT namespace FROM cycle_lease WHERE due_at < 'infinity' ORDER BY namespace LIMIT 1)
    UNION ALL
    SELECT next.namespace FROM namespaces CROSS JOIN LATERAL (
        SELECT namespace FROM cycle_lease
        WHERE cycle_lease.namespace > namespaces.namespace AND due_at < 'infinity'
        ORDER BY namespace LIMIT 1
    ) next
), busy AS MATERIALIZED (
    SELECT namespaces.namespace, first.due_at FROM namespaces CROSS JOIN LATERAL (
        SELECT due_at FROM cycle_lease
        WHERE cycle_lease.namespace = namespaces.namespace AND due_at <= orbit_now()
            AND due_at < 'infinity'
        ORDER BY due_at LIMIT 1
    ) first
    WHERE NOT EXISTS (SELECT FROM namespace_fence fence
            WHERE fence.namespace = namespaces.namespace AND fence.is_halted)
        AND CASE WHEN %(only)s::text IS NOT NULL THEN namespaces.namespace = %(only)s::text
            ELSE NOT starts_with(namespaces.namespace, %(drills)s::text) END
    ORDER BY first.due_at LIMIT LEAST(%(room)s, %(most)s)
), bounded AS MATERIALIZED (
    SELECT set_config('lock_timeout', '450ms', true) AS bound
), fenced AS MATERIALIZED (
    SELECT namespace, pg_advisory_xact_lock_shared(orbit_fence_key(namespace)) AS taken
    FROM (SELECT namespace, bound FROM busy CROSS JOIN bounded
        ORDER BY namespace OFFSET 0) ordered
)
SELECT set_config('orbit.fenced', COALESCE(array_agg(namespace)::text, '{}'), true)
FROM fenced WHERE taken IS NOT NULL;

-- name: claim_cycles
-- Takes due cycles of the fenced namespaces that are not halted, the longest due of each first,
-- an equal share for each. To follow share_fences in its transaction. cycle_lease_due serves it.
WITH busy AS MATERIALIZED (
    SELECT namespace
    FROM unnest(current_setting('orbit.fenced', true)::text[]) AS fenced (namespace)
    WHERE NOT EXISTS (SELECT FROM namespace_fence fence
        WHERE fence.namespace = fenced.namespace AND fence.is_halted)
), due AS MATERIALIZED (
    SELECT lease.* FROM busy CROSS JOIN LATERAL (
        SELECT namespace, cycle_id, due_at, node_id FROM cycle_lease
        WHERE cycle_lease.namespace = busy.namespace AND due_at <= orbit_now()
            AND due_at < 'infinity'
        ORDER BY due_at
        LIMIT GREATEST(1, %(room)s::int / (SELECT count(*) FROM busy))
        FOR UPDATE SKIP LOCKED
    ) lease
    ORDER BY lease.due_at LIMIT %(room)s
), claimed AS (
    UPDATE cycle_lease SET
        due_at = orbit_now() + %(lease_seconds)s * interval '1 second',
        lease_number = cycle_lease.lease_number + 1,
        recoveries = cycle_lease.recoveries + (cycle_lease.node_id IS NOT NULL)::int,
        node_id = %(node_id)s::uuid
    FROM due WHERE cycle_lease.namespace = due.namespace AND cycle_lease.cycle_id = due.cycle_id
    RETURNING cycle_lease.namespace, cycle_lease.cycle_id, cycle_lease.lease_number,
        cycle_lease.recoveries, cycle_lease.last_error, due.node_id IS NOT NULL AS is_taken_over
)
SELECT * FROM claimed;

-- name: claimed_cycles
-- What is known of cycles, with their last checkpoints; OFFSET 0 keeps the look-ups what they
-- are, one by its whole key for each cycle. To follow the transaction of claim_cycles: a statement
-- that locks a lease may have begun before the last owner's commit, and would not see the
-- checkpoint; after it only who has the lease writes one.
SELECT run.namespace, run.cycle_id, run.profile_id, run.run_profile_id, run.slot_at,
    run.idempotency_key, run.revision, run.endpoint_keys, run.traceparent, initiation.context,
    last.stage, last.digest, last.content_type, last.size, payload.content
FROM unnest(%(namespace)s::text[], %(cycle_id)s::uuid[]) AS claimed (namespace, cycle_id)
CROSS JOIN LATERAL (
    SELECT * FROM cycle_run
    WHERE cycle_run.namespace = claimed.namespace AND cycle_run.cycle_id = claimed.cycle_id
        AND cycle_run.cycle_id BETWEEN %(first)s::uuid AND %(last)s::uuid
    OFFSET 0
) run
CROSS JOIN LATERAL (
    SELECT context FROM initiation
    WHERE initiation.namespace = claimed.namespace AND initiation.cycle_id = claimed.cycle_id
        AND initiation.cycle_id BETWEEN %(first)s::uuid AND %(last)s::uuid
    OFFSET 0
) initiation
LEFT JOIN LATERAL (
    SELECT stage, digest, content_type, size FROM cycle_checkpoint checkpoint
    WHERE checkpoint.namespace = claimed.namespace AND checkpoint.cycle_id = claimed.cycle_id
        AND checkpoint.cycle_id BETWEEN %(first)s::uuid AND %(last)s::uuid
    ORDER BY orbit_stage_number(stage) DESC LIMIT 1
) last ON true
LEFT JOIN LATERAL (
    SELECT content FROM payload
    WHERE payload.namespace = claimed.namespace AND payload.cycle_id = claimed.cycle_id
        AND payload.digest = last.digest AND last.size <= %(inline_bytes)s
        AND payload.cycle_id BETWEEN %(first)s::uuid AND %(last)s::uuid
    OFFSET 0
) payload ON true;

-- name: payload_content
-- The bytes under a digest.
SELECT content FROM payload
WHERE namespace = %(namespace)s AND cycle_id = %(cycle_id)s AND digest = %(digest)s;

-- name: renew_cycles
-- The heartbeat: prolongs the leases still held, and says which those are. Locks in key order,
-- as the batches of stages do that it may meet.
WITH mine AS MATERIALIZED (
    SELECT lease.namespace, lease.cycle_id FROM cycle_lease lease
    JOIN unnest(%(namespace)s::text[], %(cycle_id)s::uuid[], %(lease_number)s::int[])
        AS held (namespace, cycle_id, lease_number)
        ON lease.namespace = held.namespace AND lease.cycle_id = held.cycle_id
        AND lease.lease_number = held.lease_number
    WHERE lease.node_id = %(node_id)s
    ORDER BY lease.namespace, lease.cycle_id
    FOR NO KEY UPDATE OF lease
)
UPDATE cycle_lease SET due_at = orbit_now() + %(lease_seconds)s * interval '1 second'
FROM mine
WHERE cycle_lease.namespace = mine.namespace AND cycle_lease.cycle_id = mine.cycle_id
RETURNING cycle_lease.cycle_id;

-- name: release_cycles
-- Gives leases back, so that any node may go on after the delay; with the error that stopped it
-- that counts as a recovery. Locks in key order.
WITH mine AS MATERIALIZED (
    SELECT lease.namespace, lease.cycle_id FROM cycle_lease lease
    JOIN unnest(%(namespace)s::text[], %(cycle_id)s::uuid[], %(lease_number)s::int[])
        AS held (namespace, cycle_id, lease_number)
        ON lease.namespace = held.namespace AND lease.cycle_id = held.cycle_id
        AND lease.lease_number = held.lease_number
    WHERE lease.node_id = %(node_id)s
    ORDER BY lease.namespace, lease.cycle_id
    FOR NO KEY UPDATE OF lease
)
UPDATE cycle_lease SET due_at = orbit_now() + %(delay_seconds)s * interval '1 second',
    node_id = NULL, recoveries = recoveries + (%(error)s::text IS NOT NULL)::int,
    last_error = COALESCE(%(error)s::text, last_error)
FROM mine
WHERE cycle_lease.namespace = mine.namespace AND cycle_lease.cycle_id = mine.cycle_id;

-- name: hold_cycles
-- Locks the leases of a batch of stages in key order, and says which are still ours. Nothing
-- that is written in this transaction can then be another owner's.
SELECT lease.cycle_id, lease.lease_number FROM cycle_lease lease
JOIN unnest(%(namespace)s::text[], %(cycle_id)s::uuid[], %(lease_number)s::int[])
    AS held (namespace, cycle_id, lease_number)
    ON lease.namespace = held.namespace AND lease.cycle_id = held.cycle_id
    AND lease.lease_number = held.lease_number
WHERE lease.node_id = %(node_id)s
ORDER BY lease.namespace, lease.cycle_id
FOR NO KEY UPDATE OF lease;

-- name: written_before
-- Which stages these very leases have checkpointed already.
SELECT done.cycle_id, done.lease_number FROM cycle_checkpoint done
JOIN unnest(%(namespace)s::text[], %(cycle_id)s::uuid[], %(lease_number)s::int[],
    %(stage)s::text[]) AS last (namespace, cycle_id, lease_number, stage)
    USING (namespace, cycle_id, lease_number, stage)
WHERE done.node_id = %(node_id)s;

-- name: insert_payloads
-- The outputs of stages; bytes that the cycle has already stay as they are.
INSERT INTO payload (namespace, cycle_id, digest, content)
SELECT output.namespace, output.cycle_id, output.digest, output.content
FROM unnest(%(namespace)s::text[], %(cycle_id)s::uuid[], %(lease_number)s::int[],
    %(digest)s::text[], %(content)b::bytea[])
    AS output (namespace, cycle_id, lease_number, digest, content)
JOIN cycle_lease lease USING (namespace, cycle_id, lease_number)
WHERE lease.node_id = %(node_id)s
ON CONFLICT DO NOTHING;

-- name: insert_checkpoints
-- Marks stages as done, and tells of them; of the last ones, what ends the cycle tells.
WITH done AS MATERIALIZED (
    SELECT * FROM unnest(%(namespace)s::text[], %(cycle_id)s::uuid[], %(lease_number)s::int[],
        %(stage)s::text[], %(digest)s::text[], %(content_type)s::text[], %(size)s::int[],
        %(detail)s::jsonb[], %(profile_id)s::text[], %(run_profile_id)s::text[])
        AS done (namespace, cycle_id, lease_number, stage, digest, content_type, size, detail,
            profile_id, run_profile_id)
), written AS (
    INSERT INTO cycle_checkpoint (namespace, cycle_id, stage, digest, content_type, size, detail,
        lease_number, node_id)
    SELECT done.namespace, done.cycle_id, done.stage, done.digest, done.content_type, done.size,
        done.detail, done.lease_number, lease.node_id
    FROM done JOIN cycle_lease lease USING (namespace, cycle_id, lease_number)
    WHERE lease.node_id = %(node_id)s
    ON CONFLICT DO NOTHING
    RETURNING namespace, cycle_id, stage
), batch AS MATERIALIZED (
    SELECT orbit_new_batch() AS batch_id
), told AS (
    INSERT INTO telemetry_event (namespace, batch_id, ordinal, event_type, profile_id,
        run_profile_id, run_id, metadata)
    SELECT namespace, batch_id, row_number() OVER (PARTITION BY namespace
            ORDER BY cycle_id, orbit_stage_number(stage)),
        'stage_completed', profile_id, run_profile_id, cycle_id,
        jsonb_build_object('stage', stage, 'size', size)
    FROM done CROSS JOIN batch
    WHERE stage NOT IN ('cycle_finished', 'cycle_failed') AND ((namespace, cycle_id, stage)
        IN (SELECT namespace, cycle_id, stage FROM written)) IS TRUE
    RETURNING namespace, batch_id
)
INSERT INTO telemetry_pending (namespace, batch_id, events)
SELECT namespace, batch_id, count(*) FROM told GROUP BY namespace, batch_id;

-- name: insert_records
-- What each call of a step took and came to.
INSERT INTO execution_record (namespace, cycle_id, stage, step, lease_number, attempt, name,
    outcome, error, duration_seconds, input_size, output_size, node_id)
SELECT call.namespace, call.cycle_id, call.stage, call.step, call.lease_number, call.attempt,
    call.name, call.outcome, call.error, call.duration_seconds, call.input_size,
    call.output_size, lease.node_id
FROM unnest(%(namespace)s::text[], %(cycle_id)s::uuid[], %(lease_number)s::int[],
    %(stage)s::text[], %(step)s::int[], %(attempt)s::int[], %(name)s::text[],
    %(outcome)s::text[], %(error)s::text[], %(duration_seconds)s::double precision[],
    %(input_size)s::int[], %(output_size)s::int[])
    AS call (namespace, cycle_id, lease_number, stage, step, attempt, name, outcome, error,
        duration_seconds, input_size, output_size)
JOIN cycle_lease lease USING (namespace, cycle_id, lease_number)
WHERE lease.node_id = %(node_id)s
ON CONFLICT DO NOTHING;

-- name: insert_items
-- The normalised items of cycles.
INSERT INTO normalized_item (namespace, cycle_id, item_index, digest, content_type, size)
SELECT item.namespace, item.cycle_id, item.item_index, item.digest, item.content_type, item.size
FROM unnest(%(namespace)s::text[], %(cycle_id)s::uuid[], %(lease_number)s::int[],
    %(item_index)s::int[], %(digest)s::text[], %(content_type)s::text[], %(size)s::int[])
    AS item (namespace, cycle_id, lease_number, item_index, digest, content_type, size)
JOIN cycle_lease lease USING (namespace, cycle_id, lease_number)
WHERE lease.node_id = %(node_id)s
ON CONFLICT DO NOTHING;

-- name: insert_jobs
-- Queues one job per item and endpoint, ready to be claimed. A job that exists is left alone,
-- and its lease too, so that a repeated batch cannot send it again.
WITH job AS (
    INSERT INTO dispatch_job (namespace, job_id, cycle_id, item_index, endpoint_key,
        snapshot_id, digest, content_type, size, max_attempts)
    SELECT job.namespace, job.job_id, job.cycle_id, job.item_index, job.endpoint_key,
        job.snapshot_id, job.digest, job.content_type, job.size, job.max_attempts
    FROM unnest(%(namespace)s::text[], %(cycle_id)s::uuid[], %(lease_number)s::int[],
        %(job_id)s::uuid[], %(item_index)s::int[], %(endpoint_key)s::text[],
        %(snapshot_id)s::text[], %(digest)s::text[], %(content_type)s::text[], %(size)s::int[],
        %(max_attempts)s::int[])
        AS job (namespace, cycle_id, lease_number, job_id, item_index, endpoint_key,
            snapshot_id, digest, content_type, size, max_attempts)
    JOIN cycle_lease lease USING (namespace, cycle_id, lease_number)
    WHERE lease.node_id = %(node_id)s
    ON CONFLICT DO NOTHING
    RETURNING namespace, job_id, endpoint_key, cycle_id
)
INSERT INTO dispatch_lease (namespace, job_id, endpoint_key, cycle_id, due_at)
SELECT namespace, job_id, endpoint_key, cycle_id, orbit_now() FROM job;

-- name: note_progress
-- A cycle that moved on after a takeover has its count of takeovers begin anew.
UPDATE cycle_lease SET recoveries = 0, last_error = NULL
FROM unnest(%(namespace)s::text[], %(cycle_id)s::uuid[], %(lease_number)s::int[])
    AS held (namespace, cycle_id, lease_number)
WHERE cycle_lease.namespace = held.namespace AND cycle_lease.cycle_id = held.cycle_id
    AND cycle_lease.lease_number = held.lease_number AND cycle_lease.node_id = %(node_id)s;

-- name: await_dispatch
-- The cycle's jobs are out: nobody need hold it until the last of them is done.
UPDATE cycle_lease SET items = sent.items, jobs = sent.jobs, outstanding = sent.jobs,
    due_at = 'infinity', node_id = NULL
FROM unnest(%(namespace)s::text[], %(cycle_id)s::uuid[], %(lease_number)s::int[],
    %(items)s::int[], %(jobs)s::int[]) AS sent (namespace, cycle_id, lease_number, items, jobs)
WHERE cycle_lease.namespace = sent.namespace AND cycle_lease.cycle_id = sent.cycle_id
    AND cycle_lease.lease_number = sent.lease_number AND cycle_lease.node_id = %(node_id)s;

-- name: end_cycles
-- Ends cycles that failed, or that have no job: writes the value ledger, gives up the lease. Of the
-- namespace's last halt (its primary key serves it) they tell whether it was over when they began.
WITH ended AS (
    DELETE FROM cycle_lease USING unnest(%(namespace)s::text[], %(cycle_id)s::uuid[],
        %(lease_number)s::int[], %(state)s::text[], %(items)s::int[])
        AS ending (namespace, cycle_id, lease_number, state, items)
    WHERE cycle_lease.namespace = ending.namespace AND cycle_lease.cycle_id = ending.cycle_id
        AND cycle_lease.lease_number = ending.lease_number
        AND cycle_lease.node_id = %(node_id)s
    RETURNING cycle_lease.namespace, cycle_lease.cycle_id, ending.state, ending.items
), run AS MATERIALIZED (
    SELECT ended.namespace, ended.cycle_id, ended.state, ended.items, run.profile_id,
        run.run_profile_id, run.value_tags, run.revision,
        extract(epoch FROM orbit_now() - run.created_at)::float8 AS wall_seconds,
        EXISTS (SELECT FROM (SELECT epoch FROM namespace_halt halt
                WHERE halt.namespace = ended.namespace ORDER BY epoch DESC LIMIT 1) last
            WHERE NOT EXISTS (SELECT FROM namespace_resume resumed
                WHERE resumed.namespace = ended.namespace AND resumed.epoch = last.epoch
                    AND step = 'resumed' AND resumed.created_at <= run.created_at)) AS was_halted
    FROM ended CROSS JOIN LATERAL (
        SELECT * FROM cycle_run run
        WHERE run.namespace = ended.namespace AND run.cycle_id = ended.cycle_id OFFSET 0
    ) run
), batch AS MATERIALIZED (
    SELECT orbit_new_batch() AS batch_id FROM run LIMIT 1
), told AS (
    INSERT INTO telemetry_event (namespace, batch_id, ordinal, event_type, profile_id,
        run_profile_id, run_id, metadata)
    SELECT namespace, batch_id, row_number() OVER (PARTITION BY namespace ORDER BY cycle_id),
        'execution_' || state, profile_id, run_profile_id, cycle_id,
        jsonb_build_object('items', items, 'jobs', 0, 'delivered', 0, 'dead', 0, 'attempts', 0,
            'unknown', 0, 'bytes', 0, 'durationSeconds', wall_seconds, 'halted', was_halted,
            'revision', revision)
    FROM run CROSS JOIN batch
    RETURNING namespace, batch_id
), pending AS (
    INSERT INTO telemetry_pending (namespace, batch_id, events)
    SELECT namespace, batch_id, count(*) FROM told GROUP BY namespace, batch_id
)
INSERT INTO value_ledger_entry (namespace, cycle_id, profile_id, run_profile_id, state, tags,
    items, jobs, delivered, dead_lettered, attempts, bytes, wall_seconds)
SELECT namespace, cycle_id, profile_id, run_profile_id, state, value_tags, items, 0, 0, 0, 0, 0,
    wall_seconds
FROM run WHERE profile_id IS NOT NULL
ON CONFLICT DO NOTHING;

-- name: end_dispatched
-- Ends the cycles among those given whose last job is done, and tells of a halt as end_cycles does.
-- To follow dispatch.settle_jobs in the same transaction, which holds their leases.
WITH ended AS (
    DELETE FROM cycle_lease USING unnest(%(namespace)s::text[], %(cycle_id)s::uuid[])
        AS touched (namespace, cycle_id)
    WHERE cycle_lease.namespace = touched.namespace AND cycle_lease.cycle_id = touched.cycle_id
        AND cycle_lease.outstanding = 0
    RETURNING cycle_lease.*
), checkpoints AS (
    INSERT INTO cycle_checkpoint (namespace, cycle_id, stage, detail, lease_number, node_id)
    SELECT ended.namespace, ended.cycle_id, stage, jsonb_build_object('items', ended.items,
        'jobs', ended.jobs, 'delivered', ended.delivered, 'deadLettered', ended.dead_lettered,
        'attempts', ended.attempts, 'bytes', ended.bytes), ended.lease_number, %(node_id)s::uuid
    FROM ended CROSS JOIN (VALUES ('dispatch_complete'), ('cycle_finished')) AS last (stage)
    ON CONFLICT DO NOTHING
), run AS MATERIALIZED (
    SELECT ended.*, run.profile_id, run.value_tags, run.revision,
        extract(epoch FROM orbit_now() - run.created_at)::float8 AS wall_seconds,
        EXISTS (SELECT FROM (SELECT epoch FROM namespace_halt halt
                WHERE halt.namespace = ended.namespace ORDER BY epoch DESC LIMIT 1) last
            WHERE NOT EXISTS (SELECT FROM namespace_resume resumed
                WHERE resumed.namespace = ended.namespace AND resumed.epoch = last.epoch
                    AND step = 'resumed' AND resumed.created_at <= run.created_at)) AS was_halted
    FROM ended CROSS JOIN LATERAL (
        SELECT * FROM cycle_run run
        WHERE run.namespace = ended.namespace AND run.cycle_id = ended.cycle_id
            AND run.cycle_id BETWEEN %(first)s::uuid AND %(last)s::uuid OFFSET 0
    ) run
), ledger AS (
    INSERT INTO value_ledger_entry (namespace, cycle_id, profile_id, run_profile_id, state,
        tags, items, jobs, delivered, dead_lettered, attempts, bytes, wall_seconds)
    SELECT namespace, cycle_id, profile_id, run_profile_id, 'finished', value_tags, items, jobs,
        delivered, dead_lettered, attempts, bytes, wall_seconds
    FROM run WHERE profile_id IS NOT NULL
    ON CONFLICT DO NOTHING
), batch AS MATERIALIZED (
    SELECT orbit_new_batch() AS batch_id FROM run LIMIT 1
), told AS (
    INSERT INTO telemetry_event (namespace, batch_id, ordinal, event_type, profile_id,
        run_profile_id, run_id, metadata)
    SELECT namespace, batch_id, row_number() OVER (PARTITION BY namespace ORDER BY cycle_id),
        'execution_finished', profile_id, run_profile_id, cycle_id,
        jsonb_build_object('items', items, 'jobs', jobs, 'delivered', delivered,
            'dead', dead_lettered, 'attempts', attempts, 'unknown', unknown, 'bytes', bytes,
            'durationSeconds', wall_seconds, 'halted', was_halted, 'revision', revision)
    FROM run CROSS JOIN batch
    RETURNING namespace, batch_id
), pending AS (
    INSERT INTO telemetry_pending (namespace, batch_id, events)
    SELECT namespace, batch_id, count(*) FROM told GROUP BY namespace, batch_id
)
SELECT namespace, cycle_id FROM ended;

-- name: release_waiting
-- Lets the oldest waiting cycle of each run profile begin, once no other of it is active. A
-- loose scan of cycle_lease_waiting over run profiles: nothing is read while nobody waits.
WITH RECURSIVE waiting AS (
    (SELECT namespace, run_profile_id, cycle_id FROM cycle_lease WHERE is_waiting
    ORDER BY namespace, run_profile_id, cycle_id LIMIT 1)
    UNION ALL
    SELECT next.* FROM waiting CROSS JOIN LATERAL (
        SELECT namespace, run_profile_id, cycle_id FROM cycle_lease
        WHERE is_waiting AND (cycle_lease.namespace, cycle_lease.run_profile_id)
            > (waiting.namespace, waiting.run_profile_id)
        ORDER BY namespace, run_profile_id, cycle_id LIMIT 1
    ) next
), next AS MATERIALIZED (
    SELECT waiting.namespace, waiting.cycle_id FROM waiting LEFT JOIN LATERAL (
        SELECT true AS is_active FROM cycle_lease
        WHERE cycle_lease.namespace = waiting.namespace
            AND cycle_lease.run_profile_id = waiting.run_profile_id AND NOT is_waiting
        LIMIT 1
    ) active ON true
    WHERE active.is_active IS NULL
)
UPDATE cycle_lease SET is_waiting = false, due_at = orbit_now() FROM next
WHERE cycle_lease.namespace = next.namespace AND cycle_lease.cycle_id = next.cycle_id
    AND cycle_lease.is_waiting;
