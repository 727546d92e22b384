-- Controlled autonomy: who may, what is approved, what is in flight, and what came of it.
--
-- Whoever writes here has locked the configuration (configuration.lock_configuration) first, and
-- where it changes a profile, then its namespaces' fences. There are few of all of these rows.

-- name: candidates
-- Approved proposals that may still be applied, the oldest approval first.
SELECT proposal.namespace, proposal.proposal_id, proposal.profile_id, proposal.profile_digest,
    proposal.patch, proposal.body
FROM proposal_status proposal
WHERE proposal.state = 'approved' AND proposal.expires_at > orbit_now()
    AND NOT EXISTS (SELECT FROM profile_overlay overlay
        WHERE overlay.proposal_namespace = proposal.namespace
            AND overlay.proposal_id = proposal.proposal_id)
ORDER BY proposal.decided_at, proposal.proposal_id;
