"""`telemetry`: events replayed from a position, or followed as they come, one JSON a line.

The last line's `position` is where to go on with `--after`; a reader that keeps it misses nothing
and sees nothing twice.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orbit.cli.client import connected
from orbit.cli.options import Json, group, settings
from orbit.cli.schema import access, refuse_without_data
from orbit.cli.terminal import note, print_json, say, show, table, when
from orbit.errors import RequestInvalid

if TYPE_CHECKING:
    from orbit.database.pool import Database

_PAGE = 1000
_POLL_SECONDS = 0.5

app = group("Telemetry: replay and follow events.")
archive = group("The cold archive: weeks of events that were dropped.")
app.add_typer(archive, name="archive")

After = Annotated[int | None, typer.Option(min=0, help="Only events after this position.")]
Namespace = Annotated[str | None, typer.Option(help="Only this namespace; `*`: the installation.")]


@app.command()
def replay(after: After = None, namespace: Namespace = None, is_json: Json = False) -> None:
    """Print all events after a position (from the first that is kept), and end."""
    with connected(settings()) as api:
        for event in _events(api, after or 0, namespace, is_following=False):
            _print(event, is_json=is_json)


@app.command()
def tail(after: After = None, namespace: Namespace = None, is_json: Json = False) -> None:
    """Print events as they come, until interrupted; with --after, those before as well."""
    with connected(settings()) as api:
        if after is None:
            after = api.get("/telemetry", limit=1, after=0)["lastPosition"]
        for event in _events(api, after, namespace, is_following=True):
            _print(event, is_json=is_json)


def _events(
    api: Any, after: int, namespace: str | None, *, is_following: bool
) -> Iterator[dict[str, Any]]:
    named = {} if namespace is None else {"namespace": namespace}
    while True:
        page = api.get("/telemetry", after=after, limit=_PAGE, **named)
        yield from page["items"]
        after = page["position"]
        if len(page["items"]) == _PAGE:
            continue
        if not is_following:
            return
        time.sleep(_POLL_SECONDS)


def _print(event: dict[str, Any], *, is_json: bool) -> None:
    if is_json:
        say(json.dumps(event, separators=(",", ":")))
        return
    data = event["data"]
    known = {"namespace", "profileId", "runProfileId", "runId"}
    rest = " ".join(f"{name}={one}" for name, one in data.items() if name not in known)
    name = event["type"].removeprefix("orbit.")
    say(f"{event['position']} {when(event['time'])} {data['namespace']} {name} {rest}")


@archive.command("ls")
def listed(is_json: Json = False) -> None:
    """List the archived weeks, by the Monday each began."""
    weeks = asyncio.run(_archives())
    if is_json:
        print_json({"items": weeks})
        return
    names = ("WEEK", "EVENTS", "FIRST", "LAST", "BYTES")
    fields = ("week", "events", "first_position", "last_position", "bytes")
    show(table(names, [[one[name] for name in fields] for one in weeks], ids=("WEEK",)))


@archive.command()
def restore(
    week: Annotated[str, typer.Argument(help="The Monday on which it began, as in `ls`.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; else stdout.")] = None,
) -> None:
    """Write a week's events as JSON lines; each chunk is compared with its digest before."""
    with ExitStack() as stack:
        file = sys.stdout.buffer if out is None else stack.enter_context(out.open("wb"))
        for line in asyncio.run(_restored(week)):
            file.write(line + b"\n")
    if out is not None:
        note(f"Written to {out}.")


@asynccontextmanager
async def _opened() -> AsyncIterator[Database]:
    from orbit.database.pool import Database

    given = settings()
    refuse_without_data(given)
    with access(given) as place:
        database = Database(place.dsn, minimum=1, maximum=1)
        await database.open()
        try:
            yield database
        finally:
            await database.close()


async def _archives() -> list[dict[str, Any]]:
    from orbit.telemetry.retention import SQL

    async with _opened() as database:
        return await database.fetch_all(SQL.archives)


async def _restored(week: str) -> list[bytes]:
    from orbit.telemetry.retention import SQL, read_chunk

    async with _opened() as database:
        weeks = {one["week"]: one["chunks"] for one in await database.fetch_all(SQL.archives)}
        if week not in weeks:
            raise RequestInvalid(f"{week} is not in the archive; `orbit telemetry archive ls`")
        chunks = [await read_chunk(database, week, one + 1) for one in range(weeks[week])]
        return [line for lines in chunks for line in lines]
