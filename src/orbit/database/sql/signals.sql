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

-- name: move_feed
-- The feed goes on. The primary key serves it; the caller holds the row's lock.
UPDATE signal_feed
SET detector_version = %(version)s, position = %(position)s, state = %(state)s
WHERE namespace = %(namespace)s;

-- name: drop_streams
-- Streams that are kept no longer, or with `is_all` every one. The primary key serves it; the caller
-- holds the feed's lock.
DELETE FROM signal_stream WHERE namespace = %(namespace)s AND (%(is_all)s
    OR (profile_id, revision, metric) IN (SELECT * FROM unnest(%(profile_id)s::text[],
        %(revision)s::text[], %(metric)s::text[])));

-- name: put_streams
-- The state of streams that were fed. The primary key serves it; the caller holds the feed's lock.
INSERT INTO signal_stream (namespace, profile_id, revision, metric, state)
SELECT %(namespace)s, * FROM unnest(%(profile_id)s::text[], %(revision)s::text[],
    %(metric)s::text[], %(state)s::text[])
ON CONFLICT (namespace, profile_id, revision, metric) DO UPDATE SET state = EXCLUDED.state;

-- name: add_signals
-- What was said; what was said before (the same id) stays as it is. Returns how many were new.
INSERT INTO advisory_signal (namespace, signal_id, profile_id, revision, metric, name, alarm_level,
    confidence, from_position, to_position, detector_version, body)
SELECT %(namespace)s, * FROM unnest(%(signal_id)s::text[], %(profile_id)s::text[],
    %(revision)s::text[], %(metric)s::text[], %(name)s::text[], %(alarm_level)s::text[],
    %(confidence)s::float8[], %(from_position)s::bigint[], %(to_position)s::bigint[],
    %(detector_version)s::int[], %(body)s::text[])
ON CONFLICT (namespace, signal_id) DO NOTHING;

-- name: signal_window
-- A profile's signals before a position, the newest first, in some namespaces or all;
-- advisory_signal_newest serves it.
SELECT namespace, signal_id, profile_id, revision, metric, name, alarm_level, confidence,
    from_position, to_position, detector_version, body, computed_at
FROM advisory_signal
WHERE profile_id = %(profile_id)s
    AND (%(namespaces)s::text[] IS NULL OR namespace = ANY (%(namespaces)s::text[]))
    AND (to_position, signal_id) < (%(to_position)s::bigint, %(signal_id)s::text)
ORDER BY to_position DESC, signal_id DESC LIMIT %(count)s;
