"""Traces and metrics as a real collector gets them, from a real node: OTLP over HTTP."""

from __future__ import annotations

import asyncio
import gzip
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.scenario.conftest import (
    SECRET_KEY,
    Configure,
    Facts,
    Receiver,
    policy,
    run_profile,
    until,
)
from tests.scenario.test_cli import clean_environment, free_port

CALLER = f"00-{'c' * 32}-{'d' * 16}-01"
STEPS = """
from opentelemetry import trace
from orbit.payload import Payload

tracer = trace.get_tracer("mine")


def sums(payload, context):
    with tracer.start_as_current_span("sums"):
        return Payload.of_text(context.traceparent)


def fails(payload, context):
    raise ValueError(f"not understood: {payload.content.decode()}")
"""


@dataclass
class Collector:
    """What an OpenTelemetry collector got."""

    url: str = ""
    spans: list[Any] = field(default_factory=list)
    resources: list[dict[str, str]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)

    async def take_traces(self, request: web.Request) -> web.Response:
        found = ExportTraceServiceRequest.FromString(await _body(request))
        for one in found.resource_spans:
            self.resources.append(_values(one.resource.attributes))
            self.spans += [span for scope in one.scope_spans for span in scope.spans]
        return web.Response()

    async def take_metrics(self, request: web.Request) -> web.Response:
        found = ExportMetricsServiceRequest.FromString(await _body(request))
        for one in found.resource_metrics:
            for scope in one.scope_metrics:
                self.metrics |= {metric.name: metric for metric in scope.metrics}
        return web.Response()

    def named(self, name: str) -> list[Any]:
        """The spans of a name, in the order of their beginnings."""
        found = [span for span in self.spans if span.name == name]
        return sorted(found, key=lambda span: int(span.start_time_unix_nano))


async def _body(request: web.Request) -> bytes:
    body = await request.read()
    return gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body


def _values(attributes: Any) -> dict[str, str]:
    return {one.key: one.value.string_value or str(one.value.int_value) for one in attributes}


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    """A collector on a free port."""
    found = Collector()
    application = web.Application()
    application.router.add_post("/v1/traces", found.take_traces)
    application.router.add_post("/v1/metrics", found.take_metrics)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    found.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield found
    await runner.cleanup()


@dataclass
class Running:
    """A node that runs, and where it is."""

    process: asyncio.subprocess.Process
    address: str

    async def end(self) -> int:
        """Its exit code after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(self.process.wait(), 300)


@asynccontextmanager
async def running(
    dsn: str, folder: Path, receiver: Receiver, **given: str
) -> AsyncIterator[Running]:
    """`orbit up` in a folder with steps, sending to the receiver's `out`."""
    (folder / "steps.py").write_text(STEPS)
    endpoint = {"key": "out", "url": f"{receiver.url}/out"}
    environment = clean_environment(
        DATABASE_URL=dsn,
        ORBIT_SECRET_KEYS=SECRET_KEY,
        ORBIT_AUTH="off",
        ORBIT_CRON_SCHEDULE="",
        ORBIT_CONFIG_DIR=str(folder / "config"),
        ORBIT_DISPATCH_ENDPOINTS=json.dumps([endpoint]),
        ORBIT_DISPATCH_RETRY_BASE_SECONDS="0.01",
        ORBIT_DRAIN_TIMEOUT_SECONDS="1",
        PORT="0",
        **given,
    )
    with (folder / "node.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "orbit", "up"),
            cwd=folder,
            env=environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
        )
    assert process.stdout is not None
    try:
        line = (await asyncio.wait_for(process.stdout.readline(), 300)).decode()
        assert "Orbit is ready at" in line, (folder / "node.log").read_text()
        yield Running(process, line.split(" at ")[1].split()[0])
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def trigger(node: Running) -> str:
    """Starts `daily`, as a caller that traces; the cycle's id."""
    async with httpx.AsyncClient(timeout=60) as client:
        answer = await client.post(
            f"{node.address}/run-profiles/trigger",
            json={"runProfileIds": ["daily"]},
            headers={"traceparent": CALLER},
        )
    assert answer.status_code == 202, answer.text
    return str(answer.json()["items"][0]["cycleRunId"])


async def test_a_trace_runs_from_the_caller_to_the_receiver(
    dsn: str,
    tmp_path: Path,
    configure: Configure,
    receiver: Receiver,
    collector: Collector,
    facts: Facts,
) -> None:
    """Caller, trigger, cycle, steps, the step's own spans, each attempt, and on to the receiver."""

    async def fail_once(_: Any) -> web.Response | None:
        return web.Response(status=503) if len(receiver.at("/out")) == 1 else None

    receiver.answers["/out"] = fail_once
    http = {"use": "http", "url": f"{receiver.url}/enrich"}
    configure(run_profile(execution_policy=policy(tier1=["steps:sums"], tier2=[http])))
    collecting = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_SERVICE_NAME": "news",
        "OTEL_BSP_SCHEDULE_DELAY": "50",
        "OTEL_METRIC_EXPORT_INTERVAL": "50",
    }
    async with running(dsn, tmp_path, receiver, **collecting) as node:
        cycle_id = await trigger(node)
        await until(lambda: len(collector.named("send out")) == 2, "the spans of both attempts")
        assert await node.end() == 0
    [begun], [cycle] = collector.named("trigger api"), collector.named("cycle")
    [step], [sums], [asked] = map(collector.named, ("step steps:sums", "sums", "step http"))
    first, second = collector.named("send out")
    assert {span.trace_id.hex() for span in collector.spans} == {"c" * 32}
    assert begun.parent_span_id.hex() == "d" * 16
    assert {one.parent_span_id for one in (cycle, first, second)} == {begun.span_id}
    assert step.parent_span_id == asked.parent_span_id == cycle.span_id
    assert sums.parent_span_id == step.span_id
    told = [one.headers["traceparent"] for one in (*receiver.at("/enrich"), *receiver.at("/out"))]
    spans = [one.span_id.hex() for one in (asked, first, second)]
    assert told == [f"00-{'c' * 32}-{span}-01" for span in spans]
    assert receiver.at("/enrich")[0].body.decode() == f"00-{'c' * 32}-{step.span_id.hex()}-01"
    [kept] = facts("SELECT traceparent FROM cycle_run")
    assert kept["traceparent"] == f"00-{'c' * 32}-{begun.span_id.hex()}-01"
    assert [span.status.code for span in (first, second)] == [2, 0]  # error, unset
    said = _values(second.attributes)
    [receipt] = facts("SELECT job_id FROM delivery_receipt WHERE attempt = 2")
    assert said["orbit.job.id"] == receipt["job_id"]
    assert said["orbit.outcome"] == "delivered"
    assert said["orbit.status"] == "200"
    assert _values(cycle.attributes)["orbit.cycle.id"] == cycle_id
    assert {one["service.name"] for one in collector.resources} == {"news"}
    _assert_counted(collector)


async def test_a_step_s_error_is_told_without_its_text(
    dsn: str,
    tmp_path: Path,
    configure: Configure,
    receiver: Receiver,
    collector: Collector,
    facts: Facts,
) -> None:
    """Its text may hold the payload: a collector gets the type, and where it was raised."""
    configure(run_profile(execution_policy=policy(tier1=["steps:fails"])))
    collecting = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "50"}
    async with running(dsn, tmp_path, receiver, **collecting) as node:
        await trigger(node)
        await until(lambda: collector.named("cycle"), "the cycle's span")
        assert await node.end() == 0
    assert "not understood: {" in facts("SELECT error FROM execution_record")[0]["error"]
    assert all(b"not understood" not in one.SerializeToString() for one in collector.spans)
    line = 1 + STEPS.splitlines().index("def fails(payload, context):") + 1
    [step, *_], [cycle] = collector.named("step steps:fails"), collector.named("cycle")
    assert step.status.code == cycle.status.code == 2
    assert _values(step.attributes)["orbit.error"] == f"ValueError (steps.py:{line} in fails)"
    assert _values(cycle.attributes)["orbit.error"].startswith("step_failed: tier1")


async def test_what_the_sdk_refuses_keeps_no_node_from_starting(
    dsn: str, tmp_path: Path, configure: Configure, receiver: Receiver, collector: Collector
) -> None:
    """The standard variables are often set for all programs of a machine: a warning, and work."""
    configure(run_profile())
    odd = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_MAX_QUEUE_SIZE": "256",
        "OTEL_PYTHON_EXPORTER_OTLP_HTTP_METRICS_CREDENTIAL_PROVIDER": "odd",
    }
    async with running(dsn, tmp_path, receiver, **odd) as node:
        await trigger(node)
        await until(lambda: receiver.at("/out"), "the delivery")
        assert await node.end() == 0
    log = (tmp_path / "node.log").read_text()
    assert log.count("otel_not_started") == 2
    assert (collector.spans, collector.metrics) == ([], {})


def _assert_counted(collector: Collector) -> None:
    """The same figures as /metrics: a sum by outcome, and a distribution with its buckets."""
    attempts = collector.metrics["orbit_attempts"].sum
    counted = {_values(one.attributes)["outcome"]: one.as_double for one in attempts.data_points}
    assert counted == {"failed": 1, "delivered": 1}
    assert attempts.is_monotonic
    [seconds] = collector.metrics["orbit_attempt_seconds"].histogram.data_points
    assert seconds.count == sum(seconds.bucket_counts) == 2
    assert len(seconds.bucket_counts) == len(seconds.explicit_bounds) + 1
    assert seconds.sum > 0
    ready = collector.metrics["orbit_node_ready"].gauge.data_points
    assert [one.as_double for one in ready] == [0]  # the last word, after the drain


async def test_what_the_caller_does_not_keep_is_not_sent(
    dsn: str, tmp_path: Path, configure: Configure, receiver: Receiver, collector: Collector
) -> None:
    """The sampler decides at the trigger; the flags tell everybody after it."""
    configure(run_profile())
    collecting = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_TRACES_SAMPLER": "always_off",
    }
    async with running(dsn, tmp_path, receiver, **collecting) as node:
        await trigger(node)
        [arrival] = await until(lambda: receiver.at("/out"), "the delivery")
        assert await node.end() == 0
    assert arrival.headers["traceparent"].split("-")[3] == "00"
    assert collector.spans == []
    assert collector.metrics == {}


async def test_a_collector_that_is_not_there_holds_nobody_up(
    dsn: str, tmp_path: Path, configure: Configure, receiver: Receiver
) -> None:
    """Work goes on, and the node ends in order."""
    configure(run_profile())
    collecting = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}",
        "OTEL_BSP_SCHEDULE_DELAY": "10",
        "OTEL_METRIC_EXPORT_INTERVAL": "10",
    }
    async with running(dsn, tmp_path, receiver, **collecting) as node:
        for _ in range(3):
            await trigger(node)
        await until(lambda: len(receiver.at("/out")) == 3, "the deliveries")
        assert await node.end() == 0
