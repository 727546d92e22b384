"""How a verb ends: its exit code, and one line of why.

Every expected failure becomes one line on stderr (a configuration's problems indented below)
and, with `--json`, a problem document on stdout. Nothing here prints a traceback.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from enum import IntEnum
from typing import Any, ClassVar, NoReturn

import typer

from orbit.cli.terminal import count
from orbit.errors import (
    ArchiveDamaged,
    ConfigurationInvalid,
    GlobalPause,
    NamespaceHalted,
    OrbitError,
    Refused,
    RequestInvalid,
)

HALTED_CODES = frozenset({"global_pause", "namespace_halted"})
_REFUSALS = frozenset({401, 403, 409})


class ExitCode(IntEnum):
    """What scripts test for; never renumbered."""

    OK = 0
    FAILED = 1
    USAGE = 2
    REFUSED = 3
    HALTED = 4
    VERIFICATION_FAILED = 6
    INTERRUPTED = 130

    @property
    def meaning(self) -> str:
        """What it tells a script."""
        return _MEANINGS[self]


_MEANINGS = {
    ExitCode.OK: "Done.",
    ExitCode.FAILED: "It failed, or what was followed did: the cycle, or one of its jobs.",
    ExitCode.USAGE: "The command line or a value in it cannot be used; nothing was done.",
    ExitCode.REFUSED: "Understood, and not allowed now or not to you; nothing was done.",
    ExitCode.HALTED: "Refused because the namespace is halted, or all is paused.",
    ExitCode.VERIFICATION_FAILED: "What was to be verified does not hold.",
    ExitCode.INTERRUPTED: "Ended by Ctrl-C.",
}

_CODES = {
    GlobalPause: ExitCode.HALTED,
    NamespaceHalted: ExitCode.HALTED,
    Refused: ExitCode.REFUSED,
    RequestInvalid: ExitCode.USAGE,
    ArchiveDamaged: ExitCode.VERIFICATION_FAILED,
}


class NodeUnreachable(OrbitError):
    """No node answers where one was expected, and nothing else can."""

    code: ClassVar[str] = "node_unreachable"


class ApiProblem(OrbitError):
    """A problem document that the API answered with."""

    def __init__(self, status: int, document: Mapping[str, Any]) -> None:
        title = document.get("title") or f"the API answered with status {status}"
        super().__init__(str(document.get("detail") or title))
        self.status, self.document = status, dict(document)
        self.problem_code = str(document.get("code") or "orbit_error")


def fail(code: ExitCode = ExitCode.FAILED) -> NoReturn:
    """Ends the verb with a code; what there is to say has been said."""
    raise typer.Exit(code)


def exit_code_of(error: OrbitError) -> ExitCode:
    """The exit code that an error stands for."""
    if isinstance(error, ApiProblem):
        return _exit_code_of_answer(error)
    for kind, code in _CODES.items():
        if isinstance(error, kind):
            return code
    return ExitCode.FAILED


def _exit_code_of_answer(problem: ApiProblem) -> ExitCode:
    if problem.problem_code in HALTED_CODES:
        return ExitCode.HALTED
    if problem.status in _REFUSALS:
        return ExitCode.REFUSED
    is_asked_wrongly = problem.problem_code == RequestInvalid.code
    return ExitCode.USAGE if is_asked_wrongly else ExitCode.FAILED


def problem_document(error: OrbitError) -> dict[str, Any]:
    """The error as a problem document (RFC 9457); the API's own is handed on unchanged."""
    if isinstance(error, ApiProblem):
        return error.document
    document: dict[str, Any] = {"title": _title(error), "code": error.code, "detail": str(error)}
    if isinstance(error, ConfigurationInvalid):
        document["detail"] = headline(error)
        document["problems"] = [
            {"file": one.file, "line": one.line, "pointer": one.pointer, "message": one.message}
            for one in error.problems
        ]
    return document | dict(error.details)


def headline(error: OrbitError) -> str:
    """The one line that says what is wrong."""
    if isinstance(error, ConfigurationInvalid):
        return f"the configuration is invalid: {count(len(error.problems), 'problem')}"
    if isinstance(error, ApiProblem):
        return " ".join(str(error).split())
    return str(error).splitlines()[0] if str(error) else error.code


def details(error: OrbitError) -> list[str]:
    """The lines below the headline."""
    if isinstance(error, ConfigurationInvalid):
        return [str(one) for one in error.problems]
    if isinstance(error, ApiProblem):
        return [line for one in _listed(error.document) if (line := _detail_line(one))]
    return str(error).splitlines()[1:]


def report(error: OrbitError, *, is_json: bool) -> ExitCode:
    """Tells of the error where it belongs; returns the exit code."""
    sys.stdout.flush()
    for index, line in enumerate((f"error: {headline(error)}", *details(error))):
        print(line if index == 0 else f"  {line}", file=sys.stderr)
    if is_json:
        print(json.dumps(problem_document(error), indent=2, ensure_ascii=False))
    return exit_code_of(error)


def _listed(document: Mapping[str, Any]) -> list[Any]:
    is_configuration = document.get("code") == ConfigurationInvalid.code
    found = document.get("problems" if is_configuration else "activeCycles")
    return found if isinstance(found, list) else []


def _detail_line(entry: Any) -> str:
    """A configuration problem as `file:line pointer: message`; anything else by its values."""
    if not isinstance(entry, Mapping):
        return str(entry)
    if "message" in entry:
        line = entry.get("line")
        place = f"{entry.get('file') or ''}:{line}" if line else str(entry.get("file") or "")
        where = " ".join(part for part in (place, str(entry.get("pointer") or "")) if part)
        return f"{where}: {entry['message']}" if where else str(entry["message"])
    return " ".join(str(value) for value in entry.values() if value is not None)


def _title(error: OrbitError) -> str:
    return (type(error).__doc__ or error.code).strip().splitlines()[0]
