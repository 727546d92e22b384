-- The audit trail: entries chained by hash, and high-rate facts sealed in batches.
--
-- Heads of logs are locked last of all, in key order. A sealer locks the one row of audit_sealer
-- before anything else. A fact's body is built by the program's own statement, never by a
-- function of the database, whose owner could replace it.

-- name: append
-- Appends acts to their logs, in the order given; locks the heads in key order. To be the last
-- statement of a transaction, whose end may then take 2 s at most: who is frozen between the two
-- would hold the heads, and with them every act of those logs, a halt among them.
SELECT set_config('idle_in_transaction_session_timeout', '2s', true),
    orbit_append_audit(%(log)s::text[], %(act)s::text[]);

-- name: ensure_sealer
-- The sealer's row, should it have been lost: all facts are looked through again, and those that
-- have their number keep it.
INSERT INTO audit_sealer DEFAULT VALUES ON CONFLICT DO NOTHING;

-- name: bound_sealer
-- It holds the heads of all logs that it seals: it waits for none of them longer than this.
SET LOCAL lock_timeout = '1s';

-- name: hold_sealer
-- Makes this transaction the one that seals; no row if another is at it.
SELECT singleton FROM audit_sealer FOR UPDATE SKIP LOCKED;

-- name: sealing_range
-- Which transactions' facts are sealed next: all below `until` have ended. Past the newest that
-- there can be, rows are from another server (a restored dump): all of those come first, at once,
-- and then the others from the beginning.
WITH place AS (
    SELECT unsure_until, sealed_until > pg_snapshot_xmax(snapshot) AS is_restored,
        CASE WHEN sealed_until > pg_snapshot_xmax(snapshot)
            THEN pg_snapshot_xmax(snapshot) ELSE sealed_until END AS low,
        CASE WHEN sealed_until > pg_snapshot_xmax(snapshot) THEN (GREATEST(
            (SELECT transaction_id FROM cycle_run
                WHERE transaction_id IS NOT NULL ORDER BY transaction_id DESC LIMIT 1),
            (SELECT transaction_id FROM execution_record
                WHERE transaction_id IS NOT NULL ORDER BY transaction_id DESC LIMIT 1),
            (SELECT transaction_id FROM delivery_receipt
                WHERE transaction_id IS NOT NULL ORDER BY transaction_id DESC LIMIT 1),
            (SELECT transaction_id FROM dead_letter_dispatch
                WHERE transaction_id IS NOT NULL ORDER BY transaction_id DESC LIMIT 1),
            (SELECT transaction_id FROM outcome_key
                WHERE transaction_id IS NOT NULL ORDER BY transaction_id DESC LIMIT 1),
            pg_snapshot_xmax(snapshot))::text::numeric + 1)::text::xid8
            ELSE pg_snapshot_xmin(snapshot) END AS high
    FROM audit_sealer, pg_current_snapshot() AS snapshot
), found AS MATERIALIZED (
    SELECT place.*, LEAST(run.nth, record.nth, receipt.nth, dead.nth, outcome.nth) AS nth
    FROM place
    LEFT JOIN LATERAL (SELECT transaction_id AS nth FROM cycle_run
        WHERE transaction_id >= low AND transaction_id < high
        ORDER BY transaction_id OFFSET %(count)s LIMIT 1) run ON NOT is_restored
    LEFT JOIN LATERAL (SELECT transaction_id AS nth FROM execution_record
        WHERE transaction_id >= low AND transaction_id < high
        ORDER BY transaction_id OFFSET %(count)s LIMIT 1) record ON NOT is_restored
    LEFT JOIN LATERAL (SELECT transaction_id AS nth FROM delivery_receipt
        WHERE transaction_id >= low AND transaction_id < high
        ORDER BY transaction_id OFFSET %(count)s LIMIT 1) receipt ON NOT is_restored
    LEFT JOIN LATERAL (SELECT transaction_id AS nth FROM dead_letter_dispatch
        WHERE transaction_id >= low AND transaction_id < high
        ORDER BY transaction_id OFFSET %(count)s LIMIT 1) dead ON NOT is_restored
    LEFT JOIN LATERAL (SELECT transaction_id AS nth FROM outcome_key
        WHERE transaction_id >= low AND transaction_id < high
        ORDER BY transaction_id OFFSET %(count)s LIMIT 1) outcome ON NOT is_restored
)
SELECT low::text, COALESCE((nth::text::numeric + 1)::text::xid8, high)::text AS until,
    nth IS NOT NULL AS is_more, is_restored, is_restored OR low < unsure_until AS is_unsure,
    EXISTS (SELECT FROM cycle_run WHERE transaction_id >= low AND transaction_id < high)
    OR EXISTS (SELECT FROM execution_record WHERE transaction_id >= low AND transaction_id < high)
    OR EXISTS (SELECT FROM delivery_receipt WHERE transaction_id >= low AND transaction_id < high)
    OR EXISTS (SELECT FROM outcome_key WHERE transaction_id >= low AND transaction_id < high)
    OR EXISTS (SELECT FROM dead_letter_dispatch
        WHERE transaction_id >= low AND transaction_id < high) AS has_facts
FROM found;

-- name: canonical_facts
-- Part of other statements. Every high-rate fact as the canonical bytes that its seal is of: instants
-- are microseconds since 1970, fractions the hexadecimal digits of IEEE 754. These bytes are hashed:
-- whatever changes them is a new version beside the old. Receipts, which are most of the facts, are
-- put together by concat, which costs a third of what json_build_object does.
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
    concat('{"fact" : "delivery_receipt.1", "namespace" : ', to_json(namespace),
        ', "job_id" : "', job_id, '", "attempt" : ', attempt,
        ', "endpoint_key" : ', to_json(endpoint_key),
        ', "outcome" : ', COALESCE(to_json(outcome)::text, 'null'),
        ', "status" : ', COALESCE(status::text, 'null'),
        ', "error" : ', COALESCE(to_json(error)::text, 'null'),
        ', "digest" : ', COALESCE(to_json(digest)::text, 'null'),
        ', "size" : ', COALESCE(size::text, 'null'),
        ', "queue_seconds" : ', COALESCE('"' || encode(float8send(queue_seconds), 'hex') || '"', 'null'),
        ', "connect_seconds" : ', COALESCE('"' || encode(float8send(connect_seconds), 'hex') || '"', 'null'),
        ', "first_byte_seconds" : ', COALESCE('"' || encode(float8send(first_byte_seconds), 'hex') || '"', 'null'),
        ', "total_seconds" : ', COALESCE('"' || encode(float8send(total_seconds), 'hex') || '"', 'null'),
        ', "answer_sha256" : ', COALESCE('"' || encode(sha256(answer), 'hex') || '"', 'null'),
        ', "answer_content_type" : ', COALESCE(to_json(answer_content_type)::text, 'null'),
        ', "is_probe" : ', COALESCE(is_probe::text, 'null'),
        ', "is_reused" : ', COALESCE(is_reused::text, 'null'),
        ', "lease_number" : ', COALESCE(lease_number::text, 'null'),
        ', "node_id" : ', COALESCE('"' || node_id::text || '"', 'null'),
        ', "started_at" : ', COALESCE((extract(epoch FROM started_at) * 1000000)::bigint::text, 'null'),
        ', "created_at" : ', (extract(epoch FROM created_at) * 1000000)::bigint, '}'), transaction_id
FROM delivery_receipt
UNION ALL
SELECT namespace, 'dead_letter_dispatch', job_id, '',
    json_build_object('fact', 'dead_letter_dispatch.1', 'namespace', namespace,
        'job_id', job_id, 'cycle_id', cycle_id, 'endpoint_key', endpoint_key,
        'cause', cause, 'attempts', attempts,
        'created_at', (extract(epoch FROM created_at) * 1000000)::bigint)::text, transaction_id
FROM dead_letter_dispatch
UNION ALL
SELECT namespace, 'outcome_key', COALESCE(cycle_id, '00000000-0000-0000-0000-000000000000'),
    outcome_id,
    json_build_object('fact', 'outcome_key.1', 'namespace', namespace,
        'outcome_id', outcome_id, 'digest', digest, 'cycle_id', cycle_id,
        'reported_by', reported_by,
        'created_at', (extract(epoch FROM created_at) * 1000000)::bigint)::text, transaction_id
FROM outcome_key;

-- name: sealed_leaves
-- Part of other statements. Every sealed fact with its number and leaf hash.
SELECT log, first + place - 1 AS number, leaf.fact, leaf.fact_id, leaf.part, leaf.hash
FROM audit_seal, unnest(fact, fact_id, part, hash) WITH ORDINALITY
    AS leaf (fact, fact_id, part, hash, place)
WHERE leaf.hash IS NOT NULL;

-- name: facts
-- Every fact as canonical bytes, with number and hash where it has them, and what its transaction
-- says of one that has none: `undated` is from before the trail, `late` should have a number,
-- `impossible` is a transaction that cannot be. All keys serve it.
SELECT fact.log, fact.fact, fact.fact_id, fact.part, fact.body, sealed.number, sealed.hash,
    CASE WHEN sealed.number IS NOT NULL THEN 'sealed'
        WHEN fact.transaction_id IS NULL THEN 'undated'
        WHEN fact.transaction_id >= pg_snapshot_xmax(pg_current_snapshot()) THEN 'impossible'
        WHEN fact.transaction_id < (SELECT sealed_until FROM audit_sealer) THEN 'late'
        ELSE 'due' END AS state
FROM ({{canonical_facts}}) fact
LEFT JOIN ({{sealed_leaves}}) sealed ON sealed.log = fact.log AND sealed.fact = fact.fact
    AND sealed.fact_id = fact.fact_id AND sealed.part = fact.part
WHERE (%(log)s::text IS NULL OR fact.log = %(log)s);

-- name: seal_facts
-- Gives the facts of these transactions that have none the next numbers of their log: one seal for
-- each log, with all its leaf hashes one after the other. Only if it `is_unsure` are they looked for
-- in the seals of such ids, by a full join: that is hashed, however few the planner expects. A
-- leaf's hash is that of orbit.audit.merkle. Facts are found by their indexes on transactions.
WITH found AS MATERIALIZED (
    SELECT log, fact, fact_id, part, sha256('\x00'::bytea || convert_to(body, 'UTF8')) AS hash
    FROM ({{canonical_facts}}) fact
    WHERE transaction_id >= %(low)s::text::xid8 AND transaction_id < %(until)s::text::xid8
), sealed AS MATERIALIZED (
    SELECT log, leaf.fact, leaf.fact_id, leaf.part
    FROM audit_seal seal CROSS JOIN LATERAL unnest(seal.fact, seal.fact_id, seal.part)
        AS leaf (fact, fact_id, part)
    WHERE %(is_unsure)s AND EXISTS (SELECT FROM found WHERE found.log = seal.log
        AND found.fact_id BETWEEN seal.fact_id[1] AND seal.fact_id[cardinality(seal.fact_id)])
), due AS (
    SELECT found.* FROM found FULL JOIN sealed ON sealed.log = found.log
        AND sealed.fact = found.fact AND sealed.fact_id = found.fact_id
        AND sealed.part = found.part
    WHERE sealed.log IS NULL
)
INSERT INTO audit_seal (log, first, last, fact, fact_id, part, hash)
SELECT log, last + 1, last + count, facts, ids, parts, hashes
FROM (
    SELECT log, count(*), array_agg(fact ORDER BY fact_id, fact, part) AS facts,
        array_agg(fact_id ORDER BY fact_id, fact, part) AS ids,
        array_agg(part ORDER BY fact_id, fact, part) AS parts,
        array_agg(hash ORDER BY fact_id, fact, part) AS hashes
    FROM due GROUP BY log
) batch CROSS JOIN LATERAL (
    SELECT COALESCE(max(last), 0) AS last FROM audit_seal WHERE audit_seal.log = batch.log
) place
ORDER BY log
RETURNING log, first, last, (SELECT string_agg(leaf, ''::bytea ORDER BY place)
    FROM unnest(hash) WITH ORDINALITY AS leaf (leaf, place)) AS hashes;

-- name: move_sealer
-- Up to where facts are sealed now. After those of another server all are looked through again,
-- and its transactions are still to come here. Run under the row's lock.
UPDATE audit_sealer SET sealed_at = orbit_now(), node_id = %(node_id)s::uuid,
    sealed_until = CASE WHEN %(is_restored)s THEN '0' ELSE %(until)s END::xid8,
    unsure_until = CASE WHEN %(is_restored)s THEN GREATEST(unsure_until, %(until)s::xid8)
        ELSE unsure_until END;

-- name: entry_window
-- Entries of one log before a number, newest first. Its key serves it.
SELECT log, seq, at, hash, prev, body FROM audit_trail_entry
WHERE log = %(log)s AND seq < %(before)s ORDER BY seq DESC LIMIT %(count)s;

-- name: newest_entries
-- Entries of all logs before a place in time, newest first. audit_trail_entry_newest serves it.
SELECT log, seq, at, hash, prev, body FROM audit_trail_entry
WHERE (at, log, seq) < (%(at)s::timestamptz, %(log)s, %(seq)s)
ORDER BY at DESC, log DESC, seq DESC LIMIT %(count)s;

-- name: newest_entries_of_logs
-- The same of some logs. audit_trail_entry_newest_of_log serves it, once for each.
SELECT found.* FROM unnest(%(logs)s::text[]) AS asked (log)
CROSS JOIN LATERAL (
    SELECT entry.log, seq, at, hash, prev, body FROM audit_trail_entry entry
    WHERE entry.log = asked.log AND at <= %(at)s::timestamptz
        AND (at, entry.log, seq) < (%(at)s::timestamptz, %(log)s, %(seq)s)
    ORDER BY at DESC, seq DESC LIMIT %(count)s
) found
ORDER BY found.at DESC, found.log DESC, found.seq DESC LIMIT %(count)s;

-- name: logs
-- Every log with its head, should it have one: whatever has entries, a head or numbers, since the
-- entries of one may all be gone. A loose scan of the three keys.
WITH RECURSIVE log (log) AS (
    SELECT LEAST((SELECT min(entry.log) FROM audit_trail_entry entry),
        (SELECT min(head.log) FROM audit_head head),
        (SELECT min(seal.log) FROM audit_seal seal))
    UNION ALL
    SELECT LEAST(
        (SELECT min(entry.log) FROM audit_trail_entry entry WHERE entry.log > log.log),
        (SELECT min(head.log) FROM audit_head head WHERE head.log > log.log),
        (SELECT min(seal.log) FROM audit_seal seal WHERE seal.log > log.log))
    FROM log WHERE log.log IS NOT NULL
)
SELECT log.log, head.seq, head.hash FROM log LEFT JOIN audit_head head ON head.log = log.log
WHERE log.log IS NOT NULL AND (%(log)s::text IS NULL OR log.log = %(log)s);

-- name: grown_logs
-- The logs with their last number, where that is not the one given: what a signer has to look at.
-- A loose scan of the entries' key.
WITH RECURSIVE log AS (
    (SELECT log, seq FROM audit_trail_entry ORDER BY log DESC, seq DESC LIMIT 1)
    UNION ALL
    SELECT next.log, next.seq FROM log CROSS JOIN LATERAL (
        SELECT entry.log, entry.seq FROM audit_trail_entry entry WHERE entry.log < log.log
        ORDER BY entry.log DESC, entry.seq DESC LIMIT 1
    ) next
)
SELECT COALESCE(log.log, signed.log) AS log
FROM log FULL JOIN unnest(%(log)s::text[], %(seq)s::bigint[], %(hash)s::bytea[])
    AS signed (log, seq, hash) ON signed.log = log.log
WHERE log.seq IS DISTINCT FROM signed.seq OR NOT EXISTS (SELECT FROM audit_trail_entry entry
    WHERE entry.log = signed.log AND entry.seq = signed.seq AND entry.hash = signed.hash)
ORDER BY 1;

-- name: entries
-- A log's entries after a number, oldest first, and whether the column `at` says what is proven.
SELECT seq, prev, hash, body, right(body, 35) = '"at":"'
    || to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') || '"}' AS is_dated
FROM audit_trail_entry WHERE log = %(log)s AND seq > %(after)s ORDER BY seq;

-- name: entry_hash
-- What stands at one place of a log. Its key serves it.
SELECT hash FROM audit_trail_entry WHERE log = %(log)s AND seq = %(seq)s;

-- name: sealed_facts
-- A log's sealed facts, in the order of their numbers. Its key serves it.
SELECT number, fact, fact_id::text, part, hash FROM ({{sealed_leaves}}) sealed
WHERE log = %(log)s ORDER BY number;

-- name: missing_facts
-- Numbers of facts that are not there. Each fact's own key serves it.
SELECT sealed.log, sealed.number, sealed.fact, sealed.fact_id::text, sealed.part
FROM ({{sealed_leaves}}) sealed
WHERE (%(log)s::text IS NULL OR sealed.log = %(log)s) AND CASE sealed.fact
    WHEN 'cycle_run' THEN NOT EXISTS (SELECT FROM cycle_run found
        WHERE found.namespace = sealed.log AND found.cycle_id = sealed.fact_id)
    WHEN 'execution_record' THEN NOT EXISTS (SELECT FROM execution_record found
        WHERE found.namespace = sealed.log AND found.cycle_id = sealed.fact_id
            AND sealed.part = concat_ws('/', found.stage, found.step, found.lease_number,
                found.attempt))
    WHEN 'delivery_receipt' THEN NOT EXISTS (SELECT FROM delivery_receipt found
        WHERE found.namespace = sealed.log AND found.job_id = sealed.fact_id
            AND found.attempt = sealed.part::int)
    WHEN 'dead_letter_dispatch' THEN NOT EXISTS (SELECT FROM dead_letter_dispatch found
        WHERE found.namespace = sealed.log AND found.job_id = sealed.fact_id)
    WHEN 'outcome_key' THEN NOT EXISTS (SELECT FROM outcome_key found
        WHERE found.namespace = sealed.log AND found.outcome_id = sealed.part)
    END;

-- name: reruns
-- Re-runs: cycles in place of failed ones.
SELECT namespace AS log, cycle_id::text AS subject, created_at AS at FROM cycle_run
WHERE trigger = 'rerun' AND (%(log)s::text IS NULL OR namespace = %(log)s);

-- name: activations
-- Configurations that came into force.
SELECT '*' AS log, activation_id::text AS subject, activated_at AS at FROM config_activation
WHERE %(log)s::text IS NULL OR %(log)s = '*';

-- name: requeue_decisions
-- Dead letters that somebody had sent again.
SELECT namespace AS log, job_id || '/' || sequence AS subject, decided_at AS at
FROM dead_letter_decision
WHERE decision = 'requeued' AND (%(log)s::text IS NULL OR namespace = %(log)s);

-- name: discard_decisions
-- Dead letters that somebody let be.
SELECT namespace AS log, job_id || '/' || sequence AS subject, decided_at AS at
FROM dead_letter_decision
WHERE decision = 'discarded' AND (%(log)s::text IS NULL OR namespace = %(log)s);

-- name: begun_requeues
-- Bulk requeues in steps that somebody asked for.
SELECT namespace AS log, batch_id::text AS subject, created_at AS at FROM requeue_batch
WHERE %(log)s::text IS NULL OR namespace = %(log)s;

-- name: cancelled_requeues
-- Bulk requeues that somebody ended.
SELECT namespace AS log, batch_id::text AS subject, ended_at AS at FROM requeue_batch_end
WHERE state = 'cancelled' AND (%(log)s::text IS NULL OR namespace = %(log)s);

-- name: halts
-- Halts of namespaces.
SELECT namespace AS log, 'epoch ' || epoch AS subject, created_at AS at FROM namespace_halt
WHERE %(log)s::text IS NULL OR namespace = %(log)s;

-- name: asked_resumptions
-- Resumptions that the first of two persons asked for.
SELECT namespace AS log, 'epoch ' || epoch AS subject, created_at AS at FROM namespace_resume
WHERE step = 'asked' AND (%(log)s::text IS NULL OR namespace = %(log)s);

-- name: resumptions
-- Halts that persons ended.
SELECT namespace AS log, 'epoch ' || epoch AS subject, created_at AS at FROM namespace_resume
WHERE step = 'resumed' AND cause = 'person' AND (%(log)s::text IS NULL OR namespace = %(log)s);

-- name: timed_resumptions
-- Halts that ended when their time had come.
SELECT namespace AS log, 'epoch ' || epoch AS subject, created_at AS at FROM namespace_resume
WHERE step = 'resumed' AND cause = 'until' AND (%(log)s::text IS NULL OR namespace = %(log)s);

-- name: drilled_halts
-- Rehearsals of halts, by their namespaces; the installation's log tells of them.
SELECT '*' AS log, namespace AS subject, created_at AS at FROM halt_drill
WHERE %(log)s::text IS NULL OR %(log)s = '*';

-- name: present_consumers
-- The stored consumers of telemetry.
SELECT name FROM telemetry_consumer;

-- name: made_settings
-- Versions of namespaces' rules.
SELECT namespace AS log, setting || '/' || version AS subject, created_at AS at
FROM governance_setting WHERE %(log)s::text IS NULL OR namespace = %(log)s;

-- name: created_keys
-- Access keys, in each log that they reach.
SELECT log, 'key ' || key_id AS subject, created_at AS at
FROM access_key CROSS JOIN LATERAL unnest(namespaces) AS log
WHERE %(log)s::text IS NULL OR log = %(log)s;

-- name: made_proposals
-- Proposals of changes to profiles.
SELECT namespace AS log, proposal_id AS subject, created_at AS at FROM strategy_proposal
WHERE %(log)s::text IS NULL OR namespace = %(log)s;

-- name: approved_proposals
-- Proposals that a person approved.
SELECT namespace AS log, proposal_id AS subject, decided_at AS at FROM strategy_decision
WHERE decision = 'approved' AND (%(log)s::text IS NULL OR namespace = %(log)s);

-- name: rejected_proposals
-- Proposals that a person rejected.
SELECT namespace AS log, proposal_id AS subject, decided_at AS at FROM strategy_decision
WHERE decision = 'rejected' AND (%(log)s::text IS NULL OR namespace = %(log)s);

-- name: expired_proposals
-- Proposals whose time was over.
SELECT namespace AS log, proposal_id AS subject, decided_at AS at FROM strategy_decision
WHERE decision = 'expired' AND (%(log)s::text IS NULL OR namespace = %(log)s);

-- name: superseded_proposals
-- Proposals that did not hold any more.
SELECT namespace AS log, proposal_id AS subject, decided_at AS at FROM strategy_decision
WHERE decision = 'superseded' AND (%(log)s::text IS NULL OR namespace = %(log)s);

-- name: added_overlays
-- Overlays on the configuration files, in each log that they reach.
SELECT log, overlay_id::text AS subject, created_at AS at
FROM profile_overlay CROSS JOIN LATERAL unnest(namespaces) AS log
WHERE %(log)s::text IS NULL OR log = %(log)s;

-- name: ended_overlays
-- Overlays that ended.
SELECT log, overlay_id::text AS subject, ended.created_at AS at
FROM profile_overlay_end ended JOIN profile_overlay USING (overlay_id)
CROSS JOIN LATERAL unnest(namespaces) AS log
WHERE %(log)s::text IS NULL OR log = %(log)s;

-- name: set_modes
-- What autonomy may do with profiles.
SELECT log, profile_id || '/' || sequence AS subject, created_at AS at
FROM autonomy_mode CROSS JOIN LATERAL unnest(namespaces) AS log
WHERE %(log)s::text IS NULL OR log = %(log)s;

-- name: skipped_functions
-- What autonomy did not do.
SELECT log, concat_ws('/', profile_id, function, why, day) AS subject, created_at AS at
FROM autonomy_skip CROSS JOIN LATERAL unnest(namespaces) AS log
WHERE %(log)s::text IS NULL OR log = %(log)s;

-- name: shadowed_proposals
-- What autonomy would have done.
SELECT namespace AS log, proposal_id AS subject, created_at AS at FROM autonomy_shadow
WHERE %(log)s::text IS NULL OR namespace = %(log)s;

-- name: judged_changes
-- Probations of changes by autonomy that have ended.
SELECT log, overlay_id::text AS subject, verdict.created_at AS at
FROM autonomy_verdict verdict JOIN profile_overlay USING (overlay_id)
CROSS JOIN LATERAL unnest(namespaces) AS log
WHERE %(log)s::text IS NULL OR log = %(log)s;

-- name: rotated_keys
-- Access keys that have a successor.
SELECT log, 'key ' || key_id AS subject, ended.created_at AS at
FROM access_key_end ended JOIN access_key USING (key_id)
CROSS JOIN LATERAL unnest(namespaces) AS log
WHERE kind = 'rotated' AND (%(log)s::text IS NULL OR log = %(log)s);

-- name: revoked_keys
-- Access keys that somebody ended.
SELECT log, 'key ' || key_id AS subject, ended.created_at AS at
FROM access_key_end ended JOIN access_key USING (key_id)
CROSS JOIN LATERAL unnest(namespaces) AS log
WHERE kind = 'revoked' AND (%(log)s::text IS NULL OR log = %(log)s);
