"""What the tests of delivery share: a clone of the tree, packages built from it, clean folders.

Packages come from where the user's own pip takes them, in the locked versions. What `.ci/run`
brings (PM2, a linter of Dockerfiles, systemd-analyze) is looked for in `build/` and on PATH; a
test that misses it is skipped with the reason, and fails where ORBIT_TEST_DELIVERY=required.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EPOCH = "1700000000"
NOBODY = 65534


def bare_environment(**given: str) -> dict[str, str]:
    """PATH, and what pip and npm need to find packages; nothing of Orbit's, no Python of ours."""
    kept = ("PATH", "PIP_", "NPM_", "npm_", "SSL_", "HTTP", "http", "NO_PROXY", "no_proxy")
    ours = {name: value for name, value in os.environ.items() if name.startswith(kept)}
    return ours | {"HOME": os.environ.get("HOME", "/"), "LC_ALL": "C.UTF-8"} | given


def run(
    *command: str | Path,
    cwd: Path,
    timeout: float = 240,
    user: int | None = None,
    code: int = 0,
    **given: Any,
) -> str:
    """Runs a command to its end in a bare environment; what it printed. Fails by another code."""
    found = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=bare_environment(**given),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
        check=False,
        user=user,
        group=user,
        extra_groups=None if user is None else (),
    )
    assert found.returncode == code, f"{command}: {found.returncode}\n{found.stdout}"
    return found.stdout


def tracked(under: str = ".") -> list[str]:
    """The repository's files, as git knows them."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", under], cwd=ROOT, capture_output=True, check=True
    )
    return [name for name in listed.stdout.decode().split("\0") if (ROOT / name).is_file()]


def clone(target: Path) -> Path:
    """A copy of the tracked files as they are now, with nothing that lies beside them."""
    for name in tracked():
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, place)
        place.chmod((ROOT / name).stat().st_mode & 0o755)
    return target


def build(source: Path, target: Path, *kinds: str, umask: int = 0o022) -> dict[str, Path]:
    """Builds packages, as `make dist` does; by kind, `wheel` and `sdist`."""
    kinds = kinds or ("sdist", "wheel")
    targets = [part for kind in kinds for part in ("--target", kind)]
    command = [sys.executable, "-m", "hatchling", "build", *targets, "--directory", str(target)]
    subprocess.run(
        command,
        cwd=source,
        env=bare_environment(SOURCE_DATE_EPOCH=EPOCH),
        check=True,
        capture_output=True,
        umask=umask,
    )
    endings = {"wheel": "*.whl", "sdist": "*.tar.gz"}
    return {kind: next(target.glob(endings[kind])) for kind in kinds}


def constraints(target: Path) -> Path:
    """The locked versions of requirements/run.txt, without their hashes."""
    text = (ROOT / "requirements" / "run.txt").read_text()
    target.write_text("\n".join(re.findall(r"^[\w.-]+==[\w.]+", text, re.MULTILINE)))
    return target


def everyones_python() -> Path:
    """A Python that any user can run: ours, or else the system's."""
    ours = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
    for python in (ours, Path("/usr/local/bin/python3"), Path("/usr/bin/python3")):
        if not python.exists():
            continue
        path = python.resolve()
        is_open = all(folder.stat().st_mode & 0o001 for folder in (path, *path.parents))
        probe = [str(path), "-c", "import sys, venv; sys.exit(sys.version_info < (3, 11))"]
        if is_open and subprocess.run(probe, capture_output=True, check=False).returncode == 0:
            return path
    return ours


def empty_environment(target: Path) -> Path:
    """The Python of a new environment in which there is nothing, not even pip."""
    run(everyones_python(), "-m", "venv", "--without-pip", target, cwd=target.parent)
    return target / "bin" / "python"


def install(python: Path, *arguments: str) -> None:
    """Installs into that environment, from where this user's pip takes packages."""
    pip = (sys.executable, "-m", "pip", "--python", str(python))
    options = ("--quiet", "--no-input", "--disable-pip-version-check")
    run(*pip, "install", *options, *arguments, cwd=python.parent)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder that every user may enter, outside the repository."""
    folder = Path(tempfile.mkdtemp(prefix="orbit-delivery-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


Missing = Callable[[str], None]


@pytest.fixture(scope="session")
def missing() -> Missing:
    """Skips with a reason, or fails where everything has to be there."""

    def tell(reason: str) -> None:
        if os.environ.get("ORBIT_TEST_DELIVERY") == "required":
            pytest.fail(reason)
        pytest.skip(reason)

    return tell


def program(name: str, places: Mapping[str, Path] | None = None) -> Path | None:
    """Where a program is: among what `.ci/run` brought, else on PATH."""
    brought = {
        "pm2": ROOT / "build/pm2/node_modules/.bin/pm2",
        "hadolint": ROOT / "build/hadolint/bin/hadolint",
    }
    known = {**brought, **(places or {})}.get(name)
    if known is not None and known.exists():
        return known
    found = shutil.which(name)
    return None if found is None else Path(found)
