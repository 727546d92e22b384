-- Lanes: what all nodes share of a namespace's queue for an endpoint.
--
--   lane          lease: the breaker's count and hold, the rate's tokens
--   lane_tally    lease: how many attempts came to what; several rows a lane, so that nodes that
--                 settle at once do not wait for each other
--   lane_change   fact: each time a breaker opened, held on, or closed
--
-- A job's first attempt and its later ones wait apart (dispatch_lease.is_retry), so that each
-- has a share of the lane. An attempt that probes a held lane is not counted against the job.

SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true);

CREATE TABLE lane (
    namespace       text NOT NULL,
    endpoint_key    text NOT NULL,
    failures        int NOT NULL DEFAULT 0,
    window_at       timestamptz NOT NULL DEFAULT orbit_now(),
    window_attempts int NOT NULL DEFAULT 0,
    window_failures int NOT NULL DEFAULT 0,
    holds           int NOT NULL DEFAULT 0,
    probe_at        timestamptz,
    tokens          double precision,
    tokens_at       timestamptz NOT NULL DEFAULT orbit_now(),
    PRIMARY KEY (namespace, endpoint_key)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000);
COMMENT ON TABLE lane IS 'A namespace''s queue for an endpoint: failures in a row and within the window; while probe_at is set the breaker is open, and one job is tried from then on; tokens are those of the rate (null: full).';

CREATE TABLE lane_tally (
    namespace    text NOT NULL,
    endpoint_key text NOT NULL,
    part         int NOT NULL,
    delivered    bigint NOT NULL DEFAULT 0,
    failed       bigint NOT NULL DEFAULT 0,
    not_sent     bigint NOT NULL DEFAULT 0,
    unknown      bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (namespace, endpoint_key, part)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000);
COMMENT ON TABLE lane_tally IS 'Receipts of a lane by outcome, kept as they are written; the parts add up.';

CREATE TABLE lane_change (
    namespace    text NOT NULL,
    change_id    uuid NOT NULL DEFAULT gen_random_uuid(),
    endpoint_key text NOT NULL,
    change       text NOT NULL CHECK (change IN ('opened', 'held', 'closed')),
    failures     int NOT NULL,
    window_attempts int NOT NULL,
    window_failures int NOT NULL,
    hold_seconds double precision,
    node_id      uuid NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT orbit_now(),
    PRIMARY KEY (namespace, change_id)
);
COMMENT ON TABLE lane_change IS 'A lane''s breaker opened, held on after a probe that failed, or closed.';
CREATE INDEX lane_change_newest ON lane_change (namespace, endpoint_key, created_at DESC);
COMMENT ON INDEX lane_change_newest IS 'reading.lane_changes: the history of a lane';
SELECT orbit_append_only('lane_change'::regclass);

ALTER TABLE dispatch_lease
    ADD COLUMN is_retry boolean NOT NULL DEFAULT false,
    ADD COLUMN is_probe boolean NOT NULL DEFAULT false,
    ADD COLUMN spared int NOT NULL DEFAULT 0;
UPDATE dispatch_lease SET is_retry = true WHERE attempt > 0 AND NOT (attempt = 1 AND node_id IS NOT NULL);
COMMENT ON COLUMN dispatch_lease.spared IS 'Attempts that are not counted against the job, since they probed a held lane.';

DROP INDEX dispatch_lease_ready;
CREATE INDEX dispatch_lease_ready ON dispatch_lease (namespace, endpoint_key, is_retry, due_at) WHERE node_id IS NULL;
COMMENT ON INDEX dispatch_lease_ready IS 'dispatch.busy_lanes, dispatch.claim_jobs: what each lane has due, first attempts and later ones';
DROP INDEX dispatch_lease_taken;
CREATE INDEX dispatch_lease_taken ON dispatch_lease (namespace, endpoint_key, due_at) WHERE node_id IS NOT NULL;
COMMENT ON INDEX dispatch_lease_taken IS 'dispatch.claim_jobs: what a lane has under way; dispatch.expired_jobs: attempts whose worker is gone';

ALTER TABLE endpoint_snapshot
    ADD COLUMN on_unknown text NOT NULL DEFAULT 'retry' CHECK (on_unknown IN ('retry', 'hold'));

ALTER TABLE delivery_receipt
    ADD COLUMN endpoint_key text,
    ADD COLUMN is_probe boolean NOT NULL DEFAULT false,
    ADD COLUMN is_reused boolean;
COMMENT ON COLUMN delivery_receipt.endpoint_key IS 'Where the attempt went; receipts from before this column have it in their job.';
COMMENT ON COLUMN delivery_receipt.is_probe IS 'The attempt probed a held lane, and is not counted against the job.';
COMMENT ON COLUMN delivery_receipt.is_reused IS 'The attempt went out on a connection that was open already.';

CREATE VIEW lane_status AS
SELECT lane.namespace, lane.endpoint_key,
    CASE WHEN lane.probe_at IS NULL THEN 'closed' ELSE 'open' END AS breaker, lane.probe_at,
    lane.failures, lane.holds, queue.waiting, queue.in_flight,
    tally.delivered, tally.failed, tally.not_sent, tally.unknown
FROM lane
CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE node_id IS NULL) AS waiting,
        count(*) FILTER (WHERE node_id IS NOT NULL) AS in_flight
    FROM dispatch_lease WHERE dispatch_lease.namespace = lane.namespace
        AND dispatch_lease.endpoint_key = lane.endpoint_key
) queue
CROSS JOIN LATERAL (
    SELECT COALESCE(sum(delivered), 0)::bigint AS delivered, COALESCE(sum(failed), 0)::bigint AS failed,
        COALESCE(sum(not_sent), 0)::bigint AS not_sent, COALESCE(sum(unknown), 0)::bigint AS unknown
    FROM lane_tally WHERE lane_tally.namespace = lane.namespace
        AND lane_tally.endpoint_key = lane.endpoint_key
) tally;
COMMENT ON VIEW lane_status IS 'Each lane with its breaker, its queue and what its attempts came to.';

-- A table that is not append-only is a lease.
CREATE OR REPLACE FUNCTION orbit_grant(application name) RETURNS void
    LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
DECLARE
    place text := quote_ident(current_schema());
    lease regclass;
BEGIN
    EXECUTE format('REVOKE CREATE ON SCHEMA %s FROM PUBLIC', place);
    EXECUTE format('GRANT USAGE ON SCHEMA %s TO %I', place, application);
    EXECUTE format('GRANT SELECT, INSERT ON ALL TABLES IN SCHEMA %s TO %I', place, application);
    EXECUTE format('REVOKE INSERT ON alembic_version FROM %I', application);
    EXECUTE format('GRANT EXECUTE ON FUNCTION orbit_create_partitions(timestamptz), orbit_drop_partitions(regclass, timestamptz), orbit_refresh_statistics() TO %I', application);
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
