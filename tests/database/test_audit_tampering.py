"""What the owner of the database does to the trail, with every trigger off, is found and named.

The owner may do anything here, also set heads right and chain anew. What chains cannot show, a
checkpoint that was signed before does.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from orbit.audit import signing
from orbit.audit.checkpoints import Checkpoint, read_folder
from orbit.audit.export import export, verify_export
from orbit.audit.sealing import seal
from orbit.audit.signing import Signer
from orbit.audit.trail import Act, Chain, append
from orbit.audit.verification import verify
from orbit.clock import DatabaseClock
from orbit.database.pool import Database
from tests.conftest import TestServer
from tests.database.conftest import Owner

ADDED = """
INSERT INTO dead_letter_dispatch (namespace, job_id, cycle_id, endpoint_key, cause, attempts,
    transaction_id)
SELECT 'ns', cycle_id, job_id, 'e', 'x', 1, '9' FROM dead_letter_dispatch LIMIT 1
"""


def found(dsn: str, checkpoints: list[Checkpoint] | None = None) -> list[str]:
    """What verification finds."""
    return [str(one) for one in verify(dsn, checkpoints or []).findings]


def signed(folder: Path, key: Ed25519PrivateKey) -> list[Checkpoint]:
    """The folder's checkpoints, all of them good."""
    read = [one for _, _, one in read_folder(folder, key.public_key())]
    assert all(isinstance(one, Checkpoint) for one in read)
    return [one for one in read if isinstance(one, Checkpoint)]


def chain_anew(owner: Owner, log: str) -> None:
    """What a clever owner does after a change: every hash right again, and the head too."""
    prev, seq = bytes(32), 0
    rows = owner.execute(
        "SELECT seq, body FROM audit_trail_entry WHERE log = %s ORDER BY seq", (log,)
    ).fetchall()
    for seq, body in rows:
        stored = Chain(log).hash(seq, prev, body.encode())
        owner.execute(
            "UPDATE audit_trail_entry SET prev = %s, hash = %s WHERE log = %s AND seq = %s",
            (prev, stored, log, seq),
        )
        prev = stored
    owner.execute("UPDATE audit_head SET seq = %s, hash = %s WHERE log = %s", (seq, prev, log))


@pytest.mark.usefixtures("trail")
def test_an_untouched_trail_is_whole(dsn: str, signer: Signer, folder: Path, key: Any) -> None:
    """No finding where nothing was done, with and without checkpoints; signing twice adds none."""
    assert found(dsn) == []
    assert signer.sign_all() == 2
    assert signer.sign_all() == 0
    report = verify(dsn, signed(folder, key))
    assert report.findings == []
    assert (report.entries, report.facts, report.unsigned) == (12, 3, 0)
    assert [(one.log, one.size) for one in report.logs] == [("*", 1), ("ns", 11)]


@pytest.mark.usefixtures("trail")
def test_an_altered_byte_is_found(dsn: str, owner: Owner) -> None:
    """One byte of a body, wherever it is."""
    owner.execute("UPDATE audit_trail_entry SET body = replace(body, 'thing-3', 'thing-4')")
    assert found(dsn) == ["ns entry 3: was altered: its hash is not that of its bytes"]


@pytest.mark.usefixtures("trail")
def test_an_altered_instant_is_found(dsn: str, owner: Owner) -> None:
    """The column `at` is no part of the hash, and is held against what is."""
    owner.execute(
        "UPDATE audit_trail_entry SET at = at - interval '1 day' WHERE log = 'ns' AND seq = 2"
    )
    assert found(dsn) == ["ns entry 2: was altered: its column `at` differs from its bytes"]


@pytest.mark.usefixtures("trail")
def test_a_dropped_tail_is_found(
    dsn: str, owner: Owner, signer: Signer, folder: Path, key: Any
) -> None:
    """By the head, and where that was set back too, by the checkpoint; signing refuses it."""
    signer.sign_all()
    owner.execute("DELETE FROM audit_trail_entry WHERE log = 'ns' AND seq = 11")
    assert found(dsn) == ["ns entry 11: the head names entry 11 as the last, the log ends at 10"]
    chain_anew(owner, "ns")
    assert found(dsn) == []
    assert found(dsn, signed(folder, key)) == [
        "ns entry 11: is missing: a checkpoint covers it, the log ends at 10"
    ]
    assert signer.sign_all() == 0
    assert "entry 11" in signer.contradictions["ns"]


@pytest.mark.usefixtures("trail")
def test_an_entry_that_is_replaced_with_its_hash_is_found(dsn: str, owner: Owner) -> None:
    """It is whole in itself; what comes after it names the hash that was there before."""
    body, prev = owner.execute(
        "SELECT replace(body, 'thing-4', 'thing-9'), prev FROM audit_trail_entry"
        " WHERE log = 'ns' AND seq = 4"
    ).fetchone() or ("", b"")
    assert "thing-9" in body
    owner.execute(
        "UPDATE audit_trail_entry SET body = %s, hash = %s WHERE log = 'ns' AND seq = 4",
        (body, Chain("ns").hash(4, prev, body.encode())),
    )
    assert found(dsn) == [
        "ns entry 5: does not follow entry 4: its predecessor's hash differs",
    ]


@pytest.mark.usefixtures("trail")
def test_dropped_entries_are_found(dsn: str, owner: Owner) -> None:
    """The first is named, and up to which others are missing."""
    owner.execute("DELETE FROM audit_trail_entry WHERE log = 'ns' AND seq IN (2, 4, 5)")
    assert found(dsn) == [
        "ns entry 2: is missing",
        "ns entry 4: is missing, and those up to 5 are",
    ]


@pytest.mark.usefixtures("trail")
def test_two_swapped_rows_are_found(dsn: str, owner: Owner) -> None:
    """Both are named."""
    owner.execute("ALTER TABLE audit_trail_entry DROP CONSTRAINT audit_trail_entry_pkey")
    owner.execute("UPDATE audit_trail_entry SET seq = 7 - seq WHERE log = 'ns' AND seq IN (3, 4)")
    text = "\n".join(found(dsn))
    assert "ns entry 3: " in text
    assert "ns entry 4: " in text
    assert "ns entry 6" not in text


@pytest.mark.usefixtures("trail")
def test_a_fork_is_found(dsn: str, owner: Owner) -> None:
    """It cannot be stored; by who drops the constraints it can, and is named."""
    fork = (
        "INSERT INTO audit_trail_entry (log, seq, at, prev, hash, body) SELECT log, {}, at, prev,"
        " sha256(hash), body FROM audit_trail_entry WHERE log = 'ns' AND seq = 4"
    )
    for seq in (4, 99):
        with pytest.raises(psycopg.errors.UniqueViolation):
            owner.execute(fork.format(seq).encode())
    owner.execute("ALTER TABLE audit_trail_entry DROP CONSTRAINT audit_trail_entry_pkey")
    owner.execute("ALTER TABLE audit_trail_entry DROP CONSTRAINT a_fork_cannot_commit")
    owner.execute(fork.format(4).encode())
    assert any(one.startswith("ns entry 4: stands after entry 4: a fork") for one in found(dsn))


@pytest.mark.usefixtures("trail")
def test_a_rewritten_history_contradicts_its_checkpoint(
    dsn: str, owner: Owner, signer: Signer, folder: Path, key: Any
) -> None:
    """Chained anew, a lie is whole in itself; what was signed before says otherwise."""
    signer.sign_all()
    owner.execute("UPDATE audit_trail_entry SET body = replace(body, 'a person', 'another one')")
    chain_anew(owner, "ns")
    assert found(dsn) == []
    assert found(dsn, signed(folder, key)) == [
        "ns entry 11: contradicts a checkpoint: another entry stood here"
    ]
    assert signer.sign_all() == 0
    assert "ns" in signer.contradictions


@pytest.mark.usefixtures("trail")
def test_what_was_altered_since_the_last_checkpoint_is_not_signed(
    dsn: str, owner: Owner, signer: Signer
) -> None:
    """The signer walks what is new, and signs nothing that is not chained."""
    owner.execute("UPDATE audit_trail_entry SET body = body || ' ' WHERE log = 'ns' AND seq = 8")
    signer.sign_all()
    assert signer.contradictions == {
        "ns": "ns entry 8: was altered: its hash is not that of its bytes"
    }


@pytest.mark.usefixtures("trail")
@pytest.mark.parametrize(
    ("tampering", "words"),
    [
        ("UPDATE dead_letter_dispatch SET cause = 'ok'", "ns fact 2: dead_letter_dispatch"),
        ("DELETE FROM dead_letter_dispatch", "is missing"),
        ("UPDATE audit_seal SET hash[1] = sha256(hash[1])", "ns entry 6: has another root"),
        ("UPDATE audit_seal SET hash[2] = NULL", "ns fact 2: has no hash"),
        ("UPDATE audit_seal SET hash[3] = NULL", "has no number: it was added"),
        ("DELETE FROM audit_seal", "ns entry 6: has another root"),
        (
            ADDED,
            "has no number: it was added",
        ),
    ],
)
def test_tampered_facts_are_found(dsn: str, owner: Owner, tampering: str, words: str) -> None:
    """A dead letter that was altered, dropped or added, and numbers that were."""
    owner.execute(tampering.encode())
    assert words in "\n".join(found(dsn))


@pytest.mark.usefixtures("trail")
async def test_a_restored_backup_is_noticed(
    server: TestServer,
    database: Database,
    database_name: str,
    owner: Owner,
    signer: Signer,
    clock: DatabaseClock,
    folder: Path,
    key: Any,
) -> None:
    """A database from before the last checkpoint is not signed, and verification says why."""
    backup = f"{database_name}_backup"
    await database.close()
    owner.close()
    server.run(f"CREATE DATABASE {backup} TEMPLATE {database_name}")
    try:
        again = Database(server.app(database_name), minimum=1, maximum=2)
        await again.open()
        async with again.batch() as connection:
            await append(connection, Act("ns", "test.done", "a person"))
        await again.close()
        signer.sign_all()
        restored = server.app(backup)
        other = Signer(restored, clock, key, folder)
        assert other.sign_all() == 0
        assert "entry 12 of the checkpoint" in other.contradictions["ns"]
        assert found(restored, signed(folder, key)) == [
            "ns entry 12: is missing: a checkpoint covers it, the log ends at 11"
        ]
    finally:
        server.run(f"DROP DATABASE {backup} WITH (FORCE)")


@pytest.mark.usefixtures("trail")
def test_a_forged_checkpoint_is_no_checkpoint(
    dsn: str, signer: Signer, folder: Path, key: Ed25519PrivateKey
) -> None:
    """A line that was altered is named, and the signer does not build on it."""
    signer.sign_all()
    path = folder / "ns.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"size":11', b'"size":10'))
    bad = [one for _, _, one in read_folder(folder, key.public_key(), "ns")]
    assert not isinstance(bad[0], Checkpoint)
    assert signer.sign_all() == 0
    assert "cannot be used" in signer.contradictions["ns"]


@pytest.mark.usefixtures("trail")
async def test_facts_sealed_after_a_checkpoint_are_signed_too(
    database: Database, dsn: str, signer: Signer, folder: Path, key: Any, owner: Owner, node_id: str
) -> None:
    """Their numbers go on where those before the checkpoint ended, which signing does not see."""
    assert signer.sign_all() == 2
    for size in (12, 13):
        owner.execute(
            "INSERT INTO dead_letter_dispatch"
            " VALUES ('ns', orbit_new_batch(), orbit_new_batch(), 'e', 'status 500', 4)"
        )
        assert (await seal(database, node_id)).sealed == 1
        assert signer.sign_all() == 1
        assert signer.contradictions == {}
        assert [one.size for one in signed(folder, key) if one.log == "ns"][-1] == size
    assert found(dsn, signed(folder, key)) == []


@pytest.mark.usefixtures("trail")
def test_a_line_that_a_crash_cut_off_stops_no_signing(
    dsn: str, signer: Signer, folder: Path, key: Ed25519PrivateKey, owner: Owner
) -> None:
    """What has no end of line was never a checkpoint: it goes, and the next one follows."""
    signer.sign_all()
    path = folder / "ns.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:50])
    owner.execute('SELECT orbit_append_audit(ARRAY[\'ns\'], ARRAY[\'{"action":"a","actor":"b"}\'])')
    assert signer.sign_all() == 1
    assert signer.contradictions == {}
    assert path.read_bytes().startswith(whole)
    assert [one.size for one in signed(folder, key) if one.log == "ns"] == [11, 12]
    assert found(dsn, signed(folder, key)) == []


@pytest.mark.usefixtures("trail")
def test_a_frozen_signer_freezes_no_other(
    signer: Signer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who does not get the folder gives up, and says why."""
    monkeypatch.setattr(signing, "_LOCK_SECONDS", 0.1)
    folder.mkdir()
    with (folder / ".lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="another signer holds"):
            signer.sign_all()
    assert signer.sign_all() == 2


Line = Callable[[list[bytes]], list[bytes]]


def _without_end(lines: list[bytes]) -> list[bytes]:
    return lines[:-1]


def _altered(old: bytes, new: bytes) -> Line:
    return lambda lines: [line.replace(old, new) for line in lines]


def _dropped(mark: bytes) -> Line:
    return lambda lines: [line for line in lines if mark not in line]


@pytest.mark.usefixtures("trail")
def test_an_export_is_verified_with_the_public_key_alone(
    dsn: str, signer: Signer, folder: Path, key: Ed25519PrivateKey
) -> None:
    """No database is asked, and all of it counts."""
    signer.sign_all()
    lines = list(export(dsn, folder, signer=signer))
    report = verify_export(lines, key.public_key())
    assert report.findings == []
    counts = (report.entries, report.facts, report.checkpoints, report.retired, report.unsigned)
    assert counts == (12, 3, 2, 0, 0)
    assert [(one.log, one.size) for one in report.logs] == [("*", 1), ("ns", 11)]
    assert report.exported_at is not None
    other = verify_export(lines, Ed25519PrivateKey.generate().public_key())
    texts = [str(one) for one in other.findings]
    assert sum("not signed by this key" in one for one in texts) == 3
    assert sum("nothing of it is vouched for" in one for one in texts) == 2


@pytest.mark.usefixtures("trail")
@pytest.mark.parametrize(
    ("tamper", "words"),
    [
        (_without_end, "is cut off"),
        (_altered(b"thing-3", b"thing-4"), "ns entry 3: was altered"),
        (_altered(b"status 500", b"status 200"), "ns fact 1: was altered"),
        (_dropped(b'"seq":11'), "ns entry 11: is missing: a checkpoint covers it"),
        (_dropped(b'"kind":"leaves"'), "ns entry 6: has another root"),
        (_altered(b'"size":11', b'"size":10'), "not signed by this key, or was altered"),
        (_dropped(b'"kind":"fact"'), "the export has"),
    ],
)
def test_a_tampered_export_is_found(
    dsn: str, signer: Signer, folder: Path, key: Any, tamper: Line, words: str
) -> None:
    """Cut, altered, thinned out: each is named."""
    signer.sign_all()
    report = verify_export(tamper(list(export(dsn, folder, signer=signer))), key.public_key())
    assert words in "\n".join(map(str, report.findings))


def _without_log(values: list[Any]) -> list[Any]:
    """Nothing of `ns`: as though it had never been."""
    return [one for one in values if "ns" not in (one.get("log"), _signed_log(one))]


def _cut_back(values: list[Any]) -> list[Any]:
    """Every log as it was at its first checkpoint, of which nothing later is left."""
    first: dict[str, int] = {}
    for one in values:
        if one["kind"] == "checkpoint":
            first.setdefault(_signed_log(one) or "", one["checkpoint"]["size"])
    return [
        one
        for one in values
        if one.get("seq", 0) <= first.get(one.get("log", ""), 0)
        and (one["kind"] != "checkpoint" or one["checkpoint"]["size"] in first.values())
    ]


def _unsigned(values: list[Any]) -> list[Any]:
    """As before there were manifests."""
    kept = [one for one in values if one["kind"] != "manifest"]
    return [{**kept[0], "format": "orbit.audit.export.1"}, *kept[1:]]


def _of_one_log(values: list[Any]) -> list[Any]:
    """Said to be of one log, whose facts' bytes may be missing."""
    return [{**values[0], "log": "ns"}, *(one for one in values[1:] if one["kind"] != "fact")]


def _signed_log(value: Any) -> str | None:
    return value["checkpoint"]["log"] if value["kind"] == "checkpoint" else None


@pytest.mark.parametrize(
    ("forge", "words"),
    [
        (_without_log, "ns entry 12: is missing: a checkpoint covers it, the log ends at 0"),
        (_cut_back, "ns entry 12: is missing: a checkpoint covers it, the log ends at 11"),
        (_unsigned, "the export has no signed manifest"),
        (lambda values: _cut_back(_unsigned(values)), "the export has no signed manifest"),
        (_of_one_log, "the export's manifest is for every log"),
    ],
)
@pytest.mark.usefixtures("trail")
async def test_a_forged_export_is_found_though_its_lines_are_counted_anew(
    database: Database, dsn: str, signer: Signer, folder: Path, key: Any, forge: Any, words: str
) -> None:
    """What is left verifies by itself: which logs there were, and up to where, is signed apart."""
    signer.sign_all()
    async with database.batch() as connection:
        await append(connection, Act("ns", "test.done", "a person"))
    signer.sign_all()
    lines = list(export(dsn, folder, signer=signer))
    assert verify_export(lines, key.public_key()).findings == []
    forged = forge([json.loads(line) for line in lines[:-1]])
    forged.append({"kind": "end", "lines": len(forged)})
    report = verify_export([json.dumps(one).encode() for one in forged], key.public_key())
    assert words in "\n".join(map(str, report.findings))


@pytest.mark.usefixtures("trail")
def test_a_manifest_alone_vouches(dsn: str, clock: DatabaseClock, key: Ed25519PrivateKey) -> None:
    """Where checkpoints go to a command, and no folder is here, the manifest has the last ones."""
    other = Signer(dsn, clock, key, None)
    other.sign_all()
    report = verify_export(export(dsn, None, signer=other), key.public_key())
    assert (report.findings, report.is_anchored, report.checkpoints) == ([], True, 0)
