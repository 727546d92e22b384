"""The whole API under schemathesis: with no key, a viewer's and an admin's.

Whatever the description allows is sent to each operation of a real server, in two cases of three
with ids of what is there, the asker's or another namespace's. No answer is a 5xx, and none has a
word of what its asker may not know. The stream, which does not end, is left to test_telemetry.
"""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as effort
from schemathesis.core.result import Ok

from orbit.api.application import create_application
from tests.scenario.access import bearer, key_of
from tests.scenario.conftest import Configure, MakeNode, Receiver
from tests.scenario.two_namespaces import (
    FOREIGN,
    OWN,
    PAYLOAD,
    TOKEN,
    Scene,
    both_namespaces,
)

EXAMPLES = 12
# What a viewer finds of its own namespace's under the ids that are there.
FOUND = {
    "/autonomy/{profileId}",
    "/cycles/{cycleRunId}",
    "/dead-letters/requeues/{batchId}",
    "/dead-letters/{jobId}",
    "/governance/namespaces/{namespace}",
    "/lanes/{namespace}/{endpointKey}",
    "/profiles/{profileId}/signals",
    "/proposals/{proposalId}",
    "/telemetry/consumers/{name}",
}
WITHOUT_KEY = {401, 404, 405, 413}
OPEN = {"/health", "/ready", "/session/open"}


@pytest.fixture
async def served(
    make_node: MakeNode, configure: Configure, receiver: Receiver
) -> AsyncIterator[tuple[Scene, str, dict[str, Any]]]:
    """A node where two namespaces have had everything, its API's address and description."""
    scene = await both_namespaces(make_node, configure, receiver)
    application = create_application(scene.node)
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        application,
        log_config=None,
        lifespan="off",
        ws="none",
        http="h11",
        forwarded_allow_ips=["127.0.0.1"],
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve([listening]))
    yield scene, f"http://127.0.0.1:{listening.getsockname()[1]}", _hasty(application.openapi())
    server.should_exit = True
    await serving


def _hasty(description: dict[str, Any]) -> dict[str, Any]:
    """The description with drills that watch for a moment only, and without the endless stream."""
    del description["paths"]["/telemetry/stream"]
    drill = description["paths"]["/governance/drills/halt"]["post"]
    schema = drill["requestBody"]["content"]["application/json"]["schema"]
    schema["properties"]["watchSeconds"]["maximum"] = 0.1
    return description


def aim(case: Any, ids: dict[str, str]) -> None:
    """Has the case name what is there, where its operation takes such names."""
    for named in (case.path_parameters, case.query, case.body):
        if isinstance(named, dict):
            named.update({name: ids[name] for name in named.keys() & ids})


def fuzz(
    url: str,
    description: dict[str, Any],
    token: str | None,
    hidden: set[str],
    there: list[dict[str, str]],
) -> dict[str, set[int]]:
    """Sends what the description allows to each operation; the statuses by path.

    In turn the cases name what is in `there`, whatever was made up if that is empty.

    Each case comes from an address of its own, so that no pause answers for the one behind it.
    Raises AssertionError for a 5xx, for a hidden word that an answer has and its question had not,
    and for an answer of what a hidden word names.
    """
    aims = itertools.cycle(there)
    known = {} if token is None else bearer(token)
    peers = (str(ipaddress.IPv4Address("10.0.0.1") + number) for number in itertools.count())
    found: dict[str, set[int]] = {}
    questions: list[str] = []
    operations = []
    for result in schemathesis.openapi.from_dict(description).get_all_operations():
        assert isinstance(result, Ok)
        operations.append(result.ok())
    # In order of their paths /audit comes first: it tells what its asker was refused before.
    for operation in sorted(operations, key=lambda one: str(one.path)):

        @effort(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            aim(case, next(aims))
            questions.append(f"{case.formatted_path} {case.query} {case.body}")
            asked = "".join(questions if case.path.startswith("/audit") else questions[-1:])
            headers = known | {"X-Forwarded-For": next(peers)}
            answer = case.call(base_url=url, headers=headers, allow_redirects=False, timeout=30)
            label = f"{case.method} {case.formatted_path}: {answer.status_code} {answer.text}"
            assert answer.status_code < 500, label
            assert not [one for one in hidden if one in answer.text and one not in asked], label
            if any(one in case.formatted_path for one in hidden):
                assert answer.status_code >= 400, label
            found.setdefault(case.path, set()).add(answer.status_code)
            if token is None and case.path not in OPEN:
                assert answer.status_code in WITHOUT_KEY, label

        check()
    return found


# The node, in this process, draws random delays while cases are made.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
@pytest.mark.parametrize("who", ["nobody", "viewer", "admin"])
async def test_no_input_breaks_the_api_or_tells_a_secret(
    served: tuple[Scene, str, dict[str, Any]], who: str
) -> None:
    """Every operation, as its description allows: no 5xx, nothing of another namespace."""
    scene, url, description = served
    own, foreign = scene.ids(OWN), scene.ids(FOREIGN)
    token, hidden = None, {TOKEN}
    if who != "admin":
        hidden |= {PAYLOAD, *foreign.values()}
    if who != "nobody":
        namespaces = [OWN] if who == "viewer" else ["*"]
        token = (await key_of(scene.node, who, namespaces=namespaces)).text
    there = [{}, own, foreign]
    found = await asyncio.to_thread(fuzz, url, description, token, hidden, there)
    assert len(found) >= 28
    if who == "nobody":
        assert found["/status"] == {401}
    else:
        assert 200 in found["/status"]
    if who == "viewer":
        assert {path for path in FOUND if 200 not in found[path]} == set()
