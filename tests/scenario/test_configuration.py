"""The configuration in force: proposed whole, never under a running cycle, the same for all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from orbit.app import Node
from orbit.errors import ConfigurationInvalid, CyclesActive, DatabaseUnavailable, NotFound
from orbit.execution.context import ExecutionContext
from orbit.payload import Payload
from tests.scenario.conftest import (
    Configure,
    Facts,
    MakeNode,
    Receiver,
    ended,
    policy,
    profile,
    run,
    run_profile,
    until,
)

HERE = __name__
begun: list[str] = []
may_end = asyncio.Event()


async def hold(payload: Payload, context: ExecutionContext) -> Payload:
    """A step that lasts until the test lets it end."""
    begun.append(context.cycle_id)
    await may_end.wait()
    return payload


async def label(payload: Payload, context: ExecutionContext) -> Payload:
    """The profile's label as the cycle knows it."""
    return Payload.of_text(context.instruction["label"])


@pytest.fixture(autouse=True)
async def _forget() -> AsyncIterator[None]:
    global may_end  # noqa: PLW0603 - an event belongs to one loop
    begun.clear()
    may_end = asyncio.Event()
    yield
    may_end.set()


async def test_a_node_proposes_its_files_at_boot(
    configure: Configure, make_node: MakeNode, facts: Facts
) -> None:
    """The files come into force, once; the same files again make no new revision."""
    configure(run_profile("daily", distribution_targets=[]))
    first = await make_node()
    assert [one.run_profile_id for one in first.configuration.active.documents.run_profiles] == [
        "daily"
    ]
    second = await make_node()
    assert second.configuration.active.revision == first.configuration.active.revision
    assert facts("SELECT revision FROM config_revision") == [
        {"revision": first.configuration.active.revision}
    ]
    assert facts("SELECT reason FROM config_activation") == [{"reason": "files at boot"}]
    assert facts("SELECT DISTINCT files_revision FROM node") == [
        {"files_revision": first.configuration.active.revision}
    ]


async def test_files_that_mean_the_same_are_the_same_revision(
    configure: Configure, make_node: MakeNode, config_dir: Path, facts: Facts
) -> None:
    """Order, layout and defaults written out make no new revision; going back makes no third."""
    one, two = (run_profile(name, distribution_targets=[]) for name in ("a", "b"))
    configure(one, two)
    node = await make_node()
    revision = node.configuration.active.revision
    configure(two | {"asset_bundle": {}}, one | {"execution_policy": {"misfire": "fire_once"}})
    file = config_dir / "profiles.json"
    file.write_text("\n " + file.read_text().replace(",", " ,\t"))
    assert (await node.orchestration.reload())[1] is False
    configure(one)
    assert (await node.orchestration.reload())[1] is True
    configure(one, two)
    back, is_changed = await node.orchestration.reload()
    assert (back.revision, is_changed) == (revision, True)
    assert facts("SELECT count(*) FROM config_revision") == [{"count": 2}]
    reasons = facts("SELECT reason FROM config_activation ORDER BY activation_id")
    assert [row["reason"] for row in reasons] == ["files at boot", "reload", "reload"]


async def test_a_reload_waits_for_no_cycle_but_names_those_active(
    configure: Configure, make_node: MakeNode
) -> None:
    """While a cycle runs a reload is refused, changes nothing and says which; then it works."""
    holding = run_profile(execution_policy=policy(tier1=[f"{HERE}:hold"]), distribution_targets=[])
    configure(holding)
    node = await make_node()
    before = node.configuration.active.revision
    [answer] = await node.orchestration.trigger_run_profiles()
    assert answer.cycle_id is not None
    await until(lambda: begun, "the step")
    configure(holding, profiles=[profile(value_tags={"x": 1})])
    with pytest.raises(CyclesActive) as refused:
        await node.orchestration.reload()
    assert str(refused.value) == "1 cycle is active; reload when it has ended"
    assert refused.value.details["activeCycles"] == [
        {"namespace": "brand", "cycleRunId": answer.cycle_id, "runProfileId": "daily"}
    ]
    assert node.configuration.active.revision == before
    may_end.set()
    await ended(node, answer.cycle_id)
    revision, is_changed = await node.orchestration.reload()
    assert is_changed
    assert node.configuration.active.revision == revision.revision != before


async def test_a_reload_of_the_same_files_is_no_change_and_needs_no_rest(
    configure: Configure, make_node: MakeNode
) -> None:
    """Where nothing would change, an active cycle is no obstacle."""
    configure(run_profile(execution_policy=policy(tier1=[f"{HERE}:hold"]), distribution_targets=[]))
    node = await make_node()
    await node.orchestration.trigger_run_profiles()
    await until(lambda: begun, "the step")
    assert (await node.orchestration.reload())[1] is False


async def test_an_invalid_reload_changes_nothing(
    configure: Configure, make_node: MakeNode, facts: Facts
) -> None:
    """Every problem is named, and the old configuration stays in force."""
    configure(run_profile(distribution_targets=[]))
    node = await make_node()
    before = node.configuration.active
    configure(run_profile(profile_id="nowa", distribution_targets=["nowhere"]))
    with pytest.raises(ConfigurationInvalid) as refused:
        await node.orchestration.reload()
    assert {problem.pointer for problem in refused.value.problems} == {
        "/run_profiles/0/profile_id",
        "/run_profiles/0/distribution_targets/0",
    }
    assert node.configuration.active is before
    assert facts("SELECT count(*) FROM config_activation") == [{"count": 1}]
    assert (await run(node))["state"] == "finished"


async def test_a_cycle_keeps_the_revision_with_which_it_began(
    configure: Configure, make_node: MakeNode, receiver: Receiver, facts: Facts
) -> None:
    """A node that boots with other files mid-cycle changes what new cycles do, not this one."""
    endpoints = (receiver.endpoint("out"),)
    old = policy(tier1=[f"{HERE}:hold"], tier2=[f"{HERE}:label"])
    configure(run_profile(execution_policy=old), profiles=[profile(label="old")])
    first = await make_node(dispatch_endpoints=endpoints)
    [answer] = await first.orchestration.trigger_run_profiles()
    assert answer.cycle_id is not None
    await until(lambda: begun, "the step")
    new = policy(tier3=[f"{HERE}:label"])
    configure(run_profile(execution_policy=new), profiles=[profile(label="new")])
    second = await make_node(dispatch_endpoints=endpoints)
    assert second.configuration.active.revision != first.configuration.proposed.revision  # type: ignore[union-attr]
    may_end.set()
    await ended(first, answer.cycle_id)
    assert [one.body for one in receiver.arrivals] == [b"old"]
    later = await run(first)
    assert [one.body for one in receiver.arrivals] == [b"old", b"new"]
    pinned = facts("SELECT cycle_id, revision FROM cycle_run ORDER BY cycle_id")
    assert [row["cycle_id"] for row in pinned] == [answer.cycle_id, later["cycle_id"]]
    assert [row["revision"] for row in pinned] == [
        first.configuration.proposed.revision,  # type: ignore[union-attr]
        second.configuration.active.revision,
    ]


async def test_another_node_finishes_a_cycle_by_the_revision_it_is_pinned_to(
    configure: Configure, make_node: MakeNode, receiver: Receiver
) -> None:
    """Accepted under the old files by a node that does no work, done by one with the new."""
    endpoints = (receiver.endpoint("out"),)
    given = run_profile(execution_policy=policy(tier1=[f"{HERE}:label"]))
    configure(given, profiles=[profile(label="old")])
    first = await make_node(dispatch_endpoints=endpoints, roles=frozenset({"api"}))
    [answer] = await first.orchestration.trigger_run_profiles()
    assert answer.cycle_id is not None
    configure(given, profiles=[profile(label="new")])
    second = await make_node(dispatch_endpoints=endpoints)
    await ended(second, answer.cycle_id)
    assert [one.body for one in receiver.arrivals] == [b"old"]


async def test_a_node_whose_files_differ_from_what_is_in_force_says_so(
    configure: Configure, make_node: MakeNode, facts: Facts
) -> None:
    """The later files are in force on every node; the earlier node's row shows its own."""
    configure()
    first = await make_node(lease_seconds=1.2)
    assert first.configuration.is_in_step
    configure(run_profile(distribution_targets=[]))
    second = await make_node()
    await until(lambda: not first.configuration.is_in_step, "the first node's notice")
    assert first.configuration.active.revision == second.configuration.active.revision
    assert second.configuration.is_in_step
    rows = facts(
        "SELECT node_id FROM node, config_active WHERE files_revision <> config_active.revision"
    )
    assert [row["node_id"] for row in rows] == [first.node_id]


async def test_nodes_that_propose_at_once_agree(
    configure: Configure, make_node: MakeNode, facts: Facts
) -> None:
    """Six nodes with the same files make one revision and one activation."""
    configure()
    nodes: list[Node] = [await make_node(is_started=False) for _ in range(6)]
    configure(run_profile(distribution_targets=[]))
    documents = nodes[0].orchestration.read_files()
    changes = await asyncio.gather(*(one.configuration.propose(documents) for one in nodes))
    assert sorted(changes) == [False] * 5 + [True]
    assert len({one.configuration.active.revision for one in nodes}) == 1
    assert facts("SELECT count(*) FROM config_revision") == [{"count": 1}]
    assert facts("SELECT count(*) FROM config_activation") == [{"count": 1}]


async def test_a_trigger_meets_a_change_of_configuration_half_way(
    configure: Configure, make_node: MakeNode, facts: Facts
) -> None:
    """Triggers and changes at once: each cycle is pinned to a revision that was in force."""
    configure(run_profile(distribution_targets=[]))
    first, second = await make_node(), await make_node()
    changes = []
    for number in range(20):
        configure(run_profile(distribution_targets=[], value_tags={"x": number}))
        changes.append(first.orchestration.read_files())

    async def flip() -> None:
        for documents in changes:
            assert await first.configuration.propose(documents)

    async def trigger() -> list[str]:
        answers = [await second.orchestration.trigger_run_profiles() for _ in range(40)]
        return [one.cycle_id for [one] in answers if one.cycle_id]

    _, cycle_ids = await asyncio.gather(flip(), trigger())
    assert len(set(cycle_ids)) == 40
    for cycle_id in cycle_ids:
        assert (await ended(second, cycle_id))["state"] == "finished"
    tags = facts("SELECT DISTINCT value_tags, revision FROM cycle_run")
    revisions = {row["revision"] for row in tags}
    assert len(tags) == len(revisions), "the tags of a cycle are those of its own revision"


async def test_triggers_without_a_configuration_in_force_are_refused(
    configure: Configure, make_node: MakeNode, facts: Facts
) -> None:
    """A lost row of the database ends a trigger with what helps, not with an endless loop."""
    configure(run_profile(distribution_targets=[]))
    node = await make_node()
    facts("DELETE FROM config_active RETURNING 1")
    async with asyncio.timeout(60):
        with pytest.raises(DatabaseUnavailable, match="orbit db repair"):
            await node.orchestration.trigger_run_profiles()


async def test_an_unknown_run_profile_starts_none(
    configure: Configure, make_node: MakeNode, facts: Facts
) -> None:
    """One wrong name among right ones: refused as a whole."""
    configure(run_profile(distribution_targets=[]))
    node = await make_node()
    with pytest.raises(NotFound, match="nightly"):
        await node.orchestration.trigger_run_profiles(["daily", "nightly"])
    assert facts("SELECT count(*) FROM cycle_run") == [{"count": 0}]


async def test_what_is_disabled_is_skipped_with_the_reason(
    configure: Configure, make_node: MakeNode
) -> None:
    """A disabled run profile, or one of a disabled profile, answers why it does not run."""
    none: dict[str, list[str]] = {"distribution_targets": []}
    configure(
        run_profile("on", **none),
        run_profile("off", state="disabled", **none),
        run_profile("orphan", profile_id="dormant", **none),
        profiles=[profile(), profile("dormant", state="disabled")],
    )
    node = await make_node()
    answers = await node.orchestration.trigger_run_profiles(["on", "off", "orphan"])
    reasons = {one.run_profile_id: one.reason for one in answers}
    assert reasons == {
        "on": None,
        "off": "run profile off is disabled",
        "orphan": "profile dormant is disabled",
    }
    assert [one.run_profile_id for one in answers if one.cycle_id] == ["on"]
