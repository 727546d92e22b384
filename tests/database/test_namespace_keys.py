"""What follows a fact is in that fact's namespace, by the database's own word.

Written as the application's role writes. Facts in partitions by time (cycles, jobs, receipts) have
no foreign keys; docs/decisions/0011-access.md says what stands in for them.
"""

from __future__ import annotations

import psycopg
import pytest

BATCH = "01890000-0000-7000-8000-000000000001"
NODE = "01890000-0000-7000-8000-00000000000f"

SETUP = f"""
    INSERT INTO requeue_batch (namespace, batch_id, until_at, reason, snapshot, canary, is_stopping,
        matching, node_id)
    VALUES ('sea', '{BATCH}', orbit_now(), 'r', 'old', 1, true, 1, '{NODE}');
    INSERT INTO namespace_halt (namespace, epoch, actor, actor_id, node_id)
    VALUES ('sea', 1, 'a', 'a', '{NODE}');
"""
FOLLOWING = {
    "requeue_batch_end": "(namespace, batch_id, state, requeued, delivered, failed, pending, why,"
    f" node_id) VALUES (%s, '{BATCH}', 'finished', 0, 0, 0, 0, 'w', '{NODE}')",
    "requeue_lease": "(namespace, batch_id, due_at, phase, stepped_at)"
    f" VALUES (%s, '{BATCH}', orbit_now(), 'canary', orbit_now())",
    "dead_letter_decision": "(namespace, job_id, sequence, decision, reason, batch_id)"
    f" VALUES (%s, '{NODE}', 1, 'requeued', 'r', '{BATCH}')",
    "namespace_resume": "(namespace, epoch, step, cause, reason, actor, actor_id, node_id)"
    f" VALUES (%s, 1, 'resumed', 'person', 'r', 'a', 'a', '{NODE}')",
}


@pytest.mark.parametrize("table", FOLLOWING)
def test_a_row_of_another_namespace_cannot_name_this_ones(dsn: str, table: str) -> None:
    """The same ids under another namespace are refused; under their own they are taken."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(SETUP)
        statement = f"INSERT INTO {table} {FOLLOWING[table]}".encode()
        with pytest.raises(psycopg.errors.ForeignKeyViolation):
            connection.execute(statement, ["secret-moon"])
        connection.execute(statement, ["sea"])


@pytest.mark.parametrize("at", ["0001-01-01 BC", "10000-01-01", "infinity", "1999-12-31"])
def test_no_row_has_an_instant_that_no_client_reads(dsn: str, at: str) -> None:
    """What somebody may name: when a key ends, a halt, a bulk requeue's bounds."""
    key = "INSERT INTO access_key (key_id, root_id, name, scopes, namespaces, secret_sha256,"
    batch = "INSERT INTO requeue_batch (namespace, batch_id, reason, snapshot, canary, is_stopping,"
    statements = [
        (
            f"{key} created_by, expires_at) VALUES ('0123456789abcdef', 'x', 'x', ARRAY['viewer'],"
            " ARRAY['*'], sha256('x'), 'x', %s)"
        ),
        (
            "INSERT INTO access_key_end (key_id, kind, ended_by, ends_at)"
            " VALUES ('k', 'revoked', 'x', %s)"
        ),
        (
            f"{batch} matching, node_id, until_at) VALUES ('sea', '{BATCH}', 'r', 'old', 1, true,"
            f" 1, '{NODE}', %s)"
        ),
        (
            f"{batch} matching, node_id, until_at, since_at) VALUES ('sea', '{BATCH}', 'r', 'old',"
            f" 1, true, 1, '{NODE}', orbit_now(), %s)"
        ),
        (
            "INSERT INTO namespace_fence (namespace, epoch, is_halted, until_at)"
            " VALUES ('sea', 1, true, %s)"
        ),
    ]
    with psycopg.connect(dsn, autocommit=True) as connection:
        for statement in statements:
            with pytest.raises(psycopg.errors.CheckViolation):
                connection.execute(statement.encode(), [at])
