"""What verbs have in common: their shared options, and the settings they start from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from orbit.cli.terminal import note

if TYPE_CHECKING:
    from orbit.settings import Settings

DIFFERS = (
    "The files differ from the configuration in force, which new cycles follow; "
    "`POST /config/reload` takes the files in."
)

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
