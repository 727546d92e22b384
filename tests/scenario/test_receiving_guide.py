"""docs/receiving.md, run as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from orbit.receiver import create_table
from orbit.webhooks import SigningKeys
from tests.scenario.receiving import SECRET, TOKEN, genuine, serving

_GUIDE = Path(__file__).parents[2] / "docs" / "receiving.md"
_SNIPPETS = re.findall(r"^```(\w+)\n(.*?)^```$", _GUIDE.read_text(), re.DOTALL | re.MULTILINE)
_BODY = b"\x00\xff good morning"


@pytest.fixture
def posts(owner_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The receiver's database and the environment that the guide speaks of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ORBIT_TOKEN", TOKEN)
    monkeypatch.setenv("ORBIT_SIGNING_SECRET", SECRET)
    monkeypatch.setenv("RECEIVER_DATABASE_URL", owner_dsn)
    with psycopg.connect(owner_dsn) as connection:
        create_table(connection)
        connection.execute("CREATE TABLE posts (id text, content bytea)")
    return owner_dsn


def run(snippet: str) -> dict[str, Any]:
    """Runs a snippet as a module; returns what it defined."""
    module: dict[str, Any] = {"__name__": "guide"}
    exec(compile(snippet, str(_GUIDE), "exec", dont_inherit=True), module)
    return module


def stored(dsn: str) -> list[tuple[Any, ...]]:
    """The posts that the snippets wrote."""
    with psycopg.connect(dsn) as connection:
        return connection.execute("SELECT id, content FROM posts").fetchall()


def a_secret(snippet: str, posts: str) -> None:
    """The one-liner prints a secret that Orbit accepts."""
    command = snippet.replace("python", sys.executable, 1)
    ended = subprocess.run(
        command, shell=True, capture_output=True, text=True, timeout=60, check=True
    )
    assert len(SigningKeys.parse(ended.stdout.strip()).keys[0]) == 32


def the_application(snippet: str, posts: str) -> None:
    """A delivery is published, its repetition is a duplicate, a stranger is refused."""
    module = run(snippet)
    with serving(module["app"]) as client:
        answers = [
            client.post("/orbit", content=_BODY, headers=genuine("j1", _BODY)) for _ in range(2)
        ]
        assert client.post("/orbit", content=_BODY).status_code == 401
    assert answers[0].json() == {"published": "j1", "size": str(len(_BODY))}
    assert answers[1].json()["duplicate"] is True


def the_transaction(snippet: str, posts: str) -> None:
    """Two deliveries of one id are one row."""
    with serving(run(snippet)["app"]) as client:
        for _ in range(2):
            answer = client.post("/orbit", content=_BODY, headers=genuine("j1", _BODY))
            assert answer.status_code == 200
    assert stored(posts) == [("j1", _BODY)]


def the_function(snippet: str, posts: str) -> None:
    """Every status of its table comes about, and one row."""
    receive = run(snippet)["receive"]
    headers = {name.lower(): value for name, value in genuine("j1", _BODY).items()}
    other = {name.lower(): value for name, value in genuine("j1", b"x").items()}
    statuses = [receive(headers, _BODY), receive(headers, _BODY), receive(other, b"x")]
    assert [*statuses, receive(headers, b"x")] == [200, 200, 409, 401]
    assert stored(posts) == [("j1", _BODY)]


@pytest.mark.parametrize(
    ("number", "check"),
    list(enumerate([a_secret, the_application, the_transaction, the_function])),
)
def test_each_snippet_does_what_the_guide_says(
    number: int, check: Callable[[str, str], None], posts: str
) -> None:
    """There are as many snippets as checks, in this order."""
    assert [language for language, _ in _SNIPPETS] == ["sh", "python", "python", "python"]
    check(_SNIPPETS[number][1], posts)
