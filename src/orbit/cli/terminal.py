"""What the terminal shows: tables that never cut an id, times in UTC, colour only on a terminal.

Columns that hold ids are as wide as their longest id, whatever the terminal's width; the others
fold. Text from elsewhere is shown printable, so that no escape sequence reaches the terminal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

_STYLES = {
    "finished": "green",
    "delivered": "green",
    "fired": "green",
    "stored": "green",
    "failed": "red",
    "dead_lettered": "red",
    "dead": "red",
    "missed": "red",
    "unknown": "yellow",
    "retrying": "yellow",
    "paused": "yellow",
    "halted": "yellow",
    "overlapped": "yellow",
    "disabled": "yellow",
    "running": "cyan",
    "in_flight": "cyan",
}
_NARROWEST_COLUMN = 12
_UNBOUNDED = 100_000


def print_json(value: Any) -> None:
    """Writes a value for a program to read."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def say(text: str = "") -> None:
    """A line of the result."""
    print(printable(text))


def note(text: str) -> None:
    """A line for the person, not part of the result."""
    sys.stdout.flush()
    print(printable(text), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """The text without anything that a terminal would act on; line feeds stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def utc(at: datetime) -> str:
    """RFC 3339 in UTC, to the second."""
    return at.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def when(text: str | None) -> str:
    """An instant of the API, to the millisecond; a dash for none."""
    if not text:
        return "-"
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return text
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def duration(seconds: float | None) -> str:
    """A length of time for a person: 3 ms, 1.2 s, 4 min, 2.5 h."""
    match seconds:
        case None:
            return "-"
        case _ if seconds < 1:
            return f"{seconds * 1000:.0f} ms"
        case _ if seconds < 120:
            return f"{seconds:.1f} s"
        case _ if seconds < 7200:
            return f"{seconds / 60:.0f} min"
        case _:
            return f"{seconds / 3600:.1f} h"


def count(number: int, what: str) -> str:
    """A number of things: `1 profile`, `2 profiles`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def size(number: int | None) -> str:
    """Bytes, for a person."""
    if number is None:
        return "-"
    return f"{number:,} B" if number < 1 << 20 else f"{number / (1 << 20):.1f} MiB"


def cell(value: Any) -> str:
    """A value in a table: a dash for nothing."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(map(str, value)) or "-"
    return printable(str(value)).replace("\n", " ")


@cache
def console(stream: TextIO | None = None) -> Console:
    """The console of a stream (default: stdout); styled only where it is a terminal."""
    from rich.console import Console

    return Console(file=stream, highlight=False, markup=False, emoji=False, soft_wrap=False)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], *, ids: Sequence[str] = ()
) -> Table:
    """A plain table. `ids` names the columns that are never folded nor cut."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    texts = [[cell(value) for value in row] for row in rows]
    for index, name in enumerate(columns):
        widest = max([len(name), *(len(row[index]) for row in texts)])
        is_whole = name in ids
        made.add_column(
            Text(name),
            no_wrap=is_whole,
            overflow="ignore" if is_whole else "fold",
            min_width=widest if is_whole else min(widest, _NARROWEST_COLUMN),
        )
    for row in texts:
        made.add_row(*(styled(text) for text in row))
    return made


def styled(text: str) -> Text:
    """A word in the colour of its state; other text as it is."""
    from rich.text import Text

    return Text(text, style=_STYLES.get(text.split(" ", 1)[0], ""))


def show(renderable: RenderableType, *, indent: int = 0) -> None:
    """Prints a table or text on stdout: folded at the terminal's width, in a pipe not at all."""
    from rich.measure import Measurement
    from rich.padding import Padding

    target = console()
    padded = Padding(renderable, (0, 0, 0, indent), expand=False) if indent else renderable
    given = target.width
    wide = target.options.update(width=_UNBOUNDED)
    least = Measurement.get(target, wide, padded).minimum
    target.width = max(given, least) if target.is_terminal else _UNBOUNDED
    try:
        with target.capture() as captured:
            target.print(padded, crop=False, overflow="ignore")
    finally:
        target.width = given
    print("\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n")))
