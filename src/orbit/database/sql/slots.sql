-- Schedules and their slots. The schedule's row is a lease: whoever locks it decides its slots,
-- writes one row for each and moves on to the next, all in one transaction.

-- name: schedules
-- All schedules, once a minute; whoever has one's definition would have decided it when overdue.
SELECT namespace, run_profile_id, definition, decided_until,
    due_at < orbit_now() - interval '1 minute' AS is_overdue FROM schedule;

-- name: sync_schedules
-- Makes the schedules those of the configuration: what is new or changed starts at the place
-- given, what is the same keeps its own; none goes back behind a slot that was decided. What is
-- not wanted goes if the configuration is new, else when nobody decides it.
WITH wanted AS MATERIALIZED (
    SELECT * FROM unnest(%(namespace)s::text[], %(run_profile_id)s::text[],
        %(definition)s::text[], %(decided_until)s::timestamptz[], %(due_at)s::timestamptz[])
        AS wanted (namespace, run_profile_id, definition, decided_until, due_at)
), gone AS (
    DELETE FROM schedule WHERE NOT EXISTS (SELECT FROM wanted
        WHERE wanted.namespace = schedule.namespace
            AND wanted.run_profile_id = schedule.run_profile_id)
        AND (%(is_new)s OR due_at < orbit_now() - interval '1 minute')
)
INSERT INTO schedule (namespace, run_profile_id, definition, decided_until, due_at)
SELECT namespace, run_profile_id, definition, GREATEST(decided_until, (
        SELECT max(slot_at) FROM schedule_slot WHERE schedule_slot.namespace = wanted.namespace
            AND schedule_slot.run_profile_id = wanted.run_profile_id)), due_at FROM wanted
ORDER BY namespace, run_profile_id
ON CONFLICT (namespace, run_profile_id) DO UPDATE SET definition = excluded.definition,
    decided_until = GREATEST(schedule.decided_until, excluded.decided_until),
    due_at = excluded.due_at
WHERE schedule.definition <> excluded.definition;

-- name: next_due
-- In how many seconds the first schedule is due, which configuration is in force, and the time.
-- schedule_due serves it.
SELECT (SELECT revision FROM config_active) AS revision,
    extract(epoch FROM (SELECT min(due_at) FROM schedule WHERE due_at < 'infinity')
        - orbit_now())::float8 AS due_in_seconds,
    orbit_now() AS now;

-- name: claim_schedules
-- Locks schedules with a slot to decide, the longest due first. schedule_due serves it.
SELECT namespace, run_profile_id, definition, decided_until, orbit_now() AS now FROM schedule
WHERE due_at <= orbit_now() ORDER BY due_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED;

-- name: busy_run_profiles
-- Which of these run profiles have an active cycle, and which one.
-- cycle_lease_by_run_profile and cycle_lease_waiting serve it.
SELECT asked.namespace, asked.run_profile_id, active.cycle_id
FROM unnest(%(namespace)s::text[], %(run_profile_id)s::text[])
    AS asked (namespace, run_profile_id)
CROSS JOIN LATERAL (
    (SELECT cycle_id FROM cycle_lease
    WHERE cycle_lease.namespace = asked.namespace
        AND cycle_lease.run_profile_id = asked.run_profile_id AND NOT is_waiting
    ORDER BY cycle_id LIMIT 1)
    UNION ALL
    (SELECT cycle_id FROM cycle_lease
    WHERE cycle_lease.namespace = asked.namespace
        AND cycle_lease.run_profile_id = asked.run_profile_id AND is_waiting
    ORDER BY cycle_id LIMIT 1)
    LIMIT 1
) active;

-- name: insert_slots
-- What became of each slot, with the reason.
INSERT INTO schedule_slot (namespace, run_profile_id, slot_at, outcome, reason, cycle_id, node_id)
SELECT namespace, run_profile_id, slot_at, outcome, reason, cycle_id, %(node_id)s::uuid
FROM unnest(%(namespace)s::text[], %(run_profile_id)s::text[], %(slot_at)s::timestamptz[],
    %(outcome)s::text[], %(reason)s::text[], %(cycle_id)s::uuid[])
    AS slot (namespace, run_profile_id, slot_at, outcome, reason, cycle_id)
ON CONFLICT DO NOTHING;

-- name: move_schedules
-- The slots up to decided_until are decided.
UPDATE schedule SET decided_until = moved.decided_until, due_at = moved.due_at
FROM unnest(%(namespace)s::text[], %(run_profile_id)s::text[],
    %(decided_until)s::timestamptz[], %(due_at)s::timestamptz[])
    AS moved (namespace, run_profile_id, decided_until, due_at)
WHERE schedule.namespace = moved.namespace AND schedule.run_profile_id = moved.run_profile_id;
