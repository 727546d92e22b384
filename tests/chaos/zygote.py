"""Forks nodes from a process that has everything imported, so that one starts in milliseconds.

Each node is a process of its own that runs what `orbit up` runs. Requests come as JSON lines on
standard input, births and deaths go out on standard output. Its end is the end of its nodes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import sys
import traceback
from typing import Any

from orbit.api.server import serve
from orbit.settings import load_settings
from tests.chaos import boundaries

for _late in ("uvloop", "uvicorn.protocols.http.auto", "orbit.database.migrations", "httptools"):
    with contextlib.suppress(ImportError):
        importlib.import_module(_late)


def main() -> None:
    """Until standard input ends."""
    nodes: set[int] = set()
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pending = b""
    while True:
        found, _, _ = select.select([0, readable], [], [])
        if readable in found:
            os.read(readable, 4096)
            _bury(nodes)
        if 0 in found:
            chunk = os.read(0, 1 << 16)
            if not chunk:
                break
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                nodes.add(_fork(json.loads(line)))
    for node in nodes:
        os.kill(node, signal.SIGKILL)


def _fork(request: dict[str, Any]) -> int:
    node = os.fork()
    if node:
        _tell({"started": node, "number": request["number"]})
        return node
    code = 70
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _redirect(request["log"])
        os.environ.update(request["environ"])
        if request["boundary"]:
            boundaries.install(*request["boundary"])
        code = serve(load_settings(env_file=None))
    except BaseException:  # noqa: BLE001 - nothing of a node may run on in the parent's code
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _redirect(log: str) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(nothing, 0)
    os.dup2(file, 1)
    os.dup2(file, 2)


def _bury(nodes: set[int]) -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            node, status = os.waitpid(-1, os.WNOHANG)
            if not node:
                return
            nodes.discard(node)
            _tell({"ended": node, "code": os.waitstatus_to_exitcode(status)})


def _tell(message: dict[str, int]) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main()
