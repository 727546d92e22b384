-- Puts :n jobs, long delivered, into the facts: cycles of 100 items to one endpoint, as the
-- program leaves them. Ids carry times up to now, within this week's partitions; no lease is
-- made, since finished work has none. Nothing here is read by the program as anything but past.

CREATE TEMPORARY TABLE past AS
SELECT number, item, lpad(to_hex(CAST(floor(extract(epoch FROM at) * 1000) AS bigint)), 12, '0') AS time,
    encode(sha256(convert_to(CAST(number AS text), 'UTF8')), 'hex') AS digest
FROM (
    SELECT number / 100 AS cycle, number, number % 100 AS item
    FROM generate_series(0, :n - 1) AS number
) job
CROSS JOIN LATERAL (
    SELECT GREATEST(date_trunc('week', orbit_now() AT TIME ZONE 'UTC') AT TIME ZONE 'UTC',
        orbit_now() - (:n / 100 - cycle) * interval '10 milliseconds') AS at
) made;

ALTER TABLE past ADD COLUMN cycle_id uuid, ADD COLUMN job_id uuid;
UPDATE past SET
    cycle_id = CAST(time || '70008' || lpad(to_hex(number / 100), 15, '0') AS uuid),
    job_id = CAST(time || '70018' || lpad(to_hex(number), 15, '0') AS uuid);

INSERT INTO cycle_run (namespace, cycle_id, trigger, traceparent, node_id, endpoint_keys)
SELECT 'past', cycle_id, 'api', '00-' || repeat('1', 32) || '-' || repeat('1', 16) || '-01', cycle_id,
    ARRAY['sink']
FROM past WHERE item = 0;

INSERT INTO initiation (namespace, cycle_id, hash, context)
SELECT 'past', cycle_id, digest, '{"trigger":{"number":' || number || '}}' FROM past WHERE item = 0;

INSERT INTO payload (namespace, cycle_id, digest, content)
SELECT 'past', cycle_id, digest, convert_to(repeat('x', 256), 'UTF8') FROM past;

INSERT INTO cycle_checkpoint (namespace, cycle_id, stage, detail, lease_number, node_id)
SELECT 'past', cycle_id, stage, '{"jobs": 100, "delivered": 100}', 1, cycle_id
FROM past CROSS JOIN unnest(ARRAY['cycle_started', 'normalization_complete', 'dispatch_enqueued',
    'dispatch_complete', 'cycle_finished']) AS stage
WHERE item = 0;

INSERT INTO normalized_item (namespace, cycle_id, item_index, digest, content_type, size)
SELECT 'past', cycle_id, item, digest, 'text/plain', 256 FROM past;

INSERT INTO dispatch_job (namespace, job_id, cycle_id, item_index, endpoint_key, snapshot_id,
    digest, content_type, size, max_attempts)
SELECT 'past', job_id, cycle_id, item, 'sink', repeat('0', 64), digest, 'text/plain', 256, 6
FROM past;

INSERT INTO delivery_receipt (namespace, job_id, attempt, endpoint_key, outcome, status, digest,
    size, queue_seconds, connect_seconds, first_byte_seconds, total_seconds, answer, lease_number,
    node_id, started_at, is_reused)
SELECT 'past', job_id, 1, 'sink', 'delivered', 200, digest, 256, 0.01, 0, 0.001, 0.001, '', 1,
    cycle_id, orbit_now(), true
FROM past;

DROP TABLE past;
