"""Upgrading the schema: at once from several sides, against locks, newer and older, by hand."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from alembic import command
from alembic.script import ScriptDirectory
from psycopg import sql
from psycopg.conninfo import make_conninfo

from orbit.audit.sealing import seal
from orbit.audit.verification import verify
from orbit.database import embedded_place, upgrade
from orbit.database.embedded import APPLICATION_ROLE, EmbeddedServer, erase
from orbit.database.pool import Database, session_settings
from orbit.database.queries import load
from orbit.database.upgrade import SchemaStatus
from orbit.errors import DatabaseUnavailable, SchemaMismatch

SHORT = timedelta(milliseconds=100)

NODE = "01890000-0000-7000-8000-00000000000f"

UPGRADE = """
import sys
from orbit.database.upgrade import upgrade
print(upgrade(sys.argv[1], sys.argv[2]).status)
"""

CHECK = """
import sys
from orbit.database.upgrade import check
print(check(sys.argv[1]).status, *({"alembic", "sqlalchemy"} & set(sys.modules)))
"""


# One with everything and every awkward sign, one with nothing that may be left out, one beside.
RECEIPTS = rb"""
SELECT orbit_create_partitions(now() + interval '8 days');
INSERT INTO delivery_receipt (namespace, job_id, attempt, outcome, status, error, digest, size,
    queue_seconds, connect_seconds, first_byte_seconds, total_seconds, answer,
    answer_content_type, is_probe, is_reused, lease_number, node_id, started_at, endpoint_key)
VALUES ('ns', orbit_first_id(now()), 1, 'failed', 500, E'\"a\\b\" \n\t\u00e9 \U0001F600 \u2028',
        repeat('0', 64), 3, 0.1, 'NaN', 'Infinity', -0.0, '\\x00ff', 'text/plain; a="b"',
        true, false, 2, '01890000-0000-7000-8000-000000000000', '1969-12-31 23:59:59.9Z', 'e/"1"'),
    ('ns', orbit_first_id(now()), 2, 'unknown', NULL, NULL, repeat('0', 64), 0,
        NULL, NULL, NULL, NULL, NULL, NULL, false, NULL, 2147483647,
        '01890000-0000-7000-8000-000000000000', NULL, 'e'),
    ('ns', orbit_first_id(now()), 3, 'delivered', 200, '', repeat('0', 64), 2147483647,
        1e300, 5e-324, 1, 2, '', '', false, true, 1,
        '01890000-0000-7000-8000-000000000000', now(), 'e');
"""
SEALS_ONE_BY_ONE = b"""
INSERT INTO audit_sealed_fact (log, number, fact, fact_id, part, hash)
SELECT log, part::int, fact, fact_id, part, sha256('\\x00'::bytea || convert_to(body, 'UTF8'))
FROM audit_fact WHERE part <> '2';
SELECT orbit_append_audit(ARRAY['ns'], ARRAY[
    '{"action":"facts.sealed","actor":"sealer","detail":{"first":1,"last":3,"root":"00"}}']);
"""


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    """A server for this file's databases."""
    outer = Path(tempfile.mkdtemp(prefix="orbit-test-"))
    outer.chmod(0o755)
    running = EmbeddedServer.start(outer / ".orbit")
    yield running
    running.leave()
    erase(outer / ".orbit")
    shutil.rmtree(outer)


@pytest.fixture(scope="module")
def names() -> Iterator[str]:
    """Names of databases, each used once."""
    return (f"upgrade_{number}" for number in itertools.count())


@pytest.fixture
def empty(server: EmbeddedServer, names: Iterator[str]) -> Iterator[str]:
    """The owner's connection string of an empty database."""
    name = next(names)
    with psycopg.connect(server.owner_dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        yield make_conninfo(server.owner_dsn, dbname=name)
        drop = sql.SQL("DROP DATABASE {} WITH (FORCE)")
        connection.execute(drop.format(sql.Identifier(name)))


def as_application(dsn: str) -> str:
    """The same database for the application's role."""
    return make_conninfo(dsn, user=APPLICATION_ROLE)


def set_revision(dsn: str, revision: str) -> None:
    """Makes the database say that it has this revision."""
    with psycopg.connect(dsn) as connection:
        connection.execute("UPDATE alembic_version SET version_num = %s", (revision,))


def tables(dsn: str) -> list[str]:
    """The names of all tables, sorted."""
    with psycopg.connect(dsn) as connection:
        query = "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1"
        return [row[0] for row in connection.execute(query)]


def dump(dsn: str, server: EmbeddedServer) -> str:
    """The whole schema as SQL, without pg_dump's random marks."""
    binaries = embedded_place.find_place(server.home.parent).binaries
    command = [str(binaries / "pg_dump"), "--schema-only", "--dbname", dsn]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return "\n".join(line for line in text.splitlines() if "restrict " not in line)


def test_the_known_revisions_are_those_of_the_migrations() -> None:
    """REVISIONS and HEAD, known without Alembic, are what Alembic finds in the folder."""
    scripts = ScriptDirectory.from_config(upgrade._config())
    found = [script.revision for script in scripts.walk_revisions()]
    assert tuple(reversed(found)) == upgrade.REVISIONS
    assert scripts.get_heads() == [upgrade.HEAD]


def test_an_empty_database_is_upgraded_and_then_current(empty: str) -> None:
    """Missing before, current after, for the application's role as well; again changes nothing."""
    assert upgrade.check(empty).status is SchemaStatus.MISSING
    with pytest.raises(SchemaMismatch, match=r"has no schema.*needs .*`orbit db upgrade`"):
        upgrade.require_current(empty)
    assert upgrade.upgrade(empty, APPLICATION_ROLE).status is SchemaStatus.MISSING
    upgrade.require_current(as_application(empty))
    assert upgrade.upgrade(empty, APPLICATION_ROLE).status is SchemaStatus.CURRENT


def test_the_application_role_reads_and_adds_but_owns_nothing(empty: str) -> None:
    """What `orbit_grant` gives: facts can be added, neither changed nor dropped."""
    upgrade.upgrade(empty, APPLICATION_ROLE)
    with psycopg.connect(as_application(empty), autocommit=True) as connection:
        assert connection.execute("SELECT count(*) FROM cycle_run").fetchone() == (0,)
        for statement in (
            "DELETE FROM cycle_run",
            "DROP TABLE cycle_run",
            "UPDATE alembic_version SET version_num = '9'",
            "CREATE TABLE mine ()",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement.encode())


def test_the_application_role_has_its_sessions_settings(empty: str) -> None:
    """Also those sessions that a pooler opens, which a node cannot set up itself."""
    upgrade.upgrade(empty, APPLICATION_ROLE)
    with psycopg.connect(as_application(empty)) as connection:
        query = "SELECT name, source FROM pg_settings WHERE name = ANY(%s)"
        rows: dict[str, str] = dict(
            connection.execute(query, (list(session_settings()),)).fetchall()
        )
        (seqscan,) = connection.execute("SHOW enable_seqscan").fetchone() or ("",)
    assert set(rows.values()) == {"database user"}
    assert len(rows) >= 6
    assert seqscan == "off"


def test_an_owner_who_may_not_alter_roles_upgrades_all_the_same(empty: str) -> None:
    """The settings are left to whoever may; the schema and the rights are there."""
    with psycopg.connect(empty, autocommit=True) as connection:
        connection.execute("CREATE ROLE reader")
        owner, database = sql.Identifier(APPLICATION_ROLE), sql.Identifier(connection.info.dbname)
        connection.execute(sql.SQL("ALTER DATABASE {} OWNER TO {}").format(database, owner))
        connection.execute(sql.SQL("ALTER SCHEMA public OWNER TO {}").format(owner))
        upgrade.upgrade(as_application(empty), "reader")
        granted = connection.execute("SELECT has_table_privilege('reader', 'cycle_run', 'INSERT')")
        assert granted.fetchone() == (True,)
        settings = "SELECT FROM pg_db_role_setting WHERE setrole = 'reader'::regrole"
        assert connection.execute(settings).fetchall() == []
        connection.execute("DROP OWNED BY reader")
        connection.execute("DROP ROLE reader")


def test_the_check_imports_neither_alembic_nor_sqlalchemy(empty: str) -> None:
    """A node's start pays for them only when there is something to upgrade."""
    command = [sys.executable, "-c", CHECK, empty]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["missing"]


def test_six_processes_upgrade_at_once_and_one_does_it(empty: str) -> None:
    """One finds the schema missing; the others wait for it and find it current."""
    command = [sys.executable, "-c", UPGRADE, empty, APPLICATION_ROLE]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    answers = [process.communicate(timeout=300) for process in processes]
    assert [error for _, error in answers] == [""] * 6
    assert sorted(out.strip() for out, _ in answers) == ["current"] * 5 + ["missing"]
    upgrade.require_current(empty)


def test_a_table_locked_by_another_session_bounds_the_wait_and_names_it(empty: str) -> None:
    """ACCESS EXCLUSIVE elsewhere: given up after three short waits, the holder is named."""
    with psycopg.connect(empty, application_name="backup job") as other:
        other.execute("CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY)")
        other.commit()
        other.execute("LOCK TABLE alembic_version IN ACCESS EXCLUSIVE MODE")
        started = time.monotonic()
        with pytest.raises(DatabaseUnavailable, match=r"backup job.*AccessExclusive.*alembic_ver"):
            upgrade.upgrade(empty, lock_timeout=SHORT)
        with pytest.raises(DatabaseUnavailable, match="backup job"):
            upgrade.check(empty, lock_timeout=SHORT)
        assert time.monotonic() - started < 30
        other.rollback()
    assert upgrade.upgrade(empty).status is SchemaStatus.MISSING


def test_an_upgrade_in_another_session_is_waited_for_with_patience(empty: str) -> None:
    """An upgrade that hangs elsewhere does not hang this one."""
    with psycopg.connect(empty) as other:
        other.execute("SELECT pg_advisory_xact_lock(%s)", (upgrade._UPGRADE_LOCK,))
        with pytest.raises(DatabaseUnavailable, match=r"has been upgrading .* for 0\.1 s"):
            upgrade.upgrade(empty, patience=SHORT)
    assert tables(empty) == []


def test_a_migration_that_fails_leaves_the_database_as_it_was(empty: str) -> None:
    """Somebody's table stands in the way: the server's words, and nothing half done."""
    with psycopg.connect(empty) as connection:
        connection.execute("CREATE TABLE dead_letter_dispatch ()")
    with pytest.raises(DatabaseUnavailable, match='"dead_letter_dispatch" already exists'):
        upgrade.upgrade(empty)
    assert tables(empty) == ["dead_letter_dispatch"]


def test_a_newer_schema_is_refused_and_not_touched(empty: str) -> None:
    """A database upgraded by a later program: say so, change nothing."""
    upgrade.upgrade(empty)
    set_revision(empty, "9999")
    words = r"schema 9999 is newer than this program.*: upgrade Orbit"
    with pytest.raises(SchemaMismatch, match=words):
        upgrade.require_current(empty)
    with pytest.raises(SchemaMismatch, match=words):
        upgrade.upgrade(empty)
    assert upgrade.check(empty).revision == "9999"


def test_an_older_schema_is_refused_with_the_way_forward(
    empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A known revision before HEAD: both are named, and the command."""
    upgrade.upgrade(empty)
    set_revision(empty, "0000")
    monkeypatch.setattr(upgrade, "REVISIONS", ("0000", *upgrade.REVISIONS))
    words = f"schema is 0000, this program needs {upgrade.HEAD}: run `orbit db upgrade`"
    with pytest.raises(SchemaMismatch, match=words):
        upgrade.require_current(empty)


def test_the_audit_trail_tells_of_an_upgrade(empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who did it, from which revision to which: of a database as an earlier release left it."""

    def run_to_requeues(wrapped: object) -> None:
        config = upgrade._config()
        config.attributes["connection"] = wrapped
        command.upgrade(config, "0003")

    with monkeypatch.context() as earlier:
        earlier.setattr(upgrade, "_run_migrations", run_to_requeues)
        upgrade.upgrade(empty)
    assert upgrade.upgrade(empty, by="ann").revision == "0003"
    with psycopg.connect(empty) as connection:
        query = "SELECT action, actor, detail FROM audit_trail ORDER BY seq"
        begun, upgraded = connection.execute(query).fetchall()
    assert begun[0] == "trail.begun"
    assert upgraded == ("schema.upgraded", "ann", {"from": "0003", "to": upgrade.HEAD})


def test_what_was_sealed_one_by_one_stays_as_it_was(
    empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers, hashes and holes are taken over, and a fact's canonical bytes don't change."""

    def run_to_telemetry(wrapped: object) -> None:
        config = upgrade._config()
        config.attributes["connection"] = wrapped
        command.upgrade(config, "0007")

    with monkeypatch.context() as earlier:
        earlier.setattr(upgrade, "_run_migrations", run_to_telemetry)
        upgrade.upgrade(empty)
    numbers = b"SELECT number, fact, fact_id, part, hash FROM audit_sealed_fact ORDER BY number"
    with psycopg.connect(empty, autocommit=True) as connection:
        connection.execute(RECEIPTS)
        connection.execute(SEALS_ONE_BY_ONE)
        bodies = connection.execute(b"SELECT body FROM audit_fact ORDER BY part").fetchall()
        sealed = connection.execute(numbers).fetchall()
        assert (len(bodies), [row[0] for row in sealed]) == (3, [1, 3])
        upgrade.upgrade(empty)
        facts = connection.execute(load("audit").facts, {"log": None}).fetchall()
        assert sorted((row[3], row[4]) for row in facts) == [
            (str(attempt), body) for attempt, (body,) in enumerate(bodies, 1)
        ]
        assert connection.execute(numbers).fetchall() == sealed
    hole, root = (str(one) for one in verify(empty).findings)
    assert hole == "ns fact 2: has no hash, though a later one has"
    assert "has another root than facts 1 to 3" in root


async def test_outcomes_from_before_are_sealed_after_the_upgrade(
    empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have no reporter that is known, and nothing is found against them."""

    def run_to_namespaces(wrapped: object) -> None:
        config = upgrade._config()
        config.attributes["connection"] = wrapped
        command.upgrade(config, "0013")

    with monkeypatch.context() as earlier:
        earlier.setattr(upgrade, "_run_migrations", run_to_namespaces)
        upgrade.upgrade(empty)
    with psycopg.connect(empty) as connection:
        connection.execute("INSERT INTO outcome_key VALUES ('ns', 'a', 'd'), ('ns', 'b', 'd')")
    upgrade.upgrade(empty, APPLICATION_ROLE)
    assert verify(empty).unsealed == 2
    database = Database(as_application(empty), minimum=1, maximum=2)
    await database.open()
    assert (await seal(database, NODE)).sealed == 2
    await database.close()
    report = verify(empty)
    assert (report.findings, report.unsealed, report.facts) == ([], 0, 2)


def test_the_offline_script_makes_the_same_schema(
    empty: str, server: EmbeddedServer, names: Iterator[str]
) -> None:
    """What a DBA runs by hand equals what `orbit db upgrade` does, to the last comment."""
    by_hand = make_conninfo(empty, dbname=next(names))
    with psycopg.connect(server.owner_dsn, autocommit=True) as connection:
        name = sql.Identifier(by_hand.split("dbname=")[1].split()[0])
        connection.execute(sql.SQL("CREATE DATABASE {}").format(name))
    with psycopg.connect(by_hand, autocommit=True) as connection:
        connection.execute(upgrade.offline_sql().encode())
    upgrade.upgrade(empty)
    upgrade.require_current(by_hand)
    assert "CREATE TABLE" in dump(by_hand, server)
    assert dump(by_hand, server) == dump(empty, server)


def test_a_migration_script_is_run_as_it_is_written(
    empty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`%`, `:name`, dollar quotes and tabs mean what they mean in SQL, online and offline."""
    folder = tmp_path / "100%"
    shutil.copytree(upgrade._MIGRATIONS, folder)
    for script in (folder / "versions").glob("*.sql"):
        script.write_text("SELECT 1;\n")
    script = folder / "versions" / "0001_foundation.sql"
    script.write_text(
        "CREATE FUNCTION odd() RETURNS text LANGUAGE plpgsql AS $odd$ BEGIN"
        " RETURN format('%s\t:name %%', 'é'); END $odd$;\nSELECT odd();\n"
    )
    monkeypatch.setattr(upgrade, "_MIGRATIONS", folder)
    assert script.read_text() in upgrade.offline_sql()
    upgrade.upgrade(empty)
    with psycopg.connect(empty) as connection:
        assert connection.execute("SELECT odd()").fetchone() == ("é\t:name %",)


def test_a_database_that_does_not_answer_or_does_not_fit_is_named(
    empty: str, server: EmbeddedServer, names: Iterator[str]
) -> None:
    """No such database, an unknown role, another encoding: the server's words, one line."""
    with pytest.raises(DatabaseUnavailable, match="does not exist"):
        upgrade.check(make_conninfo(empty, dbname="nowhere"))
    with pytest.raises(DatabaseUnavailable, match='role "stranger" does not exist'):
        upgrade.upgrade(empty, "stranger")
    assert tables(empty) == []
    name = next(names)
    with psycopg.connect(server.owner_dsn, autocommit=True) as connection:
        options = "ENCODING SQL_ASCII LOCALE_PROVIDER libc LOCALE 'C' TEMPLATE template0"
        create = sql.SQL("CREATE DATABASE {} " + options)
        connection.execute(create.format(sql.Identifier(name)))
    with pytest.raises(DatabaseUnavailable, match="UTF8"):
        upgrade.check(make_conninfo(empty, dbname=name))
