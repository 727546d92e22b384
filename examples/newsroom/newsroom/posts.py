"""Tier 3: posts for each platform, in the profile's voice and within the platform's limits.

Which platforms is the run profile's affair (`asset_bundle.platforms`), how long a post may be
the profile's (`distribution_map`), how it sounds too (`style_vector`). Lengths are counted in
Unicode characters. A limit that is too small for anything is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from newsroom.text import clip
from orbit.payload import Payload

if TYPE_CHECKING:
    from orbit.execution.context import ExecutionContext

_SITE = "https://news.example"

Json = Mapping[str, Any]


def compose(payload: Payload, context: ExecutionContext) -> Payload:
    """Every article as a post for every platform: `{posts: [...]}`."""
    instruction, bundle = context.instruction, payload.json()
    style = instruction["style_vector"]
    posts = [
        _post(platform, article, style, instruction["distribution_map"])
        for platform in instruction["asset_bundle"]["platforms"]
        for article in bundle["articles"]
    ]
    return Payload.of_json({"edition": bundle["edition"], "posts": posts})


def short(article: Json, style: Json, limits: Json) -> dict[str, Any]:
    """A message of a few hundred characters: as much as fits, then hashtags and address."""
    tags = " ".join(f"#{tag}" for tag in article["tags"][: int(style["hashtags"])])
    tail = f"{tags} {_address(article)}".strip()
    room = int(limits["max_characters"]) - len(tail) - 1
    if room < 20:
        raise ValueError(f"distribution_map: {limits['max_characters']} is too short for a post")
    lead = f"{article['title']}: " if style["leads_with_title"] else ""
    text = lead + (article["brief"][0] if article["brief"] else article["title"])
    return {"text": f"{clip(_extended(text, article['brief'][1:], room), room)} {tail}"}


def newsletter(article: Json, style: Json, limits: Json) -> dict[str, Any]:
    """A paragraph for the letter: greeting, whole sentences as far as they fit, reading time."""
    tail = f"({article['reading_minutes']} min, {_address(article)})"
    room = int(limits["max_characters"]) - len(tail) - 1
    if room < 20:
        raise ValueError(f"distribution_map: {limits['max_characters']} is too short for a letter")
    text = _extended(style["greeting"], article["brief"], room)
    return {"headline": article["title"], "text": f"{clip(text, room)} {tail}"}


def card(article: Json, style: Json, limits: Json) -> dict[str, Any]:
    """A headline card: kicker, headline, standfirst, keywords."""
    standfirst = article["brief"][0] if article["brief"] else ""
    return {
        "kicker": style["kicker"],
        "headline": clip(article["title"], int(limits["headline_characters"])),
        "text": clip(standfirst, int(limits["standfirst_characters"])),
        "keywords": article["keywords"],
    }


_PLATFORMS: Mapping[str, Callable[[Json, Json, Json], dict[str, Any]]] = {
    "short": short,
    "newsletter": newsletter,
    "card": card,
}


def _post(platform: str, article: Json, style: Json, distribution: Json) -> dict[str, Any]:
    if platform not in _PLATFORMS or platform not in distribution:
        known = ", ".join(sorted(set(_PLATFORMS) & set(distribution)))
        raise ValueError(f"platform {platform!r} is unknown; the profile's are {known}")
    post = {"platform": platform, "article": article["slug"], "desk": article["desk"]}
    return post | _PLATFORMS[platform](article, style, distribution[platform])


def _extended(text: str, sentences: list[str], room: int) -> str:
    """The text and as many of the sentences, whole and in order, as there is room for."""
    for sentence in sentences:
        if len(text) + 1 + len(sentence) > room:
            break
        text += f" {sentence}"
    return text


def _address(article: Json) -> str:
    return f"{_SITE}/{article['slug']}"
