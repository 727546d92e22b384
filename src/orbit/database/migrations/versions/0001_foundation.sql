-- Orbit's foundation. A tour:
--
--   Facts are inserted once and never changed: orbit_append_only() puts a trigger on each that
--   refuses UPDATE, DELETE and TRUNCATE, also for a superuser and under replication roles.
--   Leases are narrow, mutable and disposable: they say who may act next, and when.
--
--   Facts with many rows are partitioned by the time inside their UUIDv7 key, week by week.
--   What belongs to a cycle has an id made in, or derived from, the cycle's time, so a cycle's
--   rows lie together and are dropped together. There is no default partition:
--   orbit_create_partitions() makes them ahead.
--
--   Keys begin with the namespace: no row of one namespace can stand for another's.
--   Every index has a comment that names the query it is for.

-- Functions that run as the owner keep this path: a session's temporary tables come last in it,
-- so that none of them can stand for one of ours.
SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true);

-- ---------------------------------------------------------------- time

CREATE FUNCTION orbit_now() RETURNS timestamptz
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN statement_timestamp();
COMMENT ON FUNCTION orbit_now() IS 'The time of all stored facts. Tests replace it to move time.';

CREATE FUNCTION orbit_first_id(at timestamptz) RETURNS uuid
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
    RETURN (lpad(to_hex(floor(extract(epoch FROM at) * 1000)::bigint), 12, '0') || repeat('0', 20))::uuid;
COMMENT ON FUNCTION orbit_first_id(timestamptz) IS 'The lowest UUIDv7 of a millisecond: where a time partition begins.';

CREATE FUNCTION orbit_id_time(id uuid) RETURNS timestamptz
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
    RETURN to_timestamp(('x' || lpad(substr(replace(id::text, '-', ''), 1, 12), 16, '0'))::bit(64)::bigint / 1000.0);
COMMENT ON FUNCTION orbit_id_time(uuid) IS 'When a UUIDv7 was made.';

CREATE FUNCTION orbit_stage_number(stage text) RETURNS int
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
    RETURN array_position(ARRAY['cycle_started', 'tier1_complete', 'tier2_complete',
        'tier3_complete', 'normalization_complete', 'dispatch_enqueued', 'dispatch_complete',
        'cycle_finished', 'cycle_failed'], stage);
COMMENT ON FUNCTION orbit_stage_number(text) IS 'The order of a cycle''s stages.';

-- ---------------------------------------------------------------- append-only

CREATE FUNCTION orbit_refuse_change() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'facts are append-only: % of % is refused', TG_OP, TG_TABLE_NAME
        USING ERRCODE = 'insufficient_privilege';
END
$$;

CREATE FUNCTION orbit_append_only(fact regclass) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON %s
        FOR EACH STATEMENT EXECUTE FUNCTION orbit_refuse_change()', fact);
    EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER append_only', fact);
END
$$;

-- ---------------------------------------------------------------- facts: configuration

CREATE TABLE config_revision (
    revision   text PRIMARY KEY CHECK (revision ~ '^[0-9a-f]{64}$'),
    body       text NOT NULL,
    node_id    uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT orbit_now()
);
COMMENT ON TABLE config_revision IS 'A whole configuration as canonical JSON, under its SHA-256.';

CREATE TABLE config_activation (
    activation_id uuid PRIMARY KEY,
    revision      text NOT NULL REFERENCES config_revision,
    reason        text NOT NULL,
    node_id       uuid NOT NULL,
    activated_at  timestamptz NOT NULL DEFAULT orbit_now()
);
COMMENT ON TABLE config_activation IS 'When which revision came into force; the last one is.';

CREATE TABLE endpoint_snapshot (
    namespace           text NOT NULL,
    snapshot_id         text NOT NULL,
    endpoint_key        text NOT NULL,
    url                 text NOT NULL,
    method              text NOT NULL,
    secrets_encrypted   bytea NOT NULL,
    token_fingerprint   text,
    timeout_seconds     double precision NOT NULL,
    permanent_statuses  int[] NOT NULL,
    created_at          timestamptz NOT NULL DEFAULT orbit_now(),
    PRIMARY KEY (namespace, snapshot_id)
);
COMMENT ON TABLE endpoint_snapshot IS 'An endpoint as it stood when a job was enqueued, under the digest of its definition. Token, headers and the URL with its query are encrypted together; url is without it.';

-- ---------------------------------------------------------------- facts: cycles

CREATE TABLE initiation_key (
    namespace      text NOT NULL,
    run_profile_id text NOT NULL,
    hash           text NOT NULL,
    cycle_id       uuid NOT NULL,
    request_digest text NOT NULL,
    PRIMARY KEY (namespace, run_profile_id, hash)
);
COMMENT ON TABLE initiation_key IS 'What makes a second execution impossible: one row per initiation hash, for ever. A raw cycle has the empty run profile.';

CREATE TABLE schedule_slot (
    namespace      text NOT NULL,
    run_profile_id text NOT NULL,
    slot_at        timestamptz NOT NULL,
    outcome        text NOT NULL CHECK (outcome IN
        ('fired', 'missed', 'coalesced', 'paused', 'halted', 'overlapped', 'disabled')),
    reason         text NOT NULL,
    cycle_id       uuid,
    node_id        uuid NOT NULL,
    decided_at     timestamptz NOT NULL DEFAULT orbit_now(),
    PRIMARY KEY (namespace, run_profile_id, slot_at),
    CONSTRAINT only_a_fired_slot_has_a_cycle CHECK ((outcome = 'fired') = (cycle_id IS NOT NULL))
);
CREATE INDEX schedule_slot_by_time ON schedule_slot (slot_at DESC);
COMMENT ON INDEX schedule_slot_by_time IS 'reading.slot_window, reading.slots_not_fired: the last slots of all schedules';
COMMENT ON TABLE schedule_slot IS 'One row for every slot of every schedule, fired or not, with the reason.';

CREATE TABLE cycle_run (
    namespace       text NOT NULL,
    cycle_id        uuid NOT NULL,
    profile_id      text,
    run_profile_id  text NOT NULL DEFAULT '',
    trigger         text NOT NULL CHECK (trigger IN ('schedule', 'api', 'cli', 'rerun')),
    slot_at         timestamptz,
    idempotency_key text,
    revision        text,
    endpoint_keys   text[],
    value_tags      jsonb NOT NULL DEFAULT '{}',
    traceparent     text NOT NULL,
    rerun_of        uuid,
    node_id         uuid NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT orbit_now(),
    PRIMARY KEY (namespace, cycle_id)
) PARTITION BY RANGE (cycle_id);
CREATE INDEX cycle_run_newest ON cycle_run (cycle_id DESC);
COMMENT ON INDEX cycle_run_newest IS 'reading.cycle_window, reading.find_cycle: newest first over all namespaces, and one by its id alone';
CREATE INDEX cycle_run_by_rerun ON cycle_run (namespace, rerun_of) WHERE rerun_of IS NOT NULL;
COMMENT ON INDEX cycle_run_by_rerun IS 'reading.cycle_reruns: the cycles run in place of one';
COMMENT ON TABLE cycle_run IS 'An accepted trigger: one pass of the pipeline, pinned to the revision it began with.';

CREATE TABLE initiation (
    namespace  text NOT NULL,
    cycle_id   uuid NOT NULL,
    hash       text NOT NULL,
    context    text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT orbit_now(),
    PRIMARY KEY (namespace, cycle_id)
) PARTITION BY RANGE (cycle_id);
COMMENT ON TABLE initiation IS 'A cycle''s deterministic first object: canonical JSON, and its SHA-256.';

CREATE TABLE payload (
    namespace text NOT NULL,
    cycle_id  uuid NOT NULL,
    digest    text NOT NULL,
    content   bytea NOT NULL,
    PRIMARY KEY (namespace, cycle_id, digest)
) PARTITION BY RANGE (cycle_id);
-- Payloads are opaque: no time is spent on trying to compress them.
ALTER TABLE payload ALTER COLUMN content SET STORAGE EXTERNAL;
COMMENT ON TABLE payload IS 'Opaque bytes under their SHA-256, written once per cycle however many stages, items and jobs name them.';

CREATE TABLE cycle_checkpoint (
    namespace    text NOT NULL,
    cycle_id     uuid NOT NULL,
    stage        text NOT NULL CHECK (orbit_stage_number(stage) IS NOT NULL),
    digest       text,
    content_type text,
    size         int,
    detail       jsonb NOT NULL DEFAULT '{}',
    lease_number int NOT NULL,
    node_id      uuid NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT orbit_now(),
    PRIMARY KEY (namespace, cycle_id, stage)
) PARTITION BY RANGE (cycle_id);
COMMENT ON TABLE cycle_checkpoint IS 'A stage of a cycle is done; names its output''s payload.';

CREATE TABLE normalized_item (
    namespace    text NOT NULL,
    cycle_id     uuid NOT NULL,
    item_index   int NOT NULL CHECK (item_index >= 0),
    digest       text NOT NULL,
    content_type text NOT NULL,
    size         int NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT orbit_now(),
    PRIMARY KEY (namespace, cycle_id, item_index)
) PARTITION BY RANGE (cycle_id);
COMMENT ON TABLE normalized_item IS 'A normalised payload: what dispatch sends, once per endpoint.';

CREATE TABLE execution_record (
    namespace        text NOT NULL,
    cycle_id         uuid NOT NULL,
    stage            text NOT NULL,
    step             int NOT NULL,
    lease_number     int NOT NULL,
    attempt          int NOT NULL,
    name             text NOT NULL,
    outcome          text NOT NULL CHECK (outcome IN ('succeeded', 'failed')),
    error            text,
    duration_seconds double precision NOT NULL,
    input_size       int NOT NULL,
    output_size      int,
    node_id          uuid NOT NULL,
    created_at       timestamptz NOT NULL DEFAULT orbit_now(),
    PRIMARY KEY (namespace, cycle_id, stage, step, lease_number, attempt)
) PARTITION BY RANGE (cycle_id);
COMMENT ON TABLE execution_record IS 'One call of a transformation or normaliser: how long it took and what became of it.';

CREATE TABLE value_ledger_entry (
    namespace      text NOT NULL,
    cycle_id       uuid NOT NULL,
    profile_id     text NOT NULL,
    run_profile_id text NOT NULL,
    state          text NOT NULL CHECK (state IN ('finished', 'failed')),
    tags           jsonb NOT NULL,
    items          int NOT NULL,
    jobs           int NOT NULL,
    delivered      int NOT NULL,
    dead_lettered  int NOT NULL,
    attempts       int NOT NULL,
    bytes          bigint NOT NULL,
    wall_seconds   double precision NOT NULL,
    created_at     timestamptz NOT NULL DEFAULT orbit_now(),
    PRIMARY KEY (namespace, cycle_id)
) PARTITION BY RANGE (cycle_id);
COMMENT ON TABLE value_ledger_entry IS 'What one run profile execution was for (tags) and what it took; bytes are those of the attempts, one body each.';

-- ---------------------------------------------------------------- facts: dispatch

CREATE TABLE dispatch_job (
    namespace      text NOT NULL,
    job_id         uuid NOT NULL,
    cycle_id       uuid NOT NULL,
    item_index     int NOT NULL,
    endpoint_key   text NOT NULL,
    snapshot_id    text NOT NULL,
    digest         text NOT NULL,
    content_type   text NOT NULL,
    size           int NOT NULL,
    max_attempts   int NOT NULL CHECK (max_attempts >= 1),
    requeued_from  uuid,
    created_at     timestamptz NOT NULL DEFAULT orbit_now(),
    PRIMARY KEY (namespace, job_id)
) PARTITION BY RANGE (job_id);
CREATE INDEX dispatch_job_by_cycle ON dispatch_job (cycle_id);
COMMENT ON INDEX dispatch_job_by_cycle IS 'reading.cycle_jobs: the jobs of one cycle';
COMMENT ON TABLE dispatch_job IS 'One item for one endpoint, bound to the endpoint''s snapshot. Its id derives from cycle, item and endpoint, so it exists once.';

CREATE TABLE delivery_receipt (
    namespace           text NOT NULL,
    job_id              uuid NOT NULL,
    attempt             int NOT NULL CHECK (attempt >= 1),
    outcome             text NOT NULL CHECK (outcome IN ('delivered', 'failed', 'not_sent', 'unknown')),
    status              int,
    error               text,
    digest              text NOT NULL,
    size                int NOT NULL,
    queue_seconds       double precision,
    connect_seconds     double precision,
    first_byte_seconds  double precision,
    total_seconds       double precision,
    answer              bytea,
    answer_content_type text,
    lease_number        int NOT NULL,
    node_id             uuid NOT NULL,
    started_at          timestamptz,
    created_at          timestamptz NOT NULL DEFAULT orbit_now(),
    PRIMARY KEY (namespace, job_id, attempt)
) PARTITION BY RANGE (job_id);
COMMENT ON TABLE delivery_receipt IS 'What became of one attempt on the wire; at most the first 4 KiB of the answer.';

CREATE TABLE dead_letter_dispatch (
    namespace    text NOT NULL,
    job_id       uuid NOT NULL,
    cycle_id     uuid NOT NULL,
    endpoint_key text NOT NULL,
    cause        text NOT NULL,
    attempts     int NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT orbit_now(),
    PRIMARY KEY (namespace, job_id)
) PARTITION BY RANGE (job_id);
CREATE INDEX dead_letter_dispatch_newest ON dead_letter_dispatch (job_id DESC);
COMMENT ON INDEX dead_letter_dispatch_newest IS 'reading.dead_letter_window, dead_letters.dead_letter: newest first over all namespaces, and one by its id alone';
COMMENT ON TABLE dead_letter_dispatch IS 'A job out of retries; only a person brings it back, as a new job that names it.';

CREATE TABLE dead_letter_decision (
    namespace  text NOT NULL,
    job_id     uuid NOT NULL,
    sequence   int NOT NULL CHECK (sequence >= 1),
    decision   text NOT NULL CHECK (decision IN ('requeued', 'discarded')),
    new_job_id uuid,
    reason     text NOT NULL,
    decided_at timestamptz NOT NULL DEFAULT orbit_now(),
    PRIMARY KEY (namespace, job_id, sequence)
);
COMMENT ON TABLE dead_letter_decision IS 'What a person decided about a dead letter. The sequence makes a second requeue a key conflict unless it is forced.';

-- ---------------------------------------------------------------- leases

CREATE TABLE node (
    node_id        uuid PRIMARY KEY,
    name           text NOT NULL,
    address        text,
    roles          text[] NOT NULL,
    version        text NOT NULL,
    files_revision text,
    is_draining    boolean NOT NULL DEFAULT false,
    started_at     timestamptz NOT NULL DEFAULT orbit_now(),
    seen_at        timestamptz NOT NULL DEFAULT orbit_now()
);
COMMENT ON TABLE node IS 'Which nodes live; a row unseen for a lease length is a dead node''s.';

CREATE TABLE config_active (
    singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    revision  text NOT NULL REFERENCES config_revision
);
COMMENT ON TABLE config_active IS 'The revision in force, the same for all nodes.';

CREATE TABLE schedule (
    namespace      text NOT NULL,
    run_profile_id text NOT NULL,
    definition     text NOT NULL,
    decided_until  timestamptz NOT NULL,
    due_at         timestamptz NOT NULL,
    PRIMARY KEY (namespace, run_profile_id)
);
CREATE INDEX schedule_due ON schedule (due_at);
COMMENT ON INDEX schedule_due IS 'slots.claim_schedules, slots.next_due: which schedules have a slot to decide';
COMMENT ON TABLE schedule IS 'Up to when each schedule''s slots are decided, and when the next must be.';

CREATE TABLE cycle_lease (
    namespace      text NOT NULL,
    cycle_id       uuid NOT NULL,
    run_profile_id text NOT NULL,
    due_at         timestamptz NOT NULL,
    lease_number   int NOT NULL DEFAULT 0,
    recoveries     int NOT NULL DEFAULT 0,
    last_error     text,
    node_id        uuid,
    is_waiting     boolean NOT NULL DEFAULT false,
    items          int NOT NULL DEFAULT 0,
    jobs           int NOT NULL DEFAULT 0,
    outstanding    int,
    delivered      int NOT NULL DEFAULT 0,
    dead_lettered  int NOT NULL DEFAULT 0,
    attempts       int NOT NULL DEFAULT 0,
    bytes          bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (namespace, cycle_id)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000);
-- Partial, so that a look-up by key can use the key's index only: while the table is small all
-- indexes look alike to the planner, and the plan that it then makes is kept when it has grown.
CREATE INDEX cycle_lease_due ON cycle_lease (namespace, due_at) WHERE due_at < 'infinity';
COMMENT ON INDEX cycle_lease_due IS 'cycle.claim_cycles: the due cycles of each namespace';
CREATE INDEX cycle_lease_by_run_profile ON cycle_lease (namespace, run_profile_id, cycle_id)
    WHERE NOT is_waiting;
COMMENT ON INDEX cycle_lease_by_run_profile IS 'slots.busy_run_profiles, cycle.release_waiting: what overlaps';
CREATE INDEX cycle_lease_waiting ON cycle_lease (namespace, run_profile_id, cycle_id) WHERE is_waiting;
COMMENT ON INDEX cycle_lease_waiting IS 'cycle.release_waiting, slots.busy_run_profiles: who waits for a predecessor';
COMMENT ON TABLE cycle_lease IS 'Who may go on with a cycle, and when. due_at = infinity: nobody need (its jobs are out, or it waits). The counters are those of its jobs.';

CREATE TABLE dispatch_lease (
    namespace    text NOT NULL,
    job_id       uuid NOT NULL,
    endpoint_key text NOT NULL,
    cycle_id     uuid NOT NULL,
    due_at       timestamptz NOT NULL,
    lease_number int NOT NULL DEFAULT 0,
    attempt      int NOT NULL DEFAULT 0,
    node_id      uuid,
    is_requeued  boolean NOT NULL DEFAULT false,
    PRIMARY KEY (namespace, job_id)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000);
CREATE INDEX dispatch_lease_ready ON dispatch_lease (namespace, endpoint_key, due_at) WHERE node_id IS NULL;
COMMENT ON INDEX dispatch_lease_ready IS 'dispatch.busy_lanes, dispatch.claim_jobs: what each lane has due';
CREATE INDEX dispatch_lease_taken ON dispatch_lease (due_at) WHERE node_id IS NOT NULL;
COMMENT ON INDEX dispatch_lease_taken IS 'dispatch.expired_jobs: attempts whose worker is gone';
COMMENT ON TABLE dispatch_lease IS 'Who may send a job, and when. With a node, attempt is open: it may be on the wire. A requeued job does not count in its cycle, which has ended for it.';

-- ---------------------------------------------------------------- views

CREATE VIEW cycle_status AS
SELECT run.namespace, run.cycle_id, run.profile_id, run.run_profile_id, run.trigger, run.slot_at,
    run.revision, run.rerun_of, run.created_at,
    CASE last.stage WHEN 'cycle_finished' THEN 'finished' WHEN 'cycle_failed' THEN 'failed'
        ELSE 'running' END AS state,
    last.stage,
    last.created_at AS stage_at,
    CASE WHEN last.stage IN ('cycle_finished', 'cycle_failed') THEN last.created_at END AS ended_at,
    last.detail,
    COALESCE((last.detail ->> 'deadLettered')::int, lease.dead_lettered, 0) AS dead_lettered,
    COALESCE(lease.is_waiting, false) AS is_waiting
FROM cycle_run run
LEFT JOIN LATERAL (
    SELECT checkpoint.stage, checkpoint.created_at, checkpoint.detail
    FROM cycle_checkpoint checkpoint
    WHERE checkpoint.namespace = run.namespace AND checkpoint.cycle_id = run.cycle_id
    ORDER BY orbit_stage_number(checkpoint.stage) DESC
    LIMIT 1
) last ON true
LEFT JOIN cycle_lease lease ON lease.namespace = run.namespace AND lease.cycle_id = run.cycle_id;
COMMENT ON VIEW cycle_status IS 'Each cycle with its state, which is its last checkpoint.';

CREATE VIEW job_status AS
SELECT job.namespace, job.job_id, job.cycle_id, job.item_index, job.endpoint_key, job.digest,
    job.content_type, job.size, job.max_attempts, job.requeued_from, job.created_at,
    snapshot.url, snapshot.method, snapshot.token_fingerprint,
    CASE WHEN last.outcome = 'delivered' THEN 'delivered'
        WHEN dead.job_id IS NOT NULL THEN 'dead_lettered'
        WHEN lease.node_id IS NOT NULL THEN 'in_flight'
        WHEN last.attempt IS NOT NULL THEN 'retrying'
        ELSE 'ready' END AS state,
    GREATEST(COALESCE(last.attempt, 0), COALESCE(lease.attempt, 0)) AS attempts,
    last.outcome AS last_outcome, last.status AS last_status, last.error AS last_error,
    lease.due_at
FROM dispatch_job job
JOIN endpoint_snapshot snapshot
    ON snapshot.namespace = job.namespace AND snapshot.snapshot_id = job.snapshot_id
LEFT JOIN LATERAL (
    SELECT receipt.attempt, receipt.outcome, receipt.status, receipt.error
    FROM delivery_receipt receipt
    WHERE receipt.namespace = job.namespace AND receipt.job_id = job.job_id
    ORDER BY (receipt.outcome = 'delivered') DESC, receipt.attempt DESC
    LIMIT 1
) last ON true
LEFT JOIN dead_letter_dispatch dead ON dead.namespace = job.namespace AND dead.job_id = job.job_id
LEFT JOIN dispatch_lease lease ON lease.namespace = job.namespace AND lease.job_id = job.job_id;
COMMENT ON VIEW job_status IS 'Each job with its state, which is its last receipt or its dead letter, else its lease.';

-- ---------------------------------------------------------------- partitions

CREATE FUNCTION orbit_create_partitions(through timestamptz) RETURNS int
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
DECLARE
    fact regclass;
    week timestamptz;
    partition text;
    made int := 0;
BEGIN
    IF through > orbit_now() + interval '1 year' THEN
        RAISE EXCEPTION 'partitions are made at most a year ahead, not to %', through
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('orbit.partitions'));
    FOR fact IN SELECT partrelid FROM pg_partitioned_table
        JOIN pg_class ON pg_class.oid = partrelid
        WHERE relnamespace = current_schema()::regnamespace AND partstrat = 'r' ORDER BY relname
    LOOP
        week := date_trunc('week', orbit_now() AT TIME ZONE 'UTC') AT TIME ZONE 'UTC';
        WHILE week <= through LOOP
            partition := (SELECT relname FROM pg_class WHERE oid = fact)
                || '_p' || to_char(week AT TIME ZONE 'UTC', 'YYYYMMDD');
            IF to_regclass(quote_ident(partition)) IS NULL THEN
                -- Made beside and then attached, since PARTITION OF would lock the whole fact.
                EXECUTE format('CREATE TABLE %I (LIKE %s INCLUDING ALL)', partition, fact);
                PERFORM orbit_append_only(partition::regclass);
                EXECUTE format('ALTER TABLE %s ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
                    fact, partition, orbit_first_id(week), orbit_first_id(week + interval '7 days'));
                made := made + 1;
            END IF;
            week := week + interval '7 days';
        END LOOP;
    END LOOP;
    RETURN made;
END
$$;
COMMENT ON FUNCTION orbit_create_partitions(timestamptz) IS 'Makes the weekly partitions from this week through the given time, at most a year ahead; returns how many were missing.';

CREATE FUNCTION orbit_drop_partitions(fact regclass, before timestamptz) RETURNS text[]
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT SET lock_timeout = '2s' AS $$
DECLARE
    partition record;
    dropped text[] := '{}';
BEGIN
    -- Runs with the owner's rights, so it is here that facts which stay for ever are kept.
    IF (fact = ANY (ARRAY['payload', 'cycle_checkpoint', 'normalized_item', 'execution_record',
            'delivery_receipt', 'dispatch_job', 'initiation', 'cycle_run']::regclass[])) IS NOT TRUE THEN
        RAISE EXCEPTION '% stays for ever: its partitions are not dropped', fact
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    IF (before <= orbit_now() - interval '1 day') IS NOT TRUE THEN
        RAISE EXCEPTION 'facts of the last day are not dropped: % is too late', before
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('orbit.partitions'));
    FOR partition IN
        SELECT child.relname, to_date(right(child.relname, 8), 'YYYYMMDD') + 7 AS until
        FROM pg_inherits JOIN pg_class child ON child.oid = inhrelid
        JOIN pg_class parent ON parent.oid = inhparent
        WHERE inhparent = fact AND parent.relkind = 'p'
            AND parent.relnamespace = current_schema()::regnamespace
        ORDER BY child.relname
    LOOP
        EXIT WHEN partition.until::timestamp AT TIME ZONE 'UTC' > before;
        -- What a live cycle or job still needs stays, however old.
        EXIT WHEN EXISTS (SELECT FROM cycle_lease
                WHERE cycle_id < orbit_first_id(partition.until::timestamp AT TIME ZONE 'UTC'))
            OR EXISTS (SELECT FROM dispatch_lease
                WHERE cycle_id < orbit_first_id(partition.until::timestamp AT TIME ZONE 'UTC'));
        -- All reading and writing of the fact would queue behind a wait: better the next time.
        BEGIN
            EXECUTE format('DROP TABLE %I', partition.relname);
        EXCEPTION WHEN lock_not_available THEN
            EXIT;
        END;
        dropped := dropped || partition.relname::text;
    END LOOP;
    RETURN dropped;
END
$$;
COMMENT ON FUNCTION orbit_drop_partitions(regclass, timestamptz) IS 'Drops a retained fact''s partitions that end before the given time (a day ago or earlier), oldest first; refuses the facts that stay for ever; stops at what live work needs, or somebody reads for longer than 2 s.';

-- ---------------------------------------------------------------- statistics

CREATE FUNCTION orbit_refresh_statistics() RETURNS text[]
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT SET lock_timeout = '100ms' AS $$
DECLARE
    lease text;
    refreshed text[] := '{}';
BEGIN
    FOR lease IN
        SELECT stat.relname FROM pg_stat_user_tables stat JOIN pg_class ON oid = relid
        WHERE relid IN ('cycle_lease'::regclass, 'dispatch_lease'::regclass, 'schedule'::regclass)
            AND n_live_tup > 1000 + 4 * GREATEST(reltuples, 0)
    LOOP
        EXECUTE format('ANALYZE %I', lease);
        refreshed := refreshed || lease;
    END LOOP;
    RETURN refreshed;
EXCEPTION WHEN lock_not_available THEN
    RETURN '{}';
END
$$;
COMMENT ON FUNCTION orbit_refresh_statistics() IS 'Analyzes a lease table that grew since the planner last heard of it. A queue that was drained and fills up again looks empty for up to a minute otherwise, and is then joined by reading all of it.';

-- ---------------------------------------------------------------- roles

CREATE FUNCTION orbit_grant(application name) RETURNS void
    LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
DECLARE
    place text := quote_ident(current_schema());
    lease text;
BEGIN
    EXECUTE format('REVOKE CREATE ON SCHEMA %s FROM PUBLIC', place);
    EXECUTE format('GRANT USAGE ON SCHEMA %s TO %I', place, application);
    EXECUTE format('GRANT SELECT, INSERT ON ALL TABLES IN SCHEMA %s TO %I', place, application);
    EXECUTE format('REVOKE INSERT ON alembic_version FROM %I', application);
    EXECUTE format('GRANT EXECUTE ON FUNCTION orbit_create_partitions(timestamptz), orbit_drop_partitions(regclass, timestamptz), orbit_refresh_statistics() TO %I', application);
    FOREACH lease IN ARRAY ARRAY['node', 'config_active', 'schedule', 'cycle_lease', 'dispatch_lease'] LOOP
        EXECUTE format('GRANT UPDATE, DELETE ON %I TO %I', lease, application);
    END LOOP;
END
$$;
COMMENT ON FUNCTION orbit_grant(name) IS 'Lets the application''s role read all, add facts and move leases; it owns nothing.';

REVOKE EXECUTE ON FUNCTION orbit_create_partitions(timestamptz), orbit_drop_partitions(regclass, timestamptz), orbit_refresh_statistics() FROM PUBLIC;

SELECT orbit_append_only(fact::regclass) FROM unnest(ARRAY[
    'config_revision', 'config_activation', 'endpoint_snapshot', 'initiation_key', 'schedule_slot',
    'cycle_run', 'initiation', 'payload', 'cycle_checkpoint', 'normalized_item', 'execution_record',
    'value_ledger_entry', 'dispatch_job', 'delivery_receipt', 'dead_letter_dispatch',
    'dead_letter_decision']) AS fact;

SELECT orbit_create_partitions(orbit_now() + interval '21 days');
