"""The program: every verb in its place, and one way to end for all of them.

Expected failures end with one line and an exit code (`outcome`); Ctrl-C and a reader that went
away end quietly. Whatever else escapes is a defect, and shows its traceback.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from orbit import __version__
from orbit.cli import (
    auditing,
    autonomy,
    brake,
    checkup,
    configuring,
    cycles,
    dead_letters,
    demonstration,
    drilling,
    insight,
    keys,
    lanes,
    planning,
    proposals,
    running,
    scaffold,
    schema,
    signals,
    status,
    telemetry,
    triggering,
)
from orbit.cli.outcome import ExitCode, report
from orbit.errors import DatabaseUnavailable, OrbitError, RequestInvalid

# What typer raises for a command line that it cannot use.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="orbit",
    help="Orbit: a control plane for unattended work.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("init")(scaffold.init)
app.command("demo")(demonstration.demo)
app.command("up")(running.up)
app.command("trigger")(triggering.trigger)
app.command("status")(status.status)
app.command("cycles")(cycles.cycles)
app.command("trace")(cycles.trace)
app.command("lanes")(lanes.lanes)
app.command("halt")(brake.halt)
app.command("resume")(brake.resume)
app.command("policy")(brake.policy)
app.add_typer(drilling.app, name="drill")
app.add_typer(dead_letters.app, name="dlq")
app.add_typer(keys.app, name="keys")
app.command("login")(keys.login)
app.command("validate")(configuring.validate)
app.add_typer(configuring.app, name="profiles")
app.command("plan")(planning.plan)
app.command("doctor")(checkup.doctor)
app.command("signals")(signals.signals)
app.add_typer(proposals.app, name="proposals")
app.add_typer(autonomy.app, name="autonomy")
app.add_typer(insight.app, name="insight")
app.add_typer(auditing.app, name="audit")
app.add_typer(telemetry.app, name="telemetry")
app.add_typer(schema.app, name="db")
app.command("receiver")(running.receiver)


def _version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"orbit {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What `orbit` takes without a verb."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    _prepare()
    try:
        try:
            return _run(given)
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.errno != errno.EPIPE:
            raise
        # Nobody reads on; the interpreter's own flush at its end must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED


def _run(arguments: list[str]) -> int:
    is_json = "--json" in arguments
    try:
        code = app(args=arguments, prog_name="orbit", standalone_mode=False)
    except OrbitError as error:
        return report(error, is_json=is_json)
    except _USAGE_ERROR as error:
        return _report_usage(error, is_json=is_json)
    except (KeyboardInterrupt, typer.Abort):
        return ExitCode.INTERRUPTED
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        return report(_unusable(error), is_json=is_json)
    except Exception as error:
        # psycopg is not imported where no database is asked, so its errors go by their origin.
        if type(error).__module__.partition(".")[0] not in {"psycopg", "psycopg_pool"}:
            raise
        return report(DatabaseUnavailable(str(error) or type(error).__name__), is_json=is_json)
    return code if isinstance(code, int) else ExitCode.OK


def _report_usage(error: Exception, *, is_json: bool) -> int:
    context = getattr(error, "ctx", None)
    hint = f"; see {context.command_path} --help" if context is not None else ""
    text = " ".join(getattr(error, "format_message", error.__str__)().split()).rstrip(".")
    report(RequestInvalid(f"{text[:1].lower()}{text[1:]}{hint}"), is_json=is_json)
    return ExitCode.USAGE


def _unusable(error: OSError) -> OrbitError:
    name = f"{error.filename}: " if error.filename else ""
    return OrbitError(f"{name}{error.strerror or error}")


def _prepare() -> None:
    """Users' steps import as with `python -m`; what a terminal cannot show is no failure."""
    with suppress(FileNotFoundError):  # the folder we are in may have been removed
        folder = str(Path.cwd())
        if folder not in sys.path and "" not in sys.path:
            sys.path.insert(0, folder)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
