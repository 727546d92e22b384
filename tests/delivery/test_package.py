"""The packages: whole, the same from any folder, and running where nothing else is."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from ctypes.util import find_library
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.delivery.conftest import (
    EPOCH,
    NOBODY,
    ROOT,
    Missing,
    build,
    clone,
    constraints,
    empty_environment,
    install,
    program,
    run,
    tracked,
)

EXTRAS = {"embedded", "otel", "parquet"}
ASKS_FOR_EXTRAS: dict[str, Any] = {
    "ORBIT_TELEMETRY_COLD_ARCHIVE_ENABLED": "true",
    "ORBIT_TELEMETRY_PARQUET_DIR": "weeks",
    "OTEL_TRACES_EXPORTER": "console",
    "OTEL_METRICS_EXPORTER": "console",
}
# What ProtectSystem=strict, ProtectProc= and ProcSubset= leave to be seen and written.
VIEW = (
    *("unshare", "--mount", "sh", "-c"),
    (
        "mount --bind . . && mount -o remount,bind,ro / &&"
        ' mount -t proc -o hidepid=invisible,subset=pid proc /proc && cd "$PWD" && exec "$@"'
    ),
    "sh",
)
AS_NOBODY = (
    *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
    *("--no-new-privs", "--bounding-set=-all"),
)


@pytest.fixture(scope="module")
def tree(place: Path) -> Path:
    """A clone of the repository's files."""
    return clone(place / "tree")


@pytest.fixture(scope="module")
def packages(tree: Path, place: Path) -> dict[str, Path]:
    """The wheel and the sdist of the tree."""
    return build(tree, place / "dist")


@pytest.fixture(scope="module")
def installed(packages: dict[str, Path], place: Path) -> Path:
    """The programs of an environment that the wheel was installed into, with the server."""
    python = empty_environment(place / "venv")
    locked = constraints(place / "constraints.txt")
    wheel = f"{packages['wheel']}[embedded]"
    install(python, "--only-binary", ":all:", "--constraint", str(locked), wheel)
    return python.parent


def digest(path: Path) -> str:
    """A file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_two_builds_are_the_same_to_the_byte(packages: dict[str, Path], place: Path) -> None:
    """From another folder, with files of another age and mode: the same wheel, the same sdist."""
    other = clone(place / "else" / "where")
    for name in tracked():
        os.utime(other / name, (0, 1_000_000_000))
        (other / name).chmod((other / name).stat().st_mode & 0o700)
    again = build(other, place / "again", umask=0o077)
    assert {kind: digest(path) for kind, path in again.items()} == {
        kind: digest(path) for kind, path in packages.items()
    }
    with zipfile.ZipFile(packages["wheel"]) as wheel:
        stamps = {entry.date_time for entry in wheel.infolist()}
    told = datetime.fromtimestamp(int(EPOCH), UTC)
    assert stamps == {told.timetuple()[:6]}


def test_the_wheel_has_every_file_of_the_program(packages: dict[str, Path]) -> None:
    """SQL, migrations, schemas, templates: what git has under src/orbit, byte for byte."""
    with zipfile.ZipFile(packages["wheel"]) as wheel:
        found = {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
        declared = wheel.read(metadata).decode()
    expected = {
        name.removeprefix("src/"): (ROOT / name).read_bytes() for name in tracked("src/orbit")
    }
    assert found == expected
    for ending in (".sql", ".schema.json", ".mako", "templates/steps.py"):
        assert any(name.endswith(ending) for name in found), ending
    assert set(re.findall(r"^Provides-Extra: (\w+)$", declared, re.MULTILINE)) == EXTRAS


def test_the_sdist_makes_the_same_wheel(packages: dict[str, Path], place: Path) -> None:
    """Unpacked in an empty folder it builds the wheel that the tree builds, to the byte."""
    with tarfile.open(packages["sdist"]) as sdist:
        if hasattr(tarfile, "data_filter"):  # not so in the first releases of 3.11
            sdist.extraction_filter = tarfile.data_filter
        sdist.extractall(place / "unpacked")
    (folder,) = (place / "unpacked").iterdir()
    for name in ("Dockerfile", "compose.yaml", "ecosystem.config.js", "deploy/orbit.service"):
        assert (folder / name).is_file(), name
    wheel = build(folder, place / "from-sdist", "wheel")["wheel"]
    assert digest(wheel) == digest(packages["wheel"])


@pytest.mark.parametrize("user", [None, NOBODY], ids=["this-user", "nobody"])
def test_the_demo_runs_from_the_wheel_alone(installed: Path, place: Path, user: int | None) -> None:
    """In an empty folder with a bare environment: as whoever runs this, and as nobody if root."""
    if user is not None and os.geteuid() != 0:
        pytest.skip("this is an ordinary user; only root can become another")
    folder = place / f"demo-{user}"
    folder.mkdir()
    if user is not None:
        os.chown(folder, user, user)
    told = run(installed / "orbit", "demo", cwd=folder, user=user, HOME=str(folder))
    assert "cycle_finished" in told
    assert "stored" in told
    place_of = run(installed / "python", "-c", "import orbit; print(orbit.__file__)", cwd=folder)
    assert Path(place_of.strip()).is_relative_to(installed.parent)


def test_the_demo_runs_within_what_the_unit_allows(
    installed: Path, place: Path, missing: Missing
) -> None:
    """Its calls, its families, its /proc, one folder to write; the embedded server included."""
    if os.geteuid() != 0:
        pytest.skip("this is an ordinary user; only root can become another, and mount")
    if find_library("seccomp") is None or program("systemd-analyze") is None:
        missing("libseccomp and systemd-analyze are not here: install systemd")
    folder = place / "confined"
    folder.mkdir()
    os.chown(folder, NOBODY, NOBODY)
    confined = shutil.copy(ROOT / "tests" / "delivery" / "confined.py", place)
    unit = shutil.copy(ROOT / "deploy" / "orbit.service", place)
    command = [*VIEW, *AS_NOBODY, installed / "python", confined, unit]
    if subprocess.run([*VIEW, "true"], cwd=folder, capture_output=True, check=False).returncode:
        command = command[len(VIEW) :]  # a container that may not mount shows the rest
    told = run(*command, installed / "orbit", "demo", "--dir", "demo", cwd=folder, HOME=str(folder))
    assert "stored" in told
    refused = "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)"
    assert "not permitted" in run(*command, installed / "python", "-c", refused, cwd=folder, code=1)


def test_extras_are_asked_for_by_name_and_work(
    installed: Path, packages: dict[str, Path], place: Path
) -> None:
    """Refused without; then Parquet by its lock, by hash, OpenTelemetry, and a node with both."""
    python, folder = installed / "python", place / "extras"
    run(installed / "orbit", "init", folder, cwd=place)
    refused = run(installed / "orbit", "validate", cwd=folder, code=1, **ASKS_FOR_EXTRAS)
    assert "pip install 'orbit-control-plane[parquet]'" in refused
    lock = ROOT / "requirements" / "parquet.txt"
    assert lock.read_text().partition("\n\n")[2] in (lock.parent / "dev.txt").read_text()
    install(python, "--require-hashes", "--requirement", str(lock))
    locked = ("--constraint", str(constraints(place / "constraints.txt")))
    wheel = f"{packages['wheel']}[otel,parquet]"
    install(python, "--only-binary", ":all:", *locked, wheel)
    run(installed / "orbit", "demo", "--dir", folder / "demo", cwd=folder, **ASKS_FOR_EXTRAS)
    log = (folder / "demo" / "node.log").read_text()
    assert '"name": "cycle"' in log
    assert "otel_not_installed" not in log
    run(python, "-c", "import pyarrow.parquet", cwd=folder)
