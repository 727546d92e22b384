"""Who a request comes from: a key or a session becomes an actor, or nobody.

What was verified is remembered for a second, so that a revocation takes effect on every node
within that, and busy clients cost the database one look a second. What is wrong is never
remembered. Whatever goes wrong while it is decided is raised: nobody comes in by an error.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable

import structlog

from orbit.audit import trail
from orbit.audit.trail import Act
from orbit.clock import Clock
from orbit.database.pool import TRANSIENT, Database
from orbit.governance.actor import EVERYWHERE, Actor
from orbit.governance.keys import Keys, Token, Verified
from orbit.governance.refusals import MOST_A_MINUTE
from orbit.governance.sessions import Sessions
from orbit.governance.slowing import Ration, Slowing

STALE_SECONDS = 1.0
_MOST_REMEMBERED = 4096
_USE_SECONDS = 60.0
log = structlog.get_logger(__name__)


class TooManyFailures(Exception):
    """The source has to wait; says how long."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"wait {seconds:g} s")
        self.seconds = seconds


class Authentication:
    """Verifies for one node."""

    def __init__(self, database: Database, clock: Clock, keys: Keys, sessions: Sessions) -> None:
        self._database, self._clock = database, clock
        self._keys, self._sessions = keys, sessions
        self._slowing = Slowing(clock)
        self._ration = Ration(clock, MOST_A_MINUTE)
        self._remembered: OrderedDict[bytes, tuple[Actor, float]] = OrderedDict()
        self._proven: OrderedDict[bytes, None] = OrderedDict()
        self._touched: dict[str, float] = {}

    async def by_key(self, text: str, source: str) -> Actor | None:
        """The actor of a key, or None. Raises TooManyFailures, and what the database raises."""

        async def look() -> Verified | None:
            token = Token.of(text)
            return None if token is None else await self._keys.verify(token)

        token = Token.of(text)
        return await self._verified(text, source, look, None if token is None else token.key_id)

    async def by_session(self, secret: str, source: str) -> Actor | None:
        """The same for the secret of a session."""
        look = self._sessions.verify
        return await self._verified(f"session:{secret}", source, lambda: look(secret), None)

    async def failed(self, source: str, key_id: str | None = None) -> None:
        """Counts a failed attempt, and audits it: of all sources so many a minute."""
        refused = self._slowing.failed(source)
        left_out = self._ration.take()
        if left_out is None:
            return
        detail = {
            "source": source,
            "keyId": key_id,
            "refusedBefore": refused,
            "leftOutOfAll": left_out,
        }
        async with self._database.transaction() as connection:
            await trail.append(connection, Act(EVERYWHERE, "access.failed", source, detail=detail))

    def check_pause(self, source: str) -> None:
        """Raises TooManyFailures while the source has to wait."""
        seconds = self._slowing.wait_seconds(source)
        if seconds > 0:
            raise TooManyFailures(seconds)

    def forget(self) -> None:
        """Looks anew at everybody: a key has just ended here."""
        self._remembered.clear()

    async def _verified(
        self,
        text: str,
        source: str,
        look: Callable[[], Awaitable[Verified | None]],
        key_id: str | None,
    ) -> Actor | None:
        digest = hashlib.sha256(text.encode()).digest()
        remembered = self._remembered.get(digest)
        if remembered is not None and self._clock.monotonic() < remembered[1]:
            return remembered[0]
        # Who was right before is not kept waiting because somebody else at its address fails.
        if digest not in self._proven:
            self.check_pause(source)
        verified = await look()
        if verified is None:
            self._remembered.pop(digest, None)
            self._proven.pop(digest, None)
            await self.failed(source, key_id)
            return None
        self._remember(digest, verified)
        await self._touch(verified.actor)
        return verified.actor

    def _remember(self, digest: bytes, verified: Verified) -> None:
        left = verified.seconds_left
        until = self._clock.monotonic() + min(
            STALE_SECONDS, STALE_SECONDS if left is None else left
        )
        self._remembered[digest] = verified.actor, until
        self._proven[digest] = None
        self._proven.move_to_end(digest)
        for known in (self._remembered, self._proven):
            if len(known) > _MOST_REMEMBERED:
                known.popitem(last=False)

    async def _touch(self, actor: Actor) -> None:
        """Notes the use of a key, once a minute; that it cannot be noted stops nobody."""
        now = self._clock.monotonic()
        if actor.key_id is None or now < self._touched.get(actor.key_id, now):
            return
        self._touched[actor.key_id] = now + _USE_SECONDS
        if len(self._touched) > _MOST_REMEMBERED:
            self._touched.clear()
        try:
            await self._keys.touch(actor.key_id)
        except TRANSIENT as error:
            log.warning("key_use_not_noted", error=type(error).__name__)
