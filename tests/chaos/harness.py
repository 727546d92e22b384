"""What the chaos tests share: nodes as processes, a receiver that counts, a client that insists.

A node is what `orbit up` runs, forked from a warm process and killed with a real SIGKILL. The
receiver runs in the test's own process and forgets nothing. The client repeats a trigger under
its Idempotency-Key on whichever node lives, until one has answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from cryptography.fernet import Fernet

from orbit.canonical import sha256_hex
from tests.chaos.steps import CALLS

PATIENCE_SECONDS = 60.0  # a test waits so long only when something is wrong
_INSISTENCE_SECONDS = 120.0  # nodes that are killed at once may leave a client without an answer
_ROOT = Path(__file__).parents[2]
_READY = "Orbit is ready at "


async def eventually(
    condition: Callable[[], Awaitable[Any]], what: str, seconds: float = PATIENCE_SECONDS
) -> Any:
    """Polls until the condition gives something true, which is returned; fails at the deadline."""
    deadline = time.monotonic() + seconds
    while not (found := await condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        await asyncio.sleep(0.01)
    return found


# --- nodes -------------------------------------------------------------------------------


class NodeProcess:
    """One node; `code` is what it ended with, negative for a signal."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.pid = 0
        self.address = ""
        self.started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    @property
    def is_alive(self) -> bool:
        return not self._ended.done()

    def end(self, code: int) -> None:
        self._ended.set_result(code)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal, if there still is somebody to get it."""
        if self.is_alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def kill(self) -> None:
        """Kill -9, and the certainty that it is dead."""
        self.signal(signal.SIGKILL)
        await self.ended()

    async def ended(self, seconds: float = PATIENCE_SECONDS) -> int:
        """Its exit code; fails with its log if it lives on."""
        try:
            return await asyncio.wait_for(asyncio.shield(self._ended), seconds)
        except TimeoutError:
            raise AssertionError(f"it lives on after {seconds:g} s:\n{self.tail()}") from None

    async def ready(self) -> bool:
        """Waits until it serves; False if it died before."""

        async def is_settled() -> bool:
            text = self.log.read_text() if self.log.exists() else ""
            if _READY in text:
                self.address = text.partition(_READY)[2].split()[0]
            return bool(self.address) or not self.is_alive

        await eventually(is_settled, f"a node that is ready ({self.log})")
        return self.is_alive

    def tail(self) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text().splitlines()[-40:])


class Nodes:
    """Starts nodes that share an environment."""

    def __init__(
        self, zygote: asyncio.subprocess.Process, folder: Path, environ: dict[str, str]
    ) -> None:
        self._zygote, self._folder, self.environ = zygote, folder, environ
        self._numbers = itertools.count(1)
        self._by_number: dict[int, NodeProcess] = {}
        self._by_pid: dict[int, NodeProcess] = {}

    @property
    def alive(self) -> list[NodeProcess]:
        return [node for node in self._by_pid.values() if node.is_alive]

    async def start(
        self, boundary: tuple[str, str] | None = None, *, is_waiting: bool = True, **environ: str
    ) -> NodeProcess:
        """A new node; it kills itself at `boundary` (see boundaries.py) if there is one."""
        number = next(self._numbers)
        node = self._by_number[number] = NodeProcess(self._folder / f"node-{number}.log")
        request = {
            "number": number,
            "log": str(node.log),
            "environ": {**self.environ, **environ},
            "boundary": boundary,
        }
        assert self._zygote.stdin is not None
        self._zygote.stdin.write(json.dumps(request).encode() + b"\n")
        await node.started
        if is_waiting:
            assert await node.ready() or boundary, node.tail()
        return node

    async def listen(self) -> None:
        """Takes in births and deaths."""
        assert self._zygote.stdout is not None
        async for line in self._zygote.stdout:
            message = json.loads(line)
            if "started" in message:
                node = self._by_number[message["number"]]
                node.pid = message["started"]
                self._by_pid[node.pid] = node
                node.started.set_result(None)
            else:
                self._by_pid.pop(message["ended"]).end(message["code"])


@asynccontextmanager
async def running_nodes(folder: Path, environ: dict[str, str]) -> AsyncIterator[Nodes]:
    """The means to start nodes; none of them outlives it."""
    zygote = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.chaos.zygote"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=_ROOT,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(_ROOT / "src")},
    )
    nodes = Nodes(zygote, folder, environ)
    listening = asyncio.create_task(nodes.listen())
    try:
        yield nodes
    finally:
        for node in nodes.alive:
            await node.kill()
        assert zygote.stdin is not None
        zygote.stdin.close()
        await zygote.wait()
        await listening


# --- the receiver ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request that reached the receiver; `at` is monotonic seconds, `epoch` the claim's."""

    endpoint_key: str
    job_id: str
    cycle_id: str
    attempt: int
    digest: str
    at: float
    epoch: int


class CountingReceiver:
    """Answers 200 and remembers every arrival; endpoint `beta` refuses the first of some jobs."""

    def __init__(self) -> None:
        self.arrivals: list[Arrival] = []
        self.pause_seconds = 0.0
        self.port = 0

    def endpoints(self, **more: Any) -> str:
        """ORBIT_DISPATCH_ENDPOINTS for `alpha` and `beta`."""
        keys = ("alpha", "beta")
        url = f"http://127.0.0.1:{self.port}"
        more = {"breaker": {"hold_seconds": 0.2, "longest_hold_seconds": 0.5}, **more}
        return json.dumps([{"key": key, "url": f"{url}/{key}", **more} for key in keys])

    async def receive(self, request: web.Request) -> web.Response:
        content = await request.read()
        headers = request.headers
        arrival = Arrival(
            endpoint_key=request.match_info["key"],
            job_id=headers["Orbit-Job-Id"],
            cycle_id=headers["Orbit-Cycle-Run-Id"],
            attempt=int(headers["Orbit-Attempt"]),
            digest=sha256_hex(content),
            at=time.monotonic(),
            epoch=int(headers["Orbit-Epoch"]),
        )
        assert headers["Idempotency-Key"] == arrival.job_id
        self.arrivals.append(arrival)
        await asyncio.sleep(self.pause_seconds)
        is_refused = arrival.endpoint_key == "beta" and arrival.attempt == 1
        return web.Response(status=503 if is_refused and arrival.job_id[-1] in "0123" else 200)


@asynccontextmanager
async def counting_receiver() -> AsyncIterator[CountingReceiver]:
    """A receiver on a free port."""
    receiver = CountingReceiver()
    application = web.Application()
    application.router.add_post("/{key}", receiver.receive)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    receiver.port = runner.addresses[0][1]
    try:
        yield receiver
    finally:
        await runner.cleanup()


# --- the client --------------------------------------------------------------------------


class Client:
    """Starts run profiles through whichever node answers; what it was told is binding."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self.accepted: dict[tuple[str, str], str] = {}

    async def trigger(self, key: str, run_profile_ids: Sequence[str] | None = None) -> None:
        """Starts all run profiles, or those named, once under this key."""

        async def is_answered() -> bool:
            for node in self._nodes.alive:
                if node.address and await self._ask(node.address, key, run_profile_ids):
                    return True
            return False

        await eventually(is_answered, f"an answer to trigger {key}", _INSISTENCE_SECONDS)

    async def _ask(self, address: str, key: str, ids: Sequence[str] | None) -> bool:
        body = {} if ids is None else {"runProfileIds": list(ids)}
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(20)) as session,
                session.post(
                    f"{address}/run-profiles/trigger", json=body, headers={"Idempotency-Key": key}
                ) as answer,
            ):
                if answer.status != 202:
                    return False
                items = (await answer.json())["items"]
        except (aiohttp.ClientError, TimeoutError):
            return False
        for item in items:
            assert item["state"] == "started", item
            cycle = self.accepted.setdefault((key, item["runProfileId"]), item["cycleRunId"])
            assert cycle == item["cycleRunId"], f"{key} started {item['runProfileId']} twice"
        return True


# --- the scene ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunProfileShape:
    """A run profile of the tests: what it makes of a cycle can be told from this alone."""

    run_profile_id: str
    namespace: str = "east"
    has_initiator: bool = False
    steps: tuple[int, int, int] = (1, 1, 1)
    items: int = 1
    is_normalized: bool = False
    endpoint_keys: tuple[str, ...] = ("alpha", "beta")
    pause_seconds: float = 0.0

    def as_document(self) -> dict[str, Any]:
        """As it stands in runProfiles.json."""
        options = {"pause_seconds": self.pause_seconds}
        step = {"use": "tests.chaos.steps:grow", "options": options}
        normalization: dict[str, Any] = {"options": {"items": self.items}}
        if self.items > 1:
            normalization["split"] = "tests.chaos.steps:split"
        if self.is_normalized:
            normalization |= {"use": "tests.chaos.steps:normalize", "batch_size": 2}
        policy: dict[str, Any] = {
            "overlap": "allow",
            "tiers": {f"tier{n}": [step] * count for n, count in enumerate(self.steps, 1)},
            "normalization": normalization,
        }
        if self.has_initiator:
            policy["initiation"] = {"use": "tests.chaos.steps:begin"}
        return {
            "run_profile_id": self.run_profile_id,
            "profile_id": "nova",
            "namespace": self.namespace,
            "state": "enabled",
            "execution_policy": policy,
            "distribution_targets": list(self.endpoint_keys),
        }


def write_configuration(folder: Path, shapes: Sequence[RunProfileShape]) -> None:
    """Makes `folder` a configuration of one profile and these run profiles."""
    folder.mkdir(exist_ok=True)
    profile = {"profile_id": "nova", "label": "Nova", "state": "enabled"}
    (folder / "profiles.json").write_text(json.dumps({"profiles": [profile]}))
    run_profiles = [shape.as_document() for shape in shapes]
    (folder / "runProfiles.json").write_text(json.dumps({"run_profiles": run_profiles}))


@dataclass(frozen=True, slots=True)
class Scene:
    """Nodes, a receiver and a client around one database."""

    nodes: Nodes
    receiver: CountingReceiver
    client: Client
    calls: Path
    shapes: Sequence[RunProfileShape]


@asynccontextmanager
async def scene(
    folder: Path, shapes: Sequence[RunProfileShape], dsn: str | None, **environ: str
) -> AsyncIterator[Scene]:
    """Sets it up. Without a dsn the nodes bring their embedded server, in `folder`."""
    write_configuration(folder / "config", shapes)
    calls = folder / "calls.jsonl"
    calls.touch()
    given = {
        "PORT": "0",
        "ORBIT_CONFIG_DIR": str(folder / "config"),
        "ORBIT_DATA_DIR": str(folder / "data"),
        "ORBIT_CRON_SCHEDULE": "",
        "ORBIT_AUTH": "off",
        "ORBIT_LEASE_SECONDS": "1",
        "ORBIT_POLL_SECONDS": "0.05",
        "ORBIT_MAX_DISPATCH_RETRIES": "50",
        "ORBIT_DISPATCH_RETRY_BASE_SECONDS": "0.05",
        "ORBIT_DISPATCH_RETRY_CAP_SECONDS": "0.5",
        "ORBIT_MAX_CYCLE_RECOVERIES": "1000",
        CALLS: str(calls),
    }
    if dsn is not None:
        given |= {"DATABASE_URL": dsn, "ORBIT_SECRET_KEYS": Fernet.generate_key().decode()}
    async with counting_receiver() as receiver:
        given |= {"ORBIT_DISPATCH_ENDPOINTS": receiver.endpoints(), **environ}
        async with running_nodes(folder, given) as nodes:
            yield Scene(nodes, receiver, Client(nodes), calls, shapes)
