"""The steps of the benchmark's own cycles: a source of many items."""

from __future__ import annotations

from collections.abc import Iterator

from orbit.execution.context import ExecutionContext
from orbit.payload import Payload

ITEMS = 100


def hundred(_payload: Payload, context: ExecutionContext) -> Iterator[Payload]:
    """A hundred items of 1 KiB, different in each cycle."""
    for number in range(ITEMS):
        yield Payload(f"{context.cycle_id} {number} ".ljust(1024, "x").encode(), "text/plain")
