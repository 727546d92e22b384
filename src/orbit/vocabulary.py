"""What may be written as a key, a cron expression or a time zone, wherever one is read.

Settings and configuration files check with the same functions, so they accept the same and
say the same. Each check returns its argument or raises ValueError with what is accepted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from difflib import get_close_matches
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

# `(?!\n)` because `$` also matches before a last line feed, in Python but not in ECMAScript.
KEY_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:~-]{0,127}(?!\n)$"
KEY_MEANING = "1 to 128 of A-Z a-z 0-9 . _ : ~ -, beginning with a letter or digit"

_CRON_MEANING = "a cron expression of minute hour day-of-month month day-of-week"
_NICKNAMES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
_ANY_START = datetime(2000, 1, 1, tzinfo=UTC)
_NOT_ZONES = frozenset({"localtime", "posixrules", "Factory"})


def check_key(text: str) -> str:
    """An id, a namespace or an endpoint's key: it travels in headers."""
    if not re.search(KEY_PATTERN, text):
        raise ValueError(KEY_MEANING)
    return text


def check_cron(expression: str) -> str:
    """Five fields or a nickname such as @daily; what can never fire is refused."""
    fields = _NICKNAMES.get(expression.strip().lower(), expression).split()
    if len(fields) != 5 or len(expression) > 1000:
        raise ValueError(f"{_CRON_MEANING}, or one of {', '.join(_NICKNAMES)}")
    try:
        next(CronSim(" ".join(fields), _ANY_START))
    except CronSimError as error:
        raise ValueError(f"{_CRON_MEANING} ({str(error).lower()})") from None
    except StopIteration:
        raise ValueError(f"{_CRON_MEANING} (this one never fires: no such day)") from None
    return expression


def check_time_zone(name: str) -> str:
    """An IANA time zone; not the names that stand for each machine's own."""
    try:
        if name in _NOT_ZONES:
            raise ValueError
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError("an IANA time zone such as UTC or Europe/Zurich") from None
    return name


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`"; did you mean X?"` for the nearest known name, or an empty string."""
    found = get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {found[0]}?" if found else ""


def printable(text: str) -> str:
    """One line that every terminal and log can take: the rest is written as escapes."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
