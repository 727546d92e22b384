"""`demo`: the whole way of a cycle, on this machine, in one go.

Makes the project of `orbit init` in a folder of its own, starts the reference receiver and a
node with its embedded database as two processes, runs the run profile once, and compares what
Orbit recorded with what the receiver stored. Ends both, also on Ctrl-C; a temporary folder is
removed, `--dir` is kept. The environment's Orbit settings play no part.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orbit.cli.options import Json
from orbit.cli.outcome import NodeUnreachable
from orbit.cli.terminal import note, print_json, say, show, size, table
from orbit.errors import OrbitError

if TYPE_CHECKING:
    import httpx

_START_SECONDS = 60.0
_STOP_SECONDS = 40.0
_POLL_SECONDS = 0.05
_LAST_LINES = 12


class Child:
    """A process of this very Python; its output goes to a log file in the folder."""

    def __init__(
        self, name: str, arguments: list[str], folder: Path, environment: Mapping[str, str]
    ) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-m", "orbit", *arguments],
                cwd=folder,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us, who stop it in order
            )

    def wait_until_up(self, client: httpx.Client, path: str) -> None:
        """Returns when the path answers 200. Raises OrbitError with the log's end otherwise."""
        import httpx

        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise OrbitError(f"the {self.name} ended:\n{self.last_lines()}")
            with suppress(httpx.TransportError):
                if client.get(path).is_success:
                    return
            time.sleep(_POLL_SECONDS)
        raise OrbitError(f"the {self.name} did not come up:\n{self.last_lines()}")

    def stop(self) -> None:
        """SIGTERM, and SIGKILL if it does not go."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()

    def last_lines(self) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-_LAST_LINES:])


def demo(
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where; kept. Default: a temporary folder.")
    ] = None,
    is_json: Json = False,
) -> None:
    """See it work: one cycle, whole, right here."""
    from orbit.cli.scaffold import write_project

    with _folder(directory) as folder, ExitStack() as stack:
        ports = _free_ports(2)
        receiver_url = f"http://127.0.0.1:{ports[1]}"
        write_project(folder, receiver_url=f"{receiver_url}/posts")
        _tell(f"project in {folder}", is_json=is_json)
        lineages, arrivals = _run(folder, ports, stack, is_json=is_json)
    if is_json:
        print_json({"cycles": lineages, "arrivals": arrivals})
    else:
        _show(lineages, arrivals, folder if directory else None)
    _compare(lineages, arrivals)


def _run(
    folder: Path, ports: list[int], stack: ExitStack, *, is_json: bool
) -> tuple[list[Any], list[Any]]:
    """One trigger from beginning to end; the cycles' lineages and the receiver's arrivals."""
    import httpx

    from orbit.cli.client import Api, authorization
    from orbit.cli.watching import watch
    from orbit.governance import local_key

    environment = _environment(ports[0])
    node_client, receiver_client = (
        stack.enter_context(
            httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False)
        )
        for port in ports
    )
    started = (
        ("receiver", ["receiver", "--port", str(ports[1])], receiver_client, "/health"),
        ("node", ["up"], node_client, "/ready"),
    )
    children = []
    for name, arguments, client, path in started:
        child = Child(name, arguments, folder, environment)
        children.append(child)
        stack.callback(child.stop)
        child.wait_until_up(client, path)
        _tell(f"{name} up at {client.base_url}", is_json=is_json)
    # The embedded node has made its key by now, in its folder.
    node_client.headers.update(authorization(local_key.read(folder / ".orbit")))
    api = Api(node_client.request, str(node_client.base_url))
    try:
        answer = api.post("/run-profiles/trigger")
        ids = [one["cycleRunId"] for one in answer["items"] if one.get("cycleRunId")]
        lineages = watch(api, ids, is_quiet=is_json)
    except NodeUnreachable as error:
        raise OrbitError(f"{error}\n{children[-1].last_lines()}") from error
    return lineages, receiver_client.get("/received").json()["items"]


@contextmanager
def _folder(directory: Path | None) -> Iterator[Path]:
    """The folder given, or a temporary one, removed with its database."""
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        yield directory.resolve()
        return
    folder = Path(tempfile.mkdtemp(prefix="orbit-demo-")).resolve()
    try:
        yield folder
    finally:
        from orbit.database.embedded import erase

        if (folder / ".orbit").exists():
            with suppress(OrbitError):
                erase(folder / ".orbit")
        shutil.rmtree(folder, ignore_errors=True)


def _environment(port: int) -> dict[str, str]:
    ours = ("ORBIT_", "DATABASE_URL", "NODE_ENV", "PORT")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | {"PORT": str(port), "PYTHONUNBUFFERED": "1"}


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)
        ]
        return [int(one.getsockname()[1]) for one in sockets]


def _show(lineages: list[Any], arrivals: list[Any], kept: Path | None) -> None:
    say()
    say("What arrived, as the receiver tells it:")
    rows = [
        (
            f"{one['method']} {one['path']}",
            one["cycleRunId"],
            one["jobId"],
            one["outcome"],
            size(one["size"]),
            f"sha256:{one['digest']}",
        )
        for one in arrivals
    ]
    names = ("WHERE", "CYCLE", "JOB", "OUTCOME", "SIZE", "DIGEST")
    show(table(names, rows, ids=("CYCLE", "JOB", "DIGEST")))
    if kept is None:
        say("The folder is removed again; keep it with --dir.")
    else:
        say()
        say(f"Look next: cd {kept} && orbit trace {lineages[0]['cycle']['cycleRunId']}")


def _compare(lineages: list[Any], arrivals: list[Any]) -> None:
    """Raises OrbitError unless the receiver stored what Orbit says it delivered, each once."""
    sent = sorted((job["jobId"], job["digest"]) for one in lineages for job in one["jobs"])
    stored = sorted((one["jobId"], one["digest"]) for one in arrivals if one["outcome"] == "stored")
    if not sent or sent != stored:
        raise OrbitError(
            f"Orbit has {json.dumps(sent)} and the receiver {json.dumps(stored)}: not the same"
        )


def _tell(text: str, *, is_json: bool) -> None:
    if not is_json:
        note(text)
