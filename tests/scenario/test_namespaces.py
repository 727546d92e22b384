"""No key reaches out of its namespaces: by id, by filter, by reference, by crafted names.

`sea` is the namespace of the bound keys; `secret-moon` is the one that must not exist for them. A
foreign thing gets the very answer of a thing that there isn't.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import psycopg
import pytest

from orbit.api.application import create_application
from orbit.app import Node
from orbit.governance.halt import Order
from orbit.reading.view import camel_case, cursor_of
from tests.scenario.access import asking, key_of
from tests.scenario.conftest import (
    Configure,
    Facts,
    MakeNode,
    Receiver,
    ended,
    policy,
    profile,
    run_profile,
    until,
)
from tests.scenario.routes import OF_A_NAMESPACE, ROUTES, inputs
from tests.scenario.two_namespaces import FOREIGN, OWN, PAYLOAD, TOKEN, Scene, both_namespaces

LISTS = ("/cycles", "/slots", "/dead-letters", "/dead-letters/requeues", "/lanes")
NOT_TO_BE_READ = {"/session/open", "/telemetry/stream"}  # a page for browsers; an endless answer
UNKNOWN = "01890000-0000-7000-8000-000000000000"
# What is asked of each route that may name something foreign. A route that has a parameter in its
# path, or takes names of namespaces or of what is theirs, and stands in none of these, fails.
BY_ID: dict[tuple[str, str], tuple[str, Any]] = {
    ("GET", "/cycles/{cycleRunId}"): ("cycle_id", None),
    ("POST", "/cycles/{cycleRunId}/rerun"): ("cycle_id", {"force": True}),
    ("GET", "/dead-letters/{jobId}"): ("job_id", None),
    ("POST", "/dead-letters/{jobId}/requeue"): ("job_id", {"reason": "x", "force": True}),
    ("POST", "/dead-letters/{jobId}/discard"): ("job_id", {"reason": "x"}),
    ("GET", "/dead-letters/requeues/{batchId}"): ("batch_id", None),
    ("POST", "/dead-letters/requeues/{batchId}/cancel"): ("batch_id", {"reason": "x"}),
    ("POST", "/keys/{keyId}/rotate"): ("foreign_key_id", {}),
    ("POST", "/keys/{keyId}/revoke"): ("foreign_key_id", {}),
}
BY_BODY: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("POST", "/cycles/trigger"): [{"payload": 1}],
    ("POST", "/outcomes"): [
        {"outcomeId": "x", "metric": "m", "value": 0.5, "runId": UNKNOWN},
        {"outcomeId": "x", "metric": "m", "value": 0.5, "jobId": UNKNOWN},
    ],
    ("POST", "/dead-letters/requeue"): [
        {"reason": "x"},
        {"isDryRun": True},
        {"reason": "x", "rate": 1},
    ],
}
BY_PATH: dict[tuple[str, str], Any] = {
    ("GET", "/governance/namespaces/{namespace}"): None,
    ("POST", "/governance/namespaces/{namespace}/halt"): None,
    ("POST", "/governance/namespaces/{namespace}/resume"): {"reason": "x"},
    ("POST", "/governance/namespaces/{namespace}/settings"): {
        "twoPersonResume": False,
        "reason": "x",
    },
}
BY_THEIR_OWN_TEST = {
    ("GET", "/lanes/{namespace}/{endpointKey}"),  # a_foreign_id_is_as_good_as_none
    ("POST", "/keys"),  # a_foreign_namespace_is_as_good_as_none
    ("POST", "/run-profiles/trigger"),  # what_a_reference_names_must_be_ones_own
    ("GET", "/audit/export"),  # an_export_has_no_foreign_log
    ("GET", "/telemetry"),  # test_telemetry
    ("GET", "/telemetry/stream"),
    ("GET", "/telemetry/consumers/{name}"),
    ("POST", "/telemetry/consumers"),
    ("POST", "/telemetry/consumers/{name}/commit"),
    ("POST", "/telemetry/consumers/{name}/remove"),
    ("GET", "/profiles/{profileId}/signals"),  # test_signals
    ("POST", "/profiles/{profileId}/signals"),
    ("POST", "/profiles/{profileId}/strategy-proposals"),  # test_proposals
    ("GET", "/proposals"),
    ("GET", "/proposals/{proposalId}"),
    ("POST", "/proposals/{proposalId}/approve"),
    ("POST", "/proposals/{proposalId}/reject"),
    ("POST", "/profiles/{profileId}/disable"),  # test_overlays
    ("POST", "/profiles/{profileId}/enable"),
    ("POST", "/run-profiles/{runProfileId}/disable"),
    ("POST", "/run-profiles/{runProfileId}/enable"),
    ("GET", "/autonomy/{profileId}"),  # test_autonomy
    ("POST", "/autonomy/{profileId}/arm"),
    ("POST", "/autonomy/{profileId}/shadow"),
    ("POST", "/autonomy/{profileId}/disarm"),
    ("POST", "/autonomy/{profileId}/revert"),
}
FOREIGN_NAMES = {
    "namespace": FOREIGN,
    "runProfileId": f"{FOREIGN}-daily",
    "endpointKey": f"{FOREIGN}-out",
}


@pytest.fixture
async def scene(make_node: MakeNode, configure: Configure, receiver: Receiver) -> Scene:
    """Both namespaces have had everything."""
    return await both_namespaces(make_node, configure, receiver)


def shown(answer: httpx.Response, *ids: str) -> tuple[int, str]:
    """An answer's status and text, without the ids that were asked for."""
    text = answer.text
    for one in ids:
        text = text.replace(one, "ID")
    return answer.status_code, text


def filters(node: Node) -> dict[str, set[str]]:
    """Of each list, the filters that name a namespace or what is of one."""
    described = inputs(create_application(node).openapi())
    return {
        path: query & OF_A_NAMESPACE
        for (method, path), (query, _) in described.items()
        if method == "GET" and query & OF_A_NAMESPACE and (method, path) not in BY_THEIR_OWN_TEST
    }


async def test_every_route_that_may_name_something_foreign_is_asked_here(
    make_node: MakeNode,
) -> None:
    """A route with a parameter in its path, or names of a namespace's, is in one of the tables."""
    node = await make_node(is_started=False)
    described = inputs(create_application(node).openapi())
    assert set(described) | {("GET", "/openapi.json"), ("GET", "/docs")} == set(ROUTES)
    wanted = {
        route
        for route, (query, body) in described.items()
        if "{" in route[1] or (query | body) & OF_A_NAMESPACE
    }
    lists = {("GET", path) for path in filters(node)}
    assert wanted == {*BY_ID, *BY_BODY, *BY_PATH, *BY_THEIR_OWN_TEST, *lists}
    assert set().union(*filters(node).values()) <= set(FOREIGN_NAMES)


async def test_a_foreign_id_is_as_good_as_none(scene: Scene, facts: Facts) -> None:
    """Each route with an id answers 404, word for word as for an id that nothing has."""
    counts = "SELECT (SELECT count(*) FROM dispatch_job), (SELECT count(*) FROM cycle_run) AS runs"
    decisions = "SELECT FROM dead_letter_decision WHERE namespace = %s"
    before, decided = facts(counts), len(facts(decisions, FOREIGN))
    async with asking(scene.node, await key_of(scene.node, "admin", namespaces=[OWN])) as api:
        for (method, path), (kind, body) in BY_ID.items():
            foreign = getattr(scene, kind)
            unknown = UNKNOWN if "-" in foreign else "0" * 16
            answers = [
                await api.request(method, _filled(path, one), json=body)
                for one in (foreign, unknown)
            ]
            assert answers[0].status_code == 404, (path, answers[0].text)
            assert shown(answers[0], foreign) == shown(answers[1], unknown), path
            assert [*answers[0].headers] == [*answers[1].headers]
        lanes = [await api.get(f"/lanes/{one}/{one}-out") for one in (FOREIGN, "nowhere-atall")]
        assert shown(lanes[0], FOREIGN) == shown(lanes[1], "nowhere-atall")
        for path, own in (
            ("/cycles/{}", scene.own_cycle_id),
            ("/dead-letters/{}", scene.own_job_id),
            ("/dead-letters/requeues/{}", scene.own_batch_id),
            ("/lanes/{}", "sea/sea-out"),
        ):
            assert (await api.get(path.format(own))).status_code == 200, path
    assert facts(counts) == before
    assert len(facts(decisions, FOREIGN)) == decided
    assert facts("SELECT FROM access_key_end") == []


async def test_a_foreign_namespace_is_as_good_as_none(scene: Scene, facts: Facts) -> None:
    """In a filter it is empty, in a body not found: as a name that nobody uses."""
    before = facts("SELECT count(*) AS n FROM cycle_run")
    async with asking(scene.node, await key_of(scene.node, "admin", namespaces=[OWN])) as api:
        for path, names in filters(scene.node).items():
            for name in names:
                answers = [
                    await api.get(path, params={name: one})
                    for one in (FOREIGN_NAMES[name], "unused")
                ]
                assert answers[0].status_code == 200, (path, name)
                assert answers[0].json()["items"] == [], (path, name)
                assert shown(answers[0]) == shown(answers[1]), (path, name)
        running = await api.get("/cycles", params={"namespace": FOREIGN, "state": "running"})
        assert running.json()["items"] == []
        for (method, path), bodies in BY_BODY.items():
            for body in bodies:
                answers = [
                    await api.request(method, path, json={**body, "namespace": one})
                    for one in (FOREIGN, "unused")
                ]
                assert answers[0].status_code == 404
                assert shown(answers[0], FOREIGN) == shown(answers[1], "unused"), path
        for namespaces in ([FOREIGN], ["unused"], ["*"], [OWN, FOREIGN]):
            wanted = {"name": "x", "scopes": ["viewer"], "namespaces": namespaces}
            assert (await api.post("/keys", json=wanted)).status_code == 404, namespaces
    assert facts("SELECT count(*) AS n FROM cycle_run") == before


async def test_what_a_reference_names_must_be_ones_own(scene: Scene, receiver: Receiver) -> None:
    """A foreign endpoint or run profile is unknown, and no message tells of others."""
    before = len(receiver.at("/secret-moon-out"))
    async with asking(scene.node, await key_of(scene.node, "operator", namespaces=[OWN])) as api:
        answers = [
            await api.post("/cycles/trigger", json={"namespace": OWN, "endpointKeys": [one]})
            for one in ("secret-moon-out", "unused-out")
        ]
        assert answers[0].status_code == 400
        assert shown(answers[0], "secret-moon-out") == shown(answers[1], "unused-out")
        named = [
            await api.post("/run-profiles/trigger", json={"runProfileIds": [one]})
            for one in ("secret-moon-daily", "unused-daily")
        ]
        assert named[0].status_code == 404
        assert shown(named[0], "secret-moon-daily") == shown(named[1], "unused-daily")
        every = (await api.post("/run-profiles/trigger")).json()["items"]
        assert [one["runProfileId"] for one in every] == ["sea-daily"]
        body = {"namespace": OWN, "endpointKeys": ["sea-out", "default-endpoint"]}
        assert (await api.post("/cycles/trigger", json=body)).status_code == 202
    assert len(receiver.at("/secret-moon-out")) == before


async def test_a_run_profile_that_moved_takes_no_payload_along(
    scene: Scene, configure: Configure, facts: Facts
) -> None:
    """A failed cycle isn't run again in the namespace that its run profile is in by now."""
    node = scene.node
    configure(
        run_profile(
            "sea-daily",
            profile_id="nova",
            namespace=OWN,
            distribution_targets=["sea-out"],
            execution_policy=policy(tier1=["tests.scenario.test_namespaces:broken"]),
        ),
        profiles=[profile("nova")],
    )
    async with asking(node, await key_of(node, "admin")) as admin:

        async def is_reloaded() -> bool:
            return (await admin.post("/config/reload")).status_code == 200

        await until(is_reloaded, "the reload")
        (started,) = (await admin.post("/run-profiles/trigger")).json()["items"]
        cycle_id = started["cycleRunId"]
        assert (await ended(node, cycle_id))["state"] == "failed"
        configure(
            run_profile(
                "sea-daily",
                profile_id="nova",
                namespace=FOREIGN,
                distribution_targets=["secret-moon-out"],
            ),
            profiles=[profile("nova")],
        )
        await until(is_reloaded, "the reload")
        answer = await admin.post(f"/cycles/{cycle_id}/rerun")
        assert (answer.status_code, answer.json()["code"]) == (409, "not_rerunnable")
    assert facts("SELECT FROM cycle_run WHERE rerun_of IS NOT NULL") == []


async def test_nothing_tells_of_a_foreign_namespace(scene: Scene) -> None:
    """Whatever a bound key may get, whole, has no name, id or count of the other namespace."""
    node = scene.node
    traces = ["secret-moon", scene.cycle_id, scene.job_id, scene.batch_id, scene.foreign_key_id]
    async with asking(node, await key_of(node, "admin", namespaces=[OWN])) as api:
        seen = 0
        for method, path in ROUTES:
            if method != "GET" or "{" in path or path in NOT_TO_BE_READ:
                continue
            answer = await api.get(path)
            assert not [one for one in traces if one in answer.text], (path, answer.text)
            seen += answer.status_code == 200
        assert seen >= 15
        status = (await api.get("/status")).json()
        assert [one["namespace"] for one in status["schedules"]] == [OWN]
        assert status["openDeadLetters"] <= 3
        assert [one["namespace"] for one in status["slotsNotFired"]] == [OWN]


async def test_why_another_namespace_was_switched_is_not_told(scene: Scene) -> None:
    """It puts the configuration of all into force, for a reason that is its own, or names it."""
    node = scene.node
    bound = await key_of(node, "admin", namespaces=[OWN])
    async with asking(node, await key_of(node, "admin")) as every, asking(node, bound) as api:
        for path, body in (
            (f"/run-profiles/{FOREIGN}-daily/disable", {"reason": "their-secret"}),
            (f"/profiles/{FOREIGN}-profile/disable", {}),
        ):
            assert (await every.post(path, json=body)).json()["isChanged"] is True
            shown, told = (await api.get("/config")).json(), (await every.get("/config")).json()
            assert told["reason"], path
            assert shown["reason"] is None, path
            assert shown["activatedAt"] == told["activatedAt"]
            assert "secret" not in json.dumps(shown), path


async def test_no_page_and_no_cursor_tells_of_a_foreign_namespace(scene: Scene) -> None:
    """Pages are full as if the others weren't there, and cursors name own things only."""
    node = scene.node
    async with asking(node, await key_of(node, "viewer", namespaces=[OWN])) as api:
        for path in (*LISTS, "/audit"):
            whole = (await api.get(path)).json()["items"]
            assert whole, path
            found, cursor = [], None
            while True:
                params: dict[str, Any] = {"limit": 1} | ({"cursor": cursor} if cursor else {})
                page = (await api.get(path, params=params)).json()
                found += page["items"]
                cursor = page["nextCursor"]
                if cursor is None:
                    break
                assert len(page["items"]) == 1, path
                assert "secret" not in _decoded(cursor)
            assert [_named(one) for one in found] == [_named(one) for one in whole]
        crafted = cursor_of((FOREIGN, "a"))
        for one in (await api.get("/lanes", params={"cursor": crafted})).json()["items"]:
            assert one["namespace"] == OWN


async def test_what_others_run_hides_no_last_cycle(scene: Scene, owner_dsn: str) -> None:
    """A run profile's last cycle is looked for in its own namespace, whatever runs elsewhere."""
    async with asking(scene.node, await key_of(scene.node, "viewer", namespaces=[OWN])) as api:
        before = (await api.get("/run-profiles")).json()["items"][0]["lastCycle"]
        with psycopg.connect(owner_dsn) as connection:
            connection.execute(
                "INSERT INTO cycle_run (namespace, cycle_id, trigger, traceparent, node_id)"
                " SELECT %s, orbit_new_batch(), 'api', 'x', orbit_new_batch()"
                " FROM generate_series(1, 5100)",
                (FOREIGN,),
            )
        after = (await api.get("/run-profiles")).json()["items"][0]["lastCycle"]
    assert before is not None
    assert after == before


async def test_the_brake_of_a_foreign_namespace_is_not_there(scene: Scene, facts: Facts) -> None:
    """Neither shown nor pulled nor let go, and its halt shows nowhere; nor is the rule of all."""
    node = scene.node
    await node.brake.halt(Order(FOREIGN, "ann", "key-1", "secret-reason"))
    async with asking(node, await key_of(node, "admin", namespaces=[OWN])) as api:
        for one in (FOREIGN, "unused", "*"):
            for (method, path), body in BY_PATH.items():
                answer = await api.request(method, _filled(path, one), json=body)
                assert answer.status_code == 404, (path, one, answer.text)
                assert "secret-reason" not in answer.text
        assert (await api.get("/status")).json()["haltedNamespaces"] == []
        path = f"/governance/namespaces/{OWN}"
        assert (await api.post(f"{path}/halt")).json()["inForce"] is True
        assert (await api.get(path)).json()["state"] == "halted"
        (shown_one,) = (await api.get("/status")).json()["haltedNamespaces"]
        assert shown_one["namespace"] == OWN
    halts = facts("SELECT namespace FROM namespace_halt ORDER BY namespace")
    assert [row["namespace"] for row in halts] == [OWN, FOREIGN]
    assert facts("SELECT FROM namespace_resume") == []
    assert facts("SELECT FROM governance_setting") == []


async def test_an_export_has_no_foreign_log(scene: Scene) -> None:
    """Without a name it is one's own log; of several one is named, and `*` is everybody's."""
    node = scene.node
    async with asking(node, await key_of(node, "viewer", namespaces=[OWN])) as api:
        lines = [json.loads(one) for one in (await api.get("/audit/export")).text.splitlines()]
        assert {one["log"] for one in lines if one["kind"] in {"entry", "fact"}} == {OWN}
        for one in (FOREIGN, "unused", "*"):
            answer = await api.get("/audit/export", params={"namespace": one})
            assert answer.status_code == 404, one
    both = await key_of(node, "viewer", namespaces=[OWN, FOREIGN])
    async with asking(node, both) as api:
        assert (await api.get("/audit/export")).status_code == 400
        answer = await api.get("/audit/export", params={"namespace": FOREIGN})
        assert answer.status_code == 200
        logs = {one["namespace"] for one in (await api.get("/audit")).json()["items"]}
        assert logs == {OWN, FOREIGN}


async def test_a_viewer_sees_no_secret_of_a_step(
    make_node: MakeNode, configure: Configure, receiver: Receiver
) -> None:
    """Steps' addresses lose their query for everybody, and their options for a viewer."""
    step = {
        "use": "http",
        "url": "https://steps.example/one?api_key=SECRET-OF-ADDRESS",
        "options": {"key": "SECRET-OF-OPTIONS"},
    }
    steps = policy(tier1=[step], normalization=step)
    configure(run_profile(namespace=OWN, execution_policy=steps))
    node = await make_node(auth="on", dispatch_endpoints=(receiver.endpoint("out"),))
    async with asking(node, await key_of(node, "viewer", namespaces=[OWN])) as api:
        text = (await api.get("/run-profiles")).text
        assert "https://steps.example/one" in text
        assert "SECRET-OF" not in text
    async with asking(node, await key_of(node, "operator", namespaces=[OWN])) as api:
        text = (await api.get("/run-profiles")).text
        assert "SECRET-OF-OPTIONS" in text
        assert "SECRET-OF-ADDRESS" not in text


async def test_a_viewer_sees_no_text_of_a_free_object(
    make_node: MakeNode, configure: Configure, receiver: Receiver
) -> None:
    """It may be a token or a prompt; shapes, numbers and tags are shown, texts to who may act."""
    free: dict[str, Any] = {"a": [{"b": "SECRET", "c": 1}], "d": True, "e": None}
    shown = {"a": [{"b": "(withheld)", "c": 1}], "d": True, "e": None}
    names = ("style_vector", "asset_bindings", "execution_rules", "distribution_map")
    nova = profile(value_tags={"team": "blue"}) | dict.fromkeys(names, free)
    configure(run_profile(namespace=OWN, asset_bundle=free), profiles=[nova])
    node = await make_node(auth="on", dispatch_endpoints=(receiver.endpoint("out"),))
    for scope, expected in (("viewer", shown), ("operator", free), ("approver", free)):
        async with asking(node, await key_of(node, scope, namespaces=[OWN])) as api:
            (one,) = (await api.get("/profiles")).json()["items"]
            (bound,) = (await api.get("/run-profiles")).json()["items"]
        found = [one[camel_case(name)] for name in names]
        assert [*found, bound["assetBundle"]] == [expected] * 5, scope
        assert one["valueTags"] == {"team": "blue"}


async def test_a_viewer_sees_neither_tokens_nor_payloads(scene: Scene) -> None:
    """A receiver that repeats what it got does not show it to who may only look."""
    node = scene.node
    paths = (
        f"/cycles/{scene.own_cycle_id}",
        "/dead-letters",
        f"/dead-letters/{scene.own_job_id}",
        "/profiles",
        "/run-profiles",
        "/status",
        "/config",
        "/lanes/sea/sea-out",
    )
    async with asking(node, await key_of(node, "viewer", namespaces=[OWN])) as api:
        for path in paths:
            answer = await api.get(path)
            assert answer.status_code == 200, path
            assert PAYLOAD not in answer.text, path
            assert TOKEN not in answer.text, path
        (job,) = (await api.get(paths[0])).json()["jobs"]
        assert job["receipts"][0]["answer"]["isWithheld"] is True
    async with asking(node, await key_of(node, "operator", namespaces=[OWN])) as api:
        (job,) = (await api.get(paths[0])).json()["jobs"]
        assert job["receipts"][0]["answer"]["text"] == PAYLOAD


def broken(payload: Any, context: Any) -> Any:
    """A step that fails."""
    raise ValueError("no")


def _filled(path: str, given: str) -> str:
    """A path with its one parameter."""
    return f"{path.partition('{')[0]}{given}{path.partition('}')[2]}"


def _decoded(cursor: str) -> str:
    return base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()


def _named(item: dict[str, Any]) -> list[Any]:
    names = ("cycleRunId", "jobId", "batchId", "slotAt", "endpointKey", "seq")
    return [item.get(name) for name in names]
