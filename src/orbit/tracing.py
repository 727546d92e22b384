"""OpenTelemetry traces: off, and then free, unless the standard OTEL_* variables name a collector.

A cycle's trace begins with the span of its trigger, below the caller's if there is one. That span
is in the cycle's `traceparent`, a fact, so any node goes on with the trace: a `cycle` for each
claim, in it a `step` for each call, and a `send` for each attempt, which ends when its receipt is
committed. Steps and receivers are told the span in which they are called. Whether a trace is kept
is decided once, at its trigger, and travels in the flags.

No payload, secret or address is in a span. A collector that is not there costs nothing but spans:
they wait in a bounded queue in a thread of the SDK, and are then dropped.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

import structlog
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, TraceFlags

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

T = TypeVar("T")
Attributes = Mapping[str, str | int]
PROTOCOL = "http/protobuf"
_PARENT = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
_KINDS = {"cycle": SpanKind.INTERNAL, "step": SpanKind.INTERNAL, "send": SpanKind.CLIENT}
_caller: ContextVar[str | None] = ContextVar("orbit_caller", default=None)
_log = structlog.get_logger("orbit.tracing")

_provider: TracerProvider | None = None
_tracer: trace.Tracer | None = None  # None: off


# --- switching it on ---------------------------------------------------------------------


def asked_exporters(signal: str, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Where the standard variables want `TRACES` or `METRICS`: of `otlp` and `console`.

    Nowhere unless they name an exporter or a collector. What is not understood is a warning:
    such variables are often set for all programs of a machine.
    """
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return []
    named = environ.get(f"OTEL_{signal}_EXPORTER", "")
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")
    if not named and any(environ.get(name) for name in endpoints):
        named = "otlp"
    exporters = [name.strip() for name in named.split(",") if name.strip() not in ("", "none")]
    protocol = environ.get(f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL") or environ.get(
        "OTEL_EXPORTER_OTLP_PROTOCOL", PROTOCOL
    )
    known = {"console"} if protocol != PROTOCOL else {"console", "otlp"}
    for name in exporters:
        if name not in known:
            what = f"{name} by {protocol}" if name == "otlp" else name
            accepted = f"otlp by {PROTOCOL}, console or none"
            _log.warning("otel_not_understood", signal=signal, asked=what, accepted=accepted)
    return [name for name in exporters if name in known]


def resource(attributes: Attributes) -> Resource:
    """What sends: `orbit`, unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES say otherwise."""
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 - an extra

    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "orbit"}
    given = os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    if "service.name=" in given:
        named = {}
    return Resource.create({**named, **attributes})


def start(attributes: Attributes) -> None:
    """Traces from now on, if that is asked for; `attributes` say which node this is."""
    global _provider, _tracer  # a process has one tracer, as the SDK has
    exporters = asked_exporters("TRACES")
    if not exporters or _tracer is not None:
        return
    try:
        provider = _made(exporters, attributes)
    except ImportError:
        tell_missing("traces")
    except Exception as error:  # noqa: BLE001 - traces are no reason not to start
        tell_off("traces", error)
    else:
        _provider, _tracer = provider, provider.get_tracer("orbit")
        trace.set_tracer_provider(provider)  # so that the spans of users' steps go the same way


def _made(exporters: Sequence[str], attributes: Attributes) -> TracerProvider:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415 - an extra
        OTLPSpanExporter,
    )
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import (  # noqa: PLC0415
        BatchSpanProcessor,
        ConsoleSpanExporter,
    )

    makers = {"otlp": OTLPSpanExporter, "console": ConsoleSpanExporter}
    provider = TracerProvider(resource=resource(attributes), shutdown_on_exit=False)
    for name in exporters:
        provider.add_span_processor(BatchSpanProcessor(makers[name]()))
    return provider


def tell_missing(signal: str) -> None:
    """Says how to get what the variables ask for."""
    _log.warning("otel_not_installed", signal=signal, install="orbit-control-plane[otel]")


def tell_off(signal: str, error: Exception) -> None:
    """Says what the SDK does not take of the variables: nothing is sent."""
    _log.warning("otel_not_started", signal=signal, error=f"{type(error).__name__}: {error}")


def stop(seconds: float = 2.0) -> None:
    """Sends what is left, for so long at most, and traces no more."""
    global _provider, _tracer
    provider, _provider, _tracer = _provider, None, None
    if provider is not None:
        last = threading.Thread(target=provider.shutdown, daemon=True)
        last.start()
        last.join(seconds)


# --- a trigger ---------------------------------------------------------------------------


def called_by(traceparent: str | None) -> None:
    """Whoever asks now, in this task, does so within that trace."""
    _caller.set(traceparent)


def caller() -> str | None:
    """The trace within which somebody asks, as it was given."""
    return _caller.get()


class Trigger:
    """The beginning of a cycle's trace; `traceparent` is what the cycle keeps."""

    __slots__ = ("_span", "traceparent")

    def __init__(self, kind: str, parent: str | None, attributes: Attributes) -> None:
        above = _parsed(parent)
        self._span: Span | None = None
        if _tracer is None:
            self.traceparent = _new_below(above)
            return
        self._span = _tracer.start_span(
            f"trigger {kind}", _context(above), SpanKind.SERVER, attributes
        )
        self.traceparent = _text(self._span.get_span_context())

    def accept(self) -> None:
        """There is a cycle; a trigger that began none leaves no span."""
        if self._span is not None:
            self._span.end()


def _new_below(above: SpanContext | None) -> str:
    """A W3C trace context without a span of ours: a new, sampled trace, or the caller's."""
    trace_id = os.urandom(16).hex() if above is None else f"{above.trace_id:032x}"
    flags = 1 if above is None else int(above.trace_flags)
    return f"00-{trace_id}-{os.urandom(8).hex()}-{flags:02x}"


# --- what comes of it --------------------------------------------------------------------


def traced(
    work: Callable[[T], Coroutine[Any, Any, None]],
    describe: Callable[[T], tuple[str, str, Attributes]],
) -> Callable[[T], Coroutine[Any, Any, None]]:
    """The work, in a span of its own below its cycle's trigger; the work itself if that is off.

    `describe` gives what it works on: the span's name, the cycle's traceparent, attributes.
    """
    if _tracer is None:
        return work

    async def run(subject: T) -> None:
        name, parent, attributes = describe(subject)
        with _current(name, _context(_parsed(parent)), attributes):
            await work(subject)

    return run


def span(name: str, attributes: Attributes) -> AbstractContextManager[object]:
    """A span below the one that this task is in."""
    return nullcontext() if _tracer is None else _current(name, None, attributes)


def note(*, is_failed: bool, **attributes: str | float | None) -> None:
    """Says of the span that this task is in what came of it."""
    if _tracer is None:
        return
    now = trace.get_current_span()
    found = {f"orbit.{name}": value for name, value in attributes.items() if value is not None}
    now.set_attributes(found)
    if is_failed:
        reason = attributes.get("cause") or attributes.get("error")
        now.set_status(trace.StatusCode.ERROR, None if reason is None else str(reason))


def traceparent(otherwise: str) -> str:
    """Of the span that this task is in, for whom it calls; `otherwise` where there is none."""
    if _tracer is None:
        return otherwise
    now = trace.get_current_span().get_span_context()
    return _text(now) if now.is_valid else otherwise


def _current(
    name: str, above: Context | None, attributes: Attributes
) -> AbstractContextManager[object]:
    assert _tracer is not None
    kind = _KINDS[name.partition(" ")[0]]
    return _tracer.start_as_current_span(name, above, kind, attributes)


def _parsed(text: str | None) -> SpanContext | None:
    """A traceparent of the W3C, of this version or a later one; None if it is not one."""
    found = None if text is None else _PARENT.fullmatch(text)
    if found is None:
        return None
    trace_id, span_id, flags = (int(part, 16) for part in found.groups())
    above = SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(flags & 1))
    return above if above.is_valid else None


def _context(above: SpanContext | None) -> Context:
    """Below that span, whatever else this task is in."""
    nowhere = Context()
    if above is None:
        return nowhere
    return trace.set_span_in_context(NonRecordingSpan(above), nowhere)


def _text(context: SpanContext) -> str:
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
