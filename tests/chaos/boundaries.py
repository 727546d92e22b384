"""Makes a node kill itself at one exact point of its work: before a commit, or right after it.

Wraps what writes in a node's own process, from outside; the program has no hook for this.
"Before" means that all statements have run and COMMIT has not; where there is no transaction
it means just before the call.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

from orbit.database.pool import Connection, Database
from orbit.execution.context import Stage
from orbit.execution.dispatch import DispatchQueue
from orbit.execution.initiation import Intake
from orbit.execution.recorder import Recorder
from orbit.execution.wire import Wire
from orbit.services import runner

MOMENTS = ("before", "after")
_STAGES = (
    Stage.CYCLE_STARTED,
    Stage.TIER1_COMPLETE,
    Stage.TIER2_COMPLETE,
    Stage.TIER3_COMPLETE,
    Stage.DISPATCH_ENQUEUED,
)
POINTS = ("accept", "claim_cycle", *map(str, _STAGES), "claim_job", "send", "receipt")

_is_fatal: ContextVar[bool] = ContextVar("is_fatal", default=False)
Method = Callable[..., Awaitable[Any]]


def install(point: str, moment: str) -> None:
    """The process kills itself the first time that it comes to `point`.

    With the moment "frozen" it stops before the commit, until somebody sends SIGCONT.
    """
    _strike_before_commit(freeze if moment == "frozen" else die)
    match point:
        case "accept":
            _wrap(Intake, "_flush", moment)
        case "receipt":
            _wrap(DispatchQueue, "_flush", moment)
        case "claim_cycle":
            _wrap(runner, "claim", moment)
        case "claim_job":
            _wrap(DispatchQueue, "claim", moment, is_transaction=False)
        case "send":
            _wrap(Wire, "send", moment, is_transaction=False)
        case _:
            _wrap(Recorder, "_flush", moment, lambda _self, results: _has(results, Stage(point)))


def die() -> NoReturn:
    """Kill -9 of this very process."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("nobody outlives SIGKILL")


def freeze() -> None:
    """Stops this very process, as a machine that is suspended would be."""
    os.kill(os.getpid(), signal.SIGSTOP)


def _has(results: Any, stage: Stage) -> bool:
    return any(checkpoint.stage is stage for one in results for checkpoint in one.checkpoints)


def _wrap(
    owner: Any,
    name: str,
    moment: str,
    is_meant: Callable[..., bool] = lambda *_: True,
    *,
    is_transaction: bool = True,
) -> None:
    original: Method = getattr(owner, name)

    async def wrapped(*arguments: Any, **named: Any) -> Any:
        if not is_meant(*arguments):
            return await original(*arguments, **named)
        if moment == "before" and not is_transaction:
            die()
        token = _is_fatal.set(moment != "after")
        try:
            result = await original(*arguments, **named)
        finally:
            _is_fatal.reset(token)
        if moment == "after" and result != []:  # a claim that found nothing is no boundary
            die()
        return result

    setattr(owner, name, wrapped)


def _strike_before_commit(strike: Callable[[], None]) -> None:
    is_struck = False

    def striking(original: Callable[[Database], Any]) -> Callable[[Database], Any]:
        @asynccontextmanager
        async def transaction(self: Database) -> AsyncIterator[Connection]:
            async with original(self) as connection:
                nonlocal is_struck
                yield connection
                if _is_fatal.get() and not is_struck and await _has_written(connection):
                    is_struck = True
                    strike()

        return transaction

    for name in ("transaction", "batch"):
        setattr(Database, name, striking(getattr(Database, name)))


async def _has_written(connection: Connection) -> bool:
    cursor = await connection.execute(
        "SELECT pg_current_xact_id_if_assigned() IS NOT NULL AS has_written"
    )
    row = await cursor.fetchone()
    return bool(row and row["has_written"])
