"""`trigger`: starts run profiles, a raw cycle or a re-run, and follows them if asked."""

from __future__ import annotations

import base64
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from orbit.cli.client import Api, connected
from orbit.cli.options import Json, settings
from orbit.cli.outcome import ExitCode, fail
from orbit.cli.terminal import note, print_json, say
from orbit.cli.watching import has_worker
from orbit.cli.watching import watch as watch_cycles
from orbit.errors import RequestInvalid


class Origin(StrEnum):
    """Where a re-run goes on from."""

    FAILED = "failed"
    START = "start"


def trigger(
    run_profile_ids: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN_PROFILE_ID]...", help="Default: all that are enabled."),
    ] = None,
    is_raw: Annotated[bool, typer.Option("--raw", help="One cycle without a run profile.")] = False,
    payload: Annotated[
        str | None, typer.Option(metavar="FILE|-", help="With --raw: what it sends.")
    ] = None,
    content_type: Annotated[
        str | None, typer.Option(help="With --payload: its media type.")
    ] = None,
    namespace: Annotated[str | None, typer.Option(help="With --raw: default is `default`.")] = None,
    endpoint: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="With --raw: where to; may be repeated."),
    ] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="The same key never starts a second cycle.")
    ] = None,
    rerun: Annotated[
        str | None, typer.Option(metavar="CYCLE_ID", help="Run a failed cycle again.")
    ] = None,
    origin: Annotated[
        Origin, typer.Option("--from", help="With --rerun: from the failed stage or the start.")
    ] = Origin.FAILED,
    is_forced: Annotated[
        bool, typer.Option("--force", help="With --rerun: even if it was run again before.")
    ] = False,
    reason: Annotated[str | None, typer.Option(help="With --rerun: why; it is kept.")] = None,
    is_watching: Annotated[
        bool,
        typer.Option(
            "--watch", help="Follow to the end; exit code 1 if any fails or has dead letters."
        ),
    ] = False,
    is_json: Json = False,
) -> None:
    """Start cycles now."""
    given = {"--payload": payload, "--content-type": content_type, "--namespace": namespace}
    given["--endpoint"] = endpoint[0] if endpoint else None
    _check(run_profile_ids, is_raw=is_raw, rerun=rerun, for_raw=given)
    if is_forced and rerun is None:
        raise RequestInvalid("--force goes with --rerun only")
    if reason is not None and rerun is None:
        raise RequestInvalid("--reason goes with --rerun only")
    body = _raw_body(payload, content_type, namespace, endpoint) if is_raw else {}
    headers = {} if idempotency_key is None else {"Idempotency_Key": idempotency_key}
    with connected(settings()) as api:
        if is_raw:
            answer = api.post("/cycles/trigger", body, **headers)
            started = [answer]
        elif rerun is not None:
            path = f"/cycles/{rerun}/rerun"
            asked = {"from": origin.value, "force": is_forced, "reason": reason}
            answer = api.post(path, asked, **headers)
            started = [answer]
        else:
            named = {"runProfileIds": run_profile_ids} if run_profile_ids else {}
            answer = api.post("/run-profiles/trigger", named, **headers)
            started = answer["items"]
        _follow(api, answer, started, is_watching=is_watching, is_json=is_json)
    _end(started, is_named=bool(run_profile_ids))


def _follow(
    api: Api, answer: Any, started: Sequence[Any], *, is_watching: bool, is_json: bool
) -> None:
    """Tells what was started and, if asked, follows it to its end."""
    ids = [one["cycleRunId"] for one in started if one.get("cycleRunId")]
    is_up = not api.is_in_process or has_worker(api)
    if not is_json:
        for one in started:
            say(_line(one))
    if ids and not is_up:
        note("Accepted, and stored. No node is up: it runs when one is (`orbit up`).")
    cycles: list[Any] = []
    if is_watching and ids and is_up:
        try:
            cycles = watch_cycles(api, ids, is_quiet=is_json)
        except KeyboardInterrupt:
            note("The cycles go on; see `orbit cycles`.")
            raise
    if is_json:
        print_json({**answer, "cycles": cycles} if is_watching else answer)
    if any(map(_is_bad, cycles)) or (is_watching and ids and not is_up):
        fail()


def _is_bad(lineage: Any) -> bool:
    """Whether a cycle failed, or left dead letters behind."""
    cycle = lineage["cycle"]
    return bool(cycle["state"] == "failed" or cycle.get("deadLettered"))


def _end(started: Sequence[Any], *, is_named: bool) -> None:
    """Refused where what was named, or everything, was skipped."""
    skipped = [one for one in started if not one.get("cycleRunId")]
    if skipped and (is_named or len(skipped) == len(started)):
        fail(ExitCode.REFUSED)
    if not started:
        note("No run profile is enabled: nothing was started.")
        fail(ExitCode.REFUSED)


def _line(one: Any) -> str:
    name = one.get("runProfileId")
    place = f"{one.get('namespace')}/{name}: " if name else ""
    if not one.get("cycleRunId"):
        return f"{place}skipped: {one.get('reason')}"
    what = "started" if one["isNew"] else "started before, as"
    return f"{place}{what} {one['cycleRunId']}"


def _check(
    run_profile_ids: Sequence[str] | None,
    *,
    is_raw: bool,
    rerun: str | None,
    for_raw: dict[str, str | None],
) -> None:
    """Refuses options that do not go together."""
    if sum((bool(run_profile_ids), is_raw, rerun is not None)) > 1:
        raise RequestInvalid("run profile ids, --raw and --rerun exclude each other")
    if not is_raw:
        for name, value in for_raw.items():
            if value is not None:
                raise RequestInvalid(f"{name} goes with --raw only")
    if for_raw["--content-type"] is not None and for_raw["--payload"] is None:
        raise RequestInvalid("--content-type goes with --payload only")


def _raw_body(
    payload: str | None,
    content_type: str | None,
    namespace: str | None,
    endpoints: Sequence[str] | None,
) -> dict[str, Any]:
    body: dict[str, Any] = {}
    if namespace is not None:
        body["namespace"] = namespace
    if endpoints:
        body["endpointKeys"] = list(endpoints)
    if payload is not None:
        content = sys.stdin.buffer.read() if payload == "-" else Path(payload).read_bytes()
        body["payloadBase64"] = base64.b64encode(content).decode()
        body["contentType"] = content_type or "application/octet-stream"
    return body
