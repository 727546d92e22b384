"""The rules of a namespace, kept as facts: the newest version of a setting is in force.

Two persons are needed where the namespace's own setting or that of all, "*", says so: an admin of
one namespace does not loosen what the installation asks for. A rule that guards the end of a halt
is not loosened while it guards one: that would be the way around it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from orbit.audit import trail
from orbit.audit.trail import Act
from orbit.database.pool import Connection, Database
from orbit.database.queries import load
from orbit.errors import NamespaceHalted
from orbit.vocabulary import is_drill

if TYPE_CHECKING:
    from orbit.governance.halt import Order

SQL = load("halt")
ALL = "*"
TWO_PERSON_RESUME = "two_person_resume"


async def needs_two_persons(connection: Connection, namespace: str) -> bool:
    """Whether a halt of the namespace ends only when two persons agree; a drill's never."""
    if is_drill(namespace):
        return False
    asked = {"namespace": namespace, "setting": TWO_PERSON_RESUME}
    rows = await (await connection.execute(SQL.settings, asked)).fetchall()
    return any(row["value"] is True for row in rows)


async def set_two_persons(
    database: Database, node_id: str, order: Order, *, is_wanted: bool
) -> bool:
    """Makes the rule of a namespace, or of all ("*"); whether two persons are needed now.

    Raises NamespaceHalted if it would loosen a halt in force.
    """
    async with database.apart() as connection, connection.transaction():
        return await _write(connection, node_id, order, is_wanted=is_wanted)


async def _write(connection: Connection, node_id: str, order: Order, *, is_wanted: bool) -> bool:
    await connection.execute(SQL.bound_locks)
    await connection.execute(SQL.hold_settings)
    if not is_wanted:
        cursor = await connection.execute(SQL.hold_halted, {"namespace": order.namespace})
        if (row := await cursor.fetchone()) is not None:
            raise NamespaceHalted(
                f"namespace {row['namespace']} is halted: how it may resume is not loosened now",
                namespace=row["namespace"],
            )
    row = {
        "namespace": order.namespace,
        "setting": TWO_PERSON_RESUME,
        "value": json.dumps(is_wanted),
        "reason": order.reason,
        "actor": order.actor,
        "actor_id": order.actor_id,
        "node_id": node_id,
    }
    made = await (await connection.execute(SQL.insert_setting, row)).fetchone()
    assert made is not None
    subject = f"{TWO_PERSON_RESUME}/{made['version']}"
    is_needed = await needs_two_persons(connection, order.namespace)
    detail = {"value": is_wanted}
    act = Act(order.namespace, "setting", order.actor, order.reason, subject, detail)
    await trail.append(connection, act)
    return is_needed
