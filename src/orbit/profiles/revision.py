"""The configuration in force: one revision for all nodes, whole, stored under its digest.

Files only propose, and overlays adjust what they declare (`overlays`). A revision comes into force
in one transaction that no acceptance of a cycle can overlap, and a cycle stays pinned to the one
with which it began. At boot a changed file takes effect for new cycles, unless that would go back
to what was in force before: old files on one node must not undo the others' newer ones. A reload
may, and is refused while cycles are active. Both are refused where an overlay does not fit the new
files, unless it may be dropped. An overlay takes effect for new cycles, as files at boot do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from orbit.audit.trail import INSTALLATION, Act, append
from orbit.canonical import canonical_json, sha256_hex
from orbit.clock import Clock, new_id
from orbit.database.pool import Connection, Database
from orbit.database.queries import load
from orbit.errors import CyclesActive, DatabaseUnavailable
from orbit.profiles.adjustments import By, Ending, end, in_force
from orbit.profiles.model import Documents, document_body, documents_from_body
from orbit.profiles.overlays import Laid, Overlay, lay, misfits
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


@dataclass(frozen=True, slots=True)
class Force:
    """What is in force: the files, the overlays on them, and what both come to."""

    active: Revision
    declared: Revision
    overlays: tuple[Overlay, ...] = ()


class Configuration:
    """What is in force, as this node last saw it, and all that its cycles are pinned to."""

    def __init__(self, database: Database, node_id: str, clock: Clock) -> None:
        self._database, self._node_id, self._clock = database, node_id, clock
        self._known: dict[str, Revision] = {}
        nothing = revision_of(Documents())
        self.force = Force(nothing, nothing)
        self.proposed: Revision | None = None

    @property
    def active(self) -> Revision:
        """The revision that new cycles are pinned to."""
        return self.force.active

    @property
    def is_in_step(self) -> bool:
        """Whether this node's files are those in force."""
        return self.proposed is None or self.proposed.revision == self.force.declared.revision

    async def propose(self, documents: Documents, *, is_dropping: bool = False) -> bool:
        """Puts files read at boot into force for new cycles; whether that changed anything.

        Files that were in force before, and are not now, change nothing; that is logged. Raises
        OverlaysBroken, unless `is_dropping`.
        """
        node = f"node {self._node_id}"
        by = By(node, node, self._node_id, "files at boot")
        return await self._put(documents, by, is_boot=True, is_dropping=is_dropping)

    async def replace(
        self,
        documents: Documents,
        asked_by: str = "api",
        reason: str | None = None,
        *,
        is_dropping: bool = False,
    ) -> bool:
        """Puts files into force if no cycle is active; whether that changed anything.

        Raises CyclesActive, naming them, and OverlaysBroken, unless `is_dropping`; then nothing is
        changed.
        """
        by = By(asked_by, asked_by, self._node_id, reason or "reload")
        return await self._put(documents, by, is_boot=False, is_dropping=is_dropping)

    async def check(self, documents: Documents, *, is_dropping: bool = False) -> None:
        """Raises OverlaysBroken for files that overlays do not fit, unless `is_dropping`."""
        async with self._database.connection() as connection:
            laid = lay(documents, await in_force(connection))
        if laid.broken and not is_dropping:
            raise misfits(laid.broken)

    async def refresh(self) -> bool:
        """Looks what is in force; whether it is another revision than before."""
        row = await self._database.fetch_one(SQL.active_revision)
        before = self.force.active.revision
        known = before, self.force.declared.revision
        if row is None or (row["revision"], row["declared_revision"]) == known:
            return False
        async with self._database.connection() as connection:
            overlays = await in_force(connection)
        active, files = await self.read(row["revision"]), await self.read(row["declared_revision"])
        self.force = Force(active, files, overlays)
        return active.revision != before

    async def catch_up(self) -> None:
        """Looks which revision is in force, for a request that came too late for the last.

        Raises DatabaseUnavailable if the database does not know: asking again would not help.
        """
        if await self._database.fetch_one(SQL.active_revision) is None:
            raise _unknown()
        await self.refresh()

    async def read(self, revision: str) -> Revision:
        """A stored revision. Raises LookupError if it is not there."""
        async with self._database.connection() as connection:
            return await self._read(connection, revision)

    async def hold(self, connection: Connection) -> Force:
        """What is in force, which stays so until the transaction ends; acceptances wait for it.

        Raises DatabaseUnavailable if the database does not know.
        """
        row = await _locked(connection)
        if row is None:
            raise _unknown()
        return Force(
            await self._read(connection, row["revision"]),
            await self._read(connection, row["declared_revision"]),
            await in_force(connection),
        )

    async def adjust(
        self, connection: Connection, held: Force, overlays: Sequence[Overlay], by: By
    ) -> list[Act]:
        """Puts the files that are in force into force with other overlays; the acts to append.

        The caller has them from `hold`, and has added or ended the facts themselves.
        """
        laid = lay(held.declared.documents, overlays)
        if laid.broken:
            raise misfits(laid.broken)
        new = revision_of(laid.documents)
        if new.revision == held.active.revision:
            return []
        return [await self._activate(connection, new, held.declared, by)]

    async def _read(self, connection: Connection, revision: str) -> Revision:
        found = self._known.get(revision)
        if found is None:
            cursor = await connection.execute(SQL.revision_body, {"revision": revision})
            row = await cursor.fetchone()
            if row is None:
                raise LookupError(f"configuration revision {revision} is not stored")
            found = Revision(revision, documents_from_body(json.loads(row["body"])))
            self._known[revision] = found
        return found

    async def _put(self, documents: Documents, by: By, *, is_boot: bool, is_dropping: bool) -> bool:
        files = revision_of(documents)
        async with self._database.transaction() as connection:
            row = await _locked(connection)
            is_same = row is not None and row["declared_revision"] == files.revision
            is_past = is_boot and row is not None and await _was_in_force(connection, files)
            is_changed = not (is_same or is_past)
            if is_changed:
                laid = lay(documents, await in_force(connection))
                if laid.broken and not is_dropping:
                    raise misfits(laid.broken)
                if not is_boot:
                    await _refuse_while_active(connection)
                await self._take_in(connection, files, laid, by)
        self._known[files.revision] = self.proposed = files
        await self.refresh()
        if is_past and not is_same:
            self._tell_past(files)
        return is_changed

    async def _take_in(self, connection: Connection, files: Revision, laid: Laid, by: By) -> None:
        """Puts files into force, and ends the overlays that they make needless or do not fit."""
        acts = await end(connection, laid.adopted, Ending.ADOPTED, by)
        dropped = [one.overlay for one in laid.broken]
        acts += await end(connection, dropped, Ending.DROPPED, by)
        activated = await self._activate(connection, revision_of(laid.documents), files, by)
        await append(connection, activated, *acts)

    def _tell_past(self, past: Revision) -> None:
        log.warning(
            "configuration_differs",
            files=past.revision[:12],
            active=self.active.revision[:12],
            hint="the files were in force before; a reload puts them into force again",
        )

    async def _activate(
        self, connection: Connection, new: Revision, files: Revision, by: By
    ) -> Act:
        """Puts a revision into force; the act to append."""
        activation_id = new_id(self._clock.now())
        for one in (files, new):
            row = {"revision": one.revision, "body": _body(one.documents).decode()}
            await connection.execute(SQL.insert_revision, {**row, "node_id": self._node_id})
        row = {
            "revision": new.revision,
            "declared_revision": files.revision,
            "node_id": self._node_id,
            "activation_id": activation_id,
            "reason": by.reason or "overlay",
        }
        await connection.execute(SQL.insert_activation, row)
        await connection.execute(SQL.activate, row)
        told = {"revision": new.revision}
        await emit(connection, Event(INSTALLATION, EventType.CONFIGURATION_ACTIVATED, told))
        detail = {"revision": new.revision}
        if files.revision != new.revision:
            detail["declaredRevision"] = files.revision
        return Act(
            INSTALLATION, "configuration.activated", by.actor, by.reason, activation_id, detail
        )


async def _locked(connection: Connection) -> dict[str, str] | None:
    """The revisions in force, with the lock that keeps them; None before the first."""
    await connection.execute(SQL.bound_wait)
    await connection.execute(SQL.lock_configuration)
    return await (await connection.execute(SQL.active_revision)).fetchone()


def _unknown() -> DatabaseUnavailable:
    return DatabaseUnavailable(
        "no configuration is in force (config_active has no row); run `orbit db repair`"
    )


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
