-- Orbit schema, revision 0013: proposals and signals by namespace.
--
-- Who asks for some namespaces is led to these; without it a list would walk what others have,
-- and its time would tell of it.

CREATE INDEX strategy_proposal_of_namespace
    ON strategy_proposal (namespace, created_at, proposal_id);
COMMENT ON INDEX strategy_proposal_of_namespace IS 'proposals.proposal_window: the newest of some namespaces';
CREATE INDEX advisory_signal_of_namespace
    ON advisory_signal (namespace, profile_id, to_position DESC, signal_id DESC);
COMMENT ON INDEX advisory_signal_of_namespace IS 'signals.signal_window: a profile''s signals in some namespaces, the newest first';
