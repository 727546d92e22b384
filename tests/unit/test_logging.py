"""Logs: what a line holds, and what it never does."""

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from orbit.logging import configure_logging, mask_secrets
from orbit.settings import Settings


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Leaves the logging of the test run as it was."""
    root = logging.getLogger()
    handlers, level, given = root.handlers[:], root.level, structlog.get_config()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.configure(**given)


def test_production_logs_json_lines() -> None:
    """Orbit's events and the libraries' come out alike, one object a line."""
    stream = io.StringIO()
    configure_logging(Settings.model_validate({"env": "production"}), stream)
    structlog.get_logger("orbit.test").info("did_it", namespace="sea", cycle="c", job="j", size=3)
    structlog.get_logger("orbit.test").debug("detail")
    logging.getLogger("psycopg.pool").warning("lost %s", "postgresql://u:hidden@host/db")
    ours, theirs = map(json.loads, stream.getvalue().splitlines())
    assert list(ours)[:7] == ["time", "level", "event", "logger", "namespace", "cycle", "job"]
    assert (ours["event"], ours["level"], ours["size"]) == ("did_it", "info", 3)
    assert theirs["event"] == "lost postgresql://u:***@host/db"
    assert theirs["logger"] == "psycopg.pool"
    assert theirs["time"].endswith("Z")


@pytest.mark.parametrize("env", ["production", "development"])
def test_a_traceback_shows_no_values(env: str) -> None:
    """An exception is logged with its place in the code, never with what variables held."""
    stream = io.StringIO()
    configure_logging(Settings.model_validate({"env": env}), stream)

    def fail(payload: str) -> None:
        raise ValueError(len(payload))

    try:
        fail("hidden" * 2)
    except ValueError:
        structlog.get_logger("orbit.test").exception("failed")
    assert "ValueError: 12" in stream.getvalue()
    assert "hiddenhidden" not in stream.getvalue()


def test_telling_names_are_masked() -> None:
    """A value under a name that tells of a secret is not written."""
    event = {"event": "x", "token": "a", "Authorization": "b", "signing_secret": "c", "size": 1}
    masked = mask_secrets(None, "info", event)
    assert masked == {
        "event": "x",
        "token": "***",
        "Authorization": "***",
        "signing_secret": "***",
        "size": 1,
    }
