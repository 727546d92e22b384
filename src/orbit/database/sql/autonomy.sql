-- Controlled autonomy: who may, what is approved, what is in flight, and what came of it.
--
-- Whoever changes a profile has locked the configuration (configuration.lock_configuration) first,
-- and then its namespaces' fences, shared. There are few of all of these rows.

-- name: bound_fences
-- No statement of this transaction waits longer than this for a lock from here on: a halt waits for
-- whoever holds a fence.
SELECT set_config('lock_timeout', '1s', true);

-- name: share_fences
-- Takes the fences of some namespaces, in key order: none of them is halted unseen until the
-- transaction ends. The flags are to be read in a later statement.
SELECT pg_advisory_xact_lock_shared(key) FROM (
    SELECT DISTINCT orbit_fence_key(namespace) AS key
    FROM unnest(%(namespaces)s::text[]) AS asked (namespace) ORDER BY 1
) fence;

-- name: fences
-- Of some namespaces those that were ever halted. The primary key serves it.
SELECT namespace, epoch, is_halted FROM namespace_fence
WHERE namespace = ANY (%(namespaces)s::text[]);

-- name: modes
-- What autonomy may do with each profile, as it was said last. The primary key serves it.
SELECT DISTINCT ON (profile_id) * FROM autonomy_mode ORDER BY profile_id, sequence DESC;

-- name: mode
-- The same of one profile. The primary key serves it.
SELECT * FROM autonomy_mode WHERE profile_id = %(profile_id)s ORDER BY sequence DESC LIMIT 1;

-- name: add_mode
-- Says something else.
INSERT INTO autonomy_mode (profile_id, sequence, mode, cause, namespaces, epochs, reason, actor,
    actor_id, node_id)
SELECT %(profile_id)s, 1 + COALESCE(max(sequence), 0), %(mode)s, %(cause)s,
    %(namespaces)s::text[], %(epochs)s::bigint[], %(reason)s, %(actor)s, %(actor_id)s,
    %(node_id)s::uuid
FROM autonomy_mode WHERE profile_id = %(profile_id)s
RETURNING sequence;

-- name: candidates
-- Approved proposals that may still be applied, all or one, the oldest approval first.
SELECT proposal.namespace, proposal.proposal_id, proposal.profile_id, proposal.profile_digest,
    proposal.patch, proposal.rule
FROM proposal_status proposal
WHERE proposal.state = 'approved' AND proposal.expires_at > orbit_now()
    AND (%(proposal_id)s::text IS NULL OR proposal.proposal_id = %(proposal_id)s)
    AND NOT EXISTS (SELECT FROM profile_overlay overlay
        WHERE overlay.proposal_namespace = proposal.namespace
            AND overlay.proposal_id = proposal.proposal_id)
ORDER BY proposal.decided_at, proposal.proposal_id;

-- name: undecided
-- The pending proposals of some profiles of which nothing is written yet.
SELECT proposal.namespace, proposal.proposal_id, proposal.profile_id, proposal.profile_digest,
    proposal.patch
FROM proposal_status proposal
WHERE proposal.state = 'pending' AND proposal.profile_id = ANY (%(profile_id)s::text[])
    AND NOT EXISTS (SELECT FROM autonomy_shadow shadow
        WHERE shadow.namespace = proposal.namespace
            AND shadow.proposal_id = proposal.proposal_id)
ORDER BY proposal.created_at, proposal.proposal_id;

-- name: flights
-- Changes on probation, of all profiles or one, and whether their time is over.
SELECT overlay.*, overlay.expires_at <= orbit_now() AS is_over
FROM profile_overlay overlay
WHERE overlay.origin = 'autonomy'
    AND (%(profile_id)s::text IS NULL OR overlay.target_id = %(profile_id)s)
    AND NOT EXISTS (SELECT FROM profile_overlay_end ended
        WHERE ended.overlay_id = overlay.overlay_id)
    AND NOT EXISTS (SELECT FROM autonomy_verdict verdict
        WHERE verdict.overlay_id = overlay.overlay_id)
ORDER BY overlay.created_at, overlay.overlay_id;

-- name: changes_of_day
-- What autonomy changed of a profile within 24 hours, what was taken back included.
SELECT patch FROM profile_overlay
WHERE origin = 'autonomy' AND target_id = %(profile_id)s
    AND created_at > orbit_now() - interval '24 hours';

-- name: add_verdict
-- What came of a probation, once.
INSERT INTO autonomy_verdict (overlay_id, verdict, body, node_id)
VALUES (%(overlay_id)s::uuid, %(verdict)s, %(body)s, %(node_id)s::uuid)
ON CONFLICT DO NOTHING RETURNING overlay_id;

-- name: add_skip
-- What a function did not do; the first of a day for each reason, and no row back for the others.
INSERT INTO autonomy_skip (profile_id, function, why, day, namespaces, proposal_id, actor,
    actor_id, node_id)
VALUES (%(profile_id)s, %(function)s, %(why)s, (orbit_now() AT TIME ZONE 'UTC')::date,
    %(namespaces)s::text[], %(proposal_id)s, %(actor)s, %(actor_id)s, %(node_id)s::uuid)
ON CONFLICT DO NOTHING RETURNING day;

-- name: add_shadow
-- What would have been done with a proposal that is undecided; once, and no row back afterwards.
INSERT INTO autonomy_shadow (namespace, proposal_id, profile_id, would_apply, why, node_id)
SELECT %(namespace)s, %(proposal_id)s, %(profile_id)s, %(why)s::text IS NULL, %(why)s::text,
    %(node_id)s::uuid
WHERE NOT EXISTS (SELECT FROM strategy_decision decision
    WHERE decision.namespace = %(namespace)s AND decision.proposal_id = %(proposal_id)s)
ON CONFLICT DO NOTHING RETURNING proposal_id;

-- name: changes
-- What autonomy did to a profile, the newest first, with what came of it.
SELECT overlay.overlay_id, overlay.target_id AS profile_id, overlay.namespaces, overlay.patch,
    overlay.proposal_id, overlay.created_at, overlay.expires_at, verdict.verdict,
    verdict.body AS evidence, verdict.created_at AS judged_at, ended.ending,
    ended.actor AS ended_by, ended.reason AS end_reason, ended.created_at AS ended_at
FROM profile_overlay overlay
LEFT JOIN autonomy_verdict verdict ON verdict.overlay_id = overlay.overlay_id
LEFT JOIN profile_overlay_end ended ON ended.overlay_id = overlay.overlay_id
WHERE overlay.origin = 'autonomy' AND overlay.target_id = %(profile_id)s
ORDER BY overlay.created_at DESC, overlay.overlay_id DESC LIMIT %(count)s;

-- name: skips
-- What autonomy did not do to a profile, the newest first. The primary key serves it.
SELECT function, why, day, proposal_id, actor, created_at FROM autonomy_skip
WHERE profile_id = %(profile_id)s ORDER BY created_at DESC, function, why LIMIT %(count)s;

-- name: shadows
-- What autonomy would have done with a profile's proposals, the newest first, in some namespaces or
-- all, and what persons decided.
SELECT shadow.namespace, shadow.proposal_id, shadow.would_apply, shadow.why, shadow.created_at,
    proposal.state
FROM autonomy_shadow shadow JOIN proposal_status proposal
    ON proposal.namespace = shadow.namespace AND proposal.proposal_id = shadow.proposal_id
WHERE shadow.profile_id = %(profile_id)s
    AND (%(namespaces)s::text[] IS NULL OR shadow.namespace = ANY (%(namespaces)s::text[]))
ORDER BY shadow.created_at DESC, shadow.proposal_id DESC LIMIT %(count)s;

-- name: agreements
-- Of each profile how many proposals were shadowed, on how many of them a person decided, and how
-- often as autonomy would have; in some namespaces or all.
SELECT shadow.profile_id, count(*)::int AS recorded,
    count(*) FILTER (WHERE decision.decision IN ('approved', 'rejected'))::int AS decided,
    count(*) FILTER (WHERE decision.decision = 'approved' AND shadow.would_apply
        OR decision.decision = 'rejected' AND NOT shadow.would_apply)::int AS agreed
FROM autonomy_shadow shadow LEFT JOIN strategy_decision decision
    ON decision.namespace = shadow.namespace AND decision.proposal_id = shadow.proposal_id
WHERE %(namespaces)s::text[] IS NULL OR shadow.namespace = ANY (%(namespaces)s::text[])
GROUP BY shadow.profile_id;
