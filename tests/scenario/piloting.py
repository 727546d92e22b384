"""What the tests of autonomy share: a fleet with a past, an approved proposal, and a few words.

The fleet's past is told as events that its cycles would have left; what the detector makes of them,
and everything after it, is real.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orbit.app import Node
from orbit.execution.context import ExecutionContext
from orbit.governance.actor import ANYONE
from orbit.payload import Payload
from orbit.services.pilot import Pilot
from orbit.telemetry.catalogue import EventType
from orbit.telemetry.emission import Event, emit
from tests.scenario.conftest import Configure, Facts, MakeNode, policy, profile, run_profile, until
from tests.scenario.test_proposals import moved, say

PEERS = tuple(f"peer-{number}" for number in range(5))
ON = {"phase4_enabled": True, "phase4_allow_mutation": True}
seen: list[float] = []


async def note(payload: Payload, context: ExecutionContext) -> Payload:
    """A step that keeps the intensity it was told."""
    seen.append(context.instruction["execution_rules"]["intensity"])
    return payload


def configure_fleet(
    configure: Configure, *, nova: Mapping[str, Any] | None = None, namespace: str = "sea"
) -> None:
    """Nova, whose intensity may move, and five peers; all run in one namespace, to nowhere."""
    configure(
        run_profile(
            namespace=namespace,
            distribution_targets=[],
            execution_policy=policy(tier1=[f"{__name__}:note"]),
        ),
        *(
            run_profile(name, profile_id=name, namespace=namespace, distribution_targets=[])
            for name in PEERS
        ),
        profiles=[moved() if nova is None else nova, *map(profile, PEERS)],
    )


async def fleet(make_node: MakeNode, configure: Configure, facts: Facts, **given: Any) -> Node:
    """A node with the fleet and its past; it makes its passes when the test says so."""
    configure_fleet(configure)
    node = await make_node(**given)
    await node._pilot.stop()
    await node._strategist.stop()
    await tell(node, facts, rounds=100)
    return node


async def tell(
    node: Node, facts: Facts, *, rounds: int, nova: int = 9, peers: int = 9, namespace: str = "sea"
) -> None:
    """So many rounds of cycles of all, under what is in force: of ten jobs so many delivered."""
    revision = node.configuration.active.revision
    delivered = {"nova": nova, **dict.fromkeys(PEERS, peers)}
    events = [
        Event(
            namespace,
            EventType.EXECUTION_FINISHED,
            # A baseline that never varied would be one of a machine.
            {"jobs": 10, "delivered": count - (number % 10 == 0), "revision": revision},
            name,
        )
        for number in range(rounds)
        for name, count in delivered.items()
    ]
    async with node.database.transaction() as connection:
        await emit(connection, *events)
    await until(lambda: not facts("SELECT FROM telemetry_pending"), "the positions")
    await node.signals.feed(namespace)


async def proposed(node: Node, position: int = 7, namespace: str = "sea") -> str:
    """A proposal to lower nova's intensity by one; pending."""
    await say(node, "low_performance", position, namespace)
    made = (await node.proposals.generate(namespace)).made
    assert len(made) == 1
    return made[0]


async def approved(node: Node, position: int = 7) -> str:
    """The same, approved by a person."""
    proposal_id = await proposed(node, position)
    await node.proposals.decide(proposal_id, ANYONE, is_approved=True, reason=None)
    return proposal_id


def intensity(node: Node) -> float:
    """What new cycles of nova would be told."""
    nova = node.configuration.active.documents.profile("nova")
    assert nova is not None
    found: float = nova.execution_rules["intensity"]
    return found


async def look(node: Node) -> None:
    """One pass of autonomy, as the node makes one every few seconds."""

    async def leads() -> bool:
        return bool(await node.proposals.namespaces(node.node_id))

    await until(leads, "the numbering of events")
    await Pilot(node.database, node.modes, node.changes, node.shadows, node.node_id).run_once()
    await node.configuration.refresh()
