"""Who a request comes from: a key or a session becomes an actor, or nobody.

What was verified is remembered for a second, so that a revocation takes effect on every node
within that, and busy clients cost the database one look a second. What is wrong is never
remembered. Whatever goes wrong while it is decided is raised: nobody comes in by an error.

No pause keeps a good key out: it is looked for all the same, and a pause only says how what is
wrong is answered, and that the trail is spared it. So that a flood costs the database little and
keeps nobody waiting but those who come the same way, there are three ways in, each with a
connection of its own: for who was in before, for new keys from where nobody failed, and for the
rest, one after the other in the order of coming. Failures are told one at a time. A session or a
link that is over is nobody's guess, and counts as no failure.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable

import structlog

from orbit.audit import trail
from orbit.audit.trail import Act
from orbit.clock import Clock
from orbit.database.pool import TRANSIENT, Database
from orbit.governance.actor import EVERYWHERE, Actor
from orbit.governance.keys import Keys, Verified
from orbit.governance.refusals import MOST_A_MINUTE
from orbit.governance.sessions import Session, Sessions
from orbit.governance.slowing import Ration, Slowing
from orbit.governance.token import Token

STALE_SECONDS = 1.0
_MOST_REMEMBERED = 4096
_USE_SECONDS = 60.0
WAYS_IN = 3
_Presented = tuple[str, bytes]  # what kind of secret it is, and its SHA-256
log = structlog.get_logger(__name__)


class TooManyFailures(Exception):
    """The source has failed too often; says how long its failures are not looked into."""

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
        self._remembered: OrderedDict[_Presented, tuple[Actor, float]] = OrderedDict()
        self._proven: OrderedDict[_Presented, None] = OrderedDict()
        self._new, self._suspect = asyncio.Lock(), asyncio.Lock()
        self._telling = asyncio.Lock()
        self._touched: dict[str, float] = {}

    async def by_key(self, text: str, source: str) -> Actor | None:
        """The actor of a key, or None.

        Raises TooManyFailures for a wrong one in a pause, and what the database raises.
        """
        token = Token.of(text)
        if token is not None:
            presented = "key", hashlib.sha256(text.encode()).digest()
            way = self._suspect if self._slowing.is_slowed(source) else self._new
            actor = await self._verified(presented, lambda: self._keys.verify(token), way)
            if actor is not None:
                return actor
        self._check_pause(source)
        await self.failed(source, None if token is None else token.key_id)
        return None

    async def by_session(self, secret: str) -> Actor | None:
        """The actor of a session's secret, or None; raises what the database raises."""
        presented = "session", hashlib.sha256(secret.encode()).digest()
        return await self._verified(presented, lambda: self._sessions.verify(secret), self._suspect)

    async def by_link(self, code: str) -> tuple[Actor, Session] | None:
        """The session that a link opens, or None."""
        async with self._suspect:
            return await self._sessions.follow(code)

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
        # The head is held for no round trip, and a flood takes one connection of those for work.
        async with self._telling, self._database.batch() as connection:
            await trail.append(connection, Act(EVERYWHERE, "access.failed", source, detail=detail))

    def forget(self) -> None:
        """Looks anew at everybody: a key has just ended here."""
        self._remembered.clear()

    def _check_pause(self, source: str) -> None:
        seconds = self._slowing.wait_seconds(source)
        if seconds > 0:
            raise TooManyFailures(seconds)

    async def _verified(
        self,
        presented: _Presented,
        look: Callable[[], Awaitable[Verified | None]],
        way: asyncio.Lock,
    ) -> Actor | None:
        """Who it is; who was not in before comes in by `way`."""
        remembered = self._remembered.get(presented)
        if remembered is not None and self._clock.monotonic() < remembered[1]:
            return remembered[0]
        if presented in self._proven:
            verified = await look()
        else:
            async with way:
                verified = await look()
        if verified is None:
            self._remembered.pop(presented, None)
            self._proven.pop(presented, None)
            return None
        self._remember(presented, verified)
        await self._touch(verified.actor)
        return verified.actor

    def _remember(self, presented: _Presented, verified: Verified) -> None:
        left = verified.seconds_left
        until = self._clock.monotonic() + min(
            STALE_SECONDS, STALE_SECONDS if left is None else left
        )
        self._remembered[presented] = verified.actor, until
        self._proven[presented] = None
        self._proven.move_to_end(presented)
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
