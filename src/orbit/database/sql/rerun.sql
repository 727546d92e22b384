-- What a re-run takes over from the failed cycle.

-- name: failed_cycle
-- The cycle and its state, by its id alone. cycle_run_newest serves it.
SELECT status.namespace, status.cycle_id, status.run_profile_id, status.state, run.endpoint_keys
FROM cycle_status status
JOIN cycle_run run ON run.namespace = status.namespace AND run.cycle_id = status.cycle_id
WHERE status.cycle_id = %(cycle_id)s;

-- name: copied_checkpoints
-- Its checkpoints with their payloads, in order; no content where retention has dropped it.
SELECT checkpoint.stage, checkpoint.content_type, checkpoint.detail, payload.content
FROM cycle_checkpoint checkpoint
LEFT JOIN payload ON payload.namespace = checkpoint.namespace
    AND payload.cycle_id = checkpoint.cycle_id AND payload.digest = checkpoint.digest
WHERE checkpoint.namespace = %(namespace)s AND checkpoint.cycle_id = %(cycle_id)s
    AND checkpoint.stage = ANY (%(stages)s::text[])
ORDER BY orbit_stage_number(checkpoint.stage);
