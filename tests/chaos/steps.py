"""Steps that the killed nodes run. Each call is noted in a file that outlives its node.

What they make is determined by the payload alone, so a test can say what every item must be.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator, Sequence

from orbit.execution.context import ExecutionContext
from orbit.payload import Payload

CALLS = "CHAOS_CALLS"
LAST_WORD = b"END"


async def begin(context: ExecutionContext) -> Payload:
    """An initiator: the cycle's first payload."""
    _note(context, b"")
    return Payload(begun(context.cycle_id))


async def grow(payload: Payload, context: ExecutionContext) -> Payload:
    """A transformation: adds its place to the payload, after `pause_seconds`.

    On a node that was started with CHAOS_HASTE at once.
    """
    _note(context, payload.content)
    if "CHAOS_HASTE" not in os.environ:
        await asyncio.sleep(context.options.get("pause_seconds", 0))
    return Payload(grown(payload.content, context.stage, context.step))


async def swell(payload: Payload, context: ExecutionContext) -> Payload:
    """A transformation: `size` bytes, and a last word that tells whether all have come."""
    _note(context, payload.content)
    return Payload(b"x" * context.options["size"] + LAST_WORD)


def split(payload: Payload, context: ExecutionContext) -> Iterator[Payload]:
    """A splitter: `items` pieces."""
    _note(context, payload.content)
    return (Payload(piece(payload.content, number)) for number in range(context.options["items"]))


async def normalize(batch: Sequence[Payload], context: ExecutionContext) -> list[Payload]:
    """A normaliser: each piece in brackets."""
    _note(context, b"".join(payload.content for payload in batch))
    return [Payload(normalized(payload.content)) for payload in batch]


def begun(cycle_id: str) -> bytes:
    """What `begin` makes."""
    return f"begun {cycle_id}".encode()


def grown(content: bytes, stage: str, step: int) -> bytes:
    """What `grow` makes of `content`."""
    return content + f"|{stage}:{step}".encode()


def piece(content: bytes, number: int) -> bytes:
    """What `split` makes of `content`, one of its pieces."""
    return content + f"#{number}".encode()


def normalized(content: bytes) -> bytes:
    """What `normalize` makes of a piece."""
    return b"[" + content + b"]"


def _note(context: ExecutionContext, content: bytes) -> None:
    call = {
        "cycle": context.cycle_id,
        "stage": context.stage,
        "step": context.step,
        "key": context.idempotency_key,
        "input": Payload(content).digest,
    }
    descriptor = os.open(os.environ[CALLS], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, json.dumps(call).encode() + b"\n")
    finally:
        os.close(descriptor)
