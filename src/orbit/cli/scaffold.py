"""`init`: a small project that runs as it is, and that nothing of yours is lost to.

All files are looked at before the first is written: where one exists, nothing is written at all
unless `--force` says so. A `.gitignore` that is there is yours, and stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import typer

from orbit.cli.options import Json
from orbit.cli.terminal import print_json, say
from orbit.errors import OrbitError

RECEIVER_URL = "http://127.0.0.1:8787/posts"
_DOT_ENV = ".env"
_IGNORE = ".gitignore"
_IGNORED = (
    "# The embedded database with its keys, and settings that may hold tokens.\n.orbit/\n.env\n"
)


def init(
    directory: Annotated[Path, typer.Argument(help="Where; made if it is not there.")] = Path(),
    is_forced: Annotated[
        bool, typer.Option("--force", help="Overwrite files that are there already.")
    ] = False,
    is_json: Json = False,
) -> None:
    """Make a small project that runs as it is."""
    written = write_project(directory, is_forced=is_forced)
    if is_json:
        print_json({"directory": str(directory), "files": [str(path) for path in written]})
        return
    for path in written:
        say(f"made {path}")
    where = "" if directory.resolve() == Path.cwd() else f"cd {directory} && "
    say()
    say(f"Next: {where}orbit validate; then see {directory / 'README.md'}.")


def write_project(
    directory: Path, *, is_forced: bool = False, receiver_url: str = RECEIVER_URL
) -> list[Path]:
    """Writes the project's files; their paths.

    Raises OrbitError, naming them, if any exists and `is_forced` is not given; then nothing is
    written.
    """
    contents = {directory / place: text for place, text in _templates()}
    contents[directory / _DOT_ENV] = _dot_env(receiver_url)
    if not (directory / _IGNORE).exists():
        contents[directory / _IGNORE] = _IGNORED
    existing = sorted(path for path in contents if path.exists())
    if existing and not is_forced:
        names = ", ".join(str(path) for path in existing)
        raise OrbitError(f"nothing was written, since there is already {names} (see --force)")
    for path, text in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return sorted(contents)


def _templates() -> Iterator[tuple[str, str]]:
    """Every shipped file with its place in the project."""
    waiting: list[tuple[PurePosixPath, Traversable]] = [
        (PurePosixPath(), files("orbit.cli") / "templates")
    ]
    while waiting:
        place, entry = waiting.pop()
        if entry.is_dir():
            waiting += [
                (place / one.name, one) for one in entry.iterdir() if one.name != "__pycache__"
            ]
        else:
            yield str(place), entry.read_text("utf-8")


def _dot_env(receiver_url: str) -> str:
    endpoints: list[dict[str, Any]] = [
        {
            "key": "default-endpoint",
            "url": receiver_url,
            "permanent_statuses": [400, 401, 403, 404, 410, 413, 422],
        }
    ]
    return (
        "# Settings of this project; the environment wins over this file.\n"
        "# Raw cycles (without a run profile) are off; the run profile has its own schedule.\n"
        "ORBIT_CRON_SCHEDULE=\n"
        f"ORBIT_DISPATCH_ENDPOINTS='{json.dumps(endpoints)}'\n"
    )
