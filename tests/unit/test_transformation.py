"""One step at a time: its attempts, its records, its time, and how its failures read."""

from __future__ import annotations

import asyncio
import contextvars
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orbit.errors import StepFailed
from orbit.execution.context import ExecutionContext, Normalization, Stage, Step
from orbit.execution.http1 import Client
from orbit.execution.normalization import Normalizer
from orbit.execution.recorder import StepRecord
from orbit.execution.retry import Backoff
from orbit.execution.transformation import (
    Transformer,
    _described,
    abandoned_steps,
    invoke,
    step_headers,
)
from orbit.payload import Payload
from tests.unit.talking import OK, Server, always, serving

HERE = __name__
QUICK = Backoff(0.01, 2.0, 0.02)
CONTEXT = ExecutionContext(
    namespace="brand",
    cycle_id="cycle",
    profile_id="nova",
    run_profile_id="daily",
    stage=Stage.TIER1_COMPLETE.value,
    step=0,
    attempt=1,
    idempotency_key="cycle:tier1_complete:0",
    instruction={},
    options={},
    initiation={},
    slot_at=None,
    traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01",
)
seen: list[ExecutionContext] = []
released = threading.Event()


async def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "the condition did not come"
        await asyncio.sleep(0)


def _step(use: str, **values: Any) -> Step:
    return Step(f"{HERE}:{use}", backoff=QUICK, **values)


async def _succeeds_third(payload: Payload, context: ExecutionContext) -> Payload:
    seen.append(context)
    if context.attempt < 3:
        raise OSError("busy")
    return Payload(payload.content * 2)


def _looks_up(values: dict[str, Any]) -> Any:
    return values["nope"]


def _lacks_a_key(payload: Payload, context: ExecutionContext) -> Payload:
    return Payload.of_json(_looks_up({}))


async def _reads_no_json(payload: Payload, context: ExecutionContext) -> Payload:
    return Payload.of_json(json.loads("{"))


def _exits(payload: Payload, context: ExecutionContext) -> Payload:
    raise SystemExit(3)


def _says_too_much(payload: Payload, context: ExecutionContext) -> Payload:
    raise ValueError("\n" * 5000)


def _returns_none(payload: Payload, context: ExecutionContext) -> None:
    return None


async def _grows(payload: Payload, context: ExecutionContext) -> Payload:
    return Payload(payload.content * 100)


async def _stays(payload: Payload, context: ExecutionContext) -> Payload:
    while not released.is_set():
        try:
            await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            seen.append(context)
    return payload


def _blocks(payload: Payload, context: ExecutionContext) -> Payload:
    seen.append(context)
    released.wait()
    return payload


def _thread_name(payload: Payload, context: ExecutionContext) -> Payload:
    return Payload.of_text(threading.current_thread().name)


def _generates(payload: Payload, context: ExecutionContext) -> Iterator[Payload]:
    for _ in range(3):
        yield Payload.of_text(threading.current_thread().name)


async def _reads_variable(payload: Payload, context: ExecutionContext) -> Payload:
    return Payload.of_text(_variable.get())


_variable = contextvars.ContextVar("_variable", default="unset")


@pytest.fixture(autouse=True)
async def _forget() -> AsyncIterator[None]:
    seen.clear()
    released.clear()
    yield
    released.set()


@pytest.fixture
async def transformer() -> AsyncIterator[Transformer]:
    """A transformer for payloads of at most 1,000 bytes."""
    client = Client()
    yield Transformer(client, 1000, draw=lambda: 0.5)
    await client.close()


async def test_an_attempt_that_succeeds_ends_the_trying(transformer: Transformer) -> None:
    """Two failures and a success: three records with sizes, one key, growing attempt numbers."""
    records: list[StepRecord] = []
    step = _step("_succeeds_third", max_attempts=5)
    result = await transformer.transform(step, Payload(b"ab"), CONTEXT, records)
    assert result.content == b"abab"
    assert [one.attempt for one in seen] == [1, 2, 3]
    assert {one.idempotency_key for one in seen} == {CONTEXT.idempotency_key}
    line = _succeeds_third.__code__.co_firstlineno + 3
    busy = f"OSError: busy (test_transformation.py:{line} in _succeeds_third)"
    assert [(one.attempt, one.error, one.input_size, one.output_size) for one in records] == [
        (1, busy, 2, None),
        (2, busy, 2, None),
        (3, None, 2, 4),
    ]
    assert all(one.duration_seconds >= 0 for one in records)


@pytest.mark.parametrize(
    ("use", "begin", "place"),
    [
        ("_lacks_a_key", "KeyError: 'nope'", "_looks_up"),
        ("_reads_no_json", "JSONDecodeError: ", "_reads_no_json"),
        ("_exits", "raised SystemExit: 3", "_exits"),
        ("_says_too_much", "ValueError: \\n", "_says_too_much"),
    ],
)
async def test_an_error_has_its_place_in_the_users_code(
    transformer: Transformer, use: str, begin: str, place: str
) -> None:
    """File, line and function of the innermost frame that is the user's, on one short line."""
    with pytest.raises(StepFailed) as failed:
        await transformer.transform(_step(use, max_attempts=1), Payload(b""), CONTEXT, [])
    reason = str(failed.value)
    line = globals()[place].__code__.co_firstlineno + 1
    assert reason.startswith(begin)
    assert reason.endswith(f" (test_transformation.py:{line} in {place})")
    assert len(reason) <= 2000
    assert reason.isprintable()


async def test_what_is_not_raised_by_the_users_code_has_no_place(transformer: Transformer) -> None:
    """A broken contract and an address that nobody listens at have no line in the user's code."""
    nobody = Step("http", url="http://127.0.0.1:9/", backoff=QUICK, max_attempts=1)
    for step in (_step("_returns_none", max_attempts=1), nobody):
        with pytest.raises(StepFailed) as failed:
            await transformer.transform(step, Payload(b""), CONTEXT, [])
        assert ".py:" not in str(failed.value)


async def test_a_step_goes_to_no_address_that_is_refused() -> None:
    """The same guard as for dispatch: a service on this machine is not reached."""
    client, server = Client(allow_private=False), Server()
    async with serving(always(server, OK), server):
        step = Step("http", url=server.url, backoff=QUICK, max_attempts=1)
        with pytest.raises(StepFailed, match=r"address refused: 127\.0\.0\.1 is loopback"):
            await Transformer(client, 1000).transform(step, Payload(b"x"), CONTEXT, [])
    await client.close()
    assert server.connections == 0


async def test_half_an_answer_is_none(transformer: Transformer) -> None:
    """A status of 200 makes no payload of a body that broke off; the step is tried again."""
    server = Server()
    half = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.read(reader)
        writer.write(half)
        await writer.drain()

    async with serving(talk, server):
        step = Step("http", url=server.url, backoff=QUICK, max_attempts=2)
        with pytest.raises(StepFailed, match="connection lost"):
            await transformer.transform(step, Payload(b"x"), CONTEXT, [])
    assert len(server.requests) == 2


async def test_the_pause_between_attempts_follows_the_backoff(transformer: Transformer) -> None:
    """With the draw at half, two retries wait at least half of 0.2 s and of 0.4 s."""
    step = replace(_step("_succeeds_third"), backoff=Backoff(0.2, 2.0, 1.0))
    began = time.monotonic()
    await transformer.transform(step, Payload(b"x"), CONTEXT, [])
    assert 0.3 <= time.monotonic() - began < 20


async def test_a_result_over_the_limit_is_final(transformer: Transformer) -> None:
    """It would be as large again, so it is not tried again."""
    records: list[StepRecord] = []
    with pytest.raises(StepFailed, match=r"returned 1,100 bytes, at most 1,000") as failed:
        await transformer.transform(_step("_grows"), Payload(b"x" * 11), CONTEXT, records)
    assert len(records) == 1
    assert failed.value.details["attempts"] == 1
    assert (
        await transformer.transform(_step("_grows"), Payload(b"x" * 10), CONTEXT, [])
    ).size == 1000


@pytest.mark.parametrize("use", ["_stays", "_blocks"])
async def test_a_step_that_hangs_costs_no_more_than_its_time(
    transformer: Transformer, use: str
) -> None:
    """Each attempt is cut off at its limit, whether or not the step lets itself be stopped."""
    records: list[StepRecord] = []
    step = _step(use, timeout_seconds=0.1, max_attempts=2)
    began = time.monotonic()
    with pytest.raises(StepFailed, match=r"took longer than 0\.1 s"):
        await transformer.transform(step, Payload(b"x"), CONTEXT, records)
    assert time.monotonic() - began < 20
    assert [one.attempt for one in records] == [1, 2]


async def test_what_is_abandoned_is_counted_until_it_ends(transformer: Transformer) -> None:
    """The program can tell that a step still goes on, and no longer once it has ended."""
    before = abandoned_steps()
    step = _step("_stays", timeout_seconds=0.05, max_attempts=1)
    with pytest.raises(StepFailed):
        await transformer.transform(step, Payload(b"x"), CONTEXT, [])
    assert abandoned_steps() == before + 1
    released.set()
    await _until(lambda: abandoned_steps() == before)


async def test_threads_that_hang_are_bounded(
    transformer: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the bound a step is not begun and says why; when a hanging call ends it may be again."""
    monkeypatch.setattr("orbit.execution.transformation._MAX_HANGING", 2)
    hanging = _step("_blocks", timeout_seconds=0.05, max_attempts=1)
    while len(seen) < 2:  # on a busy machine the time may be over before a thread has begun
        with pytest.raises(StepFailed, match=r"took longer|still hang"):
            await transformer.transform(hanging, Payload(b"x"), CONTEXT, [])
    short = _step("_thread_name", max_attempts=1)
    with pytest.raises(StepFailed, match="2 earlier calls of steps still hang"):
        await transformer.transform(short, Payload(b"x"), CONTEXT, [])
    assert len(seen) == 2
    released.set()
    await _until(lambda: not any(one.name == "orbit-step" for one in threading.enumerate()))
    result = await transformer.transform(short, Payload(b"x"), CONTEXT, [])
    assert result.content == b"orbit-step"


async def test_a_cancelled_cycle_cancels_its_step() -> None:
    """When a lease is lost the step is told to stop, and the cancellation goes on upwards."""
    task = asyncio.create_task(invoke(f"{HERE}:_stays", Payload(b"x"), CONTEXT))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await _until(lambda: bool(seen))


async def test_hanging_threads_do_not_starve_others(transformer: Transformer) -> None:
    """A hundred blocked steps, and the next one still finds a thread."""
    step = _step("_blocks", timeout_seconds=60, max_attempts=1)
    blocked = [
        asyncio.create_task(transformer.transform(step, Payload(b"x"), CONTEXT, []))
        for _ in range(100)
    ]
    await _until(lambda: len(seen) == 100)
    async with asyncio.timeout(30):
        found = await transformer.transform(_step("_thread_name"), Payload(b"x"), CONTEXT, [])
    assert found.text() == "orbit-step"
    released.set()
    assert len(await asyncio.gather(*blocked)) == 100


async def test_a_splitter_that_generates_runs_in_a_thread_to_its_end(
    transformer: Transformer,
) -> None:
    """The body of a generator is the user's code too: it never runs on the event loop."""
    normalizer = Normalizer(transformer, max_items=10, max_bytes=1 << 20)
    items = await normalizer.normalize(
        Normalization(split=_step("_generates")), Payload(b"x"), CONTEXT, []
    )
    assert [item.text() for item in items] == ["orbit-step"] * 3


async def test_a_step_sees_its_callers_context_variables() -> None:
    """A task of its own inherits what traces and loggers keep there."""
    token = _variable.set("set")
    try:
        found = await invoke(f"{HERE}:_reads_variable", Payload(b""), CONTEXT)
    finally:
        _variable.reset(token)
    assert found.text() == "set"


def test_the_headers_of_an_http_step_leave_out_what_is_not_there() -> None:
    """A raw cycle has no profile: no such header, not an empty one."""
    headers = step_headers(replace(CONTEXT, profile_id=None, run_profile_id=None, attempt=2))
    assert headers == {
        "Idempotency-Key": "cycle:tier1_complete:0",
        "Orbit-Namespace": "brand",
        "Orbit-Cycle-Run-Id": "cycle",
        "Orbit-Stage": "tier1_complete",
        "Orbit-Attempt": "2",
        "traceparent": CONTEXT.traceparent,
    }


@given(st.text(alphabet=st.characters(), max_size=3000))
def test_every_error_text_can_be_stored_and_printed(text: str) -> None:
    """Whatever a step says, its reason is one short line of encodable, printable text."""
    described = _described(ValueError(text))
    assert described.startswith("ValueError")
    assert len(described) <= 2000
    assert described.isprintable()
    assert described.encode()
