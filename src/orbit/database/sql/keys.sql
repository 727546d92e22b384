-- Access keys: facts that they were made and ended, and a lease that says when one was last used.
-- Who makes or ends a key has the keys to itself (hold_keys), and reads the facts in a later
-- statement.

-- name: find_key
-- One key, and until when it is good. The primary keys serve it.
SELECT key.key_id, key.root_id, key.name, key.scopes, key.namespaces, key.secret_sha256,
    LEAST(key.expires_at, ended.ends_at) AS ends_at,
    COALESCE(LEAST(key.expires_at, ended.ends_at) > orbit_now(), true) AS is_good,
    EXTRACT(epoch FROM LEAST(key.expires_at, ended.ends_at) - orbit_now())::float8
        AS seconds_left
FROM access_key key
CROSS JOIN LATERAL (
    SELECT min(ends_at) AS ends_at FROM access_key_end WHERE access_key_end.key_id = key.key_id
) ended
WHERE key.key_id = %(key_id)s;

-- name: list_keys
-- Keys with what became of them, after a place, the newest first. access_key_newest serves it.
SELECT key.key_id, key.root_id, key.name, key.scopes, key.namespaces, key.expires_at,
    key.replaces, key.created_by, key.created_by_key, key.created_at, used.last_used_at, rotated.ends_at AS rotated_until,
    revoked.created_at AS revoked_at, revoked.reason AS revoked_reason,
    COALESCE(LEAST(key.expires_at, rotated.ends_at, revoked.ends_at) > orbit_now(), true) AS is_good
FROM access_key key
LEFT JOIN access_use used ON used.key_id = key.key_id
LEFT JOIN access_key_end rotated ON rotated.key_id = key.key_id AND rotated.kind = 'rotated'
LEFT JOIN access_key_end revoked ON revoked.key_id = key.key_id AND revoked.kind = 'revoked'
WHERE (%(key_id)s::text IS NULL OR key.key_id = %(key_id)s)
    AND (%(namespaces)s::text[] IS NULL OR key.namespaces <@ %(namespaces)s::text[])
    AND (key.created_at, key.key_id) < (%(before)s::timestamptz, %(before_id)s)
ORDER BY key.created_at DESC, key.key_id DESC LIMIT %(count)s;

-- name: has_good_key
-- Whether any key is good.
SELECT EXISTS (
    SELECT FROM access_key key WHERE COALESCE(key.expires_at > orbit_now(), true)
        AND NOT EXISTS (SELECT FROM access_key_end ended
            WHERE ended.key_id = key.key_id AND ended.ends_at <= orbit_now())
) AS has_key;

-- name: insert_key
-- A new key; nothing if it is there already.
INSERT INTO access_key
    (key_id, root_id, name, scopes, namespaces, secret_sha256, expires_at, replaces, created_by,
    created_by_key)
VALUES (%(key_id)s, %(root_id)s, %(name)s, %(scopes)s::text[], %(namespaces)s::text[],
    %(secret_sha256)b, %(expires_at)s::timestamptz, %(replaces)s, %(created_by)s,
    %(created_by_key)s)
ON CONFLICT (key_id) DO NOTHING;

-- name: hold_keys
-- One transaction at a time makes, rotates or revokes keys.
SELECT pg_advisory_xact_lock(hashtext('orbit.keys'));

-- name: descendants
-- The good keys that a key made, and those that they made. access_key_made serves it.
WITH RECURSIVE made AS (
    SELECT key_id FROM access_key WHERE created_by_key = %(key_id)s
    UNION
    SELECT key.key_id FROM access_key key JOIN made ON key.created_by_key = made.key_id
)
SELECT key.key_id, key.name, key.scopes, key.namespaces
FROM access_key key JOIN made ON made.key_id = key.key_id
WHERE COALESCE(key.expires_at > orbit_now(), true)
    AND NOT EXISTS (SELECT FROM access_key_end ended
        WHERE ended.key_id = key.key_id AND ended.ends_at <= orbit_now())
ORDER BY key.key_id;

-- name: end_key
-- A key is good for so many seconds yet; nothing if it has such an end already.
INSERT INTO access_key_end (key_id, kind, ends_at, reason, ended_by)
VALUES (%(key_id)s, %(kind)s, orbit_now() + %(seconds)s * interval '1 second', %(reason)s,
    %(ended_by)s)
ON CONFLICT (key_id, kind) DO NOTHING;

-- name: touch_key
-- A key was used now; written once a minute at most, whichever node saw it.
INSERT INTO access_use (key_id, last_used_at) VALUES (%(key_id)s, orbit_now())
ON CONFLICT (key_id) DO UPDATE SET last_used_at = excluded.last_used_at
WHERE access_use.last_used_at IS NULL
    OR access_use.last_used_at < excluded.last_used_at - interval '1 minute';
