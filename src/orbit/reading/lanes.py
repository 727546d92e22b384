"""Lanes: what each holds, what holds it up, and what its breaker did.

A lane is a namespace's queue for an endpoint. It is known once a worker has looked at its first
job, and stays known. Queues are counted up to a bound; tallies are kept as receipts are written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from orbit.database.pool import Database
from orbit.database.queries import array, load
from orbit.endpoints import Endpoint
from orbit.errors import NotFound
from orbit.reading.view import (
    Page,
    Position,
    Row,
    View,
    is_within,
    narrowed,
    position_of,
    read_all,
    read_page,
)
from orbit.vocabulary import check_key

SQL = load("reading")
_CHANGES_SHOWN = 50
_TALLIES = ("delivered", "failed", "not_sent", "unknown")


@dataclass(frozen=True, slots=True)
class Tallies(View):
    """What the attempts of a lane came to, since it is known."""

    delivered: int
    failed: int
    not_sent: int
    unknown: int


@dataclass(frozen=True, slots=True)
class LaneView(View):
    """A lane; `waiting` and `in_flight` are counted up to 1,000 each.

    `breaker` is `closed`, or `open`: then held since `opened_at`, and one job is tried from
    `probe_at` on. `failures` in a row; of the `window_attempts` in the breaker's present window,
    `window_failures` failed. `due_at`: when the first waiting job is due.
    """

    namespace: str
    endpoint_key: str
    breaker: str
    opened_at: datetime | None
    probe_at: datetime | None
    failures: int
    window_attempts: int
    window_failures: int
    waiting: int
    in_flight: int
    due_at: datetime | None
    attempts: Tallies


@dataclass(frozen=True, slots=True)
class BreakerLimits(View):
    """When a lane is held, and for how long, in seconds."""

    failures: int
    share: float
    least: int
    window_seconds: float
    hold_seconds: float
    longest_hold_seconds: float


@dataclass(frozen=True, slots=True)
class LaneLimits(View):
    """The limits of a lane as this node's settings have them; `breaker` None is off."""

    max_concurrency: int
    rate_per_second: float | None
    on_unknown: str
    breaker: BreakerLimits | None


@dataclass(frozen=True, slots=True)
class LaneChange(View):
    """The breaker `opened`, `held` on after a probe that failed, or `closed`."""

    change: str
    failures: int
    window_attempts: int
    window_failures: int
    hold_seconds: float | None
    node_id: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class LaneDetail(View):
    """A lane with its limits (None: this node does not know the endpoint) and last changes."""

    lane: LaneView
    limits: LaneLimits | None
    changes: list[LaneChange]


@dataclass(frozen=True, slots=True)
class Hold(View):
    """Why a lane sends nothing: held since, `failures` in a row, one job is tried from then on."""

    opened_at: datetime | None
    probe_at: datetime
    failures: int


async def lanes(
    database: Database,
    *,
    namespace: str | None = None,
    endpoint_key: str | None = None,
    limit: int = 50,
    cursor: str | None = None,
    within: Sequence[str] | None = None,
) -> Page[LaneView]:
    """Lanes in the order of their key. Raises RequestInvalid for a cursor that is none."""
    namespaces = narrowed(namespace, within)

    async def scan(after: Position | None, count: int) -> Sequence[Row]:
        in_namespace, key = after or ("", "")
        asked = {"namespaces": namespaces, "namespace": in_namespace, "endpoint_key": key}
        return await database.fetch_all(SQL.lane_window, {**asked, "count": count})

    async def choose(rows: Sequence[Row]) -> Mapping[Position, LaneView]:
        asked = [row for row in rows if endpoint_key in (None, row["endpoint_key"])]
        found = await _states(database, map(_place, asked))
        return {(one["namespace"], one["endpoint_key"]): _view(one) for one in found}

    return await read_page(
        scan,
        _place,
        choose,
        after=position_of(cursor, check_key, check_key),
        limit=limit,
        is_filtered=endpoint_key is not None,
    )


async def lane(
    database: Database,
    namespace: str,
    endpoint_key: str,
    endpoint: Endpoint | None,
    within: Sequence[str] | None = None,
) -> LaneDetail:
    """One lane, with the limits of `endpoint` as this node knows it. Raises NotFound."""
    try:
        key = check_key(namespace), check_key(endpoint_key)
    except ValueError:
        raise NotFound("there is no such lane") from None
    none = NotFound(f"there is no lane {namespace}/{endpoint_key}: it has had no job")
    if not is_within(namespace, within):  # before its queue is looked at: time would tell
        raise none
    (found,) = await _states(database, [key])
    if not (found["is_known"] or found["waiting"] or found["in_flight"]):
        raise none
    changes = await read_all(
        database,
        SQL.lane_changes,
        {"namespace": namespace, "endpoint_key": endpoint_key, "count": _CHANGES_SHOWN},
    )
    return LaneDetail(
        _view(found),
        None if endpoint is None else _limits(endpoint),
        [LaneChange(**row) for row in changes],
    )


async def waiting_lanes(database: Database, within: Sequence[str] | None = None) -> list[LaneView]:
    """The lanes with jobs to send, up to 200."""
    asked = {"namespaces": narrowed(None, within)}
    rows = await database.fetch_all(SQL.waiting_lanes, asked)
    return [_view(row) for row in await _states(database, map(_place, rows))]


async def holds(
    database: Database, namespace: str, endpoint_keys: Collection[str]
) -> dict[str, Hold]:
    """Which of a namespace's lanes are held, by endpoint."""
    if not endpoint_keys:
        return {}
    rows = await read_all(
        database, SQL.held_lanes, _asked((namespace, key) for key in endpoint_keys)
    )
    return {row.pop("endpoint_key"): Hold(**row) for row in rows}


async def dispatch_load(database: Database) -> dict[str, int]:
    """`lanes_held`, `waiting` jobs and those `in_flight`, each counted up to 10,000."""
    (row,) = await read_all(database, SQL.dispatch_load)
    return row


async def _states(database: Database, lanes: Iterable[Position]) -> list[dict[str, Any]]:
    asked = list(lanes)
    return await read_all(database, SQL.lane_states, _asked(asked)) if asked else []


def _asked(lanes: Iterable[Position]) -> dict[str, Any]:
    keys = list(lanes)
    return {
        "namespace": array(namespace for namespace, _ in keys),
        "endpoint_key": array(key for _, key in keys),
    }


def _place(row: Row) -> Position:
    return row["namespace"], row["endpoint_key"]


def _view(row: Mapping[str, Any]) -> LaneView:
    given = {name: value for name, value in row.items() if name not in (*_TALLIES, "is_known")}
    return LaneView(**given, attempts=Tallies(**{name: row[name] for name in _TALLIES}))


def _limits(endpoint: Endpoint) -> LaneLimits:
    breaker = endpoint.breaker
    return LaneLimits(
        endpoint.max_concurrency,
        endpoint.rate_per_second,
        endpoint.on_unknown,
        None if breaker is None else BreakerLimits(**asdict(breaker)),
    )
