"""Injected code in every form that it may take, and in every way that it can go wrong.

Whatever a step does ends in a cycle that finished or failed with the reason; it never takes the
node or another cycle with it. The steps are the functions of this module.
"""

# ruff: noqa: D101, D103 - the steps are what a user would write; their names say what they do

from __future__ import annotations

import asyncio
import base64
import json
import re
import sys
import threading
import tracemalloc
import types
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import psycopg
import pytest
from aiohttp import web
from structlog.testing import capture_logs

from orbit.app import Node
from orbit.errors import IdempotencyKeyReused, NotFound, NotRerunnable
from orbit.execution.context import ExecutionContext
from orbit.execution.initiation import Accepted
from orbit.payload import Payload
from tests.scenario.conftest import (
    Arrival,
    Configure,
    Facts,
    MakeNode,
    Receiver,
    ended,
    policy,
    profile,
    run,
    run_profile,
    send,
    until,
)

MIB = 1 << 20
HERE = __name__
calls: dict[str, list[ExecutionContext]] = defaultdict(list)
released = threading.Event()


@pytest.fixture(autouse=True)
async def _forget() -> AsyncIterator[None]:
    """Async, so that what hangs is released before the loop waits for its end."""
    calls.clear()
    released.clear()
    yield
    released.set()


def step(function: Callable[..., Any], **given: Any) -> dict[str, Any]:
    """A step of this module, as a file has it."""
    return {"use": f"{HERE}:{function.__name__}", **given}


# --- steps that work ----------------------------------------------------------------------


async def shout(payload: Payload, context: ExecutionContext) -> Payload:
    calls["shout"].append(context)
    return Payload(payload.content.upper() + b"!", "text/plain")


def reverse(payload: Payload, context: ExecutionContext) -> Payload:
    calls[f"reverse in {threading.current_thread().name}"].append(context)
    return Payload(payload.content[::-1], payload.content_type)


class Appender:
    """A step with a setting of its own."""

    def __init__(self, text: bytes) -> None:
        self.text = text

    async def __call__(self, payload: Payload, context: ExecutionContext) -> Payload:
        return Payload(payload.content + self.text, payload.content_type)


append = Appender(b"+object")


def wrapped(payload: Payload, context: ExecutionContext) -> Any:
    """What a decorator makes of an async step: a sync function that gives a coroutine."""
    return shout(payload, context)


def begin(context: ExecutionContext) -> Payload:
    calls["begin"].append(context)
    return Payload(b"a,b,c,d,e", "text/csv")


def cut(payload: Payload, context: ExecutionContext) -> Iterator[Payload]:
    for piece in payload.content.split(b","):
        yield Payload(piece, payload.content_type)


async def number(batch: Sequence[Payload], context: ExecutionContext) -> list[Payload]:
    calls["number"].append(context)
    size = str(len(batch)).encode()
    return [Payload(one.content + b"/" + size, one.content_type) for one in batch]


# --- steps that do not --------------------------------------------------------------------


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


async def raises(payload: Payload, context: ExecutionContext) -> Payload:
    calls["raises"].append(context)
    raise ValueError("the brief is empty")


async def raises_unspeakable(payload: Payload, context: ExecutionContext) -> Payload:
    raise Unspeakable


def raises_at_length(payload: Payload, context: ExecutionContext) -> Payload:
    raise ValueError("long\x00 \udc80 " + "x" * MIB)


async def cancels(payload: Payload, context: ExecutionContext) -> Payload:
    raise asyncio.CancelledError


async def cancels_itself(payload: Payload, context: ExecutionContext) -> Payload:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)
    return payload


async def exits(payload: Payload, context: ExecutionContext) -> Payload:
    sys.exit(3)


async def interrupts(payload: Payload, context: ExecutionContext) -> Payload:
    raise KeyboardInterrupt


def exits_in_thread(payload: Payload, context: ExecutionContext) -> Payload:
    sys.exit("enough")


def interrupts_in_thread(payload: Payload, context: ExecutionContext) -> Payload:
    raise KeyboardInterrupt


def stops_in_thread(payload: Payload, context: ExecutionContext) -> Payload:
    raise StopIteration


async def hangs(payload: Payload, context: ExecutionContext) -> Payload:
    await asyncio.Event().wait()
    return payload


async def hangs_stubbornly(payload: Payload, context: ExecutionContext) -> Payload:
    while not released.is_set():
        try:
            await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            calls["refused to be cancelled"].append(context)
    return payload


def hangs_in_thread(payload: Payload, context: ExecutionContext) -> Payload:
    released.wait()
    return payload


def held(payload: Payload, context: ExecutionContext) -> Payload:
    calls["held"].append(context)
    released.wait()
    return payload


async def returns_none(payload: Payload, context: ExecutionContext) -> None:
    calls["returns_none"].append(context)


def returns_text(payload: Payload, context: ExecutionContext) -> str:
    return "text"


async def returns_100_mb(payload: Payload, context: ExecutionContext) -> Payload:
    return Payload(bytes(100 * MIB))


def makes_bad_payload(payload: Payload, context: ExecutionContext) -> Payload:
    return Payload("text")  # type: ignore[arg-type]


async def takes_less_than_it_says(*given: Payload) -> Payload:
    return await returns_its(*given)


async def returns_its(payload: Payload) -> Payload:
    return payload


# --- what a step may be -------------------------------------------------------------------


async def test_every_kind_of_step_makes_its_payload(
    configure: Configure, make_node: MakeNode, receiver: Receiver
) -> None:
    """Async, sync, object, wrapped and built-in steps pass the payload on, tier after tier."""
    tiers = policy(
        initiation=step(begin),
        tier1=[step(shout), step(reverse)],
        tier2=["orbit:no_op", f"{HERE}:append"],
        tier3=[step(wrapped)],
    )
    configure(run_profile(execution_policy=tiers))
    node = await make_node(dispatch_endpoints=(receiver.endpoint("out"),))
    assert (await run(node))["state"] == "finished"
    [arrival] = receiver.arrivals
    assert arrival.body == b"!E,D,C,B,A+OBJECT!"
    assert arrival.headers["Content-Type"] == "text/plain"
    assert "reverse in orbit-step" in calls, "a sync step runs in a thread of its own"


async def test_an_entry_point_is_a_step(
    configure: Configure,
    make_node: MakeNode,
    receiver: Receiver,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A name of the group orbit.steps, of an installed distribution, is found and called."""
    package = tmp_path / "site" / "shouting-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: shouting\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(f"[orbit.steps]\nshouting = {HERE}:shout\n")
    monkeypatch.syspath_prepend(str(package.parent))
    configure(run_profile(execution_policy=policy(initiation=step(begin), tier2=["shouting"])))
    node = await make_node(dispatch_endpoints=(receiver.endpoint("out"),))
    assert (await run(node))["state"] == "finished"
    assert receiver.arrivals[0].body == b"A,B,C,D,E!"


async def test_a_splitter_and_a_normaliser_make_items_in_batches(
    configure: Configure, make_node: MakeNode, receiver: Receiver, facts: Facts
) -> None:
    """Five pieces in batches of two become five items in order, each sent once."""
    normalization = step(number, split=f"{HERE}:cut", batch_size=2)
    configure(
        run_profile(execution_policy=policy(initiation=step(begin), normalization=normalization))
    )
    node = await make_node(dispatch_endpoints=(receiver.endpoint("out"),))
    assert (await run(node))["detail"]["items"] == 5
    assert sorted(one.body for one in receiver.arrivals) == [b"a/2", b"b/2", b"c/2", b"d/2", b"e/1"]
    keys = [context.idempotency_key for context in calls["number"]]
    assert len(keys) == len(set(keys)) == 3, "each batch has a key of its own"
    records = facts(
        "SELECT step, attempt, outcome, input_size, output_size FROM execution_record "
        "WHERE stage = 'normalization_complete' ORDER BY step, name"
    )
    assert [(one["input_size"], one["output_size"]) for one in records] == [
        (9, 5), (2, 6), (2, 6), (1, 3)
    ]  # fmt: skip


async def test_an_instruction_and_options_reach_every_step(
    configure: Configure, make_node: MakeNode, receiver: Receiver
) -> None:
    """A step is told who it works for: profile, run profile, options, cycle and trace."""
    configure(
        run_profile(
            execution_policy=policy(tier1=[step(shout, options={"voice": "loud"})]),
            asset_bundle={"logo": "n.svg"},
            value_tags={"team": "red", "cost": 2},
        ),
        profiles=[profile(style_vector={"warmth": 0.5}, value_tags={"team": "blue", "x": True})],
    )
    node = await make_node(dispatch_endpoints=(receiver.endpoint("out"),))
    cycle = await run(node)
    [context] = calls["shout"]
    assert context.options == {"voice": "loud"}
    assert context.instruction == {
        "profile_id": "nova",
        "run_profile_id": "daily",
        "namespace": "brand",
        "label": "nova",
        "style_vector": {"warmth": 0.5},
        "asset_bindings": {},
        "execution_rules": {},
        "distribution_map": {},
        "asset_bundle": {"logo": "n.svg"},
        "distribution_targets": ["out"],
        "value_tags": {"team": "red", "cost": 2, "x": True},
    }
    assert (context.namespace, context.profile_id) == ("brand", "nova")
    assert (context.cycle_id, context.run_profile_id) == (cycle["cycle_id"], "daily")
    assert (context.stage, context.step, context.attempt) == ("tier1_complete", 0, 1)
    assert context.slot_at is None
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", context.traceparent)


# --- steps over HTTP ----------------------------------------------------------------------


def http(receiver: Receiver, path: str, **given: Any) -> dict[str, Any]:
    return {"use": "http", "url": receiver.url + path, **given}


async def test_an_http_step_answers_with_the_new_payload(
    configure: Configure, make_node: MakeNode, receiver: Receiver
) -> None:
    """200 is the new payload with its type, 204 leaves it as it was; the headers say who asks."""

    async def enrich(arrival: Arrival) -> web.Response:
        return web.Response(body=arrival.body + b",f", content_type="text/x-csv", charset="ascii")

    async def nothing(arrival: Arrival) -> web.Response:
        return web.Response(status=204)

    receiver.answers = {"/enrich": enrich, "/look": nothing}
    tiers = policy(
        initiation=step(begin), tier1=[http(receiver, "/enrich")], tier2=[http(receiver, "/look")]
    )
    configure(run_profile(execution_policy=tiers))
    node = await make_node(dispatch_endpoints=(receiver.endpoint("out"),))
    cycle = await run(node)
    [asked], [looked], [out] = map(receiver.at, ("/enrich", "/look", "/out"))
    assert asked.body == b"a,b,c,d,e"
    assert looked.body == out.body == b"a,b,c,d,e,f"
    assert out.headers["Content-Type"] == "text/x-csv; charset=ascii"
    sent = {name: asked.headers[name] for name in ("Content-Type", "Orbit-Namespace")}
    assert sent == {"Content-Type": "text/csv", "Orbit-Namespace": "brand"}
    assert asked.headers["Orbit-Profile-Id"] == "nova"
    assert asked.headers["Orbit-Run-Profile-Id"] == "daily"
    assert asked.headers["Orbit-Cycle-Run-Id"] == cycle["cycle_id"]
    assert asked.headers["Orbit-Stage"] == "tier1_complete"
    assert asked.headers["Idempotency-Key"] == f"{cycle['cycle_id']}:tier1_complete:0"
    assert asked.headers["traceparent"].split("-")[1] == out.headers["traceparent"].split("-")[1]


async def test_an_http_step_is_tried_again_under_the_same_key(
    configure: Configure, make_node: MakeNode, receiver: Receiver, facts: Facts
) -> None:
    """Two answers of 500 and then 200: three calls with one key, three records."""

    async def fails_twice(arrival: Arrival) -> web.Response:
        is_last = len(receiver.at("/flaky")) == 3
        return web.Response(body=b"done") if is_last else web.Response(status=500)

    receiver.answers["/flaky"] = fails_twice
    tiers = policy(tier1=[http(receiver, "/flaky", retry={"max_attempts": 3})])
    configure(run_profile(execution_policy=tiers))
    node = await make_node(dispatch_endpoints=(receiver.endpoint("out"),))
    assert (await run(node))["state"] == "finished"
    arrivals = receiver.at("/flaky")
    assert len({one.headers["Idempotency-Key"] for one in arrivals}) == 1
    assert [one.headers["Orbit-Attempt"] for one in arrivals] == ["1", "2", "3"]
    records = facts("SELECT attempt, outcome, error, name FROM execution_record ORDER BY attempt")
    assert [(one["attempt"], one["outcome"]) for one in records] == [
        (1, "failed"), (2, "failed"), (3, "succeeded")
    ]  # fmt: skip
    assert records[0]["error"] == "answered 500 Internal Server Error"
    assert records[0]["name"] == f"http {receiver.url}/flaky"


async def redirects(arrival: Arrival) -> web.Response:
    return web.Response(status=307, headers={"Location": "/elsewhere"})


async def never_answers(arrival: Arrival) -> web.Response:
    await asyncio.Event().wait()
    return web.Response()


async def answers_without_end(arrival: Arrival) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(arrival.request)
    await response.write(b"begin")
    await asyncio.Event().wait()
    return response


async def answers_100_mb(arrival: Arrival) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(arrival.request)
    for _ in range(100):
        await response.write(bytes(MIB))
    return response


async def answers_bad_type(arrival: Arrival) -> web.Response:
    return web.Response(body=b"x", headers={"Content-Type": "text/" + "x" * 300})


async def test_a_key_in_an_http_steps_url_is_not_shown(
    configure: Configure, make_node: MakeNode, facts: Facts
) -> None:
    """The step is called with its query; records, reasons and errors are without it."""
    asked: list[bytes] = []

    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        writer.write(b"this is no HTTP\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(babble, "127.0.0.1", 0) as server:
        address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/do"
        one = {"use": "http", "url": f"{address}?key=hush"}
        configure(run_profile(execution_policy=policy(tier1=[one]), distribution_targets=[]))
        cycle = await run(await make_node())
    assert asked[0].startswith(b"POST /do?key=hush ")
    assert cycle["detail"]["use"] == f"http {address}?…"
    assert cycle["detail"]["reason"].startswith("answer not understood: ")
    assert "hush" not in cycle["detail"]["reason"]
    [record] = facts("SELECT name, error FROM execution_record")
    assert record == {"name": f"http {address}?…", "error": cycle["detail"]["reason"]}


BAD_ANSWERS = [
    (redirects, 20, "answered 307 Temporary Redirect"),
    (never_answers, 0.3, "took longer than 0.3 s"),
    (answers_without_end, 0.3, "took longer than 0.3 s"),
    (answers_bad_type, 20, "content type is 1 to 255 visible ASCII"),
]


async def test_an_http_step_that_misbehaves_fails_its_cycle(
    configure: Configure, make_node: MakeNode, receiver: Receiver
) -> None:
    """A redirect is not followed, a hang is cut off, and what is no payload is refused."""
    receiver.answers = {f"/{answer.__name__}": answer for answer, *_ in BAD_ANSWERS}
    steps = {
        answer.__name__: http(receiver, f"/{answer.__name__}", timeout_seconds=seconds)
        for answer, seconds, _ in BAD_ANSWERS
    }
    configure(
        *(run_profile(name, execution_policy=policy(tier1=[one])) for name, one in steps.items())
    )
    node = await make_node(dispatch_endpoints=(receiver.endpoint("out"),))
    for answer, _, reason in BAD_ANSWERS:
        cycle = await run(node, answer.__name__)
        assert cycle["state"] == "failed"
        assert reason in cycle["detail"]["reason"]
    assert not receiver.at("/elsewhere")
    assert not receiver.at("/out")


async def test_an_answer_of_100_mb_is_refused_as_soon_as_it_is_too_large(
    configure: Configure, make_node: MakeNode, receiver: Receiver
) -> None:
    """The node stops reading at the limit: it never holds more than a few times as much."""
    receiver.answers["/huge"] = answers_100_mb
    configure(run_profile(execution_policy=policy(tier1=[http(receiver, "/huge")])))
    node = await make_node(
        dispatch_endpoints=(receiver.endpoint("out"),), max_payload_bytes=4 * MIB
    )
    tracemalloc.start()
    try:
        cycle = await run(node)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "answered more than 4,194,304 bytes" in cycle["detail"]["reason"]
    assert cycle["detail"]["attempts"] == 1, "it would only be as large again"
    assert peak < 20 * MIB


async def test_an_http_normaliser_answers_with_items(
    configure: Configure, make_node: MakeNode, receiver: Receiver
) -> None:
    """Batches go out and items come back as lists of contentBase64 and contentType."""

    async def normalise(arrival: Arrival) -> web.Response:
        payloads = json.loads(arrival.body)["payloads"]
        texts = [base64.b64decode(one["contentBase64"]) for one in payloads]
        assert {one["contentType"] for one in payloads} == {"text/csv"}
        items = [{"contentBase64": base64.b64encode(text * 2).decode()} for text in texts]
        return web.json_response({"items": items})

    receiver.answers["/items"] = normalise
    normalization = http(receiver, "/items", split=f"{HERE}:cut", batch_size=3)
    configure(
        run_profile(execution_policy=policy(initiation=step(begin), normalization=normalization))
    )
    node = await make_node(dispatch_endpoints=(receiver.endpoint("out"),))
    assert (await run(node))["state"] == "finished"
    assert len(receiver.at("/items")) == 2
    assert sorted(one.body for one in receiver.at("/out")) == [b"aa", b"bb", b"cc", b"dd", b"ee"]
    assert {one.headers["Content-Type"] for one in receiver.at("/out")} == {
        "application/octet-stream"
    }


async def test_an_http_normaliser_with_other_content_fails_its_cycle(
    configure: Configure, make_node: MakeNode, receiver: Receiver
) -> None:
    """What is not the agreed JSON makes no item; the cycle says so."""
    bodies = [b"[]", b'{"items": [{"contentBase64": "%%"}]}', b"not json"]

    async def answer(arrival: Arrival) -> web.Response:
        body = bodies[len(receiver.at("/items")) - 1]
        return web.Response(body=body, content_type="application/json")

    receiver.answers["/items"] = answer
    configure(run_profile(execution_policy=policy(normalization=http(receiver, "/items"))))
    node = await make_node(dispatch_endpoints=(receiver.endpoint("out"),))
    agreed = 'answered other than {"items": [{"contentBase64": …, "contentType": …}]}'
    for expected in (agreed, agreed, "JSONDecodeError"):
        cycle = await run(node)
        assert cycle["state"] == "failed"
        assert cycle["detail"]["stage"] == "normalization_complete"
        assert cycle["detail"]["reason"].startswith(expected)


# --- steps that go wrong ------------------------------------------------------------------


BAD_STEPS: list[tuple[Any, str]] = [
    (raises, "ValueError: the brief is empty"),
    (raises_unspeakable, "Unspeakable"),
    (raises_at_length, "ValueError: long"),
    (cancels, "CancelledError"),
    (cancels_itself, "CancelledError"),
    (exits, "raised SystemExit: 3"),
    (interrupts, "raised KeyboardInterrupt"),
    (exits_in_thread, "raised SystemExit: enough"),
    (interrupts_in_thread, "raised KeyboardInterrupt"),
    (stops_in_thread, "raised StopIteration"),
    (hangs, "took longer than 0.5 s"),
    (hangs_stubbornly, "took longer than 0.5 s"),
    (hangs_in_thread, "took longer than 0.5 s"),
    (returns_none, "returned NoneType, expected a Payload"),
    (returns_text, "returned str, expected a Payload"),
    (returns_100_mb, "returned 104,857,600 bytes, at most 10,485,760 are accepted"),
    (makes_bad_payload, "a payload's content is bytes, not str"),
    (takes_less_than_it_says, "TypeError"),
]


async def test_whatever_a_step_does_wrong_is_its_cycles_failure(
    configure: Configure, make_node: MakeNode, receiver: Receiver, facts: Facts
) -> None:
    """All at once on one node: each fails its cycle with reason, stage and step, and no other."""
    hanging = {hangs, hangs_stubbornly, hangs_in_thread}
    tiers = {
        bad.__name__: policy(
            tier1=[step(shout)],
            tier2=["orbit:no_op", step(bad, timeout_seconds=0.5 if bad in hanging else 20)],
        )
        for bad, _ in BAD_STEPS
    }
    configure(
        *(run_profile(name, execution_policy=given) for name, given in tiers.items()),
        run_profile("good", execution_policy=policy(tier1=[step(shout)])),
    )
    node = await make_node(dispatch_endpoints=(receiver.endpoint("out"),))
    answers = await node.orchestration.trigger_run_profiles()
    cycles = {one.run_profile_id: await ended(node, one.cycle_id or "") for one in answers}
    assert cycles["good"]["state"] == "finished"
    assert len(receiver.arrivals) == 1
    for bad, reason in BAD_STEPS:
        cycle = cycles[bad.__name__]
        assert (cycle["state"], cycle["stage"]) == ("failed", "cycle_failed"), bad
        detail = cycle["detail"]
        assert reason in detail["reason"]
        assert len(detail["reason"]) <= 2000
        assert detail["reason"].isprintable()
        assert (detail["stage"], detail["step"]) == ("tier2_complete", 1)
        assert detail["use"] == f"{HERE}:{bad.__name__}"
        [record] = facts(
            "SELECT error FROM execution_record WHERE outcome = 'failed' AND cycle_id = %s",
            cycle["cycle_id"],
        )
        assert record["error"] == detail["reason"]
    entries = facts("SELECT state, jobs, count(*) FROM value_ledger_entry GROUP BY 1, 2 ORDER BY 1")
    assert entries == [
        {"state": "failed", "jobs": 0, "count": len(BAD_STEPS)},
        {"state": "finished", "jobs": 1, "count": 1},
    ]
    assert (await run(node, "good"))["state"] == "finished", "the node goes on"


def cut_and_exit(payload: Payload, context: ExecutionContext) -> Iterator[Payload]:
    yield payload
    sys.exit("in the middle")


def cut_and_hang(payload: Payload, context: ExecutionContext) -> Iterator[Payload]:
    yield payload
    released.wait()


def cut_for_ever(payload: Payload, context: ExecutionContext) -> Iterator[Payload]:
    while True:
        yield payload


def cut_texts(payload: Payload, context: ExecutionContext) -> list[str]:
    return ["text"]


def cut_nothing(payload: Payload, context: ExecutionContext) -> None:
    return None


async def make_many(batch: Sequence[Payload], context: ExecutionContext) -> list[Payload]:
    return list(batch) * 11


async def make_generator(
    batch: Sequence[Payload], context: ExecutionContext
) -> AsyncIterator[Payload]:
    for payload in batch:
        yield payload


BAD_NORMALISERS: list[tuple[dict[str, Any], str]] = [
    ({"split": f"{HERE}:cut_and_exit"}, "raised SystemExit: in the middle"),
    ({"split": f"{HERE}:cut_and_hang", "timeout_seconds": 0.5}, "took longer than 0.5 s"),
    ({"split": f"{HERE}:cut_for_ever"}, "made more than 10 items (ORBIT_MAX_ITEMS_PER_CYCLE)"),
    ({"split": f"{HERE}:cut_texts"}, "returned str, expected Payloads"),
    ({"split": f"{HERE}:cut_nothing"}, "returned NoneType, expected Payloads"),
    ({"use": f"{HERE}:make_many"}, "made more than 10 items (ORBIT_MAX_ITEMS_PER_CYCLE)"),
    ({"use": f"{HERE}:make_generator"}, "returned async_generator, expected a list"),
    ({"use": f"{HERE}:returns_none"}, "returned NoneType, expected a list of Payloads"),
]


async def test_whatever_a_normaliser_does_wrong_makes_no_item(
    configure: Configure, make_node: MakeNode, receiver: Receiver, facts: Facts
) -> None:
    """Each cycle fails at normalisation with the reason; no item, no job, nothing sent."""
    given = [{"use": "orbit:no_op", **bad} for bad, _ in BAD_NORMALISERS]
    configure(
        *(
            run_profile(f"rp-{number}", execution_policy=policy(normalization=one))
            for number, one in enumerate(given)
        )
    )
    node = await make_node(dispatch_endpoints=(receiver.endpoint("out"),), max_items_per_cycle=10)
    answers = await node.orchestration.trigger_run_profiles()
    assert len(answers) == len(BAD_NORMALISERS)
    for answer, (_, reason) in zip(answers, BAD_NORMALISERS, strict=True):
        cycle = await ended(node, answer.cycle_id or "")
        assert cycle["state"] == "failed"
        assert reason in cycle["detail"]["reason"]
        assert cycle["detail"]["stage"] == "normalization_complete"
    assert facts("SELECT count(*) FROM normalized_item") == [{"count": 0}]
    assert facts("SELECT count(*) FROM dispatch_job") == [{"count": 0}]


async def test_a_module_that_vanished_after_the_configuration_was_read(
    configure: Configure,
    make_node: MakeNode,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another node may have it, so the cycle is given back; at the bound it fails, naming it."""
    module = types.ModuleType("vanishing_steps")
    module.shout = shout  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vanishing_steps", module)
    tiers = policy(tier1=[{"use": "vanishing_steps:shout", "retry": {"max_attempts": 5}}])
    configure(run_profile(execution_policy=tiers))
    node = await make_node(
        dispatch_endpoints=(receiver.endpoint("out"),), max_cycle_recoveries=1, lease_seconds=5
    )
    monkeypatch.delitem(sys.modules, "vanishing_steps")
    cycle = await run(node)
    assert cycle["detail"]["reason"] == (
        "there is no module vanishing_steps on the import path "
        "(given up after 2 tries in a row at this point; ORBIT_MAX_CYCLE_RECOVERIES)"
    )
    assert cycle["detail"]["attempts"] == 2


async def test_a_failing_step_is_called_as_often_as_it_may_be(
    configure: Configure, make_node: MakeNode, receiver: Receiver, facts: Facts
) -> None:
    """Four attempts, one key, four records, and delays that grow between them."""
    retry = {"max_attempts": 4, "base_seconds": 0.05, "factor": 2, "cap_seconds": 0.1}
    configure(run_profile(execution_policy=policy(tier3=[step(raises, retry=retry)])))
    node = await make_node(dispatch_endpoints=(receiver.endpoint("out"),))
    cycle = await run(node)
    assert cycle["detail"]["attempts"] == 4
    assert [context.attempt for context in calls["raises"]] == [1, 2, 3, 4]
    key = f"{cycle['cycle_id']}:tier3_complete:0"
    assert {context.idempotency_key for context in calls["raises"]} == {key}
    records = facts("SELECT attempt, outcome FROM execution_record ORDER BY attempt")
    assert [one["attempt"] for one in records] == [1, 2, 3, 4]
    assert {one["outcome"] for one in records} == {"failed"}


async def test_a_broken_contract_is_not_tried_again(
    configure: Configure, make_node: MakeNode, receiver: Receiver
) -> None:
    """A step that returns another type would do so each time."""
    retry = {"max_attempts": 4}
    configure(run_profile(execution_policy=policy(tier1=[step(returns_none, retry=retry)])))
    node = await make_node(dispatch_endpoints=(receiver.endpoint("out"),))
    await run(node)
    assert len(calls["returns_none"]) == 1


async def test_a_stubborn_step_is_abandoned_and_its_result_ignored(
    configure: Configure, make_node: MakeNode, receiver: Receiver
) -> None:
    """A step that goes on after its time is up cannot change its cycle any more."""
    configure(
        run_profile(execution_policy=policy(tier1=[step(hangs_stubbornly, timeout_seconds=0.1)]))
    )
    node = await make_node(dispatch_endpoints=(receiver.endpoint("out"),))
    cycle = await run(node)
    await until(lambda: calls["refused to be cancelled"], "the step's refusal")
    released.set()
    assert await ended(node, cycle["cycle_id"]) == cycle
    assert not receiver.arrivals


# --- after a failure ----------------------------------------------------------------------


def _drop_payloads(owner_dsn: str) -> None:
    """What retention does to a fact: it drops the partitions."""
    with psycopg.connect(owner_dsn) as connection:
        connection.execute(
            "DO $$ DECLARE part text; BEGIN FOR part IN SELECT inhrelid::regclass::text "
            "FROM pg_inherits WHERE inhparent = 'payload'::regclass "
            "LOOP EXECUTE 'DROP TABLE ' || part; END LOOP; END $$"
        )


is_mended = False


async def fails_until_mended(payload: Payload, context: ExecutionContext) -> Payload:
    calls["fails_until_mended"].append(context)
    if not is_mended:
        raise RuntimeError("not yet")
    return payload


async def _failed_cycle(
    configure: Configure, make_node: MakeNode, receiver: Receiver
) -> tuple[Node, str]:
    tiers = policy(initiation=step(begin), tier1=[step(shout)], tier2=[step(fails_until_mended)])
    configure(run_profile(execution_policy=tiers))
    node = await make_node(dispatch_endpoints=(receiver.endpoint("out"),))
    cycle = await run(node)
    assert cycle["state"] == "failed"
    return node, cycle["cycle_id"]


@pytest.mark.parametrize(("is_from_start", "shouts"), [(False, 1), (True, 2)])
async def test_a_rerun_begins_at_the_failed_stage_or_at_the_start(
    configure: Configure,
    make_node: MakeNode,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
    facts: Facts,
    is_from_start: bool,
    shouts: int,
) -> None:
    """A new cycle names the old; earlier tiers are called again only if asked for."""
    node, failed = await _failed_cycle(configure, make_node, receiver)
    monkeypatch.setattr(sys.modules[HERE], "is_mended", True)
    accepted = await node.orchestration.rerun(failed, is_from_start=is_from_start)
    cycle = await ended(node, accepted.cycle_id)
    assert (cycle["state"], cycle["rerun_of"]) == ("finished", failed)
    assert len(calls["shout"]) == shouts
    assert len(calls["begin"]) == 1, "its first payload is that of the failed cycle"
    assert [one.body for one in receiver.arrivals] == [b"A,B,C,D,E!"]
    copied = facts(
        "SELECT stage FROM cycle_checkpoint WHERE cycle_id = %s AND detail ? 'copiedFrom'",
        accepted.cycle_id,
    )
    assert len(copied) == (1 if is_from_start else 2)


@pytest.mark.parametrize("is_from_start", [False, True])
async def test_a_cycle_whose_payload_retention_has_dropped_does_not_run_again(
    configure: Configure,
    make_node: MakeNode,
    receiver: Receiver,
    owner_dsn: str,
    is_from_start: bool,
) -> None:
    """A re-run without the old bytes would send others, so it is refused."""
    node, failed = await _failed_cycle(configure, make_node, receiver)
    _drop_payloads(owner_dsn)
    with pytest.raises(NotRerunnable, match="dropped by retention"):
        await node.orchestration.rerun(failed, is_from_start=is_from_start)


async def test_a_rerun_from_elsewhere_is_another_request(
    configure: Configure, make_node: MakeNode, receiver: Receiver
) -> None:
    """One Idempotency-Key cannot mean both the failed stage and the start."""
    node, failed = await _failed_cycle(configure, make_node, receiver)
    first = await node.orchestration.rerun(failed, idempotency_key="k")
    again = await node.orchestration.rerun(failed, idempotency_key="k")
    assert (again.cycle_id, again.is_new) == (first.cycle_id, False)
    with pytest.raises(IdempotencyKeyReused):
        await node.orchestration.rerun(failed, idempotency_key="k", is_from_start=True)


async def test_a_failed_rerun_runs_again_and_a_finished_one_ends_its_family(
    configure: Configure,
    make_node: MakeNode,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By its own id or the first one's until one has finished; then none of them, unless forced."""
    node, first = await _failed_cycle(configure, make_node, receiver)
    failed = [first]
    for asked in (0, 1, 0):
        accepted = await node.orchestration.rerun(failed[asked])
        assert (await ended(node, accepted.cycle_id))["state"] == "failed"
        failed.append(accepted.cycle_id)
    monkeypatch.setattr(sys.modules[HERE], "is_mended", True)
    good = await node.orchestration.rerun(failed[2])
    assert (await ended(node, good.cycle_id))["state"] == "finished"
    for one in failed:
        with pytest.raises(NotRerunnable, match=good.cycle_id):
            await node.orchestration.rerun(one)
    assert len(receiver.arrivals) == 1
    assert (await node.orchestration.rerun(first, is_forced=True)).is_new


async def test_reruns_at_once_are_one(
    configure: Configure,
    make_node: MakeNode,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
    facts: Facts,
) -> None:
    """Whoever comes second gets the first one's id or is refused; keys of their own do not help."""
    node, failed = await _failed_cycle(configure, make_node, receiver)
    monkeypatch.setattr(sys.modules[HERE], "is_mended", True)
    other = await make_node(dispatch_endpoints=(receiver.endpoint("out"),), is_started=False)
    keys = (None, "a", "b", None)
    answers = await asyncio.gather(
        *(
            one.orchestration.rerun(failed, idempotency_key=key)
            for one in (node, other)
            for key in keys
        ),
        return_exceptions=True,
    )
    accepted = [one for one in answers if not isinstance(one, BaseException)]
    assert all(isinstance(one, Accepted | NotRerunnable) for one in answers), answers
    assert len({one.cycle_id for one in accepted}) == 1
    assert sum(one.is_new for one in accepted) == 1
    assert len(facts("SELECT FROM cycle_run WHERE rerun_of = %s", failed)) == 1


async def test_only_a_failed_cycle_runs_again(
    configure: Configure, make_node: MakeNode, receiver: Receiver
) -> None:
    """A finished cycle and an unknown one are refused, with the reason."""
    configure()
    node = await make_node(dispatch_endpoints=(receiver.endpoint("out"),))
    cycle = await send(node, Payload(b"x"), endpoint_keys=["out"])
    with pytest.raises(NotRerunnable, match="is finished; only a failed one runs again"):
        await node.orchestration.rerun(cycle["cycle_id"])
    with pytest.raises(NotFound, match="there is no cycle"):
        await node.orchestration.rerun(node.node_id)


async def test_a_cycle_that_loses_every_worker_fails_at_a_bound(
    configure: Configure, make_node: MakeNode, receiver: Receiver, facts: Facts
) -> None:
    """What kills its workers is given up after the allowed takeovers, and says so."""
    configure(run_profile(execution_policy=policy(tier1=[step(shout)])))
    node = await make_node(
        is_started=False,
        dispatch_endpoints=(receiver.endpoint("out"),),
        max_cycle_recoveries=3,
    )
    await node.configuration.propose(node.orchestration.read_files())
    [answer] = await node.orchestration.trigger_run_profiles()
    query = (
        "UPDATE cycle_lease SET recoveries = {}, lease_number = {}, node_id = %s, "
        "due_at = orbit_now() RETURNING cycle_id"
    )
    # Three workers were lost, and so is the fourth: the node that starts now is the fifth.
    facts(query.format(3, 4), node.node_id)
    await node.start()
    assert answer.cycle_id is not None
    cycle = await ended(node, answer.cycle_id)
    assert cycle["state"] == "failed"
    assert "its worker was lost 4 times in a row" in cycle["detail"]["reason"]
    assert not calls["shout"], "the fifth worker does not run what killed four"


async def test_an_outage_longer_than_a_lease_begins_nothing_anew(
    configure: Configure, make_node: MakeNode, receiver: Receiver, facts: Facts
) -> None:
    """A node that comes back to its cycle first goes on with it; no call is made twice."""
    configure(run_profile(execution_policy=policy(tier1=[step(held)])))
    node = await make_node(dispatch_endpoints=(receiver.endpoint("out"),))
    [answer] = await node.orchestration.trigger_run_profiles()
    assert answer.cycle_id is not None
    assert node.runner is not None
    await until(lambda: calls["held"], "the step")
    await node.runner.stop()
    facts("UPDATE cycle_lease SET due_at = orbit_now() - interval '1 s' RETURNING cycle_id")
    node.runner._tenure.drop(answer.cycle_id)
    await node.runner.run_once()
    released.set()
    cycle = await ended(node, answer.cycle_id)
    assert cycle["state"] == "finished"
    assert len(calls["held"]) == 1
    assert facts("SELECT recoveries FROM cycle_lease") == []


async def test_the_log_tells_of_a_takeover_and_why_the_cycle_failed(
    configure: Configure, make_node: MakeNode, receiver: Receiver, facts: Facts
) -> None:
    """A lost worker's cycle is named once; a failure with its run profile, stage, step, reason."""
    configure(run_profile(execution_policy=policy(tier2=[step(raises)])))
    node = await make_node(is_started=False, dispatch_endpoints=(receiver.endpoint("out"),))
    await node.configuration.propose(node.orchestration.read_files())
    [answer] = await node.orchestration.trigger_run_profiles()
    facts("UPDATE cycle_lease SET node_id = %s RETURNING cycle_id", node.node_id)
    with capture_logs() as logs:
        await node.start()
        cycle = await ended(node, answer.cycle_id or "")
        await node.drain()
    [taken] = [one for one in logs if one["event"] == "cycle_taken_over"]
    assert (taken["cycle"], taken["recoveries"]) == (answer.cycle_id, 1)
    [failed] = [one for one in logs if one["event"] == "cycle_failed"]
    assert (failed["cycle"], failed["run_profile"]) == (answer.cycle_id, "daily")
    assert (failed["stage"], failed["step"]) == ("tier2_complete", 0)
    assert failed["reason"] == cycle["detail"]["reason"]


async def _accepted_here_and_unknown_there(
    configure: Configure, make_node: MakeNode, receiver: Receiver, **given: Any
) -> tuple[Node, str]:
    """A worker without the endpoint of a cycle that another node has accepted."""
    configure(run_profile())
    first = await make_node(
        dispatch_endpoints=(receiver.endpoint("out"),), roles=frozenset({"api"})
    )
    [answer] = await first.orchestration.trigger_run_profiles()
    assert answer.cycle_id is not None
    configure()
    second = await make_node(
        dispatch_endpoints=(receiver.endpoint("elsewhere"),), roles=frozenset({"worker"}), **given
    )
    return second, answer.cycle_id


async def test_an_endpoint_that_no_node_knows_fails_the_cycle_at_the_bound(
    configure: Configure, make_node: MakeNode, receiver: Receiver
) -> None:
    """A node with other endpoints than its configuration's names the missing one."""
    node, cycle_id = await _accepted_here_and_unknown_there(
        configure, make_node, receiver, max_cycle_recoveries=1, lease_seconds=5
    )
    cycle = await ended(node, cycle_id)
    assert cycle["state"] == "failed"
    assert cycle["detail"]["reason"].startswith(
        "endpoint 'out' is not configured on this node (known: elsewhere"
    )


async def test_an_endpoint_that_another_node_knows_does_not_fail_the_cycle(
    configure: Configure, make_node: MakeNode, receiver: Receiver, facts: Facts
) -> None:
    """In a rolling deploy the old node gives the cycle back, and the new one finishes it."""
    node, cycle_id = await _accepted_here_and_unknown_there(
        configure, make_node, receiver, lease_seconds=3
    )
    query = "SELECT recoveries, node_id, last_error FROM cycle_lease"
    await until(lambda: facts(f"{query} WHERE recoveries > 0 AND node_id IS NULL"), "its return")
    await node.drain()
    knowing = await make_node(dispatch_endpoints=(receiver.endpoint("out"),))
    assert (await ended(knowing, cycle_id))["state"] == "finished"
    assert len(receiver.arrivals) == 1


async def test_an_unexpected_failure_is_given_back_at_once_and_named_at_the_end(
    configure: Configure, make_node: MakeNode, receiver: Receiver, owner_dsn: str
) -> None:
    """Long before any lease is over the cycle fails, with the error and not with a lost worker."""
    configure()
    node = await make_node(
        is_started=False,
        dispatch_endpoints=(receiver.endpoint("out"),),
        max_cycle_recoveries=2,
        lease_seconds=3600,
    )
    accepted = await node.orchestration.trigger_raw(payload=Payload(b"x"), endpoint_keys=["out"])
    _drop_payloads(owner_dsn)
    await node.start()
    cycle = await ended(node, accepted.cycle_id)
    assert cycle["state"] == "failed"
    assert re.fullmatch(
        r"LookupError: the payload \w+ of \S+ is not stored \(given up after 3 tries in a row .*",
        cycle["detail"]["reason"],
    )
