"""Remembers which deliveries took effect, so that each does so once.

`once(key, digest, effect)` is the whole protocol: holding a lock of this key's own (the key is
the delivery's id) it looks the key up, runs the effect if it is new, and remembers it. An
effect that raises is not remembered: the sender will come again. If a process dies between
effect and remembering, the effect is repeated on the next attempt, so let it be one that can
be (a rename, an upsert; with `orbit.receiver.postgres` both are one transaction).

`claim(key, digest)` is the same for an effect that is awaited: the caller holds the id as long
as the block lasts, and says `keep()` in it when the effect has come about. It never waits for
another who holds the id, but answers `BUSY`.

`MemorySeen` forgets with its process; `FileSeen` appends to an index file and returns only
when the line is on the disk. Concurrent callers share one fsync: whoever holds the sync lock
makes durable all that was written until then, and those who waited find their part done. A
line torn by a crash is cut off at the next start; so are the forgotten ones, once they outnumber
the others. Both keep the newest `limit` ids and forget older ones: set it above what a sender may
still repeat. They refuse to guess when an id comes
back with another body: that is `CONFLICT`, a fault of the sender's.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol

from orbit.errors import OrbitError

try:
    import fcntl
except ImportError:  # Windows has no flock; there, one process per index is up to the user.
    fcntl = None  # type: ignore[assignment]

DEFAULT_LIMIT = 1_000_000


class SeenFileInUse(OrbitError):
    """Another process uses this index of seen ids."""

    code = "seen_file_in_use"


class Verdict(enum.Enum):
    """What a delivery is, compared with those before it."""

    NEW = "new"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"
    BUSY = "busy"


class Claim:
    """An id that is held: the verdict on it, and whether it is to be remembered.

    `connection` is the transaction that will remember it, where there is one.
    """

    __slots__ = ("connection", "is_kept", "verdict")

    def __init__(self, verdict: Verdict, connection: Any = None) -> None:
        self.verdict = verdict
        self.connection = connection
        self.is_kept = False

    def keep(self) -> None:
        """The effect came about: at the end of its block the id is remembered."""
        self.is_kept = True


class Seen(Protocol):
    """Lets each id take effect once, among any number of tasks."""

    def claim(self, key: str, digest: str) -> AbstractAsyncContextManager[Claim]:
        """Holds `key`, and remembers it at the block's end if told to `keep()`.

        `digest` is the body's, in any one notation. When the block has ended without an
        exception, what was kept is durable as far as this memory is.
        """


class MemorySeen:
    """Seen ids in memory, the newest `limit` of them."""

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        if limit < 1:
            raise ValueError("limit is at least 1")
        self._limit = limit
        self._digests: OrderedDict[str, str] = OrderedDict()
        self._guard = threading.Lock()
        self._busy: dict[str, tuple[threading.Lock, int]] = {}

    def __len__(self) -> int:
        return len(self._digests)

    def once(self, key: str, digest: str, effect: Callable[[], None]) -> Verdict:
        """Runs `effect` if `key` is new; two callers with one id wait for each other.

        The verdict is never BUSY. Raises ValueError for a key or digest that is empty or has
        white space.
        """
        _check_words(key, digest)
        with self._holding(key):
            verdict = self._verdict(key, digest)
            if verdict is Verdict.NEW:
                effect()
                self._keep(key, digest)
            return verdict

    @contextlib.asynccontextmanager
    async def claim(self, key: str, digest: str) -> AsyncIterator[Claim]:
        """Holds `key` while the block lasts; raises ValueError as `once` does."""
        _check_words(key, digest)
        with self._holding(key, is_waiting=False) as is_mine:
            claim = Claim(self._verdict(key, digest) if is_mine else Verdict.BUSY)
            yield claim
            if claim.is_kept and claim.verdict is Verdict.NEW:
                await asyncio.to_thread(self._keep, key, digest)

    def _verdict(self, key: str, digest: str) -> Verdict:
        known = self._digests.get(key)
        if known is None:
            return Verdict.NEW
        return Verdict.DUPLICATE if known == digest else Verdict.CONFLICT

    def _keep(self, key: str, digest: str) -> None:
        self._remember(key, digest)

    def _remember(self, key: str, digest: str) -> None:
        with self._guard:
            self._digests[key] = digest
            while len(self._digests) > self._limit:
                self._digests.popitem(last=False)

    @contextlib.contextmanager
    def _holding(self, key: str, *, is_waiting: bool = True) -> Iterator[bool]:
        """Holds this id's lock, which exists only while somebody wants it; says whether it does."""
        with self._guard:
            lock, users = self._busy.get(key, (threading.Lock(), 0))
            self._busy[key] = lock, users + 1
        is_mine = lock.acquire(blocking=is_waiting)
        try:
            yield is_mine
        finally:
            if is_mine:
                lock.release()
            with self._guard:
                lock, users = self._busy.pop(key)
                if users > 1:
                    self._busy[key] = lock, users - 1


class FileSeen(MemorySeen):
    """Seen ids in an append-only file of `digest id` lines; survives crashes and restarts.

    A file of more than twice `limit` lines is written anew when it is opened (on Windows never).
    One process at a time: a second raises SeenFileInUse. Raises OSError where the file cannot
    be written; then nothing was remembered and the sender should be told to come again.
    """

    def __init__(self, path: Path, limit: int = DEFAULT_LIMIT) -> None:
        super().__init__(limit)
        self._path = path
        self._sync = threading.Lock()
        self._descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
        try:
            self._lock_file()
            lines = self._load()
            if fcntl is not None and lines > 2 * limit:
                self._compact()
            self._written = self._synced = os.fstat(self._descriptor).st_size
        except BaseException:
            os.close(self._descriptor)
            raise

    def close(self) -> None:
        """Gives the file to another process; the object is of no use afterwards."""
        os.close(self._descriptor)

    def _keep(self, key: str, digest: str) -> None:
        line = f"{digest} {key}\n".encode()
        with self._guard:
            self._append(line)
            self._written += len(line)
            mine = self._written
        self._make_durable(mine)
        self._remember(key, digest)

    def _append(self, line: bytes) -> None:
        try:
            done = os.write(self._descriptor, line)
            if done != len(line):
                raise OSError(f"{self._path}: the disk took {done} of {len(line)} bytes")
        except OSError:
            os.ftruncate(self._descriptor, self._written)
            raise

    def _make_durable(self, position: int) -> None:
        with self._sync:
            if self._synced < position:
                reach = self._written
                os.fsync(self._descriptor)
                self._synced = reach

    def _lock_file(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SeenFileInUse(f"{self._path} is in use by another process") from error
        if not os.path.samestat(os.fstat(self._descriptor), self._path.stat()):
            # Between our opening and our locking it, its owner has put a new file in its place.
            raise SeenFileInUse(f"{self._path} is in use by another process")

    def _load(self) -> int:
        """Reads the whole lines, cuts off a torn one, and returns how many there are."""
        length = lines = 0
        with self._path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                length, lines = length + len(line), lines + 1
                digest, _, key = line.decode().rstrip("\n").partition(" ")
                self._remember(key, digest)
        os.ftruncate(self._descriptor, length)
        return lines

    def _compact(self) -> None:
        """Puts a file of what is remembered in the place of this one, locked as it is.

        Where that cannot be (a folder that may not be written) the long file serves as before.
        """
        target = self._path.resolve()
        beside = target.with_name(target.name + ".new")
        try:
            descriptor = self._written_anew(beside)
        except OSError:
            beside.unlink(missing_ok=True)
            return
        os.close(self._descriptor)
        self._descriptor = descriptor
        sync_folder(target.parent)

    def _written_anew(self, beside: Path) -> int:
        """Writes and locks the new file before it stands under the name; its descriptor."""
        mode = os.O_CREAT | os.O_TRUNC | os.O_RDWR | os.O_APPEND
        descriptor = os.open(beside, mode, 0o600)
        try:
            os.fchmod(descriptor, os.fstat(self._descriptor).st_mode & 0o777)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with open(descriptor, "wb", closefd=False) as file:
                items = self._digests.items()
                file.writelines(f"{digest} {key}\n".encode() for key, digest in items)
            os.fsync(descriptor)
            beside.replace(self._path.resolve())
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def sync_folder(folder: Path) -> None:
    """Makes a rename in it durable; Windows can't open folders, and needs not."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _check_words(key: str, digest: str) -> None:
    if key.split() != [key] or digest.split() != [digest]:
        raise ValueError("key and digest are single words")
