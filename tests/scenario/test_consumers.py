"""Stored consumers, over the API: made, moved on, let go, each by whoever may."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from orbit.app import Node
from orbit.audit.verification import verify
from tests.scenario.access import asking, key_of
from tests.scenario.conftest import Facts, MakeNode
from tests.scenario.test_telemetry import tell

CONSUMERS = "/telemetry/consumers"


async def client_of(node: Node, scope: str, namespaces: list[str] | None = None) -> Any:
    """Who asks with a key of that scope."""
    return asking(node, await key_of(node, scope, namespaces=namespaces or ["*"]))


def refusal(answer: httpx.Response) -> tuple[int, str]:
    """Status and code of a problem document."""
    return answer.status_code, answer.json()["code"]


async def test_a_consumer_goes_on_where_it_was(make_node: MakeNode) -> None:
    """Stored at what is kept, read by pages, committed; late commits and retries change nothing."""
    node = await make_node()
    last = await tell(node, 20)
    async with asking(node) as api:
        made = await api.post(CONSUMERS, json={"name": "bi"})
        assert made.status_code == 201
        assert made.json() | {"movedAt": None} == {
            "name": "bi",
            "namespaces": None,
            "position": 0,
            "behind": last,
            "lost": 0,
            "movedAt": None,
        }
        metrics = (await api.get("/metrics")).text
        assert f"orbit_telemetry_consumer_behind_events {float(last)}" in metrics
        read: list[int] = []
        for _ in range(4):
            after = (await api.get(f"{CONSUMERS}/bi")).json()["position"]
            page = (await api.get("/telemetry", params={"after": after, "limit": 7})).json()
            read += [one["position"] for one in page["items"]]
            for position in (page["position"], after):
                answer = await api.post(f"{CONSUMERS}/bi/commit", json={"position": position})
                assert answer.json()["position"] == page["position"]
        assert read == list(range(1, last + 1))
        listed = (await api.get(CONSUMERS)).json()["items"]
        assert [(one["name"], one["behind"]) for one in listed] == [("bi", 0)]
        beyond = await api.post(f"{CONSUMERS}/bi/commit", json={"position": last + 1})
        assert refusal(beyond) == (400, "request_invalid")
        assert str(last) in beyond.json()["detail"]
        assert refusal(await api.post(CONSUMERS, json={"name": "bi"})) == (409, "consumer_exists")
        assert (await api.post(f"{CONSUMERS}/bi/remove")).json()["position"] == last
        for gone in (api.get(f"{CONSUMERS}/bi"), api.post(f"{CONSUMERS}/bi/remove")):
            assert refusal(await gone) == (404, "not_found")


async def test_coming_and_going_is_audited(make_node: MakeNode, facts: Facts) -> None:
    """Who added and removed a consumer stands in the installation's trail; moving it does not."""
    node = await make_node(auth="on")
    await tell(node, 3)
    async with await client_of(node, "operator") as api:
        await api.post(CONSUMERS, json={"name": "bi", "after": 2, "reason": "new warehouse"})
        await api.post(f"{CONSUMERS}/bi/commit", json={"position": 3})
        await api.post(f"{CONSUMERS}/bi/remove", json={"reason": "no longer used"})
    rows = facts("SELECT log, body FROM audit_trail_entry ORDER BY seq")
    acts = [(row["log"], json.loads(row["body"])["act"]) for row in rows]
    found = [(log, act) for log, act in acts if act["action"].startswith("consumer.")]
    assert [(log, act["action"], act["subject"], act["reason"]) for log, act in found] == [
        ("*", "consumer.added", "bi", "new warehouse"),
        ("*", "consumer.removed", "bi", "no longer used"),
    ]


async def test_a_bounded_key_moves_only_what_is_for_its_namespaces(make_node: MakeNode) -> None:
    """Another's consumer is as good as none; to make or remove one a key of all is needed."""
    node = await make_node(auth="on")
    last = await tell(node, 4)
    async with await client_of(node, "operator") as api:
        await api.post(CONSUMERS, json={"name": "all"})
        await api.post(CONSUMERS, json={"name": "sea", "namespaces": ["sea"]})
        await api.post(CONSUMERS, json={"name": "both", "namespaces": ["sea", "air"]})
    async with await client_of(node, "operator", ["sea"]) as api:
        listed = (await api.get(CONSUMERS)).json()["items"]
        assert [one["name"] for one in listed] == ["sea"]
        moved = await api.post(f"{CONSUMERS}/sea/commit", json={"position": last})
        assert moved.json()["position"] == last
        for name in ("all", "both", "none"):
            answer = await api.get(f"{CONSUMERS}/{name}")
            assert refusal(answer) == (404, "not_found")
            answer = await api.post(f"{CONSUMERS}/{name}/commit", json={"position": 1})
            assert (*refusal(answer), answer.json()["detail"]) == (
                404,
                "not_found",
                f"there is no consumer {name}",
            )
        assert (await api.post(CONSUMERS, json={"name": "mine"})).status_code == 403
        assert (await api.post(f"{CONSUMERS}/sea/remove")).status_code == 403
    async with await client_of(node, "viewer") as api:
        assert (await api.get(f"{CONSUMERS}/all")).json()["position"] == 0
        answer = await api.post(f"{CONSUMERS}/all/commit", json={"position": 1})
        assert answer.status_code == 403


@pytest.mark.parametrize("name", ["", "-x", "a b", "x" * 129, "über", "a/b"])
async def test_a_name_that_is_none_is_refused(make_node: MakeNode, name: str) -> None:
    """Names are keys; what is refused leaves nothing."""
    node = await make_node()
    async with asking(node) as api:
        answer = await api.post(CONSUMERS, json={"name": name})
        assert refusal(answer) == (400, "request_invalid")
        assert (await api.get(CONSUMERS)).json()["items"] == []


async def test_a_consumer_that_went_past_orbit_is_found(
    make_node: MakeNode, owner_dsn: str
) -> None:
    """Whoever drops one, so that retention drops what it has not read, or puts one in its place."""
    node = await make_node(is_started=False)
    async with asking(node) as api:
        for name in ("bi", "old"):
            assert (await api.post(CONSUMERS, json={"name": name})).status_code == 201
        for again in (False, True):
            assert (await api.post(f"{CONSUMERS}/old/remove")).status_code == 200
            if not again:
                await api.post(CONSUMERS, json={"name": "old"})
    assert verify(owner_dsn).findings == []
    for change, words in (
        ("UPDATE telemetry_consumer SET name = 'other'", "consumer other has no entry"),
        ("DELETE FROM telemetry_consumer", "what it is about (bi) is not there, nor an entry"),
    ):
        await node.database.execute(change.encode())
        for log in (None, "*"):
            assert words in "\n".join(map(str, verify(owner_dsn, log=log).findings))
