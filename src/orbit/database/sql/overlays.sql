-- Overlays: what lies over the configuration files. Whoever writes here has locked the
-- configuration (configuration.lock_configuration); there are few overlays, and all are looked at.

-- name: in_force
-- The overlays that have not ended, in the order in which they were laid.
SELECT overlay.* FROM profile_overlay overlay
WHERE NOT EXISTS (SELECT FROM profile_overlay_end ended
    WHERE ended.overlay_id = overlay.overlay_id)
ORDER BY overlay.created_at, overlay.overlay_id;

-- name: add_overlay
-- Lays one more.
INSERT INTO profile_overlay (overlay_id, target, target_id, origin, patch, inverse, namespaces,
    proposal_namespace, proposal_id, trial, expires_at, reason, actor, actor_id, node_id)
VALUES (%(overlay_id)s::uuid, %(target)s, %(target_id)s, %(origin)s, %(patch)s, %(inverse)s,
    %(namespaces)s::text[], %(proposal_namespace)s, %(proposal_id)s, %(trial)s,
    orbit_now() + make_interval(hours => %(hours)s::int), %(reason)s, %(actor)s, %(actor_id)s,
    %(node_id)s::uuid);

-- name: end_overlays
-- Takes overlays away; whoever is first does, and the others get no row back.
INSERT INTO profile_overlay_end (overlay_id, ending, reason, actor, actor_id, node_id)
SELECT overlay_id, %(ending)s, %(reason)s, %(actor)s, %(actor_id)s, %(node_id)s::uuid
FROM unnest(%(overlay_id)s::uuid[]) AS asked (overlay_id)
ON CONFLICT DO NOTHING RETURNING overlay_id;
