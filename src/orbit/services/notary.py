"""The notary: signs checkpoints of the audit trail, beside the loop that seals.

A signer waits for a folder's lock, an operator's command and the database, each for a bounded
time; meanwhile sealing goes on, and a node that ends does not wait for it. So it signs in a thread
of its own. What cannot be signed now is the next time.
"""

from __future__ import annotations

import asyncio
import threading

from orbit.audit.signing import Signer
from orbit.database.pool import TRANSIENT, Database, first_line
from orbit.errors import OrbitError
from orbit.services.base import Service


class Notary(Service):
    """Runs on every node that has a signer.

    Args:
        seconds: how often it signs.
    """

    name = "notary"

    def __init__(self, database: Database, signer: Signer, *, seconds: float) -> None:
        super().__init__(database)
        self._signer, self._seconds = signer, seconds

    async def run_once(self) -> float:
        """Signs every log that has grown."""
        try:
            await apart(self._signer)
        except (OSError, OrbitError, *TRANSIENT) as error:
            self._log.error("checkpoint_failed", error=first_line(error))
        return self._seconds


async def apart(signer: Signer) -> None:
    """Signs in a thread that nothing waits for at the process's end. Raises as `sign_all` does."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()
    failed: list[Exception] = []

    def work() -> None:
        try:
            signer.sign_all()
        except Exception as error:  # noqa: BLE001 - it is raised where it is waited for
            failed.append(error)
        if not loop.is_closed():
            loop.call_soon_threadsafe(done.set)

    threading.Thread(target=work, name="orbit-notary", daemon=True).start()
    await done.wait()
    if failed:
        raise failed[0]
