"""The program `orbit` as people run it: every verb, its exit codes and its JSON."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from orbit.cli.scaffold import write_project
from orbit.database.embedded import APPLICATION_ROLE, EmbeddedServer
from orbit.database.upgrade import upgrade

PROGRAM = Path(sys.executable).with_name("orbit")
COMMAND = [str(PROGRAM)] if PROGRAM.exists() else [sys.executable, "-m", "orbit"]
ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_PATIENCE_SECONDS = 300  # a program takes so long only when something is wrong
_ports = itertools.count(12_000 + os.getpid() * 100 % 20_000)  # other workers': further on
STEPS = """
import asyncio
import pathlib

async def broken(payload, context):
    raise RuntimeError("this step is broken")


async def slow(payload, context):
    while not pathlib.Path("go").exists():
        await asyncio.sleep(0.02)
    return payload
"""


def clean_environment(**given: str) -> dict[str, str]:
    """This process's environment without its Orbit settings, and what is given."""
    ours = ("ORBIT_", "DATABASE_URL", "NODE_ENV", "PORT", "NO_COLOR", "FORCE_COLOR", "COLUMNS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | given


def free_port() -> int:
    """A port that nobody listens on, nor will: each is given once, and the system gives others.

    It gives those from 32,768, or from higher up.
    """
    for port in _ports:
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError


@dataclass
class Project:
    """A folder that `orbit` runs in, and its environment."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def run(
        self, *arguments: str, stdin: str = "", **given: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs the program to its end, with an environment of its own."""
        result = subprocess.run(
            [*COMMAND, *arguments],
            cwd=self.folder,
            env=clean_environment(**self.environment | given),
            input=stdin,
            text=True,
            check=False,
            capture_output=True,
            timeout=_PATIENCE_SECONDS,
        )
        assert "Traceback" not in result.stderr, result.stderr
        return result

    def ok(self, *arguments: str, **given: str) -> str:
        """Runs a verb that must succeed; what it printed."""
        result = self.run(*arguments, **given)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def json(self, *arguments: str, code: int = 0, **given: str) -> Any:
        """Runs a verb with --json; its document."""
        result = self.run(*arguments, "--json", **given)
        assert result.returncode == code, result.stdout + result.stderr
        return json.loads(result.stdout)

    @contextmanager
    def running(self, *arguments: str) -> Iterator[None]:
        """A verb that stays; stopped by SIGTERM, on which it must end with 0."""
        log = self.folder / f"{arguments[0]}.log"
        with log.open("wb") as output:
            child = subprocess.Popen(
                [*COMMAND, *arguments],
                cwd=self.folder,
                env=clean_environment(**self.environment),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            yield
        finally:
            child.send_signal(signal.SIGTERM)
            code = child.wait(_PATIENCE_SECONDS)
        assert code == 0, log.read_text(errors="replace")


def wait_for(condition: Callable[[], bool], what: str, seconds: float = _PATIENCE_SECONDS) -> None:
    """Polls until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)


def answers(url: str) -> bool:
    """Whether the URL answers 200."""
    with suppress(httpx.TransportError):
        return httpx.get(url, timeout=2, trust_env=False).status_code == 200
    return False


def edit_run_profiles(folder: Path, *more: dict[str, Any]) -> None:
    """Adds run profiles, each like the first but for what is given."""
    path = folder / "config" / "runProfiles.json"
    content = json.loads(path.read_text())
    first = content["run_profiles"][0]
    first["execution_policy"].pop("schedule")
    content["run_profiles"] += [{**first, **one} for one in more]
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project with its receiver and its node up: works, fails, is off, goes nowhere."""
    folder = tmp_path_factory.mktemp("cli") / "project"
    port, receiver_port = free_port(), free_port()
    endpoints = [
        {"key": "default-endpoint", "url": f"http://127.0.0.1:{receiver_port}/posts"},
        {"key": "closed", "url": f"http://127.0.0.1:{free_port()}/"},
    ]
    made = Project(
        folder,
        {
            "PORT": str(port),
            "ORBIT_DISPATCH_ENDPOINTS": json.dumps(endpoints),
            "ORBIT_MAX_DISPATCH_RETRIES": "0",
        },
    )
    write_project(folder)
    with (folder / "steps.py").open("a") as steps:
        steps.write(STEPS)
    broken = {"tiers": {"tier1": [{"use": "steps:broken"}]}, "retry": {"max_attempts": 1}}
    slow = {"tiers": {"tier1": [{"use": "steps:slow"}]}}
    edit_run_profiles(
        folder,
        {"run_profile_id": "nova-slow", "execution_policy": slow, "state": "enabled"},
        {"run_profile_id": "nova-broken", "state": "enabled", "execution_policy": broken},
        {"run_profile_id": "nova-off", "state": "disabled"},
        {"run_profile_id": "nova-nowhere", "distribution_targets": ["closed"]},
    )
    with ExitStack() as stack:
        for arguments in (["receiver", "--port", str(receiver_port)], ["up"]):
            stack.enter_context(made.running(*arguments))
        wait_for(lambda: answers(f"http://127.0.0.1:{receiver_port}/health"), "the receiver")
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/ready"), "the node")
        yield made


@pytest.fixture
def joined(alone: Project) -> Iterator[Project]:
    """The same with its schema, and with its server kept up between the verbs."""
    server = EmbeddedServer.start(alone.folder / ".orbit")
    upgrade(server.owner_dsn, APPLICATION_ROLE)
    yield alone
    server.leave()


@pytest.fixture
def alone(tmp_path: Path) -> Project:
    """A fresh project without a node, at an address where nobody is."""
    write_project(tmp_path)
    return Project(tmp_path, {"PORT": str(free_port())})


def test_help_and_version_start_quickly(tmp_path: Path) -> None:
    """`orbit --help` lists every verb and imports nothing that is slow to import."""
    here = Project(tmp_path)
    text = here.ok("--help")
    for verb in "up init demo validate trigger status cycles trace dlq db doctor plan".split():
        assert re.search(rf"^  {verb} ", text, re.MULTILINE), verb
    assert here.ok("--version").startswith("orbit ")
    assert here.ok() == text
    script = "import sys, orbit.cli; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", script], text=True).split()
    heavy = {"fastapi", "psycopg", "pydantic", "httptools", "httpx", "rich", "alembic", "uvicorn"}
    assert not heavy & set(loaded)


def test_a_shell_completes_verbs_options_and_values(tmp_path: Path) -> None:
    """What `--show-completion` prints for bash, taken up by a bash, which is then asked."""
    script = """
        eval "$(orbit --show-completion)"
        complete -p orbit
        asked() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _orbit_completion orbit; }
        for words in 'dl' 'trigger --na' 'cycles --state f'; do
            asked orbit $words; echo "${COMPREPLY[*]}"
        done
    """
    path = f"{PROGRAM.parent}:{os.environ['PATH']}"
    told = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=clean_environment(PATH=path),
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    registered, *completed = told.stdout.split("\n", 1)
    assert registered.endswith("_orbit_completion orbit"), told.stderr
    assert " ".join(completed).split() == ["dlq", "--namespace", "finished", "failed"]


def test_usage_errors_exit_with_2(tmp_path: Path) -> None:
    """A command line that cannot be used gets one line and code 2, and a document with --json."""
    here = Project(tmp_path)
    for arguments in (
        ["nonsense"],
        ["cycles", "--limit", "many"],
        ["trigger", "--raw", "nova"],
        ["trigger", "--payload", "x"],
        ["receiver", "--fail-rate", "2"],
    ):
        result = here.run(*arguments)
        assert result.returncode == 2, arguments
        assert re.fullmatch(r"error: .+\n", result.stderr), result.stderr
    assert here.json("nonsense", code=2)["code"] == "request_invalid"


def test_init_makes_a_valid_project_and_overwrites_nothing(tmp_path: Path) -> None:
    """What `init` makes is valid; a second one names what is there and changes nothing."""
    here = Project(tmp_path)
    made = here.json("init", "new")["files"]
    files = {"README.md", "config/profiles.json", "config/runProfiles.json", "steps.py"}
    names = {".env", ".gitignore", *files}
    assert {str(Path(one).relative_to("new")) for one in made} == names
    assert Project(tmp_path / "new").json("validate")["runProfiles"] == 1
    (tmp_path / "new" / "README.md").unlink()
    (tmp_path / "new" / "steps.py").write_text("# mine")
    refused = here.run("init", "new")
    assert refused.returncode == 1
    assert "new/steps.py" in refused.stderr
    assert "new/README.md" not in refused.stderr
    assert not (tmp_path / "new" / "README.md").exists()
    here.ok("init", "new", "--force")
    assert "greet" in (tmp_path / "new" / "steps.py").read_text()


def test_validate_names_every_problem_with_its_place(alone: Project) -> None:
    """Each problem of both files has its file, line and pointer; code 1, and all in the JSON."""
    path = alone.folder / "config" / "runProfiles.json"
    text = path.read_text().replace("steps:greet", "steps:gone").replace("0 6 * * *", "61 * * * *")
    path.write_text(text)
    result = alone.run("validate")
    assert result.returncode == 1
    headline, *problems = result.stderr.splitlines()
    assert headline == "error: the configuration is invalid: 2 problems"
    assert all(re.match(r"  config/runProfiles.json:\d+ /run_profiles/0/", one) for one in problems)
    document = alone.json("validate", code=1)
    assert document["code"] == "configuration_invalid"
    assert [one["line"] for one in document["problems"]] == [9, 11]
    elsewhere = alone.run("validate", "--config-dir", "nowhere")
    assert elsewhere.returncode == 1
    assert "nowhere/profiles.json" in elsewhere.stderr


def test_validate_checks_what_a_step_takes(alone: Project) -> None:
    """A step that cannot take (payload, context) is a complaint with its line and pointer."""
    with (alone.folder / "steps.py").open("a") as steps:
        steps.write("\n\ndef lonely(payload):\n    return payload\n")
    path = alone.folder / "config" / "runProfiles.json"
    content = json.loads(path.read_text())
    tier = {"tier1": [{"use": "steps:lonely"}]}
    content["run_profiles"][0]["execution_policy"]["tiers"] = tier
    path.write_text(json.dumps(content, indent=1))
    (problem,) = alone.json("validate", code=1)["problems"]
    assert problem["pointer"] == "/run_profiles/0/execution_policy/tiers/tier1/0/use"
    assert problem["line"] > 1
    assert "it is called with (payload, context), and takes (payload)" in problem["message"]


def test_init_keeps_secrets_out_of_git(alone: Project) -> None:
    """`init` writes a .gitignore, and leaves one alone that is there, also when forced."""
    path = alone.folder / ".gitignore"
    assert {".orbit/", ".env"} <= set(path.read_text().splitlines())
    path.write_text("mine\n")
    alone.ok("init", "--force")
    assert path.read_text() == "mine\n"


def test_what_is_no_orbit_node_is_said(alone: Project) -> None:
    """An ORBIT_URL where something else answers is named as such, whatever it answers."""

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"[]")

        def log_message(self, *given: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        result = alone.run("cycles", ORBIT_URL=url)
        server.shutdown()
    assert result.returncode == 1
    assert f"error: what answers at {url} is no Orbit node" in result.stderr


def test_a_bad_setting_is_one_line(alone: Project) -> None:
    """A setting that cannot be used stops any verb with one line; an unknown one is a warning."""
    result = alone.run("plan", ORBIT_LEASE_SECONDS="soon")
    assert result.returncode == 1
    assert result.stderr.startswith("error: ORBIT_LEASE_SECONDS='soon'")
    warned = alone.run("plan", ORBIT_LEASE_SECOND="5")
    assert warned.returncode == 0
    assert "warning: ORBIT_LEASE_SECOND is not a setting" in warned.stderr


def test_plan_shows_slots_and_reasons(alone: Project) -> None:
    """`plan` shows each slot in UTC and local time, and why what is disabled won't run."""
    path = alone.folder / "config" / "runProfiles.json"
    path.write_text(path.read_text().replace('"UTC"', '"Asia/Tokyo", "jitter_seconds": 60'))
    text = alone.ok("plan")
    assert re.search(r"T21:00:00Z  \S+ 06:00:00 Asia/Tokyo  \+.+ nova-daily +yes", text)
    path.write_text(path.read_text().replace('"enabled"', '"disabled"'))
    document = alone.json("plan", "--hours", "48")
    assert len(document["items"]) == 2
    assert {one["willRun"] for one in document["items"]} == {False}
    assert document["items"][0]["reason"] == "run profile nova-daily is disabled"


def test_verbs_do_not_make_a_database(alone: Project) -> None:
    """With no node and no data, asking fails with what to do, and leaves nothing behind."""
    result = alone.run("status")
    assert result.returncode == 1
    assert "orbit up" in result.stderr
    assert "there is no database" in alone.run("db", "check").stderr
    assert not (alone.folder / ".orbit").exists()
    named = alone.run("status", ORBIT_URL=f"http://127.0.0.1:{free_port()}")
    assert named.returncode == 1
    assert "does not answer" in named.stderr


def test_db_verbs_upgrade_check_and_print_the_schema(alone: Project) -> None:
    """`db upgrade` makes the schema, `db check` finds it good, `db sql` is a whole script."""
    made = alone.json("db", "upgrade")
    assert (made["before"], made["isChanged"]) == (None, True)
    assert alone.json("db", "upgrade")["isChanged"] is False
    document = alone.json("db", "check")
    assert document["isGood"] is True
    assert {one["name"] for one in document["checks"]} == {"server", "schema", "partitions"}
    assert "CREATE TABLE cycle_run" in alone.ok("db", "sql")
    assert all(count == 0 for count in alone.json("db", "repair").values())


def test_what_repair_rebuilds_is_an_entry_of_the_trail(alone: Project) -> None:
    """A cycle's lease that was lost is made anew, and the installation's log says by whom."""
    server = EmbeddedServer.start(alone.folder / ".orbit")
    try:
        upgrade(server.owner_dsn, APPLICATION_ROLE)
        alone.json("trigger", "--raw")
        with psycopg.connect(server.owner_dsn) as connection:
            assert connection.execute("DELETE FROM cycle_lease").rowcount == 1
        assert alone.json("db", "repair")["cycles"] == 1
        (told,) = alone.json("audit", "ls", "--action", "leases.rebuilt")["items"]
        assert (told["namespace"], told["detail"]["cycles"]) == ("*", 1)
        assert told["actor"].endswith("(cli)")
        assert alone.json("audit", "verify")["isGood"] is True
    finally:
        server.leave()


def test_doctor_says_what_to_do(alone: Project) -> None:
    """`doctor` names what is not good and what to do; code 1 then, 0 when all is well."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = f"127.0.0.1:{listener.getsockname()[1]}"
    endpoints = json.dumps([{"key": "default-endpoint", "url": f"http://{closed}/"}])
    ill = alone.run("doctor", ORBIT_DISPATCH_ENDPOINTS=endpoints)
    assert ill.returncode == 1
    looked = "✗ endpoint default-endpoint connection"
    assert f"{looked}: {closed} does not accept connections" in ill.stdout
    assert "→ start it" in ill.stdout
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://localhost:{listener.getsockname()[1]}/"
        endpoints = json.dumps([{"key": "default-endpoint", "url": url}])
        well = alone.json("doctor", ORBIT_DISPATCH_ENDPOINTS=endpoints)
        assert well["isGood"] is True
        looks = {one["facts"].get("look") for one in well["checks"]}
        assert {"name", "connection", "token", "clock", "retries"} <= looks
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = alone.run("doctor", PORT=str(other.getsockname()[1]))
        assert "✗ address: " in taken.stdout


def test_without_a_node_verbs_ask_the_database(joined: Project) -> None:
    """With no node up, a trigger is stored and said to wait, unless all is paused (code 4)."""
    paused = joined.json("trigger", "--raw", code=4, ORBIT_GLOBAL_PAUSE="true")
    assert paused["code"] == "global_pause"
    assert joined.ok("cycles") == "No cycle.\n"
    result = joined.run("trigger", "--raw", "--payload", "-", stdin="hello")
    assert result.returncode == 0, result.stderr
    assert "No node is up" in result.stderr
    (cycle_id,) = [found.group() for found in ID.finditer(result.stdout)]
    listed = joined.json("cycles")["items"]
    assert [(one["cycleRunId"], one["state"]) for one in listed] == [(cycle_id, "running")]
    text = joined.ok("status")
    assert "No node answers" in text
    assert re.search(r"^active cycles +1", text, re.MULTILINE)
    assert joined.run("trigger", "--raw", "--watch").returncode == 1


def test_trigger_watch_follows_to_the_end(project: Project) -> None:
    """`trigger --watch` prints each stage once, in order, and ends with 0 when all is delivered."""
    text = project.ok("trigger", "nova-daily", "--watch")
    stages = re.findall(r"  ((?:cycle|tier\d|normalization|dispatch)_\w+)$", text, re.MULTILINE)
    assert stages == [
        "cycle_started",
        "tier1_complete",
        "tier2_complete",
        "tier3_complete",
        "normalization_complete",
        "dispatch_enqueued",
        "dispatch_complete",
        "cycle_finished",
    ]
    assert "delivered 1 of 1, attempts 1" in text
    assert text.rstrip().endswith("finished")


def test_trigger_is_idempotent_by_key(project: Project) -> None:
    """The same key gives the same cycle; JSON is the API's, with the cycles when watched."""
    arguments = ("trigger", "nova-daily", "--idempotency-key", "once")
    first = project.json(*arguments, "--watch")
    again = project.json(*arguments)
    assert first["items"][0]["cycleRunId"] == again["items"][0]["cycleRunId"]
    assert first["cycles"][0]["cycle"]["state"] == "finished"
    assert "cycles" not in again


def test_insight_replays_what_is_stored(project: Project) -> None:
    """Over the API, storing nothing: events, profiles, and that there is little to draw from."""
    project.ok("trigger", "nova-daily", "--watch")
    found = project.json("insight", "replay", "--namespace", "brand-a")
    assert found["events"] > 0
    assert found["profiles"] >= 1
    assert (found["signals"], found["drawnFrom"], found["scores"]) == ([], 0, [])
    assert project.json("insight", "replay", "--namespace", "nowhere")["events"] == 0
    text = project.run("insight", "replay")
    assert "nothing was stored" in text.stdout
    assert "100 cycles" in text.stderr


def test_a_consumer_is_told_each_event_once(project: Project) -> None:
    """`telemetry replay --consumer` goes on where it was; the place is listed, moved, let go."""
    project.ok("trigger", "nova-daily", "--watch")
    added = project.json("telemetry", "consumers", "add", "bi", "--reason", "a warehouse")
    assert (added["name"], added["position"]) == ("bi", 0)
    replay = ("telemetry", "replay", "--consumer", "bi", "--json")

    def told() -> list[int]:
        return [json.loads(line)["position"] for line in project.ok(*replay).splitlines()]

    read, more = told(), True
    while more:
        more = bool(found := told())
        read += found
    assert read == list(range(1, len(read) + 1))
    assert len(read) >= 5
    table = project.ok("telemetry", "consumers", "ls")
    assert re.search(rf"^bi +{len(read)} +0 +0 ", table, re.MULTILINE)
    assert project.json("telemetry", "consumers", "commit", "bi", "2")["position"] == len(read)
    beyond = project.run("telemetry", "consumers", "commit", "bi", "999999")
    assert beyond.returncode == 2
    assert "expected a position that was given" in beyond.stderr
    assert project.run(*replay, "--after", "1").returncode == 2
    assert project.run("telemetry", "consumers", "add", "bi").returncode == 3
    project.ok("telemetry", "consumers", "rm", "bi", "--reason", "no longer used")
    assert project.json("telemetry", "consumers", "ls")["items"] == []
    assert project.run("telemetry", "replay", "--consumer", "bi").returncode == 1


def test_a_consumer_passes_what_is_not_for_it(project: Project) -> None:
    """Of a namespace in which nothing happens nothing is told, and retention waits for nobody."""
    project.ok("trigger", "nova-daily", "--watch")
    project.ok("telemetry", "consumers", "add", "quiet", "--namespace", "quiet")
    replay = ("telemetry", "replay", "--consumer", "quiet", "--namespace", "quiet")
    behind = 1
    while behind:  # until the events of the cycle's end are numbered too
        assert project.ok(*replay) == ""
        [consumer] = project.json("telemetry", "consumers", "ls")["items"]
        assert consumer["position"] > 0
        behind = consumer["behind"]
    project.ok("telemetry", "consumers", "rm", "quiet")


def test_a_failed_cycle_is_code_1_and_runs_again(project: Project) -> None:
    """A failing step ends --watch with 1; --rerun names the old cycle; a finished one refuses."""
    failed = project.run("trigger", "nova-broken", "--watch")
    assert failed.returncode == 1
    assert "this step is broken" in failed.stdout
    (cycle_id, *_) = [found.group() for found in ID.finditer(failed.stdout)]
    rerun = project.json("trigger", "--rerun", cycle_id, "--from", "start", "--watch", code=1)
    assert rerun["cycles"][0]["cycle"]["rerunOf"] == cycle_id
    assert f"re-run as       {rerun['cycleRunId']}" in project.ok("trace", cycle_id)
    project.json("trigger", "--rerun", cycle_id, "--force", "--watch", code=1)
    assert project.run("trigger", "nova-daily", "--force").returncode == 2
    finished = project.json("trigger", "nova-daily", "--watch")["cycles"][0]["cycle"]["cycleRunId"]
    refused = project.run("trigger", "--rerun", finished)
    assert refused.returncode == 3
    assert "only a failed one runs again" in refused.stderr


def test_refusals_have_their_codes(project: Project) -> None:
    """What is disabled is refused with 3 and its reason; what is unknown fails with 1."""
    refused = project.run("trigger", "nova-off")
    assert refused.returncode == 3
    assert "skipped: run profile nova-off is disabled" in refused.stdout
    assert project.json("trigger", "nobody", code=1)["code"] == "not_found"
    nowhere = project.run("trigger", "--raw", "--endpoint", "nowhere")
    assert nowhere.returncode == 2
    assert "unknown endpoint nowhere" in nowhere.stderr
    assert project.run("trace", "nothing").returncode == 1


def test_trace_tells_the_whole_story(project: Project) -> None:
    """`trace` shows initiation, stages, steps, items, jobs and attempts with whole digests."""
    payload = project.folder / "payload.txt"
    payload.write_text("hello")
    digest = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    arguments = ["--raw", "--payload", str(payload), "--content-type", "text/plain"]
    watched = project.json("trigger", *arguments, "--namespace", "brand-b", "--watch")
    cycle_id = watched["cycleRunId"]
    text = project.ok("trace", cycle_id)
    assert re.search(r"^  initiation +sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    assert f"[0] text/plain  5 B  sha256:{digest}" in text
    assert re.search(r"attempt 1  \S+Z  delivered  200  \d+", text)
    assert "brand-b (raw)" in text
    assert project.json("trace", cycle_id)["jobs"][0]["digest"] == digest


def test_cycles_filters(project: Project) -> None:
    """`cycles` filters by state and run profile, and says when there is more."""
    project.run("trigger", "nova-broken", "nova-daily", "--watch")
    failed = project.json("cycles", "--state", "failed", "--run-profile", "nova-broken")["items"]
    assert failed
    assert {(one["state"], one["runProfileId"]) for one in failed} == {("failed", "nova-broken")}
    assert project.json("cycles", "--namespace", "nowhere")["items"] == []
    one = project.run("cycles", "--limit", "1")
    assert len(one.stdout.splitlines()) == 2
    assert "more" in one.stderr


def test_dead_letters_are_shown_requeued_and_discarded(project: Project) -> None:
    """A dead letter is listed and shown; requeued once, not twice unless forced; discarded."""
    watched = project.json("trigger", "nova-nowhere", "--watch", code=1)
    assert watched["cycles"][0]["cycle"]["state"] == "finished", "it is 1 for the dead letter"
    (job,) = watched["cycles"][0]["jobs"]
    job_id = job["jobId"]
    assert job["state"] == "dead_lettered"
    assert job_id in project.ok("dlq", "ls")
    shown = project.ok("dlq", "show", job_id)
    assert "endpoint        closed: POST http://127.0.0.1" in shown
    assert "attempt 1" in shown
    assert f"cycle {watched['cycles'][0]['cycle']['cycleRunId']}" in project.ok("trace", job_id)
    requeued = project.ok("dlq", "requeue", job_id, "--reason", "try again")
    assert ID.search(requeued)
    twice = project.run("dlq", "requeue", job_id)
    assert twice.returncode == 3
    assert "error: " in twice.stderr
    project.ok("dlq", "requeue", job_id, "--force", "--snapshot", "old", "--reason", "again")
    letters = project.json("dlq", "ls", "--endpoint", "closed")["items"]
    assert job_id not in {one["jobId"] for one in letters}
    wait_for(lambda: bool(project.json("dlq", "ls")["items"]), "the requeued one fails too")
    (other, *_) = project.json("dlq", "ls")["items"]
    project.ok("dlq", "discard", other["jobId"], "--reason", "given up")
    assert "given up" in project.ok("dlq", "show", other["jobId"])
    assert project.run("dlq", "discard", job_id).returncode == 2


def test_lanes_are_listed_and_shown(project: Project) -> None:
    """`lanes` lists what had jobs; with an endpoint it shows limits, or that there is no lane."""
    project.ok("trigger", "nova-daily", "--watch")
    assert re.search(r"^brand-a +default-endpoint +0 +0 ", project.ok("lanes"), re.MULTILINE)
    (found,) = [
        one
        for one in project.json("lanes", "brand-a")["items"]
        if one["endpointKey"] == "default-endpoint"
    ]
    assert found["breaker"] == "closed"
    assert found["attempts"]["delivered"] >= 1
    shown = project.ok("lanes", "brand-a", "default-endpoint")
    assert "  places          16 over all nodes" in shown
    assert "10 failures in a row, or 70% of at least 20 attempts within 60.0 s" in shown
    detail = project.json("lanes", "brand-a", "default-endpoint")
    assert detail["limits"]["breaker"]["holdSeconds"] == 10
    unknown = project.run("lanes", "nowhere", "default-endpoint")
    assert unknown.returncode == 1
    assert "there is no lane nowhere/default-endpoint" in unknown.stderr


def test_status_and_profiles(project: Project) -> None:
    """`status` shows the node; `--why` says why a run profile isn't running; `profiles` lists."""
    text = project.ok("status", "--why")
    assert re.search(r"^paused +no$", text, re.MULTILINE)
    assert re.search(r"^failed cycles +\d+ in 24 h", text, re.MULTILINE)
    assert re.search(r"alive +api, scheduler, worker", text)
    assert re.search(r"nova-off +run profile nova-off is disabled", text)
    assert re.search(r"nova-daily +it has no schedule: only when triggered", text)
    document = project.json("status")
    assert document["isPaused"] is False
    assert len(document["nodes"]) == 1
    listed = project.ok("profiles")
    assert re.search(r"nova-off +brand-a +nova +disabled \(.+\)", listed)
    assert len(project.json("profiles")["runProfiles"]) == 5


def test_files_that_are_not_in_force_are_said(project: Project) -> None:
    """`validate`, `plan` and `doctor` say so where a running node has another revision in force."""
    words = "The files differ from the configuration in force"
    assert words not in project.run("validate").stderr
    path = project.folder / "config" / "profiles.json"
    before = path.read_text()
    path.write_text(before.replace('"label": "', '"label": "another '))
    try:
        assert words in project.run("validate").stderr
        assert words in project.run("plan").stderr
        assert words in project.run("doctor").stdout
        assert project.json("validate")["otherRevisionInForce"]
    finally:
        path.write_text(before)
    assert project.json("plan")["otherRevisionInForce"] is None


def test_watching_without_a_worker_says_so(tmp_path: Path) -> None:
    """`trigger --watch` says after a moment that no node with the role worker is alive."""
    write_project(tmp_path)
    port = free_port()
    here = Project(tmp_path, {"PORT": str(port), "ORBIT_ROLES": "api"})
    with here.running("up"):
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/ready"), "the node")
        child = subprocess.Popen(
            [*COMMAND, "trigger", "nova-daily", "--watch"],
            cwd=here.folder,
            env=clean_environment(**here.environment),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert child.stderr is not None
        line = child.stderr.readline()
        child.kill()
        child.communicate(timeout=_PATIENCE_SECONDS)
    assert line.startswith("Nobody works on this")


def test_doctor_finds_the_node(project: Project) -> None:
    """With a node up, `doctor` says that it answers at its address."""
    assert f"✓ address: a node answers at http://127.0.0.1:{project.environment['PORT']}" in (
        project.run("doctor").stdout
    )


def test_narrow_terminals_cut_no_id(project: Project) -> None:
    """On a terminal of 50 columns ids are whole; with NO_COLOR nothing is styled."""
    pty = pytest.importorskip("pty")
    cycle_id = project.json("trigger", "nova-daily", "--watch")["cycles"][0]["cycle"]["cycleRunId"]
    reader, writer = pty.openpty()
    environment = clean_environment(**project.environment, NO_COLOR="1", COLUMNS="50", TERM="xterm")
    child = subprocess.Popen(
        [*COMMAND, "cycles", "--limit", "1"],
        cwd=project.folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=writer,
        stderr=subprocess.DEVNULL,
    )
    os.close(writer)
    shown = b""
    with suppress(OSError):
        while chunk := os.read(reader, 65536):
            shown += chunk
    os.close(reader)
    assert child.wait(_PATIENCE_SECONDS) == 0
    assert cycle_id in shown.decode()
    assert b"\x1b[3" not in shown


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    """Writing into a pipe that nobody reads ends quietly, as with any program."""
    reader, writer = os.pipe()
    os.close(reader)
    child = subprocess.Popen(
        [*COMMAND, "--help"],
        cwd=tmp_path,
        env=clean_environment(),
        stdout=writer,
        stderr=subprocess.PIPE,
    )
    os.close(writer)
    _, errors = child.communicate(timeout=_PATIENCE_SECONDS)
    assert (child.returncode, errors) == (1, b"")


def test_ctrl_c_is_quiet(project: Project) -> None:
    """SIGINT while watching ends with 130 and no traceback, and leaves the cycle be."""
    child = subprocess.Popen(
        [*COMMAND, "trigger", "nova-slow", "--watch"],
        cwd=project.folder,
        env=clean_environment(**project.environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background has SIGINT ignored, and its children too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )
    assert child.stdout is not None
    started, following = child.stdout.readline(), child.stdout.readline()
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=_PATIENCE_SECONDS)
    assert "cycle_started" in following
    assert (child.returncode, errors) == (130, "The cycles go on; see `orbit cycles`.\n")
    found = ID.search(started)
    assert found
    (project.folder / "go").touch()
    done = lambda: project.json("trace", found.group())["cycle"]["state"] == "finished"  # noqa: E731
    wait_for(done, "the cycle")


def test_demo_shows_what_arrived(tmp_path: Path) -> None:
    """`demo` runs one cycle from nothing to the receiver, shows ids and digests, ends with 0."""
    here = Project(tmp_path)
    text = here.ok("demo", "--dir", "shown")
    assert len(ID.findall(text)) >= 3
    assert re.search(r"sha256:[0-9a-f]{64}", text)
    assert "POST /posts" in text
    assert list((tmp_path / "shown" / ".orbit" / "received").glob("brand-a/nova-daily/*.txt"))
