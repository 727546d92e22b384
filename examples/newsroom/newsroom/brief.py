"""Tier 2: an extractive brief of each article, in the article's own sentences.

The method is that of H. P. Luhn ("The Automatic Creation of Literature Abstracts", 1958) with
weights for position: a sentence counts by how frequent its content words are in the article;
openings count more, very short and very long sentences less, and so do those which lean on
what stood before them ("It …", "They …"). The best are put in their original order.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import TYPE_CHECKING

from newsroom.text import content_words, paragraphs, sentences, words
from orbit.payload import Payload

if TYPE_CHECKING:
    from orbit.execution.context import ExecutionContext

_LEANING_WORDS = """
also among and another but even he here his how however it its none nor not other others one part
she so some such that their then there these they this those thus what which who yet
"""
_LEANING = frozenset(_LEANING_WORDS.split())


def write(payload: Payload, context: ExecutionContext) -> Payload:
    """Adds `brief`, a list of sentences, to every article of the bundle.

    Their number is `style_vector.sentences_per_brief`.
    """
    bundle = payload.json()
    count = int(context.instruction["style_vector"]["sentences_per_brief"])
    for article in bundle["articles"]:
        article["brief"] = summarize(article["body"], count)
    return Payload.of_json(bundle)


def summarize(body: str, count: int) -> list[str]:
    """The `count` most telling sentences of a text, in their order."""
    blocks = [sentences(block) for block in paragraphs(body)]
    every = list(chain.from_iterable(blocks))
    openings = {block[0] for block in blocks}
    frequency = Counter(content_words(body))

    def score(index: int) -> float:
        sentence = every[index]
        place = 1.5 if index == 0 else 1.25 if sentence in openings else 1.0
        return _weight(sentence, frequency) * place

    best = sorted(range(len(every)), key=lambda index: (-score(index), index))[:count]
    return [every[index] for index in sorted(best)]


def _weight(sentence: str, frequency: Counter[str]) -> float:
    """How telling a sentence is in itself, wherever it stands."""
    content = content_words(sentence)
    if not content:
        return 0.0
    all_words = words(sentence)
    count = len(all_words)
    length = 0.3 if count < 8 else 1.0 if count <= 32 else 0.6
    leaning = 0.5 if all_words[0] in _LEANING else 1.0
    return sum(frequency[word] for word in content) / len(content) * length * leaning
