-- Signals: what the detector said of profiles, and what it has to remember in order to go on.
--
--   advisory_signal  fact: a signal, or the alarm that data stay away; it changes nothing
--   signal_feed      lease: how far a namespace's events were fed, and what belongs to no stream
--   signal_stream    lease: the state of one stream
--
-- The leases can be rebuilt from telemetry, and are then the same byte for byte. A signal's id is
-- derived from what it says, so what is computed again is not told again.

CREATE TABLE advisory_signal (
    namespace        text NOT NULL,
    signal_id        text NOT NULL CHECK (signal_id ~ '^[0-9a-f]{32}$'),
    profile_id       text NOT NULL,
    revision         text NOT NULL,
    metric           text NOT NULL,
    name             text NOT NULL CHECK (name IN ('elevated_performance', 'low_performance',
        'stable', 'no_data')),
    alarm_level      text NOT NULL CHECK (alarm_level IN ('none', 'notice', 'warning', 'critical')),
    confidence       float8 CHECK (confidence BETWEEN 0 AND 1),
    from_position    bigint NOT NULL,
    to_position      bigint NOT NULL,
    detector_version int NOT NULL,
    body             text NOT NULL,
    computed_at      timestamptz NOT NULL DEFAULT orbit_now(),
    PRIMARY KEY (namespace, signal_id),
    CHECK ((name = 'no_data') = (confidence IS NULL)),
    CHECK (from_position <= to_position)
);
CREATE INDEX advisory_signal_newest
    ON advisory_signal (profile_id, to_position DESC, signal_id DESC);
COMMENT ON INDEX advisory_signal_newest IS 'signals.signal_window: a profile''s signals, the newest first';
COMMENT ON TABLE advisory_signal IS 'A signal as it was said: body is canonical JSON with all that it rests on, the same bytes whenever it is computed again.';

CREATE TABLE signal_feed (
    namespace        text PRIMARY KEY,
    detector_version int NOT NULL,
    position         bigint NOT NULL,
    state            text
);
COMMENT ON TABLE signal_feed IS 'How far a namespace''s events were fed; state is canonical JSON, null before the first. Its row is locked while events are fed.';

CREATE TABLE signal_stream (
    namespace  text NOT NULL,
    profile_id text NOT NULL,
    revision   text NOT NULL,
    metric     text NOT NULL,
    state      text NOT NULL,
    PRIMARY KEY (namespace, profile_id, revision, metric)
);
COMMENT ON TABLE signal_stream IS 'The state of one stream as canonical JSON.';

SELECT orbit_append_only('advisory_signal');
