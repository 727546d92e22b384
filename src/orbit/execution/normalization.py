"""Normalisation: the boundary where an external processor turns a payload into items.

A splitter may cut the last tier's payload into pieces; the normaliser then gets them in batches
and gives items back, in order. Without either, the payload is the one item. An item is known by
its place in its cycle, so a cycle has each at most once, however often this runs.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

from orbit.errors import StepFailed
from orbit.execution.context import ExecutionContext, Normalization, Step
from orbit.execution.recorder import StepRecord
from orbit.execution.transformation import ContractBroken, Transformer, in_thread, invoke
from orbit.payload import DEFAULT_CONTENT_TYPE, Payload


class Normalizer:
    """Runs a normalisation with the retries of its steps.

    Args:
        max_items: more make the cycle fail before anything of it is stored.
        max_bytes: likewise, of all items of a cycle together.
    """

    def __init__(self, transformer: Transformer, max_items: int, max_bytes: int) -> None:
        self._transformer = transformer
        self._max_items, self._max_bytes = max_items, max_bytes

    async def normalize(
        self,
        normalization: Normalization,
        payload: Payload,
        context: ExecutionContext,
        records: list[StepRecord],
    ) -> list[Payload]:
        """The items of a payload. Raises StepFailed, with the reason."""
        pieces = [payload]
        if normalization.split is not None:
            pieces = await self._split(normalization.split, payload, context, records)
        if normalization.normalize is None:
            return self._bounded(pieces, context)
        items: list[Payload] = []
        for number, batch in enumerate(_batches(pieces, normalization.batch_size), start=1):
            key = f"{context.idempotency_key}:{number}"
            where = replace(context, step=number, idempotency_key=key)
            items += await self._process(normalization.normalize, batch, where, records)
            self._bounded(items, context)
        return items

    async def _split(
        self, step: Step, payload: Payload, context: ExecutionContext, records: list[StepRecord]
    ) -> list[Payload]:
        async def call(context: ExecutionContext) -> list[Payload]:
            pieces = await invoke(step.use, payload, context)
            if not isinstance(pieces, Iterable) or isinstance(pieces, (str, bytes)):
                raise ContractBroken(f"returned {type(pieces).__name__}, expected Payloads")
            # A generator runs the user's code as it is read, so it is read where that may hang.
            found = await in_thread(lambda: list(itertools.islice(pieces, self._max_items + 1)))
            return self._transformer.checked(found, "Payloads")

        pieces: list[Payload] = await self._transformer.attempts(
            step, context, payload.size, call, records
        )
        return self._bounded(pieces, context)

    async def _process(
        self,
        step: Step,
        batch: Sequence[Payload],
        context: ExecutionContext,
        records: list[StepRecord],
    ) -> list[Payload]:
        async def call(context: ExecutionContext) -> list[Payload]:
            if step.use == "http":
                return self._transformer.checked(await self._post(step, batch, context), "items")
            items = await invoke(step.use, batch, context)
            if not isinstance(items, (list, tuple)):
                raise ContractBroken(
                    f"returned {type(items).__name__}, expected a list of Payloads"
                )
            return self._transformer.checked(items, "a list of Payloads")

        size = sum(payload.size for payload in batch)
        result: list[Payload] = await self._transformer.attempts(step, context, size, call, records)
        return result

    def _bounded(self, items: list[Payload], context: ExecutionContext) -> list[Payload]:
        excess = None
        if len(items) > self._max_items:
            excess = f"{self._max_items:,} items (ORBIT_MAX_ITEMS_PER_CYCLE)"
        elif sum(item.size for item in items) > self._max_bytes:
            excess = f"{self._max_bytes:,} bytes of items (ORBIT_PAYLOAD_MEMORY_BYTES)"
        if excess is not None:
            raise StepFailed(
                f"made more than {excess}",
                stage=context.stage,
                step=context.step,
                use="normalization",
                attempts=1,
            )
        return items

    async def _post(
        self, step: Step, batch: Sequence[Payload], context: ExecutionContext
    ) -> list[Payload]:
        """An external processor; both ways a list of `{contentBase64, contentType}`."""
        body = {"payloads": [_encoded(payload) for payload in batch]}
        answer = await self._transformer.post_json(step, body, context)
        try:
            return [
                Payload(
                    base64.b64decode(item["contentBase64"], validate=True),
                    item.get("contentType", DEFAULT_CONTENT_TYPE),
                )
                for item in answer["items"]
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ContractBroken(
                'answered other than {"items": [{"contentBase64": …, "contentType": …}]}'
            ) from error


def _encoded(payload: Payload) -> dict[str, str]:
    return {
        "contentBase64": base64.b64encode(payload.content).decode(),
        "contentType": payload.content_type,
    }


def _batches(pieces: Sequence[Payload], size: int) -> Iterable[Sequence[Payload]]:
    return (pieces[start : start + size] for start in range(0, len(pieces), size))
