"""database/repair.py and repair.sql: leases rebuilt from facts, on a real database."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.rows import dict_row

from orbit.clock import DatabaseClock, derived_id, new_id
from orbit.database.pool import Database
from orbit.database.repair import repair
from orbit.errors import LeaseLost
from orbit.execution.context import Stage
from orbit.execution.cycle import claim
from orbit.execution.initiation import CycleRequest, Intake
from orbit.execution.recorder import Checkpoint, Recorder, StageResult
from orbit.payload import Payload

_NOTHING = dict.fromkeys(
    (
        "configuration",
        "jobs",
        "cycles",
        "recounted",
        "ended",
        "requeues",
        "fences",
        "heads",
        "events",
    ),
    0,
)
_ITEM = Payload(b"an item")


@dataclass(frozen=True, slots=True)
class Facts:
    """Writes facts as the engine would, one by one, and reads and deletes leases."""

    owner: psycopg.Connection[dict[str, Any]]
    database: Database
    clock: DatabaseClock
    node_id: str

    async def cycle(self) -> str:
        """A cycle that was accepted, of a run profile."""
        cycle_id = new_id(self.clock.now())
        request = CycleRequest(cycle_id, "east", "api", run_profile_id="daily", profile_id="nova")
        await Intake(self.database, self.node_id, lambda: None).accept(request)
        return cycle_id

    def checkpoint(self, cycle_id: str, stage: Stage, lease_number: int) -> None:
        self.owner.execute(
            "INSERT INTO cycle_checkpoint (namespace, cycle_id, stage, lease_number, node_id)"
            " VALUES ('east', %s, %s, %s, %s)",
            (cycle_id, str(stage), lease_number, self.node_id),
        )

    def record(self, cycle_id: str, lease_number: int) -> None:
        self.owner.execute(
            "INSERT INTO execution_record (namespace, cycle_id, stage, step, lease_number,"
            " attempt, name, outcome, duration_seconds, input_size, node_id)"
            " VALUES ('east', %s, 'tier2_complete', 0, %s, 1, 'x:y', 'failed', 1, 1, %s)",
            (cycle_id, lease_number, self.node_id),
        )

    def job(
        self,
        cycle_id: str,
        number: int,
        *,
        requeued_from: str | None = None,
        has_payload: bool = True,
    ) -> str:
        """A job of the cycle's only item, with the item's payload."""
        job_id = derived_id(cycle_id, "job", str(number))
        key = {"cycle": cycle_id, "job": job_id, "digest": _ITEM.digest, "old": requeued_from}
        if has_payload:
            self.owner.execute(
                "INSERT INTO payload VALUES ('east', %(cycle)s, %(digest)s, 'an item')"
                " ON CONFLICT DO NOTHING",
                key,
            )
        self.owner.execute(
            "INSERT INTO dispatch_job (namespace, job_id, cycle_id, item_index, endpoint_key,"
            " snapshot_id, digest, content_type, size, max_attempts, requeued_from) VALUES"
            " ('east', %(job)s, %(cycle)s, 0, 'alpha', 's', %(digest)s, 'a/b', 7, 9, %(old)s)",
            key,
        )
        return job_id

    def receipts(self, job_id: str, *outcomes: str) -> None:
        """The ends of the job's attempts, the last under lease number 40."""
        for attempt, outcome in enumerate(outcomes, 1):
            self.owner.execute(
                "INSERT INTO delivery_receipt (namespace, job_id, attempt, outcome, digest, size,"
                " lease_number, node_id) VALUES ('east', %s, %s, %s, 'd', 7, 40, %s)",
                (job_id, attempt, outcome, self.node_id),
            )

    def dead_letter(self, job_id: str, cycle_id: str) -> None:
        self.owner.execute(
            "INSERT INTO dead_letter_dispatch VALUES ('east', %s, %s, 'alpha', 'status 500', 3)",
            (job_id, cycle_id),
        )

    def forget(self, *tables: str) -> None:
        for table in tables or ("cycle_lease", "dispatch_lease"):
            self.owner.execute(f"DELETE FROM {table}")

    def rows(self, query: str) -> list[dict[str, Any]]:
        found = self.owner.execute(query).fetchall()
        return [{k: str(v) if isinstance(v, UUID) else v for k, v in row.items()} for row in found]

    def leases(self, table: str) -> dict[str, dict[str, Any]]:
        """By cycle or job id; `is_due` says whether it can be claimed now."""
        key = "job_id" if table == "dispatch_lease" else "cycle_id"
        rows = self.rows(
            "SELECT to_jsonb(lease) || jsonb_build_object('is_due', due_at <= orbit_now())"
            f" AS lease FROM {table} lease"
        )
        return {row["lease"][key]: row["lease"] for row in rows}


@pytest.fixture
def facts(owner_dsn: str, database: Database, clock: DatabaseClock, node_id: str) -> Any:
    """A database to write facts to."""
    with psycopg.connect(owner_dsn, autocommit=True, row_factory=dict_row) as owner:
        yield Facts(owner, database, clock, node_id)


async def _dispatching(facts: Facts) -> tuple[str, dict[str, str]]:
    """A cycle that waits for four jobs: one delivered, one dead, one tried, one untouched."""
    cycle_id = await facts.cycle()
    facts.checkpoint(cycle_id, Stage.DISPATCH_ENQUEUED, 3)
    names = ("delivered", "dead", "tried", "fresh")
    jobs = {name: facts.job(cycle_id, number) for number, name in enumerate(names)}
    facts.receipts(jobs["delivered"], "failed", "delivered")
    facts.receipts(jobs["dead"], "failed", "failed", "failed")
    facts.dead_letter(jobs["dead"], cycle_id)
    facts.receipts(jobs["tried"], "unknown")
    return cycle_id, jobs


async def test_there_is_nothing_to_do_where_every_lease_is_there(facts: Facts) -> None:
    """A lease that exists stays as it is, with its owner and its time."""
    await facts.cycle()
    await claim(facts.database, facts.node_id, 5, 30)
    before = facts.rows("SELECT * FROM cycle_lease")
    assert await repair(facts.database) == _NOTHING
    assert facts.rows("SELECT * FROM cycle_lease") == before


async def test_an_unfinished_cycle_can_be_claimed_again(facts: Facts) -> None:
    """It is due at once, under a number above every one in its checkpoints and records."""
    cycle_id = await facts.cycle()
    facts.checkpoint(cycle_id, Stage.TIER1_COMPLETE, 7)
    facts.record(cycle_id, 9)
    facts.forget()
    assert await repair(facts.database) == {**_NOTHING, "cycles": 1}
    lease = facts.leases("cycle_lease")[cycle_id]
    assert lease["is_due"]
    assert lease["lease_number"] > 9
    assert (lease["node_id"], lease["outstanding"]) == (None, None)
    assert lease["run_profile_id"] == "daily"
    (claimed,) = await claim(facts.database, facts.node_id, 5, 30)
    assert claimed.stage is Stage.TIER1_COMPLETE


@pytest.mark.parametrize("last", [Stage.CYCLE_FINISHED, Stage.CYCLE_FAILED])
async def test_an_ended_cycle_gets_no_lease(facts: Facts, last: Stage) -> None:
    """What has its terminal checkpoint is history."""
    facts.checkpoint(await facts.cycle(), last, 1)
    facts.forget()
    assert await repair(facts.database) == _NOTHING


async def test_a_dispatching_cycle_waits_for_its_undone_jobs(facts: Facts) -> None:
    """Its counters are what its receipts and dead letters say."""
    cycle_id, _ = await _dispatching(facts)
    facts.forget()
    found = await repair(facts.database)
    assert found == {**_NOTHING, "cycles": 1, "jobs": 2, "recounted": 1}
    lease = facts.leases("cycle_lease")[cycle_id]
    assert not lease["is_due"]
    counted = {
        name: lease[name]
        for name in ("jobs", "outstanding", "delivered", "dead_lettered", "attempts", "bytes")
    }
    assert counted == {
        "jobs": 4,
        "outstanding": 2,
        "delivered": 1,
        "dead_lettered": 1,
        "attempts": 5,
        "bytes": 35,
    }


async def test_an_undone_job_is_sent_again_under_its_next_number(facts: Facts) -> None:
    """Only what is neither delivered nor dead, with the attempts that its receipts count."""
    _, jobs = await _dispatching(facts)
    facts.forget()
    await repair(facts.database)
    leases = facts.leases("dispatch_lease")
    assert leases.keys() == {jobs["tried"], jobs["fresh"]}
    assert leases[jobs["tried"]]["attempt"] == 1
    assert leases[jobs["tried"]]["lease_number"] > 40
    assert leases[jobs["fresh"]]["attempt"] == 0
    assert all(lease["is_due"] and lease["node_id"] is None for lease in leases.values())
    assert not any(lease["is_requeued"] for lease in leases.values())


async def test_a_cycle_whose_jobs_are_all_done_ends(facts: Facts) -> None:
    """Nobody else would end it: it gets its last checkpoints and its ledger entry."""
    cycle_id = await facts.cycle()
    facts.checkpoint(cycle_id, Stage.DISPATCH_ENQUEUED, 3)
    facts.receipts(facts.job(cycle_id, 1), "failed", "delivered")
    facts.forget()
    found = await repair(facts.database)
    assert found == {**_NOTHING, "cycles": 1, "recounted": 1, "ended": 1}
    assert facts.leases("cycle_lease") == {}
    (status,) = facts.rows("SELECT state, detail FROM cycle_status")
    assert (status["state"], status["detail"]["attempts"]) == ("finished", 2)
    (entry,) = facts.rows("SELECT * FROM value_ledger_entry")
    assert (entry["jobs"], entry["delivered"], entry["attempts"], entry["bytes"]) == (1, 1, 2, 14)
    assert await repair(facts.database) == _NOTHING


async def test_a_requeued_job_does_not_count_in_its_cycle(facts: Facts) -> None:
    """It is sent again, though its cycle has ended for it."""
    cycle_id = await facts.cycle()
    facts.checkpoint(cycle_id, Stage.CYCLE_FINISHED, 3)
    old = facts.job(cycle_id, 1)
    facts.dead_letter(old, cycle_id)
    new = facts.job(cycle_id, 2, requeued_from=old)
    facts.forget()
    assert await repair(facts.database) == {**_NOTHING, "jobs": 1}
    assert facts.leases("dispatch_lease")[new]["is_requeued"]


async def test_a_delivery_whose_job_had_lost_its_lease_is_counted(facts: Facts) -> None:
    """A cycle that kept its lease still learns of jobs that were done without theirs."""
    cycle_id, jobs = await _dispatching(facts)
    facts.forget()
    await repair(facts.database)
    facts.forget("dispatch_lease")
    facts.owner.execute(
        "INSERT INTO delivery_receipt (namespace, job_id, attempt, outcome, digest, size,"
        " lease_number, node_id) VALUES ('east', %s, 2, 'delivered', 'd', 7, 41, %s)",
        (jobs["tried"], facts.node_id),
    )
    assert await repair(facts.database) == {**_NOTHING, "jobs": 1, "recounted": 1}
    lease = facts.leases("cycle_lease")[cycle_id]
    assert (lease["outstanding"], lease["delivered"], lease["attempts"]) == (1, 2, 7)


async def test_an_owner_from_before_the_loss_stays_fenced_out(facts: Facts) -> None:
    """Even on the node that claims the cycle again, and in the same batch, it writes nothing."""
    await facts.cycle()
    (old,) = await claim(facts.database, facts.node_id, 5, 30)
    facts.forget()
    await repair(facts.database)
    (new,) = await claim(facts.database, facts.node_id, 5, 30)
    recorder = Recorder(facts.database, facts.node_id)
    results = [
        StageResult(old, [Checkpoint(Stage.TIER1_COMPLETE, Payload(b"old"))]),
        StageResult(new, [Checkpoint(Stage.TIER1_COMPLETE, Payload(b"new"))]),
    ]
    first, second = await asyncio.gather(*map(recorder.record, results), return_exceptions=True)
    assert isinstance(first, LeaseLost)
    assert second is None
    (found,) = facts.rows("SELECT digest FROM cycle_checkpoint WHERE stage = 'tier1_complete'")
    assert found["digest"] == Payload(b"new").digest


async def test_the_last_activated_configuration_is_in_force_again(facts: Facts) -> None:
    """Which revision that is, is a fact."""
    for second, revision in enumerate(("a" * 64, "b" * 64)):
        facts.owner.execute(
            "INSERT INTO config_revision VALUES (%s, '{}', %s)", (revision, facts.node_id)
        )
        facts.owner.execute(
            "INSERT INTO config_activation VALUES (%s, %s, 'test', %s,"
            " orbit_now() + %s * interval '1 second')",
            (new_id(facts.clock.now()), revision, facts.node_id, second),
        )
    assert await repair(facts.database) == {**_NOTHING, "configuration": 1}
    assert facts.rows("SELECT revision FROM config_active") == [{"revision": "b" * 64}]
    assert await repair(facts.database) == _NOTHING


async def test_what_retention_has_dropped_is_not_brought_back(facts: Facts) -> None:
    """A cycle or job that outlived its checkpoints or payload for a while is history."""
    facts.owner.execute(
        "CREATE TABLE cycle_run_old PARTITION OF cycle_run FOR VALUES"
        " FROM (orbit_first_id('2026-01-05')) TO (orbit_first_id('2026-01-12'))"
    )
    facts.owner.execute(
        "INSERT INTO cycle_run (namespace, cycle_id, trigger, traceparent, node_id)"
        " VALUES ('east', orbit_first_id('2026-01-06'), 'api', 't', %s)",
        (facts.node_id,),
    )
    cycle_id = await facts.cycle()
    facts.checkpoint(cycle_id, Stage.CYCLE_FINISHED, 1)
    facts.job(cycle_id, 1, has_payload=False)
    facts.forget()
    assert await repair(facts.database) == _NOTHING
