"""`python -m orbit.receiver`: the reference receiver without the rest of Orbit."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from orbit.errors import OrbitError
from orbit.receiver.server import DEFAULT_PORT, ReceiverOptions, run

TOKEN_VARIABLE = "ORBIT_RECEIVER_TOKEN"  # noqa: S105 - a variable's name
SECRET_VARIABLE = "ORBIT_RECEIVER_SIGNING_SECRET"  # noqa: S105 - a variable's name


def parse(arguments: list[str] | None = None) -> ReceiverOptions:
    """Reads the command line; exits with 2 and one message where it cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m orbit.receiver",
        description="Takes deliveries, stores each once, shows what came; can fail on purpose.",
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add("--port", type=int, default=DEFAULT_PORT, help="0 takes a free one (%(default)s)")
    token, secret = (os.environ.get(name) or None for name in (TOKEN_VARIABLE, SECRET_VARIABLE))
    add("--token", default=token, help=f"bearer token of every delivery (or {TOKEN_VARIABLE})")
    add(
        "--signing-secret",
        default=secret,
        metavar="whsec_…",
        help=f"what every delivery must be signed with (or {SECRET_VARIABLE})",
    )
    add(
        "--path-token",
        dest="path_tokens",
        type=path_and_token,
        action="append",
        default=[],
        metavar="/PATH=TOKEN",
        help="another token for one path; may be repeated",
    )
    add("--store", type=Path, default=Path(".orbit/received"), metavar="DIR", help="%(default)s")
    add("--quiet", action="store_true", dest="is_quiet", help="no line per arrival")
    add("--fail-rate", type=float, default=0.0, metavar="SHARE", help="answer 500 to 0…1 of all")
    add("--latency", type=float, default=0.0, dest="latency_seconds", metavar="SECONDS")
    add("--status", type=int, default=200, metavar="CODE", help="answer all with this status")
    add("--hang", action="store_true", dest="is_hanging", help="never answer")
    add("--seed", type=int, help="fail the same arrivals in every run")
    given = vars(parser.parse_args(arguments))
    try:
        return ReceiverOptions(**given | {"path_tokens": dict(given["path_tokens"])})
    except ValueError as error:
        parser.error(str(error))


def path_and_token(text: str) -> tuple[str, str]:
    """Takes `/newsletter=TOKEN` apart."""
    path, separator, token = text.partition("=")
    if not (path.startswith("/") and separator and token):
        raise argparse.ArgumentTypeError("expected /PATH=TOKEN")
    return path, token


def main() -> int:
    """Runs; returns the exit code."""
    options = parse()
    try:
        run(options)
    except (OrbitError, OSError) as error:
        print(f"receiver: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
