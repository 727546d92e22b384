"""English text, taken apart and shortened: sentences, words, keywords, slugs.

Everything is a pure function, and ties are broken by order of appearance, so that the result
is the same in every process.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')]?\s+(?=[\"'(]?[A-Z0-9])")
_WORD = re.compile(r"[A-Za-zÀ-ÿ]+(?:'[a-z]+)?")
_STOP_WORD_TEXT = """
a about above after again all almost also although always am an and another any are as at away back
be because become been before being below between both but by came can cannot come could did do
does done down each either else enough even ever every far few first for from further gave get give
given go goes gone had half has have he her here him his how however i if in instead into is it its
itself just know known large last later less like little long made make makes many may me might
more most much must my near never new next no nobody none nor not nothing now of off often old on
once one only or other others our out over own part perhaps put quite rather same say says she
should since small so some something soon still such take than that the their them then there these
they thing things this those though three through thus to together too took turn two under until up
upon us use used very was way we well went were what when where whether which while who whole whom
whose why will with within without would yet you your
"""
_STOP_WORDS = frozenset(_STOP_WORD_TEXT.split())


def paragraphs(text: str) -> list[str]:
    """Blocks between empty lines, each on one line; headings are left out."""
    blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
    return [block for block in blocks if block and not block.startswith("#")]


def sentences(paragraph: str) -> list[str]:
    """A paragraph's sentences, in order."""
    return [part.strip() for part in _SENTENCE_END.split(paragraph) if part.strip()]


def words(text: str) -> list[str]:
    """All words, in lower case."""
    return [word.lower() for word in _WORD.findall(text)]


def content_words(text: str) -> list[str]:
    """Words that carry meaning: no stop words, none of one or two letters."""
    return [word for word in words(text) if len(word) > 2 and word not in _STOP_WORDS]


def keywords(text: str, count: int) -> list[str]:
    """The most frequent content words, a plural in -s counted with its singular."""
    frequency = Counter(content_words(text))
    for word in list(frequency):
        if frequency.get(word + "s"):
            frequency[word] += frequency.pop(word + "s")
    return [word for word, _ in frequency.most_common(count)]


def slug(title: str) -> str:
    """The title as a part of an address: `a-z 0-9 -`, 60 characters at most."""
    plain = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode().lower()
    slug = ""
    for word in re.findall(r"[a-z0-9]+", plain.replace("'", "")):
        if len(slug) + 1 + len(word) > 60:
            break
        slug += f"-{word}" if slug else word
    return slug


def clip(text: str, limit: int) -> str:
    """At most `limit` characters, cut between words and then marked with an ellipsis."""
    if len(text) <= limit:
        return text
    cut = text[: limit - 1]
    if not text[limit - 1].isspace() and " " in cut:
        cut = cut[: cut.rindex(" ")]
    return cut.rstrip(" ,;:.-") + "…"
