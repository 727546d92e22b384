"""The configuration in force: one revision for all nodes, whole, stored under its digest.

Files only propose. A revision comes into force in one transaction that no acceptance of a cycle
can overlap, and a cycle stays pinned to the one with which it began. At boot a changed file
takes effect for new cycles, unless that would go back to what was in force before: old files on
one node must not undo the others' newer ones. A reload may, and is refused while cycles are active.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import structlog

from orbit.audit.trail import INSTALLATION, Act, append
from orbit.canonical import canonical_json, sha256_hex
from orbit.clock import Clock, new_id
from orbit.database.pool import Connection, Database
from orbit.database.queries import load
from orbit.errors import CyclesActive, DatabaseUnavailable
from orbit.profiles.model import Documents, document_body, documents_from_body
from orbit.telemetry.catalogue import EventType
from orbit.telemetry.emission import Event, emit
from orbit.vocabulary import DRILL_PREFIX

SQL = load("configuration")
log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Revision:
    """A whole configuration and the SHA-256 of its canonical body."""

    revision: str
    documents: Documents


def revision_of(documents: Documents) -> Revision:
    """The revision that these documents are."""
    return Revision(sha256_hex(_body(documents)), documents)


class Configuration:
    """The revision in force, as this node last saw it, and all that its cycles are pinned to."""

    def __init__(self, database: Database, node_id: str, clock: Clock) -> None:
        self._database, self._node_id, self._clock = database, node_id, clock
        self._known: dict[str, Revision] = {}
        self.active: Revision = revision_of(Documents())
        self.proposed: Revision | None = None

    @property
    def is_in_step(self) -> bool:
        """Whether this node's files say what is in force."""
        return self.proposed is None or self.proposed.revision == self.active.revision

    async def propose(self, documents: Documents) -> bool:
        """Puts files read at boot into force for new cycles; whether that changed anything.

        Files that were in force before, and are not now, change nothing; that is logged.
        """
        node = f"node {self._node_id}"
        return await self._put(documents, "files at boot", node, is_boot=True)

    async def replace(
        self, documents: Documents, asked_by: str = "api", reason: str | None = None
    ) -> bool:
        """Puts files into force if no cycle is active; whether that changed anything.

        Raises CyclesActive, naming them, otherwise; then nothing is changed.
        """
        return await self._put(documents, reason or "reload", asked_by, is_boot=False)

    async def refresh(self) -> bool:
        """Looks which revision is in force; whether it is another than before."""
        row = await self._database.fetch_one(SQL.active_revision)
        if row is None or row["revision"] == self.active.revision:
            return False
        self.active = await self.read(row["revision"])
        return True

    async def catch_up(self) -> None:
        """Looks which revision is in force, for a request that came too late for the last.

        Raises DatabaseUnavailable if the database does not know: asking again would not help.
        """
        if await self._database.fetch_one(SQL.active_revision) is None:
            raise DatabaseUnavailable(
                "no configuration is in force (config_active has no row); run `orbit db repair`"
            )
        await self.refresh()

    async def read(self, revision: str) -> Revision:
        """A stored revision. Raises LookupError if it is not there."""
        found = self._known.get(revision)
        if found is None:
            row = await self._database.fetch_one(SQL.revision_body, {"revision": revision})
            if row is None:
                raise LookupError(f"configuration revision {revision} is not stored")
            found = Revision(revision, documents_from_body(json.loads(row["body"])))
            self._known[revision] = found
        return found

    async def _put(
        self, documents: Documents, reason: str, asked_by: str, *, is_boot: bool
    ) -> bool:
        new = revision_of(documents)
        async with self._database.transaction() as connection:
            await connection.execute(SQL.bound_wait)
            await connection.execute(SQL.lock_configuration)
            cursor = await connection.execute(SQL.active_revision)
            row = await cursor.fetchone()
            is_same = row is not None and row["revision"] == new.revision
            is_past = is_boot and row is not None and await _was_in_force(connection, new)
            is_changed = not (is_same or is_past)
            if is_changed:
                if not is_boot:
                    await _refuse_while_active(connection)
                await self._activate(connection, new, reason, asked_by)
        self._known[new.revision] = self.proposed = new
        if is_same or is_changed:
            self.active = new
        else:
            await self._keep(new)
        return is_changed

    async def _keep(self, past: Revision) -> None:
        await self.refresh()
        log.warning(
            "configuration_differs",
            files=past.revision[:12],
            active=self.active.revision[:12],
            hint="the files were in force before; a reload puts them into force again",
        )

    async def _activate(
        self, connection: Connection, new: Revision, reason: str, asked_by: str
    ) -> None:
        row = {
            "revision": new.revision,
            "body": _body(new.documents).decode(),
            "node_id": self._node_id,
            "activation_id": new_id(self._clock.now()),
            "reason": reason,
        }
        await connection.execute(SQL.insert_revision, row)
        await connection.execute(SQL.insert_activation, row)
        await connection.execute(SQL.activate, row)
        told = {"revision": new.revision}
        await emit(connection, Event(INSTALLATION, EventType.CONFIGURATION_ACTIVATED, told))
        act = Act(
            INSTALLATION,
            "configuration.activated",
            asked_by,
            reason,
            row["activation_id"],
            {"revision": new.revision},
        )
        await append(connection, act)


async def _was_in_force(connection: Connection, revision: Revision) -> bool:
    cursor = await connection.execute(SQL.was_in_force, {"revision": revision.revision})
    row = await cursor.fetchone()
    return row is not None and bool(row["was_in_force"])


async def _refuse_while_active(connection: Connection) -> None:
    cursor = await connection.execute(SQL.active_cycles, {"drills": DRILL_PREFIX})
    rows = await cursor.fetchall()
    if rows:
        total = rows[0]["total"]
        is_one = total == 1
        raise CyclesActive(
            f"{total} {'cycle is' if is_one else 'cycles are'} active; "
            f"reload when {'it has' if is_one else 'they have'} ended",
            activeCycles=[
                {
                    "namespace": row["namespace"],
                    "cycleRunId": row["cycle_id"],
                    "runProfileId": row["run_profile_id"] or None,
                }
                for row in rows
            ],
            total=total,
        )


def _body(documents: Documents) -> bytes:
    return canonical_json(document_body(documents))
