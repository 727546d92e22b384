"""The server that `orbit up` runs: a node and its HTTP API, from the socket to the last lease.

The address is taken first, so that two nodes on one port are noticed before anything starts, and
/health answers while the node opens. SIGTERM or SIGINT stops accepting at once; requests and
work under way may end, leases go back, and the exit code is 0. A second signal ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import sys
from collections.abc import Coroutine, Iterator
from typing import Any

import structlog
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from orbit import __version__, metering, tracing
from orbit.api.application import create_application
from orbit.api.metrics import NodeCollector
from orbit.app import Node, spare_the_collector
from orbit.database.pool import TRANSIENT, first_line
from orbit.errors import AddressInUse, OrbitError, SettingInvalid
from orbit.execution.transformation import abandoned_steps
from orbit.logging import configure_logging
from orbit.metrics import REGISTRY
from orbit.settings import Settings

__all__ = ["create_application", "serve", "serve_node"]

_CUT_SHORT_SECONDS = 0.2
_BACKLOG = 2048
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

log = structlog.get_logger(__name__)


class _Connection(H11Protocol):
    """uvicorn's, which tells whoever answers how to end it at once, whatever waits to be sent."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort}


class _HttpServer(uvicorn.Server):
    """uvicorn without its own handling of signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self) -> None:
        """Closes the listening sockets now, and idle connections with the next tick."""
        for listening in getattr(self, "servers", ()):
            listening.close()
        self.should_exit = True


def serve(settings: Settings, *, is_dropping_overlays: bool = False) -> int:
    """Runs a node until a signal; its exit code.

    Raises whatever keeps the node from starting: AddressInUse, ConfigurationInvalid,
    OverlaysBroken, DatabaseUnavailable, SchemaMismatch, EmbeddedServerFailed.
    """
    configure_logging(settings)
    return _run(serve_node(settings, is_dropping_overlays=is_dropping_overlays))


async def serve_node(settings: Settings, *, is_dropping_overlays: bool = False) -> int:
    """The same on a running event loop."""
    listening = bind(settings)
    node = Node(settings, is_dropping_overlays=is_dropping_overlays)
    is_which = {"service.version": __version__, "service.instance.id": node.node_id}
    tracing.start(is_which)
    meter = metering.start(lambda: (*NodeCollector(node).collect(), *REGISTRY.collect()), is_which)
    http = _HttpServer(http_config(settings, node))
    stopping = asyncio.create_task(_on_signals().wait(), name="orbit-signals")
    serving = asyncio.create_task(http.serve([listening]), name="orbit-http")
    try:
        await _open(node, address_of(settings, listening), settings, stopping)
        if node.is_ready:
            await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
        http.stop()
        await _drain(node)
        await serving
    finally:
        stopping.cancel()
        http.stop()
        await asyncio.gather(serving, return_exceptions=True)
        listening.close()
        await node.close()
        tracing.stop()
        if meter is not None:
            meter.stop()
    log.info("node_stopped", node=node.node_id)
    return 0


def bind(settings: Settings) -> socket.socket:
    """A socket that listens on the node's address.

    Raises AddressInUse, and SettingInvalid if the address cannot be used at all.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    place = f"{settings.host}:{settings.port}"
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((settings.host, settings.port))
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(
                f"another process listens on {place}: stop it, or choose another port with PORT"
            ) from None
        reason = error.strerror or str(error)
        raise SettingInvalid(
            f"cannot listen on {place}: {reason}; choose with PORT and ORBIT_HOST"
        ) from None
    listening.setblocking(False)
    return listening


def address_of(settings: Settings, listening: socket.socket) -> str:
    """The URL of the node, with the port that it was given."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{listening.getsockname()[1]}"


def http_config(settings: Settings, node: Node) -> uvicorn.Config:
    """How a node's API is served."""
    return uvicorn.Config(
        create_application(node, is_probe_only="api" not in settings.roles),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=list(settings.trusted_proxies),
        lifespan="off",
        ws="none",
        http=_Connection,  # h11, which bounds what a head may be
        backlog=_BACKLOG,
        timeout_graceful_shutdown=max(1, int(settings.drain_timeout_seconds)),
    )


async def _open(node: Node, address: str, settings: Settings, stopping: asyncio.Task[Any]) -> None:
    """Opens and starts the node; what fails after a signal matters to nobody."""
    for warning in settings.warnings:
        log.warning("setting_odd", detail=warning)
    try:
        await node.open()
        if not stopping.done():
            await node.start(address)
            spare_the_collector()
    except OrbitError as error:
        if not stopping.done():
            raise
        log.warning("start_abandoned", error=str(error))
    if settings.env == "development" and node.is_ready:
        sys.stdout.write(f"Orbit is ready at {address} (what it can be asked: {address}/docs)\n")
        if settings.auth == "on":
            sys.stdout.write("To open it in a browser: orbit login\n")
        sys.stdout.flush()


async def _drain(node: Node) -> None:
    """Gives back what the node holds; without a database the leases run out by themselves."""
    if not node.is_ready:
        return
    try:
        await node.drain()
    except TRANSIENT as error:
        log.warning("database_unavailable", error=first_line(error))


def _on_signals() -> asyncio.Event:
    """An event for the first signal; the second one ends the process."""
    stopping = asyncio.Event()

    def stop() -> None:
        if stopping.is_set():
            os._exit(1)
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, stop)
    return stopping


def _run(main: Coroutine[Any, Any, int]) -> int:
    new_loop = None
    if sys.platform != "win32":
        import uvloop  # noqa: PLC0415 - not on Windows

        new_loop = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=new_loop) as runner:
        code = runner.run(main)
        if abandoned_steps():  # closing the loop would wait for them for ever
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        runner.run(_cut_short())
        return code


async def _cut_short() -> None:
    """Cancels what is left, twice: after the first time a statement still waits for its server."""
    for _ in range(2):
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        if rest:
            await asyncio.wait(rest, timeout=_CUT_SHORT_SECONDS)
