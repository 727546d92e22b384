"""Controlled autonomy over a whole node: armed, applied, on probation, taken back, disarmed."""

from __future__ import annotations

import asyncio
import itertools
import re
from datetime import datetime, timedelta
from typing import Any

import httpx
import psycopg
import pytest

from orbit.app import Node
from orbit.audit.verification import verify
from orbit.governance.actor import ANYONE
from orbit.governance.halt import Order
from orbit.profiles.adjustments import By
from orbit.profiles.overlays import Target
from orbit.services.pilot import Pilot
from tests.delivery.conftest import ROOT
from tests.scenario.access import asking, key_of
from tests.scenario.conftest import (
    Configure,
    Facts,
    MakeNode,
    SetTime,
    database_now,
    profile,
    run,
    run_profile,
    until,
)
from tests.scenario.piloting import (
    ON,
    approved,
    configure_fleet,
    fleet,
    intensity,
    look,
    proposed,
    seen,
    tell,
)
from tests.scenario.test_proposals import moved, say

ENTRIES = "SELECT action FROM audit_trail WHERE action LIKE 'autonomy%' ORDER BY seq"


@pytest.fixture(autouse=True)
def _forget() -> None:
    seen.clear()


@pytest.fixture
async def node(make_node: MakeNode, configure: Configure, facts: Facts) -> Node:
    """A node with both switches on, and a fleet with a past."""
    return await fleet(make_node, configure, facts, **ON)


async def ask(api: httpx.AsyncClient, verb: str, **body: str) -> dict[str, Any]:
    """Asks autonomy for something about nova."""
    answer = await api.post(f"/autonomy/nova/{verb}", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def shown(node: Node) -> dict[str, Any]:
    """All that is shown of nova."""
    async with asking(node) as api:
        answer = await api.get("/autonomy/nova")
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found


async def arm(node: Node) -> None:
    """A person arms nova."""
    async with asking(node) as api:
        assert (await ask(api, "arm", reason="the peers are calm"))["mode"] == "armed"


async def halt(node: Node, namespace: str = "sea") -> None:
    """A person halts a namespace."""
    await node.brake.halt(Order(namespace, "ann", "key-1", "a test"), wait_seconds=0)


async def resume(node: Node, namespace: str = "sea") -> None:
    """And lets it go on."""
    await node.brake.resume(Order(namespace, "ann", "key-1", "a test"))


async def outcomes(node: Node) -> list[str | None]:
    """What proposals came to, the newest first, in the list and each by itself."""
    async with asking(node) as api:
        items = (await api.get("/proposals")).json()["items"]
        for one in items:
            assert (await api.get(f"/proposals/{one['proposalId']}")).json() == one
    return [one["application"] and one["application"]["outcome"] for one in items]


async def test_an_approved_change_is_applied_breaks_and_is_rolled_back(
    node: Node, facts: Facts, dsn: str
) -> None:
    """Approve, arm, apply; new cycles run with it; harm is noticed; it is gone, and disarmed."""
    await run(node)
    await arm(node)
    proposal_id = await approved(node)
    assert intensity(node) == 5  # approving applies nothing
    assert await outcomes(node) == [None]
    await look(node)
    assert intensity(node) == 4
    await run(node)
    found = await shown(node)
    flight = found["profile"]["inFlight"]
    assert (flight["proposalId"], flight["verdict"]) == (proposal_id, None)
    assert flight["changes"] == [{"path": "/execution_rules/intensity", "before": 5, "value": 4}]
    assert flight["evidence"]["sea"]["metrics"]["delivered"]["peers"] == 5
    async with asking(node) as api:
        (nova,) = [
            one for one in (await api.get("/profiles")).json()["items"]
            if one["profileId"] == "nova"
        ]  # fmt: skip
    assert nova["executionRules"] == {"intensity": 4}
    assert [one["origin"] for one in nova["overlays"]] == ["autonomy"]
    await tell(node, facts, rounds=20)
    await look(node)
    assert intensity(node) == 4
    await tell(node, facts, rounds=20, nova=4)
    await look(node)
    assert intensity(node) == 5
    await run(node)
    assert seen == [5, 4, 5]
    assert await outcomes(node) == ["rolled_back"]
    found = await shown(node)
    assert (found["profile"]["mode"], found["profile"]["cause"]) == ("disarmed", "rollback")
    (change,) = found["changes"]
    assert (change["verdict"], change["ending"]) == ("breached", "rolled_back")
    delivered = change["evidence"]["sea"]["metrics"]["delivered"]
    assert delivered["breachedAt"] == change["evidence"]["sea"]["position"]
    (stored,) = facts("SELECT patch, inverse FROM profile_overlay")
    assert '"value":5},{"op":"replace"' in stored["patch"]
    assert '"value":4},{"op":"replace"' in stored["inverse"]
    assert [one["action"] for one in facts(ENTRIES)] == [
        "autonomy.set",
        "autonomy.judged",
        "autonomy.set",
    ]
    told = facts("SELECT event_type FROM telemetry_event WHERE profile_id = 'nova' AND"
                 " event_type ~ '^(overlay|autonomy)' ORDER BY batch_id, ordinal")  # fmt: skip
    assert [one["event_type"] for one in told] == [
        "autonomy_set",
        "overlay_added",
        "autonomy_judged",
        "overlay_ended",
        "autonomy_set",
    ]
    assert verify(dsn).findings == []


async def test_a_rolled_back_change_is_not_made_again_until_a_person_arms(
    node: Node, facts: Facts
) -> None:
    """The proposal was applied once and for all; another one waits for somebody to arm."""
    await arm(node)
    await approved(node)
    await look(node)
    await tell(node, facts, rounds=20, nova=2)
    await look(node)
    await approved(node, 8)
    await look(node)
    assert intensity(node) == 5
    assert [one["why"] for one in (await shown(node))["skips"]] == ["not_armed"]
    await arm(node)
    await look(node)
    assert intensity(node) == 4


async def test_what_stays_inconclusive_is_held_and_then_reverted(
    node: Node, facts: Facts, set_time: SetTime, dsn: str
) -> None:
    """Until its time is over nothing is done; then it goes, and the profile is disarmed."""
    await arm(node)
    await approved(node)
    await look(node)
    await tell(node, facts, rounds=30)
    until_at = datetime.fromisoformat((await shown(node))["profile"]["inFlight"]["expiresAt"])
    assert until_at - await database_now(node.database) > timedelta(hours=167)
    set_time(until_at - timedelta(minutes=10))
    await look(node)
    assert intensity(node) == 4
    set_time(until_at)
    await look(node)
    assert intensity(node) == 5
    found = await shown(node)
    assert (found["profile"]["mode"], found["profile"]["cause"]) == ("disarmed", "revert")
    (change,) = found["changes"]
    assert (change["verdict"], change["ending"]) == ("inconclusive", "reverted")
    assert verify(dsn).findings == []


async def test_what_is_shown_to_be_no_worse_is_kept_as_an_overlay(
    node: Node, facts: Facts, set_time: SetTime, dsn: str
) -> None:
    """It lies there beyond its time, still shown as an overlay; and leaves room for the next."""
    await arm(node)
    await approved(node)
    await look(node)
    await tell(node, facts, rounds=700)
    await look(node)
    found = await shown(node)
    (change,) = found["changes"]
    assert (change["verdict"], change["ending"]) == ("kept", None)
    assert (found["profile"]["mode"], found["profile"]["inFlight"]) == ("armed", None)
    set_time(datetime.fromisoformat(change["expiresAt"]) + timedelta(days=1))
    await look(node)
    assert intensity(node) == 4
    await approved(node, 10**6)
    await look(node)
    assert intensity(node) == 3
    async with asking(node) as api:
        assert len((await api.get("/config")).json()["overlays"]) == 2
        assert await outcomes(node) == ["on_probation", "kept"]
        taken = await ask(api, "revert", reason="enough")
    assert len(taken["overlayIds"]) == 2
    assert intensity(node) == 5
    assert verify(dsn).findings == []


async def test_a_disarmed_profile_keeps_nothing_but_rolls_back(node: Node, facts: Facts) -> None:
    """Who disarms takes away what may still be done to it, not what protects it."""
    await arm(node)
    await approved(node)
    await look(node)
    async with asking(node) as api:
        await ask(api, "disarm", reason="holidays")
    await tell(node, facts, rounds=700)
    await look(node)
    found = await shown(node)
    assert found["changes"][0]["verdict"] is None
    assert [(one["function"], one["why"]) for one in found["skips"]] == [("judge", "not_armed")]
    await tell(node, facts, rounds=60, nova=1)
    await look(node)
    assert intensity(node) == 5


async def test_what_a_disarmed_profile_could_have_kept_goes_when_its_time_is_over(
    node: Node, facts: Facts, set_time: SetTime
) -> None:
    """Although it was written down, on the same day, that it is not kept."""
    await arm(node)
    await approved(node)
    await look(node)
    async with asking(node) as api:
        await ask(api, "disarm", reason="holidays")
    await tell(node, facts, rounds=700)
    until_at = datetime.fromisoformat((await shown(node))["profile"]["inFlight"]["expiresAt"])
    set_time(until_at - timedelta(minutes=10))
    await node._heartbeat.run_once()
    for _ in range(2):
        await look(node)
    assert intensity(node) == 4
    set_time(until_at)
    await look(node)
    assert intensity(node) == 5
    assert (await shown(node))["changes"][0]["verdict"] == "inconclusive"


async def test_a_change_that_cannot_be_watched_goes_back(node: Node) -> None:
    """The profile is another since, of which no cycle says anything about the change."""
    await arm(node)
    await approved(node)
    await look(node)
    assert intensity(node) == 4
    async with asking(node) as api:
        answer = await api.post("/run-profiles/daily/disable", json={"reason": "it looks ill"})
        assert answer.status_code == 200, answer.text
    await look(node)
    assert intensity(node) == 5
    found = await shown(node)
    assert (found["profile"]["mode"], found["profile"]["cause"]) == ("disarmed", "revert")


async def test_a_halted_namespace_mutates_nothing(
    node: Node, facts: Facts, set_time: SetTime
) -> None:
    """Neither applied nor rolled back nor reverted; each of these is written down once."""
    await arm(node)
    await approved(node)
    await look(node)
    await tell(node, facts, rounds=20, nova=2)
    before = facts("SELECT count(*) FROM config_activation")
    await halt(node)
    for _ in range(3):
        await look(node)
    set_time(await database_now(node.database) + timedelta(days=8))
    await node._heartbeat.run_once()
    await look(node)
    assert intensity(node) == 4
    assert facts("SELECT count(*) FROM config_activation") == before
    found = await shown(node)
    assert (found["profile"]["mode"], found["profile"]["cause"]) == ("disarmed", "halt")
    assert {(one["function"], one["why"]) for one in found["skips"]} == {
        ("judge", "namespace_halted")
    }
    assert len({one["day"] for one in found["skips"]}) == len(found["skips"]) == 2
    await resume(node)
    await look(node)
    assert intensity(node) == 5
    assert (await shown(node))["profile"]["cause"] == "halt"


async def test_a_halt_disarms_at_once_and_for_good(node: Node, facts: Facts) -> None:
    """Also one that was over before anybody looked; and nobody arms what is halted."""
    await arm(node)
    await approved(node)
    await halt(node)
    assert (await shown(node))["profile"]["mode"] == "disarmed"
    async with asking(node) as api:
        answer = await api.post("/autonomy/nova/arm", json={"reason": "x"})
        assert (answer.status_code, answer.json()["code"]) == (409, "namespace_halted")
    await resume(node)
    assert (await shown(node))["profile"]["mode"] == "disarmed"
    await look(node)
    assert intensity(node) == 5
    noted = facts("SELECT mode, cause, actor FROM autonomy_mode ORDER BY sequence")
    assert [tuple(one.values())[:2] for one in noted] == [("armed", "person"), ("disarmed", "halt")]
    await arm(node)
    await look(node)
    assert intensity(node) == 4


async def test_it_does_nothing_beyond_a_profiles_bounds(
    node: Node, configure: Configure, facts: Facts
) -> None:
    """A day's room spent, a place no longer named, another profile than was approved."""
    await arm(node)
    await approved(node)
    configure_fleet(configure, nova=moved(label="Another"))
    await node.orchestration.reload()
    await look(node)
    assert intensity(node) == 5
    assert [one["why"] for one in (await shown(node))["skips"]] == ["profile_changed"]


@pytest.mark.parametrize("is_asked", [True, False])
async def test_what_was_approved_on_other_evidence_is_not_applied(
    node: Node, facts: Facts, is_asked: bool
) -> None:
    """Approved while nobody armed; by then the detector says otherwise, or nobody knows."""
    await approved(node)
    await look(node)
    if is_asked:
        await say(node, "stable", 8)
    else:
        node.proposals._rules = ()
    await arm(node)
    await look(node)
    assert intensity(node) == 5
    found = facts("SELECT why FROM autonomy_skip WHERE function = 'apply' ORDER BY created_at")
    assert [one["why"] for one in found] == ["not_armed", "evidence_changed"]


async def test_without_a_baseline_nothing_is_changed(
    make_node: MakeNode, configure: Configure
) -> None:
    """Harm would not be noticed."""
    configure_fleet(configure)
    node = await make_node(**ON)
    await node._pilot.stop()
    await arm(node)
    await approved(node)
    await look(node)
    assert intensity(node) == 5
    assert [one["why"] for one in (await shown(node))["skips"]] == ["no_baseline"]


async def test_shadow_mode_says_what_it_would_do_and_how_often_persons_agree(
    make_node: MakeNode, configure: Configure, facts: Facts, dsn: str
) -> None:
    """With the first switch alone: it applies nothing, and its word comes before the person's."""
    node = await fleet(make_node, configure, facts, phase4_enabled=True)
    async with asking(node) as api:
        assert (await ask(api, "shadow"))["outcome"] == "set"
    first = await proposed(node)
    await look(node)
    await look(node)
    (said,) = (await shown(node))["shadows"]
    assert (said["proposalId"], said["wouldApply"], said["state"]) == (first, True, "pending")
    await node.proposals.decide(first, ANYONE, is_approved=True, reason=None)
    await look(node)
    assert intensity(node) == 5
    second = await proposed(node, 8)
    await look(node)
    await node.proposals.decide(second, ANYONE, is_approved=False, reason="no")
    await proposed(node, 9)
    await look(node)
    async with asking(node) as api:
        (item,) = (await api.get("/autonomy")).json()["items"]
    assert item["shadowed"] == {"recorded": 3, "decided": 2, "agreed": 1}
    assert facts("SELECT FROM profile_overlay") == []
    assert verify(dsn).findings == []


# --- the table of docs/autonomy.md -------------------------------------------------------

COMBINATIONS = list(itertools.product([False, True], repeat=2))


def table() -> dict[str, list[str]]:
    """What docs/autonomy.md says of each function: neither, the first, the second, both."""
    text = (ROOT / "docs" / "autonomy.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)`: [^|]+ \|((?:[^|\n]+\|){4})$", text, re.MULTILINE)
    return {
        name: [cell.strip().removeprefix("skips: ").strip("`") for cell in cells.split("|")[:4]]
        for name, cells in rows
    }


def expected(function: str, *, is_enabled: bool, may_mutate: bool) -> str:
    """`does`, or the reason for which the table says that it skips."""
    neither, enabled, mutating, both = table()[function]
    if is_enabled:
        return both if may_mutate else enabled
    return mutating if may_mutate else neither


@pytest.mark.parametrize(("is_enabled", "may_mutate"), COMBINATIONS)
async def test_each_function_does_what_the_table_says(  # noqa: PLR0915 - one walk along it
    make_node: MakeNode,
    configure: Configure,
    facts: Facts,
    dsn: str,
    is_enabled: bool,
    may_mutate: bool,
) -> None:
    """Every function, in every combination: it acts, or leaves one record of why it did not."""
    node = await fleet(make_node, configure, facts, **ON)
    now = node.settings.model_copy(
        update={"phase4_enabled": is_enabled, "phase4_allow_mutation": may_mutate}
    )

    def turn(*, on: bool) -> None:
        node.settings = now if not on else now.model_copy(update=dict.fromkeys(ON, True))

    def skipped(function: str) -> str:
        rows = facts("SELECT why FROM autonomy_skip WHERE function = %s", function)
        assert len(rows) <= 1
        return str(rows[0]["why"]) if rows else "does"

    found: dict[str, str] = {}
    async with asking(node) as api:
        turn(on=False)
        for verb in ("arm", "shadow"):
            answer = await ask(api, verb, reason="x")
            assert answer["outcome"] == ("set" if answer["why"] is None else "skipped")
            assert (answer["mode"] == "disarmed") == (answer["why"] is not None) or verb == "shadow"
            found[verb] = answer["why"] or "does"
            assert found[verb] == skipped(verb)
        turn(on=True)
        await ask(api, "arm", reason="x")
        turn(on=False)
        await approved(node)
        await look(node)
        await look(node)
        found["apply"] = skipped("apply")
        assert intensity(node) == (4 if found["apply"] == "does" else 5)
        turn(on=True)
        await look(node)
        assert intensity(node) == 4
        await tell(node, facts, rounds=20, nova=2)
        turn(on=False)
        await look(node)
        await look(node)
        found["judge"] = skipped("judge")
        assert intensity(node) == (5 if found["judge"] == "does" else 4)
        found["revert"] = "does" if (await ask(api, "revert")) and intensity(node) == 5 else "?"
        turn(on=True)
        await ask(api, "arm", reason="x")
        turn(on=False)
        found["disarm"] = "does" if (await ask(api, "disarm"))["outcome"] == "set" else "?"
        disabled = await api.post("/profiles/nova/disable")
        found["disable"] = "does" if disabled.json()["isChanged"] else "?"
    wanted = {name: expected(name, is_enabled=is_enabled, may_mutate=may_mutate) for name in found}
    assert found == wanted
    assert set(found) == set(table())
    assert len(found) == 7
    assert verify(dsn).findings == []


async def test_all_paused_nothing_is_applied(
    make_node: MakeNode, configure: Configure, facts: Facts
) -> None:
    """ORBIT_GLOBAL_PAUSE stops what autonomy would do as well."""
    node = await fleet(make_node, configure, facts, **ON)
    await arm(node)
    await approved(node)
    node.settings = node.settings.model_copy(update={"global_pause": True})
    await look(node)
    assert intensity(node) == 5
    assert [one["why"] for one in (await shown(node))["skips"]] == ["global_pause"]


# --- files, persons, keys ----------------------------------------------------------------


async def test_files_that_do_not_fit_a_change_are_refused_unless_it_may_go(
    node: Node, configure: Configure, facts: Facts
) -> None:
    """A file with another number; one with the new number has adopted it."""
    await arm(node)
    await approved(node)
    await look(node)
    configure_fleet(configure, nova=moved(7))
    async with asking(node) as api:
        answer = await api.post("/config/reload")
        assert (answer.status_code, answer.json()["code"]) == (409, "overlays_broken")
        assert "there is 7 by now" in answer.json()["overlays"][0]["why"]
        configure_fleet(configure, nova=moved(4))
        assert (await api.post("/config/reload")).status_code == 200
    assert intensity(node) == 4
    assert facts("SELECT ending FROM profile_overlay_end") == [{"ending": "adopted"}]
    await look(node)
    assert (await shown(node))["profile"]["inFlight"] is None


async def test_of_two_nodes_that_look_at_once_one_applies(
    make_node: MakeNode, configure: Configure, facts: Facts, dsn: str
) -> None:
    """Two who apply, and two who roll back: one transaction each does it, and once."""
    first = await fleet(make_node, configure, facts, **ON)
    second = await make_node(**ON)
    await second._pilot.stop()
    await second._strategist.stop()
    await arm(first)
    await approved(first)
    nodes = (first, second)
    applied = await asyncio.gather(*(one.changes.apply_approved() for one in nodes for _ in "ab"))
    assert sum(map(len, applied)) == 1
    assert facts("SELECT why FROM autonomy_skip") == []
    for one in nodes:
        await one.configuration.refresh()
        assert intensity(one) == 4
    await tell(first, facts, rounds=20, nova=2)
    judged = await asyncio.gather(*(one.changes.judge_all() for one in nodes for _ in "ab"))
    assert sum(map(len, judged)) == 1
    assert facts("SELECT verdict FROM autonomy_verdict") == [{"verdict": "breached"}]
    assert facts("SELECT count(*) FROM autonomy_mode")[0]["count"] == 2
    assert verify(dsn).findings == []


async def test_a_change_thought_out_for_a_configuration_that_is_gone_is_thought_out_again(
    node: Node, facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare and set: between plan and lock a person turned something off."""
    await arm(node)
    await approved(node)
    planned, turns = node.changes.planned, itertools.count()

    async def overtaken(*given: Any, **named: Any) -> Any:
        plan = await planned(*given, **named)
        if next(turns) == 0:
            await node.switch.turn(Target.PROFILE, "peer-0", "disabled", ANYONE, None)
        return plan

    monkeypatch.setattr(node.changes, "planned", overtaken)
    await look(node)
    assert next(turns) == 2
    assert intensity(node) == 4
    documents = node.configuration.active.documents
    assert (documents.profile("peer-0") or profile()).state == "disabled"  # type: ignore[union-attr]
    assert len(node.configuration.force.overlays) == 2
    assert facts("SELECT FROM autonomy_skip") == []


async def test_the_database_itself_refuses_a_change_that_nobody_approved(
    node: Node, owner_dsn: str, facts: Facts
) -> None:
    """Nor a second one in flight; even by a statement that goes around every check."""
    proposal_id = await proposed(node)
    insert = (
        "INSERT INTO profile_overlay (overlay_id, target, target_id, origin, patch, inverse,"
        " namespaces, proposal_namespace, proposal_id, trial, expires_at, actor, actor_id, node_id)"
        f" SELECT gen_random_uuid(), 'profile', 'nova', 'autonomy', '[]', '[]', '{{sea}}', 'sea',"
        f" '{proposal_id}', '{{}}', orbit_now(), 'x', 'x', '{node.node_id}'"
    ).encode()
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="a person approved"):
            owner.execute(insert)
        await node.proposals.decide(proposal_id, ANYONE, is_approved=True, reason=None)
        owner.execute(insert)
        await say(node, "low_performance", 9)
        (other,) = (await node.proposals.generate("sea")).made
        await node.proposals.decide(other, ANYONE, is_approved=True, reason=None)
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="in flight"):
            owner.execute(insert.replace(proposal_id.encode(), other.encode()))
        with pytest.raises(psycopg.errors.UniqueViolation):
            owner.execute(
                b"INSERT INTO profile_overlay_end (overlay_id, ending, actor, actor_id, node_id)"
                b" SELECT overlay_id, 'undone', 'x', 'x', node_id FROM profile_overlay;" + insert
            )
    assert facts("SELECT count(*) FROM profile_overlay")[0]["count"] == 1


async def test_who_has_no_say_everywhere_arms_nothing_that_reaches_elsewhere(
    make_node: MakeNode, configure: Configure, facts: Facts
) -> None:
    """And what is not there for an asker answers as what is not."""
    configure(
        run_profile(namespace="sea", distribution_targets=[]),
        run_profile("moon", namespace="secret-moon", distribution_targets=[]),
        run_profile("far", profile_id="terra", namespace="secret-moon", distribution_targets=[]),
        profiles=[moved(), {**moved(), "profile_id": "terra"}],
    )
    node = await make_node(auth="on", **ON)
    bound = await key_of(node, "admin", namespaces=["sea"])
    async with asking(node, bound) as api:
        for verb in ("arm", "shadow", "disarm", "revert"):
            answer = await api.post(f"/autonomy/nova/{verb}", json={"reason": "x"})
            assert (answer.status_code, answer.json()["code"]) == (409, "not_entitled"), verb
            assert "moon" not in answer.text
            answers = [
                await api.post(f"/autonomy/{name}/{verb}", json={"reason": "x"})
                for name in ("terra", "none")
            ]
            assert [one.status_code for one in answers] == [404, 404]
            assert answers[0].text.replace("terra", "none") == answers[1].text
        answers = [await api.get(f"/autonomy/{name}") for name in ("terra", "none")]
        assert [one.status_code for one in answers] == [404, 404]
        page = (await api.get("/autonomy")).json()
        assert [one["profileId"] for one in page["items"]] == ["nova"]
        assert page["items"][0]["namespaces"] == ["sea"]
        assert "moon" not in str(page)
    assert facts("SELECT FROM autonomy_mode") == []


async def test_arming_wants_a_reason_and_something_that_may_move(
    node: Node, make_node: MakeNode
) -> None:
    """A profile that allows nothing is refused in words."""
    async with asking(node) as api:
        assert (await api.post("/autonomy/nova/arm", json={})).status_code == 400
        answer = await api.post("/autonomy/peer-0/arm", json={"reason": "x"})
        assert (answer.status_code, answer.json()["code"]) == (400, "request_invalid")
        assert "autonomy.allow" in answer.json()["detail"]


async def test_a_profile_that_comes_to_run_elsewhere_is_armed_no_longer(
    node: Node, configure: Configure, facts: Facts
) -> None:
    """Who armed it had a say where it ran then."""
    await arm(node)
    configure(
        run_profile(namespace="sea", distribution_targets=[]),
        run_profile("moon", namespace="moon", distribution_targets=[]),
        profiles=[moved()],
    )
    await node.orchestration.reload()
    assert (await shown(node))["profile"]["cause"] == "reach"
    await look(node)
    noted = facts("SELECT cause, namespaces FROM autonomy_mode ORDER BY sequence DESC LIMIT 1")
    assert noted == [{"cause": "reach", "namespaces": ["moon", "sea"]}]


async def test_the_node_looks_by_itself(node: Node) -> None:
    """Nobody asks: the loop applies what a person approved."""
    await arm(node)
    await approved(node)
    pilot = Pilot(node.database, node.modes, node.changes, node.shadows, node.node_id)
    pilot.start()

    def is_applied() -> bool:
        pilot.wake()
        return intensity(node) == 4

    await until(is_applied, "the change")
    await pilot.stop()


async def test_who_takes_back_before_anything_was_applied_disarms(node: Node) -> None:
    """The next look applies nothing; and the person is named."""
    await arm(node)
    await approved(node)
    async with asking(node) as api:
        assert (await ask(api, "revert", reason="not now"))["overlayIds"] == []
    await look(node)
    assert intensity(node) == 5
    found = await shown(node)
    assert (found["profile"]["mode"], found["profile"]["cause"]) == ("disarmed", "revert")


async def test_taking_back_nothing_is_no_act(node: Node, facts: Facts) -> None:
    """It says so, and leaves no trace."""
    by = By("ann", "key-1", node.node_id)
    assert await node.changes.take_back("nova", ANYONE, by) == []
    assert facts("SELECT FROM autonomy_mode") == []
