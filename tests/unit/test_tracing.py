from __future__ import annotations

import re
import sys
from contextlib import nullcontext

import pytest
from structlog.testing import capture_logs

from orbit import metering, tracing
from orbit.metrics import REGISTRY

TRACE, SPAN = "a" * 32, "b" * 16
GIVEN = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, []),
        ({"OTEL_SERVICE_NAME": "news"}, []),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, ["otlp"]),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, ["otlp"]),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://c:4318/v1/metrics"}, []),
        ({"OTEL_TRACES_EXPORTER": "console, otlp"}, ["console", "otlp"]),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, []),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, []),
    ],
)
def test_the_standard_variables_decide_where_traces_go(
    environ: dict[str, str], expected: list[str]
) -> None:
    """Nowhere unless an exporter or a collector is named."""
    assert tracing.asked_exporters("TRACES", environ) == expected


@pytest.mark.parametrize(
    ("environ", "asked"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "zipkin"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "otlp by grpc"),
    ],
)
def test_what_is_not_understood_is_a_warning(environ: dict[str, str], asked: str) -> None:
    """It says what was asked and what is accepted; nothing is sent."""
    with capture_logs() as logs:
        assert tracing.asked_exporters("TRACES", environ) == []
    [warning] = logs
    assert warning["log_level"] == "warning"
    assert warning["asked"] == asked
    assert "http/protobuf" in warning["accepted"]


def test_without_the_extra_a_warning_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Variables set for all programs of a machine stop no node."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.metric_exporter", None)
    with capture_logs() as logs:
        tracing.start({})
        assert metering.start(REGISTRY.collect, {}) is None
    assert [(one["signal"], one["install"]) for one in logs] == [
        ("traces", "orbit-control-plane[otel]"),
        ("metrics", "orbit-control-plane[otel]"),
    ]


def test_off_it_is_not_there() -> None:
    """The work is the work itself, no span is made, and a trace context passes as it is."""

    async def work(_: str) -> None: ...

    assert tracing.traced(work, lambda subject: (subject, GIVEN, {})) is work
    assert isinstance(tracing.span("step x", {}), nullcontext)
    assert tracing.traceparent(GIVEN) is GIVEN


def test_each_trigger_begins_a_trace_of_its_own() -> None:
    """A W3C trace context: version, trace, parent, flags; kept."""
    found = {tracing.Trigger("api", None, {}).traceparent for _ in range(100)}
    assert len({one.split("-")[1] for one in found}) == 100
    assert all(re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", one) for one in found)


@pytest.mark.parametrize("given", [GIVEN, f"00-{TRACE}-{SPAN}-00", f"01-{TRACE}-{SPAN}-01-more"])
def test_a_trigger_belongs_to_its_callers_trace(given: str) -> None:
    """The same trace and the same decision whether to keep it, under a parent of its own."""
    version, trace, parent, flags = tracing.Trigger("api", given, {}).traceparent.split("-")
    assert (version, trace, flags) == ("00", TRACE, given.split("-")[3])
    assert parent != SPAN


@pytest.mark.parametrize(
    "given",
    [
        "",
        "nonsense",
        GIVEN.upper(),
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        GIVEN + "\n",
    ],
)
def test_what_is_no_trace_context_is_left_alone(given: str) -> None:
    """As the W3C has it: a caller's mistake begins a new trace."""
    made = tracing.Trigger("api", given, {}).traceparent
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", made)
    assert TRACE not in made
