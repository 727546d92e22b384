"""Tier 1: the desk chooses the day's articles and makes one bundle of them.

An article qualifies if it has one of the profile's tags. On a schedule the slot's day decides
where in the row of qualified articles, newest first, the edition begins, so that each day has
another one; without a slot (a trigger by hand) the newest are taken. The payload that comes
in, the initiation, is not needed.
"""

from __future__ import annotations

from datetime import date
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

from newsroom.articles import Article, ArticleInvalid, read_articles
from orbit.payload import Payload

if TYPE_CHECKING:
    from orbit.execution.context import ExecutionContext

HOME = Path(__file__).parent.parent


def select(payload: Payload, context: ExecutionContext) -> Payload:
    """The edition: `{edition: {label, day}, articles: [...]}` as JSON.

    Reads `asset_bundle.articles_folder` (relative to the example's folder),
    `asset_bindings.tags` and `execution_rules.articles_per_edition`. Raises ArticleInvalid.
    """
    instruction = context.instruction
    folder = HOME / instruction["asset_bundle"].get("articles_folder", "articles")
    tags = frozenset(instruction["asset_bindings"]["tags"])
    count = int(instruction["execution_rules"]["articles_per_edition"])
    day = context.slot_at[:10] if context.slot_at else None
    chosen = choose(read_articles(folder), tags, count, day)
    edition = {"label": instruction["label"], "day": day}
    return Payload.of_json({"edition": edition, "articles": [a.as_json() for a in chosen]})


def choose(
    articles: list[Article], tags: frozenset[str], count: int, day: str | None
) -> list[Article]:
    """`count` of the articles with any of the tags (all, if they are fewer), for an ISO day."""
    qualified = [article for article in articles if tags.intersection(article.tags)]
    if not qualified:
        raise ArticleInvalid(f"no article has any of the tags {', '.join(sorted(tags))}")
    count = min(count, len(qualified))
    start = date.fromisoformat(day).toordinal() * count % len(qualified) if day else 0
    return list(islice(cycle(qualified), start, start + count))
