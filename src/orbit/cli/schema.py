"""`db`: the database's schema and its leases, for whoever looks after them.

`upgrade` uses the role that owns the tables, everything else the application's. The embedded
server is joined for the verb and left at its end; the last one out stops it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orbit.cli.client import has_embedded_data
from orbit.cli.options import Json, group, settings
from orbit.cli.outcome import fail
from orbit.cli.terminal import print_json, say
from orbit.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from orbit.settings import Settings

app = group("Look after the database.")

_NEWEST_SERVER = 18
_WEEKS_AHEAD = 1

_PARTITIONS = b"""
SELECT parent.relname AS fact, count(child.oid)::int AS partitions,
    to_char(max(to_date(right(child.relname, 8), 'YYYYMMDD')) + 7, 'YYYY-MM-DD') AS until,
    coalesce(max(to_date(right(child.relname, 8), 'YYYYMMDD')) + 7
        >= (orbit_now() AT TIME ZONE 'UTC')::date + %s * 7, false) AS is_enough
FROM pg_partitioned_table JOIN pg_class parent ON parent.oid = partrelid
LEFT JOIN pg_inherits ON inhparent = parent.oid
LEFT JOIN pg_class child ON child.oid = inhrelid
WHERE parent.relnamespace = current_schema()::regnamespace AND partstrat = 'r'
GROUP BY parent.relname ORDER BY parent.relname
"""


@dataclass(frozen=True, slots=True)
class Access:
    """How to reach the database: as the application, as the owner, and the former's role."""

    dsn: str
    owner_dsn: str
    app_role: str | None


@dataclass(frozen=True, slots=True)
class Check:
    """One look at the database; `hint` says what to do where it is not good."""

    name: str
    is_good: bool
    message: str
    hint: str = ""


@contextmanager
def access(given: Settings) -> Iterator[Access]:
    """The database of the settings, joined if it is the embedded one.

    Raises EmbeddedServerFailed.
    """
    if given.database_url is not None:
        owner = given.database_owner_url or given.database_url
        role = _role(given.database_url) if owner != given.database_url else None
        yield Access(given.database_url, owner, role)
        return
    from orbit.database.embedded import APPLICATION_ROLE, EmbeddedServer

    server = EmbeddedServer.start(given.data_dir)
    try:
        yield Access(server.dsn, server.owner_dsn, APPLICATION_ROLE)
    finally:
        server.leave()


def refuse_without_data(given: Settings) -> None:
    """Raises DatabaseUnavailable if there is no embedded database yet: a look makes none."""
    if given.database_url is None and not has_embedded_data(given):
        raise DatabaseUnavailable(
            f"there is no database in {given.data_dir}: `orbit up` or `orbit db upgrade` makes it"
        )


@app.command()
def upgrade(is_json: Json = False) -> None:
    """Bring the schema to this program's."""
    from orbit.database.upgrade import HEAD, SchemaStatus
    from orbit.database.upgrade import upgrade as run_upgrade
    from orbit.governance.actor import actor_here

    with access(settings()) as database:
        who = actor_here().name
        before = run_upgrade(database.owner_dsn, database.app_role, by=who)
    is_changed = before.status is not SchemaStatus.CURRENT
    if is_json:
        print_json({"before": before.revision, "revision": HEAD, "isChanged": is_changed})
    elif is_changed:
        say(f"Upgraded the schema from {before.revision or 'nothing'} to {HEAD}.")
    else:
        say(f"The schema is current ({HEAD}); nothing to do.")


@app.command()
def check(is_json: Json = False) -> None:
    """Check server, schema and partitions."""
    given = settings()
    refuse_without_data(given)
    with access(given) as database:
        found = checks(database.dsn)
    if is_json:
        print_json(
            {
                "isGood": all(one.is_good for one in found),
                "checks": [
                    {"name": one.name, "isGood": one.is_good, "message": one.message}
                    for one in found
                ],
            }
        )
    else:
        for one in found:
            say(f"{'✓' if one.is_good else '✗'} {one.name}: {one.message}")
            if one.hint and not one.is_good:
                say(f"  → {one.hint}")
    if not all(one.is_good for one in found):
        fail()


@app.command()
def repair(is_json: Json = False) -> None:
    """Rebuild every lease from the facts; nodes may be up."""
    given = settings()
    refuse_without_data(given)
    result = asyncio.run(_repair(given))
    if is_json:
        print_json(result)
        return
    for name, count in result.items():
        say(f"{name.replace('_', ' ')}: {count}")
    if not any(result.values()):
        say("Every lease is there; nothing to do.")


@app.command()
def sql(is_json: Json = False) -> None:
    """Print the schema as a script, for DBAs."""
    from orbit.database.upgrade import HEAD, offline_sql

    script = offline_sql()
    if is_json:
        print_json({"revision": HEAD, "sql": script})
    else:
        print(script, end="")


def checks(dsn: str) -> list[Check]:
    """What `db check` and `doctor` look at. Raises DatabaseUnavailable."""
    from orbit.database import upgrade as schema

    state = schema.check(dsn)
    is_current = state.status is schema.SchemaStatus.CURRENT
    version, partitions = _look(dsn, has_schema=is_current)
    major = version // 10_000
    found = [
        Check(
            "server",
            schema.OLDEST_SERVER <= major <= _NEWEST_SERVER,
            f"PostgreSQL {major}.{version % 10_000}",
            f"Orbit is tested on PostgreSQL {schema.OLDEST_SERVER} to {_NEWEST_SERVER}",
        ),
        Check("schema", is_current, state.message),
    ]
    if is_current:
        short = [row for row in partitions if not row["is_enough"]]
        until = min((row["until"] for row in partitions if row["until"]), default="nothing")
        message = f"{len(partitions)} partitioned facts, made until {until}"
        if short:
            message = "too short: " + ", ".join(f"{one['fact']} ({one['until']})" for one in short)
        hint = "a node's janitor makes them: start one with `orbit up`"
        found.append(Check("partitions", not short, message, hint))
    return found


def _look(dsn: str, *, has_schema: bool) -> tuple[int, list[dict[str, Any]]]:
    import psycopg
    from psycopg.rows import dict_row

    from orbit.database.pool import first_line

    try:
        with psycopg.connect(dsn, connect_timeout=10, row_factory=dict_row) as connection:
            version = connection.info.server_version
            cursor = connection.execute(_PARTITIONS, (_WEEKS_AHEAD,)) if has_schema else None
            return version, cursor.fetchall() if cursor else []
    except psycopg.Error as error:
        raise DatabaseUnavailable(f"the database refuses: {first_line(error)}") from error


async def _repair(given: Settings) -> dict[str, int]:
    from orbit.app import Store
    from orbit.audit.trail import INSTALLATION, Act, append
    from orbit.database.repair import repair as rebuild
    from orbit.governance.actor import actor_here

    async def note(connection: Any, rebuilt: Mapping[str, int]) -> None:
        act = Act(INSTALLATION, "leases.rebuilt", actor_here().name, detail=dict(rebuilt))
        await append(connection, act)

    store = Store(given)
    try:
        await store.open()
        return await rebuild(store.database, note)
    finally:
        await store.close()


def _role(dsn: str) -> str | None:
    from psycopg.conninfo import conninfo_to_dict

    user = conninfo_to_dict(dsn).get("user")
    return str(user) if user else None
