"""Logs: JSON lines in production, readable in a terminal; to stderr, so that results stay apart.

Orbit's own events and those of the libraries (uvicorn, psycopg.pool, alembic) go through the same
processors. No secret is written: values under telling names are masked, and so are passwords in
URLs. A traceback shows code, never the values in it.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Sequence
from typing import Any, TextIO

import structlog
from structlog.types import EventDict, Processor, WrappedLogger

from orbit.settings import Settings

_SECRET_NAME = re.compile(r"(?i)token|secret|password|authorization|cookie|dsn|database_url")
_URL_PASSWORD = re.compile(r"(//[^/@:\s]*):[^@\s]+@")
_FIRST = ("time", "level", "event", "logger", "namespace", "cycle", "job", "trace")
_LOUD_LIBRARIES = ("uvicorn", "uvicorn.error", "psycopg.pool", "alembic", "asyncio")


class _LineLogger:
    """Writes finished lines to a stream, and knows what it is called."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self.name = stream, name

    def msg(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()

    debug = info = warning = error = critical = exception = log = msg


def configure_logging(settings: Settings, stream: TextIO | None = None) -> None:
    """Sends all logs of this process to `stream` (stderr), in the form that settings ask for."""
    target = stream or sys.stderr
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    is_json = settings.env == "production"
    last: Processor = _render_json if is_json else _console(target)
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        _add_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time")
        if is_json
        else structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
        mask_secrets,
    ]
    if is_json:
        shared.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*shared, last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *names: _LineLogger(target, names[0] if names else "orbit"),
        cache_logger_on_first_use=True,
    )
    _route_libraries(shared, last, target, level)


def mask_secrets(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Masks values under telling names, and passwords in URLs."""
    for name, value in event.items():
        if _SECRET_NAME.search(name):
            event[name] = "***"
        elif isinstance(value, str) and "://" in value:
            event[name] = _URL_PASSWORD.sub(r"\1:***@", value)
    return event


def _add_name(logger: WrappedLogger, _: str, event: EventDict) -> EventDict:
    record = event.get("_record")
    event["logger"] = record.name if record is not None else getattr(logger, "name", "orbit")
    return event


def _render_json(_: WrappedLogger, __: str, event: EventDict) -> str:
    ordered = {name: event.pop(name) for name in _FIRST if name in event}
    return json.dumps({**ordered, **event}, default=str, ensure_ascii=False)


def _console(target: TextIO) -> Processor:
    return structlog.dev.ConsoleRenderer(
        colors=target.isatty(),
        pad_event_to=24,
        # The other formatter shows local variables, and so payloads and secrets.
        exception_formatter=structlog.dev.plain_traceback,
    )


def _route_libraries(
    shared: Sequence[Processor], last: Processor, target: TextIO, level: int
) -> None:
    handler = logging.StreamHandler(target)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=list(shared),
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, last],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(level, logging.WARNING))
    for name in _LOUD_LIBRARIES:
        library: Any = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
        library.setLevel(max(level, logging.WARNING))
