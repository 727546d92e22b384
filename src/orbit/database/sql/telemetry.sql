-- Telemetry: events written, numbered, read by position.

-- name: emit
-- Events, and their pending batches, one for each namespace. Locks nothing that others wait for.
WITH event AS MATERIALIZED (
    SELECT * FROM unnest(%(namespace)s::text[], %(event_type)s::text[], %(metadata)s::jsonb[],
        %(profile_id)s::text[], %(run_profile_id)s::text[], %(run_id)s::uuid[],
        %(version)s::smallint[]) WITH ORDINALITY
        AS event (namespace, event_type, metadata, profile_id, run_profile_id, run_id, version, place)
), batch AS MATERIALIZED (
    SELECT orbit_new_batch() AS batch_id
), told AS (
    INSERT INTO telemetry_event (namespace, batch_id, ordinal, event_type, profile_id,
        run_profile_id, run_id, metadata, version)
    SELECT namespace, batch_id, row_number() OVER (PARTITION BY namespace ORDER BY place),
        event_type, profile_id, run_profile_id, run_id, metadata, version
    FROM event CROSS JOIN batch
    RETURNING namespace, batch_id
)
INSERT INTO telemetry_pending (namespace, batch_id, events)
SELECT namespace, batch_id, count(*) FROM told GROUP BY namespace, batch_id;

-- name: look
-- Who leads, and whether there is something to number. telemetry_pending_oldest serves it.
SELECT node_id IS NOT DISTINCT FROM %(node_id)s::uuid AS is_mine, due_at <= orbit_now() AS is_free,
    due_at < orbit_now() + %(lease_seconds)s * interval '0.5 second' AS is_due,
    (SELECT batch_id FROM telemetry_pending ORDER BY batch_id, namespace LIMIT 1) IS NOT NULL
        AS has_pending,
    GREATEST(0.05, CASE WHEN due_at = '-infinity' THEN 0
        ELSE extract(epoch FROM due_at - orbit_now()) END)::float8 AS wait_seconds
FROM telemetry_sequencer;

-- name: ensure_sequencer
-- The sequencer's row, should it be lost; the last position is found in the batches.
INSERT INTO telemetry_sequencer DEFAULT VALUES ON CONFLICT DO NOTHING;

-- name: lead
-- Takes the sequencer's row if it is free or ours, and locks it until the transaction's end.
-- Passed over if another is at it.
UPDATE telemetry_sequencer SET node_id = %(node_id)s::uuid,
    due_at = orbit_now() + %(lease_seconds)s * interval '1 second'
WHERE singleton = (SELECT singleton FROM telemetry_sequencer
    WHERE node_id = %(node_id)s::uuid OR due_at <= orbit_now() FOR UPDATE SKIP LOCKED);

-- name: number_batches
-- Gives the oldest pending batches their positions, if this very transaction leads: to follow
-- lead, which has locked the row. telemetry_pending_oldest and telemetry_batch_by_position serve it.
WITH leader AS MATERIALIZED (
    SELECT GREATEST(last_position, COALESCE((SELECT last_position FROM telemetry_batch
        ORDER BY last_position DESC LIMIT 1), 0)) AS last_position
    FROM telemetry_sequencer
    WHERE node_id = %(node_id)s::uuid AND xmin = pg_current_xact_id()::xid
), chosen AS MATERIALIZED (
    SELECT namespace, batch_id FROM telemetry_pending WHERE EXISTS (SELECT FROM leader)
    ORDER BY batch_id, namespace LIMIT %(count)s
), taken AS (
    DELETE FROM telemetry_pending USING chosen
    WHERE telemetry_pending.namespace = chosen.namespace
        AND telemetry_pending.batch_id = chosen.batch_id
    RETURNING telemetry_pending.namespace, telemetry_pending.batch_id, events
), placed AS MATERIALIZED (
    SELECT taken.namespace, batch_id, events, leader.last_position
        + sum(events) OVER (ORDER BY batch_id, taken.namespace) AS last_position
    FROM taken CROSS JOIN leader
), numbered AS (
    INSERT INTO telemetry_batch (namespace, batch_id, events, last_position)
    SELECT namespace, batch_id, events, last_position FROM placed
), moved AS (
    UPDATE telemetry_sequencer SET last_position = (SELECT max(last_position) FROM placed)
    WHERE EXISTS (SELECT FROM placed)
)
SELECT count(*)::int AS batches, COALESCE(sum(events), 0)::int AS events,
    GREATEST(0, COALESCE(extract(epoch FROM orbit_now() - orbit_id_time(
        (SELECT batch_id FROM placed ORDER BY batch_id LIMIT 1))), 0))::float8 AS lag_seconds
FROM placed;

-- name: bounds
-- The first position that is kept, or that comes next, and the last one given.
SELECT COALESCE((SELECT batch.last_position - events + 1 FROM telemetry_batch batch
        ORDER BY batch.last_position LIMIT 1), last.position + 1) AS first_position,
    last.position AS last_position
FROM (SELECT GREATEST((SELECT last_position FROM telemetry_sequencer), COALESCE((SELECT last_position
        FROM telemetry_batch ORDER BY last_position DESC LIMIT 1), 0)) AS position) last;

-- name: window
-- What follows a position, as CloudEvents in their order: the whole answer, or frames of a stream;
-- with the bounds at that very moment: what retention drops meanwhile is seen by both, or by none.
-- Batches are taken until there are enough events. telemetry_batch_by_position serves it.
WITH edge AS MATERIALIZED (
    {{bounds}}
), next AS MATERIALIZED (
    SELECT namespace, batch_id, events, last_position FROM telemetry_batch
    WHERE last_position > %(after)s::bigint ORDER BY last_position LIMIT %(count)s
), batch AS MATERIALIZED (
    SELECT * FROM (
        SELECT next.*, sum(LEAST(events, last_position - %(after)s::bigint)) OVER (ORDER BY last_position)
            - LEAST(events, last_position - %(after)s::bigint) AS before
        FROM next
    ) counted WHERE before < %(count)s
), named AS MATERIALIZED (
    SELECT namespace, batch_id, events, last_position, to_json(namespace)::text AS name,
        '{"specversion":"1.0","id":"' || batch_id || '-' AS head,
        '","source":' || to_json('/namespaces/' || namespace)::text || ',"type":"orbit.' AS source
    FROM batch
), chosen AS MATERIALIZED (
    SELECT last_position - events + ordinal AS position, name, head, source, event.*
    FROM named CROSS JOIN LATERAL (
        SELECT ordinal, event_type, version, occurred_at, profile_id, run_profile_id, run_id,
            metadata
        FROM telemetry_event
        WHERE telemetry_event.namespace = named.namespace
            AND telemetry_event.batch_id = named.batch_id
            AND ordinal > named.events - (named.last_position - %(after)s::bigint)
        OFFSET 0
    ) event
    ORDER BY position LIMIT %(count)s
), shown AS MATERIALIZED (
    SELECT position, head || ordinal || source || event_type || '.v' || version || '","time":'
        || left(to_json(occurred_at AT TIME ZONE 'UTC')::text, -1) || 'Z","subject":'
        || COALESCE('"' || run_id || '"', name)
        || ',"datacontenttype":"application/json","position":' || position
        || ',"data":{"namespace":' || name
        || ',"profileId":' || COALESCE(to_json(profile_id)::text, 'null')
        || ',"runProfileId":' || COALESCE(to_json(run_profile_id)::text, 'null')
        || ',"runId":' || COALESCE('"' || run_id || '"', 'null')
        || CASE WHEN metadata = '{}' THEN '}}' ELSE ',' || substr(metadata::text, 2) || '}' END
        AS line
    FROM chosen
)
SELECT count(*)::int AS events, max(position) AS position,
    (SELECT first_position FROM edge) AS first_position,
    (SELECT last_position FROM edge) AS last_position,
    CASE WHEN %(is_stream)s THEN string_agg('id: ' || position || E'\ndata: ' || line || E'\n\n',
        '' ORDER BY position) ELSE '[' || string_agg(line, ',' ORDER BY position) || ']' END AS text
FROM shown;

-- name: window_of_namespaces
-- What follows a position, as CloudEvents in their order: the whole answer, or frames of a stream;
-- with the bounds at that very moment: what retention drops meanwhile is seen by both, or by none.
-- Of some namespaces only. telemetry_batch_of_namespace serves it, since no other index has an
-- order that begins with the namespace.
WITH edge AS MATERIALIZED (
    {{bounds}}
), next AS MATERIALIZED (
    SELECT batch.* FROM unnest(%(namespaces)s::text[]) AS wanted (namespace)
    CROSS JOIN LATERAL (
        SELECT namespace, batch_id, events, last_position FROM telemetry_batch
        WHERE telemetry_batch.namespace <= wanted.namespace
            AND (telemetry_batch.namespace, last_position) > (wanted.namespace, %(after)s::bigint)
        ORDER BY telemetry_batch.namespace, last_position LIMIT %(count)s
    ) batch
    ORDER BY last_position LIMIT %(count)s
), batch AS MATERIALIZED (
    SELECT * FROM (
        SELECT next.*, sum(LEAST(events, last_position - %(after)s::bigint)) OVER (ORDER BY last_position)
            - LEAST(events, last_position - %(after)s::bigint) AS before
        FROM next
    ) counted WHERE before < %(count)s
), named AS MATERIALIZED (
    SELECT namespace, batch_id, events, last_position, to_json(namespace)::text AS name,
        '{"specversion":"1.0","id":"' || batch_id || '-' AS head,
        '","source":' || to_json('/namespaces/' || namespace)::text || ',"type":"orbit.' AS source
    FROM batch
), chosen AS MATERIALIZED (
    SELECT last_position - events + ordinal AS position, name, head, source, event.*
    FROM named CROSS JOIN LATERAL (
        SELECT ordinal, event_type, version, occurred_at, profile_id, run_profile_id, run_id,
            metadata
        FROM telemetry_event
        WHERE telemetry_event.namespace = named.namespace
            AND telemetry_event.batch_id = named.batch_id
            AND ordinal > named.events - (named.last_position - %(after)s::bigint)
        OFFSET 0
    ) event
    ORDER BY position LIMIT %(count)s
), shown AS MATERIALIZED (
    SELECT position, head || ordinal || source || event_type || '.v' || version || '","time":'
        || left(to_json(occurred_at AT TIME ZONE 'UTC')::text, -1) || 'Z","subject":'
        || COALESCE('"' || run_id || '"', name)
        || ',"datacontenttype":"application/json","position":' || position
        || ',"data":{"namespace":' || name
        || ',"profileId":' || COALESCE(to_json(profile_id)::text, 'null')
        || ',"runProfileId":' || COALESCE(to_json(run_profile_id)::text, 'null')
        || ',"runId":' || COALESCE('"' || run_id || '"', 'null')
        || CASE WHEN metadata = '{}' THEN '}}' ELSE ',' || substr(metadata::text, 2) || '}' END
        AS line
    FROM chosen
)
SELECT count(*)::int AS events, max(position) AS position,
    (SELECT first_position FROM edge) AS first_position,
    (SELECT last_position FROM edge) AS last_position,
    CASE WHEN %(is_stream)s THEN string_agg('id: ' || position || E'\ndata: ' || line || E'\n\n',
        '' ORDER BY position) ELSE '[' || string_agg(line, ',' ORDER BY position) || ']' END AS text
FROM shown;

-- name: outcome_subject
-- What an outcome is of: a cycle, one of its items, or a job, in the namespace. By their keys.
SELECT run.cycle_id, run.profile_id, run.run_profile_id, run.revision,
    COALESCE(job.item_index, %(item_index)s::int) AS item_index
FROM (SELECT %(namespace)s::text AS namespace, %(run_id)s::uuid AS run_id,
    %(job_id)s::uuid AS job_id) asked
LEFT JOIN dispatch_job job ON job.namespace = asked.namespace AND job.job_id = asked.job_id
JOIN cycle_run run ON run.namespace = asked.namespace
    AND run.cycle_id = COALESCE(asked.run_id, job.cycle_id)
WHERE %(item_index)s::int IS NULL OR EXISTS (SELECT FROM normalized_item item
    WHERE item.namespace = run.namespace AND item.cycle_id = run.cycle_id
        AND item.item_index = %(item_index)s::int);

-- name: insert_outcome
-- An outcome's key, with who says it; no row if it was reported before. It is sealed afterwards.
INSERT INTO outcome_key (namespace, outcome_id, digest, cycle_id, reported_by)
VALUES (%(namespace)s, %(outcome_id)s, %(digest)s, %(cycle_id)s::uuid, %(reported_by)s)
ON CONFLICT DO NOTHING;

-- name: known_outcome
-- What was said under an outcome's id.
SELECT digest FROM outcome_key WHERE namespace = %(namespace)s AND outcome_id = %(outcome_id)s;

-- name: weeks
-- The weeks that have events' partitions and ended so many days ago, the oldest first.
SELECT to_char(week, 'YYYY-MM-DD') AS week,
    week + 7 <= (orbit_now() AT TIME ZONE 'UTC')::date - %(hard_days)s::int
        AND %(hard_days)s::int > 0 AS is_over_limit
FROM (SELECT to_date(right(child.relname, 8), 'YYYYMMDD') AS week
    FROM pg_inherits JOIN pg_class child ON child.oid = inhrelid
    WHERE inhparent = 'telemetry_event'::regclass) partition
WHERE week + 7 <= (orbit_now() AT TIME ZONE 'UTC')::date - %(days)s::int
ORDER BY week;

-- name: week_size
-- How many numbered events a week has, with its last position; and those archived of it.
SELECT COALESCE(sum(events), 0)::bigint AS events, COALESCE(max(last_position), 0) AS last_position,
    (SELECT COALESCE(sum(archive.events), 0)::bigint FROM telemetry_archive archive
        WHERE archive.week = %(week)s::date) AS archived,
    (SELECT COALESCE(max(archive.last_position), 0) FROM telemetry_archive archive
        WHERE archive.week = %(week)s::date) AS archived_until,
    (SELECT COALESCE(max(archive.chunk), 0) FROM telemetry_archive archive
        WHERE archive.week = %(week)s::date) AS chunks
FROM telemetry_batch
WHERE batch_id >= orbit_first_id(%(week)s::date::timestamp AT TIME ZONE 'UTC')
    AND batch_id < orbit_first_id((%(week)s::date + 7)::timestamp AT TIME ZONE 'UTC');

-- name: week_lines
-- A week's events after a position, whole batches, about `count` of them, as JSON lines.
WITH next AS MATERIALIZED (
    SELECT namespace, batch_id, events, last_position FROM telemetry_batch
    WHERE last_position > %(after)s::bigint
        AND batch_id >= orbit_first_id(%(week)s::date::timestamp AT TIME ZONE 'UTC')
        AND batch_id < orbit_first_id((%(week)s::date + 7)::timestamp AT TIME ZONE 'UTC')
    ORDER BY last_position LIMIT %(count)s
), batch AS MATERIALIZED (
    SELECT * FROM (SELECT next.*, sum(events) OVER (ORDER BY last_position) - events AS before
        FROM next) counted WHERE before < %(count)s
), line AS MATERIALIZED (
    SELECT position, json_build_object('position', position, 'namespace', of,
        'id', id || '-' || ordinal, 'type', event_type, 'version', version, 'time',
        to_char(occurred_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
        'profileId', profile_id, 'runProfileId', run_profile_id, 'runId', run_id,
        'metadata', metadata)::text AS line
    FROM (
        SELECT last_position - events + ordinal AS position, event.*
        FROM batch CROSS JOIN LATERAL (
            SELECT ordinal, namespace AS of, batch_id AS id, event_type, version, occurred_at,
                profile_id, run_profile_id, run_id, metadata
            FROM telemetry_event
            WHERE telemetry_event.namespace = batch.namespace
                AND telemetry_event.batch_id = batch.batch_id
            OFFSET 0
        ) event
    ) placed
)
SELECT count(*)::int AS events, min(position) AS first_position, max(position) AS last_position,
    string_agg(line, E'\n' ORDER BY position) AS text
FROM line;

-- name: insert_archive
-- A chunk of a week; one that is there stays.
INSERT INTO telemetry_archive (week, chunk, first_position, last_position, events, sha256, content)
VALUES (%(week)s::date, %(chunk)s, %(first_position)s, %(last_position)s, %(events)s,
    %(sha256)b, %(content)b) ON CONFLICT DO NOTHING;

-- name: archive_chunk
-- A chunk as it is stored.
SELECT events, sha256, content FROM telemetry_archive
WHERE week = %(week)s::date AND chunk = %(chunk)s;

-- name: archives
-- The archived weeks, each with the newest file that was written of it.
SELECT to_char(archive.week, 'YYYY-MM-DD') AS week, chunks, archive.events, first_position,
    last_position, archive.bytes, written.file, encode(written.sha256, 'hex') AS file_sha256
FROM (SELECT week, count(*)::int AS chunks, sum(events)::bigint AS events,
        min(first_position) AS first_position, max(last_position) AS last_position,
        sum(octet_length(content))::bigint AS bytes
    FROM telemetry_archive GROUP BY week) archive
LEFT JOIN LATERAL (SELECT file, sha256 FROM telemetry_archive_file file
    WHERE file.week = archive.week ORDER BY written_at DESC LIMIT 1) written ON true
ORDER BY archive.week;

-- name: add_archive_file
-- A file that was written of a week; the same again is no other.
INSERT INTO telemetry_archive_file (week, sha256, file, events, bytes)
VALUES (%(week)s::date, %(sha256)b, %(file)s, %(events)s, %(bytes)s) ON CONFLICT DO NOTHING;

-- name: archive_file
-- Which week a file with this digest has. A scan: there is a row a week.
SELECT to_char(week, 'YYYY-MM-DD') AS week, events FROM telemetry_archive_file
WHERE sha256 = %(sha256)b;

-- name: behind
-- Who has not read up to a position: stored consumers, and namespaces' signals as far as there is
-- something for them. telemetry_batch_of_namespace serves it.
SELECT name FROM telemetry_consumer WHERE position < %(position)s::bigint
UNION ALL
SELECT 'signals of ' || namespace FROM signal_feed feed
WHERE EXISTS (SELECT FROM telemetry_batch batch WHERE batch.namespace = feed.namespace
    AND batch.last_position > feed.position AND batch.last_position <= %(position)s::bigint)
ORDER BY name;

-- name: bound_waiting
-- Bounds the waits for locks of the transaction, as drop_week's own are.
SELECT set_config('lock_timeout', '2s', true);

-- name: lock_weeks
-- Lets nobody drop a week, or store a consumer, until the transaction ends: before drop_week.
SELECT pg_advisory_xact_lock(hashtext('orbit.partitions'));

-- name: drop_week
-- Drops a week's events; their last position, or NULL if they are gone already. The database
-- refuses while somebody has yet to read them, and locks both tables before it looks.
SELECT orbit_drop_telemetry(%(week)s::date, %(is_forced)s) AS last_position;

-- name: hold_weeks
-- Lets no week be dropped until the transaction ends; waits for one that is being dropped.
SELECT pg_advisory_xact_lock_shared(hashtext('orbit.partitions'));

-- name: add_consumer
-- A consumer, unless its name is taken or its place not given yet; in a statement after hold_weeks.
WITH edge AS MATERIALIZED (
    {{bounds}}
), made AS (
    INSERT INTO telemetry_consumer (name, namespaces, position)
    SELECT %(name)s, %(namespaces)s::text[],
        GREATEST(COALESCE(%(after)s::bigint, 0), edge.first_position - 1)
    FROM edge WHERE COALESCE(%(after)s::bigint, 0) <= edge.last_position
    ON CONFLICT DO NOTHING RETURNING name
)
SELECT EXISTS (SELECT FROM made) AS is_new, last_position FROM edge;

-- name: move_consumer
-- Keeps a consumer's place, which never goes back and not beyond what was given. By its key.
WITH edge AS MATERIALIZED (
    {{bounds}}
)
UPDATE telemetry_consumer consumer SET moved_at = orbit_now(), position = CASE
    WHEN %(position)s::bigint <= edge.last_position
    THEN GREATEST(consumer.position, %(position)s::bigint) ELSE consumer.position END
FROM edge WHERE name = %(name)s
RETURNING consumer.position, edge.last_position;

-- name: consumers
-- The consumers after a name, or the one of a name, with how much each has not read, and how much of
-- that is gone; of those that may be seen from some namespaces. By their key.
WITH edge AS MATERIALIZED (
    {{bounds}}
)
SELECT name, namespaces, position, GREATEST(last_position - position, 0) AS behind,
    GREATEST(first_position - 1 - position, 0) AS lost, moved_at
FROM telemetry_consumer CROSS JOIN edge
WHERE name > %(after)s AND (%(name)s::text IS NULL OR name = %(name)s::text)
    AND (%(within)s::text[] IS NULL OR namespaces <@ %(within)s::text[])
ORDER BY name LIMIT %(count)s;

-- name: most_behind
-- How much the consumer that is furthest behind has yet to read.
WITH edge AS MATERIALIZED (
    {{bounds}}
)
SELECT GREATEST(0, last_position - COALESCE((SELECT min(position) FROM telemetry_consumer),
    last_position))::bigint AS consumer_behind
FROM edge;

-- name: remove_consumer
-- Lets a consumer go: nothing is kept for it any more.
DELETE FROM telemetry_consumer WHERE name = %(name)s;
