"""What tests of the audit trail share: an owner whom no trigger stops, a signer, a short trail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from orbit.audit.sealing import seal
from orbit.audit.signing import Signer
from orbit.audit.trail import Act, append
from orbit.clock import DatabaseClock, new_id
from orbit.database.pool import Database

Owner = psycopg.Connection[Any]


@pytest.fixture
def owner(owner_dsn: str) -> Iterator[Owner]:
    """The owner's session, with no trigger that would refuse it anything."""
    with psycopg.connect(owner_dsn, autocommit=True) as connection:
        for (table,) in connection.execute(
            "SELECT tgrelid::regclass::text FROM pg_trigger WHERE tgname = 'append_only'"
        ).fetchall():
            connection.execute(f"ALTER TABLE {table} DISABLE TRIGGER append_only")
        yield connection


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where checkpoints go."""
    return tmp_path / "checkpoints"


@pytest.fixture
def key() -> Ed25519PrivateKey:
    """The signer's key."""
    return Ed25519PrivateKey.generate()


@pytest.fixture
def signer(dsn: str, clock: DatabaseClock, key: Ed25519PrivateKey, folder: Path) -> Signer:
    """A node's signer."""
    return Signer(dsn, clock, key, folder)


@pytest.fixture
async def trail(database: Database, owner: Owner, node_id: str, clock: DatabaseClock) -> None:
    """Ten acts in `ns`, and three sealed dead letters between them."""
    for number in range(1, 11):
        async with database.batch() as connection:
            act = Act("ns", "test.done", "a person", subject=f"thing-{number}")
            await append(connection, act)
        if number == 5:
            for _ in range(3):
                owner.execute(
                    "INSERT INTO dead_letter_dispatch VALUES ('ns', %s, %s, 'e', 'status 500', 4)",
                    (new_id(clock.now()), new_id(clock.now())),
                )
            await seal(database, node_id)
