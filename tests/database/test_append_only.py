"""Facts are append-only: the database itself refuses to change one, whoever asks and however."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from psycopg import Connection, sql

from orbit.database.embedded import APPLICATION_ROLE

LEASES = {
    "telemetry_consumer",
    "telemetry_pending",
    "telemetry_sequencer",
    "node",
    "config_active",
    "schedule",
    "cycle_lease",
    "dispatch_lease",
    "lane",
    "lane_tally",
    "requeue_lease",
    "namespace_fence",
    "audit_head",
    "audit_sealer",
    "access_link",
    "access_session",
    "access_use",
    "signal_feed",
    "signal_stream",
}
BOOKKEEPING = {"alembic_version"}
# What belongs to the installation: keys are for namespaces, they are not in one.
OF_ALL = {
    "telemetry_archive",
    "telemetry_archive_file",
    "telemetry_consumer",
    "telemetry_sequencer",
    "config_revision",
    "config_activation",
    "config_active",
    "node",
    "audit_sealer",
    "access_key",
    "access_key_end",
    "access_link",
    "access_session",
    "access_use",
    # Profiles are the installation's; the namespaces in which one runs are a column of these.
    "profile_overlay",
    "profile_overlay_end",
    "autonomy_verdict",
    "autonomy_mode",
    "autonomy_skip",
}

_TABLES = """
SELECT relname, relispartition FROM pg_class
WHERE relnamespace = current_schema()::regnamespace AND relkind IN ('r', 'p') ORDER BY relname
"""
_KEYS = """
SELECT table_class.relname, array_agg(attname ORDER BY position) FROM pg_index
JOIN pg_class table_class ON table_class.oid = indrelid
CROSS JOIN unnest(indkey) WITH ORDINALITY AS part (number, position)
JOIN pg_attribute ON attrelid = indrelid AND attnum = part.number
WHERE indisprimary AND relnamespace = current_schema()::regnamespace GROUP BY relname
"""
_OWNED = """
SELECT 'table ' || relname FROM pg_class WHERE relowner = to_regrole(%(role)s)
UNION ALL SELECT 'function ' || proname FROM pg_proc WHERE proowner = to_regrole(%(role)s)
UNION ALL SELECT 'type ' || typname FROM pg_type WHERE typowner = to_regrole(%(role)s)
UNION ALL SELECT 'schema ' || nspname FROM pg_namespace WHERE nspowner = to_regrole(%(role)s)
UNION ALL SELECT 'database ' || datname FROM pg_database WHERE datdba = to_regrole(%(role)s)
"""


@pytest.fixture
def owner(owner_dsn: str) -> Iterator[Connection]:
    """A superuser's session."""
    with psycopg.connect(owner_dsn, autocommit=True) as connection:
        yield connection


@pytest.fixture
def application(dsn: str) -> Iterator[Connection]:
    """A session of the application's role."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        yield connection


def tables(connection: Connection) -> list[str]:
    """Every table and partition."""
    return [name for name, _ in connection.execute(_TABLES)]


def facts(connection: Connection) -> list[str]:
    """Every table and partition that is no lease."""
    return [name for name in tables(connection) if name not in LEASES | BOOKKEEPING]


def changes(connection: Connection, table: str) -> Iterator[sql.Composed]:
    """Every way to change a table's rows."""
    name = sql.Identifier(table)
    keys: dict[str, list[str]] = dict(connection.execute(_KEYS).fetchall())
    key = keys[table]
    columns = sql.SQL(", ").join(map(sql.Identifier, key))
    column = sql.Identifier(key[0])
    yield sql.SQL("UPDATE {0} SET {1} = {1}").format(name, column)
    yield sql.SQL("DELETE FROM {}").format(name)
    yield sql.SQL("TRUNCATE {}").format(name)
    yield sql.SQL("TRUNCATE {} CASCADE").format(name)
    yield sql.SQL(
        "INSERT INTO {0} SELECT * FROM {0} WHERE false"
        " ON CONFLICT ({1}) DO UPDATE SET {2} = excluded.{2}"
    ).format(name, columns, column)
    if connection.info.server_version >= 150000:
        yield sql.SQL(
            "MERGE INTO {} USING (VALUES (1)) AS one ON true WHEN MATCHED THEN DELETE"
        ).format(name)


def refusal(connection: Connection, statement: sql.Composed | str) -> str:
    """What the database says to a statement; empty if it does it."""
    try:
        with connection.transaction(force_rollback=True):
            connection.execute(
                statement if isinstance(statement, sql.Composed) else statement.encode()
            )
    except psycopg.errors.InsufficientPrivilege as error:
        return str(error)
    except psycopg.errors.FeatureNotSupported as error:  # TRUNCATE of what others refer to
        return f"append-only by reference: {error}"
    return ""


def test_every_table_is_a_fact_or_a_declared_lease(owner: Connection) -> None:
    """A new table must be append-only or be declared a lease; nothing lies in between."""
    guarded = {
        name
        for (name,) in owner.execute(
            "SELECT tgrelid::regclass::text FROM pg_trigger WHERE tgname = 'append_only'"
            " AND tgenabled = 'A' AND tgfoid = 'orbit_refuse_change'::regproc"
        )
    }
    assert set(tables(owner)) == guarded | LEASES | BOOKKEEPING
    assert not guarded & LEASES


@pytest.mark.parametrize("replication_role", ["origin", "replica"])
def test_a_superuser_cannot_change_a_fact(owner: Connection, replication_role: str) -> None:
    """UPDATE, DELETE, TRUNCATE, an upsert and MERGE fail on every fact and every partition."""
    owner.execute(f"SET session_replication_role = {replication_role}")
    done = [
        statement.as_string(owner)
        for fact in facts(owner)
        for statement in changes(owner, fact)
        if "append-only" not in refusal(owner, statement)
    ]
    assert done == []


def test_the_application_cannot_change_a_fact(application: Connection) -> None:
    """The application's role lacks the privilege for all of these, before any trigger."""
    done = [
        statement.as_string(application)
        for fact in facts(application)
        for statement in changes(application, fact)
        if not refusal(application, statement)
    ]
    assert done == []


def test_the_application_may_add_facts_and_move_leases(application: Connection) -> None:
    """So the refusals above are no general lack of access."""
    for name in facts(application):
        row = application.execute(
            "SELECT relispartition OR (has_table_privilege(oid, 'SELECT') AND"
            " has_table_privilege(oid, 'INSERT')) FROM pg_class WHERE oid = %s::regclass",
            (name,),
        ).fetchone()
        assert row == (True,), name
    for lease in LEASES:
        assert refusal(application, f"DELETE FROM {lease}") == "", lease


def test_the_application_owns_nothing(owner: Connection) -> None:
    """What one doesn't own one cannot alter."""
    assert owner.execute(_OWNED, {"role": APPLICATION_ROLE}).fetchall() == []


@pytest.mark.parametrize(
    "statement",
    [
        "ALTER TABLE cycle_run DISABLE TRIGGER append_only",
        "ALTER TABLE cycle_run DISABLE TRIGGER ALL",
        "DROP TRIGGER append_only ON cycle_run",
        "DROP TABLE dead_letter_decision",
        "ALTER TABLE cycle_run RENAME TO mine",
        "SET session_replication_role = replica",
        "CREATE TABLE mine ()",
        "CREATE SCHEMA mine",
        "CREATE OR REPLACE FUNCTION orbit_now() RETURNS timestamptz RETURN 'epoch'::timestamptz",
        "SELECT orbit_append_only('node')",
        "UPDATE alembic_version SET version_num = 'mine'",
        "INSERT INTO alembic_version VALUES ('mine')",
    ],
)
def test_the_application_cannot_get_round_it(application: Connection, statement: str) -> None:
    """No trigger can be switched off, no table made or replaced by the application's role."""
    assert refusal(application, statement)


def test_keys_lead_with_the_namespace(owner: Connection) -> None:
    """No row of one namespace can stand for another's: every key begins with it (or its log)."""
    keys = {name: key for name, key in owner.execute(_KEYS) if name not in OF_ALL | BOOKKEEPING}
    assert {name for name, key in keys.items() if key[0] not in ("namespace", "log")} == set()
    assert "cycle_run" in keys
