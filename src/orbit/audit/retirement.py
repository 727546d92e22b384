"""Retirement: which facts retention has dropped, by what the trail itself declares.

Retention drops whole partitions, and appends `facts.retired` to the installation's log in the
same transaction. A fact that is not there is believed to be retired only if its id is older than
what such an entry says of its table. Nothing else counts, least of all which partitions are left;
and dead letters stay for ever, whatever an entry says.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime

from orbit.audit.walk import Told

RETIRED = "facts.retired"
_RETIRABLE = ("cycle_run", "execution_record", "delivery_receipt")


@dataclass(slots=True)
class Retirement:
    """What was declared: by table before when (milliseconds since 1970), and last at what time."""

    before: dict[str, float] = field(default_factory=dict)
    last_at: str = ""

    def take(self, entries: Iterable[Told]) -> None:
        """Notes entries of the installation's log. Raises KeyError, ValueError or TypeError."""
        for entry in entries:
            table = entry.act["detail"]["table"]
            if table in _RETIRABLE:
                before = datetime.fromisoformat(entry.act["detail"]["before"]).timestamp() * 1000
                self.before[table] = max(before, self.before.get(table, 0.0))
                self.last_at = max(entry.at, self.last_at)

    def covers(self, table: str, fact_id: str) -> bool:
        """Whether a fact of this id (a UUIDv7, whose first 48 bits are its time) was dropped."""
        return int(fact_id.replace("-", "")[:12], 16) < self.before.get(table, 0.0)
