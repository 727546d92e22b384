"""A lease that changes hands: whoever takes it knows all that its last owner committed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from psycopg import AsyncConnection

from orbit.clock import DatabaseClock
from orbit.database.pool import Database
from orbit.execution.context import Stage
from orbit.execution.recorder import Checkpoint, StageResult
from orbit.payload import Payload
from tests.database.engine import Worker, expire

_STALL = 7_340_033
_STALLING = f"""
CREATE OR REPLACE FUNCTION orbit_now() RETURNS timestamptz LANGUAGE plpgsql STABLE AS $$
BEGIN
    IF current_query() LIKE '%claimed AS (%' THEN
        PERFORM pg_advisory_lock_shared({_STALL}), pg_advisory_unlock_shared({_STALL});
    END IF;
    RETURN statement_timestamp();
END $$
"""


@asynccontextmanager
async def _one_session(dsn: str) -> AsyncIterator[Database]:
    pool = Database(dsn, minimum=1, maximum=1)
    await pool.open()
    try:
        yield pool
    finally:
        await pool.close()


async def _is_stalled(owner: AsyncConnection) -> bool:
    cursor = await owner.execute(
        "SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = %s AND NOT granted", (_STALL,)
    )
    return await cursor.fetchone() is not None


async def test_a_claim_sees_what_was_committed_while_it_ran(
    dsn: str, owner_dsn: str, database: Database, clock: DatabaseClock
) -> None:
    """The claim's statement begins, the late owner commits its stage, the claim takes the lease."""
    late = Worker.new(database, clock)
    cycle = await late.begin()
    async with (
        await AsyncConnection.connect(owner_dsn, autocommit=True) as owner,
        _one_session(dsn) as session,
    ):
        await owner.execute(_STALLING.encode(), prepare=False)
        other = Worker.new(session, clock)
        assert await other.claim() == []  # its plan is made now: planning looks at the clock too
        await expire(database, "cycle_lease")
        await owner.execute("SELECT pg_advisory_lock(%s)", (_STALL,))
        claiming = asyncio.create_task(other.claim())
        async with asyncio.timeout(20):
            while not await _is_stalled(owner):  # noqa: ASYNC110 - the database tells nobody
                await asyncio.sleep(0.01)
            done = Checkpoint(Stage.TIER1_COMPLETE, Payload(b"draft", "text/plain"))
            await late.recorder.record(StageResult(cycle, [done]))
            await owner.execute("SELECT pg_advisory_unlock(%s)", (_STALL,))
            (taken,) = await claiming
    assert taken.lease_number == cycle.lease_number + 1
    assert (taken.stage, taken.content) == (Stage.TIER1_COMPLETE, b"draft")
