"""Calls injected code: a Python callable or an HTTP address, with a time limit and retries.

A step is called at least once and may be called again, after a failure or a crash, always with
the same idempotency key. Whatever it does wrong (raises, hangs, returns another type or too
much) is its failure, never the node's. Breaking the contract is not retried; failing is.
An asynchronous function runs in a task of its own, a synchronous one in a thread; what hangs is
abandoned, not waited for, and no exit or cancellation of its making reaches the node. So many
threads may hang at most; from then on no call begins that needs one, until one of them ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import json
import random
import re
import sysconfig
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path, PurePath
from typing import Any, Protocol

from orbit import tracing
from orbit.endpoints import without_query
from orbit.errors import (
    LeaseLost,
    NamespaceHalted,
    NotHere,
    OrbitError,
    PayloadTooLarge,
    StepFailed,
)
from orbit.execution.context import ExecutionContext, Stage, Step
from orbit.execution.http1 import Client
from orbit.execution.lapse import LAPSED, Hold
from orbit.execution.plugin import resolve
from orbit.execution.recorder import StepRecord
from orbit.execution.retry import full_jitter
from orbit.execution.tenure import Tenure
from orbit.payload import DEFAULT_CONTENT_TYPE, Payload
from orbit.vocabulary import printable

_ERROR_CHARACTERS = 2000
_QUERY = re.compile(r"(?<=\S)\?[^\s'\"]+")  # the client's errors name URLs, and keys with them
_abandoned: set[asyncio.Task[Any]] = set()  # the loop itself would not keep them
_MAX_HANGING = 128
_hanging: set[threading.Thread] = set()
_OURS = Path(__file__).parents[1]
_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
_PLACE_CHARACTERS = 200
_LONGEST_NAP_SECONDS = 0.25  # a halt is noticed so soon between two attempts


class ContractBroken(Exception):
    """A step returned what it must not; calling it again would not help."""


class StepCall(Protocol):
    """One attempt of a step: gets the context of this attempt, gives the step's result."""

    def __call__(self, context: ExecutionContext) -> Awaitable[Any]: ...


class Transformer:
    """Runs steps with their retries and keeps what each call came to.

    Args:
        max_payload_bytes: a larger result is refused.
        draw: the source of chance for retry delays, in [0, 1).
        tenure: what knows whether a cycle may go on here; all may if it is not given.
    """

    def __init__(
        self,
        http: Client,
        max_payload_bytes: int,
        draw: Callable[[], float] = random.random,
        tenure: Tenure | None = None,
    ) -> None:
        self._http, self._max_payload_bytes, self._draw = http, max_payload_bytes, draw
        self._tenure = tenure

    def check_halted(self, namespace: str) -> None:
        """Raises NamespaceHalted if nothing more of the namespace's cycles may begin."""
        if self._tenure is not None:
            self._tenure.check_halted(namespace)

    async def transform(
        self, step: Step, payload: Payload, context: ExecutionContext, records: list[StepRecord]
    ) -> Payload:
        """The payload that the step makes of `payload`.

        Appends a record per call to `records`. Raises StepFailed after the last attempt, and
        NotHere if this node does not have the step's code.
        """

        async def call(context: ExecutionContext) -> Payload:
            if step.use == "http":
                return await self._post(step, payload, context)
            result = await invoke(step.use, payload, context)
            return self.checked([result], "a Payload")[0]

        result: Payload = await self.attempts(step, context, payload.size, call, records)
        return result

    async def initiate(
        self, step: Step, context: ExecutionContext, records: list[StepRecord]
    ) -> Payload:
        """The first payload of a cycle, as an injected initiator makes it."""

        async def call(context: ExecutionContext) -> Payload:
            result = await invoke(step.use, context)
            return self.checked([result], "a Payload")[0]

        result: Payload = await self.attempts(step, context, 0, call, records)
        return result

    async def attempts(
        self,
        step: Step,
        context: ExecutionContext,
        input_size: int,
        call: StepCall,
        records: list[StepRecord],
    ) -> Any:
        """Calls until it succeeds, or the attempts are spent: then StepFailed, with the reason."""
        for attempt in range(1, step.max_attempts + 1):
            await self._be_held(context)
            started = time.monotonic()
            name = step.use if step.url is None else f"http {without_query(step.url)}"
            with tracing.span(f"step {step.use}", _span_of(context, attempt)):
                where = _told(context, attempt, tracing.traceparent(context.traceparent))
                error, is_final, result = await _outcome(step, call, where)
                if error is not None and step.url is not None:
                    error = _QUERY.sub("?…", error)
            record = StepRecord(
                stage=Stage(context.stage),
                step=context.step,
                attempt=attempt,
                name=name,
                error=error,
                duration_seconds=time.monotonic() - started,
                input_size=input_size,
                output_size=_size(result),
            )
            records.append(record)
            if error is None:
                return result
            if is_final or attempt == step.max_attempts:
                raise StepFailed(
                    error, stage=context.stage, step=context.step, use=record.name, attempts=attempt
                )
            await self._rest(full_jitter(step.backoff, attempt, self._draw), context)
        raise AssertionError("a step has at least one attempt")

    async def _be_held(self, context: ExecutionContext) -> None:
        """Waits while the lease may be over: the heartbeat prolongs it, or cancels this."""
        self.check_halted(context.namespace)
        while self._tenure is not None and self._tenure.seconds_left(context.cycle_id) <= 0:
            await asyncio.sleep(_LONGEST_NAP_SECONDS)
            self.check_halted(context.namespace)

    async def _rest(self, seconds: float, context: ExecutionContext) -> None:
        """Waits for the next attempt, if there may be one."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.check_halted(context.namespace)
            await asyncio.sleep(min(left, _LONGEST_NAP_SECONDS))

    def checked(self, values: Sequence[Any], expected: str) -> list[Payload]:
        """The values, if all are payloads and none is too large."""
        for value in values:
            if not isinstance(value, Payload):
                raise ContractBroken(f"returned {type(value).__name__}, expected {expected}")
            if value.size > self._max_payload_bytes:
                raise PayloadTooLarge(
                    f"returned {value.size:,} bytes, at most {self._max_payload_bytes:,} "
                    "are accepted (ORBIT_MAX_PAYLOAD_BYTES)"
                )
        return list(values)

    async def _post(self, step: Step, payload: Payload, context: ExecutionContext) -> Payload:
        status, content, content_type = await self._send(step, payload, context)
        return payload if status == 204 else Payload(content, content_type)

    async def post_json(self, step: Step, body: Any, context: ExecutionContext) -> Any:
        """An HTTP step that speaks JSON: the parsed answer of status 200."""
        question = Payload(json.dumps(body).encode(), "application/json")
        status, content, _ = await self._send(step, question, context)
        if status != 200:
            raise RuntimeError(f"answered {_phrase(status)}")
        return Payload(content).json()

    async def _send(
        self, step: Step, payload: Payload, context: ExecutionContext
    ) -> tuple[int, bytes, str]:
        """Status (200 or 204), body and content type; the caller's time limit bounds it.

        Its first byte leaves only if the cycle may still go on here, the rest while it is ours.
        """
        refusals: list[OrbitError] = []
        found = await self._http.exchange(
            "POST",
            step.url or "",
            {"Content-Type": payload.content_type, **step_headers(context)},
            payload.content,
            timeout_seconds=None,
            read_bytes=self._max_payload_bytes,
            hold=self._hold(context, refusals),
        )
        if refusals:
            raise refusals[0]
        if found.status is not None and found.status not in (200, 204):
            raise RuntimeError(f"answered {_phrase(found.status)}")
        if found.is_truncated:
            raise PayloadTooLarge(
                f"answered more than {self._max_payload_bytes:,} bytes (ORBIT_MAX_PAYLOAD_BYTES)"
            )
        if found.cause == LAPSED:
            raise LeaseLost(f"{found.error} (cycle {context.cycle_id})")
        if found.status is None or found.cause is not None:
            raise RuntimeError(f"{found.cause}: {found.error}")
        content_type = found.headers.get("content-type", DEFAULT_CONTENT_TYPE)
        return found.status, found.body, content_type

    def _hold(self, context: ExecutionContext, refusals: list[OrbitError]) -> Hold | None:
        """The right to send for the cycle; why it is refused is added to `refusals`."""
        tenure = self._tenure
        if tenure is None:
            return None

        def may_begin() -> bool:
            try:
                tenure.check(context.namespace, context.cycle_id)
            except (LeaseLost, NamespaceHalted) as refusal:
                refusals.append(refusal)
            return not refusals

        return Hold(may_begin, lambda: tenure.seconds_left(context.cycle_id))


def _span_of(context: ExecutionContext, attempt: int) -> tracing.Attributes:
    return {"orbit.stage": context.stage, "orbit.step": context.step, "orbit.attempt": attempt}


def _told(context: ExecutionContext, attempt: int, traceparent: str) -> ExecutionContext:
    if attempt == 1 and traceparent is context.traceparent:
        return context
    return replace(context, attempt=attempt, traceparent=traceparent)


def _phrase(status: int) -> str:
    with contextlib.suppress(ValueError):
        return f"{status} {HTTPStatus(status).phrase}"
    return str(status)


def step_headers(context: ExecutionContext) -> Mapping[str, str]:
    """What an HTTP step is told beside the payload."""
    headers = {
        "Idempotency-Key": context.idempotency_key,
        "Orbit-Namespace": context.namespace,
        "Orbit-Profile-Id": context.profile_id,
        "Orbit-Run-Profile-Id": context.run_profile_id,
        "Orbit-Cycle-Run-Id": context.cycle_id,
        "Orbit-Stage": context.stage,
        "Orbit-Attempt": str(context.attempt),
        "traceparent": context.traceparent,
    }
    return {name: value for name, value in headers.items() if value}


async def invoke(use: str, *arguments: Any) -> Any:
    """Calls a plug-in: in a task of its own if it is async, else in a thread of its own."""
    function = _resolved(use)
    if _is_async(function):
        return await _in_task(function(*arguments))
    result = await in_thread(functools.partial(function, *arguments))
    return await _in_task(result) if inspect.isawaitable(result) else result


_resolved = functools.cache(resolve)  # what cannot be resolved is tried again each time


@functools.cache
def _is_async(function: Callable[..., Any]) -> bool:
    call = getattr(function, "__call__", function)  # noqa: B004 - an object with async __call__
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def abandoned_steps() -> int:
    """How many async steps go on although they were cancelled; no loop can be closed then."""
    return len(_abandoned)


async def _in_task(awaitable: Awaitable[Any]) -> Any:
    """A task of its own: one that ignores its cancellation must not hold up the cycle."""
    task = asyncio.create_task(_contained(awaitable))
    try:
        result, error = await asyncio.shield(task)
    except asyncio.CancelledError:
        _abandoned.add(task)
        task.add_done_callback(_abandoned.discard)
        task.cancel()
        raise
    if error is not None:
        raise error
    return result


async def _contained(awaitable: Awaitable[Any]) -> tuple[Any, Exception | None]:
    try:
        return await awaitable, None
    except BaseException as error:  # noqa: BLE001 - an exit is the step's failure, not the node's
        return None, _as_exception(error)


async def in_thread(function: Callable[[], Any]) -> Any:
    """A thread of its own and not of a pool: one that hangs must not starve the others."""
    _refuse_too_many()
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: Exception | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def run() -> None:
        try:
            outcome: tuple[Any, Exception | None] = function(), None
        except BaseException as error:  # noqa: BLE001 - whatever it raises is the step's failure
            outcome = None, _as_exception(error)
        with contextlib.suppress(RuntimeError):  # the loop is closed: the step was abandoned
            loop.call_soon_threadsafe(settle, *outcome)

    within = contextvars.copy_context()  # so the spans of the step's own belong to its span
    thread = threading.Thread(target=within.run, args=(run,), name="orbit-step", daemon=True)
    thread.start()
    try:
        return await future
    except asyncio.CancelledError:
        _hanging.add(thread)
        raise


def _refuse_too_many() -> None:
    _hanging.difference_update([thread for thread in _hanging if not thread.is_alive()])
    if len(_hanging) >= _MAX_HANGING:
        raise RuntimeError(
            f"was not called: {len(_hanging)} earlier calls of steps still hang in their threads"
        )


def _as_exception(error: BaseException) -> Exception:
    """The error, if a future can carry it and nothing takes it for a request to stop."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    carried = RuntimeError(f"raised {type(error).__name__}: {_said(error)}".rstrip(": "))
    return carried.with_traceback(error.__traceback__)


async def _outcome(
    step: Step, call: StepCall, context: ExecutionContext
) -> tuple[str | None, bool, Any]:
    """The error (None if there is none), whether it is final, and the result."""
    limit = asyncio.timeout(step.timeout_seconds)
    try:
        async with limit:
            return None, False, await call(context)
    except TimeoutError as error:
        if limit.expired():
            tracing.note(is_failed=True, error=type(error).__name__)
            return f"took longer than {step.timeout_seconds:g} s", False, None
        return _told_of(error, _place(step, error)), False, None
    except (NotHere, LeaseLost, NamespaceHalted):
        raise
    except (ContractBroken, PayloadTooLarge) as error:
        return _told_of(error), True, None
    except Exception as error:  # noqa: BLE001 - a step may raise anything
        return _told_of(error, _place(step, error)), False, None


def _told_of(error: Exception, place: str = "") -> str:
    """Its description; a trace leaves the house, and gets no text that may hold a payload."""
    tracing.note(is_failed=True, error=type(error).__name__ + place)
    return _described(error, place)


def _place(step: Step, error: Exception) -> str:
    """` (file:line in function)` of the user's innermost frame; empty if there is none."""
    if step.url is not None:
        return ""
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        if _is_users(code.co_filename):
            place = f"{PurePath(code.co_filename).name}:{line} in {code.co_name}"
    return printable(f" ({place[:_PLACE_CHARACTERS]})") if place else ""


@functools.lru_cache(maxsize=1024)
def _is_users(file: str) -> bool:
    path = PurePath(file)
    if file.startswith("<frozen ") or path.is_relative_to(_OURS):
        return False
    is_installed = bool({"site-packages", "dist-packages"} & set(path.parts))
    return is_installed or not path.is_relative_to(_STANDARD_LIBRARY)


def _described(error: Exception, place: str = "") -> str:
    """One line that every table and log can take, with the place in the user's code."""
    text = _said(error)
    if not isinstance(error, (OrbitError, RuntimeError, ContractBroken)):
        text = f"{type(error).__name__}: {text}".rstrip(": ")
    text = printable((text or type(error).__name__)[:_ERROR_CHARACTERS])
    return text[: _ERROR_CHARACTERS - len(place)] + place


def _said(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - the error is a step's own, and so is its __str__
        return "(its text cannot be had)"


def _size(result: Any) -> int | None:
    if isinstance(result, Payload):
        return result.size
    if isinstance(result, (list, tuple)):
        sizes: list[int] = [payload.size for payload in result]
        return sum(sizes)
    return None
