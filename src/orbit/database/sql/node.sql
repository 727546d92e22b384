-- The nodes, as they tell of themselves.

-- name: enter_node
-- A node begins.
INSERT INTO node (node_id, name, address, roles, version, files_revision)
VALUES (%(node_id)s, %(name)s, %(address)s, %(roles)s::text[], %(version)s, %(files_revision)s)
ON CONFLICT (node_id) DO UPDATE SET seen_at = orbit_now(), address = excluded.address,
    files_revision = excluded.files_revision;

-- name: see_node
-- The heartbeat of the node itself; gives the database's time.
UPDATE node SET seen_at = orbit_now(), is_draining = %(is_draining)s,
    files_revision = %(files_revision)s
WHERE node_id = %(node_id)s
RETURNING orbit_now() AS now;

-- name: leave_node
-- A node ends in order.
DELETE FROM node WHERE node_id = %(node_id)s;

-- name: forget_nodes
-- Rows of nodes that have not been seen for a day.
DELETE FROM node WHERE seen_at < orbit_now() - interval '1 day';

-- name: now
-- The time of all stored facts.
SELECT orbit_now() AS now;

-- name: create_partitions
-- The time partitions of this week and the three that follow.
SELECT orbit_create_partitions(orbit_now() + interval '21 days') AS made;

-- name: refresh_statistics
-- Tells the planner of lease tables that have filled up since it last heard of them.
SELECT orbit_refresh_statistics() AS refreshed;

-- name: drop_partitions
-- The partitions of one fact that are older than its retention, and the entry that declares it:
-- verification takes nothing else for retired. One statement, so that nobody is left holding the
-- fact's lock while the entry waits for its log's head.
WITH bounded AS MATERIALIZED (
    SELECT set_config('lock_timeout', '2s', true) AS milliseconds
), done AS MATERIALIZED (
    SELECT orbit_drop_partitions(%(fact)s::regclass, orbit_now() - %(days)s * interval '1 day')
        AS dropped
    FROM bounded WHERE milliseconds IS NOT NULL
), declared AS MATERIALIZED (
    SELECT orbit_append_audit(ARRAY['*'], ARRAY[format('{"action":"facts.retired",'
        '"actor":"janitor","detail":{"before":"%%sT00:00:00Z","partitions":%%s,"table":"%%s"},'
        '"reason":"ORBIT_FACT_RETENTION_DAYS=%%s","subject":"%%s"}',
        to_char(to_date(right(dropped[cardinality(dropped)], 8), 'YYYYMMDD') + 7, 'YYYY-MM-DD'),
        cardinality(dropped), %(fact)s::text, %(days)s::int, %(fact)s::text)]) IS NOT NULL AS is_told
    FROM done WHERE cardinality(dropped) > 0
)
SELECT dropped, (SELECT is_told FROM declared) AS is_told FROM done;
