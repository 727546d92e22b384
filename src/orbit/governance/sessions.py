"""Sessions: what a browser has instead of a key, and the one-time links that open them.

A session is a random secret in a cookie, kept as its SHA-256, that stands for the key it was
opened with and ends with it. Its CSRF token is derived from the secret, so only a page that could
read the session's own answers can know it. A link opens one session, once.

Each session and link is an entry of the trail, which nobody can take back: a key has few of them,
and few in a minute, however soon they are over.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from orbit.audit import trail
from orbit.audit.trail import Act
from orbit.database.pool import Connection, Database
from orbit.database.queries import load
from orbit.errors import TooManySessions
from orbit.governance.actor import Actor
from orbit.governance.keys import Keys, Verified

SQL = load("sessions")
LINK_SECONDS = 120.0
MOST_SESSIONS = 20  # of a key at a time
MOST_LINKS = 10  # of a key that nobody has followed yet
MOST_A_MINUTE = 20  # of each, of a key
_CSRF = b"orbit csrf v1"


@dataclass(frozen=True, slots=True)
class Session:
    """A session as its browser has it; `repr` leaves the secret out."""

    secret: str
    expires_at: datetime

    def __repr__(self) -> str:
        return f"Session(until {self.expires_at})"


class Sessions:
    """The sessions of an installation; each lasts `seconds` at most."""

    def __init__(self, database: Database, keys: Keys, seconds: float) -> None:
        self._database, self._keys, self.seconds = database, keys, seconds

    async def link(self, actor: Actor) -> tuple[str, datetime]:
        """The code of a link that opens a session of the actor's key, and until when.

        Raises TooManySessions.
        """
        code = secrets.token_urlsafe(32)
        row = {"digest": _digest(code), "key_id": actor.key_id, "seconds": LINK_SECONDS}
        async with self._database.transaction() as connection:
            await connection.execute(SQL.delete_expired_links)
            found = await (await connection.execute(SQL.links_of, row)).fetchone()
            if found is not None and found["waiting"] >= MOST_LINKS:
                raise TooManySessions(f"{MOST_LINKS} links of this key wait to be followed")
            act = await _rationed(connection, _act("session.linked", actor))
            expires_at = await _expiry(await connection.execute(SQL.insert_link, row))
            await trail.append(connection, act)
        return code, expires_at

    async def follow(self, code: str) -> tuple[Actor, Session] | None:
        """The session that a link opens; None if it is followed, over or none."""
        row = await self._database.fetch_one(SQL.take_link, {"digest": _digest(code)})
        if row is None or not row["is_good"]:
            return None
        verified = await self._keys.of(row["key_id"])
        return None if verified is None else (verified.actor, await self.begin(verified.actor))

    async def begin(self, actor: Actor) -> Session:
        """A new session of the actor's key; of its older ones only so many stay.

        Raises TooManySessions.
        """
        secret = secrets.token_urlsafe(32)
        row = {"digest": _digest(secret), "key_id": actor.key_id, "seconds": self.seconds}
        async with self._database.transaction() as connection:
            await connection.execute(SQL.delete_expired_sessions)
            act = await _rationed(connection, _act("session.begun", actor))
            await connection.execute(SQL.delete_oldest_sessions, row | {"most": MOST_SESSIONS})
            expires_at = await _expiry(await connection.execute(SQL.insert_session, row))
            await trail.append(connection, act)
        return Session(secret, expires_at)

    async def verify(self, secret: str) -> Verified | None:
        """The key's actor if the session and its key are good, else None."""
        row = await self._database.fetch_one(SQL.find_session, {"digest": _digest(secret)})
        verified = None if row is None else await self._keys.of(row["key_id"])
        if row is None or verified is None:
            return None
        left = [one for one in (row["seconds_left"], verified.seconds_left) if one is not None]
        return Verified(verified.actor, min(left))

    async def end(self, actor: Actor, secret: str) -> None:
        """The session is over; again changes nothing."""
        async with self._database.transaction() as connection:
            ended = await connection.execute(SQL.delete_session, {"digest": _digest(secret)})
            if ended.rowcount:
                await trail.append(connection, _act("session.ended", actor))


def csrf_token(secret: str) -> str:
    """What a page of the session sends with each change, in hexadecimal."""
    return hmac.new(secret.encode(), _CSRF, hashlib.sha256).hexdigest()


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


async def _expiry(cursor: Any) -> datetime:
    row = await cursor.fetchone()
    at: datetime = row["expires_at"]
    return at


def _act(action: str, actor: Actor) -> Act:
    return Act(actor.audited_in, action, actor.name, subject=f"key {actor.key_id}")


async def _rationed(connection: Connection, act: Act) -> Act:
    """The act, unless its key has done it too often in the last minute."""
    row = {"log": act.namespace, "action": act.action, "subject": act.subject}
    found = await (await connection.execute(SQL.recent_acts, row)).fetchone()
    if found is not None and found["done"] >= MOST_A_MINUTE:
        raise TooManySessions(f"{MOST_A_MINUTE} sessions or links of this key in a minute")
    return act
