"""What ends with a lease: a request that is not yet wholly with its receiver is cut off.

A request is handed to the kernel a piece at a time, each only while its lease is certainly ours,
and only when the kernel has room for it, so that next to nothing lies where nobody asks any more.
When a lease is over a timer looks at what is on the wire. What the receiver's machine has
acknowledged whole is left alone: nothing more of it will be sent, and its answer is worth knowing.
The rest is reset, and what the kernel still had of it is dropped.
"""

from __future__ import annotations

import asyncio
import fcntl
import select
import socket
import struct
import termios
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

LAPSED = "lease over"
_AT_ONCE = struct.pack("ii", 1, 0)
_NOTSENT_LOWAT: int | None = getattr(socket, "TCP_NOTSENT_LOWAT", None)


@dataclass(frozen=True, slots=True)
class Hold:
    """By what right a request is sent.

    `may_begin` is asked just before the first byte; `seconds_left` for how long it may go on then,
    by a clock that goes on while a machine sleeps.
    """

    may_begin: Callable[[], bool]
    seconds_left: Callable[[], float]


class Held(Protocol):
    """A request on the wire."""

    @property
    def hold(self) -> Hold | None:
        """By what right it is there; None while there is nothing of the kind."""

    def lapse(self) -> None:
        """Its lease is over."""


class Lapses:
    """One timer for all requests of a client: the next lease that may be over."""

    def __init__(self, requests: Iterable[Held]) -> None:
        self._requests = requests
        self._timer: asyncio.TimerHandle | None = None

    def expect(self, hold: Hold) -> None:
        """A request begins to be sent."""
        loop, left = asyncio.get_running_loop(), max(hold.seconds_left(), 0.0)
        if self._timer is not None:
            if self._timer.when() <= loop.time() + left:
                return
            self._timer.cancel()
        self._timer = loop.call_later(left, self._look)

    def stop(self) -> None:
        """Looks no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """Lets go of what is over; leases that were prolonged are looked at again in time."""
        self._timer = None
        held = [(request, request.hold) for request in self._requests]
        for request, hold in held:
            if hold is None:
                continue
            if hold.seconds_left() > 0:
                self.expect(hold)
            else:
                request.lapse()


def keep_little_unsent(sock: socket.socket, size: int) -> None:
    """Lets the kernel take more only when less than `size` bytes wait to be sent."""
    if _NOTSENT_LOWAT is not None:
        with suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, _NOTSENT_LOWAT, size)


def has_room(sock: socket.socket) -> bool:
    """Whether the kernel takes more, or has an error to tell."""
    asked = select.poll()
    asked.register(sock, select.POLLOUT)
    return bool(asked.poll(0))


def drop_unsent(sock: socket.socket) -> None:
    """Has the end of a connection be a reset, not a farewell after all that is still to be sent."""
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)


def is_acknowledged(sock: socket.socket) -> bool:
    """Whether the other machine has all that the kernel was given; False if that can't be told."""
    try:
        found = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0")
    except OSError:
        return False
    unacknowledged: int = struct.unpack("i", found)[0]
    return unacknowledged == 0
