"""Endpoints as they stood when a job was enqueued, stored once per definition.

A snapshot's id is a digest of the whole definition, with a fingerprint in place of its secrets.
Those are kept encrypted: token, headers, signing secret, proxy, and the URL's query, which may
hold a key. Then the id ends in the fingerprint of the key that encrypts them, after a full stop:
jobs made after a change of keys need no older one. What has no secret needs no key at all. A key
that is gone makes the jobs of its snapshots fail, each with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote_plus, urlsplit

from orbit.canonical import canonical_digest
from orbit.clock import derived_id
from orbit.database.pool import Database
from orbit.database.queries import array, load
from orbit.endpoints import Endpoint, without_query
from orbit.errors import NotHere
from orbit.execution.context import ClaimedCycle
from orbit.execution.recorder import NewJob
from orbit.payload import Payload
from orbit.vault import Vault, fingerprint
from orbit.webhooks import SigningKeys

SQL = load("dispatch")
_SECRET_CHARACTERS = 8
_KEY_MARK = "."  # between a definition's digest and the fingerprint of the key


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An endpoint as it stood when a job was enqueued; `secrets` must not be kept of an answer."""

    endpoint_key: str
    url: str = field(repr=False)
    method: str
    token: str | None = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)
    timeout_seconds: float
    permanent_statuses: frozenset[int]
    on_unknown: str
    signing_keys: SigningKeys | None = field(repr=False)
    proxy: str | None = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)


class Snapshots:
    """Endpoints as this node knows them, and as they stood for jobs that exist.

    A definition is stored once under its digest, which takes in a fingerprint of the secrets.
    """

    def __init__(
        self, database: Database, vault: Vault, endpoints: Sequence[Endpoint], max_attempts: int
    ) -> None:
        self._database, self._vault, self._max_attempts = database, vault, max_attempts
        self._endpoints = {endpoint.key: endpoint for endpoint in endpoints}
        self._ids = {key: self._id(endpoint) for key, endpoint in self._endpoints.items()}
        self._stored: set[tuple[str, str]] = set()
        self._read: dict[tuple[str, str], Snapshot] = {}

    @property
    def keys(self) -> frozenset[str]:
        """The endpoints that jobs can be made for."""
        return frozenset(self._endpoints)

    @property
    def ids(self) -> Mapping[str, str]:
        """The snapshot of each endpoint as it is now, stored or not."""
        return self._ids

    async def jobs(
        self, cycle: ClaimedCycle, items: Sequence[Payload], endpoint_keys: Sequence[str]
    ) -> list[NewJob]:
        """One job per item and endpoint, with ids that are the same each time.

        Raises NotHere for an endpoint that this node does not know.
        """
        for key in endpoint_keys if items else ():
            await self.store(cycle.namespace, key)
        return [
            NewJob(
                job_id=derived_id(cycle.cycle_id, "job", str(index), key),
                item_index=index,
                endpoint_key=key,
                snapshot_id=self._ids[key],
                max_attempts=self._max_attempts,
            )
            for index in range(len(items))
            for key in endpoint_keys
        ]

    async def store(self, namespace: str, key: str) -> str:
        """Makes sure that the endpoint's snapshot is stored; its id. Raises NotHere."""
        endpoint = self._endpoints.get(key)
        if endpoint is None:
            known = ", ".join(sorted(self._endpoints)) or "none"
            raise NotHere(
                f"endpoint {key!r} is not configured on this node (known: {known}; "
                "ORBIT_DISPATCH_ENDPOINTS)"
            )
        snapshot_id = self._ids[key]
        if (namespace, snapshot_id) not in self._stored:
            row = self._row(namespace, snapshot_id, endpoint)
            await self._database.persist(lambda: self._database.execute(SQL.insert_snapshot, row))
            self._stored.add((namespace, snapshot_id))
        return snapshot_id

    async def read(self, namespace: str, snapshot_id: str) -> Snapshot:
        """The endpoint as it stood. Raises SecretUnreadable if its key is gone."""
        found = self._read.get((namespace, snapshot_id))
        if found is None:
            row = await self._database.fetch_one(
                SQL.snapshot, {"namespace": namespace, "snapshot_id": snapshot_id}
            )
            if row is None:
                raise LookupError(f"snapshot {snapshot_id} is not stored")
            secrets = self._kept(row)
            signing = secrets.get("signingSecret")
            found = Snapshot(
                endpoint_key=row["endpoint_key"],
                url=secrets["url"],
                method=row["method"],
                token=secrets["token"],
                headers=secrets["headers"],
                timeout_seconds=row["timeout_seconds"],
                permanent_statuses=frozenset(row["permanent_statuses"]),
                on_unknown=row["on_unknown"],
                signing_keys=signing and SigningKeys.parse(signing),
                proxy=secrets.get("proxy"),
                secrets=_not_to_be_kept(secrets),
            )
            self._read[namespace, snapshot_id] = found
        return found

    def _id(self, endpoint: Endpoint) -> str:
        digest = _digest(endpoint)
        return f"{digest}{_KEY_MARK}{self._vault.newest}" if _has_secrets(endpoint) else digest

    def _row(self, namespace: str, snapshot_id: str, endpoint: Endpoint) -> dict[str, Any]:
        token, has_secrets = endpoint.token, _has_secrets(endpoint)
        return {
            "namespace": namespace,
            "snapshot_id": snapshot_id,
            "endpoint_key": endpoint.key,
            "url": without_query(endpoint.url),
            "method": endpoint.method,
            "secrets_encrypted": self._vault.encrypt(_secrets(endpoint)) if has_secrets else b"",
            "token_fingerprint": None if token is None else fingerprint(token),
            "timeout_seconds": endpoint.timeout_seconds,
            "permanent_statuses": array(sorted(endpoint.permanent_statuses)),
            "on_unknown": endpoint.on_unknown,
        }

    def _kept(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """What `_secrets` gave for the endpoint, or would have if it has none."""
        if not row["secrets_encrypted"]:
            return {"token": None, "headers": {}, "url": row["url"]}
        kept: Mapping[str, Any] = json.loads(self._vault.decrypt(row["secrets_encrypted"]))
        return kept


def definition_of(snapshot_id: str) -> str:
    """What a snapshot shares with those that differ from it only in the key that encrypts."""
    return snapshot_id.partition(_KEY_MARK)[0]


def _digest(endpoint: Endpoint) -> str:
    return canonical_digest(
        {
            "key": endpoint.key,
            "url": without_query(endpoint.url),
            "method": endpoint.method,
            "secrets": fingerprint(_secrets(endpoint)),
            "timeoutSeconds": endpoint.timeout_seconds,
            "permanentStatuses": sorted(endpoint.permanent_statuses),
            "onUnknown": endpoint.on_unknown,
        }
    )


def _has_secrets(endpoint: Endpoint) -> bool:
    """Whether there is anything that the stored URL, method and limits do not say."""
    given = (endpoint.token, endpoint.headers, endpoint.signing_secret, endpoint.proxy)
    return any(given) or without_query(endpoint.url) != endpoint.url


def _secrets(endpoint: Endpoint) -> str:
    """What is kept encrypted; the URL is among it since its query may hold a key."""
    secrets = {
        "token": endpoint.token,
        "headers": dict(endpoint.headers),
        "url": endpoint.url,
        "signingSecret": endpoint.signing_secret,
        "proxy": endpoint.proxy,
    }
    return json.dumps(secrets, sort_keys=True)


def _not_to_be_kept(secrets: Mapping[str, Any]) -> tuple[str, ...]:
    """What is masked in an answer; short values of headers and queries are no secrets."""
    query = urlsplit(secrets["url"]).query
    raw = [pair.partition("=")[2] for pair in query.split("&")]
    given = [query, *raw, *map(unquote_plus, raw), *secrets["headers"].values()]
    values = [value for value in given if len(value) >= _SECRET_CHARACTERS]
    return (*values, *filter(None, (secrets["token"], secrets.get("signingSecret"))))
