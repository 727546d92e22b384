-- Drills: what a rehearsal came to, and what it left behind.

-- name: insert_drill
-- What a rehearsal of a halt came to.
INSERT INTO halt_drill (namespace, epoch, has_passed, requests, arrived_before, in_flight,
    is_quiesced, quiesced_seconds, watched_seconds, arrived_halted, is_refused, arrived_after,
    arrived_twice, actor, actor_id, node_id)
VALUES (%(namespace)s, %(epoch)s, %(has_passed)s, %(requests)s, %(arrived_before)s,
    %(in_flight)s, %(is_quiesced)s, %(quiesced_seconds)s, %(watched_seconds)s,
    %(arrived_halted)s, %(is_refused)s, %(arrived_after)s, %(arrived_twice)s, %(actor)s,
    %(actor_id)s, %(node_id)s::uuid);

-- name: open_work
-- Something of a namespace that waits or is in hand, if there is any.
SELECT namespace FROM dispatch_lease WHERE namespace = %(namespace)s
UNION ALL SELECT namespace FROM cycle_lease WHERE namespace = %(namespace)s
LIMIT 1;

-- name: left_over
-- Drills whose cycles are older than any drill: a cycle's lease is there until its jobs have ended.
SELECT DISTINCT namespace FROM cycle_lease
WHERE starts_with(namespace, %(drills)s) AND cycle_id < %(before)s::uuid
ORDER BY namespace;

-- name: forget_tallies
-- What attempts came to, of a namespace that has no work: nobody looks at it again. Its receipts
-- stay.
DELETE FROM lane_tally WHERE namespace = %(namespace)s AND NOT EXISTS (
    SELECT FROM dispatch_lease WHERE dispatch_lease.namespace = lane_tally.namespace);

-- name: forget_lanes
-- The lanes of such a namespace. To follow forget_tallies.
DELETE FROM lane WHERE namespace = %(namespace)s AND NOT EXISTS (
    SELECT FROM dispatch_lease WHERE dispatch_lease.namespace = lane.namespace);

-- name: undecided_dead_letters
-- The dead letters of a namespace that nobody decided on.
SELECT dead.job_id::text FROM dead_letter_dispatch dead
WHERE dead.namespace = %(namespace)s AND NOT EXISTS (
    SELECT FROM dead_letter_decision decision
    WHERE decision.namespace = dead.namespace AND decision.job_id = dead.job_id)
ORDER BY dead.job_id;
