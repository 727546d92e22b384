-- Seals: what is sealed together is stored together.
--
--   audit_seal         fact: a batch's facts with their leaf hashes, in the order of their numbers
--   audit_sealed_fact  the same, a row for each fact
--
-- A row for each fact with two wide keys cost more than half of what sealing costs, and four times
-- the room.

SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true);

CREATE TABLE audit_seal (
    log      text NOT NULL,
    first    bigint NOT NULL CHECK (first >= 1),
    last     bigint NOT NULL,
    fact     text[] NOT NULL,
    fact_id  uuid[] NOT NULL,
    part     text[] NOT NULL,
    hash     bytea[] NOT NULL,
    PRIMARY KEY (log, first),
    CONSTRAINT a_number_for_each CHECK (last - first + 1 = cardinality(fact_id)
        AND cardinality(fact) = cardinality(fact_id) AND cardinality(part) = cardinality(fact_id)
        AND cardinality(hash) = cardinality(fact_id)),
    CONSTRAINT seals_do_not_overlap UNIQUE (log, last)
);
-- Ids and hashes don't compress, and are read whole.
ALTER TABLE audit_seal ALTER COLUMN fact_id SET STORAGE EXTERNAL;
ALTER TABLE audit_seal ALTER COLUMN hash SET STORAGE EXTERNAL;
COMMENT ON TABLE audit_seal IS 'Facts first to last of a log, sorted by id: the table and key of each (part is what the key has besides the id), and the leaf hash of its canonical bytes.';
COMMENT ON INDEX seals_do_not_overlap IS 'audit.seal_facts: two seals cannot end with one number';

-- A number that is not there is kept as a hole: verification is to find it, not this to fail by it.
INSERT INTO audit_seal (log, first, last, fact, fact_id, part, hash)
SELECT seal.log, seal.first, seal.last, array_agg(fact ORDER BY place),
    array_agg(fact_id ORDER BY place), array_agg(part ORDER BY place),
    array_agg(hash ORDER BY place)
FROM (SELECT log, (body::jsonb #>> '{act,detail,first}')::bigint AS first,
        (body::jsonb #>> '{act,detail,last}')::bigint AS last
    FROM audit_trail_entry WHERE body LIKE '{"act":{"action":"facts.sealed"%') seal
CROSS JOIN LATERAL generate_series(seal.first, seal.last) AS place
LEFT JOIN audit_sealed_fact sealed ON sealed.log = seal.log AND sealed.number = place
GROUP BY seal.log, seal.first, seal.last;

DROP TABLE audit_sealed_fact;
CREATE VIEW audit_sealed_fact AS
SELECT log, first + place - 1 AS number, leaf.fact, leaf.fact_id, leaf.part, leaf.hash
FROM audit_seal, unnest(fact, fact_id, part, hash) WITH ORDINALITY
    AS leaf (fact, fact_id, part, hash, place)
WHERE leaf.hash IS NOT NULL;
COMMENT ON VIEW audit_sealed_fact IS 'Every sealed fact, for people: its number within its namespace, and the leaf hash of its canonical bytes.';

-- Below this, facts may have their number though the sealer has not been there: its place was
-- lost, or is that of another server. A row that is made anew knows nothing.
ALTER TABLE audit_sealer ADD COLUMN unsure_until xid8 NOT NULL DEFAULT '0';
ALTER TABLE audit_sealer ALTER COLUMN unsure_until SET DEFAULT pg_snapshot_xmax(pg_current_snapshot());

SELECT orbit_append_only('audit_seal');

-- Canonical bytes are built by the program's own statements: whoever owns a view can replace it.
DROP VIEW audit_fact;
