"""The receiver of a drill: on a loopback port, for as long as the drill, and for nobody else.

It notes the job of every request as soon as its head is there, answers each after a short while,
and keeps nothing. It is no receiver for anything but a drill: it verifies nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

_ANSWER = b"HTTP/1.1 204 No Content\r\n\r\n"
_MARK = b"orbit-job-id:"


class DrillReceiver:
    """What arrived, in order, by job; `url` is where."""

    def __init__(self, answer_seconds: float) -> None:
        self._answer_seconds = answer_seconds
        self.jobs: list[str] = []
        self.url = ""
        self._arrival = asyncio.Event()

    @property
    def distinct(self) -> int:
        """How many jobs arrived."""
        return len(set(self.jobs))

    async def until(self, count: int, seconds: float) -> None:
        """Waits so long for so many jobs; what does not arrive is told by its absence."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.distinct < count:
                    self._arrival.clear()
                    await self._arrival.wait()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, request by request."""
        with suppress(OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                self.jobs.append(_field(head, _MARK))
                self._arrival.set()
                await reader.readexactly(int(_field(head, b"content-length:") or 0))
                await asyncio.sleep(self._answer_seconds)
                writer.write(_ANSWER)
        writer.close()


@asynccontextmanager
async def listening(answer_seconds: float) -> AsyncIterator[DrillReceiver]:
    """A receiver on a free port of 127.0.0.1, until the end of the block."""
    found = DrillReceiver(answer_seconds)
    serving: set[asyncio.Task[None]] = set()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(found.serve(reader, writer))
        serving.add(task)
        task.add_done_callback(serving.discard)

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()[:2]
    found.url = f"http://{host}:{port}/drill"
    try:
        yield found
    finally:
        server.close()
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)


def _field(head: bytes, name: bytes) -> str:
    return head.partition(name)[2].split(b"\r\n", 1)[0].strip().decode("ascii", "replace")
