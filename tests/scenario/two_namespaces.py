"""Two namespaces on one node, and all that can be of one: what the tests of isolation share.

`sea` is the namespace of the bound keys; `secret-moon` is the one that must not exist for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx
from aiohttp import web

from orbit.app import Node
from tests.scenario.access import asking, key_of
from tests.scenario.conftest import (
    Arrival,
    Configure,
    MakeNode,
    Receiver,
    ended,
    policy,
    run_profile,
    until,
)
from tests.scenario.test_proposals import moved, say

OWN, FOREIGN = "sea", "secret-moon"
PAYLOAD = "payload-that-a-viewer-may-not-see"
TOKEN = "token-that-nobody-may-see"
_SLOT = (
    b"INSERT INTO schedule_slot (namespace, run_profile_id, slot_at, outcome, reason, node_id)"
    b" VALUES (%s, %s, orbit_now(), 'missed', 'why', %s)"
)


@dataclass(frozen=True)
class Scene:
    """A node where both namespaces have had everything, and the ids of the foreign ones."""

    node: Node
    cycle_id: str
    job_id: str
    batch_id: str
    proposal_id: str
    own_cycle_id: str
    own_job_id: str
    own_batch_id: str
    own_proposal_id: str
    foreign_key_id: str

    def ids(self, namespace: str) -> dict[str, str]:
        """What is there of one of the two, under the names that the API's parameters have."""
        is_own = namespace == OWN
        return {
            "namespace": namespace,
            "cycleRunId": self.own_cycle_id if is_own else self.cycle_id,
            "jobId": self.own_job_id if is_own else self.job_id,
            "batchId": self.own_batch_id if is_own else self.batch_id,
            "proposalId": self.own_proposal_id if is_own else self.proposal_id,
            "profileId": f"{namespace}-profile",
            "runProfileId": f"{namespace}-daily",
            "endpointKey": f"{namespace}-out",
            "name": f"{namespace}-reader",
        } | ({} if is_own else {"keyId": self.foreign_key_id})


async def both_namespaces(make_node: MakeNode, configure: Configure, receiver: Receiver) -> Scene:
    """Each has a run profile, a slot, a dead letter, a requeue, a proposal, a consumer, a key."""

    async def echo(arrival: Arrival) -> web.Response:
        return web.Response(status=500, body=arrival.body)

    receiver.answers = {"/sea-out": echo, "/secret-moon-out": echo, "/default": echo}
    configure(
        *(
            run_profile(
                f"{name}-daily",
                profile_id=f"{name}-profile",
                namespace=name,
                distribution_targets=[f"{name}-out"],
                execution_policy=policy(schedule="0 6 * * *"),
            )
            for name in (OWN, FOREIGN)
        ),
        profiles=[moved() | {"profile_id": f"{name}-profile"} for name in (OWN, FOREIGN)],
    )
    node = await make_node(
        auth="on",
        max_dispatch_retries=0,
        dispatch_endpoints=(
            receiver.endpoint("sea-out", token=TOKEN),
            receiver.endpoint("secret-moon-out", token=TOKEN),
            receiver.endpoint("default-endpoint", "/default", token=TOKEN),
        ),
    )
    found = [await _everything(node, name) for name in (FOREIGN, OWN)]
    key = await key_of(node, "admin", namespaces=[FOREIGN])
    return Scene(node, *found[0], *found[1], key.key_id)


async def _everything(node: Node, namespace: str) -> tuple[str, str, str, str]:
    """The ids of a cycle, of its dead job, of a bulk requeue that has ended, and of a proposal."""
    async with asking(node, await key_of(node, "admin")) as admin:
        body = {
            "namespace": namespace,
            "payload": PAYLOAD,
            "endpointKeys": [f"{namespace}-out"],
        }
        await _dead(admin, node, body)
        asked = {"namespace": namespace, "reason": "x", "canary": 1, "limit": 1}
        answer = await admin.post("/dead-letters/requeue", json=asked)
        batch_id = answer.json()["batchId"]
        cycle_id, job_id = await _dead(admin, node, body)
        await admin.post("/run-profiles/trigger", json={"runProfileIds": [f"{namespace}-daily"]})

        async def is_over() -> bool:
            answer = await admin.get(f"/dead-letters/requeues/{batch_id}")
            return bool(answer.json()["state"] != "running")

        await until(is_over, "the end of the bulk requeue")
        await node.database.execute(_SLOT, [namespace, f"{namespace}-daily", node.node_id])
        consumer = {"name": f"{namespace}-reader", "namespaces": [namespace]}
        assert (await admin.post("/telemetry/consumers", json=consumer)).status_code == 201
        return cycle_id, job_id, batch_id, await _proposed(node, admin, namespace)


async def _proposed(node: Node, admin: httpx.AsyncClient, namespace: str) -> str:
    """A proposal for the namespace's profile, whoever makes it: this asks, the node looks too."""
    await say(node, "low_performance", 7, namespace, profile_id=f"{namespace}-profile")
    await node.proposals.generate(namespace)

    async def made() -> list[Any]:
        answer = await admin.get("/proposals", params={"namespace": namespace})
        found: list[Any] = answer.json()["items"]
        return found

    (proposal,) = await until(made, "the proposal")
    proposal_id: str = proposal["proposalId"]
    return proposal_id


async def _dead(admin: httpx.AsyncClient, node: Node, body: dict[str, Any]) -> tuple[str, str]:
    """A new cycle and its one job, which is dead."""
    cycle_id = (await admin.post("/cycles/trigger", json=body)).json()["cycleRunId"]
    await ended(node, cycle_id)
    (job,) = (await admin.get(f"/cycles/{cycle_id}")).json()["jobs"]

    async def is_dead() -> bool:
        return (await admin.get(f"/dead-letters/{job['jobId']}")).status_code == 200

    await until(is_dead, "the dead letter")
    return cycle_id, job["jobId"]
