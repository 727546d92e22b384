"""The janitor: makes partitions ahead, drops what retention lets go, ends what drills have left.

Facts go only partition by partition, oldest first, and never what a live cycle or job needs.
Audit, ledgers and dead letters stay for ever. Telemetry has its own rules: `telemetry/retention`.
"""

from __future__ import annotations

from psycopg.errors import LockNotAvailable, ObjectInUse

from orbit.database.pool import TRANSIENT, Database, first_line
from orbit.database.queries import load
from orbit.errors import ArchiveDamaged
from orbit.services.base import Service
from orbit.services.leftovers import Leftovers
from orbit.telemetry.retention import Retention, retain

SQL = load("node")
_REST_SECONDS = 3600.0
KEEPS_ALL = Retention(0)

# What a cycle and its jobs leave behind; the database refuses to drop of any other fact.
RETAINED_FACTS = (
    "payload",
    "cycle_checkpoint",
    "normalized_item",
    "execution_record",
    "delivery_receipt",
    "dispatch_job",
    "initiation",
    "cycle_run",
)


class Janitor(Service):
    """Runs at start and then every hour; several at once do no harm."""

    name = "janitor"

    def __init__(
        self,
        database: Database,
        *,
        fact_retention_days: int,
        leftovers: Leftovers | None = None,
        telemetry: Retention = KEEPS_ALL,
    ) -> None:
        super().__init__(database)
        self._telemetry = telemetry
        self._fact_retention_days, self._leftovers = fact_retention_days, leftovers

    async def make_partitions(self) -> None:
        """Partitions ahead, which a node that starts needs; the rest can wait."""
        row = await self._database.fetch_one(SQL.create_partitions)
        if row is not None and row["made"]:
            self._log.info("partitions_created", count=row["made"])

    async def run_once(self) -> float:
        """Partitions ahead, then retention."""
        await self.make_partitions()
        await self._database.execute(SQL.forget_nodes)
        if self._leftovers is not None and (count := await self._leftovers.end_old()):
            self._log.warning("drills_ended", count=count)
        if self._fact_retention_days:
            await self._retain()
        await self._retain_telemetry()
        return _REST_SECONDS

    async def _retain_telemetry(self) -> None:
        try:
            retained = await retain(self._database, self._telemetry)
        except ArchiveDamaged as error:
            self._log.error("telemetry_kept", error=str(error))
            return
        except (LockNotAvailable, ObjectInUse) as error:  # somebody reads: better the next time
            self._log.info("telemetry_kept", error=first_line(error))
            return
        except TRANSIENT:
            raise
        except Exception:  # noqa: BLE001 - at once it would fail again: the next hour
            self._log.exception("telemetry_kept")
            return
        if retained.dropped:
            self._log.info("telemetry_dropped", weeks=retained.dropped)
        if retained.waiting_for:
            self._log.warning("telemetry_kept", waiting_for=retained.waiting_for)

    async def _retain(self) -> None:
        for fact in RETAINED_FACTS:
            row = await self._database.fetch_one(
                SQL.drop_partitions, {"fact": fact, "days": self._fact_retention_days}
            )
            if row is not None and row["dropped"]:
                self._log.info("partitions_dropped", fact=fact, partitions=row["dropped"])
