"""What somebody does who knows how the trail is verified: ways around it, and none of them works.

Facts are judged by their numbers and not by what their rows say of a transaction; a log is looked
at though it has no entry; only a retirement that was declared is one; an export is whole only
where the public key vouches for it.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from orbit.audit.export import export, verify_export
from orbit.audit.sealing import seal
from orbit.audit.signing import Signer
from orbit.audit.trail import Act, append
from orbit.audit.verification import verify
from orbit.clock import SystemClock, new_id
from orbit.database.pool import Database
from orbit.services.janitor import Janitor
from tests.database.conftest import Owner

OLD = datetime(2020, 1, 6, 12, tzinfo=UTC)  # a Monday
RECEIPT = """
INSERT INTO delivery_receipt (namespace, job_id, attempt, endpoint_key, outcome, digest, size,
    lease_number, node_id, started_at)
VALUES ('ns', %s, 1, 'e', 'failed', sha256('x'), 1, 1, %s, orbit_now())
"""


def found(dsn: str) -> str:
    """What verification finds."""
    return "\n".join(str(one) for one in verify(dsn).findings)


@pytest.fixture
def old(owner: Owner) -> Owner:
    """The owner of a database that has partitions of three weeks in January 2020."""
    now = "CREATE OR REPLACE FUNCTION orbit_now() RETURNS timestamptz LANGUAGE sql STABLE RETURN "
    owner.execute(f"{now} '{OLD.isoformat()}'::timestamptz".encode())
    owner.execute("SELECT orbit_create_partitions(orbit_now() + interval '14 days')")
    owner.execute(f"{now} statement_timestamp()".encode())
    return owner


@pytest.mark.usefixtures("trail")
@pytest.mark.parametrize(
    "transaction", ["NULL", "'18446744073709551615'", "'9000000000000'", "'5'"]
)
def test_an_altered_fact_is_found_whatever_its_transaction(
    dsn: str, owner: Owner, transaction: str
) -> None:
    """A row with a number is always hashed: its transaction is no way out of being looked at."""
    owner.execute("ALTER TABLE dead_letter_dispatch DROP CONSTRAINT a_fact_has_its_transaction")
    owner.execute(
        f"UPDATE dead_letter_dispatch SET cause = 'ok', transaction_id = {transaction}".encode()
    )
    text = found(dsn)
    assert all(f"ns fact {number}: dead_letter_dispatch" in text for number in (1, 2, 3))


@pytest.mark.usefixtures("trail")
@pytest.mark.parametrize(
    ("transaction", "words"),
    [
        ("NULL", "has no transaction, and is younger than the trail: it was added"),
        ("'18446744073709551615'", "is of a transaction that cannot be: it was added"),
        ("'9223372036854775808'", "is of a transaction that cannot be: it was added"),
        ("'5'", "has no number: it was added"),
    ],
)
def test_a_forged_fact_is_found_whatever_its_transaction(
    dsn: str, owner: Owner, transaction: str, words: str
) -> None:
    """One without a number is counted as due only if its transaction can just have been."""
    owner.execute("ALTER TABLE dead_letter_dispatch DROP CONSTRAINT a_fact_has_its_transaction")
    owner.execute(
        "INSERT INTO dead_letter_dispatch (namespace, job_id, cycle_id, endpoint_key, cause,"
        f" attempts, transaction_id) VALUES ('ns', %s, %s, 'e', 'x', 1, {transaction})".encode(),
        (new_id(SystemClock().now() + timedelta(seconds=1)),) * 2,
    )
    assert words in found(dsn)


def test_the_application_cannot_add_a_fact_without_its_transaction(dsn: str, node_id: str) -> None:
    """What has none would never be sealed."""
    with (
        psycopg.connect(dsn, autocommit=True) as application,
        pytest.raises(psycopg.errors.CheckViolation, match="a_fact_has_its_transaction"),
    ):
        application.execute(
            "INSERT INTO dead_letter_dispatch (namespace, job_id, cycle_id, endpoint_key,"
            " cause, attempts, transaction_id) VALUES ('ns', %s, %s, 'e', 'x', 1, NULL)",
            (node_id, node_id),
        )


def test_a_fact_from_before_the_trail_fits_in_by_number(dsn: str, old: Owner) -> None:
    """One that is dated back to before the trail is one too many."""
    old.execute("ALTER TABLE dead_letter_dispatch DROP CONSTRAINT a_fact_has_its_transaction")
    old.execute(
        "INSERT INTO dead_letter_dispatch (namespace, job_id, cycle_id, endpoint_key, cause,"
        " attempts, transaction_id) VALUES ('ns', %s, %s, 'e', 'x', 1, NULL)",
        (new_id(OLD), new_id(OLD)),
    )
    assert "there were 0 rows of dead_letter_dispatch without a transaction" in found(dsn)


@pytest.mark.usefixtures("trail")
def test_a_log_whose_entries_are_all_gone_is_found(
    dsn: str, owner: Owner, signer: Signer, folder: Path, key: Ed25519PrivateKey
) -> None:
    """By its head; without that by its numbers; and in an export by its checkpoint."""
    signer.sign_all()
    owner.execute("DELETE FROM audit_trail_entry WHERE log = 'ns'")
    assert "ns entry 11: the head names entry 11 as the last, the log ends at 0" in found(dsn)
    owner.execute("DELETE FROM audit_head WHERE log = 'ns'")
    assert "ns fact 1: is in no sealed batch" in found(dsn)
    report = verify_export(export(dsn, folder, signer=signer), key.public_key())
    assert "ns: has no entry here" in "\n".join(map(str, report.findings))


async def test_the_only_entry_of_a_log_cannot_be_dropped(
    database: Database, dsn: str, owner: Owner
) -> None:
    """The last row of a log that has one is a tail too; so is that of the installation's."""
    async with database.batch() as connection:
        await append(connection, Act("small", "test.done", "a person"))
    owner.execute("DELETE FROM audit_trail_entry WHERE log = 'small'")
    assert "small entry 1: the head names entry 1" in found(dsn)
    owner.execute("DELETE FROM audit_head")
    owner.execute("DELETE FROM audit_trail_entry WHERE log = '*'")
    assert "* entry 1: is not the beginning of a trail" in found(dsn)


async def _retired(database: Database, owner: Owner, node_id: str) -> None:
    """A sealed receipt and a re-run of 2020, and the janitor with a retention of 30 days."""
    owner.execute(RECEIPT.encode(), (new_id(OLD), node_id))
    cycle_id = new_id(OLD)
    owner.execute(
        "INSERT INTO cycle_run (namespace, cycle_id, trigger, rerun_of, endpoint_keys, node_id,"
        " traceparent) VALUES ('ns', %s, 'rerun', %s, '{}', %s, '')",
        (cycle_id, new_id(OLD), node_id),
    )
    async with database.batch() as connection:
        await append(connection, Act("ns", "cycle.rerun", "a person", subject=cycle_id))
    assert (await seal(database, node_id)).sealed == 2


async def test_what_retention_drops_is_declared(
    database: Database,
    dsn: str,
    old: Owner,
    node_id: str,
    signer: Signer,
    folder: Path,
    key: Ed25519PrivateKey,
) -> None:
    """Receipts and re-runs go with an entry each, and both trail and export stay whole."""
    await _retired(database, old, node_id)
    assert found(dsn) == ""
    await Janitor(database, fact_retention_days=30).run_once()
    report = verify(dsn)
    assert (report.findings, report.retired) == ([], 2)
    told = old.execute(
        "SELECT subject, detail ->> 'before', reason FROM audit_trail"
        " WHERE action = 'facts.retired' AND subject = 'delivery_receipt'"
    ).fetchall()
    assert told == [("delivery_receipt", "2020-01-27T00:00:00Z", "ORBIT_FACT_RETENTION_DAYS=30")]
    signer.sign_all()
    offline = verify_export(export(dsn, folder, signer=signer), key.public_key())
    assert (offline.findings, offline.retired) == ([], 2)


async def test_what_is_dropped_without_a_word_is_missing(
    database: Database, dsn: str, old: Owner, node_id: str
) -> None:
    """The application's role may drop old partitions; that it was retention, the trail must say."""
    await _retired(database, old, node_id)
    with psycopg.connect(dsn, autocommit=True) as application:
        for fact in ("delivery_receipt", "cycle_run"):
            application.execute(
                "SELECT orbit_drop_partitions(%s::regclass, orbit_now() - interval '30 days')",
                (fact,),
            )
    text = found(dsn)
    assert text.count("is missing") == 2
    assert "cycle.rerun: what it is about" in text


async def test_a_dead_letter_is_never_retired(database: Database, dsn: str, old: Owner) -> None:
    """Neither by its partition's end nor by an entry that says so."""
    old.execute(
        "INSERT INTO dead_letter_dispatch (namespace, job_id, cycle_id, endpoint_key, cause,"
        " attempts) VALUES ('ns', %s, %s, 'e', 'x', 1)",
        (new_id(OLD), new_id(OLD)),
    )
    await seal(database, new_id(OLD))
    old.execute("DROP TABLE dead_letter_dispatch_p20200106")
    detail = {"table": "dead_letter_dispatch", "before": "2021-01-01T00:00:00Z"}
    async with database.batch() as connection:
        await append(connection, Act("*", "facts.retired", "janitor", detail=detail))
    assert "is missing" in found(dsn)


async def test_a_head_behind_its_entries_stops_no_act(
    database: Database, dsn: str, owner: Owner
) -> None:
    """A halt has to be written: the head is made anew from the entries, and the trail says so."""
    for _ in range(3):
        async with database.batch() as connection:
            await append(connection, Act("ns", "test.done", "a person"))
    first = owner.execute(
        "SELECT hash FROM audit_trail_entry WHERE log = 'ns' AND seq = 1"
    ).fetchone()
    assert first is not None
    for seq in (1, 3, 77):
        owner.execute("UPDATE audit_head SET seq = %s, hash = %s WHERE log = 'ns'", (seq, first[0]))
        async with database.batch() as connection:
            await append(connection, Act("ns", "halt.of.a.test", "a person"))
    assert found(dsn) == ""
    rows = owner.execute(
        "SELECT detail FROM audit_trail WHERE action = 'head.mended' ORDER BY seq"
    ).fetchall()
    assert [row[0] for row in rows] == [
        {"from": 1, "to": 3},
        {"from": 3, "to": 5},
        {"from": 77, "to": 7},
    ]


@pytest.mark.usefixtures("trail")
def test_an_export_that_nothing_vouches_for_is_not_whole(
    dsn: str, signer: Signer, folder: Path, key: Ed25519PrivateKey
) -> None:
    """With its checkpoints, or its facts, taken out and the lines counted anew."""
    signer.sign_all()
    lines = list(export(dsn, folder, signer=signer))
    for kinds, words in (
        ("checkpoint manifest", "ns: has no checkpoint here"),
        ("fact", "ns fact 1: is missing: no entry declares that it was dropped"),
    ):
        kept = [line for line in lines[:-1] if json.loads(line)["kind"] not in kinds.split()]
        kept.append(json.dumps({"kind": "end", "lines": len(kept)}).encode())
        report = verify_export(kept, key.public_key())
        assert words in "\n".join(map(str, report.findings))
    assert not verify(dsn).is_anchored


@pytest.mark.usefixtures("trail")
async def test_an_export_holds_no_checkpoint_of_what_came_after(
    database: Database, dsn: str, signer: Signer, folder: Path, key: Ed25519PrivateKey
) -> None:
    """A node that signs while an export is read, or is just writing a line, harms nothing."""
    signer.sign_all()
    lines = export(dsn, folder, signer=signer)
    read = [next(lines)]
    async with database.batch() as connection:
        await append(connection, Act("ns", "test.done", "a person"))
    signer.sign_all()
    with (folder / "ns.jsonl").open("ab") as file:
        file.write(b'{"checkpoint":{"at":')
    report = verify_export([*read, *lines], key.public_key())
    assert report.findings == []
    assert verify_export(export(dsn, folder, signer=signer), key.public_key()).findings == []


@pytest.mark.usefixtures("trail")
async def test_an_export_of_one_log_has_no_other(
    database: Database, dsn: str, node_id: str, owner: Owner, folder: Path, signer: Signer, key: Any
) -> None:
    """Facts of other namespaces are in none of its lines, and it is whole in itself."""
    owner.execute(
        RECEIPT.replace("'ns'", "'other'").encode(), (new_id(SystemClock().now()), node_id)
    )
    await seal(database, node_id)
    signer.sign_all()
    lines = list(export(dsn, folder, "ns", signer=signer))
    assert b"other" not in b"".join(lines)
    report = verify_export(lines, key.public_key())
    assert (report.findings, report.facts, report.undeclared) == ([], 3, 0)
