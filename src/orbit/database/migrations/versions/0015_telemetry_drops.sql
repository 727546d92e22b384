-- Telemetry: drops one after another, of nothing that came meanwhile; and events' versions.
--
-- The function took a week for there before it had waited for another's drop, and asked for its
-- last position before the tables were locked: a batch that was numbered between was dropped unread.
--
-- An event keeps the version of its type that was current when it was written.

SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true);

CREATE OR REPLACE FUNCTION orbit_drop_telemetry(week date, is_forced boolean) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT SET lock_timeout = '2s' AS $$
DECLARE
    suffix text := '_p' || to_char(week, 'YYYYMMDD');
    last bigint;
BEGIN
    -- Runs with the owner's rights, so it is here that what somebody has yet to read is kept.
    PERFORM pg_advisory_xact_lock(hashtext('orbit.partitions'));
    IF to_regclass('telemetry_event' || suffix) IS NULL THEN
        RETURN NULL;
    END IF;
    IF ((week + 7)::timestamp AT TIME ZONE 'UTC' <= orbit_now() - interval '1 day') IS NOT TRUE THEN
        RAISE EXCEPTION 'events of the last day are not dropped: the week of % is too late', week
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    -- A partition's drop locks its parent before it: so here, or readers would wait in a circle.
    LOCK TABLE ONLY telemetry_batch, ONLY telemetry_event IN ACCESS EXCLUSIVE MODE;
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

ALTER TABLE telemetry_event ADD COLUMN version smallint NOT NULL DEFAULT 1;
COMMENT ON COLUMN telemetry_event.version IS 'Of its type, as the catalogue had it.';

CREATE OR REPLACE VIEW telemetry_stream AS
SELECT batch.last_position - batch.events + event.ordinal AS position, event.namespace,
    event.batch_id || '-' || event.ordinal AS event_id, event.event_type, event.occurred_at,
    event.profile_id, event.run_profile_id, event.run_id, event.metadata,
    batch.sequenced_at, event.version
FROM telemetry_batch batch JOIN telemetry_event event
    ON event.namespace = batch.namespace AND event.batch_id = batch.batch_id;
