-- Overlays on the configuration files, and controlled autonomy.
--
--   profile_overlay      fact: a change laid over the files, by a person or by autonomy, with its inverse
--   profile_overlay_end  fact: that it lies there no more, and how that came
--   autonomy_mode        fact: what autonomy may do with a profile; the newest is in force
--   autonomy_skip        fact: that a function of autonomy did nothing, and why; once a day each
--   autonomy_shadow      fact: what autonomy would have done with a proposal
--   autonomy_verdict     fact: what came of a change's probation
--
-- These belong to profiles, which may run in several namespaces: `namespaces` has all of them as
-- they were, and each one's telemetry and trail tell of it. Whoever writes overlays, their ends,
-- verdicts and modes has the advisory lock orbit.configuration alone, so the checks below see all.

SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true);

ALTER TABLE config_activation ADD COLUMN declared_revision text REFERENCES config_revision;
COMMENT ON COLUMN config_activation.declared_revision IS 'The files alone, without overlays; null from before there were any: the same as revision.';
ALTER TABLE config_active ADD COLUMN declared_revision text;
COMMENT ON COLUMN config_active.declared_revision IS 'As in the activation.';

CREATE TABLE profile_overlay (
    overlay_id         uuid PRIMARY KEY,
    target             text NOT NULL CHECK (target IN ('profile', 'run_profile')),
    target_id          text NOT NULL,
    origin             text NOT NULL CHECK (origin IN ('person', 'autonomy')),
    patch              text NOT NULL,
    inverse            text NOT NULL,
    namespaces         text[] NOT NULL CHECK (cardinality(namespaces) > 0),
    proposal_namespace text,
    proposal_id        text,
    trial              text,
    expires_at         timestamptz,
    reason             text,
    actor              text NOT NULL,
    actor_id           text NOT NULL,
    node_id            uuid NOT NULL,
    created_at         timestamptz NOT NULL DEFAULT orbit_now(),
    CONSTRAINT a_proposal_is_applied_once UNIQUE (proposal_namespace, proposal_id),
    FOREIGN KEY (proposal_namespace, proposal_id)
        REFERENCES strategy_proposal (namespace, proposal_id),
    CONSTRAINT autonomy_applies_proposals_on_probation CHECK (
        (origin = 'autonomy') = (proposal_id IS NOT NULL AND proposal_namespace IS NOT NULL)
        AND (origin = 'autonomy') = (trial IS NOT NULL AND expires_at IS NOT NULL))
);
COMMENT ON INDEX a_proposal_is_applied_once IS 'autonomy.candidates: which approved proposals were applied';
COMMENT ON TABLE profile_overlay IS 'A JSON Patch laid over what a file says of a profile or run profile; inverse takes it away again. Of autonomy also what the change is held against (trial), and until when.';

CREATE TABLE profile_overlay_end (
    overlay_id uuid PRIMARY KEY REFERENCES profile_overlay,
    ending     text NOT NULL CHECK (ending IN ('undone', 'adopted', 'dropped', 'rolled_back', 'reverted')),
    reason     text,
    actor      text NOT NULL,
    actor_id   text NOT NULL,
    node_id    uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT orbit_now()
);
COMMENT ON TABLE profile_overlay_end IS 'An overlay is in force until this: undone by a person, adopted by a file that says the same, dropped with files that it did not fit, rolled back for a breach, reverted when its time was over.';

CREATE TABLE autonomy_verdict (
    overlay_id uuid PRIMARY KEY REFERENCES profile_overlay,
    verdict    text NOT NULL CHECK (verdict IN ('breached', 'kept', 'inconclusive')),
    body       text NOT NULL,
    node_id    uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT orbit_now()
);
COMMENT ON TABLE autonomy_verdict IS 'What came of a change''s probation; body is canonical JSON with the evidence. A change without one is in flight.';

CREATE TABLE autonomy_mode (
    profile_id text NOT NULL,
    sequence   int NOT NULL CHECK (sequence >= 1),
    mode       text NOT NULL CHECK (mode IN ('armed', 'shadow', 'disarmed')),
    cause      text NOT NULL CHECK (cause IN ('person', 'halt', 'rollback', 'revert', 'reach')),
    namespaces text[] NOT NULL CHECK (cardinality(namespaces) > 0),
    epochs     bigint[] NOT NULL CHECK (cardinality(epochs) = cardinality(namespaces)),
    reason     text,
    actor      text NOT NULL,
    actor_id   text NOT NULL,
    node_id    uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT orbit_now(),
    PRIMARY KEY (profile_id, sequence),
    CONSTRAINT only_a_person_arms CHECK (mode = 'disarmed' OR cause = 'person'),
    CONSTRAINT arming_has_a_reason CHECK (mode <> 'armed' OR reason IS NOT NULL)
);
COMMENT ON TABLE autonomy_mode IS 'What autonomy may do with a profile. Armed holds for those namespaces, and in none of them past the halts that there had been (epochs).';

CREATE TABLE autonomy_skip (
    profile_id  text NOT NULL,
    function    text NOT NULL CHECK (function IN ('arm', 'shadow', 'apply', 'judge')),
    why         text NOT NULL,
    day         date NOT NULL,
    namespaces  text[] NOT NULL CHECK (cardinality(namespaces) > 0),
    proposal_id text,
    actor       text NOT NULL,
    actor_id    text NOT NULL,
    node_id     uuid NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT orbit_now(),
    PRIMARY KEY (profile_id, function, why, day)
);
COMMENT ON TABLE autonomy_skip IS 'A function of autonomy was asked for and did nothing; the first of a UTC day for each reason.';

CREATE TABLE autonomy_shadow (
    namespace   text NOT NULL,
    proposal_id text NOT NULL,
    profile_id  text NOT NULL,
    would_apply boolean NOT NULL,
    why         text,
    node_id     uuid NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT orbit_now(),
    PRIMARY KEY (namespace, proposal_id),
    FOREIGN KEY (namespace, proposal_id) REFERENCES strategy_proposal (namespace, proposal_id),
    CHECK (would_apply = (why IS NULL))
);
COMMENT ON TABLE autonomy_shadow IS 'What autonomy would have done with a proposal, written down before a person decided.';

CREATE FUNCTION orbit_check_overlay() RETURNS trigger
    LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM strategy_decision decision JOIN strategy_proposal proposal
            ON proposal.namespace = decision.namespace
                AND proposal.proposal_id = decision.proposal_id
            WHERE decision.namespace = NEW.proposal_namespace
                AND decision.proposal_id = NEW.proposal_id AND decision.decision = 'approved'
                AND decision.actor_id NOT IN ('orbit', proposal.author_id)
                AND proposal.profile_id = NEW.target_id AND proposal.expires_at > orbit_now()) THEN
        RAISE EXCEPTION 'autonomy applies only what a person approved, before it expires'
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    IF EXISTS (SELECT FROM profile_overlay overlay
            WHERE overlay.target_id = NEW.target_id AND overlay.origin = 'autonomy'
                AND overlay.overlay_id <> NEW.overlay_id
                AND NOT EXISTS (SELECT FROM profile_overlay_end ended
                    WHERE ended.overlay_id = overlay.overlay_id)
                AND NOT EXISTS (SELECT FROM autonomy_verdict verdict
                    WHERE verdict.overlay_id = overlay.overlay_id)) THEN
        RAISE EXCEPTION 'profile % has a change in flight', NEW.target_id
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    RETURN NEW;
END
$$;
COMMENT ON FUNCTION orbit_check_overlay() IS 'Refuses autonomy''s changes that nobody approved, and a second one in flight for a profile.';
CREATE TRIGGER approved_and_alone BEFORE INSERT ON profile_overlay
    FOR EACH ROW WHEN (NEW.origin = 'autonomy') EXECUTE FUNCTION orbit_check_overlay();

SELECT orbit_append_only(fact::regclass) FROM unnest(ARRAY['profile_overlay', 'profile_overlay_end',
    'autonomy_verdict', 'autonomy_mode', 'autonomy_skip', 'autonomy_shadow']) AS fact;
