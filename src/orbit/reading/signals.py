"""Signals as people read them: a profile's, the newest first, with all that each rests on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from orbit.database.pool import Database
from orbit.database.queries import load
from orbit.reading.view import (
    Page,
    Position,
    Row,
    View,
    check_cursor_number,
    narrowed,
    position_of,
    read_all,
    read_page,
)

SQL = load("signals")
_HIGHEST = (str(2**62), "g")


@dataclass(frozen=True, slots=True)
class SignalBaseline(View):
    """What a stream was compared with: `kind` is `peers` or `own-history`.

    Means from `low` to `high` count as no change, margin included; fixed when the first
    `observations` cycles were there.
    """

    kind: str
    mean: float
    low: float
    high: float
    observations: int


@dataclass(frozen=True, slots=True)
class SignalView(View):
    """A signal; `confidence` to `averaged` are null for `no_data`, which has `missed` instead.

    `averaged` observations counted as one, by their mean, where outcomes repeat the one before.

    It rests on events `from_position` to `to_position` of its namespace, its baseline on those
    from `baseline_position`, and the interval of the mean on the `interval_observations` from
    `interval_position`: evidence for a change goes on where `stable` begins the interval anew.
    """

    signal_id: str
    namespace: str
    profile_id: str
    revision: str
    metric: str
    name: str
    alarm_level: str
    confidence: float | None
    evidence: float | None
    threshold: float | None
    observations: int | None
    interval: list[float] | None
    interval_observations: int | None
    recent: float | None
    baseline: SignalBaseline | None
    peers: int | None
    peer_ratio: float | None
    autocorrelation: float | None
    averaged: int | None
    missed: int | None
    baseline_position: int | None
    interval_position: int | None
    from_position: int
    to_position: int
    detector_version: int
    recommendation: str
    computed_at: datetime


async def signals(
    database: Database,
    profile_id: str,
    *,
    namespace: str | None = None,
    metric: str | None = None,
    name: str | None = None,
    limit: int = 50,
    cursor: str | None = None,
    within: Sequence[str] | None = None,
) -> Page[SignalView]:
    """A profile's signals, of the namespaces that there are for who asks.

    Raises RequestInvalid for a cursor that is none.
    """
    namespaces = narrowed(namespace, within)

    async def scan(after: Position | None, count: int) -> Sequence[Row]:
        position, signal_id = after or _HIGHEST
        asked = {"profile_id": profile_id, "namespaces": namespaces, "count": count}
        asked |= {"to_position": int(position), "signal_id": signal_id}
        return await read_all(database, SQL.signal_window, asked)

    async def choose(rows: Sequence[Row]) -> Mapping[Position, SignalView]:
        return {
            _place(row): _view(row)
            for row in rows
            if metric in (None, row["metric"]) and name in (None, row["name"])
        }

    return await read_page(
        scan,
        _place,
        choose,
        after=position_of(cursor, check_cursor_number, _check_signal_id),
        limit=limit,
        is_filtered=not (metric is None and name is None),
    )


def _place(row: Row) -> Position:
    return str(row["to_position"]), row["signal_id"]


def _check_signal_id(text: str) -> object:
    if len(text) != 32:
        raise ValueError(text)
    return int(text, 16)


def _view(row: Row) -> SignalView:
    body: dict[str, Any] = json.loads(row["body"])
    given = {name: value for name, value in row.items() if name != "body"}
    baseline = body.get("baseline")
    return SignalView(
        **given,
        evidence=body.get("evidence"),
        threshold=body.get("threshold"),
        observations=body.get("count"),
        interval=body.get("interval"),
        interval_observations=body.get("interval_count"),
        recent=body.get("recent"),
        baseline=baseline
        and SignalBaseline(
            kind=body["baseline_kind"],
            mean=baseline["mean"],
            low=baseline["lower_limit"],
            high=baseline["upper_limit"],
            observations=baseline["count"],
        ),
        peers=body.get("peers"),
        peer_ratio=body.get("peer_ratio"),
        autocorrelation=body.get("autocorrelation"),
        averaged=body.get("averaged"),
        missed=body.get("missed"),
        baseline_position=body.get("baseline_position"),
        interval_position=body.get("interval_position"),
        recommendation=body["recommendation"],
    )
