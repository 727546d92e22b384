"""Child processes that never outlive their parent, and free ports for them.

A child writes to a log file, of which the last lines are shown if it dies. It runs in a
session of its own, so that Ctrl-C reaches only the driver, which then stops its children in
order: SIGTERM, and SIGKILL for who does not go. On Linux the kernel sends the SIGTERM should
the driver be killed without warning; elsewhere such children would have to be ended by hand.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx
from rich.markup import escape

_PR_SET_PDEATHSIG = 1
_LAST_LINES = 15


class DriverFailed(Exception):
    """Something that ends the run with exit code 1; the text is for the person running it."""


class Child:
    """One child process; `name` is what messages call it."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        self.name = name
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self._process = subprocess.Popen(  # noqa: S603  (our own command)
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_dies_with_parent(),  # noqa: PLW1509  (no threads at this point)
            )

    def check(self) -> None:
        """Raises DriverFailed with the child's last lines if it has ended."""
        code = self._process.poll()
        if code is not None:
            raise DriverFailed(f"{self.name} ended with {_outcome(code)}.\n{self.last_lines()}")

    def wait_until_up(self, url: str, seconds: float, waiting: Callable[[str], None]) -> None:
        """Returns when `url` answers 200; tells `waiting` (as rich markup) for what it waits.

        Raises DriverFailed when the child ends, or after `seconds`.
        """
        deadline = time.monotonic() + seconds
        reason = "no answer yet"
        while time.monotonic() < deadline:
            self.check()
            try:
                answer = httpx.get(url, timeout=2, trust_env=False)
            except httpx.TransportError:
                pass
            else:
                if answer.status_code == httpx.codes.OK:
                    return
                reason = f"{answer.status_code} {answer.text[:200]}"
            waiting(escape(f"waiting for {self.name}: {reason}"))
            time.sleep(0.1)
        text = f"{self.name} is not up after {seconds:.0f} s: {reason}"
        raise DriverFailed(f"{text}\n{self.last_lines()}")

    def stop(self, seconds: float) -> int:
        """SIGTERM, after `seconds` SIGKILL; returns the exit code."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                self._process.kill()
        return self._process.wait()

    def last_lines(self) -> str:
        """The end of the child's log, and where the rest is."""
        lines = self.log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        shown = "\n".join(f"  | {line}" for line in lines) or "  (it wrote nothing)"
        return f"{shown}\n  Its whole output: {self.log}"


def free_port(preferred: int) -> int:
    """The preferred port of 127.0.0.1, or one that is free if that is taken."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise DriverFailed("this machine has no free port on 127.0.0.1")


def _outcome(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def _dies_with_parent() -> Callable[[], None] | None:
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # loaded before the fork: little may be done after it
    parent = os.getpid()

    def ask_the_kernel() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)

    return ask_the_kernel
