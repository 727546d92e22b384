"""Exports of the audit trail over the API, so that nobody's export is everybody's trouble.

A node reads for two at once, and sends one to a key at a time; who asks for more is told to come
later. What is read goes to a file that has no name, under a snapshot that ends with the reading;
the client then may be as slow as ten minutes allow. A checkpoint is signed only for who may see
every log, and not twice within ten seconds; others get the last one there is. Each export's
manifest is signed for it.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from http import HTTPStatus
from typing import IO

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from orbit.api.problems import HttpRefusal
from orbit.app import Node, checkpoint_folder
from orbit.audit.export import export
from orbit.database.pool import TRANSIENT
from orbit.errors import OrbitError
from orbit.governance.actor import Actor
from orbit.services.notary import apart

MEDIA_TYPE = "application/x-ndjson"
_AT_ONCE = 2
_SEND_SECONDS = 600.0
_SIGN_SECONDS = 10.0
_PIECE_BYTES = 1 << 18


class Exports:
    """The exports of one node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._reading = 0
        self._keys: set[str] = set()
        self._signed_at = float("-inf")

    async def answer(self, actor: Actor, log: str | None) -> StreamingResponse:
        """The export of all logs, or of one. Raises HttpRefusal, or what the database raises."""
        if actor.id in self._keys or self._reading >= _AT_ONCE:
            raise HttpRefusal(
                HTTPStatus.TOO_MANY_REQUESTS,
                "too_many_exports",
                "exports are under way, for this key or for others: ask again when they have ended",
                Retry_After="10",
            )
        self._keys.add(actor.id)
        self._reading += 1
        try:
            file = await self._read(log, is_signing=actor.within is None)
        except BaseException:
            self._keys.discard(actor.id)
            raise
        finally:
            self._reading -= 1
        return _Sent(file, lambda: self._keys.discard(actor.id))

    async def _read(self, log: str | None, *, is_signing: bool) -> IO[bytes]:
        node = self._node
        now = node.clock.monotonic()
        if is_signing and node.signer is not None and now > self._signed_at + _SIGN_SECONDS:
            self._signed_at = now
            with suppress(OSError, OrbitError, *TRANSIENT):
                await apart(node.signer)
        return await asyncio.to_thread(_spool, node, log)


def _spool(node: Node, log: str | None) -> IO[bytes]:
    file = tempfile.TemporaryFile()  # noqa: SIM115 - who sends it closes it
    try:
        folder = checkpoint_folder(node.settings)
        file.writelines(export(node.database.dsn, folder, log, signer=node.signer))
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


class _Sent(StreamingResponse):
    """A file as the answer, sent within ten minutes or cut off; `ended` is called whatever comes.

    A client that goes away in between has it called as well.
    """

    def __init__(self, file: IO[bytes], ended: Callable[[], None]) -> None:
        super().__init__(_pieces(file), media_type=MEDIA_TYPE)
        self._file, self._ended = file, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(_SEND_SECONDS):
                await super().__call__(scope, receive, send)
        finally:
            self._file.close()
            self._ended()


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    while piece := file.read(_PIECE_BYTES):
        yield piece
