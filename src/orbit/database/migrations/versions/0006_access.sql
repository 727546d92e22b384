-- Access: keys, what they may do, and the sessions that browsers have instead of them.
--
--   access_key      fact: a key was made; of its secret only the SHA-256 is kept
--   access_key_end  fact: it was rotated or revoked, and until when it is good
--   access_use      lease: when a key was last used, kept by the minute
--   access_link     lease: a one-time link that opens a session
--   access_session  lease: a browser's session; like a link it is kept as a SHA-256 only
--
-- A key is good until the earliest of its expiry and its ends. A session is never better than the
-- key that it was opened with.

SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true);

CREATE TABLE access_key (
    key_id        text PRIMARY KEY CHECK (key_id ~ '^[0-9a-f]{16}$'),
    root_id       text NOT NULL,
    name          text NOT NULL,
    scopes        text[] NOT NULL CHECK (cardinality(scopes) > 0
        AND scopes <@ ARRAY['viewer', 'operator', 'approver', 'admin']),
    namespaces    text[] NOT NULL CHECK (cardinality(namespaces) > 0
        AND ('*' <> ALL (namespaces) OR cardinality(namespaces) = 1)),
    secret_sha256 bytea NOT NULL CHECK (octet_length(secret_sha256) = 32),
    expires_at    timestamptz CHECK (expires_at BETWEEN '2000-01-01Z' AND '9000-01-01Z'),
    replaces      text,
    created_by    text NOT NULL,
    created_by_key text,
    created_at    timestamptz NOT NULL DEFAULT orbit_now()
);
CREATE INDEX access_key_newest ON access_key (created_at DESC, key_id DESC);
COMMENT ON INDEX access_key_newest IS 'keys.list_keys: the newest first';
CREATE INDEX access_key_made ON access_key (created_by_key) WHERE created_by_key IS NOT NULL;
COMMENT ON INDEX access_key_made IS 'keys.descendants: what a key made';
COMMENT ON TABLE access_key IS 'A key as it was made: its scopes, in the namespaces named or in all ("*"). root_id is the first key of its rotations, whoever holds which: two keys of one root are one person. created_by_key is the key that made it, if one did.';

CREATE TABLE access_key_end (
    key_id     text NOT NULL,
    kind       text NOT NULL CHECK (kind IN ('rotated', 'revoked')),
    ends_at    timestamptz NOT NULL CHECK (ends_at BETWEEN '2000-01-01Z' AND '9000-01-01Z'),
    reason     text,
    ended_by   text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT orbit_now(),
    PRIMARY KEY (key_id, kind)
);
COMMENT ON TABLE access_key_end IS 'Until when a key is good, since it was rotated or revoked.';

CREATE TABLE access_use (
    key_id       text PRIMARY KEY,
    last_used_at timestamptz
);
COMMENT ON TABLE access_use IS 'When a key was last used, to the minute.';

CREATE TABLE access_link (
    code_sha256 bytea PRIMARY KEY,
    key_id      text NOT NULL,
    expires_at  timestamptz NOT NULL
);
CREATE INDEX access_link_expired ON access_link (expires_at);
COMMENT ON INDEX access_link_expired IS 'sessions.delete_expired_links: those that nobody followed';
COMMENT ON TABLE access_link IS 'A link that opens one session, until it is followed or expires.';

CREATE TABLE access_session (
    session_sha256 bytea PRIMARY KEY,
    key_id         text NOT NULL,
    expires_at     timestamptz NOT NULL
);
CREATE INDEX access_session_expired ON access_session (expires_at);
COMMENT ON INDEX access_session_expired IS 'sessions.delete_expired_sessions: those that are over';
COMMENT ON TABLE access_session IS 'A session of a browser, until it ends or expires.';

-- Instants that people name: each can be read back by every client. Older rows stay as they are.
ALTER TABLE requeue_batch ADD CONSTRAINT instants_are_readable CHECK (
    since_at BETWEEN '2000-01-01Z' AND '9000-01-01Z'
    AND until_at BETWEEN '2000-01-01Z' AND '9000-01-01Z') NOT VALID;
ALTER TABLE namespace_halt ADD CONSTRAINT instants_are_readable CHECK (
    until_at BETWEEN '2000-01-01Z' AND '9000-01-01Z');
ALTER TABLE namespace_fence ADD CONSTRAINT instants_are_readable CHECK (
    until_at BETWEEN '2000-01-01Z' AND '9000-01-01Z');

-- What follows a fact of a table without partitions is in that fact's namespace, or there is none.
ALTER TABLE requeue_batch_end ADD CONSTRAINT an_end_has_its_batch
    FOREIGN KEY (namespace, batch_id) REFERENCES requeue_batch NOT VALID;
ALTER TABLE requeue_lease ADD CONSTRAINT a_lease_has_its_batch
    FOREIGN KEY (namespace, batch_id) REFERENCES requeue_batch NOT VALID;
ALTER TABLE dead_letter_decision ADD CONSTRAINT a_decision_has_its_batch
    FOREIGN KEY (namespace, batch_id) REFERENCES requeue_batch NOT VALID;

CREATE INDEX schedule_slot_of_namespace
    ON schedule_slot (namespace, slot_at DESC, run_profile_id DESC);
COMMENT ON INDEX schedule_slot_of_namespace IS 'reading.slot_window_of_namespaces: the last slots of some namespaces';
CREATE INDEX dead_letter_dispatch_of_namespace
    ON dead_letter_dispatch (namespace, created_at DESC, job_id DESC);
COMMENT ON INDEX dead_letter_dispatch_of_namespace IS 'reading.dead_letter_window_of_namespaces: those of some namespaces that died last';

SELECT orbit_append_only(fact::regclass) FROM unnest(ARRAY['access_key', 'access_key_end']) AS fact;
