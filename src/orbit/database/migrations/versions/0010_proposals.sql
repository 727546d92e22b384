-- Proposals: changes of a profile that rules suggest and a person decides on.
--
--   strategy_proposal  fact: a change with all that it rests on; it applies nothing
--   strategy_decision  fact: what became of it, once
--
-- A proposal's id is derived from what it says, so what is found again is not proposed again.

CREATE TABLE strategy_proposal (
    namespace      text NOT NULL,
    proposal_id    text NOT NULL CHECK (proposal_id ~ '^[0-9a-f]{32}$'),
    profile_id     text NOT NULL,
    rule           text NOT NULL,
    author         text NOT NULL,
    author_id      text NOT NULL,
    profile_digest text NOT NULL CHECK (profile_digest ~ '^[0-9a-f]{64}$'),
    patch          text NOT NULL,
    body           text NOT NULL,
    digest         text NOT NULL CHECK (digest ~ '^[0-9a-f]{64}$'),
    from_position  bigint NOT NULL,
    to_position    bigint NOT NULL,
    created_at     timestamptz NOT NULL DEFAULT orbit_now(),
    expires_at     timestamptz NOT NULL,
    PRIMARY KEY (namespace, proposal_id),
    CHECK (starts_with(digest, proposal_id)),
    CHECK (from_position <= to_position)
);
CREATE UNIQUE INDEX strategy_proposal_by_id ON strategy_proposal (proposal_id);
COMMENT ON INDEX strategy_proposal_by_id IS 'proposals.proposal: one by its id';
CREATE INDEX strategy_proposal_newest ON strategy_proposal (created_at DESC, proposal_id DESC);
COMMENT ON INDEX strategy_proposal_newest IS 'proposals.proposal_window: the newest first';
CREATE INDEX strategy_proposal_of_profile
    ON strategy_proposal (namespace, profile_id, expires_at DESC);
COMMENT ON INDEX strategy_proposal_of_profile IS 'proposals.undecided: those of a namespace that may be pending';
COMMENT ON TABLE strategy_proposal IS 'A suggested change: patch is a JSON Patch on the profile whose digest is profile_digest; body is canonical JSON with rule, patch, expected effect and evidence, and digest its SHA-256.';

CREATE TABLE strategy_decision (
    namespace   text NOT NULL,
    proposal_id text NOT NULL,
    decision    text NOT NULL CHECK (decision IN ('approved', 'rejected', 'expired', 'superseded')),
    actor       text NOT NULL,
    actor_id    text NOT NULL,
    reason      text,
    decided_at  timestamptz NOT NULL DEFAULT orbit_now(),
    PRIMARY KEY (namespace, proposal_id),
    FOREIGN KEY (namespace, proposal_id) REFERENCES strategy_proposal (namespace, proposal_id),
    CHECK (decision = 'approved' OR reason IS NOT NULL)
);
COMMENT ON TABLE strategy_decision IS 'What became of a proposal. Persons approve and reject; it expires by time, and is superseded when its profile or its evidence changed.';

CREATE FUNCTION orbit_check_approval() RETURNS trigger
    LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    IF NEW.decision = 'approved' AND EXISTS (SELECT FROM strategy_proposal proposal
            WHERE proposal.namespace = NEW.namespace AND proposal.proposal_id = NEW.proposal_id
                AND (proposal.author_id = NEW.actor_id OR proposal.expires_at <= orbit_now())) THEN
        RAISE EXCEPTION 'proposal % is approved by another person than its author, before it expires',
            NEW.proposal_id USING ERRCODE = 'insufficient_privilege';
    END IF;
    RETURN NEW;
END
$$;
COMMENT ON FUNCTION orbit_check_approval() IS 'Refuses an approval by the proposal''s author, or too late.';
CREATE TRIGGER approval BEFORE INSERT ON strategy_decision
    FOR EACH ROW EXECUTE FUNCTION orbit_check_approval();

CREATE VIEW proposal_status AS
SELECT proposal.*, decision.decision, decision.actor AS decided_by, decision.actor_id AS decided_by_id,
    decision.reason, decision.decided_at,
    COALESCE(decision.decision,
        CASE WHEN proposal.expires_at <= orbit_now() THEN 'expired' ELSE 'pending' END) AS state
FROM strategy_proposal proposal LEFT JOIN strategy_decision decision
    ON decision.namespace = proposal.namespace AND decision.proposal_id = proposal.proposal_id;
COMMENT ON VIEW proposal_status IS 'Proposals with what became of them; one whose time is over has expired before that is written down.';

CREATE INDEX telemetry_event_of_strategy ON telemetry_event (namespace, batch_id)
    WHERE event_type IN ('execution_finished', 'outcome_reported', 'lane_opened');
COMMENT ON INDEX telemetry_event_of_strategy IS 'proposals.figures: the few events that rules count, by time';

SELECT orbit_append_only(fact::regclass)
FROM unnest(ARRAY['strategy_proposal', 'strategy_decision']) AS fact;
