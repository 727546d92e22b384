"""The budget of payload bytes: never exceeded by two, granted in order, never lost."""

from __future__ import annotations

import asyncio
import random

from orbit.execution.memory import PayloadMemory


class Holder:
    """Somebody who reserves and holds until told to let go."""

    def __init__(self, memory: PayloadMemory, size: int, owner: str | None = None) -> None:
        self.has, self.may_go = asyncio.Event(), asyncio.Event()
        self.task = asyncio.create_task(self._hold(memory, size, owner))

    async def _hold(self, memory: PayloadMemory, size: int, owner: str | None) -> None:
        async with memory.reserve(size, owner):
            self.has.set()
            await self.may_go.wait()

    async def let_go(self) -> None:
        """Returns when the reservation is over."""
        self.may_go.set()
        await self.task


async def settle() -> None:
    """Lets everything that can go on go on."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_what_fits_is_granted_at_once_and_what_does_not_waits() -> None:
    """Up to the limit nobody waits; the next one waits until enough is free."""
    memory = PayloadMemory(100)
    first, second, third = Holder(memory, 60), Holder(memory, 40), Holder(memory, 1)
    await settle()
    assert (first.has.is_set(), second.has.is_set(), third.has.is_set()) == (True, True, False)
    await second.let_go()
    await settle()
    assert third.has.is_set()
    await first.let_go()
    await third.let_go()


async def test_one_larger_than_the_limit_is_granted_alone() -> None:
    """Nothing starves: the too large one gets its turn as soon as nobody else holds any."""
    memory = PayloadMemory(100)
    small, huge, later = Holder(memory, 10), Holder(memory, 1000), Holder(memory, 1)
    await settle()
    assert not huge.has.is_set()
    assert not later.has.is_set(), "a later one does not overtake, however small"
    await small.let_go()
    await settle()
    assert huge.has.is_set()
    assert not later.has.is_set()
    await huge.let_go()
    await settle()
    assert later.has.is_set()
    await later.let_go()


async def test_an_owner_leaves_others_as_much_as_he_holds() -> None:
    """Alone he may have all; beside another, half; two beside each other, a third."""
    memory = PayloadMemory(120)
    alone = [Holder(memory, 10, "one") for _ in range(12)]
    await settle()
    assert [holder.has.is_set() for holder in alone] == [True] * 12
    for holder in alone:
        await holder.let_go()
    well = Holder(memory, 10, "well")
    await settle()
    bad = [Holder(memory, 10, owner) for _ in range(12) for owner in ("hung", "slow")]
    await settle()
    assert sum(holder.has.is_set() for holder in bad) <= 8
    await well.let_go()
    another = Holder(memory, 20, "well")
    await settle()
    assert another.has.is_set(), "those who wait because they hold much are passed over"
    await another.let_go()
    for holder in bad:
        holder.may_go.set()
    await asyncio.gather(*[holder.task for holder in bad])
    assert memory._used == 0
    assert not memory._held


async def test_one_that_gives_up_makes_room_for_those_behind() -> None:
    """A cancelled wait takes no budget and blocks nobody."""
    memory = PayloadMemory(100)
    first, patient, third = Holder(memory, 90), Holder(memory, 50), Holder(memory, 10)
    await settle()
    patient.task.cancel()
    await settle()
    assert third.has.is_set(), "who stood behind the one that left gets what is free"
    await first.let_go()
    await third.let_go()
    async with asyncio.timeout(30), memory.reserve(100):
        pass


async def test_a_grant_that_meets_a_cancellation_is_not_lost() -> None:
    """Cancelled in the very moment of the grant: the bytes go back to the budget."""
    memory = PayloadMemory(100)
    first, second = Holder(memory, 100), Holder(memory, 100)
    await settle()
    first.may_go.set()
    await asyncio.wait({first.task})
    second.task.cancel()
    await asyncio.gather(second.task, return_exceptions=True)
    async with asyncio.timeout(30), memory.reserve(100):
        pass


async def test_the_limit_holds_under_any_order_of_work_and_cancellation() -> None:
    """Hundreds at once, some cancelled: never above the limit, and empty at the end."""
    chance = random.Random(7)
    memory, used, most = PayloadMemory(1000), 0, 0

    async def work(size: int) -> None:
        nonlocal used, most
        async with memory.reserve(size):
            used += size
            most = max(most, used)
            for _ in range(chance.randrange(5)):
                await asyncio.sleep(0)
            used -= size

    async def cancellable(size: int) -> None:
        try:
            await work(size)
        except asyncio.CancelledError:
            nonlocal used
            used = held()

    def held() -> int:
        return memory._used

    tasks = [asyncio.create_task(work(chance.randrange(1, 400))) for _ in range(300)]
    waiting = [asyncio.create_task(cancellable(1000)) for _ in range(50)]
    await asyncio.sleep(0)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*tasks, *waiting)
    assert 0 < most <= 1000
    assert held() == 0
