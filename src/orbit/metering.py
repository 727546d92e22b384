"""What a node counts, sent to a collector, if the standard OTEL_* variables ask for it.

The same families, names and values as this node's /metrics, in the SDK's own form, from a thread
of their own: every OTEL_METRIC_EXPORT_INTERVAL milliseconds (60,000), and once at the end. What
all nodes share is left out: whoever adds up nodes would count it several times.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import structlog
from prometheus_client import Metric
from prometheus_client.samples import Sample

from orbit.clock import SystemClock
from orbit.tracing import Attributes, asked_exporters, resource, tell_missing, tell_off

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricExporter, MetricsData

Collect = Callable[[], Iterable[Metric]]
_INTERVAL = "OTEL_METRIC_EXPORT_INTERVAL"
_log = structlog.get_logger("orbit.metering")


class Meter:
    """Sends what `collect` gives, again and again, until it is stopped."""

    def __init__(
        self, collect: Collect, exporters: Sequence[MetricExporter], attributes: Attributes
    ) -> None:
        self._collect, self._exporters, self._attributes = collect, exporters, attributes
        self._began = _now()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="orbit-metering", daemon=True)
        self._thread.start()

    def stop(self, seconds: float = 2.0) -> None:
        """Sends once more, and waits for that so long at most."""
        self._stopping.set()
        self._thread.join(seconds)

    def _run(self) -> None:
        interval = _interval_seconds()
        while not self._stopping.wait(interval):
            self._send()
        self._send()

    def _send(self) -> None:
        try:
            data = self._data()
            for exporter in self._exporters:
                exporter.export(data)
        except Exception:  # noqa: BLE001 - figures are no reason to end
            _log.exception("metrics_not_sent")

    def _data(self) -> MetricsData:
        from opentelemetry.sdk.metrics.export import (  # noqa: PLC0415 - an extra
            MetricsData,
            ResourceMetrics,
            ScopeMetrics,
        )
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope  # noqa: PLC0415

        now = _now()
        families = [_metric(family, self._began, now) for family in self._collect()]
        metrics = [metric for metric in families if metric is not None]
        scope = ScopeMetrics(InstrumentationScope("orbit"), metrics, "")
        return MetricsData([ResourceMetrics(resource(self._attributes), [scope], "")])


def start(collect: Collect, attributes: Attributes) -> Meter | None:
    """A meter, if one is asked for; `attributes` say which node this is."""
    asked = asked_exporters("METRICS")
    if not asked:
        return None
    try:
        return Meter(collect, _made(asked), attributes)
    except ImportError:
        tell_missing("metrics")
    except Exception as error:  # noqa: BLE001 - figures are no reason not to start
        tell_off("metrics", error)
    return None


def _made(asked: Sequence[str]) -> list[MetricExporter]:
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import (  # noqa: PLC0415 - an extra
        OTLPMetricExporter,
    )
    from opentelemetry.sdk.metrics.export import ConsoleMetricExporter  # noqa: PLC0415

    makers = {"otlp": OTLPMetricExporter, "console": ConsoleMetricExporter}
    return [makers[name]() for name in asked]


def _interval_seconds() -> float:
    given = os.environ.get(_INTERVAL, "")
    return int(given) / 1000 if given.isdecimal() and int(given) > 0 else 60.0


def _now() -> int:
    return int(SystemClock().now().timestamp() * 1e9)


def _metric(family: Metric, began: int, now: int) -> Any:
    """A family of Prometheus as the SDK has it; None for kinds that Orbit does not count in."""
    from opentelemetry.sdk.metrics import export as sdk  # noqa: PLC0415 - an extra

    data: Any
    always = sdk.AggregationTemporality.CUMULATIVE
    if family.type == "histogram":
        data = sdk.Histogram([_distribution(one, began, now) for one in _series(family)], always)
    elif family.type == "counter":
        totals = [one for one in family.samples if one.name.endswith("_total")]
        points = [sdk.NumberDataPoint(one.labels, began, now, one.value) for one in totals]
        data = sdk.Sum(points, always, is_monotonic=True)
    elif family.type == "gauge":
        points = [sdk.NumberDataPoint(one.labels, 0, now, one.value) for one in family.samples]
        data = sdk.Gauge(points)
    else:
        return None
    return sdk.Metric(family.name, family.documentation, family.unit, data)


def _series(family: Metric) -> Iterator[list[Sample]]:
    """The samples of a histogram, for each set of labels."""
    found: dict[tuple[tuple[str, str], ...], list[Sample]] = {}
    for sample in family.samples:
        labels = tuple((name, value) for name, value in sample.labels.items() if name != "le")
        found.setdefault(labels, []).append(sample)
    yield from found.values()


def _distribution(samples: Sequence[Sample], began: int, now: int) -> Any:
    from opentelemetry.sdk.metrics.export import HistogramDataPoint  # noqa: PLC0415 - an extra

    buckets = [one for one in samples if one.name.endswith("_bucket")]
    totals = {one.name.rpartition("_")[2]: one.value for one in samples}
    upto = [int(one.value) for one in buckets]
    unknown = cast("float", None)  # Prometheus keeps neither the least nor the most
    return HistogramDataPoint(
        attributes={k: v for k, v in buckets[0].labels.items() if k != "le"},
        start_time_unix_nano=began,
        time_unix_nano=now,
        count=upto[-1],
        sum=totals["sum"],
        bucket_counts=[n - before for n, before in zip(upto, [0, *upto], strict=False)],
        explicit_bounds=[float(one.labels["le"]) for one in buckets[:-1]],
        min=unknown,
        max=unknown,
    )
