"""Access keys: made, shown once, rotated with an overlap, revoked.

Of a key (`token`) the database has the id, and of the secret only the SHA-256. What became of a key
is told by facts, so a key that has ended never comes back. Who makes or ends a key has the keys to
itself and reads the facts in a later statement, so a key that was revoked is not rotated, and makes
no other, at the same time.

Refuses to hand out more than the actor has: a namespace-bound admin makes, sees and ends keys of
its own namespaces only, and no key makes another that outlasts it.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from orbit.audit import trail
from orbit.audit.trail import Act
from orbit.clock import Clock
from orbit.database.pool import Connection, Database
from orbit.database.queries import array, load
from orbit.errors import NotFound, Refused, RequestInvalid
from orbit.governance.actor import EVERYWHERE, Actor, Scope
from orbit.governance.token import Token
from orbit.vocabulary import check_instant, check_key

SQL = load("keys")
_KEY_ID = re.compile(r"[0-9a-f]{16}")
_NAME = re.compile(r"[!-~](?:[ -~]{0,98}[!-~])?")
_NOBODY = bytes(32)  # no secret has this digest, so comparing with it always fails


@dataclass(frozen=True, slots=True)
class Verified:
    """A key that is good, for so many seconds yet (None: without end)."""

    actor: Actor
    seconds_left: float | None


@dataclass(frozen=True, slots=True)
class Grant:
    """What a new key may do: scopes in namespaces (`*` alone: all), until it expires."""

    name: str
    scopes: Sequence[Scope]
    namespaces: Sequence[str]
    expires_at: datetime | None = None

    def check(self) -> None:
        """Raises RequestInvalid for what no key can have."""
        if not _NAME.fullmatch(self.name):
            raise RequestInvalid("name: expected 1 to 100 printable ASCII characters")
        if not self.scopes:
            raise RequestInvalid("scopes: expected at least one")
        try:
            _ = self.expires_at is None or check_instant(self.expires_at)
        except ValueError as error:
            raise RequestInvalid(f"expiresAt: expected {error}") from None
        if not self.namespaces or (EVERYWHERE in self.namespaces and len(self.namespaces) > 1):
            raise RequestInvalid("namespaces: expected names, or * alone")
        for namespace in self.namespaces:
            try:
                _ = namespace == EVERYWHERE or check_key(namespace)
            except ValueError as error:
                raise RequestInvalid(f"namespaces: expected * or {error}") from None


class Keys:
    """The keys of an installation."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database, self._clock = database, clock

    async def verify(self, token: Token) -> Verified | None:
        """The key's actor if the token is right and the key is good, else None.

        Takes the same steps whether there is such a key or not.
        """
        row = await self._database.fetch_one(SQL.find_key, {"key_id": token.key_id})
        expected = _NOBODY if row is None else bytes(row["secret_sha256"])
        is_right = hmac.compare_digest(token.digest, expected)
        return _verified(row) if is_right and row is not None else None

    async def of(self, key_id: str) -> Verified | None:
        """A good key by its id alone: for who was verified before."""
        row = await self._database.fetch_one(SQL.find_key, {"key_id": key_id})
        return None if row is None else _verified(row)

    async def touch(self, key_id: str) -> None:
        """Notes that a key is used now."""
        await self._database.execute(SQL.touch_key, {"key_id": key_id})

    async def has_any(self) -> bool:
        """Whether anybody can come in at all."""
        row = await self._database.fetch_one(SQL.has_good_key)
        return row is not None and bool(row["has_key"])

    async def listed(
        self,
        within: Sequence[str] | None = None,
        *,
        after: tuple[str, str] | None = None,
        count: int = 1,
        key_id: str | None = None,
    ) -> list[dict[str, Any]]:
        """Keys with what became of them, newest first; none that reaches out of `within`.

        `after`: when a key was made, and its id; those that follow it.
        """
        return await self._database.fetch_all(
            SQL.list_keys, _listing(within, after=after, count=count, key_id=key_id)
        )

    async def create(self, actor: Actor, grant: Grant, reason: str | None = None) -> Token:
        """Makes a key; the only time that it is seen.

        Without an expiry it has that of the key that makes it. Raises RequestInvalid, NotFound for
        a namespace that the actor does not see, and Refused if the actor's key has ended.
        """
        grant.check()
        self._check_expiry(grant.expires_at)
        if not actor.contains(grant.namespaces):
            unseen = next(one for one in grant.namespaces if not actor.contains([one]))
            raise NotFound(f"there is no namespace {unseen}")
        token = Token.make()
        async with self._database.transaction() as connection:
            await connection.execute(SQL.hold_keys)
            grant = await _within_maker(connection, actor, grant)
            await _insert(connection, token, grant, actor)
            acts = _acts(grant, "key.created", actor, token.key_id, reason=reason)
            await trail.append(connection, *acts)
        return token

    async def adopt(self, token: Token, grant: Grant, by: str) -> bool:
        """Has a key that was made elsewhere, and is not known yet; whether it is good."""
        maker = Actor(by, by, frozenset({Scope.ADMIN}))
        async with self._database.transaction() as connection:
            if await _insert(connection, token, grant, maker):
                await trail.append(connection, *_acts(grant, "key.created", maker, token.key_id))
        return await self.verify(token) is not None

    async def rotate(
        self,
        actor: Actor,
        key_id: str,
        overlap: timedelta,
        expires_at: datetime | None = None,
        reason: str | None = None,
    ) -> Token:
        """A new key with the rights of an old one, which is good for `overlap` yet.

        The old one's expiry is the new one's too, unless told otherwise. Raises RequestInvalid,
        NotFound, and Refused if the key has ended or was rotated before, or the actor's has ended.
        """
        self._check_expiry(expires_at)
        token = Token.make()
        async with self._database.transaction() as connection:
            row = await _held(connection, actor, key_id)
            grant = Grant(
                row["name"], row["scopes"], row["namespaces"], expires_at or row["expires_at"]
            )
            grant.check()
            if not row["is_good"]:
                raise Refused(f"key {key_id} is not good any more; make a new one")
            if row["rotated_until"] is not None:
                raise Refused(f"key {key_id} was rotated before")
            grant = await _within_maker(connection, actor, grant, is_asked=expires_at is not None)
            await _end(connection, actor, key_id, "rotated", overlap.total_seconds(), reason)
            await _insert(connection, token, grant, actor, root=row["root_id"], of=key_id)
            acts = _acts(grant, "key.rotated", actor, key_id, token.key_id, reason)
            made = _acts(grant, "key.created", actor, token.key_id, reason=reason)
            await trail.append(connection, *acts, *made)
        return token

    async def revoke(
        self, actor: Actor, key_id: str, reason: str | None, *, with_descendants: bool = False
    ) -> list[str]:
        """Ends a key now; again changes nothing. Raises NotFound.

        Returns the keys that it made, and those that they made, which were good; they end too if
        that is asked for.
        """
        async with self._database.transaction() as connection:
            row = await _held(connection, actor, key_id)
            cursor = await connection.execute(SQL.descendants, {"key_id": key_id})
            made = await cursor.fetchall()
            acts = []
            for one in (row, *made) if with_descendants else (row,):
                if await _end(connection, actor, one["key_id"], "revoked", 0, reason):
                    grant = Grant(one["name"], one["scopes"], one["namespaces"])
                    acts += _acts(grant, "key.revoked", actor, one["key_id"], reason=reason)
            if acts:
                await trail.append(connection, *acts)
        return [one["key_id"] for one in made]

    def _check_expiry(self, expires_at: datetime | None) -> None:
        if expires_at is not None and expires_at <= self._clock.now():
            raise RequestInvalid("expiresAt: expected a time to come")


def _listing(
    within: Sequence[str] | None,
    *,
    after: tuple[str, str] | None = None,
    count: int = 1,
    key_id: str | None = None,
) -> dict[str, Any]:
    before, before_id = after or ("infinity", "")
    return {
        "namespaces": None if within is None else array(within),
        "before": before,
        "before_id": before_id,
        "count": count,
        "key_id": key_id,
    }


async def _held(connection: Connection, actor: Actor, key_id: str) -> dict[str, Any]:
    """The key's row, read while nobody ends it; a key that the actor does not see is none."""
    await connection.execute(SQL.hold_keys)
    row = None
    if _KEY_ID.fullmatch(key_id):
        asked = _listing(actor.within, key_id=key_id)
        row = await (await connection.execute(SQL.list_keys, asked)).fetchone()
    if row is None:
        raise NotFound(f"there is no key {key_id}")
    return dict(row)


async def _within_maker(
    connection: Connection, actor: Actor, grant: Grant, *, is_asked: bool = True
) -> Grant:
    """The grant, which ends with the key that makes it if nothing else was asked for.

    To follow hold_keys: a key that was revoked a moment ago makes no other.
    """
    if actor.key_id is None:
        return grant
    asked = {"key_id": actor.key_id}
    row = await (await connection.execute(SQL.find_key, asked)).fetchone()
    if row is None or not row["is_good"]:
        raise Refused(f"key {actor.key_id} is not good any more; it makes no other")
    ends_at: datetime | None = row["ends_at"]
    if ends_at is None or (grant.expires_at is not None and grant.expires_at <= ends_at):
        return grant
    if is_asked and grant.expires_at is not None:
        at = ends_at.astimezone(UTC).isoformat()
        raise RequestInvalid(f"expiresAt: your own key ends before, at {at}")
    return replace(grant, expires_at=ends_at.astimezone(UTC))


def _verified(row: Mapping[str, Any]) -> Verified | None:
    if not row["is_good"]:
        return None
    namespaces = frozenset(row["namespaces"])
    actor = Actor(
        id=row["root_id"],
        name=f"{row['name']} (key {row['key_id']})",
        scopes=frozenset(Scope(one) for one in row["scopes"]),
        namespaces=None if EVERYWHERE in namespaces else namespaces,
        key_id=row["key_id"],
    )
    return Verified(actor, row["seconds_left"])


async def _insert(
    connection: Connection,
    token: Token,
    grant: Grant,
    maker: Actor,
    *,
    root: str | None = None,
    of: str | None = None,
) -> bool:
    row = {
        "key_id": token.key_id,
        "root_id": root or token.key_id,
        "name": grant.name,
        "scopes": array(sorted(set(grant.scopes))),
        "namespaces": array(sorted(set(grant.namespaces))),
        "secret_sha256": token.digest,
        "expires_at": grant.expires_at,
        "replaces": of,
        "created_by": maker.name,
        "created_by_key": maker.key_id,
    }
    return (await connection.execute(SQL.insert_key, row)).rowcount > 0


async def _end(
    connection: Connection,
    actor: Actor,
    key_id: str,
    kind: str,
    seconds: float,
    reason: str | None,
) -> bool:
    end = {
        "key_id": key_id,
        "kind": kind,
        "seconds": seconds,
        "reason": reason,
        "ended_by": actor.name,
    }
    return (await connection.execute(SQL.end_key, end)).rowcount > 0


def _acts(
    grant: Grant,
    action: str,
    actor: Actor,
    key_id: str,
    new_key_id: str | None = None,
    reason: str | None = None,
) -> list[Act]:
    """One entry in the trail of each namespace that the key reaches."""
    detail: dict[str, Any] = {"name": grant.name, "scopes": sorted(set(grant.scopes))}
    if new_key_id is not None:
        detail["newKeyId"] = new_key_id
    if grant.expires_at is not None:
        detail["expiresAt"] = grant.expires_at.isoformat()
    return [
        Act(namespace, action, actor.name, reason, f"key {key_id}", detail)
        for namespace in sorted(set(grant.namespaces))
    ]
