-- Telemetry: what happened, in an order that a reader can keep a place in.
--
--   telemetry_event     fact: one event, written by the transaction that it tells of
--   telemetry_batch     fact: the positions that the events of one statement and namespace have
--   telemetry_pending   lease: batches that are committed and have no positions yet
--   telemetry_sequencer lease: which node numbers, and the last position given
--   telemetry_consumer  lease: up to where each stored consumer has read
--   telemetry_archive   fact: events whose partition was dropped, as compressed lines
--   outcome_key         fact: an outcome that was reported, once for ever
--
-- A writer never numbers: an open transaction would hold up all others, or its row would appear
-- behind a reader who has passed. One sequencer numbers batches after they are committed, so a
-- position that can be read is never followed by a lower one. An event's position is its batch's
-- last one less what of the batch comes after it; the events of one batch are committed together.

SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true);

CREATE SEQUENCE telemetry_batch_number;

CREATE FUNCTION orbit_new_batch() RETURNS uuid
    LANGUAGE sql VOLATILE
    RETURN (lpad(to_hex(floor(extract(epoch FROM orbit_now()) * 1000)::bigint), 12, '0') || '70008'
        || lpad(to_hex(nextval('telemetry_batch_number')), 15, '0'))::uuid;
COMMENT ON FUNCTION orbit_new_batch() IS 'A UUIDv7 whose last digits count: batches of one millisecond keep their order.';

CREATE TABLE telemetry_event (
    namespace      text NOT NULL,
    batch_id       uuid NOT NULL,
    ordinal        int NOT NULL CHECK (ordinal >= 1),
    event_type     text NOT NULL,
    occurred_at    timestamptz NOT NULL DEFAULT orbit_now(),
    profile_id     text,
    run_profile_id text,
    run_id         uuid,
    metadata       jsonb NOT NULL DEFAULT '{}',
    PRIMARY KEY (namespace, batch_id, ordinal)
) PARTITION BY RANGE (batch_id);
COMMENT ON TABLE telemetry_event IS 'Something that happened. run_id is a cycle''s; metadata never holds a payload or somebody''s text. Its position stands in telemetry_stream.';

CREATE TABLE telemetry_batch (
    namespace     text NOT NULL,
    batch_id      uuid NOT NULL,
    events        int NOT NULL CHECK (events >= 1),
    last_position bigint NOT NULL,
    sequenced_at  timestamptz NOT NULL DEFAULT orbit_now(),
    PRIMARY KEY (namespace, batch_id)
) PARTITION BY RANGE (batch_id);
CREATE INDEX telemetry_batch_by_position ON telemetry_batch (last_position);
COMMENT ON INDEX telemetry_batch_by_position IS 'telemetry.window: what follows a position, over all namespaces';
CREATE INDEX telemetry_batch_of_namespace ON telemetry_batch (namespace, last_position);
COMMENT ON INDEX telemetry_batch_of_namespace IS 'telemetry.window_of_namespaces: what follows a position in some namespaces';
COMMENT ON TABLE telemetry_batch IS 'The positions of a batch''s events: dense over the installation, given after the commit.';

CREATE TABLE telemetry_pending (
    batch_id  uuid NOT NULL,
    namespace text NOT NULL,
    events    int NOT NULL,
    PRIMARY KEY (namespace, batch_id)
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000);
CREATE INDEX telemetry_pending_oldest ON telemetry_pending (batch_id, namespace);
COMMENT ON INDEX telemetry_pending_oldest IS 'telemetry.number_batches, telemetry.look: the oldest first';
COMMENT ON TABLE telemetry_pending IS 'Batches without positions; the sequencer takes them away.';

CREATE TABLE telemetry_sequencer (
    singleton     boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    last_position bigint NOT NULL DEFAULT 0,
    node_id       uuid,
    due_at        timestamptz NOT NULL DEFAULT '-infinity'
) WITH (fillfactor = 10, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000);
COMMENT ON TABLE telemetry_sequencer IS 'Who numbers, until when, and the last position given. Who locks the row numbers, so two never do.';

CREATE TABLE telemetry_consumer (
    name       text PRIMARY KEY,
    namespaces text[],
    position   bigint NOT NULL CHECK (position >= 0),
    moved_at   timestamptz NOT NULL DEFAULT orbit_now()
);
COMMENT ON TABLE telemetry_consumer IS 'Up to which position each stored consumer has read; retention drops nothing after the lowest.';

CREATE TABLE telemetry_archive (
    week           date NOT NULL,
    chunk          int NOT NULL CHECK (chunk >= 1),
    first_position bigint NOT NULL,
    last_position  bigint NOT NULL,
    events         int NOT NULL,
    sha256         bytea NOT NULL CHECK (octet_length(sha256) = 32),
    content        bytea NOT NULL,
    archived_at    timestamptz NOT NULL DEFAULT orbit_now(),
    PRIMARY KEY (week, chunk)
);
ALTER TABLE telemetry_archive ALTER COLUMN content SET STORAGE EXTERNAL;
COMMENT ON TABLE telemetry_archive IS 'Events of a week that was dropped: gzip of JSON lines in order of position; the digest is of the lines.';

CREATE TABLE outcome_key (
    namespace  text NOT NULL,
    outcome_id text NOT NULL,
    digest     text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT orbit_now(),
    PRIMARY KEY (namespace, outcome_id)
);
COMMENT ON TABLE outcome_key IS 'What makes a second report of one outcome impossible; the digest is of what it said.';

CREATE VIEW telemetry_stream AS
SELECT batch.last_position - batch.events + event.ordinal AS position, event.namespace,
    event.batch_id || '-' || event.ordinal AS event_id, event.event_type, event.occurred_at,
    event.profile_id, event.run_profile_id, event.run_id, event.metadata,
    batch.sequenced_at
FROM telemetry_batch batch JOIN telemetry_event event
    ON event.namespace = batch.namespace AND event.batch_id = batch.batch_id;
COMMENT ON VIEW telemetry_stream IS 'Events with their positions.';

-- How many of a job's, and a cycle's, attempts nobody knows the end of: told at the end.
ALTER TABLE dispatch_lease ADD COLUMN unknown int NOT NULL DEFAULT 0;
ALTER TABLE cycle_lease ADD COLUMN unknown int NOT NULL DEFAULT 0;

CREATE FUNCTION orbit_drop_telemetry(week date, is_forced boolean) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT SET lock_timeout = '2s' AS $$
DECLARE
    suffix text := '_p' || to_char(week, 'YYYYMMDD');
    last bigint;
BEGIN
    -- Runs with the owner's rights, so it is here that what somebody has yet to read is kept.
    IF to_regclass('telemetry_event' || suffix) IS NULL THEN
        RETURN NULL;
    END IF;
    IF ((week + 7)::timestamp AT TIME ZONE 'UTC' <= orbit_now() - interval '1 day') IS NOT TRUE THEN
        RAISE EXCEPTION 'events of the last day are not dropped: the week of % is too late', week
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('orbit.partitions'));
    EXECUTE format('SELECT COALESCE(max(last_position), 0) FROM %I', 'telemetry_batch' || suffix)
        INTO last;
    IF EXISTS (SELECT FROM telemetry_pending
            WHERE batch_id < orbit_first_id((week + 7)::timestamp AT TIME ZONE 'UTC')) THEN
        RAISE EXCEPTION 'the week of % has events without a position', week
            USING ERRCODE = 'object_in_use';
    END IF;
    IF NOT is_forced AND EXISTS (SELECT FROM telemetry_consumer WHERE position < last) THEN
        RAISE EXCEPTION 'a consumer has not read the week of %', week
            USING ERRCODE = 'object_in_use';
    END IF;
    EXECUTE format('DROP TABLE %I, %I', 'telemetry_batch' || suffix, 'telemetry_event' || suffix);
    RETURN last;
END
$$;
COMMENT ON FUNCTION orbit_drop_telemetry(date, boolean) IS 'Drops the events of one week (by the Monday it began) and returns their last position; unless forced, not while a stored consumer has some of them before it.';
REVOKE EXECUTE ON FUNCTION orbit_drop_telemetry(date, boolean) FROM PUBLIC;

CREATE OR REPLACE FUNCTION orbit_grant(application name) RETURNS void
    LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
DECLARE
    place text := quote_ident(current_schema());
    lease regclass;
BEGIN
    EXECUTE format('REVOKE CREATE ON SCHEMA %s FROM PUBLIC', place);
    EXECUTE format('GRANT USAGE ON SCHEMA %s TO %I', place, application);
    EXECUTE format('GRANT SELECT, INSERT ON ALL TABLES IN SCHEMA %s TO %I', place, application);
    EXECUTE format('GRANT USAGE ON ALL SEQUENCES IN SCHEMA %s TO %I', place, application);
    EXECUTE format('REVOKE INSERT ON alembic_version FROM %I', application);
    EXECUTE format('GRANT EXECUTE ON FUNCTION orbit_create_partitions(timestamptz), orbit_drop_partitions(regclass, timestamptz), orbit_refresh_statistics(), orbit_drop_telemetry(date, boolean) TO %I', application);
    FOR lease IN
        SELECT oid FROM pg_class
        WHERE relnamespace = current_schema()::regnamespace AND relkind IN ('r', 'p')
            AND relname <> 'alembic_version'
            AND NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = pg_class.oid AND tgname = 'append_only')
    LOOP
        EXECUTE format('GRANT UPDATE, DELETE ON %s TO %I', lease, application);
    END LOOP;
END
$$;

SELECT orbit_append_only(fact::regclass) FROM unnest(ARRAY[
    'telemetry_event', 'telemetry_batch', 'telemetry_archive', 'outcome_key']) AS fact;
INSERT INTO telemetry_sequencer DEFAULT VALUES;
SELECT orbit_create_partitions(orbit_now() + interval '21 days');
