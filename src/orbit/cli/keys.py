"""`keys` and `login`: who may ask the API.

The verbs ask a node where they have a key for it; else they work straight on the database, so
the first key can be made. A key's text is printed once, alone on stdout, and nowhere kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orbit.cli.options import WHEN, Json, duration, group, instant, settings
from orbit.cli.terminal import note, print_json, say, show, table, when

if TYPE_CHECKING:
    from orbit.cli.client import Api


class ScopeName(StrEnum):
    """What a key may be for."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    APPROVER = "approver"
    ADMIN = "admin"


app = group("Access keys: make, list, rotate and revoke them.")
Direct = Annotated[
    bool, typer.Option("--direct", help="Straight on the database, also while a node is up.")
]
Expires = Annotated[
    str | None,
    typer.Option("--expires", metavar="WHEN", help=f"{WHEN}."),
]
Why = Annotated[str | None, typer.Option("--reason", help="Why; it is kept.")]
KeyId = Annotated[str, typer.Argument(metavar="KEY_ID", help="As `orbit keys list` shows it.")]


@app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="Who or what it is for.")],
    scope: Annotated[list[ScopeName], typer.Option(help="What it may do; may be repeated.")],
    namespace: Annotated[
        list[str] | None, typer.Option(help="Where; may be repeated. Default: everywhere.")
    ] = None,
    expires: Expires = None,
    reason: Why = None,
    is_direct: Direct = False,
    is_json: Json = False,
) -> None:
    """Make a key, and print it this once."""
    body = {
        "name": name,
        "scopes": [one.value for one in dict.fromkeys(scope)],
        "namespaces": list(dict.fromkeys(namespace or ["*"])),
        "expiresAt": instant(expires, "--expires"),
        "reason": reason,
    }
    with _asking(is_direct=is_direct) as api:
        _tell(api.post("/keys", body), is_json=is_json)


@app.command("list")
def listed(is_direct: Direct = False, is_json: Json = False) -> None:
    """List keys; none of them can be shown again."""
    with _asking(is_direct=is_direct) as api:
        keys = list(_every(api))
    if is_json:
        print_json({"items": keys})
        return
    names = ("KEY_ID", "NAME", "SCOPES", "NAMESPACES", "STATE", "UNTIL", "LAST USED")
    show(table(names, [_row(one) for one in keys], ids=("KEY_ID",)))


@app.command("rotate")
def rotate(
    key_id: KeyId,
    overlap: Annotated[
        str, typer.Option(metavar="DURATION", help="How long the old key is good yet.")
    ] = "24h",
    expires: Expires = None,
    reason: Why = None,
    is_direct: Direct = False,
    is_json: Json = False,
) -> None:
    """Make a key's successor; both are good for a while."""
    seconds = int(duration(overlap, "--overlap").total_seconds())
    with _asking(is_direct=is_direct) as api:
        body = {
            "overlapSeconds": seconds,
            "expiresAt": instant(expires, "--expires"),
            "reason": reason,
        }
        _tell(api.post(f"/keys/{key_id}/rotate", body), is_json=is_json)


@app.command("revoke")
def revoke(
    key_id: KeyId,
    has_descendants: Annotated[
        bool, typer.Option("--with-descendants", help="And every key that it made.")
    ] = False,
    reason: Why = None,
    is_direct: Direct = False,
    is_json: Json = False,
) -> None:
    """End a key now, on every node within a second."""
    with _asking(is_direct=is_direct) as api:
        body = {"reason": reason, "withDescendants": has_descendants}
        key = api.post(f"/keys/{key_id}/revoke", body)
    if is_json:
        print_json(key)
    else:
        say(f"key {key_id} ({key['name']}) is revoked")
        if key["descendants"]:
            ends = "revoked too" if has_descendants else "good yet: revoke --with-descendants"
            say(f"keys that it made, {ends}: {', '.join(key['descendants'])}")


def login(is_json: Json = False) -> None:
    """Print a link that opens a session in a browser, once."""
    from orbit.cli.client import connected
    from orbit.cli.outcome import NodeUnreachable

    with connected(settings()) as api:
        if api.address is None:
            raise NodeUnreachable("no node answers that a key is at hand for: set ORBIT_API_KEY")
        link = api.post("/session/links")
    url = f"{api.address}{link['path']}"
    if is_json:
        print_json({"url": url, "expiresAt": link["expiresAt"]})
    else:
        note("Opens a session once, within two minutes:")
        say(url)


@contextmanager
def _asking(*, is_direct: bool) -> Iterator[Api]:
    from orbit.cli.client import connected

    given = settings()
    with connected(given, is_direct=is_direct, is_urgent=True) as api:
        yield api


def _every(api: Api) -> Iterator[Any]:
    cursor = None
    while True:
        page = api.get("/keys", limit=200, cursor=cursor)
        yield from page["items"]
        cursor = page["nextCursor"]
        if cursor is None:
            return


def _tell(answer: Any, *, is_json: bool) -> None:
    if is_json:
        print_json(answer)
        return
    key = answer["key"]
    where = "everywhere" if key["namespaces"] == ["*"] else f"in {', '.join(key['namespaces'])}"
    until = f" until {when(key['expiresAt'])}" if key["expiresAt"] else ""
    note(f"key {key['keyId']} ({key['name']}): {', '.join(key['scopes'])} {where}{until}")
    note("It is shown this once:")
    say(answer["token"])


def _row(key: Any) -> tuple[str, ...]:
    until = [one for one in (key["expiresAt"], key["rotatedUntil"]) if one]
    return (
        key["keyId"],
        key["name"],
        ",".join(key["scopes"]),
        ",".join(key["namespaces"]),
        key["state"],
        when(min(until)) if until else "",
        when(key["lastUsedAt"]) if key["lastUsedAt"] else "never",
    )
