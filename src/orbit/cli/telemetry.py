"""`telemetry`: events replayed from a position, or followed as they come, one JSON a line.

The last line's `position` is where to go on with `--after`; a reader that keeps it misses nothing
and sees nothing twice. With `--consumer` the place is kept by Orbit, and moved on when a page is
printed: what was not printed is not passed over, and retention waits for it.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from orbit.cli.client import connected
from orbit.cli.cycles import paged
from orbit.cli.options import Json, group, settings
from orbit.cli.schema import access, refuse_without_data
from orbit.cli.terminal import note, print_json, say, show, table, when
from orbit.errors import RequestInvalid

if TYPE_CHECKING:
    from orbit.cli.client import Api
    from orbit.database.pool import Database

_PAGE = 1000
_POLL_SECONDS = 0.5
_MOST_CONSUMERS = 10_000

app = group("Telemetry: replay and follow events.")
archive = group("The cold archive: weeks of events that were dropped.")
app.add_typer(archive, name="archive")
consumers = group("Readers whose place is stored: retention waits for them.")
app.add_typer(consumers, name="consumers")
ConsumerName = Annotated[str, typer.Argument(metavar="NAME", help="The consumer's name.")]
Why = Annotated[str | None, typer.Option("--reason", help="Why; it is kept.")]

After = Annotated[int | None, typer.Option(min=0, help="Only events after this position.")]
Namespace = Annotated[str | None, typer.Option(help="Only this namespace; `*`: the installation.")]
Consumer = Annotated[
    str | None, typer.Option(help="Go on where this stored consumer is, and move it on.")
]


@app.command()
def replay(
    after: After = None,
    namespace: Namespace = None,
    consumer: Consumer = None,
    is_json: Json = False,
) -> None:
    """Print all events after a position (from the first that is kept), and end."""
    with connected(settings()) as api:
        place = _place(api, after, consumer) or 0
        _tell(api, _pages(api, place, namespace, is_following=False), place, consumer, is_json)


@app.command()
def tail(
    after: After = None,
    namespace: Namespace = None,
    consumer: Consumer = None,
    is_json: Json = False,
) -> None:
    """Print events as they come, until interrupted; with --after, those before as well."""
    with connected(settings()) as api:
        place = _place(api, after, consumer)
        if place is None:
            place = api.get("/telemetry", limit=1, after=0)["lastPosition"]
        _tell(api, _pages(api, place, namespace, is_following=True), place, consumer, is_json)


def _place(api: Api, after: int | None, consumer: str | None) -> int | None:
    if consumer is None:
        return after
    if after is not None:
        raise RequestInvalid("--after: a consumer has its own place; name one of the two")
    return int(api.get(f"/telemetry/consumers/{consumer}")["position"])


def _pages(
    api: Api, after: int, namespace: str | None, *, is_following: bool
) -> Iterator[dict[str, Any]]:
    while True:
        page = api.get("/telemetry", after=after, limit=_PAGE, namespace=namespace)
        yield page
        after = page["position"]
        if len(page["items"]) == _PAGE:
            continue
        if not is_following:
            return
        time.sleep(_POLL_SECONDS)


def _tell(
    api: Api, pages: Iterator[dict[str, Any]], place: int, consumer: str | None, is_json: bool
) -> None:
    """Prints pages; a consumer also passes what is not for its namespaces."""
    for page in pages:
        for event in page["items"]:
            _print(event, is_json=is_json)
        if consumer is not None and page["position"] > place:
            sys.stdout.flush()
            place = page["position"]
            api.post(f"/telemetry/consumers/{consumer}/commit", {"position": place})


def _print(event: dict[str, Any], *, is_json: bool) -> None:
    if is_json:
        say(json.dumps(event, separators=(",", ":")))
        return
    data = event["data"]
    known = {"namespace", "profileId", "runProfileId", "runId"}
    rest = " ".join(f"{name}={one}" for name, one in data.items() if name not in known)
    name = event["type"].removeprefix("orbit.")
    say(f"{event['position']} {when(event['time'])} {data['namespace']} {name} {rest}")


@consumers.command("ls")
def stored(is_json: Json = False) -> None:
    """List consumers: how far each is, and what it has yet to read."""
    with connected(settings()) as api:
        answer = paged(api, "/telemetry/consumers", _MOST_CONSUMERS)
    if is_json:
        print_json(answer)
        return
    names = ("NAME", "POSITION", "BEHIND", "LOST", "MOVED", "NAMESPACES")
    rows = [
        (
            one["name"],
            one["position"],
            one["behind"],
            one["lost"],
            when(one["movedAt"]),
            ",".join(one["namespaces"] or ["*"]),
        )
        for one in answer["items"]
    ]
    show(table(names, rows, ids=("NAME",)))


@consumers.command()
def add(
    name: ConsumerName,
    after: After = None,
    namespace: Annotated[
        list[str] | None,
        typer.Option(help="Keys of these may move it; may be repeated. Default: keys of all."),
    ] = None,
    reason: Why = None,
    is_json: Json = False,
) -> None:
    """Store a consumer's place, from the first event that is kept; retention waits for it."""
    body = {"name": name, "after": after, "namespaces": namespace or None, "reason": reason}
    with connected(settings()) as api:
        answer = api.post("/telemetry/consumers", body)
    if is_json:
        print_json(answer)
    else:
        say(f"consumer {name} is at {answer['position']}, {answer['behind']} to go")


@consumers.command()
def commit(
    name: ConsumerName,
    position: Annotated[int, typer.Argument(min=0, help="Up to where it has read.")],
    is_json: Json = False,
) -> None:
    """Move a consumer on; it never goes back."""
    with connected(settings()) as api:
        answer = api.post(f"/telemetry/consumers/{name}/commit", {"position": position})
    if is_json:
        print_json(answer)
    else:
        say(f"consumer {name} is at {answer['position']}, {answer['behind']} to go")


@consumers.command()
def rm(name: ConsumerName, reason: Why = None, is_json: Json = False) -> None:
    """Let a consumer go: retention waits for it no longer."""
    with connected(settings()) as api:
        answer = api.post(f"/telemetry/consumers/{name}/remove", {"reason": reason})
    if is_json:
        print_json(answer)
    else:
        say(f"consumer {name} is removed; it was at {answer['position']}")


@archive.command("ls")
def listed(is_json: Json = False) -> None:
    """List the archived weeks, by the Monday each began, and the file written of each."""
    weeks = asyncio.run(_archives())
    if is_json:
        print_json({"items": weeks})
        return
    names = ("WEEK", "EVENTS", "FIRST", "LAST", "BYTES", "FILE")
    fields = ("week", "events", "first_position", "last_position", "bytes", "file")
    show(table(names, [[one[name] for name in fields] for one in weeks], ids=("WEEK", "FILE")))


@archive.command()
def restore(
    week: Annotated[str, typer.Argument(help="The Monday on which it began, as in `ls`.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; else stdout.")] = None,
    parquet: Annotated[
        Path | None, typer.Option(help="Read this Parquet file of the week, and not the archive.")
    ] = None,
) -> None:
    """Write a week's events as JSON lines; digests are compared before."""
    asyncio.run(_restore(week, out, parquet))
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
    from orbit.telemetry.archive import SQL

    async with _opened() as database:
        return await database.fetch_all(SQL.archives)


@contextmanager
def _whole(out: Path | None) -> Iterator[IO[bytes]]:
    """Where to write: a file gets its name when all of it is there, and is gone otherwise."""
    if out is None:
        yield sys.stdout.buffer
        return
    if out.exists() and not out.is_file():  # a device, or a pipe
        with out.open("wb") as file:
            yield file
        return
    out = out.resolve()
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


async def _restore(week: str, out: Path | None, parquet: Path | None) -> None:
    """A chunk, or a row group, is in memory at a time."""
    from orbit.telemetry.archive import SQL, read_chunk
    from orbit.telemetry.parquet import check_parquet, parquet_lines

    async with _opened() as database:
        weeks = {one["week"]: one["chunks"] for one in await database.fetch_all(SQL.archives)}
        if week not in weeks:
            raise RequestInvalid(f"{week} is not in the archive; `orbit telemetry archive ls`")
        if parquet is not None:
            await check_parquet(database, week, parquet)
        with _whole(out) as file:
            if parquet is not None:
                file.writelines(line + b"\n" for line in parquet_lines(parquet))
                return
            for number in range(1, weeks[week] + 1):
                file.writelines(line + b"\n" for line in await read_chunk(database, week, number))
