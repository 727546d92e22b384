"""The halt: stops what a namespace sends, on every node, and says whether it has stopped.

Design note. A claim takes its namespaces' fences (advisory locks, shared, for its transaction)
in one statement and reads their flags in a later one. A halt commits the flag under a raised
epoch, and then has the fence to itself for a moment: whatever was claimed before is committed,
and every later claim sees the flag. What is in flight then is listed, and waited for: an attempt
is over with its receipt, when it was given back unsent, or when its lease ran out and it was
settled for its lost worker; that one never sends, since its own clock says that its lease is
over. `quiesced` is said only when the fence was passed, nothing of the namespace is out on any
node, and the halt is still in force.

Claims queue behind who waits for the fence, so it is waited for a little at a time: a claim that
never ends holds up no other namespace. A halt has a connection of its own and is bounded in time;
so many may be written at once and wait at once, so that they leave the server connections. Whatever
goes wrong once it is written, it is answered, and not as quiesced.
It is refused to nobody for want of a reason; a resumption wants one, and a second person where
the namespace's rule says so.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import structlog
from psycopg.errors import LockNotAvailable

from orbit.audit import trail
from orbit.audit.trail import Act
from orbit.database.pool import TRANSIENT, Connection, Database, first_line
from orbit.database.queries import load
from orbit.errors import (
    HaltedAnew,
    NotHalted,
    OperatorRequired,
    RequestInvalid,
    SecondPersonRequired,
)
from orbit.governance.in_flight import Flight, Look, listed, look, with_outcomes
from orbit.governance.rules import needs_two_persons
from orbit.governance.turns import Turns
from orbit.telemetry.catalogue import EventType
from orbit.telemetry.emission import Event, emit

SQL = load("halt")
_LEAST_SECONDS = 2.0  # for the fence, however short the wait
_PATIENCE_SECONDS = 10.0  # beyond what a frozen transaction, or the wait, may take
_WRITING, _WAITING, _OF_ONE = 8, 16, 2  # connections of halts: of a node, and of one namespace
_FIRST_PAUSE, _LAST_PAUSE = 0.005, 0.1
# At a time, for the fence. Claims wait a little longer for any lock (share_fences): those that came
# behind get their turn, and those that wait for something else have given up at the next try.
_FIRST_PATIENCE_SECONDS, _LAST_PATIENCE_SECONDS = 0.05, 0.4
_RECOVER_SECONDS = 0.25

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Order:
    """Who wants what, and why; two persons differ by `actor_id`."""

    namespace: str
    actor: str
    actor_id: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Halted:
    """A halt's answer; `is_fenced`: no claim from before it was under way any more.

    Unless `is_seen`, the database did not answer to the end, and what is out is not known. Unless
    `is_known`, nothing was ever of a namespace of that name: it may be misspelt.
    """

    namespace: str
    epoch: int
    is_quiesced: bool
    is_fenced: bool
    is_in_force: bool
    halted_at: datetime
    until_at: datetime | None
    waited_seconds: float
    in_flight: tuple[Flight, ...]
    is_seen: bool = True
    is_known: bool = True


@dataclass(frozen=True, slots=True)
class _Proof:
    """What was seen of a halt that is written; of none, that it was written."""

    is_fenced: bool = False
    is_in_force: bool = True
    out: frozenset[tuple[str, int]] = frozenset()
    flights: tuple[Flight, ...] = ()
    is_seen: bool = False
    is_known: bool = True


@dataclass(frozen=True, slots=True)
class Resumed:
    """A resumption's answer; while it waits for a second person the namespace stays halted."""

    namespace: str
    epoch: int
    is_halted: bool
    asked_by: str | None


class Brake:
    """Halts and resumes namespaces for one node.

    Args:
        recover: settles a namespace's attempts whose worker is gone.
        on_changed: called when a fence was changed here, so that this node looks at once.
    """

    def __init__(
        self,
        database: Database,
        node_id: str,
        *,
        recover: Callable[[str], Awaitable[object]],
        on_changed: Callable[[], None],
    ) -> None:
        self._database, self._node_id = database, node_id
        self._recover, self._on_changed = recover, on_changed
        self._raise_seconds = database.transaction_seconds + _PATIENCE_SECONDS
        self._writing = Turns(in_all=_WRITING, of_one=_OF_ONE)
        self._waiting = Turns(in_all=_WAITING, of_one=_OF_ONE)

    async def halt(
        self, order: Order, *, until: datetime | None = None, wait_seconds: float = 10.0
    ) -> Halted:
        """Halts a namespace, and waits so long for what is in flight to end.

        A namespace that is halted is halted anew, under the next epoch, and not for a shorter
        time. Who waits already may be too many: then this one looks once, and does not wait. Raises
        RequestInvalid (`until` has passed), and one of pool.TRANSIENT if the database does not take
        it in the time that a transaction may last, and a little more.
        """
        started = time.monotonic()
        async with AsyncExitStack() as held:
            async with self._writing.turn(order.namespace, self._raise_seconds):
                row, connection = await self._persist_halt(
                    held, order, until, started + self._raise_seconds
                )
                self._on_changed()
                may_wait = await held.enter_async_context(
                    self._waiting.turn_at_once(order.namespace)
                )
                proof = None
                if not may_wait:
                    proof = await self._try_to_prove(connection, order, row["epoch"], started)
            if proof is None:
                proof = await self._try_to_prove(
                    connection, order, row["epoch"], started + wait_seconds
                )
        answer = _answer(order.namespace, row, proof, time.monotonic() - started)
        _tell(answer)
        return answer

    async def resume(
        self, order: Order, *, epoch: int | None = None, is_second: bool = False
    ) -> Resumed:
        """Lets a namespace go on, or, where two persons are needed, notes that the first agrees.

        `epoch`: only if it is this halt that is in force, and nobody has halted anew. `is_second`:
        who asks may only agree to what another has asked for. Raises RequestInvalid (no reason),
        NotHalted, HaltedAnew, OperatorRequired (nobody has asked), and SecondPersonRequired if the
        same person asks twice.
        """
        check_reason(order.reason)
        async with (
            self._writing.turn(order.namespace, self._raise_seconds),
            self._database.apart() as connection,
            connection.transaction(),
        ):
            answer = await self._resume(connection, order, epoch, is_second=is_second)
        self._on_changed()
        log.info(
            "resume_asked" if answer.is_halted else "namespace_resumed",
            namespace=order.namespace,
            epoch=answer.epoch,
            actor=order.actor,
        )
        return answer

    async def resume_by_time(self, namespace: str) -> bool:
        """Lets a namespace go on whose halt was until now; whether it was this call that did.

        Raises LockNotAvailable where another does not let go of it.
        """
        async with self._database.transaction() as connection:
            await connection.execute(SQL.bound_brief)
            fence = await self._fence(connection, namespace)
            if fence is None or not fence["is_over"]:
                return False
            cursor = await connection.execute(
                SQL.last_halt, {"namespace": namespace, "epoch": fence["epoch"]}
            )
            row = await cursor.fetchone()
            assert row is not None
            reason = f"halted until {fence['until_at'].isoformat()}"
            order = Order(namespace, row["actor"], row["actor_id"], reason)
            await self._lower(connection, order, fence["epoch"], "until")
        log.info("namespace_resumed", namespace=namespace, epoch=fence["epoch"], cause="until")
        return True

    # ---- halting

    async def _persist_halt(
        self, held: AsyncExitStack, order: Order, until: datetime | None, deadline: float
    ) -> tuple[dict[str, Any], Connection]:
        """The fence's row, and the connection, which `held` ends.

        Written again where it is not known whether it was: another epoch does no harm.
        """
        while True:
            async with AsyncExitStack() as opened:
                connection = await opened.enter_async_context(_Apart(self._database, deadline))
                try:
                    row = await self._raise(connection, order, until, deadline)
                except TRANSIENT as error:
                    if time.monotonic() > deadline:
                        raise
                    log.warning("halt_not_written", error=first_line(error))
                else:
                    held.push_async_exit(opened.pop_all())
                    return row, connection
            await asyncio.sleep(_LAST_PAUSE)

    async def _try_to_prove(
        self, connection: Connection, order: Order, epoch: int, deadline: float
    ) -> _Proof:
        """What could be seen of it, in bounded time, also of a database that is lost."""
        fence_deadline = max(time.monotonic() + _LEAST_SECONDS, deadline)
        try:
            async with asyncio.timeout(fence_deadline - time.monotonic() + _PATIENCE_SECONDS):
                return await self._prove(
                    connection, order.namespace, epoch, fence_deadline, deadline
                )
        except (TimeoutError, *TRANSIENT) as error:
            log.warning("halt_not_proved", namespace=order.namespace, error=first_line(error))
            return _Proof()

    async def _prove(
        self,
        connection: Connection,
        namespace: str,
        epoch: int,
        fence_deadline: float,
        deadline: float,
    ) -> _Proof:
        await connection.execute(SQL.bound_session)
        is_fenced = await self._pass(connection, namespace, fence_deadline)
        flights = await listed(connection, namespace)
        last = await self._await_quiet(connection, namespace, epoch, deadline)
        known = {flight.key for flight in flights}
        if last.out - known:  # claimed by what the fence could not wait for
            again = await listed(connection, namespace)
            flights += [one for one in again if one.key not in known]
        ends = await with_outcomes(connection, namespace, flights, last.out)
        return _Proof(
            is_fenced,
            last.is_in_force,
            last.out,
            tuple(ends),
            is_seen=True,
            is_known=bool(flights) or await _is_known(connection, namespace),
        )

    async def _raise(
        self, connection: Connection, order: Order, until: datetime | None, deadline: float
    ) -> dict[str, Any]:
        """Commits flag, epoch, fact and audit entry; the fence's row."""
        while True:
            try:
                async with connection.transaction():
                    await connection.execute(SQL.bound_locks)
                    return await self._write_halt(connection, order, until)
            except LockNotAvailable:
                if time.monotonic() > deadline:
                    raise

    async def _write_halt(
        self, connection: Connection, order: Order, until: datetime | None
    ) -> dict[str, Any]:
        asked = {
            "namespace": order.namespace,
            "until": until,
            "reason": order.reason,
            "actor": order.actor,
            "actor_id": order.actor_id,
            "node_id": self._node_id,
        }
        row = await (await connection.execute(SQL.raise_fence, asked)).fetchone()
        assert row is not None
        if until is not None and until <= row["now"]:
            raise RequestInvalid(f"until: {until.isoformat()} has passed")
        await connection.execute(SQL.insert_halt, asked | {"epoch": row["epoch"]})
        detail = {"epoch": row["epoch"], "until": until.isoformat() if until else None}
        subject = _subject(row["epoch"])
        halted = Event(order.namespace, EventType.NAMESPACE_HALTED, {"epoch": row["epoch"]})
        await emit(connection, halted)
        act = Act(order.namespace, "halt", order.actor, order.reason, subject, detail)
        await trail.append(connection, act)
        return row

    async def _pass(self, connection: Connection, namespace: str, deadline: float) -> bool:
        """Whether the fence was had alone, so that all claims from before are over."""
        patience = _FIRST_PATIENCE_SECONDS
        while True:
            try:
                async with connection.transaction():
                    wait = {"milliseconds": int(patience * 1000)}
                    await connection.execute(SQL.bound_pass, wait)
                    await connection.execute(SQL.pass_fence, {"namespace": namespace})
            except LockNotAvailable:
                if time.monotonic() > deadline:
                    return False
            else:
                return True
            await asyncio.sleep(_LAST_PAUSE)
            patience = min(patience * 2, _LAST_PATIENCE_SECONDS)

    async def _await_quiet(
        self, connection: Connection, namespace: str, epoch: int, deadline: float
    ) -> Look:
        """The last look: nothing is out, or the time is over, or the halt is."""
        pause, recovering = _FIRST_PAUSE, asyncio.create_task(_nothing())
        recover_at = 0.0
        try:
            while True:
                seen = await look(connection, namespace, epoch)
                now = time.monotonic()
                if not seen.out or not seen.is_in_force or now >= deadline:
                    return seen
                if seen.has_expired and recovering.done() and now >= recover_at:
                    recover_at = now + _RECOVER_SECONDS
                    recovering = asyncio.create_task(self._recover_lost(namespace))
                await asyncio.sleep(min(pause, deadline - now))
                pause = min(pause * 2, _LAST_PAUSE)
        finally:
            recovering.cancel()

    async def _recover_lost(self, namespace: str) -> None:
        try:
            await self._recover(namespace)
        except TRANSIENT as error:
            log.warning("recovery_failed", error=first_line(error))

    # ---- resuming

    async def _resume(
        self, connection: Connection, order: Order, wanted: int | None, *, is_second: bool
    ) -> Resumed:
        await connection.execute(SQL.bound_locks)
        fence = await self._fence(connection, order.namespace)
        if fence is None:
            raise NotHalted(f"namespace {order.namespace} is not halted")
        epoch = fence["epoch"]
        if wanted not in (None, epoch):
            text = f"namespace {order.namespace} was halted anew: this is epoch {epoch}"
            raise HaltedAnew(text, epoch=epoch)
        is_guarded = await needs_two_persons(connection, order.namespace)
        asked = await self._asked(connection, order.namespace, epoch) if is_guarded else None
        if is_second and asked is None:
            raise OperatorRequired(
                f"an operator resumes namespace {order.namespace}, or asks for it first"
                if is_guarded
                else f"namespace {order.namespace} is resumed by one person: an operator"
            )
        if not is_guarded:
            await self._lower(connection, order, epoch, "person")
            return Resumed(order.namespace, epoch, False, None)
        if asked is None:
            await self._write_resume(connection, order, epoch, "asked", "person")
            await trail.append(connection, _act(order, "resume.asked", epoch))
            return Resumed(order.namespace, epoch, True, order.actor)
        if asked["actor_id"] == order.actor_id:
            raise SecondPersonRequired(
                f"{asked['actor']} has asked for it already: a second person has to agree",
                askedBy=asked["actor"],
            )
        await self._lower(connection, order, epoch, "person", second_to=asked["actor"])
        return Resumed(order.namespace, epoch, False, asked["actor"])

    async def _fence(self, connection: Connection, namespace: str) -> dict[str, Any] | None:
        """The fence, locked; None if the namespace is not halted."""
        cursor = await connection.execute(SQL.hold_fence, {"namespace": namespace})
        row = await cursor.fetchone()
        return row if row is not None and row["is_halted"] else None

    async def _asked(
        self, connection: Connection, namespace: str, epoch: int
    ) -> dict[str, Any] | None:
        asked = {"namespace": namespace, "epoch": epoch}
        return await (await connection.execute(SQL.asked_resume, asked)).fetchone()

    async def _lower(
        self,
        connection: Connection,
        order: Order,
        epoch: int,
        cause: str,
        second_to: str | None = None,
    ) -> None:
        await connection.execute(SQL.lower_fence, {"namespace": order.namespace})
        await self._write_resume(connection, order, epoch, "resumed", cause)
        told = {"epoch": epoch, "cause": cause}
        await emit(connection, Event(order.namespace, EventType.NAMESPACE_RESUMED, told))
        action = "resume" if cause == "person" else "resume.until"
        await trail.append(connection, _act(order, action, epoch, second_to))

    async def _write_resume(
        self, connection: Connection, order: Order, epoch: int, step: str, cause: str
    ) -> None:
        row = {
            "namespace": order.namespace,
            "epoch": epoch,
            "step": step,
            "cause": cause,
            "reason": order.reason,
            "actor": order.actor,
            "actor_id": order.actor_id,
            "node_id": self._node_id,
        }
        await connection.execute(SQL.insert_resume, row)


def check_reason(reason: str | None) -> None:
    """Raises RequestInvalid for what says nothing."""
    if reason is None or not reason.strip() or len(reason) > 1000 or "\x00" in reason:
        raise RequestInvalid("reason: expected 1 to 1000 characters that say why")


async def _is_known(connection: Connection, namespace: str) -> bool:
    """Whether anything is of a namespace of that name."""
    asked = {"namespace": namespace}
    row = await (await connection.execute(SQL.is_known, asked)).fetchone()
    return row is not None and bool(row["is_known"])


class _Apart:
    """A connection of the halt's own, asked for until the deadline: the server may be full."""

    def __init__(self, database: Database, deadline: float) -> None:
        self._database, self._deadline = database, deadline

    async def __aenter__(self) -> Connection:
        pause = _FIRST_PAUSE
        while True:
            self._given = self._database.apart()
            try:
                return await self._given.__aenter__()
            except TRANSIENT:
                if time.monotonic() > self._deadline:
                    raise
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LAST_PAUSE)

    async def __aexit__(self, *error: Any) -> None:
        await self._given.__aexit__(*error)


def _answer(namespace: str, row: dict[str, Any], proof: _Proof, seconds: float) -> Halted:
    is_quiesced = proof.is_seen and proof.is_fenced and proof.is_in_force and not proof.out
    return Halted(
        namespace=namespace,
        epoch=row["epoch"],
        is_quiesced=is_quiesced,
        is_fenced=proof.is_fenced,
        is_in_force=proof.is_in_force,
        halted_at=row["now"],
        until_at=row["until_at"],
        waited_seconds=seconds,
        in_flight=proof.flights,
        is_seen=proof.is_seen,
        is_known=proof.is_known,
    )


def _act(order: Order, action: str, epoch: int, second_to: str | None = None) -> Act:
    detail: dict[str, Any] = {"epoch": epoch}
    if second_to is not None:
        detail["secondTo"] = second_to
    return Act(order.namespace, action, order.actor, order.reason, _subject(epoch), detail)


def _subject(epoch: int) -> str:
    return f"epoch {epoch}"


async def _nothing() -> None:
    """What is done before there is something to recover."""


def _tell(answer: Halted) -> None:
    log.info(
        "namespace_halted",
        namespace=answer.namespace,
        epoch=answer.epoch,
        quiesced=answer.is_quiesced,
        in_flight=len(answer.in_flight),
        still_out=sum(one.outcome is None for one in answer.in_flight),
        seconds=round(answer.waited_seconds, 3),
    )
