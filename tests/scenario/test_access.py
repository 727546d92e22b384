"""Who gets in, who does not, and what becomes of keys and sessions: over a whole node."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI

from orbit.api.access import OPEN_PATHS, check_scopes, declared_scopes
from orbit.api.application import create_application
from orbit.app import Node
from orbit.audit import trail
from orbit.audit.trail import Act
from orbit.errors import SettingInvalid
from orbit.governance.actor import actor_here
from orbit.governance.authentication import STALE_SECONDS
from orbit.governance.sessions import MOST_LINKS, MOST_SESSIONS
from orbit.governance.slowing import FREE_FAILURES
from orbit.governance.token import Token
from orbit.settings import load_settings
from tests.scenario.access import asking, bearer, key_of
from tests.scenario.conftest import Facts, MakeNode, SetTime, database_now, until
from tests.scenario.routes import ROUTES

LOW = ("open", "viewer", "viewer everywhere", "approver")
LISTS = ("/cycles", "/slots", "/dead-letters", "/dead-letters/requeues", "/lanes", "/audit")
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
async def node(make_node: MakeNode) -> Node:
    """A node that asks for keys."""
    return await make_node(auth="on")


@pytest.fixture
def acts(monkeypatch: pytest.MonkeyPatch) -> list[Act]:
    """Every entry that is appended to the audit trail, as it is appended."""
    found: list[Act] = []
    append = trail.append

    async def noting(connection: Any, *given: Act) -> None:
        await append(connection, *given)
        found.extend(given)

    monkeypatch.setattr(trail, "append", noting)
    return found


def refusal(answer: httpx.Response) -> tuple[int, str]:
    """The status and code of a problem document."""
    return answer.status_code, answer.json()["code"]


def without_clock(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers but for those that tell the time."""
    return {name: value for name, value in headers.items() if name != "date"}


# --- routes ------------------------------------------------------------------------------


def test_every_route_asks_for_the_scope_that_is_written_down() -> None:
    """No route that nobody wrote down, none that is gone, none with another scope."""
    application = create_application(Node(load_settings({}, None)))
    found = declared_scopes(application)
    assert all(len(scopes) == 1 for scopes in found.values())
    assert {route: scope for route, (scope,) in found.items()} == ROUTES
    assert {path for (_, path), scope in ROUTES.items() if scope == "open"} == OPEN_PATHS


def test_nothing_is_changed_below_operator_but_ones_own_session_and_decisions() -> None:
    """Who may only look changes nothing by any route; who may decide, decides."""
    below = {path for (method, path), scope in ROUTES.items() if method != "GET" and scope in LOW}
    decisions = {f"/proposals/{{proposalId}}/{verb}" for verb in ("approve", "reject")}
    assert below == {"/session", "/session/links"} | decisions
    assert {ROUTES["POST", path] for path in decisions} == {"approver"}


def test_a_route_without_a_scope_does_not_come_into_being() -> None:
    """A route that is added without one is named, wherever it is included."""
    application = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    router = APIRouter()

    @router.get("/forgotten")
    async def forgotten() -> None: ...

    application.include_router(router, prefix="/new")
    with pytest.raises(RuntimeError, match="GET /new/forgotten"):
        check_scopes(application)


async def test_nothing_but_the_probes_answers_without_a_key(node: Node) -> None:
    """Every route, and every path that is none, answers the same 401 before it looks further."""
    bodies = set()
    async with asking(node) as api:
        for (method, path), scope in ROUTES.items():
            if scope == "open":
                continue
            answer = await api.request(method, path, content=b"{not json")
            assert refusal(answer) == (401, "unauthenticated"), (method, path)
            assert answer.headers["www-authenticate"].startswith("Bearer")
            bodies.add(answer.content)
        bodies.add((await api.get("/nowhere")).content)
        assert len(bodies) == 1
        assert (await api.get("/health")).status_code == 200
        assert (await api.get("/ready")).status_code == 200


@pytest.mark.parametrize(
    ("scope", "may"),
    [
        ("viewer", {"viewer"}),
        ("operator", {"viewer", "operator"}),
        ("approver", {"viewer", "approver"}),
        ("admin", {"viewer", "operator", "approver", "admin"}),
    ],
)
async def test_a_scope_opens_what_it_contains_and_nothing_else(
    node: Node, scope: str, may: set[str]
) -> None:
    """403 exactly where the scope that is written down isn't contained; never where it is."""
    no_stream = {"Last-Event-ID": "none"}  # an event stream would be endless: refused by itself
    async with asking(node, await key_of(node, scope)) as api:
        for (method, path), needed in ROUTES.items():
            plain = path.replace("{", "").replace("}", "")
            answer = await api.request(method, plain, headers=no_stream)
            is_open = not {*may, "open"}.isdisjoint(needed.split())
            assert (answer.status_code == 403) is not is_open, (method, path, answer.text)


# --- keys --------------------------------------------------------------------------------


async def test_what_is_no_good_key_gets_one_answer(node: Node) -> None:
    """Unknown id, wrong secret, expired, revoked, malformed: the same status, head and body."""
    good = await key_of(node, "admin")
    revoked = await key_of(node, "admin")
    await node.keys.revoke(actor_here(), revoked.key_id, None)
    answers = []
    for number, text in enumerate(
        (
            Token.make().text,
            f"orb_{good.key_id}_{'0' * 64}",
            revoked.text,
            good.text.upper(),
            "orb_" + "x" * 600,
            "",
        )
    ):
        async with asking(node, text, peer=f"10.0.0.{number}") as api:
            answers.append(await api.get("/status"))
    assert {(one.status_code, one.content) for one in answers} == {(401, answers[0].content)}
    assert all(without_clock(one.headers) == without_clock(answers[0].headers) for one in answers)
    async with asking(node, good) as api:
        assert (await api.get("/status")).status_code == 200
        twice = [*bearer(good).items(), *bearer(good).items()]
        assert (await api.get("/status", headers=twice)).status_code in {200, 401}


async def test_secrets_are_stored_as_digests_only(node: Node, facts: Facts) -> None:
    """Neither a key's secret nor a session's is anywhere in the database or in a list."""
    token = await key_of(node, "admin")
    async with asking(node, token) as api:
        await api.post("/session")
        secret = api.cookies["orbit_session"]
        shown = (await api.get("/keys")).text
    (row,) = facts("SELECT secret_sha256 FROM access_key")
    (session,) = facts("SELECT session_sha256 FROM access_session")
    assert row["secret_sha256"] == token.digest
    for table in ("access_key", "access_session", "access_link", "access_use"):
        text = str(facts(f"SELECT {table}::text AS row FROM {table}"))
        assert token.secret not in text
        assert secret not in text
    assert len(bytes(session["session_sha256"])) == 32
    assert token.secret not in shown
    assert token.secret not in repr(token)


async def test_a_key_is_made_listed_rotated_and_revoked(
    node: Node, set_time: SetTime, acts: list[Act]
) -> None:
    """The old key is good until its overlap is over, and a revoked one ends at once."""
    async with asking(node, await key_of(node, "admin")) as admin:
        body = {"name": "ci", "scopes": ["operator"], "namespaces": ["sea"]}
        made = (await admin.post("/keys", json=body)).json()
        key_id = made["key"]["keyId"]
        answer = await admin.post(f"/keys/{key_id}/rotate", json={"overlapSeconds": 3600})
        assert answer.status_code == 201, answer.text
        new = answer.json()
        again = await admin.post(f"/keys/{key_id}/rotate", json={})
        assert refusal(again) == (409, "refused")
        assert new["key"]["scopes"] == ["operator"]
        assert new["key"]["namespaces"] == ["sea"]
        assert new["key"]["rootId"] == key_id
        for token in (made["token"], new["token"]):
            async with asking(node, token) as api:
                assert (await api.get("/cycles")).status_code == 200
        set_time(await database_now(node.database) + timedelta(hours=2))
        node.authentication.forget()
        async with asking(node, made["token"]) as api:
            assert (await api.get("/cycles")).status_code == 401
        async with asking(node, new["token"]) as api:
            assert (await api.get("/cycles")).status_code == 200
            new_id = new["key"]["keyId"]
            revoked = await admin.post(f"/keys/{new_id}/revoke", json={"reason": "lost"})
            assert revoked.json()["state"] == "revoked"
            assert (await api.get("/cycles")).status_code == 401
        states = {one["keyId"]: one["state"] for one in (await admin.get("/keys")).json()["items"]}
        assert (states[key_id], states[new_id]) == ("rotated", "revoked")
    told = [(one.action, one.namespace, one.reason) for one in acts if one.namespace == "sea"]
    assert told == [
        ("key.created", "sea", None),
        ("key.rotated", "sea", None),
        ("key.created", "sea", None),
        ("key.revoked", "sea", "lost"),
    ]


async def test_a_rotated_key_is_the_same_person(node: Node) -> None:
    """Two keys of one root have one actor id, so they don't make two persons."""
    first = await key_of(node, "admin")
    second = await node.keys.rotate(actor_here(), first.key_id, timedelta(hours=1))
    found = [await node.keys.verify(one) for one in (first, second, await key_of(node, "admin"))]
    ids = [one.actor.id for one in found if one is not None]
    assert ids[0] == ids[1] != ids[2]


async def test_an_expired_key_is_none(node: Node, set_time: SetTime) -> None:
    """A key ends at its expiry, and cannot be made with one that is past."""
    now = await database_now(node.database)
    token = await key_of(node, "viewer", expires_at=now + timedelta(hours=1))
    async with asking(node, token) as api:
        assert (await api.get("/cycles")).status_code == 200
        set_time(now + timedelta(hours=2))
        node.authentication.forget()
        assert (await api.get("/cycles")).status_code == 401
    async with asking(node, await key_of(node, "admin")) as admin:
        body = {"name": "x", "scopes": ["viewer"], "expiresAt": "2001-01-01T00:00:00Z"}
        assert refusal(await admin.post("/keys", json=body)) == (400, "request_invalid")


@pytest.mark.parametrize(
    "at", ["9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59", "1999-12-31T23:59:59Z"]
)
async def test_no_instant_is_taken_that_cannot_be_read_back(
    node: Node, facts: Facts, at: str
) -> None:
    """In a body or a query, of a key, a halt, a bulk requeue or the trail: 400, and no row."""
    token = await key_of(node, "admin")
    async with asking(node, token) as api:
        made = {"name": "x", "scopes": ["viewer"], "expiresAt": at}
        requeue = {"namespace": "sea", "reason": "x", "rate": 0.001}
        for path, body in (
            ("/keys", made),
            (f"/keys/{token.key_id}/rotate", {"expiresAt": at}),
            ("/dead-letters/requeue", requeue | {"since": at}),
            ("/dead-letters/requeue", requeue | {"until": at}),
            ("/governance/namespaces/sea/halt", {"until": at}),
        ):
            answer = await api.post(path, json=body)
            assert refusal(answer) == (400, "request_invalid"), (path, answer.text)
            assert "2000 to 9000" in answer.text
        for name in ("since", "until"):
            answer = await api.get("/audit", params={name: at})
            assert refusal(answer) == (400, "request_invalid")
        assert len((await api.get("/keys")).json()["items"]) == 1
        assert (await api.get("/dead-letters/requeues")).json()["items"] == []
    assert facts("SELECT FROM namespace_halt") == []


async def test_no_key_makes_one_that_outlasts_it(node: Node) -> None:
    """Neither made nor rotated; what is not told ends with its maker, and has not ended before."""
    now = await database_now(node.database)
    end = now + timedelta(hours=1)
    lasting = await key_of(node, "viewer")
    ending = await key_of(node, "admin", expires_at=end)
    async with asking(node, ending) as api:
        body = {"name": "x", "scopes": ["admin"]}
        late = {"expiresAt": (end + timedelta(days=1)).isoformat()}
        past = {"expiresAt": (now - timedelta(days=1)).isoformat()}
        for key_id in (ending.key_id, lasting.key_id):
            for wanted in (late, past):
                answer = await api.post(f"/keys/{key_id}/rotate", json=wanted)
                assert refusal(answer) == (400, "request_invalid")
        assert refusal(await api.post("/keys", json=body | late)) == (400, "request_invalid")
        made = [
            await api.post("/keys", json=body),
            await api.post(f"/keys/{lasting.key_id}/rotate", json={}),
            await api.post(f"/keys/{ending.key_id}/rotate", json={}),
        ]
    for answer in made:
        assert datetime.fromisoformat(answer.json()["key"]["expiresAt"]) == end


async def test_a_stolen_keys_keys_can_end_with_it(node: Node) -> None:
    """Revoking names what a key made and these made, and ends them too if that is asked for."""
    stolen, other = await key_of(node, "admin"), await key_of(node, "admin")
    tokens = [stolen.text]
    for _ in range(2):
        async with asking(node, tokens[-1]) as api:
            answer = await api.post("/keys", json={"name": "x", "scopes": ["admin"]})
            assert answer.json()["key"]["createdByKey"] in tokens[-1]
            tokens.append(answer.json()["token"])
    made = sorted(Token.of(one).key_id for one in tokens[1:])  # type: ignore[union-attr]
    async with asking(node, other) as api:
        path = f"/keys/{stolen.key_id}/revoke"
        assert (await api.post(path, json={})).json()["descendants"] == made
        assert [await _status(node, one) for one in tokens] == [401, 200, 200]
        answer = await api.post(path, json={"withDescendants": True})
        assert answer.json()["descendants"] == made
        assert [await _status(node, one) for one in tokens] == [401, 401, 401]
        assert (await api.get("/keys")).status_code == 200


async def _status(node: Node, token: str) -> int:
    async with asking(node, token) as api:
        return (await api.get("/cycles")).status_code


async def test_a_key_that_has_just_ended_makes_no_other(node: Node, facts: Facts) -> None:
    """Also while a node still remembers it."""
    token = await key_of(node, "admin")
    async with asking(node, token) as api:
        assert (await api.get("/cycles")).status_code == 200
        await node.keys.revoke(actor_here(), token.key_id, "stolen")
        for path, body in (
            ("/keys", {"name": "x", "scopes": ["viewer"]}),
            (f"/keys/{(await key_of(node, 'viewer')).key_id}/rotate", {}),
        ):
            assert (await api.post(path, json=body)).status_code in {401, 409}
    assert len(facts("SELECT FROM access_key")) == 2


async def test_pages_of_keys_show_every_key(node: Node) -> None:
    """Each once, newest first, whatever was made meanwhile."""
    tokens = [await key_of(node, "admin") for _ in range(5)]
    found: list[str] = []
    cursor = None
    async with asking(node, tokens[0]) as api:
        while True:
            params = {"limit": 2} | ({"cursor": cursor} if cursor else {})
            page = (await api.get("/keys", params=params)).json()
            found += [one["keyId"] for one in page["items"]]
            await key_of(node, "viewer")
            cursor = page["nextCursor"]
            if cursor is None:
                break
    assert found == [one.key_id for one in reversed(tokens)]


@pytest.mark.parametrize("value", [0, 1.5, None, True, {}, {"a": 1}, [], ["x"], float("inf")])
async def test_crafted_cursors_are_no_cursors(node: Node, value: Any) -> None:
    """JSON of another kind in any place of any list's cursor is 400, as any text is."""
    paths = (*LISTS, "/governance/namespaces/sea", "/keys")
    text = "2026-01-01T00:00:00+00:00"
    key = "01890000-0000-7000-8000-000000000000"
    async with asking(node, await key_of(node, "admin")) as api:
        for path in paths:
            for good in ((text, "x", "1"), (text, "sea", "x"), (text, key), ("sea", "x"), ("1",)):
                for place in range(len(good)):
                    parts = [*good[:place], value, *good[place + 1 :]]
                    crafted = json.dumps(parts).encode()
                    cursor = base64.urlsafe_b64encode(crafted).decode().rstrip("=")
                    answer = await api.get(path, params={"cursor": cursor})
                    assert refusal(answer) == (400, "request_invalid"), (path, parts)


async def test_a_revocation_reaches_the_other_nodes(make_node: MakeNode) -> None:
    """What one node revokes another one refuses as soon as its second is over."""
    one, other = await make_node(auth="on"), await make_node(auth="on")
    token = await key_of(one, "viewer")
    async with asking(other, token) as api:
        assert (await api.get("/cycles")).status_code == 200
        await one.keys.revoke(actor_here(), token.key_id, "lost")

        async def is_out() -> bool:
            return (await api.get("/cycles")).status_code == 401

        await until(is_out, f"the refusal within {STALE_SECONDS} s")


async def test_the_last_use_is_noted_once_a_minute(node: Node, facts: Facts) -> None:
    """Ten requests write it once."""
    token = await key_of(node, "viewer")
    async with asking(node, token) as api:
        for _ in range(10):
            await api.get("/cycles")
            node.authentication.forget()
    (row,) = facts("SELECT last_used_at, xmin::text AS writer FROM access_use")
    assert row["last_used_at"] is not None


async def test_an_error_while_deciding_denies(node: Node) -> None:
    """Without a database nobody gets in, and nothing has happened: 503, also for a good key."""
    token = await key_of(node, "admin")
    async with asking(node, token) as api:
        assert (await api.get("/session")).status_code == 200
        node.authentication.forget()
        assert node.store.entrance is not None
        await node.store.entrance.close()
        assert refusal(await api.get("/session")) == (503, "database_unavailable")


# --- failures ----------------------------------------------------------------------------


async def test_who_fails_often_has_to_wait(node: Node, acts: list[Act]) -> None:
    """Five tries, then 429 with Retry-After; the trail has every try that was looked at."""
    wrong = Token.make()
    async with asking(node, wrong, peer="10.1.1.1") as api:
        tries = 0  # the first pause is of a second, which may be over at the next request
        while (answer := await api.get("/status")).status_code == 401 and tries < 12:
            tries += 1
        assert refusal(answer) == (429, "too_many_attempts")
        assert int(answer.headers["retry-after"]) >= 1
    failed = [one for one in acts if one.action == "access.failed"]
    assert len(failed) == tries >= FREE_FAILURES
    assert {one.detail["source"] for one in failed} == {"10.1.1.1"}
    assert {one.detail["keyId"] for one in failed} == {wrong.key_id}
    assert wrong.secret not in str(failed)
    async with asking(node, wrong, peer="10.1.1.2") as api:
        assert (await api.get("/status")).status_code == 401


async def test_no_flood_of_bad_keys_keeps_a_good_one_out(node: Node) -> None:
    """A key that this node never saw gets in at once, from an address that fails without end."""
    token = await key_of(node, "operator")
    is_over = False

    async def attack() -> None:
        async with asking(node, Token.make()) as api:
            while not is_over:
                answer = await api.get("/status")
                assert answer.status_code in {401, 429, 503}  # the last: of a busy machine

    attackers = [asyncio.create_task(attack()) for _ in range(8)]
    async with asking(node, Token.make()) as wrong, asking(node, token) as api:

        async def is_paused() -> bool:
            return (await wrong.get("/status")).status_code == 429

        await until(is_paused, "the pause of the address")
        for _ in range(5):
            node.authentication.forget()
            assert (await api.get("/cycles")).status_code == 200
            assert await is_paused()
        assert (await api.post("/governance/namespaces/sea/halt")).status_code == 200
        is_over = True
        await asyncio.gather(*attackers)


async def test_a_flood_keeps_waiting_only_who_comes_the_same_way(node: Node) -> None:
    """While those who failed are looked at, others' new keys, and who was in before, get in."""
    before, new, beside = [await key_of(node, "operator") for _ in range(3)]
    async with (
        asking(node, Token.make(), peer="10.1.1.1") as failing,
        asking(node, beside, peer="10.1.1.1") as behind,
        asking(node, before, peer="10.1.1.1") as known,
        asking(node, new, peer="10.1.1.2") as elsewhere,
    ):
        assert (await known.get("/cycles")).status_code == 200
        for _ in range(FREE_FAILURES):
            assert (await failing.get("/cycles")).status_code == 401
        node.authentication.forget()
        async with (
            node.authentication._suspect
        ):  # a look at one of a flood, for as long as it takes
            waiting = asyncio.create_task(behind.get("/cycles"))
            async with asyncio.timeout(30):
                assert (await elsewhere.get("/cycles")).status_code == 200
                assert (await known.get("/cycles")).status_code == 200
            assert not waiting.done()
        assert (await waiting).status_code == 200


async def test_a_dead_session_locks_nobody_out(node: Node, acts: list[Act]) -> None:
    """A tab that goes on polling is 401, loses its cookie, and counts as no guess."""
    token = await key_of(node, "viewer")
    async with asking(node, token) as api:
        del api.headers["Authorization"]
        for _ in range(FREE_FAILURES + 3):
            answer = await api.get("/cycles", headers={"Cookie": "orbit_session=dead"})
            assert refusal(answer) == (401, "unauthenticated")
            assert 'orbit_session="";' in answer.headers["set-cookie"]
        assert (await api.get("/cycles", headers=bearer(token))).status_code == 200
    assert not [one for one in acts if one.action == "access.failed"]


async def test_a_links_code_is_looked_at_in_every_pause(node: Node) -> None:
    """Who has failed too often still gets in by a good link, which nobody guesses."""
    async with asking(node, await key_of(node, "viewer")) as api:
        path = (await api.post("/session/links")).json()["path"]
    async with asking(node) as api:
        for _ in range(FREE_FAILURES + 1):
            await api.get("/status", headers=bearer(Token.make()))
        assert refusal(await api.get("/session/open?code=wrong"))[0] in {401, 429}
        assert (await api.get(path)).status_code == 303


async def test_a_session_is_no_key(node: Node) -> None:
    """Its secret behind `Bearer` opens nothing, also while the session is remembered."""
    async with asking(node) as api:
        await api.post("/session", headers=bearer(await key_of(node, "viewer")))
        secret = api.cookies["orbit_session"]
        assert (await api.get("/session")).status_code == 200
        for text in (f"session:{secret}", secret):
            answer = await api.post("/session/links", headers=bearer(text))
            assert refusal(answer) == (401, "unauthenticated")


async def test_a_refused_act_is_audited(node: Node, acts: list[Act]) -> None:
    """A viewer who tries to act is named, with what was tried and what it needs."""
    async with asking(node, await key_of(node, "viewer", namespaces=["sea"])) as api:
        assert refusal(await api.post("/cycles/trigger")) == (403, "forbidden")
    (act,) = [one for one in acts if one.action == "access.refused"]
    assert (act.namespace, act.subject) == ("sea", "POST /cycles/trigger")
    assert act.actor.startswith("test viewer (key ")


# --- sessions ----------------------------------------------------------------------------


async def test_a_session_is_a_cookie_that_scripts_and_other_sites_cannot_use(node: Node) -> None:
    """HttpOnly, SameSite=Strict; over TLS Secure under a name that only TLS can set."""
    token = await key_of(node, "operator")
    async with asking(node) as api:
        answer = await api.post("/session", headers=bearer(token))
        cookie = answer.headers["set-cookie"]
        assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
        assert "Secure" not in cookie
        assert token.secret not in cookie
        assert (await api.get("/cycles")).status_code == 200
        assert (await api.get("/session")).json()["csrfToken"] == answer.json()["csrfToken"]
    async with asking(node, base="https") as api:
        answer = await api.post("/session", headers=bearer(token))
        cookie = answer.headers["set-cookie"]
        assert cookie.startswith("__Host-orbit_session=")
        assert "Secure" in cookie.split("; ")
        assert "strict-transport-security" in answer.headers
        assert (await api.get("/cycles")).status_code == 200


async def test_a_sessions_changes_need_its_csrf_token(node: Node, facts: Facts) -> None:
    """Without, with another's, or with an empty one nothing happens."""
    token = await key_of(node, "operator")
    async with asking(node) as other:
        strange = (await other.post("/session", headers=bearer(token))).json()["csrfToken"]
    async with asking(node) as api:
        own = (await api.post("/session", headers=bearer(token))).json()["csrfToken"]
        for headers in ({}, {"X-CSRF-Token": strange}, {"X-CSRF-Token": ""}):
            answer = await api.post("/cycles/trigger", headers=headers)
            assert refusal(answer) == (403, "csrf_refused")
        assert facts("SELECT FROM cycle_run") == []
        answer = await api.post("/cycles/trigger", headers={"X-CSRF-Token": own})
        assert answer.status_code == 202
        assert (await api.request("DELETE", "/session")).status_code == 403


async def test_a_bad_key_beside_a_good_session_is_refused(node: Node) -> None:
    """What is wrong is not made right by what is right: deny wins."""
    async with asking(node) as api:
        await api.post("/session", headers=bearer(await key_of(node, "viewer")))
        assert (await api.get("/cycles")).status_code == 200
        assert (await api.get("/cycles", headers=bearer(Token.make()))).status_code == 401


async def test_a_session_ends_by_logout_with_its_key_and_in_time(
    node: Node, set_time: SetTime
) -> None:
    """After any of the three the cookie is worth nothing."""
    tokens = [await key_of(node, "viewer") for _ in range(3)]
    for number, token in enumerate(tokens):
        async with asking(node) as api:
            own = (await api.post("/session", headers=bearer(token))).json()["csrfToken"]
            kept = dict(api.cookies)
            match number:
                case 0:
                    answer = await api.request("DELETE", "/session", headers={"X-CSRF-Token": own})
                    assert answer.status_code == 204
                case 1:
                    await node.keys.revoke(actor_here(), token.key_id, None)
                case _:
                    set_time(await database_now(node.database) + timedelta(hours=9))
            node.authentication.forget()
            cookie = "; ".join(f"{name}={value}" for name, value in kept.items())
            assert (await api.get("/cycles", headers={"Cookie": cookie})).status_code == 401


async def test_a_link_opens_one_session_once(node: Node, set_time: SetTime) -> None:
    """The second who follows it, and who comes too late, get a 401 and no cookie."""
    token = await key_of(node, "viewer")
    async with asking(node) as api:
        links = [
            (await api.post("/session/links", headers=bearer(token))).json()["path"]
            for _ in range(2)
        ]
        answer = await api.get(links[0])
        assert (answer.status_code, answer.headers["location"]) == (303, "/docs")
        assert (await api.get("/docs")).status_code == 200
        own = (await api.get("/session")).json()["csrfToken"]
        again = await api.post("/session/links", headers={"X-CSRF-Token": own})
        assert refusal(again) == (409, "refused")
    async with asking(node) as api:
        assert (await api.get(links[0])).status_code == 401
        set_time(await database_now(node.database) + timedelta(minutes=3))
        late = await api.get(links[1])
        assert late.status_code == 401
        assert "set-cookie" not in late.headers


async def test_a_key_has_few_sessions_and_links(
    node: Node, facts: Facts, set_time: SetTime, acts: list[Act]
) -> None:
    """Too many at once are refused, and are no entry; later the oldest goes for a new one."""
    token = await key_of(node, "viewer")
    async with asking(node) as api:
        answers = [await api.post("/session", headers=bearer(token))]
        first = dict(answers[0].cookies)
        answers += [await api.post("/session", headers=bearer(token)) for _ in range(MOST_SESSIONS)]
        assert [one.status_code for one in answers] == [201] * MOST_SESSIONS + [429]
        assert refusal(answers[-1])[1] == "too_many_sessions"
        assert [one.action for one in acts].count("session.begun") == MOST_SESSIONS
        for number in range(MOST_LINKS + 1):
            answer = await api.post("/session/links", headers=bearer(token))
            assert answer.status_code == (201 if number < MOST_LINKS else 429)
        other = await key_of(node, "viewer")
        assert (await api.post("/session", headers=bearer(other))).status_code == 201
        set_time(await database_now(node.database) + timedelta(minutes=2))
        assert (await api.post("/session", headers=bearer(token))).status_code == 201
        assert (await api.post("/session/links", headers=bearer(token))).status_code == 201
    held = facts("SELECT count(*) AS n FROM access_session WHERE key_id = %s", token.key_id)
    assert held[0]["n"] == MOST_SESSIONS
    async with asking(node) as api:
        node.authentication.forget()
        api.cookies.update(first)
        assert (await api.get("/session")).status_code == 401


# --- what is around every answer -----------------------------------------------------------


async def test_every_answer_has_the_headers_and_no_other_site_is_let_in(node: Node) -> None:
    """Refusals and answers alike; a preflight of another site is not answered as it wishes."""
    async with asking(node, await key_of(node, "viewer")) as api:
        answers = [
            await api.get("/health"),
            await api.get("/status"),
            await api.get("/docs"),
            await api.get("/nowhere"),
            await api.get("/status", headers=bearer("nonsense")),
            await api.options(
                "/status",
                headers={
                    "Origin": "https://else.example",
                    "Access-Control-Request-Method": "POST",
                },
            ),
        ]
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["cache-control"] == "no-store"
        assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_a_body_is_bounded_on_every_route(make_node: MakeNode) -> None:
    """Also where none is read: what announces more than any body may have is refused."""
    node = await make_node(auth="on", max_payload_bytes=1000)
    async with asking(node, await key_of(node, "admin")) as api:
        for method, path in ROUTES:
            given = {"Content-Length": "99999999", "Content-Type": "application/json"}
            answer = await api.request(method, path, headers=given, content=b"{}")
            assert refusal(answer) == (413, "payload_too_large"), (method, path)


async def test_metrics_can_be_opened(make_node: MakeNode) -> None:
    """By a setting, to all; else to who sees every namespace, since they count over all."""
    closed, opened = await make_node(auth="on"), await make_node(auth="on", metrics_open=True)
    bound = await key_of(closed, "admin", namespaces=["sea"])
    async with asking(closed, bound) as api:
        assert (await api.get("/metrics")).status_code == 403
    async with asking(closed, await key_of(closed, "viewer")) as api:
        assert (await api.get("/metrics")).status_code == 200
    async with asking(opened) as api:
        assert (await api.get("/metrics")).status_code == 200
        assert (await api.get("/status")).status_code == 401


# --- beginnings --------------------------------------------------------------------------


async def test_other_machines_need_a_key_before_a_node_starts(make_node: MakeNode) -> None:
    """Without one it refuses, and names the way out; with one it starts."""
    node = await make_node(is_started=False, auth="on", host="0.0.0.0")
    with pytest.raises(SettingInvalid, match="orbit keys create"):
        await node.start()
    token = await key_of(node, "viewer")
    await node.keys.revoke(actor_here(), token.key_id, None)
    with pytest.raises(SettingInvalid, match="no access key"):
        await node.start()
    await key_of(node, "admin")
    await node.start()
    assert node.is_ready


async def test_a_node_for_other_machines_answers_at_its_addresses_and_names(
    make_node: MakeNode,
) -> None:
    """By address or a declared name; another name may have been made to lead here."""
    node = await make_node(
        is_started=False, auth="on", host="0.0.0.0", allowed_hosts=("orbit.example",)
    )
    token = await key_of(node, "viewer")
    await node.start()
    async with asking(node, token) as api:
        for host, status in (
            ("10.0.0.5:3000", 200),
            ("orbit.example", 200),
            ("evil.example", 421),
        ):
            assert (await api.get("/cycles", headers={"Host": host})).status_code == status
