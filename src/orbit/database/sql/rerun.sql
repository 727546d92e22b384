-- What a re-run takes over from the failed cycle.

-- name: failed_cycle
-- The cycle and its state, by its id alone. cycle_run_newest serves it.
SELECT status.namespace, status.cycle_id, status.run_profile_id, status.state, run.endpoint_keys
FROM cycle_status status
JOIN cycle_run run ON run.namespace = status.namespace AND run.cycle_id = status.cycle_id
WHERE status.cycle_id = %(cycle_id)s;

-- name: rerun_family
-- The first cycle that the given one goes back to, and all re-runs that go back to it, in order.
-- cycle_run_by_rerun and the primary keys serve it.
WITH RECURSIVE older AS (
    SELECT cycle_id, rerun_of, 0 AS depth FROM cycle_run
    WHERE namespace = %(namespace)s AND cycle_id = %(cycle_id)s::uuid
    UNION ALL
    SELECT run.cycle_id, run.rerun_of, older.depth + 1
    FROM older JOIN cycle_run run
        ON run.namespace = %(namespace)s AND run.cycle_id = older.rerun_of
), family AS (
    (SELECT cycle_id, 0 AS depth FROM older ORDER BY older.depth DESC LIMIT 1)
    UNION ALL
    SELECT run.cycle_id, family.depth + 1
    FROM family JOIN cycle_run run
        ON run.namespace = %(namespace)s AND run.rerun_of = family.cycle_id
)
SELECT status.cycle_id, status.rerun_of, status.state, run.idempotency_key, key.request_digest
FROM family
JOIN cycle_status status
    ON status.namespace = %(namespace)s AND status.cycle_id = family.cycle_id
JOIN cycle_run run ON run.namespace = %(namespace)s AND run.cycle_id = family.cycle_id
JOIN initiation ON initiation.namespace = %(namespace)s AND initiation.cycle_id = family.cycle_id
LEFT JOIN initiation_key key ON key.namespace = %(namespace)s
    AND key.run_profile_id = run.run_profile_id AND key.hash = initiation.hash
ORDER BY family.depth, family.cycle_id;

-- name: copied_checkpoints
-- Its checkpoints with their payloads, in order; no content where retention has dropped it.
SELECT checkpoint.stage, checkpoint.content_type, checkpoint.detail, payload.content
FROM cycle_checkpoint checkpoint
LEFT JOIN payload ON payload.namespace = checkpoint.namespace
    AND payload.cycle_id = checkpoint.cycle_id AND payload.digest = checkpoint.digest
WHERE checkpoint.namespace = %(namespace)s AND checkpoint.cycle_id = %(cycle_id)s
    AND checkpoint.stage = ANY (%(stages)s::text[])
ORDER BY orbit_stage_number(checkpoint.stage);
