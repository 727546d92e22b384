-- Which configuration is in force: revisions under their digest, activations, and the one row
-- that says which is the last.

-- name: lock_configuration
-- Keeps every acceptance of a cycle out until this transaction ends, and waits for those begun.
SELECT pg_advisory_xact_lock(hashtext('orbit.configuration'));

-- name: bound_wait
-- No statement of this transaction waits for a lock longer than this.
SET LOCAL lock_timeout = '10s';

-- name: active_cycles
-- The cycles that a change of the configuration would have to wait for; the first 20 and how
-- many there are in all. cycle_lease holds nothing but active cycles. Those that a halt holds up
-- are left out, since the change may be what the halt is for, and they keep their revision; so are
-- drills', which have none.
SELECT namespace, cycle_id, run_profile_id, count(*) OVER () AS total
FROM cycle_lease
WHERE NOT starts_with(namespace, %(drills)s) AND (node_id IS NOT NULL
    OR namespace NOT IN (SELECT namespace FROM namespace_fence WHERE is_halted))
ORDER BY cycle_id LIMIT 20;

-- name: insert_revision
-- A whole configuration, once.
INSERT INTO config_revision (revision, body, node_id)
VALUES (%(revision)s, %(body)s, %(node_id)s) ON CONFLICT DO NOTHING;

-- name: insert_activation
-- The fact that it came into force.
INSERT INTO config_activation (activation_id, revision, declared_revision, reason, node_id)
VALUES (%(activation_id)s, %(revision)s, %(declared_revision)s, %(reason)s, %(node_id)s);

-- name: was_in_force
-- Whether files of a revision have ever come into force.
SELECT EXISTS (SELECT FROM config_activation
    WHERE COALESCE(declared_revision, revision) = %(revision)s) AS was_in_force;

-- name: activate
-- What all nodes go by from now on.
INSERT INTO config_active (revision, declared_revision) VALUES (%(revision)s, %(declared_revision)s)
ON CONFLICT (singleton) DO UPDATE SET revision = excluded.revision,
    declared_revision = excluded.declared_revision;

-- name: revision_body
-- What a revision says.
SELECT body FROM config_revision WHERE revision = %(revision)s;

-- name: active_revision
-- Which revision is in force, and that of the files alone, without overlays.
SELECT revision, COALESCE(declared_revision, revision) AS declared_revision FROM config_active;
