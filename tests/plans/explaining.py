"""A database of 200,000 live leases, and plans of the program's own statements on it.

A statement is prepared just as psycopg would send it and explained as a generic or as a custom
plan, under statistics as they are, or as they are when a queue has just filled up: none yet,
those of an empty table, or those of a table that was drained before the last look at it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import psycopg
from psycopg import Connection, sql

from orbit.database.queries import load

STATISTICS = ("current", "never analyzed", "empty when analyzed", "drained when analyzed")
PLAN_MODES = ("force_generic_plan", "force_custom_plan")
BIG = 15_000  # rows from which a scan of a whole table counts as one
SMALL_INDEXES = {"namespace_fence_halted"}  # partial: of a big table they have few rows

_PARAMETER = re.compile(r"%\((\w+)\)([sb])")
_CASTS = {bool: "bool", int: "int8", float: "float8", list: "bytea[]", bytes: "bytea"}

# One statement each. The ids are spread over three weeks, so that partitions play their part.
FILL = """
CREATE TEMP TABLE filled AS
SELECT n, 'n-' || lpad((n % 200)::text, 3, '0') AS namespace, 'e-' || (n / 200) % 5 AS
    endpoint_key,
    (substr(first_id, 1, 13) || '-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid AS cycle_id,
    (substr(first_id, 1, 13) || '-7000-8001-' || lpad(to_hex(n), 12, '0'))::uuid AS job_id,
    md5(n::text) AS digest, gen_random_uuid() AS node_id
FROM generate_series(1, 200000) AS n, LATERAL (SELECT orbit_first_id(date_trunc('week',
    orbit_now())
    + interval '1 day' + n * interval '9 seconds')::text AS first_id) AS made;
INSERT INTO cycle_lease (namespace, cycle_id, run_profile_id, due_at, node_id, is_waiting, jobs,
    outstanding)
SELECT namespace, cycle_id, 'p-' || n / 200 % 25, CASE WHEN n % 3 = 0 THEN 'infinity'
    ELSE orbit_now() - n * interval '1 millisecond' END, CASE WHEN n % 3 = 1 THEN node_id END,
    n % 30 = 0, 1, CASE WHEN n % 3 = 0 THEN 1 END FROM filled;
INSERT INTO dispatch_lease (namespace, job_id, endpoint_key, cycle_id, due_at, node_id)
SELECT namespace, job_id, endpoint_key, cycle_id, orbit_now() - n * interval '1 millisecond',
    CASE WHEN n % 20 = 0 THEN node_id END FROM filled;
INSERT INTO cycle_run (namespace, cycle_id, run_profile_id, profile_id, trigger, traceparent,
    node_id)
SELECT namespace, cycle_id, 'p', 'p', 'api', '', node_id FROM filled;
INSERT INTO cycle_checkpoint (namespace, cycle_id, stage, digest, size, lease_number, node_id)
SELECT namespace, cycle_id, 'cycle_started', digest, 9, 0, node_id FROM filled;
INSERT INTO dispatch_job (namespace, job_id, cycle_id, item_index, endpoint_key, snapshot_id,
    digest,
    content_type, size, max_attempts)
SELECT namespace, job_id, cycle_id, 0, endpoint_key, 's', digest, 'text/plain', 9, 4 FROM filled;
INSERT INTO initiation SELECT namespace, cycle_id, digest, '{}' FROM filled WHERE n % 10 = 0;
INSERT INTO initiation_key SELECT namespace, 'p', digest, cycle_id, digest FROM filled WHERE n
    % 10 = 0;
INSERT INTO payload SELECT namespace, cycle_id, digest, 'a payload' FROM filled WHERE n % 10 = 0;
INSERT INTO delivery_receipt (namespace, job_id, attempt, outcome, digest, size, lease_number,
    node_id)
SELECT namespace, job_id, 1, 'failed', digest, 9, 1, node_id FROM filled WHERE n % 10 = 0;
INSERT INTO execution_record (namespace, cycle_id, stage, step, lease_number, attempt, name,
    outcome,
    duration_seconds, input_size, node_id)
SELECT namespace, cycle_id, 'tier1_complete', 0, 1, 1, 'x', 'succeeded', 1, 1, node_id FROM filled
WHERE n % 10 = 0;
INSERT INTO normalized_item SELECT namespace, cycle_id, 0, digest, 'text/plain', 9 FROM filled
WHERE n % 10 = 0;
INSERT INTO dead_letter_dispatch SELECT namespace, job_id, cycle_id, endpoint_key, 'status 500', 4
FROM filled WHERE n % 10 = 0;
INSERT INTO value_ledger_entry SELECT namespace, cycle_id, 'p', 'p', 'finished', '{}', 1, 1, 1,
    0, 1,
    1, 1 FROM filled WHERE n % 10 = 0;
INSERT INTO schedule SELECT namespace, 'p-' || n, '', orbit_now(), orbit_now() + n * interval
    '1 s'
FROM filled WHERE n % 10 = 0;
INSERT INTO schedule_slot SELECT namespace, 'p', orbit_now() - n * interval '1 min', 'missed',
    '', NULL,
    node_id FROM filled WHERE n % 10 = 0;
INSERT INTO namespace_fence SELECT 'n-' || lpad(n::text, 6, '0'), 1, n % 1000 = 0 FROM filled
WHERE n % 10 = 0;
INSERT INTO strategy_proposal (namespace, proposal_id, profile_id, rule, author, author_id,
    profile_digest, patch, body, digest, from_position, to_position, expires_at)
SELECT namespace, digest, 'p', 'r', 'a', 'a', repeat(digest, 2), '[]', '{}', repeat(digest, 2), n,
    n, orbit_now() FROM filled WHERE n % 50 = 0;
INSERT INTO advisory_signal (namespace, signal_id, profile_id, revision, metric, name, alarm_level,
    confidence, from_position, to_position, detector_version, body)
SELECT namespace, digest, 'p', 'r', 'm', 'stable', 'none', 0.5, n, n, 1, '{}' FROM filled
WHERE n % 50 = 0;
INSERT INTO telemetry_event (namespace, batch_id, ordinal, event_type, profile_id, run_id)
SELECT namespace, job_id, 1, 'execution_finished', 'p', cycle_id FROM filled;
INSERT INTO telemetry_batch (namespace, batch_id, events, last_position)
SELECT namespace, job_id, 1, n FROM filled;
INSERT INTO telemetry_pending SELECT cycle_id, namespace, 1 FROM filled WHERE n % 10 = 0;
INSERT INTO signal_stream SELECT namespace, 'p' || n, 'r', 'delivered', '{}' FROM filled WHERE n
    % 10 = 0;
INSERT INTO signal_feed SELECT DISTINCT namespace, 2, 199990, '{}' FROM filled;
INSERT INTO endpoint_snapshot SELECT namespace, 's' || n, 'e', '', 'POST', '', NULL, 1, '{}'
FROM filled WHERE n % 10 = 0;
"""

_FORGET = {
    "never analyzed": "UPDATE pg_class SET relpages = 0, reltuples = -1",
    "empty when analyzed": "UPDATE pg_class SET relpages = 0, reltuples = 0",
}
_OURS = " WHERE relnamespace = current_schema()::regnamespace AND relkind IN ('r', 'p', 'i')"
_NO_HISTOGRAMS = (
    "DELETE FROM pg_statistic WHERE starelid IN (SELECT oid FROM pg_class"
    " WHERE relnamespace = current_schema()::regnamespace)"
)
_LEASES = ("cycle_lease", "dispatch_lease", "schedule")
_DRAINED = """
WITH lease AS (SELECT unnest(%s::text[])::regclass AS oid),
forgotten AS (DELETE FROM pg_statistic WHERE starelid IN (SELECT oid FROM lease))
UPDATE pg_class SET reltuples = 10 WHERE oid IN (SELECT oid FROM lease
    UNION SELECT indexrelid FROM pg_index WHERE indrelid IN (SELECT oid FROM lease))
"""


def forget(connection: Connection, statistics: str) -> None:
    """Makes the planner know no more than in the given state, until the transaction's end.

    A drained table keeps its pages: it looks as if ten rows were in all of them. No plan is
    right for that, so the node's heartbeat has it analyzed, as is done here.
    """
    if statistics in _FORGET:
        connection.execute(_NO_HISTOGRAMS)
        connection.execute((_FORGET[statistics] + _OURS).encode())
    elif statistics == "drained when analyzed":
        # An autovacuum that came between would hold a table and wait for these rows of pg_class.
        connection.execute(
            f"LOCK TABLE {', '.join(_LEASES)} IN SHARE UPDATE EXCLUSIVE MODE".encode()
        )
        connection.execute(_DRAINED, [list(_LEASES)])
        row = connection.execute("SELECT orbit_refresh_statistics()").fetchone()
        assert row is not None
        assert sorted(row[0]) == sorted(_LEASES)


def statement(name: str) -> bytes:
    """The text of `concept.statement`."""
    concept, _, its_name = name.partition(".")
    text: bytes = getattr(load(concept), its_name)
    return text


def explain(
    connection: Connection, name: str, params: Mapping[str, Any], *, is_analyzed: bool = False
) -> dict[str, Any]:
    """The plan of `concept.statement`; with `is_analyzed` it is carried out too."""
    text = statement(name).decode().rstrip(";")
    names = list(dict.fromkeys(found for found, _ in _PARAMETER.findall(text)))
    assert set(names) == set(params), f"{name}: {set(names) ^ set(params)}"
    text = _PARAMETER.sub(lambda found: f"${names.index(found[1]) + 1}", text).replace("%%", "%")
    types = ", ".join(_CASTS.get(type(params[one]), "unknown") for one in names)
    connection.execute(f"PREPARE asked {f'({types})' if types else ''} AS {text}".encode())
    values = sql.SQL(", ").join(sql.Literal(params[one]) for one in names)
    options = "ANALYZE, FORMAT JSON" if is_analyzed else "FORMAT JSON"
    call = sql.SQL("EXECUTE asked({})").format(values) if names else sql.SQL("EXECUTE asked")
    row = connection.execute(sql.SQL(f"EXPLAIN ({options}) ").format() + call).fetchone()
    connection.execute("DEALLOCATE asked")
    assert row is not None
    found: dict[str, Any] = row[0][0]
    return found


def whole_scans(plan: Mapping[str, Any], big: set[str]) -> Iterator[str]:
    """The big tables that a plan reads whole: in order of the heap, or of an index unbounded."""
    yield from _whole_scans(plan["Plan"], big, is_limited=False)


def _whole_scans(node: Mapping[str, Any], big: set[str], *, is_limited: bool) -> Iterator[str]:
    kind, table = node["Node Type"], node.get("Relation Name")
    is_whole = "Index Cond" not in node and node.get("Index Name") not in SMALL_INDEXES
    if kind in ("Index Scan", "Index Only Scan") and is_whole and not is_limited:
        kind = f"{kind} of all"
    if table in big and kind in ("Seq Scan", "Index Scan of all", "Index Only Scan of all"):
        yield f"{kind} on {table}"
    is_limited = kind == "Limit" or (is_limited and kind != "Sort" and not kind.endswith("Join"))
    for inner in node.get("Plans", ()):
        yield from _whole_scans(inner, big, is_limited=is_limited)


def walked_rows(plan: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The tables of which a plan that was carried out took up rows, and left them or not."""
    yield from _walked_rows(plan["Plan"])


def _walked_rows(node: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    table = node.get("Relation Name")
    rows = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
    if table is not None and rows * node["Actual Loops"] > 0:
        yield table, rows
    for inner in node.get("Plans", ()):
        yield from _walked_rows(inner)


def indexes(plan: Mapping[str, Any], tables: set[str]) -> set[str]:
    """The indexes by which a plan finds rows of these tables; a scan without one by its kind."""
    return set(_indexes(plan["Plan"], tables))


def _indexes(node: Mapping[str, Any], tables: set[str]) -> Iterator[str]:
    if node.get("Relation Name") in tables and node["Node Type"] != "ModifyTable":
        yield node.get("Index Name", node["Node Type"])
    for inner in node.get("Plans", ()):
        yield from _indexes(inner, tables)


def big_tables(connection: Connection) -> set[str]:
    """The tables, and the partitions of tables, with many rows."""
    rows = connection.execute(
        "SELECT relname, parent.reltuples FROM pg_class child CROSS JOIN LATERAL ("
        " SELECT sum(reltuples) AS reltuples FROM pg_class WHERE oid = child.oid OR oid IN"
        " (SELECT inhrelid FROM pg_inherits WHERE inhparent IN"
        " (SELECT inhparent FROM pg_inherits WHERE inhrelid = child.oid))) parent"
        " WHERE relnamespace = current_schema()::regnamespace AND relkind = 'r'"
    ).fetchall()
    return {name for name, rows_in_all in rows if rows_in_all >= BIG}


def fill(dsn: str) -> None:
    """Fills a fresh database."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SET synchronous_commit = off")
        for statement in FILL.split(";\n"):
            if statement.strip():
                connection.execute(statement.encode())
        connection.execute("ANALYZE")
