"""Every knob of a node, read once from the environment and `.env`, then frozen.

The environment wins over `.env`; an empty value counts as not given, except where empty means
something (the two schedules). A value that cannot be used stops the start: one line names the
variable, the value and what is accepted. Tokens, keys and passwords are never shown: they are
left out of `repr`, of dumps and of every message.

A field's name, description, range and default are the one source: the variable's name is
derived from the field, and `python -m orbit.settings` prints `.env.example`.
"""

from __future__ import annotations

import ipaddress
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Set
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from orbit.cron import parse_cron, time_zone
from orbit.endpoints import Endpoint, parse_endpoints, reason
from orbit.errors import SettingInvalid
from orbit.vocabulary import nearest

__all__ = ["ROLES", "Endpoint", "Settings", "env_example", "load_settings"]

ROLES = frozenset({"api", "scheduler", "worker"})
_MIB = 1 << 20


# --- single values -----------------------------------------------------------------------


def _endpoints(value: object) -> object:
    return parse_endpoints(value) if isinstance(value, str) else value


def _address(host: str) -> str:
    if host != "localhost":
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise ValueError("an IP address of this machine, or localhost") from None
    return host


def _is_loopback(host: str) -> bool:
    return host == "localhost" or ipaddress.ip_address(host).is_loopback


def _names_of_hosts(value: object) -> object:
    if not isinstance(value, str):
        return value
    names = tuple(part.strip().lower() for part in value.split(",") if part.strip())
    if not all(re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", name) for name in names):
        raise ValueError("host names without a port, separated by commas")
    return names


def _addresses(value: object) -> object:
    if not isinstance(value, str):
        return value
    parts = tuple(part.strip() for part in value.split(",") if part.strip())
    try:
        for part in parts:
            ipaddress.ip_network(part)
    except ValueError:
        raise ValueError("IP addresses or networks, separated by commas") from None
    return parts


def _database_url(url: str) -> str:
    """Checks by libpq's own parser, whose messages may quote a password and so are dropped."""
    from psycopg import ProgrammingError  # noqa: PLC0415 - 150 ms that embedded CLI verbs save
    from psycopg.conninfo import conninfo_to_dict  # noqa: PLC0415

    accepted = "postgresql://user:password@host:port/database, or libpq's key=value form"
    scheme, has_scheme, _ = url.partition("://")
    if has_scheme and scheme not in ("postgresql", "postgres") and "=" not in scheme:
        raise ValueError(accepted)
    try:
        conninfo_to_dict(url)
    except (ProgrammingError, UnicodeError):
        raise ValueError(accepted) from None
    return url


def _secret_keys(value: object) -> object:
    if not isinstance(value, str):
        return value
    from cryptography.fernet import Fernet  # noqa: PLC0415 - as above

    keys = tuple(part.strip() for part in value.split(",") if part.strip())
    for number, key in enumerate(keys, 1):
        try:
            Fernet(key)
        except ValueError:
            raise ValueError(
                "comma-separated Fernet keys (32 bytes, URL-safe base64, 44 characters each), "
                f"newest first; number {number} is not one"
            ) from None
    return keys


def _roles(value: object) -> object:
    if not isinstance(value, str):
        return value
    roles = frozenset(part.strip() for part in value.split(",") if part.strip())
    if not roles or not roles <= ROLES:
        raise ValueError("one or more of api, scheduler, worker, separated by commas")
    return roles


def _schedule(expression: str) -> str:
    if expression.strip():
        parse_cron(expression.strip(), "UTC")
    return expression.strip()


def _time_zone(name: str) -> str:
    return time_zone(name).key


def _lower(value: object) -> object:
    return value.strip().lower() if isinstance(value, str) else value


_Schedule = Annotated[str, AfterValidator(_schedule)]
_DatabaseUrl = Annotated[str, AfterValidator(_database_url)]


def _knob(default: Any, about: str, low: float | None = None, high: float | None = None) -> Any:
    return Field(default, description=about, ge=low, le=high)


def _secret(default: Any, about: str) -> Any:
    return Field(default, description=about, repr=False, exclude=True)


# --- the settings ------------------------------------------------------------------------


class Settings(BaseSettings):
    """All settings of one node; build it with `load_settings`, or by keyword in tests."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, arbitrary_types_allowed=True
    )

    database_url: _DatabaseUrl | None = _secret(
        None,
        "PostgreSQL 14 or newer, as a URL or in libpq's key=value form. Unset: an embedded "
        "server in the data folder.",
    )
    database_owner_url: _DatabaseUrl | None = _secret(
        None,
        "The same database as the role that owns the tables, used for upgrades only. "
        "Unset: DATABASE_URL.",
    )
    database_pool_min: int = _knob(2, "Connections kept open.", 1, 1000)
    database_pool_max: int = _knob(10, "Connections at most.", 1, 1000)
    database_prepared_statements: bool = _knob(
        True, "Turn off behind a PgBouncer older than 1.21 in transaction mode."
    )
    secret_keys: Annotated[tuple[str, ...], BeforeValidator(_secret_keys)] = _secret(
        (),
        "Fernet keys for secrets at rest, separated by commas, newest first. Required with "
        "DATABASE_URL; the embedded mode makes one in the data folder.",
    )

    port: int = _knob(3000, "HTTP port; 0 takes any free one.", 0, 65_535)
    host: Annotated[str, AfterValidator(_address)] = _knob(
        "127.0.0.1",
        "HTTP address. One that other machines reach needs an access key: `orbit keys create`.",
    )
    auth: Annotated[Literal["on", "off"], BeforeValidator(_lower)] = _knob(
        "on",
        "Whether the API asks for an access key; off is accepted on a loopback address only, "
        "and lets everybody on this machine do everything.",
    )
    session_seconds: float = _knob(
        28_800.0, "How long a browser's session lasts at most.", 60, 2_592_000
    )
    metrics_open: bool = _knob(False, "Whether GET /metrics is answered without an access key.")
    allowed_hosts: Annotated[tuple[str, ...], BeforeValidator(_names_of_hosts)] = _knob(
        (), "Names under which the API is asked, besides IP addresses, separated by commas."
    )
    trusted_proxies: Annotated[tuple[str, ...], BeforeValidator(_addresses)] = _knob(
        (),
        "Addresses of proxies whose X-Forwarded-For and X-Forwarded-Proto are believed, "
        "separated by commas.",
    )

    env: Annotated[Literal["development", "production"], BeforeValidator(_lower)] = _knob(
        "development", "production logs JSON lines. NODE_ENV is read when this is unset."
    )
    roles: Annotated[frozenset[str], BeforeValidator(_roles)] = _knob(
        ROLES, "What this node does: any of api, scheduler, worker."
    )
    config_dir: Path = _knob(Path("config"), "The folder with profiles.json and runProfiles.json.")
    data_dir: Path = _knob(Path(".orbit"), "The folder of the embedded server and its secrets.")
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = (
        _knob("info", "The least important level that is logged.")
    )
    drain_timeout_seconds: float = _knob(
        30.0, "How long work in flight may go on after SIGTERM or SIGINT.", 0, 3600
    )

    global_pause: bool = _knob(False, "No cycle starts while this is true.")
    cron_schedule: _Schedule = _knob(
        "0 0,12 * * *", "When raw cycles (without a run profile) start; empty: never."
    )
    run_profile_cron_schedule: _Schedule = _knob(
        "", "When all enabled run profiles start, besides their own schedules; empty: never."
    )
    timezone: Annotated[str, AfterValidator(_time_zone)] = _knob(
        "UTC", "The time zone of the two schedules."
    )
    misfire_grace_seconds: float = _knob(
        60.0, "A slot that is later than this is missed; the misfire policy decides.", 0, 86_400
    )
    catch_up_limit: int = _knob(
        24, "Missed slots that the policy catch_up starts at most.", 0, 10_000
    )

    lease_seconds: float = _knob(
        30.0, "How long a killed node's work stays with it before another takes over.", 1, 3600
    )
    poll_seconds: float = _knob(
        1.0, "How often a node looks for due work that nobody announced.", 0.01, 60
    )
    worker_concurrency: int = _knob(64, "Cycles in flight on this node.", 1, 10_000)
    max_cycle_recoveries: int = _knob(
        20, "Take-overs without progress after which a cycle fails.", 1, 10_000
    )
    max_payload_bytes: int = _knob(
        10 * _MIB, "The largest payload, in bytes; larger ones are refused.", 1, 1 << 30
    )
    payload_memory_bytes: int = _knob(
        256 * _MIB,
        "Bytes of payloads in hand beyond which this node begins no further work.",
        1,
        1 << 40,
    )
    max_items_per_cycle: int = _knob(
        10_000, "Items that one cycle may be normalised into.", 1, 1_000_000
    )

    dispatch_endpoints: Annotated[tuple[Endpoint, ...], BeforeValidator(_endpoints)] = _secret(
        (),
        "A JSON array of endpoints: key, url, method, token, and optionally headers, "
        "timeout_seconds, max_concurrency, rate_per_second, signing_secret, "
        "permanent_statuses, breaker, on_unknown, proxy, check_url.",
    )
    private_addresses: Annotated[Literal["allow", "refuse"], BeforeValidator(_lower)] = _knob(
        "allow", "Whether requests may go to private and loopback addresses."
    )
    dispatch_concurrency: int = _knob(64, "Requests in flight on this node.", 1, 10_000)
    max_dispatch_retries: int = _knob(
        3, "Retries after the first attempt, then the job is a dead letter.", 0, 1000
    )
    dispatch_retry_base_seconds: float = _knob(1.0, "The first retry's delay.", 0, 3600)
    dispatch_retry_factor: float = _knob(2.0, "By how much each further delay is longer.", 1, 100)
    dispatch_retry_cap_seconds: float = _knob(300.0, "The longest delay.", 0, 86_400)

    telemetry_retention_days: int = _knob(
        30, "Days that telemetry is kept; 0: for ever.", 0, 36_500
    )
    telemetry_hard_limit_days: int = _knob(
        0,
        "Days after which telemetry goes even if a stored consumer has not read it; 0: never.",
        0,
        36_500,
    )
    telemetry_cold_archive_enabled: bool = _knob(False, "Archive telemetry before it is removed.")
    telemetry_parquet_dir: Path | None = _knob(
        None,
        "The folder that archived weeks are written to as Parquet, too; needs the extra `parquet`.",
    )
    proposal_hours: int = _knob(
        72, "Hours after which a proposal that nobody decided on expires.", 1, 8_760
    )
    fact_retention_days: int = _knob(
        0, "Days that cycles, jobs and receipts are kept; 0: for ever.", 0, 36_500
    )

    audit_checkpoint_dir: Path | None = _knob(
        None,
        "The folder that signed checkpoints of the audit trail go to; keep it from the database's "
        "owner. Unset: audit/ in the data folder in embedded mode, else none.",
    )
    audit_checkpoint_command: str | None = _knob(
        None, "A program, without a shell, that gets each checkpoint as a line on its stdin."
    )
    audit_signing_key_file: Path | None = _knob(
        None,
        "The Ed25519 private key (PEM, mode 0600) that signs checkpoints. Unset: one is made in "
        "the data folder in embedded mode, else nothing is signed.",
    )
    audit_checkpoint_seconds: float = _knob(
        60.0, "How often logs that have grown get a checkpoint.", 1, 86_400
    )

    phase4_enabled: bool = _knob(False, "One of the two switches of controlled autonomy.")
    phase4_allow_mutation: bool = _knob(
        False, "The other one; unless both are true, autonomy does nothing."
    )
    probation_hours: int = _knob(
        168,
        "Hours after which a change by autonomy is reverted unless it is kept; never longer than "
        "telemetry is.",
        1,
        8_760,
    )

    warnings: tuple[str, ...] = Field((), description="What was odd, but not wrong.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is handed in: `load_settings` reads the environment, nothing else does."""
        return (init_settings,)

    @model_validator(mode="after")
    def _agree(self) -> Settings:
        """Rules between two settings, one line each."""
        problems = [line for is_broken, line in self._rules() if is_broken]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the API."""
        return _is_loopback(self.host)

    @property
    def watched_hours(self) -> int:
        """How long a change by autonomy is on probation: as long as there is what it rests on."""
        kept = (self.telemetry_retention_days, self.telemetry_hard_limit_days)
        return min([self.probation_hours, *(24 * days for days in kept if days)])

    def _rules(self) -> Iterator[tuple[bool, str]]:
        yield (
            self.database_url is not None and not self.secret_keys,
            "ORBIT_SECRET_KEYS is not set: required with DATABASE_URL, the same on every node",
        )
        yield (
            self.auth == "off" and not self.is_loopback,
            f"ORBIT_AUTH=off: accepted on a loopback address only, and ORBIT_HOST is {self.host}",
        )
        yield (
            self.database_owner_url is not None and self.database_url is None,
            "ORBIT_DATABASE_OWNER_URL is set: accepted only together with DATABASE_URL",
        )
        parquet = "ORBIT_TELEMETRY_PARQUET_DIR is set: "
        yield (
            self.telemetry_parquet_dir is not None and not self.telemetry_cold_archive_enabled,
            f"{parquet}accepted only together with ORBIT_TELEMETRY_COLD_ARCHIVE_ENABLED=true",
        )
        yield (
            self.telemetry_parquet_dir is not None and find_spec("pyarrow") is None,
            f"{parquet}needs pyarrow: pip install 'orbit-control-plane[parquet]'",
        )
        has_target = self.audit_checkpoint_dir or self.audit_checkpoint_command
        yield (
            self.database_url is not None and bool(has_target) != bool(self.audit_signing_key_file),
            "ORBIT_AUDIT_SIGNING_KEY_FILE: accepted together with ORBIT_AUDIT_CHECKPOINT_DIR",
        )
        for low, high in (
            ("database_pool_min", "database_pool_max"),
            ("max_payload_bytes", "payload_memory_bytes"),
            ("dispatch_retry_base_seconds", "dispatch_retry_cap_seconds"),
        ):
            least, most = getattr(self, low), getattr(self, high)
            yield (
                least > most,
                f"{_names(low)[0]}={_text(least)}: at most {_names(high)[0]} ({_text(most)})",
            )


# --- reading -----------------------------------------------------------------------------

_NAMES = {"database_url": ("DATABASE_URL",), "port": ("PORT",), "env": ("ORBIT_ENV", "NODE_ENV")}
_MAY_BE_EMPTY = frozenset({"cron_schedule", "run_profile_cron_schedule"})
_READ_ELSEWHERE = {
    "ORBIT_URL": "The node that the command line asks. Unset: the one at ORBIT_HOST and PORT.",
    "ORBIT_API_KEY": "The access key that the command line shows. Unset: the embedded "
    "instance's own, which is not sent to ORBIT_URL.",
    "ORBIT_RECEIVER_TOKEN": "The bearer token that every delivery to `orbit receiver` must bring.",
    "ORBIT_RECEIVER_SIGNING_SECRET": "The secret that signs every delivery to `orbit receiver`.",
    "SSL_CERT_FILE": "Authorities (PEM) that the certificates of endpoints are verified by.",
    "OTEL_*": "OpenTelemetry's standard variables, which turn on traces and metrics; read from "
    ".env, too.",
}
_GROUPS = {
    "database_url": "Database",
    "port": "HTTP",
    "env": "Node",
    "global_pause": "Schedules",
    "lease_seconds": "Cycles",
    "dispatch_endpoints": "Dispatch",
    "telemetry_retention_days": "Retention",
    "audit_checkpoint_dir": "Audit trail",
    "phase4_enabled": "Controlled autonomy",
}


def load_settings(
    environ: Mapping[str, str] | None = None, env_file: str | Path | None = ".env"
) -> Settings:
    """Reads `environ` (default: the process's) over `env_file` (None, or missing: none).

    Raises SettingInvalid, whose message has one line for each variable that is wrong.
    """
    environ = os.environ if environ is None else environ
    written = _read_file(env_file)
    given = {**written, **environ}
    values: dict[str, Any] = {}
    used: dict[str, str] = {}
    for name in _setting_fields():
        for variable in _names(name):
            value = given.get(variable)
            if name not in values and value is not None and (value or name in _MAY_BE_EMPTY):
                values[name], used[name] = value, variable
    try:
        settings = Settings(**values)
        warnings = tuple(_warnings(given, written.keys() - environ.keys()))
        return settings.model_copy(update={"warnings": warnings})
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
        lines = dict.fromkeys(_line(detail, values, used) for detail in details)
        raise SettingInvalid("\n".join(lines)) from None


def share_with_libraries(env_file: str | Path = ".env") -> None:
    """Puts the OTEL_* variables of `.env` where OpenTelemetry looks: the process's environment."""
    for name, value in _read_file(env_file).items():
        if name.startswith("OTEL_"):
            os.environ.setdefault(name, value)


def _read_file(path: str | Path | None) -> dict[str, str]:
    if path is None or not os.path.lexists(path):
        return {}
    try:
        Path(path).read_text("utf-8")
        source = DotEnvSettingsSource(
            Settings, env_file=path, env_file_encoding="utf-8", case_sensitive=True
        )
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise SettingInvalid(f"{path} cannot be read: {reason}") from None
    return {name: value for name, value in source.env_vars.items() if value is not None}


def _setting_fields() -> dict[str, FieldInfo]:
    fields = dict(Settings.model_fields)
    del fields["warnings"]
    return fields


def _names(name: str) -> tuple[str, ...]:
    return _NAMES.get(name) or (f"ORBIT_{name.upper()}",)


def _warnings(given: Mapping[str, str], in_file_only: Set[str]) -> Iterator[str]:
    known = {variable for name in _setting_fields() for variable in _names(name)}
    for variable in sorted(given):
        is_ours = variable.startswith("ORBIT_") and not variable.startswith("ORBIT_TEST_")
        if variable in _READ_ELSEWHERE:
            if variable in in_file_only:
                yield f"{variable} is read from the environment alone, not from .env"
        elif is_ours and variable not in known:
            yield f"{variable} is not a setting{nearest(variable, known, cutoff=0.75)}"


def _line(detail: ErrorDetails, values: Mapping[str, Any], used: Mapping[str, str]) -> str:
    if not detail["loc"]:
        return reason(detail)
    name = str(detail["loc"][0])
    accepted = reason(detail) if detail["type"] == "value_error" else _accepted(name)
    return f"{used[name]}={_shown(name, values[name])}: accepted is {accepted}"


def _shown(name: str, value: str) -> str:
    """The value on one line and short; what is or may hold a secret is masked."""
    if name in ("database_url", "database_owner_url"):
        value = re.sub(r"((?:^|//)[^:/@]*):.*@", r"\1:***@", value, flags=re.DOTALL)
        value = re.sub(r"(\w*(?i:pas|pw|secret)\w*\s*=).*", r"\1***", value, flags=re.DOTALL)
    elif not _setting_fields()[name].repr:
        return "***"
    return repr(value if len(value) <= 100 else f"{value[:100]}…")


def _accepted(name: str) -> str:
    info = _setting_fields()[name]
    if info.annotation is bool:
        return "true or false"
    if get_origin(info.annotation) is Literal:
        return " or ".join(get_args(info.annotation))
    low, high = (
        next(getattr(item, bound) for item in info.metadata if hasattr(item, bound))
        for bound in ("ge", "le")
    )
    kind = "a whole number" if info.annotation is int else "a number"
    return f"{kind} from {_text(low)} to {_text(high)}"


# --- .env.example ------------------------------------------------------------------------


def env_example() -> str:
    """The text of `.env.example`: every variable with its meaning, range and default."""
    lines = [
        "# Every setting of Orbit with its default. Copy to .env and uncomment what you change;",
        "# the environment wins over this file.",
    ]
    for name, info in _setting_fields().items():
        if name in _GROUPS:
            lines += ["", f"# --- {_GROUPS[name]} ---"]
        lines += ["", *_wrapped(_about(name, info)), f"# {_names(name)[0]}={_text(info.default)}"]
    lines += ["", "# --- Read from the environment alone, not from .env ---"]
    for variable, about in _READ_ELSEWHERE.items():
        lines += ["", *_wrapped(about), f"# {variable}"]
    return "\n".join(lines) + "\n"


def _about(name: str, info: FieldInfo) -> str:
    has_choice = info.annotation in (int, float, bool) or get_origin(info.annotation) is Literal
    choice = f" {_accepted(name)[:1].upper()}{_accepted(name)[1:]}." if has_choice else ""
    return f"{info.description}{choice}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 95, initial_indent="# ", subsequent_indent="# ")


def _text(default: object) -> str:
    """A default as it is written in the environment."""
    match default:
        case None | ():
            return ""
        case bool():
            return str(default).lower()
        case float():
            return f"{default:g}"
        case frozenset():
            return ",".join(sorted(default))
        case tuple():
            return ",".join(map(str, default))
        case _:
            return str(default)


if __name__ == "__main__":
    sys.stdout.write(env_example())
