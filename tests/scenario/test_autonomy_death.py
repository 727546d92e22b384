"""A node that dies in the middle of a change, or of its rollback, has done nothing at all.

So does a halt that comes in between, and whoever changes these facts past Orbit is found.

A process of its own is held up within its transaction, by a lock that the test has, and killed
with SIGKILL. What was done by then is looked for; then another node goes on from the facts.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from orbit.app import Node
from orbit.audit.verification import verify
from orbit.governance.actor import ANYONE
from orbit.governance.halt import Order
from tests.scenario.access import asking
from tests.scenario.conftest import SECRET_KEY, Configure, Facts, MakeNode, until
from tests.scenario.piloting import ON, approved, fleet, intensity, look, proposed, tell
from tests.scenario.test_autonomy import arm

WORKER = """
import asyncio, json, sys
from orbit.app import Node
from orbit.settings import Settings

async def main():
    node = Node(Settings(**json.loads(sys.argv[1])), roles=frozenset())
    await node.open()
    await getattr(node.changes, sys.argv[2])()

asyncio.run(main())
"""
HOLD = """
CREATE FUNCTION hold_up() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    PERFORM set_config('lock_timeout', '0', true), pg_advisory_xact_lock(4242);
    RETURN NEW;
END
$$;
CREATE TRIGGER hold_up BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION hold_up();
"""
WAITING = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 4242 AND NOT granted"
STATE = """
SELECT (SELECT count(*) FROM profile_overlay) AS overlays,
    (SELECT count(*) FROM profile_overlay_end) AS ends,
    (SELECT count(*) FROM autonomy_verdict) AS verdicts,
    (SELECT count(*) FROM autonomy_mode) AS modes,
    (SELECT count(*) FROM config_activation) AS activations,
    (SELECT revision FROM config_active) AS revision,
    (SELECT count(*) FROM audit_trail_entry) AS entries,
    (SELECT count(*) FROM telemetry_event) AS events
"""


@contextmanager
def held_up(owner_dsn: str, table: str) -> Iterator[None]:
    """Whoever inserts into the table waits within its transaction, until this is over."""
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        owner.execute(HOLD.format(table=table).encode())
        owner.execute("SELECT pg_advisory_lock(4242)")
        yield
        owner.execute("SELECT pg_advisory_unlock(4242)")


async def killed_within(node: Node, facts: Facts, owner_dsn: str, table: str, what: str) -> None:
    """Has another process do it, and kills that when it is about to write into a table."""
    given: dict[str, Any] = {
        "database_url": node.settings.database_url,
        "secret_keys": [SECRET_KEY],
        "config_dir": str(node.settings.config_dir),
        "auth": "off",
        **ON,
    }
    with held_up(owner_dsn, table):
        worker = await asyncio.create_subprocess_exec(
            sys.executable, "-c", WORKER, json.dumps(given), what
        )
        await until(lambda: facts(WAITING), "the worker's transaction")
        worker.kill()
        assert await worker.wait() == -signal.SIGKILL
    await until(lambda: not facts(WAITING), "the end of the dead worker's session")


@pytest.mark.parametrize("table", ["config_activation", "audit_trail_entry"])
async def test_a_node_killed_while_it_applies_has_changed_nothing(
    make_node: MakeNode,
    configure: Configure,
    facts: Facts,
    owner_dsn: str,
    dsn: str,
    table: str,
) -> None:
    """The overlay was written, the revision not, or all but the trail; the next node applies it."""
    node = await fleet(make_node, configure, facts, **ON)
    await arm(node)
    await approved(node)
    before = facts(STATE)
    await killed_within(node, facts, owner_dsn, table, "apply_approved")
    assert facts(STATE) == before
    await look(node)
    assert intensity(node) == 4
    assert verify(dsn).findings == []


@pytest.mark.parametrize("table", ["profile_overlay_end", "autonomy_mode", "audit_trail_entry"])
async def test_a_node_killed_while_it_rolls_back_has_changed_nothing(
    make_node: MakeNode,
    configure: Configure,
    facts: Facts,
    owner_dsn: str,
    dsn: str,
    table: str,
) -> None:
    """Verdict, end, revision, disarming: all of them or none, and another node does it."""
    node = await fleet(make_node, configure, facts, **ON)
    await arm(node)
    await approved(node)
    await look(node)
    await tell(node, facts, rounds=20, nova=2)
    before = facts(STATE)
    await killed_within(node, facts, owner_dsn, table, "judge_all")
    assert facts(STATE) == before
    other = await make_node(**ON)
    await other._pilot.stop()
    assert intensity(other) == 4
    ((_, verdict),) = await other.changes.judge_all()
    assert (verdict, intensity(other)) == ("breached", 5)
    (after,) = facts(STATE)
    assert (after["ends"], after["verdicts"], after["modes"]) == (1, 1, 2)
    await node.configuration.refresh()
    assert intensity(node) == 5
    assert verify(dsn).findings == []


async def test_a_halt_waits_for_a_change_under_way_and_lets_none_follow(
    make_node: MakeNode, configure: Configure, facts: Facts, owner_dsn: str
) -> None:
    """While a change has the fence no halt says that it passed; afterwards nothing is changed."""
    node = await fleet(make_node, configure, facts, **ON)
    await arm(node)
    await approved(node)
    order = Order("sea", "ann", "key-1", "a test")
    with held_up(owner_dsn, "config_activation"):
        applying = asyncio.create_task(node.changes.apply_approved())
        await until(lambda: facts(WAITING), "the change's transaction")
        halted = await node.brake.halt(order, wait_seconds=0)
        assert (halted.is_fenced, halted.is_quiesced) == (False, False)
    assert len(await applying) == 1  # it began before
    assert intensity(node) == 4
    halted = await node.brake.halt(order, wait_seconds=60)
    assert halted.is_quiesced
    await tell(node, facts, rounds=20, nova=2)
    before = facts("SELECT count(*) FROM config_activation")
    assert await node.changes.judge_all() == []
    assert facts("SELECT count(*) FROM config_activation") == before
    assert intensity(node) == 4


TABLES = (
    "profile_overlay_end",
    "autonomy_verdict",
    "autonomy_mode",
    "autonomy_skip",
    "autonomy_shadow",
    "profile_overlay",
)


async def test_what_is_done_past_orbit_to_its_facts_is_found(
    make_node: MakeNode, configure: Configure, facts: Facts, owner_dsn: str, dsn: str
) -> None:
    """Of each kind of fact one that is gone, and one that nobody wrote an entry for."""
    node = await fleet(make_node, configure, facts, **ON)
    async with asking(node) as api:
        assert (await api.post("/autonomy/nova/shadow", json={})).status_code == 200
    proposal_id = await proposed(node)
    await look(node)
    await node.proposals.decide(proposal_id, ANYONE, is_approved=True, reason=None)
    await look(node)  # not armed: skipped
    await arm(node)
    await look(node)
    await tell(node, facts, rounds=20, nova=2)
    await look(node)
    assert verify(dsn).findings == []
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        for table in TABLES:
            owner.execute(f"ALTER TABLE {table} DISABLE TRIGGER USER".encode())
        for constraint in ("profile_overlay_end", "autonomy_verdict"):
            name = f"{constraint}_overlay_id_fkey"
            owner.execute(f"ALTER TABLE {constraint} DROP CONSTRAINT {name}".encode())
        for table in TABLES:
            owner.execute(f"CREATE TEMP TABLE kept AS SELECT * FROM {table}".encode())
            assert owner.execute(f"DELETE FROM {table}".encode()).rowcount > 0, table
            found = "\n".join(map(str, verify(dsn).findings))
            assert "what it is about" in found, table
            owner.execute(f"INSERT INTO {table} SELECT * FROM kept; DROP TABLE kept".encode())
            assert verify(dsn).findings == []
        owner.execute(
            b"INSERT INTO autonomy_mode SELECT profile_id, 9, mode, cause, namespaces, epochs, 'x',"
            b" actor, actor_id, node_id, created_at FROM autonomy_mode LIMIT 1"
        )
        (found,) = map(str, verify(dsn).findings)
        assert "autonomy_mode nova/9 has no entry autonomy.set" in found
