"""The schema's revision: is it the one this program needs, and how to get there.

Migrations are plain SQL files run by Alembic, all pending ones and the grants in one
transaction, one session at a time (an advisory lock of that transaction, so PgBouncer in
transaction mode is fine). No lock is waited for without bound: a statement that cannot get
one is given up, everything is rolled back, and after a few tries the holder is named.
Asking for the revision imports neither Alembic nor SQLAlchemy, which cost every start 0.4 s.
A schema newer than this program is never touched, and nothing is ever downgraded.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import Connection, sql
from psycopg.conninfo import conninfo_to_dict

from orbit.canonical import canonical_json
from orbit.database.pool import first_line, session_settings
from orbit.errors import DatabaseUnavailable, SchemaMismatch

if TYPE_CHECKING:
    from alembic.config import Config

REVISIONS = (
    *("0001", "0002", "0003", "0004", "0005", "0006", "0007", "0008", "0009", "0010"),
    *("0011", "0012", "0013", "0014", "0015"),
)
HEAD = REVISIONS[-1]
OLDEST_SERVER = 14

_MIGRATIONS = Path(__file__).with_name("migrations")
_UPGRADE_LOCK = int.from_bytes(b"orbit")
_TRIES = 3
_PAUSE_SECONDS = 0.5
_CONNECT_SECONDS = 10

# Whose locks a migration may have run into; the tables are few, the sessions too.
_HOLDERS = b"""
SELECT format('process %s (%s) holds %s on %s', a.pid,
              coalesce(nullif(a.application_name, ''), a.usename), l.mode, l.relation::regclass)
FROM pg_locks l JOIN pg_stat_activity a USING (pid) JOIN pg_class c ON c.oid = l.relation
WHERE l.granted AND a.pid <> pg_backend_pid() AND a.datname = current_database()
  AND c.relnamespace = current_schema()::regnamespace AND c.relkind IN ('r', 'p')
ORDER BY l.mode = 'AccessExclusiveLock' DESC, a.xact_start, c.relname LIMIT 3
"""


class SchemaStatus(StrEnum):
    """How a database's schema stands to this program."""

    CURRENT = "current"
    MISSING = "missing"
    OLDER = "older"
    NEWER = "newer"


@dataclass(frozen=True, slots=True)
class SchemaState:
    """A database's revision (None: it has no schema), and what that means here."""

    status: SchemaStatus
    revision: str | None

    @property
    def message(self) -> str:
        match self.status:
            case SchemaStatus.CURRENT:
                return f"the database's schema is current ({HEAD})"
            case SchemaStatus.MISSING:
                return (
                    f"the database has no schema, this program needs {HEAD}: run `orbit db upgrade`"
                )
            case SchemaStatus.OLDER:
                return (
                    f"the database's schema is {self.revision}, this program needs {HEAD}:"
                    " run `orbit db upgrade`"
                )
            case SchemaStatus.NEWER:
                return (
                    f"the database's schema {self.revision} is newer than this program, which"
                    f" knows {HEAD}: upgrade Orbit"
                )


def check(dsn: str, *, lock_timeout: timedelta = timedelta(seconds=3)) -> SchemaState:
    """The state of the schema, read without changing anything.

    Raises DatabaseUnavailable if the database does not answer, refuses, or is too old.
    """
    with _explained(dsn), _connect(dsn) as connection:
        _bound_waiting(connection, lock_timeout)
        return _read_state(connection)


def require_current(dsn: str) -> None:
    """Raises SchemaMismatch, saying what to do, unless the schema is this program's."""
    state = check(dsn)
    if state.status is not SchemaStatus.CURRENT:
        raise SchemaMismatch(state.message, status=state.status.value, revision=state.revision)


def upgrade(
    owner_dsn: str,
    app_role: str | None = None,
    *,
    lock_timeout: timedelta = timedelta(seconds=3),
    patience: timedelta = timedelta(seconds=60),
    by: str = "upgrade",
) -> SchemaState:
    """Brings the schema to HEAD and gives `app_role` what it needs; returns the state before.

    The audit trail tells that `by` did it, unless the schema is new.

    That is rights and, if the owner may do so, the settings of its sessions in this database.

    `lock_timeout` bounds the wait for any one table, three times over; `patience` the wait for
    another session that is upgrading. Raises SchemaMismatch if the schema is newer than this
    program, DatabaseUnavailable otherwise; the database is then as it was.
    """
    with _explained(owner_dsn):
        for remaining in reversed(range(_TRIES)):
            try:
                return _upgrade_once(owner_dsn, app_role, lock_timeout, patience, by)
            except psycopg.errors.LockNotAvailable:
                if remaining == 0:
                    raise
                time.sleep(_PAUSE_SECONDS)  # lets those through who queued behind us
    raise AssertionError("the last try returns or raises")


def offline_sql() -> str:
    """The script that makes the schema on an empty database, for whoever runs DDL by hand."""
    from alembic import command  # noqa: PLC0415 — not at start: see above

    script = StringIO()
    config = _config(output_buffer=script)
    config.attributes["preamble"] = (
        "SET LOCAL lock_timeout = '10s';",
        f"SELECT pg_advisory_xact_lock({_UPGRADE_LOCK});",
    )
    command.upgrade(config, "head", sql=True)
    return script.getvalue()


def run_script(path: Path) -> None:
    """Runs a migration's SQL file as it is, or writes it out. Called by the migrations.

    Neither SQLAlchemy nor psycopg may look for parameters in it: `%`, `:name` and dollar
    quotes are the file's own.
    """
    from alembic import op  # noqa: PLC0415 — not at start: see above

    text = path.read_text(encoding="utf-8")
    context = op.get_context()
    if context.as_sql:
        context.impl.static_output(text)
        return
    driver: Any = op.get_bind().connection.driver_connection
    driver.execute(text.encode(), prepare=False)


def _upgrade_once(
    owner_dsn: str, app_role: str | None, lock_timeout: timedelta, patience: timedelta, by: str
) -> SchemaState:
    from sqlalchemy import create_engine  # noqa: PLC0415 — not at start: see above
    from sqlalchemy.exc import DBAPIError  # noqa: PLC0415
    from sqlalchemy.pool import NullPool  # noqa: PLC0415

    engine = create_engine(
        "postgresql+psycopg://", creator=lambda: _connect(owner_dsn), poolclass=NullPool
    )
    try:
        with engine.begin() as wrapped:
            driver: Any = wrapped.connection.driver_connection
            _wait_for_turn(driver, patience)
            _bound_waiting(driver, lock_timeout)
            before = _read_state(driver)
            if before.status is SchemaStatus.NEWER:
                raise SchemaMismatch(
                    before.message, status=before.status.value, revision=before.revision
                )
            if before.status is not SchemaStatus.CURRENT:
                _run_migrations(wrapped)
                _note_upgrade(driver, before, by)
            _grant(driver, app_role)
            return before
    except DBAPIError as error:
        if isinstance(error.orig, psycopg.Error):
            raise error.orig from None
        raise


def _note_upgrade(driver: Connection[Any], before: SchemaState, by: str) -> None:
    """The audit trail tells who changed the schema; where one is made new, it begins by itself."""
    if before.status is SchemaStatus.OLDER:
        detail = {"from": before.revision, "to": HEAD}
        act = {"action": "schema.upgraded", "actor": by, "detail": detail}
        body = canonical_json(act).decode()
        driver.execute("SELECT orbit_append_audit(ARRAY['*'], ARRAY[%s])", [body])


def _run_migrations(wrapped: object) -> None:
    from alembic import command  # noqa: PLC0415 — not at start: see above

    config = _config()
    config.attributes["connection"] = wrapped
    command.upgrade(config, "head")


def _config(**options: Any) -> Config:
    from alembic.config import Config  # noqa: PLC0415 — not at start: see above

    config = Config(**options)
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _wait_for_turn(connection: Connection[Any], patience: timedelta) -> None:
    """Takes the lock of the one session that upgrades, until the transaction's end."""
    _bound_waiting(connection, patience)
    try:
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (_UPGRADE_LOCK,))
    except psycopg.errors.LockNotAvailable as error:
        raise DatabaseUnavailable(
            f"another session has been upgrading this database for {patience.total_seconds():g} s:"
            " wait for it or end it, then run `orbit db upgrade` again"
        ) from error


def _bound_waiting(connection: Connection[Any], longest: timedelta) -> None:
    milliseconds = max(1, longest // timedelta(milliseconds=1))
    connection.execute("SELECT set_config('lock_timeout', %s, true)", (f"{milliseconds}ms",))


def _read_state(connection: Connection[Any]) -> SchemaState:
    found = connection.execute("SELECT to_regclass('alembic_version') IS NOT NULL").fetchone()
    row = None
    if found is not None and found[0]:
        row = connection.execute("SELECT max(version_num) FROM alembic_version").fetchone()
    revision = row[0] if row is not None else None
    if revision is None:
        return SchemaState(SchemaStatus.MISSING, None)
    if revision == HEAD:
        return SchemaState(SchemaStatus.CURRENT, revision)
    is_known = revision in REVISIONS
    return SchemaState(SchemaStatus.OLDER if is_known else SchemaStatus.NEWER, revision)


def _grant(connection: Connection[Any], app_role: str | None) -> None:
    """What the schema's own `orbit_grant` says, reading the revision, and sessions' settings."""
    if app_role is None or app_role == connection.info.user:
        return
    role = sql.Identifier(app_role)
    connection.execute(sql.SQL("GRANT SELECT ON alembic_version TO {}").format(role))
    row = connection.execute("SELECT to_regprocedure('orbit_grant(name)') IS NOT NULL").fetchone()
    if row is not None and row[0]:
        connection.execute("SELECT orbit_grant(%s::name)", (app_role,))
    with suppress(psycopg.errors.InsufficientPrivilege), connection.transaction():
        _set_on_role(connection, role)


def _set_on_role(connection: Connection[Any], role: sql.Identifier) -> None:
    """What each session needs: a pooler hands sessions around, whoever had set what in them."""
    wanted = session_settings()
    query = "SELECT current_database(), name FROM pg_settings WHERE name = ANY(%s)"
    command = sql.SQL("ALTER ROLE {} IN DATABASE {} SET {} = {}")
    for database, name in connection.execute(query, (list(wanted),)).fetchall():
        place, setting = sql.Identifier(database), sql.Identifier(name)
        connection.execute(command.format(role, place, setting, sql.Literal(wanted[name])))


def _connect(dsn: str) -> Connection[Any]:
    """A session that works through PgBouncer too, on a server that Orbit can use."""
    timeout = conninfo_to_dict(dsn).get("connect_timeout", _CONNECT_SECONDS)
    connection = psycopg.connect(
        dsn, connect_timeout=timeout, prepare_threshold=None, application_name="orbit upgrade"
    )
    version = connection.info.server_version
    encoding = connection.info.parameter_status("server_encoding")
    if version // 10000 < OLDEST_SERVER:
        connection.close()
        raise DatabaseUnavailable(
            f"the database is PostgreSQL {version // 10000}: Orbit needs {OLDEST_SERVER} or newer"
        )
    if encoding != "UTF8":
        connection.close()
        raise DatabaseUnavailable("the database's encoding has to be UTF8: make it anew with that")
    return connection


@contextmanager
def _explained(dsn: str) -> Iterator[None]:
    """Turns the driver's errors into DatabaseUnavailable, with the server's own words."""
    try:
        yield
    except psycopg.errors.LockNotAvailable as error:
        raise DatabaseUnavailable(
            f"another session holds a lock on a table of Orbit's ({_holders(dsn)}): end it or wait,"
            " then run `orbit db upgrade` again; nothing was changed"
        ) from error
    except psycopg.Error as error:
        raise DatabaseUnavailable(f"the database refuses: {first_line(error)}") from error


def _holders(dsn: str) -> str:
    try:
        with _connect(dsn) as connection:
            rows = connection.execute(_HOLDERS).fetchall()
    except psycopg.Error:
        rows = []
    return "; ".join(row[0] for row in rows) or "it has let go meanwhile"
