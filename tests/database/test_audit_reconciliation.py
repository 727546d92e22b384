"""Halts, rules and keys, held both ways against what the trail says of them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from orbit.audit.verification import verify
from orbit.clock import DatabaseClock
from orbit.database.pool import Database
from orbit.errors import NamespaceHalted, SecondPersonRequired
from orbit.governance.actor import Scope, actor_here
from orbit.governance.halt import Brake, Order
from orbit.governance.keys import Grant, Keys
from orbit.governance.rules import ALL, set_two_persons

SPACE = "brand-a"
ANN = Order(SPACE, "ann", "key-1", "a test")
BEN = Order(SPACE, "ben", "key-2", "a test")


@pytest.fixture
def owner(owner_dsn: str) -> Iterator[psycopg.Connection[Any]]:
    """The owner's session, which may change what has a trigger against it."""
    with psycopg.connect(owner_dsn, autocommit=True) as connection:
        for table in (
            "namespace_halt",
            "namespace_resume",
            "governance_setting",
            "access_key",
            "access_key_end",
        ):
            connection.execute(f"ALTER TABLE {table} DISABLE TRIGGER append_only".encode())
        connection.execute(
            "ALTER TABLE namespace_resume DROP CONSTRAINT namespace_resume_namespace_epoch_fkey"
        )
        yield connection


@pytest.fixture
async def key_id(database: Database, node_id: str, clock: DatabaseClock) -> str:
    """Every governed act there is of these, done or refused; the id of a key that was rotated."""

    async def recover(_namespace: str) -> None:
        """Nothing is lost here."""

    brake = Brake(database, node_id, recover=recover, on_changed=lambda: None)
    await set_two_persons(database, node_id, Order(ALL, "ann", "key-1", "rule"), is_wanted=True)
    await brake.halt(ANN, wait_seconds=0)
    with pytest.raises(NamespaceHalted):
        await set_two_persons(database, node_id, ANN, is_wanted=False)
    await brake.resume(ANN)
    with pytest.raises(SecondPersonRequired):
        await brake.resume(ANN)
    await brake.resume(BEN)
    await set_two_persons(database, node_id, ANN, is_wanted=False)
    await brake.halt(ANN, until=clock.now() + timedelta(hours=1), wait_seconds=0)
    await brake.halt(ANN, wait_seconds=0)
    await brake.resume(BEN)
    keys, here = Keys(database, clock), actor_here()
    made = await keys.create(here, Grant("ci", (Scope.OPERATOR,), (SPACE, "brand-b")))
    new = await keys.rotate(here, made.key_id, timedelta(hours=1))
    await keys.revoke(here, new.key_id, "lost")
    await keys.revoke(here, new.key_id, "lost again")
    return made.key_id


def found(dsn: str) -> list[str]:
    """What verification finds."""
    return [str(one) for one in verify(dsn).findings]


@pytest.mark.usefixtures("key_id")
def test_what_was_done_by_orbit_has_its_entries(dsn: str) -> None:
    """Acts, repeated ones and refused ones leave nothing to find, in all logs and in one."""
    assert found(dsn) == []
    assert verify(dsn, log=SPACE).findings == []


@pytest.mark.usefixtures("key_id")
@pytest.mark.parametrize(
    ("tampering", "words"),
    [
        ("DELETE FROM namespace_halt WHERE epoch = 3", "halt: what it is about (epoch 3)"),
        ("DELETE FROM namespace_resume WHERE step = 'asked'", "resume.asked: what it is about"),
        (
            "UPDATE namespace_resume SET cause = 'until' WHERE epoch = 1 AND step = 'resumed'",
            "namespace_resume epoch 1 has no entry resume.until",
        ),
        (
            (
                "INSERT INTO namespace_resume SELECT namespace, 2, 'resumed', cause, reason, "
                "actor, actor_id, node_id FROM namespace_resume LIMIT 1"
            ),
            "namespace_resume epoch 2 has no entry resume",
        ),
        (
            (
                "INSERT INTO namespace_halt SELECT 'brand-b', epoch, reason, actor, actor_id, "
                "until_at, node_id FROM namespace_halt LIMIT 1"
            ),
            "brand-b: namespace_halt epoch",
        ),
        (
            (
                "INSERT INTO halt_drill SELECT namespace, epoch, true, 200, 100, 9, true, 0.1, 2, "
                "0, true, 100, 0, actor, actor_id, node_id FROM namespace_halt WHERE epoch = 1"
            ),
            "*: halt_drill brand-a has no entry drill.halt",
        ),
        (
            (
                "INSERT INTO governance_setting SELECT namespace, setting, 2, 'false', reason, "
                "actor, actor_id, node_id FROM governance_setting WHERE namespace = '*'"
            ),
            "*: governance_setting two_person_resume/2 has no entry setting",
        ),
        (
            "DELETE FROM governance_setting WHERE namespace = '*'",
            "setting: what it is about (two_person_resume/1) is not there",
        ),
        (
            "UPDATE access_key SET namespaces = '{*}' WHERE replaces IS NULL",
            "has no entry key.created",
        ),
        (
            (
                "INSERT INTO access_key (key_id, root_id, name, scopes, namespaces, secret_sha256, "
                "created_by) SELECT 'aaaaaaaaaaaaaaaa', 'aaaaaaaaaaaaaaaa', 'x', '{admin}', '{*}', "
                "secret_sha256, 'x' FROM access_key LIMIT 1"
            ),
            "*: access_key key aaaaaaaaaaaaaaaa has no entry key.created",
        ),
        ("DELETE FROM access_key_end WHERE kind = 'revoked'", "key.revoked: what it is about"),
        ("DELETE FROM access_key_end WHERE kind = 'rotated'", "key.rotated: what it is about"),
        (
            (
                "INSERT INTO namespace_halt SELECT 'brand-b', epoch, reason, actor, actor_id, "
                "until_at, node_id, '2001-01-01Z' FROM namespace_halt LIMIT 1"
            ),
            "namespace_halt had 0 changes when the trail began, and has 1 of that time now",
        ),
    ],
)
def test_what_was_done_past_orbit_is_found(
    dsn: str, owner: psycopg.Connection[Any], tampering: str, words: str
) -> None:
    """A halt, resumption, drill, rule or key that was dropped, added, altered or dated back."""
    assert (owner.execute(tampering.encode())).rowcount > 0
    assert words in "\n".join(found(dsn))


def test_a_rotated_key_is_named_with_its_successor(dsn: str, key_id: str) -> None:
    """Both are keys that came to be, in each namespace that they reach."""
    with psycopg.connect(dsn) as connection:
        rows = connection.execute(
            "SELECT namespace, action, subject, detail ->> 'newKeyId' FROM audit_trail"
            " WHERE action LIKE 'key.%' ORDER BY namespace, seq"
        ).fetchall()
    for space in (SPACE, "brand-b"):
        created, rotated, successor, revoked = [row[1:] for row in rows if row[0] == space]
        assert created == ("key.created", f"key {key_id}", None)
        assert rotated[:2] == ("key.rotated", f"key {key_id}")
        assert successor == ("key.created", f"key {rotated[2]}", None)
        assert revoked == ("key.revoked", f"key {rotated[2]}", None)
