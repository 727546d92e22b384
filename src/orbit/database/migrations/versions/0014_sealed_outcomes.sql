-- Sealed outcomes: who said what work was worth, and of which cycle, for as long as the trail.
--
-- The event goes with its week. What was reported before this script has no reporter here; its rows
-- count as written by this script's transaction, and are sealed after it like all others.

ALTER TABLE outcome_key ADD COLUMN cycle_id uuid, ADD COLUMN reported_by text,
    ADD COLUMN transaction_id xid8 NOT NULL DEFAULT pg_current_xact_id();
COMMENT ON COLUMN outcome_key.cycle_id IS 'The cycle that it is of; null where it was reported before this was kept.';
COMMENT ON COLUMN outcome_key.reported_by IS 'The id of who reported it; null where it was reported before this was kept.';
CREATE INDEX outcome_key_by_transaction ON outcome_key (transaction_id);
COMMENT ON INDEX outcome_key_by_transaction IS 'audit.sealing_range, audit.seal_facts: what has no number yet';
