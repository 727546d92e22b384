"""Normalisation: one item per post, each checked and written in one form.

`split` takes the tiers' last payload apart; `normalize` gets the parts in batches and returns
what is dispatched. Keys are sorted, so that equal posts are equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from orbit.payload import Payload

if TYPE_CHECKING:
    from orbit.execution.context import ExecutionContext

REQUIRED = ("platform", "article", "text")


class PostInvalid(ValueError):
    """A post lacks something that every receiver relies on."""


def split(payload: Payload, context: ExecutionContext) -> Iterator[Payload]:
    """The posts of `{posts: [...]}`, one payload each."""
    for post in payload.json()["posts"]:
        yield Payload.of_json(post)


def normalize(batch: Sequence[Payload], context: ExecutionContext) -> Sequence[Payload]:
    """The posts with the voice they speak in, sorted keys, no surplus space.

    Raises PostInvalid.
    """
    return [_item(payload, context.instruction["label"]) for payload in batch]


def _item(payload: Payload, label: str) -> Payload:
    post = payload.json()
    missing = [key for key in REQUIRED if not post.get(key)]
    if missing:
        raise PostInvalid(f"post of {post.get('article', '?')} lacks {', '.join(missing)}")
    text = json.dumps(post | {"from": label}, ensure_ascii=False, sort_keys=True)
    return Payload(text.encode(), "application/json")
