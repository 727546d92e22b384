"""`audit`: the trail listed, verified against the database or offline, and exported; its key made.

Verifying and exporting ask no node: they read the database themselves, or only files. What is
found ends the verb with code 6.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orbit.cli.client import connected
from orbit.cli.cycles import paged
from orbit.cli.options import Json, group, settings
from orbit.cli.outcome import ExitCode, fail
from orbit.cli.schema import access, refuse_without_data
from orbit.cli.terminal import note, print_json, say, show, table, when
from orbit.errors import AuditKeyInvalid, RequestInvalid

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from orbit.audit.checkpoints import Checkpoint
    from orbit.audit.verification import Report
    from orbit.audit.walk import Finding
    from orbit.settings import Settings

_MOST_SHOWN = 1000

app = group("The audit trail: list, verify, export.")

Namespace = Annotated[str | None, typer.Option(help="Only this log; `*` is the installation's.")]
PublicKey = Annotated[Path | None, typer.Option(help="The signer's public key (PEM).")]


@app.command("ls")
def listed(
    namespace: Namespace = None,
    action: Annotated[str | None, typer.Option(help="Only this action.")] = None,
    actor: Annotated[str | None, typer.Option(help="Only what this one did.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many.")] = 50,
    is_json: Json = False,
) -> None:
    """List entries, newest first."""
    with connected(settings()) as api:
        answer = paged(api, "/audit", limit, namespace=namespace, action=action, actor=actor)
    if is_json:
        print_json(answer)
        return
    names = ("AT", "NAMESPACE", "SEQ", "ACTION", "ACTOR", "SUBJECT", "REASON")
    fields = ("namespace", "seq", "action", "actor", "subject", "reason")
    rows = [(when(one["at"]), *(one.get(name) for name in fields)) for one in answer["items"]]
    show(table(names, rows, ids=("AT", "SEQ", "SUBJECT")))


@app.command()
def verify(
    namespace: Namespace = None,
    export: Annotated[Path | None, typer.Option(help="Verify this export, not a database.")] = None,
    checkpoints: Annotated[Path | None, typer.Option(help="The folder of checkpoints.")] = None,
    public_key: PublicKey = None,
    is_anchor_wanted: Annotated[
        bool, typer.Option("--require-checkpoints", help="Code 6 if a log has no checkpoint.")
    ] = False,
    is_json: Json = False,
) -> None:
    """Verify the trail: numbers, links, hashes, roots, checkpoints, and every governed change."""
    if export is not None:
        report = _verify_export(export, public_key)
    else:
        report = _verify_database(settings(), namespace, checkpoints, public_key)
    if is_json:
        print_json(_as_json(report))
    else:
        _tell(report)
    if not report.is_good or (is_anchor_wanted and not report.is_anchored):
        fail(ExitCode.VERIFICATION_FAILED)


@app.command("export")
def exported(
    namespace: Namespace = None,
    out: Annotated[Path | None, typer.Option(help="The file to write; else stdout.")] = None,
) -> None:
    """Write the trail as JSON lines, signed as a whole where the signing key is here."""
    from orbit.app import checkpoint_folder, signer_of
    from orbit.audit.export import export as lines_of
    from orbit.clock import SystemClock

    given = settings()
    refuse_without_data(given)
    with access(given) as database, ExitStack() as stack:
        signer = signer_of(given, database.dsn, SystemClock())
        if signer is not None:
            signer.sign_all()
        file = sys.stdout.buffer if out is None else stack.enter_context(out.open("wb"))
        folder = checkpoint_folder(given)
        file.writelines(lines_of(database.dsn, folder, namespace, signer=signer))
    if signer is None:
        note("Not signed: no signing key is here, so nothing vouches for this export.")
    if out is not None:
        note(f"Written to {out}. The public key has to reach the auditor another way.")


@app.command("key")
def key_made(
    file: Annotated[
        Path, typer.Argument(help="Where the key is, or is to be.", show_default=False)
    ],
) -> None:
    """Make the key that signs checkpoints, unless it is there; print its public half (PEM)."""
    from orbit.audit.keys import load_signing_key, public_pem

    is_new = not file.exists()
    key = load_signing_key(file, is_made=True)
    say(public_pem(key.public_key()).decode().strip())
    if is_new:
        note(f"Made {file}, which only its owner reads. Take the lines above to the auditor.")


def _verify_export(path: Path, public_key: Path | None) -> Report:
    from orbit.audit.export import verify_export
    from orbit.audit.keys import load_public_key

    if public_key is None:
        raise RequestInvalid("--export needs --public-key: an export is verified by it alone")
    key = load_public_key(public_key)
    with path.open("rb") as file:
        return verify_export(file, key)


def _verify_database(
    given: Settings, namespace: str | None, folder: Path | None, public_key: Path | None
) -> Report:
    from orbit.app import checkpoint_folder
    from orbit.audit.verification import verify as run

    refuse_without_data(given)
    if folder is not None and not folder.is_dir():
        raise RequestInvalid(f"--checkpoints: there is no folder {folder}")
    folder = folder or checkpoint_folder(given)
    signed, broken = _checkpoints(given, folder, public_key, namespace)
    with access(given) as database:
        report = run(database.dsn, signed, namespace)
    report.findings.extend(broken)
    return report


def _checkpoints(
    given: Settings, folder: Path | None, public_key: Path | None, namespace: str | None
) -> tuple[list[Checkpoint], list[Finding]]:
    """The folder's checkpoints, and findings about those that are not the key's."""
    from orbit.audit.checkpoints import Checkpoint, log_of, read_folder
    from orbit.audit.walk import Finding

    if folder is None or not folder.is_dir():
        return [], []
    key = _public_key(given, folder, public_key)
    signed, broken = [], []
    for path, line, found in read_folder(folder, key, namespace):
        if isinstance(found, Checkpoint):
            signed.append(found)
        else:
            broken.append(Finding(log_of(path), None, f"{path}, line {line}: {found}"))
    return signed, broken


def _public_key(given: Settings, folder: Path, named: Path | None) -> Ed25519PublicKey:
    """The key named, else the signing key's half if that is here, else the folder's own."""
    from orbit.audit.checkpoints import PUBLIC_KEY
    from orbit.audit.keys import load_public_key, load_signing_key

    if named is not None:
        return load_public_key(named)
    try:
        return load_signing_key(
            given.audit_signing_key_file or given.data_dir / "audit.key"
        ).public_key()
    except AuditKeyInvalid:
        return load_public_key(folder / PUBLIC_KEY)


def _tell(report: Report) -> None:
    for line in _lines(report):
        say(line)


def _lines(report: Report) -> Iterator[str]:
    for finding in report.findings[:_MOST_SHOWN]:
        yield f"✗ {finding}"
    if len(report.findings) > _MOST_SHOWN:
        yield f"✗ and {len(report.findings) - _MOST_SHOWN:,} more"
    yield from _vouched(report)
    yield from _counts(report)
    if not report.is_good:
        yield f"{len(report.findings):,} finding{'s' if len(report.findings) != 1 else ''}"
    elif report.is_anchored:
        yield "The trail is whole."
    else:
        yield (
            f"! NOTHING VOUCHES for {report.unanchored:,} of {len(report.logs):,} logs: an end "
            "that was cut off, or a restored backup, would not show. In itself the trail is whole."
        )


def _vouched(report: Report) -> Iterator[str]:
    if report.exported_at is not None:
        yield f"Exported at {report.exported_at}"
    for one in report.logs[:_MOST_SHOWN]:
        told = "nothing vouches for them"
        if one.last is not None:
            told = f"vouched for up to {one.last.size:,} at {one.last.at}"
        yield f"{one.log}: {_entries(one.entries)}, {told}"
    if len(report.logs) > _MOST_SHOWN:
        yield f"and {len(report.logs) - _MOST_SHOWN:,} more logs"


def _counts(report: Report) -> Iterator[str]:
    counts = f"{_entries(report.entries)}, {report.facts:,} sealed facts"
    yield f"{counts}, {report.checkpoints:,} checkpoint{'s' if report.checkpoints != 1 else ''}"
    if report.retired:
        yield f"{report.retired:,} facts have only their hash here: retention dropped the rows"
    if report.unsealed:
        yield f"{report.unsealed:,} facts have no number yet"
    if report.unsigned:
        yield f"{_entries(report.unsigned)} younger than the last checkpoint"
    if report.undeclared:
        yield (
            f"{report.undeclared:,} facts have only their hash here; whether retention dropped the "
            "rows stands in the installation's log, which is not in this export"
        )


def _entries(count: int) -> str:
    return f"{count:,} entr{'y' if count == 1 else 'ies'}"


def _as_json(report: Report) -> dict[str, Any]:
    return {
        "isGood": report.is_good,
        "exportedAt": report.exported_at,
        "logs": [
            {
                "namespace": one.log,
                "entries": one.entries,
                "vouchedUpTo": one.size,
                "vouchedAt": one.last.at if one.last else None,
            }
            for one in report.logs
        ],
        "entries": report.entries,
        "facts": report.facts,
        "isAnchored": report.is_anchored,
        "unanchored": report.unanchored,
        "retired": report.retired,
        "undeclared": report.undeclared,
        "unsealed": report.unsealed,
        "unsigned": report.unsigned,
        "checkpoints": report.checkpoints,
        "findings": [
            {"namespace": one.log, "kind": one.kind, "number": one.seq, "what": one.what}
            for one in report.findings
        ],
    }
