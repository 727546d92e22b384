"""Settings: what is read from where, what is refused in which words, what is never shown."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from orbit.endpoints import Breaker, Endpoint
from orbit.errors import SettingInvalid
from orbit.settings import Settings, env_example, load_settings, share_with_libraries
from orbit.vault import generate_key

_KEY = generate_key()
_ROOT = Path(__file__).parents[2]
_ENDPOINT = {"key": "a", "url": "https://aurora.example/in"}


def _load(**environ: str) -> Settings:
    return load_settings(environ, env_file=None)


def _refusal(**environ: str) -> str:
    with pytest.raises(SettingInvalid) as caught:
        _load(**environ)
    return str(caught.value)


def _endpoints(*entries: object) -> tuple[Endpoint, ...]:
    return _load(ORBIT_DISPATCH_ENDPOINTS=json.dumps(entries)).dispatch_endpoints


def test_nothing_set_means_the_documented_defaults() -> None:
    """An empty environment is a complete, working configuration."""
    settings = _load()
    assert settings.database_url is None
    assert (settings.host, settings.port) == ("127.0.0.1", 3000)
    assert settings.roles == {"api", "scheduler", "worker"}
    assert settings.cron_schedule == "0 0,12 * * *"
    assert settings.dispatch_endpoints == ()
    assert settings.secret_keys == ()
    assert settings.warnings == ()


def test_every_kind_of_value_is_read() -> None:
    """Text becomes numbers, switches, sets, paths and key rings."""
    settings = _load(
        PORT="0",
        ORBIT_GLOBAL_PAUSE="true",
        ORBIT_ROLES=" worker, api ",
        ORBIT_CONFIG_DIR="conf",
        ORBIT_LEASE_SECONDS="2.5",
        ORBIT_ENV="Production",
        ORBIT_CRON_SCHEDULE="@daily",
        ORBIT_TIMEZONE="Europe/Zurich",
        ORBIT_HOST="::1",
        DATABASE_URL="postgresql://orbit:pw@db:5432/orbit",
        ORBIT_SECRET_KEYS=f"{_KEY}, {_KEY}",
    )
    assert settings.port == 0
    assert settings.global_pause is True
    assert settings.roles == {"worker", "api"}
    assert settings.config_dir == Path("conf")
    assert settings.lease_seconds == 2.5
    assert settings.env == "production"
    assert settings.secret_keys == (_KEY, _KEY)
    assert settings.database_url == "postgresql://orbit:pw@db:5432/orbit"


def test_settings_cannot_be_changed() -> None:
    """One object, read once."""
    with pytest.raises(ValidationError, match="frozen"):
        _load().port = 1


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    """`.env` fills in only what the environment does not say."""
    file = tmp_path / ".env"
    file.write_text("PORT=4000\nORBIT_LOG_LEVEL='debug'\n# a remark\nexport ORBIT_TIMEZONE=UTC\n")
    settings = load_settings({"PORT": "5000"}, env_file=file)
    assert (settings.port, settings.log_level) == (5000, "debug")


def test_opentelemetry_finds_its_variables_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are put into the process's environment, which wins; nothing else is."""
    for name in ("OTEL_SERVICE_NAME", "OTEL_EXPORTER_OTLP_ENDPOINT", "ORBIT_POLL_SECONDS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    file = tmp_path / ".env"
    file.write_text(
        "OTEL_SERVICE_NAME=theirs\nOTEL_EXPORTER_OTLP_ENDPOINT=http://c:1\nORBIT_POLL_SECONDS=2\n"
    )
    monkeypatch.setattr(os, "environ", dict(os.environ))
    share_with_libraries(file)
    assert os.environ["OTEL_SERVICE_NAME"] == "mine"
    assert os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://c:1"
    assert "ORBIT_POLL_SECONDS" not in os.environ


def test_by_default_the_process_environment_and_the_working_folder_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No argument: `os.environ` over `./.env`."""
    (tmp_path / ".env").write_text("PORT=4000\nORBIT_POLL_SECONDS=2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PORT", "5000")
    settings = load_settings()
    assert (settings.port, settings.poll_seconds) == (5000, 2.0)


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    """A folder in its place, or bytes that are no text, are named with the reason."""
    with pytest.raises(SettingInvalid, match=r"cannot be read: Is a directory"):
        load_settings({}, env_file=tmp_path)
    (tmp_path / ".env").write_bytes(b"PORT=\xff")
    with pytest.raises(SettingInvalid, match=r"it is not UTF-8"):
        load_settings({}, env_file=tmp_path / ".env")


def test_an_empty_value_is_not_given_except_for_schedules() -> None:
    """`PORT=` is the default; `ORBIT_CRON_SCHEDULE=` means never."""
    settings = _load(PORT="", DATABASE_URL="", ORBIT_CRON_SCHEDULE="", ORBIT_DISPATCH_ENDPOINTS="")
    assert (settings.port, settings.database_url, settings.cron_schedule) == (3000, None, "")


def test_orbit_env_wins_over_its_alias() -> None:
    """`NODE_ENV` is looked at only where `ORBIT_ENV` is not set, and refused by its own name."""
    assert _load(NODE_ENV="production").env == "production"
    assert _load(NODE_ENV="test", ORBIT_ENV="production").env == "production"
    assert _refusal(NODE_ENV="test") == "NODE_ENV='test': accepted is development or production"


@pytest.mark.parametrize(
    ("variable", "value", "accepted"),
    [
        ("PORT", "65536", "a whole number from 0 to 65535"),
        ("PORT", "-1", "a whole number from 0 to 65535"),
        ("PORT", "http", "a whole number from 0 to 65535"),
        ("PORT", "80.5", "a whole number from 0 to 65535"),
        ("ORBIT_LEASE_SECONDS", "0.5", "a number from 1 to 3600"),
        ("ORBIT_LEASE_SECONDS", "nan", "a number from 1 to 3600"),
        ("ORBIT_LEASE_SECONDS", "inf", "a number from 1 to 3600"),
        ("ORBIT_WORKER_CONCURRENCY", "0", "a whole number from 1 to 10000"),
        ("ORBIT_DISPATCH_RETRY_FACTOR", "0.5", "a number from 1 to 100"),
        ("ORBIT_MAX_DISPATCH_RETRIES", "-1", "a whole number from 0 to 1000"),
        ("ORBIT_GLOBAL_PAUSE", "maybe", "true or false"),
        ("ORBIT_LOG_LEVEL", "loud", "debug or info or warning or error"),
        ("ORBIT_ROLES", "api,cook", "one or more of api, scheduler, worker"),
        ("ORBIT_ROLES", ",", "one or more of api, scheduler, worker"),
        ("ORBIT_TIMEZONE", "Europe", "an IANA time zone"),
        ("ORBIT_TIMEZONE", "Europe/Zurick", "an IANA time zone"),
        ("ORBIT_TIMEZONE", "../etc/passwd", "an IANA time zone"),
        ("ORBIT_TIMEZONE", "localtime", "an IANA time zone"),
        ("ORBIT_CRON_SCHEDULE", "61 * * * *", "bad minute"),
        ("ORBIT_CRON_SCHEDULE", "* * * *", "expected five (minute hour"),
        ("ORBIT_CRON_SCHEDULE", "* * * * * *", "expected five (minute hour"),
        ("ORBIT_RUN_PROFILE_CRON_SCHEDULE", "@often", "@daily"),
        ("ORBIT_HOST", "example.org", "an IP address of this machine"),
        ("ORBIT_AUTH", "maybe", "on or off"),
        ("ORBIT_ALLOWED_HOSTS", "a b", "host names without a port"),
        ("ORBIT_TRUSTED_PROXIES", "proxy", "IP addresses or networks"),
    ],
)
def test_a_bad_value_is_one_line_with_name_value_and_what_is_accepted(
    variable: str, value: str, accepted: str
) -> None:
    """The start stops with words that a person can act on."""
    line = _refusal(**{variable: value})
    assert line.startswith(f"{variable}={value!r}: accepted is ")
    assert accepted in line
    assert "\n" not in line


def test_all_bad_values_are_reported_at_once_one_line_each() -> None:
    """Nobody has to start four times to find four mistakes."""
    lines = _refusal(
        PORT="x",
        ORBIT_TIMEZONE="x",
        ORBIT_SECRET_KEYS="x,y",
        ORBIT_DISPATCH_ENDPOINTS='[{"key": "a b"}, 3]',
    ).splitlines()
    names = sorted(line.partition("=")[0] for line in lines)
    assert names == ["ORBIT_DISPATCH_ENDPOINTS", "ORBIT_SECRET_KEYS", "ORBIT_TIMEZONE", "PORT"]


_VARIABLES = re.findall(r"^# ([A-Z0-9_]+)=", env_example(), re.MULTILINE)


@given(st.dictionaries(st.sampled_from(_VARIABLES), st.text(), max_size=3))
@example({"ORBIT_CONFIG_DIR": "\udcff"})
@example({"ORBIT_TIMEZONE": "\udcff\x00"})
@example({"DATABASE_URL": "\udcff"})
@example({"ORBIT_SECRET_KEYS": "é"})
@example({"ORBIT_LOG_LEVEL": "\udcff"})
@example({"ORBIT_HOST": "\udcff"})
@example({"ORBIT_CRON_SCHEDULE": "\udcff"})
@example({"ORBIT_DISPATCH_ENDPOINTS": '[{"key": "\\udcff", "a\\nb": "\\udcff"}]'})
def test_no_value_ends_in_anything_but_settings_or_a_refusal(environ: dict[str, str]) -> None:
    """Whatever the environment holds, the answer is a line for a person and never a trace."""
    try:
        load_settings(environ, env_file=None)
    except SettingInvalid as refusal:
        for line in str(refusal).splitlines():
            assert line.isprintable()
            assert line.partition("=")[0].partition(" ")[0] in {*_VARIABLES, "ORBIT_SECRET_KEYS"}


def test_a_value_of_several_lines_is_shown_on_one() -> None:
    """A message stays one line whatever the value holds, and short."""
    line = _refusal(PORT="1\n2" + "3" * 500)
    assert "\n" not in line
    assert len(line) < 250


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"ORBIT_DATABASE_POOL_MIN": "11"},
            "ORBIT_DATABASE_POOL_MIN=11: at most ORBIT_DATABASE_POOL_MAX (10)",
        ),
        (
            {"ORBIT_PAYLOAD_MEMORY_BYTES": "1000"},
            "ORBIT_MAX_PAYLOAD_BYTES=10485760: at most ORBIT_PAYLOAD_MEMORY_BYTES (1000)",
        ),
        (
            {"ORBIT_DISPATCH_RETRY_BASE_SECONDS": "400"},
            "ORBIT_DISPATCH_RETRY_BASE_SECONDS=400: at most ORBIT_DISPATCH_RETRY_CAP_SECONDS (300)",
        ),
        (
            {"DATABASE_URL": "postgresql://db/orbit"},
            "ORBIT_SECRET_KEYS is not set: required with DATABASE_URL, the same on every node",
        ),
        (
            {"ORBIT_DATABASE_OWNER_URL": "postgresql://db/orbit"},
            "ORBIT_DATABASE_OWNER_URL is set: accepted only together with DATABASE_URL",
        ),
        (
            {"ORBIT_TELEMETRY_PARQUET_DIR": "weeks"},
            (
                "ORBIT_TELEMETRY_PARQUET_DIR is set: accepted only together with"
                " ORBIT_TELEMETRY_COLD_ARCHIVE_ENABLED=true"
            ),
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    environ: dict[str, str], message: str
) -> None:
    """Each value alone is fine; together they are not."""
    assert _refusal(**environ) == message


def test_parquet_without_its_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks for files that nobody could write is told what to install."""
    given = {"ORBIT_TELEMETRY_PARQUET_DIR": "weeks", "ORBIT_TELEMETRY_COLD_ARCHIVE_ENABLED": "1"}
    assert load_settings(given, env_file=None).telemetry_parquet_dir == Path("weeks")
    monkeypatch.setattr("orbit.settings.find_spec", lambda _: None)
    assert _refusal(**given).endswith("needs pyarrow: pip install 'orbit-control-plane[parquet]'")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://orbit:hunter2@db:5432/orbit?sslmode=require",
        "postgres://db/orbit",
        "postgresql://a:1,b:2/orbit?target_session_attrs=read-write",
        "postgresql:///orbit?host=/run/postgresql",
        "host=db dbname=orbit password='hunter 2'",
    ],
)
def test_a_database_url_in_each_of_libpqs_forms_is_accepted(url: str) -> None:
    """What libpq understands goes through unchanged."""
    assert _load(DATABASE_URL=url, ORBIT_SECRET_KEYS=_KEY).database_url == url


@pytest.mark.parametrize(
    "url",
    [
        "mysql://orbit:hunter2@db/orbit",
        "postgresql://orbit:hunter2@[db/orbit",
        "postgresql://orbit:hun@ter2@db/orbit?nonsense=1",
        "postgresql:orbit:hunter2@db",
        "host=db pasword=hunter2 password=hunter2",
        "host=db PASSWORD = 'hunter2",
        "postgresql://db/orbit?password=hunter2&nonsense=1",
    ],
)
def test_a_bad_database_url_is_refused_without_its_password(url: str) -> None:
    """The rest of the value is shown, so that the mistake can be seen."""
    line = _refusal(DATABASE_URL=url, ORBIT_SECRET_KEYS=_KEY)
    assert line.startswith("DATABASE_URL='")
    assert "accepted is postgresql://" in line
    assert "hunter2" not in line
    assert "ter2" not in line


def test_a_bad_secret_key_is_counted_and_not_shown() -> None:
    """The message says which of the keys is none."""
    line = _refusal(ORBIT_SECRET_KEYS=f"{_KEY},c2VjcmV0")
    assert line.startswith("ORBIT_SECRET_KEYS=***: accepted is comma-separated Fernet keys")
    assert line.endswith("number 2 is not one")
    assert "c2VjcmV0" not in line


def test_secrets_are_in_no_representation_of_the_settings() -> None:
    """Neither `repr`, nor a dump, nor an endpoint's `repr` holds a key, password or token."""
    signing_secret = "whsec_hunter2hunter2hunter2hunter2hunt"
    entry = {**_ENDPOINT, "token": "hunter2", "headers": {"X-Key": "hunter2"}}
    settings = _load(
        DATABASE_URL="postgresql://orbit:hunter2@db/orbit",
        ORBIT_DATABASE_OWNER_URL="postgresql://owner:hunter2@db/orbit",
        ORBIT_SECRET_KEYS=_KEY,
        ORBIT_DISPATCH_ENDPOINTS=json.dumps([{**entry, "signing_secret": signing_secret}]),
    )
    shown = f"{settings!r}{settings}{settings.model_dump()}{settings.dispatch_endpoints!r}"
    assert "hunter2" not in shown
    assert _KEY not in shown


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4"])
def test_auth_is_off_on_loopback_only(host: str) -> None:
    """With keys any address may be listened on; without, none that others reach."""
    assert _load(ORBIT_HOST=host).auth == "on"
    assert _load(ORBIT_HOST="::1", ORBIT_AUTH="off").auth == "off"
    with pytest.raises(SettingInvalid, match="ORBIT_AUTH=off: accepted on a loopback"):
        _load(ORBIT_HOST=host, ORBIT_AUTH="off")


def test_an_unknown_name_is_a_warning_with_the_nearest_known_one() -> None:
    """A slip is pointed out; names that are read elsewhere and other people's are left alone."""
    settings = _load(
        ORBIT_DRAIN_TIMOUT_SECONDS="1",
        ORBIT_XYZZY="1",
        ORBIT_URL="http://127.0.0.1:3000",
        ORBIT_API_KEY="orb_x",
        ORBIT_TEST_DATABASE_URL="x",
        PATH="/bin",
    )
    slip, unknown = settings.warnings
    expected = "ORBIT_DRAIN_TIMOUT_SECONDS is not a setting; did you mean "
    assert slip == f"{expected}ORBIT_DRAIN_TIMEOUT_SECONDS?"
    assert unknown == "ORBIT_XYZZY is not a setting"


def test_an_endpoint_is_read_with_all_its_keys() -> None:
    """Each key of the documented vocabulary arrives in its field."""
    (endpoint,) = _endpoints(
        {
            "key": "aurora:eu-1",
            "url": "https://aurora.example:8443/in?x=1",
            "method": "PUT",
            "token": "t0ken",
            "headers": {"X-Tenant": "brand a"},
            "timeout_seconds": 2.5,
            "max_concurrency": 4,
            "rate_per_second": 10,
            "signing_secret": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
            "permanent_statuses": [400, 404],
            "breaker": {"failures": 3},
            "on_unknown": "hold",
            "proxy": "http://me:pw@proxy.example:3128",
            "check_url": "https://aurora.example/me",
        }
    )
    assert endpoint == Endpoint(
        key="aurora:eu-1",
        url="https://aurora.example:8443/in?x=1",
        method="PUT",
        token="t0ken",
        headers={"X-Tenant": "brand a"},
        timeout_seconds=2.5,
        max_concurrency=4,
        rate_per_second=10.0,
        signing_secret="whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        permanent_statuses=frozenset({400, 404}),
        breaker=Breaker(failures=3),
        on_unknown="hold",
        proxy="http://me:pw@proxy.example:3128",
        check_url="https://aurora.example/me",
    )


def test_an_endpoint_with_the_least_has_the_documented_defaults() -> None:
    """Key and URL are enough."""
    assert _endpoints(_ENDPOINT) == (Endpoint(key="a", url="https://aurora.example/in"),)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"key": ""}, "/0/key: 1 to 128 of A-Z"),
        ({"key": "a b"}, "/0/key: 1 to 128 of A-Z"),
        ({"key": "a\n"}, "/0/key: 1 to 128 of A-Z"),
        ({"key": "-a"}, "/0/key: 1 to 128 of A-Z"),
        ({"key": "a" * 129}, "/0/key: 1 to 128 of A-Z"),
        ({"key": 7}, "/0/key: input should be a valid string"),
        ({"url": "ftp://x/"}, "/0/url: an absolute http:// or https:// URL"),
        ({"url": "/in"}, "/0/url: an absolute http:// or https:// URL"),
        ({"url": "http://"}, "/0/url: an absolute http:// or https:// URL"),
        ({"url": "https://me:hunter2@x/"}, "/0/url: a URL without credentials"),
        ({"url": "https://x/#top"}, "/0/url: a URL without a fragment"),
        ({"url": "https://x:99999/"}, "/0/url: a URL with a legal host, and a port"),
        ({"url": "https://x:0/"}, "/0/url: a URL with a port from 1 to 65535"),
        ({"url": "https://[x/"}, "/0/url: a URL with a legal host, and a port"),
        ({"url": "https://x/a b"}, "/0/url: a URL of visible ASCII"),
        ({"url": "https://x/é"}, "/0/url: a URL of visible ASCII"),
        ({"url": "https://x/\r\nX: y"}, "/0/url: a URL of visible ASCII"),
        ({"method": "GET"}, "/0/method: input should be 'POST', 'PUT', 'PATCH' or 'DELETE'"),
        ({"token": "hunter2 x"}, "/0/token: 1 to 8192 visible ASCII"),
        ({"token": "hunter2\n"}, "/0/token: 1 to 8192 visible ASCII"),
        ({"token": ""}, "/0/token: 1 to 8192 visible ASCII"),
        ({"signing_secret": "é"}, "/0/signing_secret: whsec_ and the base64 of 24 to 64 bytes"),
        ({"signing_secret": "whsec_abc="}, "/0/signing_secret: whsec_ and the base64 of"),
        ({"headers": {"a b": "x"}}, "/0/headers: 'a b' is not a legal HTTP header name"),
        ({"headers": {"x": "hunter2\r\nb: c"}}, "/0/headers: the value of x: visible ASCII"),
        ({"headers": {"x": ""}}, "/0/headers: the value of x: visible ASCII"),
        ({"headers": {"X": "1", "x": "2"}}, "/0/headers: the same header twice"),
        ({"headers": {"x": 1}}, "/0/headers/x: input should be a valid string"),
        ({"timeout_seconds": 0}, "/0/timeout_seconds: input should be greater than 0"),
        ({"timeout_seconds": "30"}, "/0/timeout_seconds: input should be a valid number"),
        ({"max_concurrency": 0}, "/0/max_concurrency: input should be greater than"),
        ({"max_concurrency": True}, "/0/max_concurrency: input should be a valid integer"),
        ({"rate_per_second": 0}, "/0/rate_per_second: input should be greater than 0"),
        ({"permanent_statuses": [99]}, "/0/permanent_statuses/0: input should be greater"),
        ({"permanent_statuses": [200, 600]}, "/0/permanent_statuses/1: input should be less"),
        ({"breaker": []}, "/0/breaker: a JSON object"),
        ({"breaker": {"failures": 0}}, "/0/breaker/failures: input should be greater than"),
        ({"breaker": {"fails": 3}}, "/0/breaker/fails: not a key of a breaker; did you mean"),
        ({"on_unknown": "drop"}, "/0/on_unknown: input should be 'retry' or 'hold'"),
        ({"proxy": "https://proxy.example"}, "/0/proxy: a proxy as http://host:port"),
        ({"proxy": "http://proxy.example/path"}, "/0/proxy: a proxy as http://host:port"),
        ({"check_url": "/me"}, "/0/check_url: an absolute http:// or https:// URL"),
        ({"tokn": "hunter2"}, "/0/tokn: not a key of an endpoint; did you mean token?"),
        ({"a/b": 1}, "/0/a~1b: not a key of an endpoint (known: key, url"),
    ],
)
def test_a_bad_endpoint_is_refused_with_its_pointer(change: dict[str, Any], problem: str) -> None:
    """The place and the rule are named; no token, header or credential is."""
    line = _refusal(ORBIT_DISPATCH_ENDPOINTS=json.dumps([{**_ENDPOINT, **change}]))
    assert line.startswith("ORBIT_DISPATCH_ENDPOINTS=***: accepted is a JSON array of endpoints; ")
    assert problem in line
    assert "hunter2" not in line
    assert "\n" not in line


@pytest.mark.parametrize(
    "name",
    [
        "Authorization",
        "idempotency-key",
        "Content-Type",
        "content-length",
        "HOST",
        "connection",
        "Transfer-Encoding",
        "Content-Digest",
        "webhook-id",
        "Webhook-X",
        "orbit-x",
        "traceparent",
    ],
)
def test_a_header_that_orbit_sets_itself_cannot_be_overridden(name: str) -> None:
    """Whatever its case."""
    entry = {**_ENDPOINT, "headers": {name: "x"}}
    line = _refusal(ORBIT_DISPATCH_ENDPOINTS=json.dumps([entry]))
    assert f"/0/headers: {name} is set by Orbit itself" in line


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{}", "a JSON array of endpoints"),
        ("[", "a JSON array of endpoints (Expecting value at line 1, column 2)"),
        ("[{}]", "/0/key: is required; /0/url: is required"),
        ("[3]", "/0: a JSON object with key and url"),
        ('[{"key": "a", "key": "b"}]', "each key once ('key' is twice)"),
        ('[{"timeout_seconds": NaN}]', "NaN is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        (json.dumps([_ENDPOINT, _ENDPOINT]), "/1/key: a unique key (/0 is a too)"),
    ],
)
def test_what_is_no_array_of_endpoints_is_refused(text: str, problem: str) -> None:
    """Broken JSON, other values, repeated keys and repeated endpoints."""
    line = _refusal(ORBIT_DISPATCH_ENDPOINTS=text)
    assert problem in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("given", "hours"),
    [
        ({}, 168),
        ({"ORBIT_PROBATION_HOURS": "24"}, 24),
        ({"ORBIT_TELEMETRY_RETENTION_DAYS": "2"}, 48),
        ({"ORBIT_TELEMETRY_RETENTION_DAYS": "0", "ORBIT_PROBATION_HOURS": "8760"}, 8760),
        ({"ORBIT_TELEMETRY_HARD_LIMIT_DAYS": "1"}, 24),
    ],
)
def test_a_probation_never_outlasts_what_it_rests_on(given: dict[str, str], hours: int) -> None:
    """Telemetry is kept for days, and with a hard limit for fewer."""
    assert load_settings(given, None).watched_hours == hours


def test_env_example_documents_every_setting_with_its_default() -> None:
    """Name by name, default by default: the file is what the settings print."""
    text = (_ROOT / ".env.example").read_text("utf-8")
    assert text == env_example()
    documented = [line[2:].split("=")[0] for line in text.splitlines() if _is_assignment(line)]
    special = {"database_url": "DATABASE_URL", "port": "PORT"}
    names = [name for name in Settings.model_fields if name != "warnings"]
    assert documented == [special.get(name, f"ORBIT_{name.upper()}") for name in names]


def test_env_example_documents_what_is_read_elsewhere() -> None:
    """Whatever the program asks the environment for by name is in the file."""
    text = (_ROOT / ".env.example").read_text("utf-8")
    ours = re.compile(r"""["'](ORBIT_(?!TEST_)[A-Z0-9_]+|SSL_[A-Z_]+)["']""")
    sources = (_ROOT / "src").rglob("*.py")
    asked = {name for path in sources for name in ours.findall(path.read_text("utf-8"))}
    assert {"ORBIT_URL", "ORBIT_API_KEY", "ORBIT_RECEIVER_TOKEN"} < asked
    for name in (*asked, "OTEL_*"):
        assert re.search(rf"^# {re.escape(name)}(=|$)", text, re.MULTILINE), name


def test_what_is_read_elsewhere_is_a_warning_in_the_file(tmp_path: Path) -> None:
    """In `.env` it would be passed over without a word; in the environment it is taken."""
    (tmp_path / ".env").write_text("ORBIT_URL=http://node\nORBIT_API_KEY=orb_x\nOTEL_X=y\n")
    found = load_settings({"ORBIT_API_KEY": "orb_y"}, env_file=tmp_path / ".env")
    assert found.warnings == ("ORBIT_URL is read from the environment alone, not from .env",)


def test_env_example_uncommented_is_the_default_configuration(tmp_path: Path) -> None:
    """Its values are accepted as they stand, and change nothing."""
    text = (_ROOT / ".env.example").read_text("utf-8")
    lines = [line[2:] for line in text.splitlines() if _is_assignment(line)]
    (tmp_path / ".env").write_text("\n".join(lines))
    assert load_settings({}, env_file=tmp_path / ".env") == _load()


def _is_assignment(line: str) -> bool:
    name, has_value, _ = line.removeprefix("# ").partition("=")
    return line.startswith("# ") and bool(has_value) and name.isupper() and " " not in name


def test_reading_settings_loads_no_heavy_library() -> None:
    """A node restarts in two seconds; libraries that only some nodes need wait until then."""
    program = (
        "import sys; from orbit.settings import load_settings; load_settings({}, None);"
        "names = 'psycopg', 'cryptography', 'fastapi', 'httptools', 'jsonschema_rs';"
        "print([name for name in names"
        " if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"
