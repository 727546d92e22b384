"""The signer: signs what follows from its last checkpoints, and refuses what contradicts them.

Before it signs, it looks whether the entry of its last checkpoint is still there, and walks the
entries since. What contradicts that (a cut end, an altered entry, a backup that was restored) is
not signed, now or later, and said loudly. Checkpoints go to a folder, where the database's owner
must not write, and to a command's standard input; without a folder, what is remembered is only
what this process signed.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from psycopg import Connection
from psycopg.rows import TupleRow

from orbit import metrics
from orbit.audit.checkpoints import PUBLIC_KEY, Checkpoint, file_of, files, log_of, read_line, sign
from orbit.audit.keys import public_pem
from orbit.audit.trail import FIRST_PREV, SQL
from orbit.audit.verification import entries_of, snapshot, stream
from orbit.audit.walk import Finding, LogWalk
from orbit.clock import Clock
from orbit.errors import AuditKeyInvalid

_LAST_BYTES = 4096
_COMMAND_SECONDS = 30.0

log = structlog.get_logger(__name__)


class Signer:
    """Signs checkpoints of all logs, and keeps the last of each.

    `contradictions` says, by log, why the last pass refused to sign.
    """

    def __init__(
        self,
        dsn: str,
        clock: Clock,
        key: Ed25519PrivateKey,
        folder: Path | None,
        command: str | None = None,
    ) -> None:
        self._dsn, self._clock, self._key = dsn, clock, key
        self._folder, self._command = folder, command
        self._signed: dict[str, Checkpoint] = {}
        self.contradictions: Mapping[str, str] = {}

    def sign_all(self) -> int:
        """Signs every log that has grown; how many. Blocks: call it off the event loop.

        Raises psycopg.Error if the database does not answer, OSError if the folder cannot be
        written or the command fails.
        """
        with self._held():
            refused: dict[str, str] = {}
            lasts = self._lasts(refused)
            fresh = self._look(lasts, refused)
            for checkpoint in fresh:
                self._keep(checkpoint)
        for name in refused.keys() - self.contradictions.keys():
            log.error("audit_contradiction", log=name, why=refused[name])
        self.contradictions = refused
        metrics.audit_contradictions.set(len(refused))
        return len(fresh)

    def _look(self, lasts: Mapping[str, Checkpoint], refused: dict[str, str]) -> list[Checkpoint]:
        """Looks at every log; what can be signed. Those that cannot go into `refused`."""
        fresh = []
        with snapshot(self._dsn) as connection:
            names = {name for name, _, _ in stream(connection, SQL.logs, {"log": None})}
            for name in sorted((names | lasts.keys()) - refused.keys()):
                last = lasts.get(name)
                size, head, why = _follows(connection, name, last)
                if why is not None:
                    refused[name] = why
                elif last is None or size > last.size:
                    fresh.append(Checkpoint(name, size, head, self._clock.now().isoformat()))
        return fresh

    def _lasts(self, refused: dict[str, str]) -> dict[str, Checkpoint]:
        """The last checkpoint of each log; one that is not ours is refused, not passed over."""
        if self._folder is None:
            return dict(self._signed)
        found: dict[str, Checkpoint] = {}
        for path in files(self._folder):
            name = log_of(path)
            one = read_line(_last_line(path), self._key.public_key(), name)
            if isinstance(one, Checkpoint):
                found[name] = one
            else:
                refused[name] = f"the last checkpoint in {path} cannot be used: {one}"
        return found

    def _keep(self, checkpoint: Checkpoint) -> None:
        line = sign(checkpoint, self._key)
        if self._command is not None:
            _run(self._command, line)
        if self._folder is not None:
            with file_of(self._folder, checkpoint.log).open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        self._signed[checkpoint.log] = checkpoint

    def _held(self) -> AbstractContextManager[None]:
        return nullcontext() if self._folder is None else _locked(self._folder, self._key)


@contextmanager
def _locked(folder: Path, key: Ed25519PrivateKey) -> Iterator[None]:
    """Keeps other signers out of the folder, which is made if need be, with the public key."""
    folder.mkdir(parents=True, exist_ok=True)
    published = folder / PUBLIC_KEY
    ours = public_pem(key.public_key())
    if not published.exists():
        published.write_bytes(ours)
    elif published.read_bytes() != ours:
        raise AuditKeyInvalid(
            f"{published} is another key's: the folder has another signer's checkpoints"
        )
    with (folder / ".lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _last_line(path: Path) -> bytes:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _LAST_BYTES))
        lines = file.read().splitlines()
    return lines[-1] if lines else b""


def _run(command: str, line: bytes) -> None:
    """Hands a line to the command. Raises OSError if it does not take it."""
    try:
        done = subprocess.run(  # noqa: S603 - the operator's own command, without a shell
            shlex.split(command), input=line, timeout=_COMMAND_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"ORBIT_AUDIT_CHECKPOINT_COMMAND took over {_COMMAND_SECONDS:g} s") from None
    if done.returncode:
        raise OSError(f"ORBIT_AUDIT_CHECKPOINT_COMMAND ended with code {done.returncode}")


def _follows(
    connection: Connection[TupleRow], name: str, last: Checkpoint | None
) -> tuple[int, bytes, str | None]:
    """A log's size and head, and why it does not follow from its last checkpoint, if so."""
    after, prev = (last.size, last.head) if last else (0, FIRST_PREV)
    if last is not None:
        found = list(stream(connection, SQL.entry_hash, {"log": name, "seq": last.size}))
        if not found:
            return 0, b"", f"entry {last.size} of the checkpoint of {last.at} is not there"
        if found[0][0] != last.head:
            return 0, b"", f"entry {last.size} is another than at the checkpoint of {last.at}"
    findings: list[Finding] = []
    walk = LogWalk(name, findings.append, after=after, prev=prev)
    walk.walk(entries_of(connection, name, after))
    return walk.seq, walk.head, str(findings[0]) if findings else None
