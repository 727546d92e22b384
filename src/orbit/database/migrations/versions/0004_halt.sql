-- The halt of a namespace, which can be proved.
--
--   namespace_halt      fact: somebody halted a namespace; its epoch rises with each
--   namespace_resume    fact: a resumption was asked for, or done, once for each epoch
--   namespace_fence     lease: whether a namespace is halted now, under which epoch
--   governance_setting  fact: what a namespace's rules are; the newest version is in force
--   halt_drill          fact: what a rehearsal of a halt came to
--
-- A claim takes orbit_fence_key(namespace) shared, in a transaction's statement of its own, and
-- reads the fence in a later one. A halt commits the fence, and then has the key to itself once:
-- every claim that began before is over, and every later one sees the fence.

SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true);

CREATE FUNCTION orbit_fence_key(namespace text) RETURNS bigint
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
    RETURN hashtextextended('orbit.fence ' || namespace, 0);
COMMENT ON FUNCTION orbit_fence_key(text) IS 'The advisory lock between a namespace''s claims (shared) and its halt.';

CREATE TABLE namespace_fence (
    namespace text PRIMARY KEY,
    epoch     bigint NOT NULL CHECK (epoch >= 1),
    is_halted boolean NOT NULL,
    until_at  timestamptz,
    CONSTRAINT only_a_halted_namespace_waits CHECK (is_halted OR until_at IS NULL)
);
CREATE INDEX namespace_fence_halted ON namespace_fence (namespace) WHERE is_halted;
COMMENT ON INDEX namespace_fence_halted IS 'halt.halted, reading.halted_namespaces: the few that are halted, of all that ever were';
COMMENT ON TABLE namespace_fence IS 'Whether a namespace is halted, and its epoch, which each halt raises; until_at is when it resumes by itself. A namespace without a row was never halted.';

CREATE TABLE namespace_halt (
    namespace  text NOT NULL,
    epoch      bigint NOT NULL,
    reason     text,
    actor      text NOT NULL,
    actor_id   text NOT NULL,
    until_at   timestamptz,
    node_id    uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT orbit_now(),
    PRIMARY KEY (namespace, epoch)
);
COMMENT ON TABLE namespace_halt IS 'Somebody halted a namespace, or halted it again; until_at as it was asked for.';

CREATE TABLE namespace_resume (
    namespace  text NOT NULL,
    epoch      bigint NOT NULL,
    step       text NOT NULL CHECK (step IN ('asked', 'resumed')),
    cause      text NOT NULL CHECK (cause IN ('person', 'until')),
    reason     text NOT NULL,
    actor      text NOT NULL,
    actor_id   text NOT NULL,
    node_id    uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT orbit_now(),
    PRIMARY KEY (namespace, epoch, step),
    FOREIGN KEY (namespace, epoch) REFERENCES namespace_halt
);
COMMENT ON TABLE namespace_resume IS 'The end of a halt: asked for by the first of two persons, where two are needed, and done.';

CREATE TABLE governance_setting (
    namespace  text NOT NULL,
    setting    text NOT NULL CHECK (setting IN ('two_person_resume')),
    version    int NOT NULL CHECK (version >= 1),
    value      jsonb NOT NULL,
    reason     text NOT NULL,
    actor      text NOT NULL,
    actor_id   text NOT NULL,
    node_id    uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT orbit_now(),
    PRIMARY KEY (namespace, setting, version)
);
COMMENT ON TABLE governance_setting IS 'A rule of a namespace; of a setting''s versions the newest is in force.';

CREATE TABLE halt_drill (
    namespace         text PRIMARY KEY,
    epoch             bigint NOT NULL,
    has_passed        boolean NOT NULL,
    requests          int NOT NULL,
    arrived_before    int NOT NULL,
    in_flight         int NOT NULL,
    is_quiesced       boolean NOT NULL,
    quiesced_seconds  float8 NOT NULL,
    watched_seconds   float8 NOT NULL,
    arrived_halted    int NOT NULL,
    is_refused        boolean NOT NULL,
    arrived_after     int NOT NULL,
    arrived_twice     int NOT NULL,
    actor             text NOT NULL,
    actor_id          text NOT NULL,
    node_id           uuid NOT NULL,
    created_at        timestamptz NOT NULL DEFAULT orbit_now(),
    FOREIGN KEY (namespace, epoch) REFERENCES namespace_halt
);
COMMENT ON TABLE halt_drill IS 'A rehearsal of a halt in a namespace of its own: of so many requests, what arrived until the halt''s answer, while halted, and after the resumption; is_refused is whether a trigger was, meanwhile.';

CREATE VIEW namespace_status AS
SELECT fence.namespace, CASE WHEN fence.is_halted THEN 'halted' ELSE 'running' END AS state,
    fence.epoch, fence.until_at, halt.reason, halt.actor, halt.created_at AS halted_at,
    asked.actor AS resume_asked_by, asked.created_at AS resume_asked_at,
    resumed.created_at AS resumed_at
FROM namespace_fence fence
JOIN namespace_halt halt ON halt.namespace = fence.namespace AND halt.epoch = fence.epoch
LEFT JOIN namespace_resume asked ON asked.namespace = fence.namespace
    AND asked.epoch = fence.epoch AND asked.step = 'asked'
LEFT JOIN namespace_resume resumed ON resumed.namespace = fence.namespace
    AND resumed.epoch = fence.epoch AND resumed.step = 'resumed';
COMMENT ON VIEW namespace_status IS 'Each namespace that was ever halted, with its last halt.';

SELECT orbit_append_only(fact::regclass) FROM unnest(ARRAY['namespace_halt', 'namespace_resume',
    'governance_setting', 'halt_drill']) AS fact;

COMMENT ON INDEX cycle_lease_due IS 'cycle.share_fences, cycle.claim_cycles, halt.still_in_flight, halt.free_expired_cycles: the due cycles of each namespace';
COMMENT ON INDEX dispatch_lease_taken IS 'dispatch.claim_jobs: what a lane has under way; dispatch.expired_jobs: attempts whose worker is gone; halt.still_in_flight: what a namespace has under way';
