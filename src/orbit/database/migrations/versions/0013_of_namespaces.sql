-- What is asked of namespaces: proposals and signals of some, and why one is halted.
--
-- Who asks for some namespaces is led to the indexes; without them a list would walk what others
-- have, and its time would tell of it. A halt that only goes on with another says no reason of its
-- own: why the namespace is halted is then what was said last since it ran.

CREATE INDEX strategy_proposal_of_namespace
    ON strategy_proposal (namespace, created_at, proposal_id);
COMMENT ON INDEX strategy_proposal_of_namespace IS 'proposals.proposal_window: the newest of some namespaces';
CREATE INDEX advisory_signal_of_namespace
    ON advisory_signal (namespace, profile_id, to_position DESC, signal_id DESC);
COMMENT ON INDEX advisory_signal_of_namespace IS 'signals.signal_window: a profile''s signals in some namespaces, the newest first';

CREATE OR REPLACE VIEW namespace_status AS
SELECT fence.namespace, CASE WHEN fence.is_halted THEN 'halted' ELSE 'running' END AS state,
    fence.epoch, fence.until_at, COALESCE(halt.reason, (
        SELECT earlier.reason FROM namespace_halt earlier
        WHERE earlier.namespace = fence.namespace AND earlier.reason IS NOT NULL
            AND earlier.epoch > COALESCE((SELECT max(ended.epoch) FROM namespace_resume ended
                WHERE ended.namespace = fence.namespace AND ended.step = 'resumed'), 0)
        ORDER BY earlier.epoch DESC LIMIT 1)) AS reason,
    halt.actor, halt.created_at AS halted_at,
    asked.actor AS resume_asked_by, asked.created_at AS resume_asked_at,
    resumed.created_at AS resumed_at
FROM namespace_fence fence
JOIN namespace_halt halt ON halt.namespace = fence.namespace AND halt.epoch = fence.epoch
LEFT JOIN namespace_resume asked ON asked.namespace = fence.namespace
    AND asked.epoch = fence.epoch AND asked.step = 'asked'
LEFT JOIN namespace_resume resumed ON resumed.namespace = fence.namespace
    AND resumed.epoch = fence.epoch AND resumed.step = 'resumed';
COMMENT ON VIEW namespace_status IS 'Each namespace that was ever halted, with its last halt, and the last reason that was given since it ran.';
