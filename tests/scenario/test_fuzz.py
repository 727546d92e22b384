"""The whole API under schemathesis: with no key, a viewer's and an admin's.

Whatever the description allows is sent to each operation of a real server. No answer is a 5xx, and
none has a word of what its asker may not know.
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
from orbit.app import Node
from tests.scenario.access import bearer, key_of
from tests.scenario.conftest import Configure, MakeNode, Receiver, profile, run_profile, send

EXAMPLES = 12
FOREIGN, TOKEN = "secret-moon", "token-that-nobody-may-see"
WITHOUT_KEY = {401, 404, 405, 413}
OPEN = {"/health", "/ready", "/session/open"}


@pytest.fixture
async def served(
    make_node: MakeNode, configure: Configure, receiver: Receiver
) -> AsyncIterator[tuple[Node, str, dict[str, Any]]]:
    """A node with its API on a port: its address and its description."""
    configure(
        *(
            run_profile(f"{name}-daily", namespace=name, distribution_targets=[f"{name}-out"])
            for name in ("sea", FOREIGN)
        ),
        profiles=[profile()],
    )
    endpoints = [receiver.endpoint(f"{name}-out", token=TOKEN) for name in ("sea", FOREIGN)]
    node = await make_node(auth="on", dispatch_endpoints=tuple(endpoints))
    await send(node, None, namespace=FOREIGN, endpoint_keys=[f"{FOREIGN}-out"])
    application = create_application(node)
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
    yield node, f"http://127.0.0.1:{listening.getsockname()[1]}", _hasty(application.openapi())
    server.should_exit = True
    await serving


def _hasty(description: dict[str, Any]) -> dict[str, Any]:
    """The description with drills that watch for a moment only, and without the endless stream."""
    del description["paths"]["/telemetry/stream"]
    drill = description["paths"]["/governance/drills/halt"]["post"]
    schema = drill["requestBody"]["content"]["application/json"]["schema"]
    schema["properties"]["watchSeconds"]["maximum"] = 0.1
    return description


def fuzz(
    url: str, description: dict[str, Any], token: str | None, hidden: list[str]
) -> dict[str, set[int]]:
    """Sends what the description allows to each operation; the statuses by path.

    Each case comes from an address of its own, so that no pause answers for the one behind it.
    Raises AssertionError for a 5xx, and for one of the hidden words in an answer.
    """
    known = {} if token is None else bearer(token)
    peers = (str(ipaddress.IPv4Address("10.0.0.1") + number) for number in itertools.count())
    found: dict[str, set[int]] = {}
    for result in schemathesis.openapi.from_dict(description).get_all_operations():
        assert isinstance(result, Ok)
        operation = result.ok()

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
            headers = known | {"X-Forwarded-For": next(peers)}
            answer = case.call(base_url=url, headers=headers, allow_redirects=False, timeout=30)
            label = f"{case.method} {case.formatted_path}: {answer.status_code} {answer.text}"
            assert answer.status_code < 500, label
            assert not [one for one in hidden if one in answer.text], label
            found.setdefault(case.path, set()).add(answer.status_code)
            if token is None and case.path not in OPEN:
                assert answer.status_code in WITHOUT_KEY, label

        check()
    return found


# The node, in this process, draws random delays while cases are made.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
@pytest.mark.parametrize("who", ["nobody", "viewer", "admin"])
async def test_no_input_breaks_the_api_or_tells_a_secret(
    served: tuple[Node, str, dict[str, Any]], who: str
) -> None:
    """Every operation, as its description allows: no 5xx, nothing of another namespace."""
    node, url, description = served
    token, hidden = None, [TOKEN] if who == "admin" else [TOKEN, FOREIGN]
    if who != "nobody":
        namespaces = ["sea"] if who == "viewer" else ["*"]
        token = (await key_of(node, who, namespaces=namespaces)).text
    found = await asyncio.to_thread(fuzz, url, description, token, hidden)
    assert len(found) >= 28
    if who == "nobody":
        assert found["/status"] == {401}
    else:
        assert 200 in found["/status"]
