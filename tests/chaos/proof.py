"""The proof that everything happened exactly once, from the facts and from what was received.

Reads the database as its owner, the receiver's arrivals and the notes of the steps' calls, and
fails with every deviation it finds.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.rows import dict_row

from orbit.canonical import sha256_hex
from orbit.execution.context import TIERS, Stage
from tests.chaos import steps
from tests.chaos.harness import PATIENCE_SECONDS, RunProfileShape, Scene, eventually

Row = dict[str, Any]
_ORDER = [str(stage) for stage in Stage]
_STAGES = _ORDER[:-1]


async def finished(owner_dsn: str, seconds: float = PATIENCE_SECONDS) -> None:
    """Waits until no cycle is active and no job is left to send."""
    await eventually(lambda: _is_idle(owner_dsn), "the end of all cycles and jobs", seconds)


async def _is_idle(owner_dsn: str) -> bool:
    async with await psycopg.AsyncConnection.connect(owner_dsn) as connection:
        cursor = await connection.execute(
            "SELECT NOT EXISTS (SELECT FROM cycle_lease)"
            " AND NOT EXISTS (SELECT FROM dispatch_lease)"
        )
        row = await cursor.fetchone()
    return bool(row and row[0])


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything that the database knows, as the owner reads it."""

    cycles: list[Row]
    checkpoints: list[Row]
    items: list[Row]
    jobs: list[Row]
    receipts: list[Row]
    dead_letters: list[Row]
    records: list[Row]
    ledger: list[Row]


def read_evidence(owner_dsn: str) -> Evidence:
    """All facts; ids as text."""

    def rows(query: str) -> list[Row]:
        found = connection.execute(query).fetchall()
        return [{k: str(v) if k.endswith("_id") else v for k, v in row.items()} for row in found]

    with psycopg.connect(owner_dsn, row_factory=dict_row) as connection:
        return Evidence(
            cycles=rows(
                "SELECT status.*, context FROM cycle_status status"
                " JOIN initiation USING (namespace, cycle_id)"
            ),
            checkpoints=rows("SELECT * FROM cycle_checkpoint"),
            items=rows("SELECT * FROM normalized_item"),
            jobs=rows("SELECT * FROM dispatch_job"),
            receipts=rows("SELECT * FROM delivery_receipt ORDER BY attempt"),
            dead_letters=rows("SELECT * FROM dead_letter_dispatch"),
            records=rows("SELECT * FROM execution_record"),
            ledger=rows("SELECT * FROM value_ledger_entry"),
        )


def assert_exactly_once(owner_dsn: str, scene: Scene, *, is_lease_loss: bool = False) -> Evidence:
    """Fails with what was lost, doubled or changed.

    After a loss of leases (`is_lease_loss`) an attempt's number may have gone out twice: the
    number of an open attempt is nowhere but in its lease.
    """
    evidence = read_evidence(owner_dsn)
    shapes = {shape.run_profile_id: shape for shape in scene.shapes}
    faults = [
        *_cycles(evidence, scene),
        *_stages(evidence),
        *_items_and_jobs(evidence, shapes),
        *_wire(evidence, scene, is_lease_loss=is_lease_loss),
        *_calls(evidence, scene, shapes),
        *_ledger(evidence),
    ]
    assert not faults, f"{len(faults)} faults:\n" + "\n".join(faults[:30])
    return evidence


def _cycles(evidence: Evidence, scene: Scene) -> Iterator[str]:
    known = {cycle["cycle_id"] for cycle in evidence.cycles}
    for key, cycle_id in scene.client.accepted.items():
        if cycle_id not in known:
            yield f"accepted and lost: {key} {cycle_id}"
    if extra := known - set(scene.client.accepted.values()):
        yield f"cycles that nobody was told of: {sorted(extra)}"
    if len(scene.client.accepted) != len(set(scene.client.accepted.values())):
        yield "two triggers share a cycle"
    for cycle in evidence.cycles:
        if cycle["state"] != "finished":
            yield f"cycle {cycle['cycle_id']} is {cycle['state']}: {cycle['detail']}"
    for letter in evidence.dead_letters:
        yield f"dead letter {letter['job_id']}: {letter['cause']}"


def _stages(evidence: Evidence) -> Iterator[str]:
    by_cycle = _grouped(evidence.checkpoints, "cycle_id")
    for cycle in evidence.cycles:
        found = by_cycle[cycle["cycle_id"]]
        found.sort(key=lambda row: _ORDER.index(row["stage"]))
        if [row["stage"] for row in found] != _STAGES:
            yield f"cycle {cycle['cycle_id']} has the stages {[row['stage'] for row in found]}"
        for earlier, later in itertools.pairwise(found):
            if later["lease_number"] < earlier["lease_number"]:
                yield f"cycle {cycle['cycle_id']}: {later['stage']} by an older lease"


def expected_items(cycle: Row, shape: RunProfileShape) -> list[str]:
    """The digests of a cycle's items, computed from its initiation."""
    content = cycle["context"].encode()
    if shape.has_initiator:
        content = steps.begun(cycle["cycle_id"])
    for stage, count in zip(TIERS, shape.steps, strict=True):
        for number in range(count):
            content = steps.grown(content, str(stage), number)
    pieces = [content]
    if shape.items > 1:
        pieces = [steps.piece(content, number) for number in range(shape.items)]
    if shape.is_normalized:
        pieces = [steps.normalized(one) for one in pieces]
    return [sha256_hex(one) for one in pieces]


def _items_and_jobs(evidence: Evidence, shapes: dict[str, RunProfileShape]) -> Iterator[str]:
    items, jobs = _grouped(evidence.items, "cycle_id"), _grouped(evidence.jobs, "cycle_id")
    for cycle in evidence.cycles:
        cycle_id, shape = cycle["cycle_id"], shapes[cycle["run_profile_id"]]
        digests = expected_items(cycle, shape)
        found = sorted((row["item_index"], row["digest"]) for row in items[cycle_id])
        if found != list(enumerate(digests)):
            yield f"cycle {cycle_id} has other items than it must"
        wanted = Counter(
            (index, digest, key)
            for index, digest in enumerate(digests)
            for key in shape.endpoint_keys
        )
        made = Counter((j["item_index"], j["digest"], j["endpoint_key"]) for j in jobs[cycle_id])
        if made != wanted:
            yield f"cycle {cycle_id} has other jobs than it must"


def _wire(evidence: Evidence, scene: Scene, *, is_lease_loss: bool) -> Iterator[str]:
    receipts = _grouped(evidence.receipts, "job_id")
    arrived: defaultdict[str, list[Any]] = defaultdict(list)
    for arrival in scene.receiver.arrivals:
        arrived[arrival.job_id].append(arrival)
    if unknown := arrived.keys() - {job["job_id"] for job in evidence.jobs}:
        yield f"arrivals of jobs that do not exist: {sorted(unknown)}"
    for job in evidence.jobs:
        job_id, seen = job["job_id"], arrived[job["job_id"]]
        place = {(a.digest, a.cycle_id, a.endpoint_key) for a in seen}
        if place != {(job["digest"], job["cycle_id"], job["endpoint_key"])}:
            yield f"job {job_id} arrived as {place or 'nothing'}"
        attempts = [row["attempt"] for row in receipts[job_id]]
        if attempts != list(range(1, len(attempts) + 1)):
            yield f"job {job_id} has receipts of the attempts {attempts}"
        numbers = Counter(a.attempt for a in seen)
        if numbers.keys() - set(attempts):
            yield f"job {job_id}: attempts {sorted(numbers)} arrived, receipts {attempts}"
        if not is_lease_loss and max(numbers.values(), default=0) > 1:
            yield f"job {job_id}: an attempt arrived twice: {numbers}"
        outcomes = [row["outcome"] for row in receipts[job_id]]
        if outcomes.count("delivered") != 1 and not is_lease_loss:
            yield f"job {job_id} ended {outcomes}"
        if "delivered" not in outcomes:
            yield f"job {job_id} was never delivered: {outcomes}"


def _calls(evidence: Evidence, scene: Scene, shapes: dict[str, RunProfileShape]) -> Iterator[str]:
    succeeded = Counter(
        (row["cycle_id"], row["stage"], row["step"])
        for row in evidence.records
        if row["outcome"] == "succeeded"
    )
    keys, called = defaultdict(set), set()
    for line in scene.calls.read_text().splitlines():
        call = json.loads(line)
        place = call["cycle"], call["stage"], call["step"]
        called.add(place)
        keys[place].add((call["key"], call["input"]))
    for place, seen in keys.items():
        if len(seen) > 1:
            yield f"step {place} was called with {seen}"
    for place, count in succeeded.items():
        if count > 1:
            yield f"step {place} is recorded {count} times"
    expected = {
        (cycle["cycle_id"], *place)
        for cycle in evidence.cycles
        for place in _places(shapes[cycle["run_profile_id"]])
    }
    if lost := expected ^ succeeded.keys():
        yield f"records lost or too many: {sorted(lost)[:5]}"
    if uncalled := expected - called:
        yield f"recorded without a call: {sorted(uncalled)[:5]}"


def _places(shape: RunProfileShape) -> Iterator[tuple[str, int]]:
    if shape.has_initiator:
        yield "cycle_started", 0
    for stage, count in zip(TIERS, shape.steps, strict=True):
        for number in range(count):
            yield str(stage), number
    if shape.items > 1:
        yield "normalization_complete", 0
    if shape.is_normalized:
        for batch in range((shape.items + 1) // 2):
            yield "normalization_complete", batch + 1


def _ledger(evidence: Evidence) -> Iterator[str]:
    entries = {row["cycle_id"]: row for row in evidence.ledger}
    jobs, items = _grouped(evidence.jobs, "cycle_id"), _grouped(evidence.items, "cycle_id")
    receipts = _grouped(evidence.receipts, "job_id")
    for cycle in evidence.cycles:
        cycle_id = cycle["cycle_id"]
        entry = entries.get(cycle_id)
        if entry is None:
            yield f"cycle {cycle_id} is not in the value ledger"
            continue
        mine = jobs[cycle_id]
        expected = {
            "items": len(items[cycle_id]),
            "jobs": len(mine),
            "delivered": len(mine),
            "dead_lettered": 0,
            "attempts": sum(len(receipts[job["job_id"]]) for job in mine),
            "bytes": sum(len(receipts[job["job_id"]]) * job["size"] for job in mine),
        }
        found = {name: entry[name] for name in expected}
        if found != expected:
            yield f"cycle {cycle_id}: the ledger says {found}, the facts {expected}"


def _grouped(rows: Iterable[Row], key: str) -> defaultdict[str, list[Row]]:
    groups: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row[key]].append(row)
    return groups
