-- Proposals: what rules rest on, what they suggest, and what becomes of it.

-- name: last_signals
-- What was said last of each metric of profiles under their revisions, by the newest detector that
-- said anything: `no_data` is none of it. advisory_signal_newest serves it.
SELECT asked.profile_id, signal.*
FROM unnest(%(profile_id)s::text[], %(revision)s::text[]) AS asked (profile_id, revision)
CROSS JOIN LATERAL (
    SELECT DISTINCT ON (metric) metric, signal_id, name, confidence, from_position, to_position, body
    FROM advisory_signal found
    WHERE found.profile_id = asked.profile_id AND found.namespace = %(namespace)s
        AND found.revision = asked.revision AND found.name <> 'no_data'
    ORDER BY metric, detector_version DESC, to_position DESC, signal_id DESC
) signal ORDER BY asked.profile_id, metric;

-- name: figures
-- What a namespace's cycles, outcomes and lanes came to on a UTC day, and on the seven before it,
-- by profile and by endpoint. telemetry_event_of_strategy serves it; of batches the primary key.
WITH edge AS MATERIALIZED (
    SELECT orbit_first_id((%(day)s::date - 7)::timestamp AT TIME ZONE 'UTC') AS begin,
        orbit_first_id(%(day)s::date::timestamp AT TIME ZONE 'UTC') AS day,
        orbit_first_id((%(day)s::date + 1)::timestamp AT TIME ZONE 'UTC') AS until
)
SELECT event.batch_id >= edge.day AS is_recent, profile_id,
    CASE event_type WHEN 'lane_opened' THEN metadata ->> 'endpointKey' END AS endpoint_key,
    count(*) FILTER (WHERE event_type = 'execution_finished') AS cycles,
    COALESCE(sum((metadata ->> 'attempts')::bigint)
        FILTER (WHERE event_type = 'execution_finished'), 0)::bigint AS attempts,
    COALESCE(sum((metadata ->> 'unknown')::bigint)
        FILTER (WHERE event_type = 'execution_finished'), 0)::bigint AS unknown,
    count(*) FILTER (WHERE event_type = 'lane_opened') AS opened,
    count(*) FILTER (WHERE metadata ->> 'metric' = 'value') AS values,
    COALESCE(sum((metadata ->> 'value')::float8)
        FILTER (WHERE metadata ->> 'metric' = 'value'), 0) AS value,
    count(*) FILTER (WHERE metadata ->> 'metric' = 'cost') AS costs,
    COALESCE(sum((metadata ->> 'value')::float8)
        FILTER (WHERE metadata ->> 'metric' = 'cost'), 0) AS cost,
    min(batch.last_position - batch.events + event.ordinal) AS from_position,
    max(batch.last_position - batch.events + event.ordinal) AS to_position
FROM edge CROSS JOIN telemetry_event event JOIN telemetry_batch batch
    ON batch.namespace = event.namespace AND batch.batch_id = event.batch_id
WHERE event.namespace = %(namespace)s
    AND event_type IN ('execution_finished', 'outcome_reported', 'lane_opened')
    AND event.batch_id >= edge.begin AND event.batch_id < edge.until
GROUP BY 1, 2, 3;

-- name: oldest_pending
-- When the oldest of a namespace's events without a position was told. The primary key serves it.
SELECT orbit_id_time(batch_id) AS at FROM telemetry_pending
WHERE namespace = %(namespace)s ORDER BY batch_id LIMIT 1;

-- name: undecided
-- The proposals of a namespace that nothing became of as yet; none is older than it may become.
-- strategy_proposal_of_profile serves it.
SELECT proposal.proposal_id, proposal.profile_id, proposal.rule, proposal.profile_digest,
    proposal.expires_at <= orbit_now() AS is_over
FROM strategy_proposal proposal
WHERE proposal.namespace = %(namespace)s
    AND (%(profile_id)s::text[] IS NULL OR proposal.profile_id = ANY (%(profile_id)s::text[]))
    AND NOT EXISTS (SELECT FROM strategy_decision decision
        WHERE decision.namespace = proposal.namespace
            AND decision.proposal_id = proposal.proposal_id);

-- name: superseded
-- Of what is suggested that which was superseded before, and how often: all of its body is the same
-- but for how often that was. strategy_proposal_of_profile serves it.
SELECT asked.body, count(*)::int AS times
FROM unnest(%(profile_id)s::text[], %(body)s::text[]) AS asked (profile_id, body)
JOIN strategy_proposal proposal ON proposal.namespace = %(namespace)s
    AND proposal.profile_id = asked.profile_id
    AND regexp_replace(proposal.body, '^\{"again":[0-9]+,', '{') = asked.body
JOIN strategy_decision decision ON decision.namespace = proposal.namespace
    AND decision.proposal_id = proposal.proposal_id
WHERE decision.decision = 'superseded'
GROUP BY asked.body;

-- name: leader
-- Which node numbers events, and so works on what follows from them.
SELECT node_id FROM telemetry_sequencer;

-- name: undecided_namespaces
-- The namespaces that have proposals which nothing became of: all proposals are looked at, of which
-- there are few.
SELECT DISTINCT proposal.namespace FROM strategy_proposal proposal
WHERE NOT EXISTS (SELECT FROM strategy_decision decision
    WHERE decision.namespace = proposal.namespace
        AND decision.proposal_id = proposal.proposal_id);

-- name: add_proposals
-- What is suggested; what was suggested before (the same id) stays as it is and is not returned.
INSERT INTO strategy_proposal (namespace, proposal_id, profile_id, rule, author, author_id,
    profile_digest, patch, body, digest, from_position, to_position, expires_at)
SELECT %(namespace)s, proposal_id, profile_id, rule, %(author)s, %(author_id)s, profile_digest,
    patch, body, digest, from_position, to_position,
    orbit_now() + make_interval(hours => %(hours)s)
FROM unnest(%(proposal_id)s::text[], %(profile_id)s::text[], %(rule)s::text[],
    %(profile_digest)s::text[], %(patch)s::text[], %(body)s::text[], %(digest)s::text[],
    %(from_position)s::bigint[], %(to_position)s::bigint[])
    AS new (proposal_id, profile_id, rule, profile_digest, patch, body, digest, from_position,
        to_position)
ON CONFLICT DO NOTHING RETURNING proposal_id, profile_id, rule;

-- name: decide
-- What becomes of proposals; whoever is first decides, and the others get no row back.
-- The primary key serves it.
INSERT INTO strategy_decision (namespace, proposal_id, decision, actor, actor_id, reason)
SELECT %(namespace)s, proposal_id, decision, %(actor)s, %(actor_id)s, reason
FROM unnest(%(proposal_id)s::text[], %(decision)s::text[], %(reason)s::text[])
    AS new (proposal_id, decision, reason)
ON CONFLICT DO NOTHING RETURNING proposal_id, decision, reason, (SELECT rule
    FROM strategy_proposal proposal WHERE proposal.namespace = strategy_decision.namespace
        AND proposal.proposal_id = strategy_decision.proposal_id), (SELECT profile_id
    FROM strategy_proposal proposal WHERE proposal.namespace = strategy_decision.namespace
        AND proposal.proposal_id = strategy_decision.proposal_id);

-- name: share_configuration
-- Keeps the configuration in force as it is until this transaction ends; others do not wait.
SELECT pg_advisory_xact_lock_shared(hashtext('orbit.configuration'));

-- name: proposal
-- One, with what became of it. strategy_proposal_by_id serves it.
SELECT * FROM proposal_status WHERE proposal_id = %(proposal_id)s;

-- name: proposal_window
-- Proposals before a place, the newest first, in some namespaces or all.
-- strategy_proposal_newest and strategy_proposal_of_namespace serve it: the latter because no other
-- has an order that begins with the namespace.
(SELECT * FROM proposal_status
WHERE %(namespaces)s::text[] IS NULL
    AND (created_at, proposal_id) < (%(created_at)s::timestamptz, %(proposal_id)s::text)
ORDER BY created_at DESC, proposal_id DESC LIMIT %(count)s)
UNION ALL
(SELECT found.* FROM unnest(%(namespaces)s::text[]) AS asked (namespace)
CROSS JOIN LATERAL (
    SELECT * FROM proposal_status WHERE proposal_status.namespace >= asked.namespace
        AND (proposal_status.namespace, created_at, proposal_id)
            < (asked.namespace, %(created_at)s::timestamptz, %(proposal_id)s::text)
    ORDER BY proposal_status.namespace DESC, created_at DESC, proposal_id DESC LIMIT %(count)s
) found
ORDER BY found.created_at DESC, found.proposal_id DESC LIMIT %(count)s);

-- name: applications
-- What proposals came to that autonomy applied: a change on probation, or how it ended.
-- a_proposal_is_applied_once serves it.
SELECT overlay.proposal_namespace, overlay.proposal_id, overlay.overlay_id::text,
    overlay.created_at AS applied_at,
    COALESCE(ended.ending, verdict.verdict, 'on_probation') AS outcome
FROM unnest(%(namespace)s::text[], %(proposal_id)s::text[]) AS asked (namespace, proposal_id)
JOIN profile_overlay overlay ON overlay.proposal_namespace = asked.namespace
    AND overlay.proposal_id = asked.proposal_id
LEFT JOIN autonomy_verdict verdict ON verdict.overlay_id = overlay.overlay_id
LEFT JOIN profile_overlay_end ended ON ended.overlay_id = overlay.overlay_id;
