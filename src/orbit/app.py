"""The one place that wires: settings become a node with its database, services and operations.

A node opens in order (server, schema, clock, configuration, services) and refuses to go on at
the first thing that is not right. It closes in the other order, giving back what it holds.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import socket
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import structlog

from orbit import __version__
from orbit.audit.keys import load_signing_key
from orbit.audit.signing import Signer
from orbit.autonomy.changes import Changes
from orbit.autonomy.guard import Guard, Switches
from orbit.autonomy.modes import Modes
from orbit.autonomy.shadowing import Shadows
from orbit.clock import Clock, DatabaseClock, SystemClock, new_id
from orbit.database.embedded import APPLICATION_ROLE, EmbeddedServer
from orbit.database.pool import Database
from orbit.database.queries import array, load
from orbit.database.upgrade import SchemaStatus, check, require_current, upgrade
from orbit.errors import SettingInvalid
from orbit.execution.cycle import Orchestrator
from orbit.execution.dead_letters import DeadLetters
from orbit.execution.dispatch import DispatchQueue, RetryPolicy
from orbit.execution.http1 import Client
from orbit.execution.initiation import Intake
from orbit.execution.memory import PayloadMemory
from orbit.execution.normalization import Normalizer
from orbit.execution.recorder import Recorder
from orbit.execution.requeues import Requeues
from orbit.execution.retry import Backoff
from orbit.execution.snapshots import Snapshots
from orbit.execution.tenure import Tenure
from orbit.execution.transformation import Transformer
from orbit.execution.wire import Wire
from orbit.governance import local_key
from orbit.governance.actor import EVERYWHERE, Scope
from orbit.governance.authentication import WAYS_IN, Authentication
from orbit.governance.fence import Fences
from orbit.governance.halt import Brake
from orbit.governance.keys import Grant, Keys
from orbit.governance.refusals import Refusals
from orbit.governance.sessions import Sessions
from orbit.insight.keeping import SignalKeeper
from orbit.insight.proposals import Proposals
from orbit.insight.source import TelemetrySource
from orbit.profiles.bridge import Bridge
from orbit.profiles.orchestration import Orchestration
from orbit.profiles.revision import Configuration
from orbit.profiles.switching import Switch
from orbit.services.base import LAST_WORDS_SECONDS, within
from orbit.services.correlator import Correlator
from orbit.services.dispatcher import Dispatcher
from orbit.services.fence_keeper import FenceKeeper
from orbit.services.heartbeat import Heartbeat
from orbit.services.janitor import Janitor
from orbit.services.leftovers import Leftovers
from orbit.services.notary import Notary
from orbit.services.pilot import Pilot
from orbit.services.requeuer import Requeuer
from orbit.services.runner import Runner
from orbit.services.scheduler import Scheduler
from orbit.services.sealer import Sealer
from orbit.services.sequencer import Sequencer
from orbit.services.strategist import Strategist
from orbit.settings import Settings
from orbit.telemetry.retention import Retention
from orbit.vault import Vault, load_or_create_key_file

NODE_SQL = load("node")
_LEAST_TRANSACTION_SECONDS = 10.0
_LEAVING_SECONDS = 0.5  # at the end of a drain: for the last services and the node's row
_LAST_SECONDS = LAST_WORDS_SECONDS + 2 * _LEAVING_SECONDS  # kept back of the drain's time
log = structlog.get_logger(__name__)


def spare_the_collector() -> None:
    """For a process that is one node: a tenth of its work would go into collecting garbage.

    What is there at the start stays for good, so the collector need not walk it again; and what
    comes and goes is mostly freed without it.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


class Store:
    """The database of a node or a tool: embedded or given, its schema checked."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._server: EmbeddedServer | None = None
        self._revive: Callable[[], None] | None = None
        self.entrance: Database | None = None
        self.vault: Vault
        self.database: Database

    async def open(self) -> None:
        """Starts or joins the embedded server if there is no other, and connects.

        Raises EmbeddedServerFailed, DatabaseUnavailable or SchemaMismatch.
        """
        settings = self._settings
        dsn = settings.database_url
        if dsn is None:
            self._server = await asyncio.to_thread(EmbeddedServer.start, settings.data_dir)
            dsn, self._revive = self._server.dsn, self._server.ensure_running
            await asyncio.to_thread(_bring_up_to_date, self._server.owner_dsn)
        self.vault = Vault(self._keys())
        self.database = self._pool(dsn, settings.database_pool_min, settings.database_pool_max)
        await asyncio.to_thread(require_current, dsn)
        await self.database.open()

    async def open_entrance(self) -> Database:
        """Connections beside the pool, open before they are needed, to look at keys.

        Who halts waits for no work, nor for a new connection to a busy server.
        """
        self.entrance = self._pool(self.database.dsn, WAYS_IN, WAYS_IN)
        await self.entrance.open()
        return self.entrance

    async def close(self) -> None:
        """Disconnects; the last to leave the embedded server stops it."""
        if self.entrance is not None:
            await self.entrance.close()
        if hasattr(self, "database"):
            await self.database.close()
        if self._server is not None:
            await asyncio.to_thread(self._server.leave)

    def _pool(self, dsn: str, minimum: int, maximum: int) -> Database:
        return Database(
            dsn,
            minimum=minimum,
            maximum=maximum,
            is_preparing=self._settings.database_prepared_statements,
            revive=self._revive,
            transaction_seconds=max(self._settings.lease_seconds, _LEAST_TRANSACTION_SECONDS),
        )

    def _keys(self) -> list[str]:
        if self._settings.database_url is None and not self._settings.secret_keys:
            return load_or_create_key_file(self._settings.data_dir / "secret.keys")
        return list(self._settings.secret_keys)


def checkpoint_folder(settings: Settings) -> Path | None:
    """Where this node's checkpoints of the audit trail are, if anywhere."""
    if settings.audit_checkpoint_dir is None and settings.database_url is None:
        return settings.data_dir / "audit"
    return settings.audit_checkpoint_dir


def signing_key_file(settings: Settings) -> Path | None:
    """The file of the key that signs checkpoints; None where none is named."""
    if settings.audit_signing_key_file is None and settings.database_url is None:
        return settings.data_dir / "audit.key"
    return settings.audit_signing_key_file


def signer_of(settings: Settings, dsn: str, clock: Clock) -> Signer | None:
    """What signs checkpoints; None where no key is named. Raises AuditKeyInvalid."""
    path = signing_key_file(settings)
    if path is None:
        return None
    key = load_signing_key(path, is_made=settings.database_url is None)
    folder = checkpoint_folder(settings)
    return Signer(dsn, clock, key, folder, settings.audit_checkpoint_command)


class Node:
    """One node: everything between its settings and its API.

    `roles` narrows what the settings say; a tool that only asks has none. Without
    `is_dropping_overlays` a start is refused where overlays do not fit changed files.
    """

    def __init__(
        self,
        settings: Settings,
        roles: frozenset[str] | None = None,
        *,
        is_dropping_overlays: bool = False,
    ) -> None:
        self.settings = settings
        self._is_dropping_overlays = is_dropping_overlays
        self.roles = settings.roles if roles is None else roles
        self.store = Store(settings)
        self.node_id = new_id(SystemClock().now())
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.address: str | None = None
        self.is_ready = False
        self.is_draining = False
        self.runner: Runner | None = None
        self.dispatcher: Dispatcher | None = None
        self.scheduler: Scheduler | None = None
        self.requeuer: Requeuer | None = None
        self.keeper: FenceKeeper | None = None
        self.signer: Signer | None = None  # of a node that was started
        self._notary: Notary | None = None

    async def open(self) -> None:
        """Connects and builds what every operation needs; starts nothing."""
        await self.store.open()
        settings, database = self.settings, self.store.database
        self.database = database
        row = await database.fetch_one(NODE_SQL.now)
        assert row is not None
        self.clock = DatabaseClock(row["now"])
        self.configuration = Configuration(database, self.node_id, self.clock)
        await self.configuration.refresh()
        self.intake = Intake(database, self.node_id, self._wake_runner)
        self.snapshots = Snapshots(
            database,
            self.store.vault,
            settings.dispatch_endpoints,
            max_attempts=settings.max_dispatch_retries + 1,
        )
        self.dead_letters = DeadLetters(
            database, self.snapshots, settings.max_dispatch_retries + 1, self._wake_dispatcher
        )
        self.requeues = Requeues(
            database, self.clock, self.dead_letters, self.node_id, settings.lease_seconds
        )
        self.fences = Fences()
        self.brake = Brake(
            database, self.node_id, recover=self._recover, on_changed=self._wake_keeper
        )
        self.keys = Keys(database, self.clock)
        self.sessions = Sessions(database, self.keys, settings.session_seconds)
        self.refusals = Refusals(database, self.clock)
        self.authentication = await self._authentication()
        self.signals = SignalKeeper(database, TelemetrySource())
        self.proposals = Proposals(
            database, self.configuration, self.clock, hours=settings.proposal_hours
        )
        self.orchestration = Orchestration(
            settings, database, self.clock, self.configuration, self.intake
        )
        self.switch = Switch(database, self.configuration, self.clock, self.node_id)
        guard = Guard(self.node_id, self.clock, lambda: Switches.of(self.settings))
        self.modes = Modes(database, self.configuration, guard)
        self.changes = Changes(
            database,
            self.configuration,
            self.clock,
            guard,
            self.modes,
            self.signals,
            self.proposals,
            probation_hours=settings.watched_hours,
        )
        self.shadows = Shadows(database, self.configuration, guard, self.changes)

    async def start(self, address: str | None = None) -> None:
        """Proposes the configuration files and starts the services of the node's roles.

        Raises ConfigurationInvalid, OverlaysBroken, AuditKeyInvalid, and SettingInvalid where other
        machines could ask, and nobody has a key.
        """
        self.address = address
        await self._check_access()
        self.signer = await asyncio.to_thread(
            signer_of, self.settings, self.database.dsn, self.clock
        )
        if self.signer is None:
            log.warning(
                "audit_unsigned", hint="ORBIT_AUDIT_SIGNING_KEY_FILE is unset: docs/audit.md"
            )
        documents = await asyncio.to_thread(self.orchestration.read_files)
        janitor = Janitor(
            self.database,
            fact_retention_days=self.settings.fact_retention_days,
            leftovers=self.leftovers(),
            telemetry=Retention(
                self.settings.telemetry_retention_days,
                self.settings.telemetry_hard_limit_days,
                self.settings.telemetry_cold_archive_enabled,
                self.settings.telemetry_parquet_dir,
            ),
        )
        await janitor.make_partitions()
        is_dropping = self._is_dropping_overlays
        if await self.configuration.propose(documents, is_dropping=is_dropping):
            log.info("configuration_activated", revision=self.configuration.active.revision[:12])
        await self._register()
        self._build()
        self._janitor = janitor
        services = (
            self.scheduler,
            self.keeper,
            self.runner,
            self.dispatcher,
            self.requeuer,
            self._sealer,
            self._sequencer,
            self._correlator,
            self._strategist,
            self._pilot,
            self._notary,
        )
        for service in (self._heartbeat, janitor, *services):
            if service is not None:
                service.start()
        self.is_ready = True
        log.info(
            "node_started",
            node=self.node_id,
            address=self.address,
            roles=sorted(self.roles),
            version=__version__,
        )

    async def _authentication(self) -> Authentication:
        """Looks at keys over connections of its own, where keys are asked for."""
        settings, database = self.settings, self.database
        if "api" in self.roles and settings.auth != "off":
            database = await self.store.open_entrance()
        keys = Keys(database, self.clock)
        sessions = Sessions(database, keys, settings.session_seconds)
        return Authentication(self.database, self.clock, keys, sessions)

    async def _check_access(self) -> None:
        """The embedded instance makes its own key; elsewhere a person makes the first one."""
        settings = self.settings
        if settings.database_url is None:
            token = await asyncio.to_thread(local_key.load_or_create, settings.data_dir)
            grant = Grant("admin of this folder", (Scope.ADMIN,), (EVERYWHERE,))
            maker = f"orbit on {self.name}"
            if not await self.keys.adopt(token, grant, maker):
                token = await asyncio.to_thread(local_key.replace, settings.data_dir, token)
                await self.keys.adopt(token, grant, maker)
                log.warning("admin_key_replaced", folder=str(settings.data_dir))
        if settings.is_loopback or "api" not in self.roles or await self.keys.has_any():
            return
        raise SettingInvalid(
            f"ORBIT_HOST={settings.host}: other machines reach it, and there is no access key yet: "
            "make one with `orbit keys create NAME --scope admin`, or listen on 127.0.0.1"
        )

    async def drain(self) -> None:
        """Stops taking work on, lets what is under way end, gives the rest back."""
        if self.is_draining:
            return
        self.is_draining, self.is_ready = True, False
        seconds = self.settings.drain_timeout_seconds
        log.info("draining", seconds=seconds)
        self._heartbeat.is_draining = True
        seconds -= min(_LAST_SECONDS, seconds / 4)
        parts = {}
        if self.scheduler is not None:
            parts["scheduler"] = self.scheduler.stop(seconds)
        if self.requeuer is not None:
            parts["requeuer"] = self.requeuer.stop(seconds)
        if self.runner is not None:
            self.runner.halt()
            parts["runner"] = self.runner.drain(seconds)
        if self.dispatcher is not None:
            self.dispatcher.halt()
            parts["dispatcher"] = self.dispatcher.drain(seconds)
        await _all_ended(parts)
        last = {
            "heartbeat": self._heartbeat,
            "janitor": self._janitor,
            "keeper": self.keeper,
            "sealer": self._sealer,
            "sequencer": self._sequencer,
            "correlator": self._correlator,
            "strategist": self._strategist,
            "pilot": self._pilot,
            "notary": self._notary,
        }
        await _all_ended(
            {name: one.stop(_LEAVING_SECONDS) for name, one in last.items() if one is not None}
        )
        await _all_ended({"node": self._leave()})

    async def _leave(self) -> None:
        node = {"node_id": self.node_id}
        leaving = self.database.persist(lambda: self.database.execute(NODE_SQL.leave_node, node))
        if not await within(_LEAVING_SECONDS, leaving):
            log.warning("node_not_left")

    async def close(self) -> None:
        """Lets go of everything; safe at any point of opening."""
        if hasattr(self, "_http"):
            await self._http.close()
        await self.store.close()

    def _build(self) -> None:
        settings, database = self.settings, self.database
        beats = []
        memory = PayloadMemory(settings.payload_memory_bytes)
        if "worker" in self.roles:
            self._http = Client(
                allow_private=settings.private_addresses == "allow",
                idle_connections=settings.dispatch_concurrency + settings.worker_concurrency,
            )
            self.dispatcher = self._dispatcher(memory)
            self.runner = self._runner(memory)
            self.requeuer = Requeuer(database, self.requeues)
            beats = [self.runner.beat, self.dispatcher.beat]
        if self.roles & {"worker", "scheduler"}:
            self.keeper = FenceKeeper(
                database,
                self.fences,
                self.brake,
                poll_seconds=settings.poll_seconds,
                on_halted=self._recall,
                is_busy=self._is_busy,
            )
        if "scheduler" in self.roles:
            self.scheduler = Scheduler(
                database,
                self.configuration,
                self.clock,
                settings,
                self.node_id,
                self._wake_runner,
            )
        self._sealer = Sealer(database, self.node_id)
        self._sequencer = Sequencer(database, self.node_id)
        self._correlator = Correlator(database, self.signals, self.node_id)
        self._strategist = Strategist(database, self.proposals, self.node_id)
        self._pilot = Pilot(database, self.modes, self.changes, self.shadows, self.node_id)
        if self.signer is not None:
            seconds = settings.audit_checkpoint_seconds
            self._notary = Notary(database, self.signer, seconds=seconds)
        self._heartbeat = Heartbeat(
            database,
            self.clock,
            self.configuration,
            self.node_id,
            lease_seconds=settings.lease_seconds,
            register=self._register,
            beats=beats,
        )

    def _queue(self) -> DispatchQueue:
        settings = self.settings
        backoff = Backoff(
            settings.dispatch_retry_base_seconds,
            settings.dispatch_retry_factor,
            settings.dispatch_retry_cap_seconds,
        )
        policy = RetryPolicy(backoff, random.random)
        endpoints = {endpoint.key: endpoint for endpoint in settings.dispatch_endpoints}
        return DispatchQueue(self.database, self.node_id, settings.lease_seconds, policy, endpoints)

    def _dispatcher(self, memory: PayloadMemory) -> Dispatcher:
        settings = self.settings
        return Dispatcher(
            self.database,
            self._queue(),
            self.snapshots,
            Wire(self._http),
            memory,
            self.clock,
            self.fences,
            concurrency=settings.dispatch_concurrency,
            lease_seconds=settings.lease_seconds,
            poll_seconds=settings.poll_seconds,
        )

    def _runner(self, memory: PayloadMemory) -> Runner:
        settings = self.settings
        tenure = Tenure(self.fences, self.clock, settings.lease_seconds)
        transformer = Transformer(self._http, settings.max_payload_bytes, tenure=tenure)
        orchestrator = Orchestrator(
            self.database,
            Recorder(self.database, self.node_id),
            Bridge(self.configuration, self.snapshots.keys),
            transformer,
            Normalizer(transformer, settings.max_items_per_cycle, settings.payload_memory_bytes),
            self.snapshots,
            memory,
            settings.max_cycle_recoveries,
        )
        return Runner(
            self.database,
            orchestrator,
            self.node_id,
            tenure,
            self.clock,
            concurrency=settings.worker_concurrency,
            lease_seconds=settings.lease_seconds,
            poll_seconds=settings.poll_seconds,
            on_enqueued=self._wake_dispatcher,
            is_paused=settings.global_pause,
        )

    async def _register(self) -> None:
        proposed = self.configuration.proposed
        await self.database.execute(
            NODE_SQL.enter_node,
            {
                "node_id": self.node_id,
                "name": self.name,
                "address": self.address,
                "roles": array(sorted(self.roles)),
                "version": __version__,
                "files_revision": proposed.revision if proposed else None,
            },
        )

    def leftovers(self) -> Leftovers:
        """What ends that which drills have left undone."""
        lease_seconds = self.settings.lease_seconds
        return Leftovers(self.database, self.node_id, self.clock, self.dead_letters, lease_seconds)

    async def _recover(self, namespace: str) -> None:
        """Settles a namespace's attempts whose worker is gone."""
        await self._queue().recover(self.clock.now(), of=namespace)

    async def _recall(self) -> None:
        if self.dispatcher is not None:
            await self.dispatcher.recall()

    def _is_busy(self) -> bool:
        has_cycles = self.runner is not None and bool(self.runner.running)
        return has_cycles or (self.dispatcher is not None and self.dispatcher.in_flight > 0)

    def _wake_keeper(self) -> None:
        if self.keeper is not None:
            self.keeper.wake()

    def _wake_runner(self) -> None:
        if self.runner is not None:
            self.runner.wake()

    def _wake_dispatcher(self) -> None:
        if self.dispatcher is not None:
            self.dispatcher.wake()


async def _all_ended(parts: Mapping[str, Coroutine[Any, Any, None]]) -> None:
    """Runs the parts of a drain at once; what one of them raises is logged and stops no other."""
    results = await asyncio.gather(*parts.values(), return_exceptions=True)
    for name, result in zip(parts, results, strict=True):
        if isinstance(result, Exception):
            log.error("drain_failed", part=name, exc_info=result)


def _bring_up_to_date(owner_dsn: str) -> None:
    """The embedded database is ours alone: its schema follows the program by itself."""
    if check(owner_dsn).status in (SchemaStatus.MISSING, SchemaStatus.OLDER):
        upgrade(owner_dsn, APPLICATION_ROLE)
