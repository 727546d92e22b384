"""The house rules of the SQL files: explained statements, and indexes that name their queries."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orbit.database.queries import array, load
from tests.conftest import TestServer

FILES = sorted(Path(str(files("orbit.database").joinpath("sql"))).glob("*.sql"))

_INDEXES = """
SELECT index_class.relname, obj_description(indexrelid, 'pg_class') FROM pg_index
JOIN pg_class index_class ON index_class.oid = indexrelid
JOIN pg_class table_class ON table_class.oid = indrelid
WHERE NOT indisprimary AND index_class.relnamespace = current_schema()::regnamespace
    AND NOT table_class.relispartition
"""


@pytest.fixture(scope="module")
def connection(server: TestServer) -> Iterator[psycopg.Connection]:
    """A session for what needs no table."""
    with psycopg.connect(server.owner("postgres"), autocommit=True) as connection:
        yield connection


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_statement_is_explained_in_one_to_four_lines(file: Path) -> None:
    """Each says what it does, which index serves it, in which order it locks; and is one."""
    parts = re.split(r"^-- name: (\w+)$", file.read_text(), flags=re.MULTILINE)
    names, bodies = parts[1::2], parts[2::2]
    assert parts[0].startswith("-- ")
    assert names
    assert len(set(names)) == len(names)
    for name, body in zip(names, bodies, strict=True):
        lines = body.strip().splitlines()
        comments = [line for line in lines if line.startswith("--")]
        assert 1 <= len(comments) <= 4, name
        assert lines[: len(comments)] == comments, name
        assert lines[-1].endswith(";"), name
        assert "\n".join(lines[len(comments) :]).count(";") == 1, name


def test_every_index_names_the_queries_that_it_serves(owner_dsn: str) -> None:
    """An index without a query, or with one that is gone, costs and serves nobody."""
    with psycopg.connect(owner_dsn) as connection:
        rows = connection.execute(_INDEXES).fetchall()
    assert rows
    for name, comment in rows:
        named = re.findall(r"\b([a-z_]+)\.([a-z_]+)\b", (comment or "").split(": ")[0])
        assert named, f"{name} names no query: {comment}"
        for concept, statement in named:
            assert statement in load(concept).names(), f"{name} names {concept}.{statement}"


def test_every_index_that_a_statement_names_exists(owner_dsn: str) -> None:
    """`x serves it` in a statement's comment is true of the schema."""
    with psycopg.connect(owner_dsn) as connection:
        names = {name for name, _ in connection.execute(_INDEXES)}
    for file in FILES:
        for name in re.findall(r"(\w+) serves? it", file.read_text()):
            assert name in names | {"key", "keys"}, f"{file.name} names {name}"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.none() | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")),
        max_size=6,
    )
)
def test_the_database_reads_an_array_as_it_was_given(
    connection: psycopg.Connection, values: list[str | None]
) -> None:
    """Quotes, backslashes, braces, commas and line feeds arrive as themselves."""
    assert connection.execute("SELECT %s::text[]", (array(values),)).fetchone() == (values,)
