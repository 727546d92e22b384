"""What may be written as a key or as an instant, and how to answer what may not be.

Settings and configuration files check with the same functions, so they accept the same and
say the same. Each check returns its argument or raises ValueError with what is accepted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from difflib import get_close_matches

# `(?!\n)` because `$` also matches before a last line feed, in Python but not in ECMAScript.
KEY_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:~-]{0,127}(?!\n)$"
KEY_MEANING = "1 to 128 of A-Z a-z 0-9 . _ : ~ -, beginning with a letter or digit"
DRILL_PREFIX = "orbit-drill-"
DRILL_ENDPOINT = "orbit-drill"
DRILL_LIFE_SECONDS = 120.0  # of a drill, and of its halt from then on
_FIRST_INSTANT = datetime(2000, 1, 1, tzinfo=UTC)
_LAST_INSTANT = datetime(9000, 1, 1, tzinfo=UTC)
INSTANT_MEANING = "a time from 2000 to 9000, with its zone"


def check_key(text: str) -> str:
    """An id, a namespace or an endpoint's key: it travels in headers."""
    if not re.search(KEY_PATTERN, text):
        raise ValueError(KEY_MEANING)
    return text


def check_instant(at: datetime) -> datetime:
    """An instant that somebody names, in UTC: one that every part can store and read back."""
    try:
        at = at.astimezone(UTC)
    except OverflowError:
        raise ValueError(INSTANT_MEANING) from None
    if not _FIRST_INSTANT <= at <= _LAST_INSTANT:
        raise ValueError(INSTANT_MEANING)
    return at


def is_drill(namespace: str) -> bool:
    """Whether a namespace is a drill's: only the drill's own worker takes its work."""
    return namespace.startswith(DRILL_PREFIX)


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`"; did you mean X?"` for the nearest known name, or an empty string."""
    found = get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {found[0]}?" if found else ""


def printable(text: str) -> str:
    """One line that every terminal and log can take: the rest is written as escapes."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
