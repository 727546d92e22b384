"""What a node counts of itself, for Prometheus: base units, and never an id as a label.

Counters go up in the process that did the thing and begin anew with it; what all nodes share is
in the database and is read there. Whoever does a thing counts it where it is certain.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
)
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

REGISTRY = CollectorRegistry()


class Seconds(Collector):
    """A histogram that takes many observations at once.

    The library's own takes a lock twice for each, which the hot path would feel. One thread
    observes; any may collect, and sees each observation whole or not yet.
    """

    def __init__(self, name: str, documentation: str, *, buckets: Sequence[float]) -> None:
        self._name, self._documentation, self._bounds = name, documentation, buckets
        self._seen = [0] * (len(buckets) + 1), 0.0
        REGISTRY.register(self)

    def observe(self, values: Iterable[float]) -> None:
        counts, total = list(self._seen[0]), self._seen[1]
        for value in values:
            counts[bisect_left(self._bounds, value)] += 1
            total += value
        self._seen = counts, total

    def collect(self) -> Iterator[HistogramMetricFamily]:
        names = [*map(str, map(float, self._bounds)), "+Inf"]
        counts, total = self._seen
        buckets = list(zip(names, accumulate(counts), strict=True))
        yield HistogramMetricFamily(
            self._name, self._documentation, buckets=buckets, sum_value=total
        )


cycles_accepted = Counter(
    "orbit_cycles_accepted", "Cycles that this node accepted.", ["trigger"], registry=REGISTRY
)
cycles_ended = Counter(
    "orbit_cycles_ended", "Cycles that this node ended.", ["state"], registry=REGISTRY
)
slots_decided = Counter(
    "orbit_slots_decided", "Schedule slots that this node decided.", ["outcome"], registry=REGISTRY
)
attempts = Counter(
    "orbit_attempts", "Dispatch attempts that this node settled.", ["outcome"], registry=REGISTRY
)
attempt_seconds = Seconds(
    "orbit_attempt_seconds",
    "How long attempts took, from their beginning to the end of the answer.",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
attempt_connections = Counter(
    "orbit_attempt_connections",
    "Dispatch attempts that this node sent and settled, by the connection they went out on.",
    ["connection"],
    registry=REGISTRY,
)
lane_changes = Counter(
    "orbit_lane_changes",
    "Breakers of lanes that this node saw open, hold on or close.",
    ["change"],
    registry=REGISTRY,
)
dead_letters = Counter(
    "orbit_dead_letters", "Jobs that this node found out of retries.", registry=REGISTRY
)
commit_entries = Histogram(
    "orbit_commit_entries",
    "Entries that shared a commit.",
    ["kind"],
    buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500),
    registry=REGISTRY,
)
audit_contradictions = Gauge(
    "orbit_audit_contradictions",
    "Logs of the audit trail that contradict this node's last checkpoint of them.",
    registry=REGISTRY,
)

ProcessCollector(registry=REGISTRY)
GCCollector(registry=REGISTRY)
events_sequenced = Counter(
    "orbit_telemetry_events_sequenced",
    "Events that this node, leading, gave their positions.",
    registry=REGISTRY,
)
sequencing_lag_seconds = Histogram(
    "orbit_telemetry_sequencing_lag_seconds",
    "How long the oldest event of a pass had waited for its position.",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60),
    registry=REGISTRY,
)
autonomy_changes = Counter(
    "orbit_autonomy_changes",
    "Changes that autonomy made on this node, that ended their probation here, or were taken back.",
    ["outcome"],
    registry=REGISTRY,
)
signals = Counter(
    "orbit_signals", "Signals that this node recorded, by their name.", ["name"], registry=REGISTRY
)
