-- The audit trail: who changed what, and what the wire answered, so that a later change shows.
--
--   audit_trail_entry  fact: one act each, chained by hash within its log (a namespace, or '*')
--   audit_sealed_fact  fact: a high-rate fact's number and hash; a batch's Merkle root is an entry
--   audit_head         lease: the last entry of each log, locked as an act's last statement
--   audit_sealer       lease: up to which transaction facts are sealed
--
-- A hash covers version, log, number, predecessor and the body's bytes, which are canonical JSON
-- in UTF-8, as the whole database is. The columns beside the body are checked against it.
-- Facts are found by the transaction that wrote them: what is older than every transaction still
-- under way can have no new row, so nothing that commits late is passed over.

SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true);

CREATE TABLE audit_trail_entry (
    log  text NOT NULL,
    seq  bigint NOT NULL CHECK (seq >= 1),
    at   timestamptz NOT NULL,
    prev bytea NOT NULL CHECK (length(prev) = 32),
    hash bytea NOT NULL CHECK (length(hash) = 32),
    body text NOT NULL,
    PRIMARY KEY (log, seq),
    CONSTRAINT a_fork_cannot_commit UNIQUE (log, prev)
);
CREATE INDEX audit_trail_entry_newest ON audit_trail_entry (at DESC, log DESC, seq DESC);
COMMENT ON INDEX audit_trail_entry_newest IS 'audit.newest_entries: newest first over all logs';
CREATE INDEX audit_trail_entry_newest_of_log ON audit_trail_entry (log, at DESC, seq DESC);
COMMENT ON INDEX audit_trail_entry_newest_of_log IS 'audit.newest_entries_of_logs: newest first over some logs';
COMMENT ON INDEX a_fork_cannot_commit IS 'audit.append: two entries cannot have one predecessor';
COMMENT ON TABLE audit_trail_entry IS 'One governed act: canonical JSON, and the SHA-256 that chains it to the entry before it in its log.';

CREATE TABLE audit_sealed_fact (
    log     text NOT NULL,
    number  bigint NOT NULL CHECK (number >= 1),
    fact    text NOT NULL CHECK (fact IN ('cycle_run', 'execution_record', 'delivery_receipt', 'dead_letter_dispatch')),
    fact_id uuid NOT NULL,
    part    text NOT NULL,
    hash    bytea NOT NULL CHECK (length(hash) = 32),
    PRIMARY KEY (log, number),
    CONSTRAINT a_fact_is_sealed_once UNIQUE (log, fact, fact_id, part)
);
COMMENT ON INDEX a_fact_is_sealed_once IS 'audit.facts: whether a fact has its number';
COMMENT ON TABLE audit_sealed_fact IS 'The number of a high-rate fact within its namespace, and the leaf hash of its canonical bytes; part is what its key has besides the id.';

CREATE TABLE audit_head (
    log  text PRIMARY KEY,
    seq  bigint NOT NULL,
    hash bytea NOT NULL
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000);
COMMENT ON TABLE audit_head IS 'The last entry of each log. A row that is lost is made anew from the entries.';

CREATE TABLE audit_sealer (
    singleton    boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    sealed_until xid8 NOT NULL DEFAULT '0',
    sealed_at    timestamptz NOT NULL DEFAULT orbit_now(),
    node_id      uuid
);
COMMENT ON TABLE audit_sealer IS 'Facts of transactions below sealed_until have their numbers. Who locks the row seals.';

CREATE FUNCTION orbit_append_audit(logs text[], acts text[]) RETURNS void
    LANGUAGE plpgsql AS $$
DECLARE
    asked record;
    act text;
    last audit_head;
    newest audit_head;
    mended text[];
    entry_at timestamptz := orbit_now();
    entry_body text;
    entry_hash bytea;
BEGIN
    FOR asked IN
        SELECT given.log, array_agg(given.act ORDER BY place) AS acts
        FROM unnest(logs, acts) WITH ORDINALITY AS given (log, act, place)
        GROUP BY given.log ORDER BY given.log
    LOOP
        SELECT * INTO last FROM audit_head WHERE log = asked.log FOR UPDATE;
        IF NOT FOUND THEN
            INSERT INTO audit_head (log, seq, hash)
            SELECT asked.log, COALESCE(max(seq), 0), COALESCE((array_agg(hash ORDER BY seq DESC))[1],
                decode(repeat('00', 32), 'hex'))
            FROM (SELECT seq, hash FROM audit_trail_entry entry WHERE entry.log = asked.log
                ORDER BY seq DESC LIMIT 1) newest
            ON CONFLICT DO NOTHING;
            SELECT * INTO last FROM audit_head WHERE log = asked.log FOR UPDATE;
        END IF;
        -- A head that is behind its log's entries, or beside them, would let nothing be appended:
        -- a halt could not be written. It is made anew from them, and that is an entry too.
        SELECT asked.log, entry.seq, entry.hash INTO newest FROM audit_trail_entry entry
            WHERE entry.log = asked.log ORDER BY entry.seq DESC LIMIT 1;
        mended := '{}';
        IF newest.seq > last.seq OR (newest.seq = last.seq AND newest.hash <> last.hash)
            OR EXISTS (SELECT FROM audit_trail_entry entry
                WHERE entry.log = asked.log AND entry.prev = last.hash) THEN
            mended := ARRAY[format(
                '{"action":"head.mended","actor":"database","detail":{"from":%s,"to":%s}}',
                last.seq, newest.seq)];
            last := newest;
        END IF;
        FOREACH act IN ARRAY mended || asked.acts LOOP
            entry_body := '{"act":' || act || ',"at":"'
                || to_char(entry_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') || '"}';
            entry_hash := sha256('orbit.audit.entry.v1\000'::bytea
                || int4send(octet_length(asked.log)) || convert_to(asked.log, 'UTF8')
                || int8send(last.seq + 1) || last.hash || convert_to(entry_body, 'UTF8'));
            INSERT INTO audit_trail_entry (log, seq, at, prev, hash, body)
            VALUES (asked.log, last.seq + 1, entry_at, last.hash, entry_hash, entry_body);
            last.seq := last.seq + 1;
            last.hash := entry_hash;
        END LOOP;
        UPDATE audit_head SET seq = last.seq, hash = last.hash WHERE log = asked.log;
    END LOOP;
END
$$;
COMMENT ON FUNCTION orbit_append_audit(text[], text[]) IS 'Appends acts (canonical JSON objects) to their logs, whose heads it locks in key order: to be a transaction''s last statement.';

CREATE VIEW audit_trail AS
SELECT log AS namespace, seq, at, body::jsonb #>> '{act,action}' AS action,
    body::jsonb #>> '{act,actor}' AS actor, body::jsonb #>> '{act,reason}' AS reason,
    body::jsonb #>> '{act,subject}' AS subject, body::jsonb #> '{act,detail}' AS detail, hash
FROM audit_trail_entry;
COMMENT ON VIEW audit_trail IS 'Audit entries as people read them; what is proven is the body.';

-- Rows from before this have no transaction, and are not sealed: the trail begins here.
ALTER TABLE cycle_run ADD COLUMN asked_by text, ADD COLUMN transaction_id xid8;
ALTER TABLE cycle_run ALTER COLUMN transaction_id SET DEFAULT pg_current_xact_id();
ALTER TABLE execution_record ADD COLUMN transaction_id xid8;
ALTER TABLE execution_record ALTER COLUMN transaction_id SET DEFAULT pg_current_xact_id();
ALTER TABLE delivery_receipt ADD COLUMN transaction_id xid8;
ALTER TABLE delivery_receipt ALTER COLUMN transaction_id SET DEFAULT pg_current_xact_id();
ALTER TABLE dead_letter_dispatch ADD COLUMN transaction_id xid8;
ALTER TABLE dead_letter_dispatch ALTER COLUMN transaction_id SET DEFAULT pg_current_xact_id();
COMMENT ON COLUMN cycle_run.asked_by IS 'Who triggered the cycle; null for a schedule.';

ALTER TABLE cycle_run ADD CONSTRAINT a_fact_has_its_transaction CHECK (transaction_id IS NOT NULL) NOT VALID;
ALTER TABLE execution_record ADD CONSTRAINT a_fact_has_its_transaction CHECK (transaction_id IS NOT NULL) NOT VALID;
ALTER TABLE delivery_receipt ADD CONSTRAINT a_fact_has_its_transaction CHECK (transaction_id IS NOT NULL) NOT VALID;
ALTER TABLE dead_letter_dispatch ADD CONSTRAINT a_fact_has_its_transaction CHECK (transaction_id IS NOT NULL) NOT VALID;

CREATE INDEX cycle_run_by_transaction ON cycle_run (transaction_id);
COMMENT ON INDEX cycle_run_by_transaction IS 'audit.sealing_range, audit.seal_facts: what has no number yet';
CREATE INDEX execution_record_by_transaction ON execution_record (transaction_id);
COMMENT ON INDEX execution_record_by_transaction IS 'audit.sealing_range, audit.seal_facts: what has no number yet';
CREATE INDEX delivery_receipt_by_transaction ON delivery_receipt (transaction_id);
COMMENT ON INDEX delivery_receipt_by_transaction IS 'audit.sealing_range, audit.seal_facts: what has no number yet';
CREATE INDEX dead_letter_dispatch_by_transaction ON dead_letter_dispatch (transaction_id);
COMMENT ON INDEX dead_letter_dispatch_by_transaction IS 'audit.sealing_range, audit.seal_facts: what has no number yet';

SELECT orbit_append_only(fact::regclass) FROM unnest(ARRAY['audit_trail_entry', 'audit_sealed_fact']) AS fact;
INSERT INTO audit_sealer DEFAULT VALUES;

-- How many governed changes and facts there were before the trail: one that is dated back, or has
-- lost its transaction, does not fit in.
SELECT orbit_append_audit(ARRAY['*'], ARRAY[format(
    '{"action":"trail.begun","actor":"upgrade","detail":{"config_activation":%s,"cycle_run":%s,"dead_letter_decision":%s,"governance_setting":%s,"namespace_halt":%s,"namespace_resume":%s,"requeue_batch":%s,"requeue_batch_end":%s,"undated":{"cycle_run":%s,"dead_letter_dispatch":%s,"delivery_receipt":%s,"execution_record":%s}}}',
    (SELECT count(*) FROM config_activation),
    (SELECT count(*) FROM cycle_run WHERE trigger = 'rerun'),
    (SELECT count(*) FROM dead_letter_decision), (SELECT count(*) FROM governance_setting),
    (SELECT count(*) FROM namespace_halt), (SELECT count(*) FROM namespace_resume),
    (SELECT count(*) FROM requeue_batch),
    (SELECT count(*) FROM requeue_batch_end WHERE state = 'cancelled'),
    (SELECT count(*) FROM cycle_run), (SELECT count(*) FROM dead_letter_dispatch),
    (SELECT count(*) FROM delivery_receipt), (SELECT count(*) FROM execution_record))]);

CREATE VIEW audit_fact AS
SELECT namespace AS log, 'cycle_run' AS fact, cycle_id AS fact_id, '' AS part,
    json_build_object('fact', 'cycle_run.1', 'namespace', namespace, 'cycle_id', cycle_id,
        'profile_id', profile_id, 'run_profile_id', run_profile_id, 'trigger', trigger,
        'asked_by', asked_by, 'slot_at', (extract(epoch FROM slot_at) * 1000000)::bigint,
        'idempotency_key', idempotency_key, 'revision', revision,
        'endpoint_keys', endpoint_keys::text, 'value_tags', value_tags::text,
        'traceparent', traceparent, 'rerun_of', rerun_of, 'node_id', node_id,
        'created_at', (extract(epoch FROM created_at) * 1000000)::bigint)::text AS body,
    transaction_id
FROM cycle_run
UNION ALL
SELECT namespace, 'execution_record', cycle_id,
    concat_ws('/', stage, step, lease_number, attempt),
    json_build_object('fact', 'execution_record.1', 'namespace', namespace,
        'cycle_id', cycle_id, 'stage', stage, 'step', step, 'lease_number', lease_number,
        'attempt', attempt, 'name', name, 'outcome', outcome, 'error', error,
        'duration_seconds', encode(float8send(duration_seconds), 'hex'),
        'input_size', input_size, 'output_size', output_size, 'node_id', node_id,
        'created_at', (extract(epoch FROM created_at) * 1000000)::bigint)::text, transaction_id
FROM execution_record
UNION ALL
SELECT namespace, 'delivery_receipt', job_id, attempt::text,
    json_build_object('fact', 'delivery_receipt.1', 'namespace', namespace,
        'job_id', job_id, 'attempt', attempt, 'endpoint_key', endpoint_key,
        'outcome', outcome, 'status', status, 'error', error, 'digest', digest,
        'size', size, 'queue_seconds', encode(float8send(queue_seconds), 'hex'),
        'connect_seconds', encode(float8send(connect_seconds), 'hex'),
        'first_byte_seconds', encode(float8send(first_byte_seconds), 'hex'),
        'total_seconds', encode(float8send(total_seconds), 'hex'),
        'answer_sha256', encode(sha256(answer), 'hex'),
        'answer_content_type', answer_content_type, 'is_probe', is_probe,
        'is_reused', is_reused, 'lease_number', lease_number, 'node_id', node_id,
        'started_at', (extract(epoch FROM started_at) * 1000000)::bigint,
        'created_at', (extract(epoch FROM created_at) * 1000000)::bigint)::text, transaction_id
FROM delivery_receipt
UNION ALL
SELECT namespace, 'dead_letter_dispatch', job_id, '',
    json_build_object('fact', 'dead_letter_dispatch.1', 'namespace', namespace,
        'job_id', job_id, 'cycle_id', cycle_id, 'endpoint_key', endpoint_key,
        'cause', cause, 'attempts', attempts,
        'created_at', (extract(epoch FROM created_at) * 1000000)::bigint)::text, transaction_id
FROM dead_letter_dispatch;
COMMENT ON VIEW audit_fact IS 'Every high-rate fact as the canonical bytes that its seal is of. Instants are microseconds since 1970, fractions the hexadecimal digits of IEEE 754.';
