-- Bulk requeues: dead letters brought back in batches, with a canary and at a rate.
--
--   requeue_batch      fact: what a person asked for
--   requeue_batch_end  fact: how it ended, once
--   requeue_lease      lease: which batch goes on when, and how far it is
--
-- Which dead letters a batch brought back stands in their decisions (dead_letter_decision.batch_id).

SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true);

CREATE TABLE requeue_batch (
    namespace      text NOT NULL,
    batch_id       uuid NOT NULL,
    endpoint_key   text,
    cause          text,
    run_profile_id text,
    since_at       timestamptz,
    until_at       timestamptz NOT NULL,
    reason         text NOT NULL,
    asked_by       text,
    snapshot       text NOT NULL CHECK (snapshot IN ('current', 'old')),
    canary         int NOT NULL CHECK (canary >= 0),
    rate           double precision CHECK (rate > 0),
    is_stopping    boolean NOT NULL,
    size_limit     int CHECK (size_limit >= 1),
    matching       int NOT NULL,
    node_id        uuid NOT NULL,
    created_at     timestamptz NOT NULL DEFAULT orbit_now(),
    PRIMARY KEY (namespace, batch_id)
);
CREATE INDEX requeue_batch_newest ON requeue_batch (batch_id DESC);
COMMENT ON INDEX requeue_batch_newest IS 'reading.requeue_window, requeues.find_batch: newest first over all namespaces, and one by its id alone';
COMMENT ON TABLE requeue_batch IS 'A bulk requeue as it was asked for: which dead letters (from since_at, before until_at), how many first as canaries, how many a second after that (null: no limit), and whether the first failed attempt stops it.';

CREATE TABLE requeue_batch_end (
    namespace text NOT NULL,
    batch_id  uuid NOT NULL,
    state     text NOT NULL CHECK (state IN ('finished', 'stopped', 'cancelled')),
    requeued  int NOT NULL,
    delivered int NOT NULL,
    failed    int NOT NULL,
    pending   int NOT NULL,
    why       text NOT NULL,
    job_id    uuid,
    node_id   uuid NOT NULL,
    ended_at  timestamptz NOT NULL DEFAULT orbit_now(),
    PRIMARY KEY (namespace, batch_id)
);
COMMENT ON TABLE requeue_batch_end IS 'How a bulk requeue ended, with the counts of that moment; job_id is the job that stopped it.';

CREATE TABLE requeue_lease (
    namespace    text NOT NULL,
    batch_id     uuid NOT NULL,
    due_at       timestamptz NOT NULL,
    lease_number int NOT NULL DEFAULT 0,
    node_id      uuid,
    phase        text NOT NULL CHECK (phase IN ('canary', 'flowing')),
    requeued     int NOT NULL DEFAULT 0,
    after_job_id uuid,
    watched_from uuid,
    is_exhausted boolean NOT NULL DEFAULT false,
    stepped_at   timestamptz NOT NULL,
    last_error   text,
    PRIMARY KEY (namespace, batch_id)
);
CREATE INDEX requeue_lease_due ON requeue_lease (due_at);
COMMENT ON INDEX requeue_lease_due IS 'requeues.claim_batch, requeues.next_due: which batch goes on next';
COMMENT ON TABLE requeue_lease IS 'Who may go on with a bulk requeue, and when. Dead letters up to after_job_id have been gone through, and nothing is left once it is exhausted; the jobs of those before watched_from are done; the rate counts from stepped_at.';

ALTER TABLE dead_letter_decision ADD COLUMN batch_id uuid;
CREATE INDEX dead_letter_decision_by_batch ON dead_letter_decision (namespace, batch_id, job_id)
    WHERE batch_id IS NOT NULL;
COMMENT ON INDEX dead_letter_decision_by_batch IS 'requeues.tally, requeues.first_pending, requeues.first_failure, reading.requeue_batches: the jobs of one bulk requeue';

CREATE INDEX dead_letter_dispatch_by_time ON dead_letter_dispatch (created_at DESC, job_id DESC);
COMMENT ON INDEX dead_letter_dispatch_by_time IS 'reading.dead_letter_window: those that died last, over all namespaces';
COMMENT ON INDEX dead_letter_dispatch_newest IS 'dead_letters.dead_letter, reading.dead_letter_namespace: one by its id alone';

SELECT orbit_append_only(fact::regclass) FROM unnest(ARRAY['requeue_batch', 'requeue_batch_end']) AS fact;
