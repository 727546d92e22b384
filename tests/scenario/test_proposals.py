"""Proposals over a whole node: suggested, decided by another, ended when they hold no more."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from orbit.app import Node
from orbit.audit.verification import verify
from orbit.cli.proposals import _show
from orbit.database.queries import array, load
from orbit.insight.proposals import Proposals
from orbit.insight.signals import DETECTOR_VERSION
from orbit.insight.source import profile_revisions
from orbit.insight.strategy import Finding, Situation
from orbit.profiles.model import document_body
from orbit.services.sequencer import Sequencer
from orbit.services.strategist import Strategist
from orbit.telemetry.catalogue import EventType
from orbit.telemetry.emission import Event, emit
from tests.scenario.access import asking, key_of
from tests.scenario.conftest import (
    SECRET_KEY,
    Configure,
    Facts,
    MakeNode,
    Receiver,
    SetTime,
    profile,
    run_profile,
    until,
)
from tests.scenario.test_cli import clean_environment

SIGNALS = load("signals")
RULES = ("low_performance", "unknown_share_rising", "breaker_flapping", "value_per_cost_falling")


def moved(intensity: float = 5, **given: Any) -> dict[str, Any]:
    """A profile that lets rules lower its intensity."""
    place = "/execution_rules/intensity"
    entry = {"path": place, "minimum": 1, "maximum": 10, "step": 2, "per_day": 4}
    allow = [{**entry, "on": dict.fromkeys((*RULES, "mine"), -1)}]
    rules = {"intensity": intensity}
    return profile("nova", execution_rules=rules, autonomy={"allow": allow}, **given)


@pytest.fixture
async def node(make_node: MakeNode, configure: Configure, receiver: Receiver) -> Node:
    """A node with nova in `sea`, which suggests nothing before the test does."""
    configure(run_profile(namespace="sea"), profiles=[moved()])
    node = await make_node(auth="on", dispatch_endpoints=(receiver.endpoint("out"),))
    await node._strategist.stop()
    return node


async def say(
    node: Node,
    name: str,
    position: int,
    namespace: str = "sea",
    detector: int = DETECTOR_VERSION,
) -> str:
    """Records that the detector said something of nova's deliveries; the signal's id."""
    documents = node.configuration.active.documents
    signal_id = f"{position:032x}"
    row = {
        "signal_id": signal_id,
        "profile_id": "nova",
        "revision": profile_revisions(document_body(documents))["nova"],
        "metric": "delivered",
        "name": name,
        "alarm_level": "warning",
        "confidence": 0.97,
        "from_position": position,
        "to_position": position,
        "detector_version": detector,
        "body": '{"recent":0.6,"baseline":{"mean":0.9}}',
    }
    values = {key: array([value]) for key, value in row.items()}
    await node.database.execute(SIGNALS.add_signals, {"namespace": namespace, **values})
    return signal_id


async def made(api: httpx.AsyncClient) -> list[str]:
    """What a request for proposals made; nova runs in one namespace."""
    answer = await api.post("/profiles/nova/strategy-proposals")
    assert answer.status_code == 200, answer.text
    return [proposal for one in answer.json()["items"] for proposal in one["made"]]


async def decide(api: httpx.AsyncClient, proposal: str, verb: str, **body: str) -> tuple[int, str]:
    """The status, and the proposal's state or what it was refused for."""
    answer = await api.post(f"/proposals/{proposal}/{verb}", json=body)
    found = answer.json()
    return answer.status_code, found.get("state") or found["code"]


async def listed(api: httpx.AsyncClient, **params: str) -> list[dict[str, Any]]:
    """The proposals."""
    items: list[dict[str, Any]] = (await api.get("/proposals", params=params)).json()["items"]
    return items


@pytest.fixture
async def people(node: Node) -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient]]:
    """Ann, who may ask and decide, and Ben, who may decide."""
    ann = await key_of(node, "operator", "approver")
    ben = await key_of(node, "approver")
    async with asking(node, ann) as one, asking(node, ben) as other:
        yield one, other


People = tuple[httpx.AsyncClient, httpx.AsyncClient]


async def test_what_a_rule_suggests_another_person_approves_and_nothing_is_applied(
    node: Node, people: People, facts: Facts, dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a signal to an approved proposal: shown, decided once, told and in the trail."""
    ann, ben = people
    assert await made(ann) == []
    signal_id = await say(node, "low_performance", 7)
    (proposal,) = await made(ann)
    assert await made(ann) == []
    (shown,) = await listed(ben, state="pending")
    assert (shown["proposalId"], shown["rule"]) == (proposal, "low_performance")
    assert shown["evidence"] == {"signals": [signal_id]}
    assert shown["patch"] == [{"op": "replace", "path": "/execution_rules/intensity", "value": 4}]
    assert shown["digest"].startswith(proposal)
    days = datetime.fromisoformat(shown["expiresAt"]) - datetime.fromisoformat(shown["createdAt"])
    assert days == timedelta(hours=72)
    assert await decide(ann, proposal, "approve") == (409, "second_person_required")
    assert await decide(ben, proposal, "approve", reason="as last time") == (200, "approved")
    assert await decide(ben, proposal, "reject", reason="late") == (409, "already_decided")
    (found,) = (await ben.get("/profiles")).json()["items"]
    assert found["executionRules"] == {"intensity": 5}
    assert await made(ann) == []  # the same on the same grounds
    shown = (await ben.get(f"/proposals/{proposal}")).json()
    assert (shown["state"], shown["reason"]) == ("approved", "as last time")
    told = facts(
        "SELECT event_type, metadata ->> 'decision' AS decision FROM telemetry_event"
        " WHERE profile_id = 'nova' ORDER BY batch_id, ordinal"
    )
    assert [tuple(one.values()) for one in told] == [
        ("proposal_made", None),
        ("proposal_decided", "approved"),
    ]
    assert verify(dsn).findings == []
    _show(shown, is_json=False)
    assert "/execution_rules/intensity: 5 becomes 4" in capsys.readouterr().out


async def test_a_person_decides_at_the_command_line(
    node: Node, people: People, dsn: str, config_dir: Path
) -> None:
    """The verbs as the guide has them, beside the node: listed, shown, approved, and refused."""
    ann, _ = people
    await say(node, "low_performance", 7)
    (proposal,) = await made(ann)
    environment = clean_environment(
        DATABASE_URL=dsn,
        ORBIT_ROLES="worker",  # so that the command line asks the database itself
        ORBIT_SECRET_KEYS=SECRET_KEY,
        ORBIT_CONFIG_DIR=str(config_dir),
    )

    async def orbit(*arguments: str, code: int = 0) -> str:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "orbit", "proposals", *arguments),
            env=environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        told = (await child.communicate())[0].decode()
        assert child.returncode == code, told
        return told

    assert proposal in await orbit("ls", "--state", "pending")
    assert "5 becomes 4" in await orbit("show", proposal)
    await orbit("approve", proposal, "--reason", "as agreed")
    assert "is approved by" in await orbit("reject", proposal, "--reason", "late", code=3)
    assert "No proposals." in await orbit("ls", "--state", "pending")


async def test_a_rejection_has_a_reason_and_holds_until_there_is_new_evidence(
    node: Node, people: People
) -> None:
    """The next signal of the same kind is another proposal."""
    ann, ben = people
    await say(node, "low_performance", 7)
    (proposal,) = await made(ann)
    assert (await ben.post(f"/proposals/{proposal}/reject", json={})).status_code in (400, 422)
    assert await decide(ann, proposal, "reject", reason="not now") == (200, "rejected")
    assert await made(ann) == []
    await say(node, "low_performance", 8)
    (other,) = await made(ann)
    assert other != proposal


async def test_a_proposal_ends_when_its_evidence_does(node: Node, people: People, dsn: str) -> None:
    """What the detector says since supersedes it, though nobody has looked yet."""
    ann, ben = people
    await say(node, "low_performance", 7)
    (proposal,) = await made(ann)
    await say(node, "stable", 8)
    assert await decide(ben, proposal, "approve") == (409, "already_decided")
    (shown,) = await listed(ben)
    assert (shown["state"], shown["decidedBy"]) == ("superseded", "orbit")
    assert verify(dsn).findings == []


async def test_the_newest_detector_has_the_last_word(node: Node, people: People) -> None:
    """What an older one said later in the stream is passed over once the newer has spoken."""
    ann, _ = people
    await say(node, "stable", 7)
    await say(node, "low_performance", 8, detector=DETECTOR_VERSION - 1)
    assert await made(ann) == []


async def test_a_proposal_ends_when_its_profile_changes(
    node: Node, people: People, configure: Configure
) -> None:
    """A patch for a profile that is another by now is approved by nobody."""
    ann, ben = people
    await say(node, "low_performance", 7)
    (proposal,) = await made(ann)
    configure(run_profile(namespace="sea"), profiles=[moved(7)])
    await node.orchestration.reload("ann")
    assert await decide(ben, proposal, "approve") == (409, "already_decided")
    (shown,) = await listed(ben)
    assert (shown["state"], "another" in shown["reason"]) == ("superseded", True)


async def test_rules_are_asked_of_the_very_configuration_that_is_in_force(
    node: Node, people: People, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that comes into force after they were asked has them asked once more."""
    ann, ben = people
    await node._strategist.stop()
    await say(node, "low_performance", 7)
    (proposal,) = await made(ann)
    ask = node.proposals._suggested
    asked: list[str] = []

    async def and_reload(*given: Any) -> Any:
        found = await ask(*given)
        asked.append(node.configuration.active.revision)
        if len(asked) == 1:  # the profile stays as it is, and what is known of it does not
            configure(run_profile(namespace="sea", value_tags={"a": "b"}), profiles=[moved()])
            await node.orchestration.reload("ann")
        return found

    monkeypatch.setattr(node.proposals, "_suggested", and_reload)
    assert await decide(ben, proposal, "approve") == (409, "already_decided")
    assert len(set(asked)) == 2
    assert [one["state"] for one in await listed(ben)] == ["superseded"]


async def test_what_holds_again_is_proposed_again(
    node: Node, people: People, configure: Configure, dsn: str
) -> None:
    """Off and on again, and the file changed and changed back; a rejection holds nonetheless."""
    ann, ben = people
    await node._strategist.stop()
    await say(node, "low_performance", 7)
    seen = [*await made(ann)]
    await decide_profile(ann, "disable")
    assert (await node.proposals.generate("sea")).ended == seen
    await decide_profile(ann, "enable")
    seen += await made(ann)
    configure(run_profile(namespace="sea"), profiles=[moved(7)])
    await node.orchestration.reload("ann")
    assert await made(ann) == []  # nothing is said yet of the profile as it is now
    configure(run_profile(namespace="sea"), profiles=[moved()])
    await node.orchestration.reload("ann")
    seen += await made(ann)
    assert len(set(seen)) == 3
    assert await made(ann) == []
    (shown,) = await listed(ben, state="pending")
    assert shown["proposalId"] == seen[2]
    assert await decide(ben, seen[2], "reject", reason="not now") == (200, "rejected")
    assert await made(ann) == []
    assert verify(dsn).findings == []


async def decide_profile(api: httpx.AsyncClient, verb: str) -> None:
    """Turns nova off or on."""
    answer = await api.post(f"/profiles/nova/{verb}", json={"reason": "a test"})
    assert answer.status_code == 200, answer.text


async def test_a_rule_that_does_not_answer_ends_no_proposal(node: Node, people: People) -> None:
    """It raises, or is not there: what it suggested stays pending, and nobody approves it."""
    ann, ben = people
    await node._strategist.stop()
    rule = _Mine()
    rule.finding = Finding("it is so", "it is better", {"seen": 1}, 1, 2)
    node.proposals = Proposals(
        node.database, node.configuration, node.clock, hours=72, using=(rule,)
    )
    (proposal,) = await made(ann)
    rule.error = RuntimeError("not now")
    assert (await node.proposals.generate("sea")).ended == ()
    for using in ((rule,), ()):
        node.proposals._rules = using
        assert await decide(ben, proposal, "approve") == (409, "rule_unavailable")
        assert [one["state"] for one in await listed(ben)] == ["pending"]
    node.proposals._rules, rule.error = (rule,), None
    assert await decide(ben, proposal, "approve") == (200, "approved")


async def test_who_rejects_needs_no_rule(node: Node, people: People) -> None:
    """What nobody can say anything of may be turned down."""
    ann, ben = people
    await say(node, "low_performance", 7)
    (proposal,) = await made(ann)
    node.proposals._rules = ()
    assert await decide(ben, proposal, "reject", reason="enough") == (200, "rejected")


async def test_a_proposal_expires(node: Node, people: People, set_time: SetTime, dsn: str) -> None:
    """After 72 hours nobody approves it, whether that was written down yet or not."""
    ann, ben = people
    await say(node, "low_performance", 7)
    (proposal,) = await made(ann)
    (shown,) = await listed(ben)
    set_time(datetime.fromisoformat(shown["expiresAt"]))
    assert [one["state"] for one in await listed(ben)] == ["expired"]
    assert await decide(ben, proposal, "approve") == (409, "already_decided")
    assert [one["decidedBy"] for one in await listed(ben)] == ["orbit"]
    assert verify(dsn).findings == []


async def test_of_several_who_decide_at_once_one_does(node: Node, people: People) -> None:
    """The others are told what became of it."""
    ann, ben = people
    await say(node, "low_performance", 7)
    (proposal,) = await made(ann)
    answers = await asyncio.gather(
        *(decide(ben, proposal, verb, reason="x") for verb in ("approve", "reject") * 4)
    )
    assert sorted(status for status, _ in answers) == [200] + [409] * 7
    assert {code for status, code in answers if status == 409} == {"already_decided"}


async def test_the_database_itself_refuses_what_an_author_approves(
    node: Node, people: People, owner_dsn: str
) -> None:
    """Even a statement that goes around every check; and a decision stays as it is."""
    ann, ben = people
    await say(node, "low_performance", 7)
    (proposal,) = await made(ann)
    decision = "INSERT INTO strategy_decision SELECT namespace, proposal_id, 'approved', author, {}"
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            owner.execute(decision.format("author_id FROM strategy_proposal").encode())
        assert await decide(ben, proposal, "approve") == (200, "approved")
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="append-only"):
            owner.execute("DELETE FROM strategy_decision")


async def test_who_has_no_say_everywhere_approves_nothing_that_reaches_elsewhere(
    make_node: MakeNode, configure: Configure, receiver: Receiver
) -> None:
    """A profile that runs in two namespaces is one profile; and a foreign proposal is not there."""
    configure(
        run_profile(namespace="sea"),
        run_profile("other", namespace="secret-moon"),
        profiles=[moved()],
    )
    node = await make_node(auth="on", dispatch_endpoints=(receiver.endpoint("out"),))
    for namespace in ("sea", "secret-moon"):
        await say(node, "low_performance", 7, namespace)
        await node.proposals.generate(namespace)
    bound = await key_of(node, "operator", "approver", namespaces=["sea"])
    async with asking(node, bound) as api, asking(node, await key_of(node, "approver")) as all_of:
        everything = await listed(all_of)
        (own,) = await listed(api)
        (foreign,) = [one for one in everything if one["namespace"] == "secret-moon"]
        assert own["namespace"] == "sea"
        assert await listed(api, namespace="secret-moon") == []
        answer = await api.post(f"/proposals/{own['proposalId']}/approve", json={})
        assert (answer.status_code, answer.json()["code"]) == (409, "not_entitled")
        assert "moon" not in answer.text
        for verb, body in (("approve", {}), ("reject", {"reason": "x"})):
            answers = [
                await api.post(f"/proposals/{one}/{verb}", json=body)
                for one in (foreign["proposalId"], "0" * 32)
            ]
            assert [one.status_code for one in answers] == [404, 404]
            assert answers[0].text == answers[1].text
        made = (await api.post("/profiles/nova/strategy-proposals")).json()["items"]
        assert [one["namespace"] for one in made] == ["sea"]
        assert await decide(all_of, own["proposalId"], "approve") == (200, "approved")


async def test_the_node_suggests_by_itself(node: Node, people: People) -> None:
    """Nobody asks: what is then suggested may be approved by anybody with the scope."""
    ann, _ = people
    await say(node, "low_performance", 7)

    async def leads() -> bool:
        return bool(await node.proposals.namespaces(node.node_id))

    await until(leads, "the numbering of events")
    await Strategist(node.database, node.proposals, node.node_id).run_once()
    (shown,) = await listed(ann)
    assert shown["author"] == "orbit"
    assert await decide(ann, shown["proposalId"], "approve") == (200, "approved")
    assert await node.proposals.namespaces("another") == []


class _Clock:
    """A clock that is a day and more ahead."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def now(self) -> datetime:
        return self._node.clock.now() + timedelta(days=1, minutes=10)

    def monotonic(self) -> float:
        return self._node.clock.monotonic()


class _Mine:
    """A rule of one's own: it sees what the shipped ones see."""

    name = "mine"

    def __init__(self) -> None:
        self.seen: list[Situation] = []
        self.finding: Finding | None = None
        self.error: Exception | None = None

    def find(self, situation: Situation) -> Finding | None:
        self.seen.append(situation)
        if self.error:
            raise self.error
        return self.finding


async def test_rules_see_what_a_day_came_to(node: Node, facts: Facts) -> None:
    """Attempts, outcomes and breakers of the profile and its endpoints, and of no other's."""
    ends = {"attempts": 60, "unknown": 6}
    events: Sequence[Event] = [
        Event("sea", EventType.EXECUTION_FINISHED, ends, "nova"),
        Event("sea", EventType.EXECUTION_FINISHED, ends, "terra"),
        Event("air", EventType.EXECUTION_FINISHED, ends, "nova"),
        Event("sea", EventType.OUTCOME_REPORTED, {"metric": "value", "value": 2.5}, "nova"),
        Event("sea", EventType.OUTCOME_REPORTED, {"metric": "cost", "value": 4}, "nova"),
        Event("sea", EventType.OUTCOME_REPORTED, {"metric": "clicks", "value": 1}, "nova"),
        Event("sea", EventType.LANE_OPENED, {"endpointKey": "out"}),
        Event("sea", EventType.LANE_OPENED, {"endpointKey": "elsewhere"}),
    ]
    async with node.database.transaction() as connection:
        await emit(connection, *events)
    await until(lambda: not facts("SELECT FROM telemetry_pending"), "the positions")
    mine = _Mine()
    proposals = Proposals(node.database, node.configuration, _Clock(node), hours=1, using=(mine,))
    await proposals.generate("sea")
    (seen,) = mine.seen
    assert seen.day == node.clock.now().date().isoformat()
    figures = seen.recent
    assert (figures.cycles, figures.attempts, figures.unknown, figures.opened) == (1, 60, 6, 1)
    assert (figures.values, figures.value, figures.costs, figures.cost) == (1, 2.5, 1, 4.0)
    assert seen.before.cycles == 0
    assert 0 < seen.from_position <= seen.to_position


async def test_a_day_is_over_once_all_of_it_has_positions(node: Node, facts: Facts) -> None:
    """What has none as yet is waited for; then it counts, though the day was looked at before."""
    ends = Event("sea", EventType.EXECUTION_FINISHED, {"attempts": 60, "unknown": 6}, "nova")

    async def tell() -> None:
        async with node.database.transaction() as connection:
            await emit(connection, ends)

    await tell()
    await until(lambda: not facts("SELECT FROM telemetry_pending"), "the positions")
    await node._sequencer.stop()
    await tell()
    mine = _Mine()
    proposals = Proposals(node.database, node.configuration, _Clock(node), hours=1, using=(mine,))
    await proposals.generate("sea")
    node._sequencer = Sequencer(node.database, node.node_id)
    node._sequencer.start()
    await until(lambda: not facts("SELECT FROM telemetry_pending"), "the positions")
    await proposals.generate("sea")
    await node._sequencer.stop()
    before, after = mine.seen
    assert before.day < after.day
    assert (before.recent.cycles, after.recent.cycles) == (0, 2)
