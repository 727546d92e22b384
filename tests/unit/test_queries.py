"""Named SQL: found by name, and arrays that say what they were given."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from orbit.database.queries import array, load


def test_a_statement_is_found_by_its_name() -> None:
    """Statements are bytes, in the file's order, with their comments."""
    queries = load("node")
    assert queries.names()[0] == "enter_node"
    assert queries.now.startswith(b"-- ")
    assert queries.now.endswith(b"SELECT orbit_now() AS now;")
    assert load("node") is queries


def test_an_unknown_name_is_an_error_that_says_where() -> None:
    """A misspelt name fails with the file that it is not in."""
    with pytest.raises(AttributeError, match=r"sql/node\.sql has no statement nwo"):
        _ = load("node").nwo
    with pytest.raises(FileNotFoundError):
        load("nothing")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], "{}"),
        (["a", None, ""], '{"a",NULL,""}'),
        ([1, 2.5, True], "{1,2.5,True}"),
        ([None, None], "{NULL,NULL}"),
        (['say "x"', "back\\slash", "a,b{c}", "NULL"], None),
        ([datetime(2026, 1, 1, tzinfo=UTC)], '{"2026-01-01 00:00:00+00:00"}'),
    ],
)
def test_an_array_is_a_literal(values: list[object], expected: str | None) -> None:
    """Each text is quoted, so that none is taken for syntax or for a null."""
    if expected is not None:
        assert array(values) == expected
    assert array(values).count("NULL") >= values.count(None)


def test_a_part_stands_in_the_statements_that_name_it() -> None:
    """Without its words and its end, so that the whole is one statement."""
    audit = load("audit")
    part = audit.canonical_facts.decode()
    code = part[part.index("SELECT") :].rstrip(";")
    assert code in audit.facts.decode()
    assert code in audit.seal_facts.decode()
    assert not [name for name in audit.names() if b"{{" in getattr(audit, name)]
