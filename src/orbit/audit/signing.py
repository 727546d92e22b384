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
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from psycopg import Connection
from psycopg.rows import TupleRow

from orbit import metrics
from orbit.audit.checkpoints import (
    PUBLIC_KEY,
    Checkpoint,
    Manifest,
    file_of,
    files,
    log_of,
    read_line,
    sign,
    sign_manifest,
)
from orbit.audit.keys import public_pem
from orbit.audit.trail import FIRST_PREV, SQL
from orbit.audit.verification import entries_of, snapshot, stream
from orbit.audit.walk import Finding, LogWalk
from orbit.clock import Clock
from orbit.errors import AuditKeyInvalid

_LAST_BYTES = 4096
_COMMAND_SECONDS = 30.0
_LOCK_SECONDS, _LOCK_PAUSE = 5.0, 0.05

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
        self._done_at = clock.monotonic()
        self.contradictions: Mapping[str, str] = {}

    @property
    def age_seconds(self) -> float:
        """How long ago a pass last came to its end: what is younger is covered by no checkpoint."""
        return self._clock.monotonic() - self._done_at

    def sign_all(self) -> int:
        """Signs every log that has grown; how many. Blocks: call it off the event loop.

        Raises psycopg.Error if the database does not answer, OSError if the folder cannot be
        written or the command fails.
        """
        begun_at = self._clock.monotonic()
        with self._held():
            refused: dict[str, str] = {}
            lasts = self._lasts(refused)
            fresh = self._look(lasts, refused)
            self._keep(fresh)
        for name in refused.keys() - self.contradictions.keys():
            log.error("audit_contradiction", log=name, why=refused[name])
        self.contradictions, self._done_at = refused, begun_at
        metrics.audit_contradictions.set(len(refused))
        return len(fresh)

    def manifest(self, log: str | None) -> dict[str, Any]:
        """What an export that begins now has to have, of all logs or of one, signed.

        Raises OSError if the folder cannot be read.
        """
        lasts = self._lasts({}, log)
        last = tuple(lasts[name] for name in sorted(lasts))
        return sign_manifest(Manifest(self._clock.now().isoformat(), log, last), self._key)

    def _look(self, lasts: Mapping[str, Checkpoint], refused: dict[str, str]) -> list[Checkpoint]:
        """Looks at every log that has grown; what can be signed. Others go into `refused`."""
        fresh = []
        asked = {
            "log": list(lasts),
            "seq": [one.size for one in lasts.values()],
            "hash": [one.head for one in lasts.values()],
        }
        with snapshot(self._dsn) as connection:
            names = [name for (name,) in stream(connection, SQL.grown_logs, asked)]
            for name in names:
                if name in refused:
                    continue
                last = lasts.get(name)
                size, head, why = _follows(connection, name, last)
                if why is not None:
                    refused[name] = why
                elif last is None or size > last.size:
                    fresh.append(Checkpoint(name, size, head, self._clock.now().isoformat()))
        return fresh

    def _lasts(self, refused: dict[str, str], only: str | None = None) -> dict[str, Checkpoint]:
        """The last checkpoint of each log; one that is not ours is refused, not passed over."""
        if self._folder is None:
            known = dict(self._signed)
            return {name: one for name, one in known.items() if only in (None, name)}
        found: dict[str, Checkpoint] = {}
        for path in files(self._folder):
            name = log_of(path)
            line = _last_line(path) if only in (None, name) else None
            if line is None:
                continue
            one = read_line(line, self._key.public_key(), name)
            if isinstance(one, Checkpoint):
                found[name] = one
            else:
                refused[name] = f"the last checkpoint in {path} cannot be used: {one}"
        return found

    def _keep(self, fresh: Sequence[Checkpoint]) -> None:
        lines = [sign(checkpoint, self._key) for checkpoint in fresh]
        if self._command is not None and lines:
            _run(self._command, b"".join(lines))
        for checkpoint, line in zip(fresh, lines, strict=True):
            if self._folder is not None:
                _append(file_of(self._folder, checkpoint.log), line)
            self._signed[checkpoint.log] = checkpoint

    def _held(self) -> AbstractContextManager[None]:
        return nullcontext() if self._folder is None else _locked(self._folder, self._key)


@contextmanager
def _locked(folder: Path, key: Ed25519PrivateKey) -> Iterator[None]:
    """Keeps other signers out of the folder, which is made if need be, with the public key.

    Raises OSError if another signer keeps it for 5 s: one that is frozen must not freeze others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("ab") as file:
        _lock(file)
        _publish(folder / PUBLIC_KEY, public_pem(key.public_key()))
        yield


def _lock(file: IO[bytes]) -> None:
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise OSError("another signer holds the folder of checkpoints") from None
            time.sleep(_LOCK_PAUSE)
        else:
            return


def _publish(path: Path, ours: bytes) -> None:
    """The public key appears whole, or not at all. Raises AuditKeyInvalid for another's."""
    if not path.exists():
        aside = path.with_suffix(".new")
        aside.write_bytes(ours)
        aside.replace(path)
    elif path.read_bytes() != ours:
        raise AuditKeyInvalid(
            f"{path} is another key's: the folder has another signer's checkpoints"
        )


def _append(path: Path, line: bytes) -> None:
    """Adds a line that outlives a crash; what a crash left of one before goes."""
    is_new = not path.exists()
    with path.open("ab") as file:
        whole = _end_of_lines(path)
        if whole < file.tell():
            file.truncate(whole)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _end_of_lines(path: Path) -> int:
    """How many bytes of a file are whole lines."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        start = file.seek(max(0, size - 2 * _LAST_BYTES))
        return start + file.read().rfind(b"\n") + 1


def _last_line(path: Path) -> bytes | None:
    """The last whole line; None if there is none."""
    end = _end_of_lines(path)
    with path.open("rb") as file:
        start = file.seek(max(0, end - _LAST_BYTES))
        lines = file.read(end - start).splitlines()
    return lines[-1] if lines else None


def _run(command: str, lines: bytes) -> None:
    """Hands lines to the command. Raises OSError if it does not take it."""
    try:
        done = subprocess.run(  # noqa: S603 - the operator's own command, without a shell
            shlex.split(command), input=lines, timeout=_COMMAND_SECONDS, check=False
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
