"""Refused attempts are told by the audit trail: each kind once, and a flood of them not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import httpx
import pytest

from orbit.api.application import create_application
from orbit.app import Node
from orbit.audit.verification import verify
from tests.scenario.access import asking, bearer, key_of
from tests.scenario.conftest import Facts, MakeNode

BRAND = "/governance/namespaces/brand"
FOREIGN = "secret-moon"
WHY = {"reason": "mended"}


@pytest.fixture
async def node(make_node: MakeNode) -> Node:
    """A node that asks for keys."""
    return await make_node(auth="on")


def refusals(facts: Facts) -> list[tuple[Any, ...]]:
    """Refusals as they were noted: log, action, subject, code and reason."""
    rows = facts(
        "SELECT namespace, action, subject, detail ->> 'code' AS code, reason FROM audit_trail"
        " WHERE action LIKE '%.refused' ORDER BY at, seq"
    )
    return [tuple(row.values()) for row in rows]


async def test_acts_that_may_not_be_are_told_with_their_reason(node: Node, facts: Facts) -> None:
    """A resumption without a reason and one of what runs; a key that is not there."""
    async with asking(node, await key_of(node, "admin")) as api:
        assert (await api.post(f"{BRAND}/resume", json={})).status_code == 400
        assert (await api.post(f"{BRAND}/resume", json=WHY)).status_code == 409
        assert (await api.post("/keys/000000000000/revoke", json=WHY)).status_code == 404
        assert (await api.post("/config/reload", content=b"{no json")).status_code == 415
        assert (await api.get("/cycles/nonsense")).status_code == 404
    resume = "POST /governance/namespaces/{namespace}/resume"
    assert refusals(facts) == [
        ("brand", "act.refused", resume, "request_invalid", None),
        ("brand", "act.refused", resume, "not_halted", "mended"),
        ("*", "access.refused", "POST /keys/{keyId}/revoke", "not_found", "mended"),
        ("*", "act.refused", "POST /config/reload", "unsupported_media_type", None),
    ]
    assert verify(node.database.dsn).findings == []


async def test_what_is_not_there_for_a_bound_key_is_told_in_its_own_trail(
    node: Node, facts: Facts
) -> None:
    """A foreign namespace, looked at or acted on: told there and in that of all, not in its own."""
    async with asking(node, await key_of(node, "operator", namespaces=["sea"])) as api:
        assert (await api.get(f"/governance/namespaces/{FOREIGN}")).status_code == 404
        assert (await api.post(f"/governance/namespaces/{FOREIGN}/halt")).status_code == 404
        answer = await api.post("/cycles/trigger", json={"namespace": FOREIGN})
        assert answer.status_code == 404
        assert (await api.post("/config/reload")).status_code == 403
    found = refusals(facts)
    assert Counter((log, action, code) for log, action, _, code, _ in found) == {
        ("*", "access.refused", "not_found"): 2,
        ("sea", "access.refused", "not_found"): 3,
        ("sea", "access.refused", "forbidden"): 1,
    }


async def test_every_namespace_of_a_key_hears_what_it_was_refused(node: Node, facts: Facts) -> None:
    """A key for two namespaces is refused a reload: both trails tell."""
    async with asking(node, await key_of(node, "operator", namespaces=["sea", "air"])) as api:
        assert (await api.post("/config/reload")).status_code == 403
    assert sorted(log for log, *_ in refusals(facts)) == ["air", "sea"]


async def test_changes_that_a_page_could_have_made_are_told(node: Node, facts: Facts) -> None:
    """A session without its token, another site's page, another name for this host."""
    token = await key_of(node, "operator")
    async with asking(node) as api:
        await api.post("/session", headers=bearer(token))
        assert (await api.post(f"{BRAND}/halt")).json()["code"] == "csrf_refused"
        other = {"Origin": "https://else.example"}
        assert (await api.post(f"{BRAND}/halt", headers=other)).json()["code"] == "origin_refused"
        other = {"Host": "else.example"}
        assert (await api.get("/status", headers=other)).json()["code"] == "host_refused"
    found = [(log, action, code) for log, action, _, code, _ in refusals(facts)]
    assert found == [
        ("*", "access.refused", "csrf_refused"),
        ("*", "access.refused", "origin_refused"),
        ("*", "access.refused", "host_refused"),
    ]


async def _asked(api: httpx.AsyncClient, count: int, path: str) -> None:
    for _ in range(count):
        assert (await api.post(path, json=WHY)).status_code == 409


async def test_a_flood_of_refusals_is_a_few_entries_and_hides_no_other(
    node: Node, facts: Facts
) -> None:
    """Of 300 equal ones few are noted; another kind of the same actor is, all the same."""
    async with asking(node, await key_of(node, "operator")) as api:
        await _asked(api, 300, f"{BRAND}/resume")
        assert (await api.post("/config/reload")).status_code == 403
    *flood, last = refusals(facts)
    assert 5 <= len(flood) <= 12
    assert last[2:4] == ("POST /config/reload", "forbidden")


async def test_a_stranger_fills_no_trail_and_hides_nobody(node: Node, facts: Facts) -> None:
    """Methods that nobody has are all one: few entries without what was sent, and room for others.

    Nor do 100 strangers at once take what is left for those who have a key.
    """
    odd = [f"M{number}".ljust(10_000, "X") for number in range(100)]
    async with asking(node) as api:
        for method in odd:
            answer = await api.request(method, "/status", headers={"Host": "else.example"})
            assert answer.status_code == 421
    application = create_application(node)
    for number in range(100):
        transport = httpx.ASGITransport(application, client=(f"10.0.0.{number}", 1234))
        async with httpx.AsyncClient(transport=transport, base_url="http://else.example") as api:
            assert (await api.get("/status")).status_code == 421
    token = await key_of(node, "operator", namespaces=["sea"])
    async with asking(node, token) as api:
        for method in odd:
            assert (await api.request(method, BRAND)).status_code == 405
        assert (await api.get(f"/governance/namespaces/{FOREIGN}")).status_code == 404
    found = refusals(facts)
    assert ("sea", "not_found") in [(log, code) for log, _, _, code, _ in found]
    assert {subject for _, _, subject, code, _ in found if code == "host_refused"} == {
        "OTHER (of a page)",
        "GET (of a page)",
    }
    assert max(len(subject) for _, _, subject, _, _ in found) <= 200


async def test_a_refusal_that_cannot_be_noted_stays_one(node: Node) -> None:
    """Without a database nothing is allowed that was refused."""
    async with asking(node, await key_of(node, "viewer")) as api:
        assert (await api.get("/session")).status_code == 200
        await node.database.close()
        assert (await api.post(f"{BRAND}/halt")).status_code == 403
