"""What verbs have in common: options, the settings they start from, times as people say them.

A time is RFC 3339 with its zone, or a duration from now. What is neither is refused by the name of
its option.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from orbit.cli.terminal import note
from orbit.errors import RequestInvalid

if TYPE_CHECKING:
    from orbit.settings import Settings

DIFFERS = (
    "The files differ from the configuration in force, which new cycles follow; "
    "`POST /config/reload` takes the files in."
)

WHEN = "a time with its zone (RFC 3339), or from now: 30m, 12h, 90d"
_DURATION = re.compile(r"(\d{1,6})([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs on stdout.")]


def settings() -> Settings:
    """The settings of the environment and `.env`; what is odd about them goes to stderr.

    Raises SettingInvalid.
    """
    from orbit.settings import load_settings

    loaded = load_settings()
    for warning in loaded.warnings:
        note(f"warning: {warning}")
    return loaded


def group(about: str) -> typer.Typer:
    """A set of verbs; called without one it shows its help."""
    made = typer.Typer(rich_markup_mode=None, help=about, pretty_exceptions_enable=False)

    @made.callback(invoke_without_command=True)
    def help_unless_asked(context: typer.Context) -> None:
        if context.invoked_subcommand is None:
            typer.echo(context.get_help())

    return made


def instant(text: str | None, option: str) -> str | None:
    """A time as the API takes it, of one or of a duration from now. Raises RequestInvalid."""
    from orbit.clock import SystemClock

    if text is None:
        return None
    if _DURATION.fullmatch(text):
        return (SystemClock().now() + duration(text, option)).isoformat()
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        at = None
    if at is None or at.tzinfo is None:
        raise RequestInvalid(f"{option}: expected {WHEN}")
    return at.astimezone(UTC).isoformat()


def duration(text: str, option: str) -> timedelta:
    """A duration like 90s, 30m, 24h or 90d. Raises RequestInvalid."""
    found = _DURATION.fullmatch(text)
    if found is None:
        raise RequestInvalid(f"{option}: expected a duration like 90s, 30m, 24h or 90d")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})
