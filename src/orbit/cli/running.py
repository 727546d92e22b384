"""`up` and `receiver`: the two that stay until they are told to stop."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orbit.cli.options import Json
from orbit.errors import RequestInvalid


def up(
    is_dropping: Annotated[
        bool,
        typer.Option("--drop-overlays", help="Let go of overlays that do not fit changed files."),
    ] = False,
    is_json: Json = False,
) -> None:
    """Run a node until SIGTERM or Ctrl-C."""
    from orbit.api.server import serve
    from orbit.settings import load_settings, share_with_libraries

    share_with_libraries()
    # Which logs what is odd about the settings.
    raise typer.Exit(serve(load_settings(), is_dropping_overlays=is_dropping))


def receiver(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8787,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="ORBIT_RECEIVER_TOKEN", help="Bearer token that every delivery must bring."
        ),
    ] = None,
    signing_secret: Annotated[
        str | None,
        typer.Option(
            metavar="whsec_…",
            envvar="ORBIT_RECEIVER_SIGNING_SECRET",
            help="What every delivery must be signed with.",
        ),
    ] = None,
    path_token: Annotated[
        list[str] | None,
        typer.Option(metavar="/PATH=TOKEN", help="Another token for one path; may be repeated."),
    ] = None,
    store: Annotated[Path, typer.Option(metavar="DIR", help="Where arrivals are stored.")] = Path(
        ".orbit/received"
    ),
    is_quiet: Annotated[bool, typer.Option("--quiet", help="No line per arrival.")] = False,
    fail_rate: Annotated[
        float, typer.Option(metavar="SHARE", help="Answer 500 to this share (0 to 1).")
    ] = 0.0,
    latency: Annotated[
        float, typer.Option(metavar="SECONDS", help="Wait between storing and answering.")
    ] = 0.0,
    status: Annotated[int, typer.Option(metavar="CODE", help="Answer all with this.")] = 200,
    is_hanging: Annotated[bool, typer.Option("--hang", help="Never answer.")] = False,
    seed: Annotated[int | None, typer.Option(help="Fail the same arrivals in every run.")] = None,
    max_body_bytes: Annotated[
        int | None, typer.Option(metavar="BYTES", help="Refuse larger deliveries.")
    ] = None,
    is_json: Json = False,
) -> None:
    """Run the reference receiver."""
    from orbit.receiver.server import MAX_BODY_BYTES, ReceiverOptions, run

    try:
        options = ReceiverOptions(
            host=host,
            port=port,
            token=token or None,
            signing_secret=signing_secret or None,
            path_tokens=dict(map(_path_and_token, path_token or ())),
            store=store,
            is_quiet=is_quiet,
            fail_rate=fail_rate,
            latency_seconds=latency,
            status=status,
            is_hanging=is_hanging,
            seed=seed,
            max_body_bytes=max_body_bytes or MAX_BODY_BYTES,
        )
    except ValueError as error:
        raise RequestInvalid(str(error)) from None
    run(options)


def _path_and_token(text: str) -> tuple[str, str]:
    path, separator, token = text.partition("=")
    if not (path.startswith("/") and separator and token):
        raise RequestInvalid("--path-token: expected /PATH=TOKEN")
    return path, token
