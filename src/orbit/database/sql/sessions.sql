-- Browsers' sessions and the one-time links that open them: leases, found by SHA-256 only.

-- name: insert_link
-- A link that opens one session.
INSERT INTO access_link (code_sha256, key_id, expires_at)
VALUES (%(digest)b, %(key_id)s, orbit_now() + %(seconds)s * interval '1 second')
RETURNING expires_at;

-- name: links_of
-- How many links of a key wait to be followed.
SELECT count(*)::int AS waiting FROM access_link
WHERE key_id = %(key_id)s AND expires_at > orbit_now();

-- name: take_link
-- A link is followed: it is gone, and of two who follow it one gets the key. The primary key
-- serves it.
DELETE FROM access_link WHERE code_sha256 = %(digest)b
RETURNING key_id, expires_at > orbit_now() AS is_good;

-- name: insert_session
-- A session is opened.
INSERT INTO access_session (session_sha256, key_id, expires_at)
VALUES (%(digest)b, %(key_id)s, orbit_now() + %(seconds)s * interval '1 second')
RETURNING expires_at;

-- name: recent_acts
-- How often a key did something in the last minute, by the trail, which also knows of sessions and
-- links that are over. audit_trail_entry_newest_of_log serves it.
SELECT count(*)::int AS done FROM audit_trail
WHERE namespace = %(log)s AND at > orbit_now() - interval '1 minute'
    AND action = %(action)s AND subject = %(subject)s;

-- name: delete_oldest_sessions
-- A key has so many sessions at most: the oldest go, to make room for one.
DELETE FROM access_session WHERE session_sha256 IN (
    SELECT session_sha256 FROM access_session WHERE key_id = %(key_id)s
    ORDER BY expires_at DESC OFFSET %(most)s - 1 FOR UPDATE SKIP LOCKED);

-- name: find_session
-- The key of a session that is not over. The primary key serves it.
SELECT key_id, expires_at, EXTRACT(epoch FROM expires_at - orbit_now())::float8 AS seconds_left
FROM access_session WHERE session_sha256 = %(digest)b AND expires_at > orbit_now();

-- name: delete_session
-- A session ends. The primary key serves it.
DELETE FROM access_session WHERE session_sha256 = %(digest)b;

-- name: delete_expired_sessions
-- Sessions that are over go, a few at a time. access_session_expired serves it.
DELETE FROM access_session WHERE session_sha256 IN (
    SELECT session_sha256 FROM access_session WHERE expires_at <= orbit_now()
    ORDER BY expires_at LIMIT 100 FOR UPDATE SKIP LOCKED);

-- name: delete_expired_links
-- Links that nobody followed go, a few at a time. access_link_expired serves it.
DELETE FROM access_link WHERE code_sha256 IN (
    SELECT code_sha256 FROM access_link WHERE expires_at <= orbit_now()
    ORDER BY expires_at LIMIT 100 FOR UPDATE SKIP LOCKED);
