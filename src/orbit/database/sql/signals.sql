-- Signals: what the detector said, and the state from which it goes on.

-- name: enter_feed
-- A namespace has a feed; once. The primary key serves it.
INSERT INTO signal_feed (namespace, detector_version, position)
VALUES (%(namespace)s, %(version)s, 0) ON CONFLICT DO NOTHING;

-- name: lock_feed
-- How far the namespace's events were fed; locks the row, the only lock of this concept, until the
-- state is moved on. The primary key serves it.
SELECT detector_version, position, state FROM signal_feed
WHERE namespace = %(namespace)s FOR UPDATE;

-- name: streams
-- The streams of a namespace, in a statement after the lock. The primary key serves it.
SELECT profile_id, revision, metric, state FROM signal_stream WHERE namespace = %(namespace)s;

-- name: events_after
-- What follows a position in a namespace, whole batches of about `count` events: those of some types
-- with a profile, as JSON, how many there were at all, and the last position.
-- telemetry_batch_of_namespace serves it.
WITH next AS MATERIALIZED (
    SELECT batch_id, events, last_position FROM telemetry_batch
    WHERE namespace = %(namespace)s AND last_position > %(after)s::bigint
    ORDER BY last_position LIMIT %(count)s
), batch AS MATERIALIZED (
    SELECT * FROM (SELECT next.*, sum(events) OVER (ORDER BY last_position) - events AS before
        FROM next) counted WHERE before < %(count)s
), chosen AS MATERIALIZED (
    SELECT last_position - events + ordinal AS position, event.*
    FROM batch CROSS JOIN LATERAL (
        SELECT ordinal, event_type, profile_id, run_id, metadata FROM telemetry_event
        WHERE telemetry_event.namespace = %(namespace)s
            AND telemetry_event.batch_id = batch.batch_id
            AND event_type = ANY (%(event_type)s::text[]) AND profile_id IS NOT NULL
        OFFSET 0
    ) event
)
SELECT (SELECT COALESCE(sum(events), 0)::int FROM batch) AS count,
    (SELECT max(last_position) FROM batch) AS last_position,
    (SELECT json_agg(json_build_array(position, event_type, profile_id, run_id, metadata)
        ORDER BY position)::text FROM chosen) AS events;

-- name: behind
-- The namespaces with events after what was fed of them, if this node numbers events; drills' and
-- the installation's have no profiles. A loose scan of telemetry_batch_of_namespace.
WITH RECURSIVE place AS (
    (SELECT namespace FROM telemetry_batch
        WHERE (SELECT node_id FROM telemetry_sequencer) = %(node_id)s::uuid
        ORDER BY namespace LIMIT 1)
    UNION ALL
    SELECT (SELECT batch.namespace FROM telemetry_batch batch
        WHERE batch.namespace > place.namespace ORDER BY batch.namespace LIMIT 1)
    FROM place WHERE place.namespace IS NOT NULL
)
SELECT place.namespace FROM place LEFT JOIN signal_feed feed ON feed.namespace = place.namespace
    AND feed.detector_version = %(version)s
WHERE place.namespace <> '*' AND place.namespace NOT LIKE 'orbit-drill-%%'
    AND EXISTS (SELECT FROM telemetry_batch batch WHERE batch.namespace = place.namespace
        AND batch.last_position > COALESCE(feed.position, 0));

-- name: move_feed
-- The feed goes on. The primary key serves it; the caller holds the row's lock.
UPDATE signal_feed
SET detector_version = %(version)s, position = %(position)s, state = %(state)s
WHERE namespace = %(namespace)s;

-- name: reset_feed
-- The feed begins anew, before the first event, and of its streams nothing is left. The primary keys
-- serve it; the caller holds the row's lock.
WITH gone AS (
    DELETE FROM signal_stream WHERE namespace = %(namespace)s
)
UPDATE signal_feed SET detector_version = %(version)s, position = 0, state = NULL
WHERE namespace = %(namespace)s;

-- name: drop_streams
-- Streams that are kept no longer. The primary key serves it; the caller holds the feed's lock.
DELETE FROM signal_stream WHERE namespace = %(namespace)s
    AND (profile_id, revision, metric) IN (SELECT * FROM unnest(%(profile_id)s::text[],
        %(revision)s::text[], %(metric)s::text[]));

-- name: put_streams
-- The state of streams that were fed. The primary key serves it; the caller holds the feed's lock.
INSERT INTO signal_stream (namespace, profile_id, revision, metric, state)
SELECT %(namespace)s, * FROM unnest(%(profile_id)s::text[], %(revision)s::text[],
    %(metric)s::text[], %(state)s::text[])
ON CONFLICT (namespace, profile_id, revision, metric) DO UPDATE SET state = EXCLUDED.state;

-- name: add_signals
-- What was said; what was said before (the same id) stays as it is and is not returned.
INSERT INTO advisory_signal (namespace, signal_id, profile_id, revision, metric, name, alarm_level,
    confidence, from_position, to_position, detector_version, body)
SELECT %(namespace)s, * FROM unnest(%(signal_id)s::text[], %(profile_id)s::text[],
    %(revision)s::text[], %(metric)s::text[], %(name)s::text[], %(alarm_level)s::text[],
    %(confidence)s::float8[], %(from_position)s::bigint[], %(to_position)s::bigint[],
    %(detector_version)s::int[], %(body)s::text[])
ON CONFLICT (namespace, signal_id) DO NOTHING RETURNING name;

-- name: signal_window
-- A profile's signals before a position, the newest first, in some namespaces or all;
-- advisory_signal_newest and advisory_signal_of_namespace serve it.
(SELECT namespace, signal_id, profile_id, revision, metric, name, alarm_level, confidence,
    from_position, to_position, detector_version, body, computed_at
FROM advisory_signal
WHERE %(namespaces)s::text[] IS NULL AND profile_id = %(profile_id)s
    AND (to_position, signal_id) < (%(to_position)s::bigint, %(signal_id)s::text)
ORDER BY to_position DESC, signal_id DESC LIMIT %(count)s)
UNION ALL
(SELECT found.* FROM unnest(%(namespaces)s::text[]) AS asked (namespace)
CROSS JOIN LATERAL (
    SELECT namespace, signal_id, profile_id, revision, metric, name, alarm_level, confidence,
        from_position, to_position, detector_version, body, computed_at
    FROM advisory_signal
    WHERE advisory_signal.namespace = asked.namespace AND profile_id = %(profile_id)s
        AND (to_position, signal_id) < (%(to_position)s::bigint, %(signal_id)s::text)
    ORDER BY to_position DESC, signal_id DESC LIMIT %(count)s
) found
ORDER BY found.to_position DESC, found.signal_id DESC LIMIT %(count)s);
