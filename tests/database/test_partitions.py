"""Time partitions: made ahead, by several sessions at once, dropped whole when not needed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from psycopg import Connection

from orbit.clock import new_id
from orbit.services.janitor import RETAINED_FACTS

WEEK = timedelta(days=7)
OLD = datetime(2020, 1, 6, 12, tzinfo=UTC)  # a Monday

_PARTITIONS = """
SELECT parent.relname, child.relname, pg_get_expr(child.relpartbound, child.oid),
    (SELECT count(*) FROM pg_trigger WHERE tgrelid = child.oid AND tgenabled = 'A')
FROM pg_inherits JOIN pg_class child ON child.oid = inhrelid
JOIN pg_class parent ON parent.oid = inhparent
WHERE parent.relkind = 'p' AND parent.relnamespace = current_schema()::regnamespace
ORDER BY 1, 2
"""
_LEASES = {
    "cycle_lease": "INSERT INTO cycle_lease (namespace, cycle_id, run_profile_id, due_at)"
    " VALUES ('a', %s, '', 'infinity')",
    "dispatch_lease": "INSERT INTO dispatch_lease"
    " (namespace, job_id, endpoint_key, cycle_id, due_at)"
    " VALUES ('a', gen_random_uuid(), 'one', %s, 'infinity')",
}


@pytest.fixture
def owner(owner_dsn: str) -> Iterator[Connection]:
    """A superuser's session."""
    with psycopg.connect(owner_dsn, autocommit=True) as connection:
        yield connection


@pytest.fixture
def old(owner: Connection) -> Connection:
    """A database that was first used three weeks in January 2020."""
    owner.execute(
        "CREATE OR REPLACE FUNCTION orbit_now() RETURNS timestamptz LANGUAGE sql STABLE"
        f" PARALLEL SAFE RETURN '{OLD.isoformat()}'::timestamptz"
    )
    owner.execute("SELECT orbit_create_partitions(orbit_now() + interval '14 days')")
    owner.execute(
        "CREATE OR REPLACE FUNCTION orbit_now() RETURNS timestamptz LANGUAGE sql STABLE"
        " PARALLEL SAFE RETURN statement_timestamp()"
    )
    return owner


def partitions(connection: Connection, fact: str = "cycle_run") -> list[str]:
    """The first days of a fact's partitions."""
    return [child[-8:] for parent, child, *_ in connection.execute(_PARTITIONS) if parent == fact]


def drop(connection: Connection, before: datetime, fact: str = "cycle_run") -> list[str]:
    """The first days of the partitions that were dropped."""
    row = connection.execute(
        "SELECT orbit_drop_partitions(%s::regclass, %s)", (fact, before)
    ).fetchone()
    assert row is not None
    return [name[-8:] for name in row[0]]


def test_partitions_reach_three_weeks_ahead(owner: Connection) -> None:
    """Each partitioned fact has this week and the next three without a gap, and no default."""
    rows = owner.execute(_PARTITIONS).fetchall()
    (facts,) = owner.execute("SELECT count(*) FROM pg_partitioned_table").fetchone() or (0,)
    (monday,) = owner.execute(
        "SELECT date_trunc('week', orbit_now() AT TIME ZONE 'UTC')::date"
    ).fetchone() or (None,)
    assert monday is not None
    expected = [f"{monday + week * WEEK:%Y%m%d}" for week in range(4)]
    assert len({parent for parent, *_ in rows}) == facts > 5
    for fact in {parent for parent, *_ in rows}:
        assert partitions(owner, fact) == expected
    assert [bound for _, _, bound, _ in rows if "DEFAULT" in bound] == []


def test_making_partitions_again_makes_none(owner: Connection) -> None:
    """The janitor may ask as often as it likes; asking further ahead makes what is missing."""
    ask = "SELECT orbit_create_partitions(orbit_now() + %s)"
    (facts,) = owner.execute("SELECT count(*) FROM pg_partitioned_table").fetchone() or (0,)
    assert owner.execute(ask, (timedelta(days=21),)).fetchone() == (0,)
    assert owner.execute(ask, (timedelta(days=28),)).fetchone() == (facts,)


def test_several_sessions_make_each_partition_once(dsn: str, owner: Connection) -> None:
    """Janitors of several nodes, as the application's role, at once: no error, none made twice."""

    def make(_: int) -> int:
        with psycopg.connect(dsn, autocommit=True) as connection:
            row = connection.execute(
                "SELECT orbit_create_partitions(orbit_now() + interval '56 days')"
            ).fetchone()
        assert row is not None
        return int(row[0])

    (facts,) = owner.execute("SELECT count(*) FROM pg_partitioned_table").fetchone() or (0,)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(make, range(4)))
    assert sum(made) == facts * 5
    assert {triggers for *_, triggers in owner.execute(_PARTITIONS)} == {1}


def test_a_row_outside_every_partition_is_refused(owner: Connection) -> None:
    """There is no place where a fact could get lost: the error names the table."""
    with pytest.raises(
        psycopg.errors.CheckViolation, match='no partition of relation "initiation"'
    ):
        owner.execute(
            "INSERT INTO initiation VALUES ('a', %s, 'hash', '{}')",
            (new_id(datetime(2090, 1, 1, tzinfo=UTC)),),
        )


def test_an_id_lies_in_the_partition_of_its_week(old: Connection) -> None:
    """Monday's first millisecond belongs to the new week, the one before to the old."""
    monday = datetime(2020, 1, 13, tzinfo=UTC)
    for at, expected in ((monday, "20200113"), (monday - timedelta(milliseconds=1), "20200106")):
        row = old.execute(
            "INSERT INTO initiation VALUES ('a', %s, 'hash', '{}')"
            " RETURNING tableoid::regclass::text, orbit_id_time(cycle_id)",
            (new_id(at),),
        ).fetchone()
        assert row is not None
        assert (row[0][-8:], row[1]) == (expected, at)


def test_only_whole_old_partitions_are_dropped(old: Connection) -> None:
    """A partition goes when its last moment is past the retention, not before."""
    assert drop(old, datetime(2020, 1, 12, 23, 59, tzinfo=UTC)) == []
    assert drop(old, datetime(2020, 1, 20, tzinfo=UTC)) == ["20200106", "20200113"]
    assert partitions(old)[0] == "20200120"
    assert partitions(old, "payload")[0] == "20200106"


@pytest.mark.parametrize("lease", ["cycle_lease", "dispatch_lease"])
def test_what_live_work_needs_stays(old: Connection, lease: str) -> None:
    """A cycle or job that still lives keeps its week and all later ones, however old."""
    old.execute(_LEASES[lease], (new_id(OLD + WEEK),))
    assert drop(old, datetime(2024, 1, 1, tzinfo=UTC)) == ["20200106"]
    old.execute(f"DELETE FROM {lease}")
    assert drop(old, datetime(2020, 1, 27, tzinfo=UTC)) == ["20200113", "20200120"]


def test_a_temporary_table_cannot_stand_for_a_lease(old: Connection, dsn: str) -> None:
    """What runs with the owner's rights looks at Orbit's tables, not at the caller's own."""
    old.execute(_LEASES["cycle_lease"], (new_id(OLD),))
    with psycopg.connect(dsn, autocommit=True) as application:
        application.execute("CREATE TEMP TABLE cycle_lease (cycle_id uuid)")
        assert drop(application, datetime(2024, 1, 1, tzinfo=UTC)) == []


def test_dropping_does_not_wait_behind_a_reader(old: Connection, dsn: str) -> None:
    """A long read of a fact delays the drop to another time, instead of all who queue behind it."""
    old.execute(
        "ALTER FUNCTION orbit_drop_partitions(regclass, timestamptz) SET lock_timeout = '20ms'"
    )
    with psycopg.connect(dsn) as reader:
        reader.execute("SELECT FROM cycle_run")
        assert drop(old, datetime(2020, 1, 20, tzinfo=UTC)) == []
    assert drop(old, datetime(2020, 1, 20, tzinfo=UTC)) == ["20200106", "20200113"]


def test_only_what_retention_names_is_dropped(old: Connection, dsn: str) -> None:
    """Ledgers, dead letters and audit stay, whoever asks: the list is the janitor's own."""
    rows = old.execute(
        "SELECT relname FROM pg_class WHERE relkind IN ('r', 'p')"
        " AND NOT relispartition AND relnamespace = current_schema()::regnamespace"
    ).fetchall()
    permitted = set()
    with psycopg.connect(dsn, autocommit=True) as application:
        for (name,) in rows:
            try:
                drop(application, datetime(2020, 1, 13, tzinfo=UTC), f"{name}")
            except psycopg.errors.InsufficientPrivilege:
                continue
            permitted.add(name)
    assert permitted == set(RETAINED_FACTS)


@pytest.mark.parametrize(
    "before", ["orbit_now() - interval '23 hours'", "orbit_now() + interval '60 days'", "NULL"]
)
def test_what_is_recent_is_not_dropped(dsn: str, before: str) -> None:
    """The application's role cannot drop what is in use, by whatever time it gives."""
    with psycopg.connect(dsn, autocommit=True) as application:
        found = partitions(application)
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="of the last day"):
            application.execute(f"SELECT orbit_drop_partitions('cycle_run', {before})".encode())
        assert partitions(application) == found


def test_partitions_are_not_made_without_bound(dsn: str) -> None:
    """A year ahead is the most that anyone can ask for."""
    with psycopg.connect(dsn, autocommit=True) as application:
        for through in ("orbit_now() + interval '13 months'", "'infinity'"):
            with pytest.raises(psycopg.errors.InvalidParameterValue, match="a year ahead"):
                application.execute(f"SELECT orbit_create_partitions({through})".encode())
