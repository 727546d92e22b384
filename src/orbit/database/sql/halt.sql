-- The halt of a namespace: its fence, what is in flight behind it, and its end.
--
-- Whoever changes a fence locks its row first; facts and the audit entry follow. Claims take the
-- fence's advisory lock shared (dispatch.share_fences, cycle.share_fences) and read the flag in a
-- later statement. Who has that lock alone, or waits to, has no other.

-- name: raise_fence
-- Halts a namespace under the next epoch. A halt that nobody has ended is not shortened by
-- another: it lasts until the later of both, or until a person resumes.
INSERT INTO namespace_fence AS fence (namespace, epoch, is_halted, until_at)
VALUES (%(namespace)s, 1 + COALESCE((SELECT max(halt.epoch) FROM namespace_halt halt
    WHERE halt.namespace = %(namespace)s), 0), true, %(until)s::timestamptz)
ON CONFLICT (namespace) DO UPDATE SET epoch = fence.epoch + 1, is_halted = true,
    until_at = CASE WHEN NOT fence.is_halted THEN EXCLUDED.until_at
        WHEN fence.until_at IS NULL OR EXCLUDED.until_at IS NULL THEN NULL
        ELSE GREATEST(fence.until_at, EXCLUDED.until_at) END
RETURNING epoch, until_at, orbit_now() AS now;

-- name: insert_halt
-- Who halted a namespace, and why.
INSERT INTO namespace_halt (namespace, epoch, reason, actor, actor_id, until_at, node_id)
VALUES (%(namespace)s, %(epoch)s, %(reason)s::text, %(actor)s, %(actor_id)s,
    %(until)s::timestamptz, %(node_id)s::uuid);

-- name: bound_session
-- Nor do later statements of this session wait longer for a lock: a rebuilding of leases, say.
SELECT set_config('lock_timeout', '1s', false);

-- name: bound_pass
-- No statement of this transaction waits longer than this for a lock.
SELECT set_config('lock_timeout', %(milliseconds)s::int::text, true);

-- name: pass_fence
-- Has a namespace's fence to itself for a moment: no claim that began before is under way. Others
-- that ask for it wait behind; so to follow bound_pass, in a transaction of its own.
SELECT pg_advisory_xact_lock(orbit_fence_key(%(namespace)s));

-- name: is_known
-- Whether anything is of a namespace: a run profile of the configuration in force, a schedule, or a
-- cycle of any time. The configuration is canonical JSON, and looked at as a text: not all that it
-- may hold becomes a jsonb, and a halt does not fail for it. The primary keys serve it.
SELECT EXISTS (SELECT FROM config_active JOIN config_revision USING (revision)
        WHERE strpos(body, '"namespace":"' || %(namespace)s || '"') > 0)
    OR EXISTS (SELECT FROM schedule WHERE namespace = %(namespace)s)
    OR EXISTS (SELECT FROM cycle_run WHERE namespace = %(namespace)s) AS is_known;

-- name: attempts_in_flight
-- The open attempts of a namespace, on whichever node. dispatch_lease_taken serves it.
SELECT job_id::text, cycle_id::text, endpoint_key, node_id::text, lease_number, attempt
FROM dispatch_lease
WHERE namespace = %(namespace)s AND node_id IS NOT NULL
ORDER BY endpoint_key, due_at;

-- name: cycles_in_flight
-- The cycles of a namespace that a node carries on. cycle_lease_due serves it.
SELECT cycle_id::text, node_id::text, lease_number FROM cycle_lease
WHERE namespace = %(namespace)s AND due_at < 'infinity' AND node_id IS NOT NULL
ORDER BY due_at;

-- name: still_in_flight
-- What of a namespace is still out, and whether it is halted without a break since this epoch.
-- dispatch_lease_taken and cycle_lease_due serve it.
SELECT EXISTS (SELECT FROM namespace_fence
        WHERE namespace = %(namespace)s AND epoch >= %(epoch)s AND is_halted)
    AND NOT EXISTS (SELECT FROM namespace_resume WHERE namespace = %(namespace)s
        AND epoch >= %(epoch)s AND step = 'resumed') AS is_in_force,
    ARRAY(SELECT job_id || ' ' || lease_number FROM dispatch_lease
        WHERE namespace = %(namespace)s AND node_id IS NOT NULL) AS attempts,
    ARRAY(SELECT cycle_id || ' ' || lease_number FROM cycle_lease
        WHERE namespace = %(namespace)s AND due_at < 'infinity' AND node_id IS NOT NULL) AS cycles,
    EXISTS (SELECT FROM dispatch_lease WHERE namespace = %(namespace)s
        AND node_id IS NOT NULL AND due_at <= orbit_now()) AS has_expired;

-- name: outcomes
-- What became of attempts, by their receipts.
SELECT receipt.job_id::text, receipt.attempt, receipt.outcome
FROM unnest(%(namespace)s::text[], %(job_id)s::uuid[], %(attempt)s::int[])
    AS asked (namespace, job_id, attempt)
CROSS JOIN LATERAL (
    SELECT job_id, attempt, outcome FROM delivery_receipt
    WHERE delivery_receipt.namespace = asked.namespace
        AND delivery_receipt.job_id = asked.job_id AND delivery_receipt.attempt = asked.attempt
    OFFSET 0
) receipt;

-- name: free_expired_cycles
-- Takes the leases of a namespace's cycles from workers that let them run out, so that no late
-- heartbeat prolongs them. Rows that are locked are being worked on. cycle_lease_due serves it.
WITH expired AS MATERIALIZED (
    SELECT namespace, cycle_id FROM cycle_lease
    WHERE namespace = %(namespace)s AND due_at <= orbit_now() AND node_id IS NOT NULL
    ORDER BY cycle_id FOR UPDATE SKIP LOCKED
)
UPDATE cycle_lease SET node_id = NULL, lease_number = lease_number + 1,
    recoveries = recoveries + 1, due_at = orbit_now()
FROM expired
WHERE cycle_lease.namespace = expired.namespace AND cycle_lease.cycle_id = expired.cycle_id;

-- name: bound_locks
-- No statement of this transaction waits longer than this for a row that another holds.
SELECT set_config('lock_timeout', '2s', true);

-- name: bound_brief
-- The same for who has others to see to.
SELECT set_config('lock_timeout', '250ms', true);

-- name: hold_fence
-- Locks a namespace's fence.
SELECT epoch, is_halted, until_at, COALESCE(until_at <= orbit_now(), false) AS is_over
FROM namespace_fence WHERE namespace = %(namespace)s FOR UPDATE;

-- name: last_halt
-- Who halted a namespace under an epoch.
SELECT actor, actor_id, reason FROM namespace_halt
WHERE namespace = %(namespace)s AND epoch = %(epoch)s;

-- name: asked_resume
-- Who asked to end the halt of an epoch, waiting for a second person.
SELECT actor, actor_id, reason FROM namespace_resume
WHERE namespace = %(namespace)s AND epoch = %(epoch)s AND step = 'asked';

-- name: insert_resume
-- A halt's end was asked for, or done.
INSERT INTO namespace_resume (namespace, epoch, step, cause, reason, actor, actor_id, node_id)
VALUES (%(namespace)s, %(epoch)s, %(step)s, %(cause)s, %(reason)s, %(actor)s, %(actor_id)s,
    %(node_id)s::uuid);

-- name: lower_fence
-- Lets a namespace go on. To follow hold_fence.
UPDATE namespace_fence SET is_halted = false, until_at = NULL WHERE namespace = %(namespace)s;

-- name: halted
-- Every halted namespace. namespace_fence_halted serves it.
SELECT namespace, epoch, COALESCE(until_at <= orbit_now(), false) AS is_over
FROM namespace_fence WHERE is_halted ORDER BY namespace;

-- name: halted_among
-- Which of some namespaces are halted.
SELECT namespace FROM namespace_fence
WHERE namespace = ANY (%(namespaces)s::text[]) AND is_halted;

-- name: halts_since
-- The halts of some namespaces that had not ended at a time: from when to when each lasted.
SELECT halt.namespace, halt.epoch, halt.created_at AS halted_at, last.ended_at,
    fence.is_halted AND fence.epoch = halt.epoch AS is_in_force
FROM namespace_halt halt
JOIN namespace_fence fence ON fence.namespace = halt.namespace
CROSS JOIN LATERAL (
    SELECT COALESCE((SELECT created_at FROM namespace_resume resumed
            WHERE resumed.namespace = halt.namespace AND resumed.epoch = halt.epoch
                AND resumed.step = 'resumed'),
        (SELECT created_at FROM namespace_halt following
            WHERE following.namespace = halt.namespace
                AND following.epoch = halt.epoch + 1)) AS ended_at
) last
WHERE halt.namespace = ANY (%(namespaces)s::text[])
    AND (last.ended_at IS NULL OR last.ended_at > %(since)s::timestamptz)
ORDER BY halt.namespace, halt.epoch DESC;

-- name: settings
-- What is in force for a namespace: the newest of its own, and the newest of all ("*").
SELECT DISTINCT ON (namespace) value, version, namespace FROM governance_setting
WHERE namespace IN (%(namespace)s, '*') AND setting = %(setting)s
ORDER BY namespace, version DESC;

-- name: hold_settings
-- One transaction at a time changes settings.
SELECT pg_advisory_xact_lock(hashtext('orbit.settings'));

-- name: hold_halted
-- A halted namespace that a setting is of, locked; of all namespaces if it is that of all.
SELECT namespace FROM namespace_fence
WHERE is_halted AND (namespace = %(namespace)s OR %(namespace)s = '*')
ORDER BY namespace LIMIT 1 FOR UPDATE;

-- name: insert_setting
-- The next version of a setting. To follow hold_settings.
INSERT INTO governance_setting (namespace, setting, version, value, reason, actor, actor_id,
    node_id)
SELECT %(namespace)s, %(setting)s, COALESCE(max(version), 0) + 1, %(value)s::jsonb, %(reason)s,
    %(actor)s, %(actor_id)s, %(node_id)s::uuid
FROM governance_setting WHERE namespace = %(namespace)s AND setting = %(setting)s
RETURNING version;
