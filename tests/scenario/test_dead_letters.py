"""Dead letters with a real node and a real receiver: listed, grouped, requeued in bulk, watched."""

# ruff: noqa: D103 - the steps are what a user would write; their names say what they do

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web

from orbit.api.application import create_application
from orbit.app import Node
from orbit.execution.context import ExecutionContext
from orbit.governance.actor import ANYONE, actor_here
from orbit.payload import Payload
from tests.scenario.conftest import (
    SECRET_KEY,
    Arrival,
    Configure,
    Facts,
    MakeNode,
    Receiver,
    policy,
    run,
    run_profile,
    until,
)

HERE = __name__
LETTERS = 6
CURRENT = "to the endpoint as it is now (current snapshot)"


def cut(payload: Payload, context: ExecutionContext) -> Iterator[Payload]:
    return (Payload(b"%d" % number) for number in range(context.options["items"]))


@dataclass
class Receiving:
    """A receiver that refuses with `status`, or takes all with 200."""

    receiver: Receiver
    status: int = 503

    async def answer(self, arrival: Arrival) -> web.Response:
        return web.Response(status=self.status)


@dataclass(frozen=True)
class Place:
    """A node with dead letters, its API, and the receiver that refused them."""

    node: Node
    api: httpx.AsyncClient
    receiving: Receiving
    environment: dict[str, str]

    async def get(self, path: str, **params: Any) -> Any:
        answer = await self.api.get(f"/dead-letters{path}", params=params)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def requeue(self, status: int = 202, **body: Any) -> Any:
        asked = {"namespace": "brand", "reason": "mended", **body}
        answer = await self.api.post("/dead-letters/requeue", json=asked)
        assert answer.status_code == status, answer.text
        return answer.json()

    async def ended(self, batch_id: str) -> Any:
        async def look() -> Any:
            batch = await self.get(f"/requeues/{batch_id}")
            return batch if batch["state"] != "running" and not batch["pending"] else None

        return await until(look, "the end of the bulk requeue")

    async def cli(self, *arguments: str, code: int = 0) -> str:
        """A `dlq` verb beside the node, on its database; what it printed."""
        return (await self.told(*arguments, code=code))[0]

    async def told(self, *arguments: str, code: int = 0) -> tuple[str, str]:
        """The same, with what it noted for the person."""
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "orbit",
            "dlq",
            *arguments,
            env=self.environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, errors = await child.communicate()
        assert child.returncode == code, output.decode() + errors.decode()
        return output.decode(), errors.decode()


@pytest.fixture
async def place(
    make_node: MakeNode, configure: Configure, receiver: Receiver, dsn: str, config_dir: Path
) -> AsyncIterator[Place]:
    """Six dead letters of one run profile, and one of another."""
    split = {"use": "orbit:no_op", "split": f"{HERE}:cut", "options": {"items": LETTERS}}
    configure(
        run_profile("many", execution_policy=policy(normalization=split)),
        run_profile("single", execution_policy=policy(), distribution_targets=["other"]),
    )
    receiving = Receiving(receiver)
    receiver.answers |= {"/out": receiving.answer, "/other": receiving.answer}
    endpoints = (receiver.endpoint("out"), receiver.endpoint("other"))
    node = await make_node(dispatch_endpoints=endpoints, max_dispatch_retries=0)
    await run(node, "many")
    await run(node, "single")
    given = [f'{{"key": "{one.key}", "url": "{one.url}"}}' for one in endpoints]
    environment = {name: value for name, value in os.environ.items() if "ORBIT" not in name} | {
        "DATABASE_URL": dsn,
        "ORBIT_ROLES": "worker",  # so that the command line asks the database itself
        "ORBIT_SECRET_KEYS": SECRET_KEY,
        "ORBIT_CONFIG_DIR": str(config_dir),
        "ORBIT_MAX_DISPATCH_RETRIES": "0",
        "ORBIT_DISPATCH_ENDPOINTS": f"[{', '.join(given)}]",
    }
    transport = httpx.ASGITransport(create_application(node))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as api:
        yield Place(node, api, receiving, environment)


async def test_they_are_listed_by_when_they_died_and_grouped_by_cause(place: Place) -> None:
    """Filters narrow the list; pages follow each other without a gap; groups add up."""
    every = (await place.get(""))["items"]
    died = [one["createdAt"] for one in every]
    assert died == sorted(died, reverse=True)
    assert (len(every), every[0]["runProfileId"]) == (LETTERS + 1, "single")
    paged: list[Any] = []
    cursor: dict[str, str] = {}
    while True:
        page = await place.get("", limit=2, **cursor)
        paged += page["items"]
        if page["nextCursor"] is None:
            break
        cursor = {"cursor": page["nextCursor"]}
    assert paged == every
    for narrow, expected in (
        ({"runProfileId": "many"}, LETTERS),
        ({"runProfileId": "many", "endpointKey": "other"}, 0),
        ({"cause": "status 503", "state": "open"}, LETTERS + 1),
        ({"state": "decided"}, 0),
    ):
        assert len((await place.get("", **narrow))["items"]) == expected, narrow
    groups = (await place.get("/groups", namespace="brand"))["items"]
    counts = [(one["endpointKey"], one["cause"], one["open"]) for one in groups]
    assert counts == [("out", "status 503", LETTERS), ("other", "status 503", 1)]
    assert groups[0]["mayHaveArrived"] == 0
    assert groups[1]["oldestAt"] == groups[1]["newestAt"] == every[0]["createdAt"]
    assert (await place.get("/groups", namespace="nobody"))["items"] == []


async def test_a_dry_run_counts_what_the_requeue_then_does(place: Place) -> None:
    """The same selection gives the same number; nothing moves before."""
    place.receiving.status = 200
    narrow: dict[str, Any] = {"runProfileId": "many", "cause": "status 503"}
    dry = await place.requeue(200, isDryRun=True, canary=1, **narrow)
    assert (dry["isDryRun"], dry["matching"], dry["batchId"]) == (True, LETTERS, None)
    assert dry["selected"] == LETTERS
    assert (await place.requeue(200, isDryRun=True, limit=2, **narrow))["selected"] == 2
    assert (await place.get("/requeues"))["items"] == []
    assert len((await place.get("", state="open"))["items"]) == LETTERS + 1
    done = await place.requeue(**narrow)
    assert (done["matching"], len(done["items"]), done["snapshot"]) == (LETTERS, LETTERS, "current")
    assert (await place.requeue(200, isDryRun=True, **narrow))["matching"] == 0


async def test_what_matches_nothing_begins_nothing(place: Place) -> None:
    """In steps or at once: no batch, no job, and the answer and the command line say so."""
    paces: tuple[dict[str, Any], ...] = ({}, {"canary": 1}, {"rate": 5})
    for pace in paces:
        answer = await place.requeue(200, cause="status 599", **pace)
        assert (answer["matching"], answer["selected"]) == (0, 0)
        assert (answer["batchId"], answer["items"]) == (None, [])
    nothing = ("requeue", "--namespace", "brand", "--cause", "status 599", "--reason", "x")
    for more in ((), ("--canary", "1", "--watch"), ("--dry-run",)):
        assert await place.told(*nothing, *more) == ("no dead letter matches\n", "")
    assert (await place.get("/requeues"))["items"] == []


async def test_a_cause_is_found_as_it_is_listed(place: Place) -> None:
    """What may have arrived is told in a column of its own, and in a line of its own."""
    (letter,) = (await place.get("", runProfileId="single"))["items"]
    await place.node.database.execute(
        b"INSERT INTO delivery_receipt (namespace, job_id, attempt, outcome, digest, size,"
        b" lease_number, node_id) SELECT namespace, job_id, 9, 'unknown', digest, size, 9, node_id"
        b" FROM delivery_receipt WHERE job_id = %s",
        (letter["jobId"],),
    )
    header, line = (await place.cli("ls", "--run-profile", "single")).splitlines()
    cells = dict(zip(re.split(r"\s{2,}", header), re.split(r"\s{2,}", line), strict=True))
    assert cells["MAY HAVE ARRIVED"] == "yes"
    assert letter["jobId"] in await place.cli("ls", "--cause", cells["CAUSE"])
    shown = await place.cli("show", letter["jobId"])
    assert f"  cause           {cells['CAUSE']}\n" in shown
    assert "  arrival         may have arrived" in shown


async def test_a_list_that_is_cut_says_how_many_are_left(place: Place) -> None:
    """The rest is counted under the same filter; a list that is whole says nothing."""
    listed, said = await place.told("ls", "--limit", "2", "--run-profile", "many")
    assert (len(listed.splitlines()), said) == (3, f"{LETTERS - 2} more: --limit, or --group\n")
    assert (await place.told("ls", "--limit", str(LETTERS + 1)))[1] == ""


async def test_delivered_canaries_let_the_rest_flow(place: Place, facts: Facts) -> None:
    """All come back once, and the receiver has each of them once more."""
    place.receiving.status = 200
    before = len(place.receiving.receiver.at("/out"))
    started = await place.requeue(endpointKey="out", canary=2, rate=1000)
    batch = await place.ended(started["batchId"])
    assert (batch["state"], batch["matching"], batch["delivered"]) == ("finished", LETTERS, LETTERS)
    assert (batch["askedBy"], batch["reason"], batch["phase"]) == (ANYONE.name, "mended", None)
    came = [one.body for one in place.receiving.receiver.at("/out")[before:]]
    assert sorted(came) == [b"%d" % number for number in range(LETTERS)]
    order = facts("SELECT job_id FROM dispatch_job WHERE requeued_from IS NOT NULL")
    assert len(order) == LETTERS
    assert [one["runProfileId"] for one in (await place.get("", state="open"))["items"]] == [
        "single"
    ]
    again = await place.api.post(
        f"/dead-letters/requeues/{started['batchId']}/cancel", json={"reason": "late"}
    )
    assert (again.status_code, again.json()["state"]) == (409, "finished")


async def test_a_failed_canary_leaves_the_rest_untouched(place: Place) -> None:
    """One more request reaches the receiver, and no other."""
    before = len(place.receiving.receiver.at("/out"))
    started = await place.requeue(endpointKey="out", canary=1)
    batch = await place.ended(started["batchId"])
    assert (batch["state"], batch["requeued"], batch["failed"]) == ("stopped", 1, 1)
    assert batch["jobId"] in batch["why"]
    assert len(place.receiving.receiver.at("/out")) == before + 1
    decided = (await place.get("", state="decided"))["items"]
    assert [one["decision"]["batchId"] for one in decided] == [batch["batchId"]]


async def test_another_node_ends_what_one_began(place: Place, make_node: MakeNode) -> None:
    """The node that was asked leaves; one that comes later finishes the batch."""
    place.receiving.status = 200
    started = await place.requeue(endpointKey="out", rate=2)
    await until(lambda: place.receiving.receiver.at("/out")[LETTERS:], "the first of the batch")
    await place.node.drain()
    running = await place.get(f"/requeues/{started['batchId']}")
    assert running["state"] == "running"
    await make_node(
        dispatch_endpoints=place.node.settings.dispatch_endpoints, max_dispatch_retries=0
    )
    batch = await place.ended(started["batchId"])
    assert (batch["state"], batch["delivered"]) == ("finished", LETTERS)
    assert len(place.receiving.receiver.at("/out")) == 2 * LETTERS


async def test_the_command_line_says_what_it_does(place: Place) -> None:
    """Groups, dry run, a watched batch that stops with code 1, and one that finishes with 0."""
    assert "status 503" in await place.cli("ls", "--group", "--namespace", "brand")
    listed = await place.cli("ls", "--run-profile", "single", "--cause", "status 503")
    assert "RUN PROFILE" in listed
    assert len(listed.splitlines()) == 2
    many = ("requeue", "--namespace", "brand", "--endpoint", "out")
    dry = await place.cli(*many, "--dry-run")
    assert dry == f"{LETTERS} dead letters would be requeued, {CURRENT}\n"
    cut = await place.cli(*many, "--dry-run", "--limit", "3")
    assert cut == f"3 of {LETTERS} dead letters (the oldest) would be requeued, {CURRENT}\n"
    stopped = await place.cli(*many, "--canary", "1", "--watch", "--reason", "try", code=1)
    assert "stopped: requeued 1 of 6, delivered 0, failed 1" in stopped
    place.receiving.status = 200
    paced = ("--rate", "1000", "--watch", "--reason", "mended")
    finished = await place.cli(*many, *paced)
    assert f"finished: requeued {LETTERS} of {LETTERS}, delivered {LETTERS}" in finished
    assert "finished" in await place.cli("requeues")
    batch_id = (await place.get("/requeues", state="stopped"))["items"][0]["batchId"]
    shown = await place.cli("requeues", batch_id)
    assert f"asked for by    {actor_here().name} at" in shown
    await place.cli("requeues", batch_id, "--cancel", "late", code=3)
    await place.cli("requeue", code=2)
    await place.cli(*many, "--rate", "5", code=2)


@pytest.mark.parametrize(
    ("change", "words", "snapshot"),
    [
        ("same", "snapshot v1, the endpoint is unchanged", ("unchanged", 1, 1)),
        ("moved", "snapshot v1, endpoint is now v2", ("changed", 1, 2)),
        ("gone", "snapshot v1, endpoint is not configured any more", ("not_configured", 1, None)),
    ],
)
async def test_a_dead_letter_says_how_its_endpoint_has_changed(
    place: Place,
    make_node: MakeNode,
    change: str,
    words: str,
    snapshot: tuple[str, int, int | None],
) -> None:
    """The version of the snapshot it was bound to, beside the endpoint's of now."""
    receiver = place.receiving.receiver
    (letter,) = (await place.get("", runProfileId="single"))["items"]
    endpoints = {
        "same": (receiver.endpoint("other"), receiver.endpoint("out")),
        "moved": (receiver.endpoint("other", "/elsewhere"), receiver.endpoint("out")),
        "gone": (receiver.endpoint("out"),),
    }[change]
    node = await make_node(is_started=False, dispatch_endpoints=endpoints)
    transport = httpx.ASGITransport(create_application(node))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as api:
        shown = (await api.get(f"/dead-letters/{letter['jobId']}")).json()
        path = f"/dead-letters/{letter['jobId']}/requeue"
        requeued = await api.post(path, json={"reason": "x"})
        key = "other" if change == "gone" else "out"
        gone = await api.post(
            "/dead-letters/requeue",
            json={"namespace": "brand", "endpointKey": key, "reason": "x", "rate": 1},
        )
    names = ("state", "version", "currentVersion")
    assert tuple(shown["snapshot"][name] for name in names) == snapshot
    assert requeued.status_code == (409 if change == "gone" else 202)
    assert gone.status_code == (409 if change == "gone" else 202)
    given = [f'{{"key": "{one.key}", "url": "{one.url}"}}' for one in endpoints]
    place.environment["ORBIT_DISPATCH_ENDPOINTS"] = f"[{', '.join(given)}]"
    assert words in await place.cli("show", letter["jobId"])
