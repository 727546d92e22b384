"""Every command in README and docs, run as it is written, page by page, with the real program.

What stands in the midst of a sentence, or is not run, is parsed by the program: verb and options.

A page's `sh` blocks go to one shell, in order, in a fresh folder; a block with `file=NAME` is
written there first. Nothing is passed over in silence: a block has a kind, and one that is not run
says why, for a reason that stands here. Only ports and /tmp are others, so that pages may run
beside other work, and ids that a reader copies from what was printed before are looked up.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup
from typer.main import get_command

from orbit.cli.program import app
from tests.delivery.conftest import ROOT, Missing, bare_environment
from tests.scenario.test_cli import free_port

PAGES = [
    *("README.md", "CONTRIBUTING.md", "examples/newsroom/README.md"),
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
]
NOT_RUN = {
    "CI runs it whole",  # .ci/run, and tests/delivery
    "installs packages",  # test_package, test_image
    "needs systemd",  # test_unit_file
    "needs PM2",  # test_pm2
    "needs Docker",  # test_image runs the steps one by one
    "needs your database",  # test_released_schemas, test_cli
    "needs one under way",  # test_dead_letters, test_proposals, test_autonomy_cli
}
KINDS = {"sh", "text", "python", "json", "js", "sql", "mermaid", "ini", "toml"}
PORTS = (3000, 3001, 8787, 9000)
PROJECT = "orbit init project && cd project"
RUNNING = f"{PROJECT}\norbit receiver & RECEIVER=$!\norbit up & NODE=$!"
# What there is before a page that does not begin with nothing.
BEFORE = {
    "docs/operations.md": f"{PROJECT}\norbit receiver --status 503 & RECEIVER=$!",
    "docs/access.md": f"{RUNNING}\nexport ORBIT_API_KEY=$(cat .orbit/admin.key)",
    "docs/audit.md": f"{RUNNING}\norbit trigger nova-daily --watch",
    "docs/halting.md": RUNNING,
    **dict.fromkeys(
        ("docs/telemetry.md", "docs/insight.md", "docs/proposals.md"),
        f"{RUNNING}\norbit trigger nova-daily --watch",
    ),
    "docs/autonomy.md": RUNNING,
}
# In the midst of a page: after its first block (dead letters that the page speaks of).
MIDST = {
    "docs/operations.md": "for number in 1 2 3 4; do orbit trigger nova-daily --watch || true; done"
}
SETTINGS = {"docs/operations.md": {"ORBIT_MAX_DISPATCH_RETRIES": "0"}}
# What a page's run must have printed.
PRINTED = {
    "README.md": (
        "config is valid: 1 profile, 1 run profile",
        "delivered 1 of 1, attempts 1",
        "requeued as",
        '"isNew":true',
        "All is well.",
    ),
    "docs/tutorial.md": (
        "delivered 2 of 2, attempts 2",
        ">> the boiler is back!",
        "it failed, as it should",
        "is halted (epoch 1)",
        "refused with code 4",
    ),
    "docs/howto.md": (
        "GOOD MORNING FROM NOVA.?",
        '"words":4',
        "refused with code 4",
        "the drill passed",
        "it ended with a dead letter",
    ),
    "docs/operations.md": ("status 503", "requeued as"),
    "docs/access.md": ("orb_",),
    "docs/audit.md": ("trail.jsonl",),
    "docs/halting.md": ("is halted (epoch 1)", "the drill passed"),
    "docs/autonomy.md": ("nova is disabled (its file says enabled)", "/state enabled -> disabled"),
    "docs/receiving.md": ("whsec_",),
    "docs/telemetry.md": ("consumer reader is at 0", "consumer reader is removed", '"position":'),
    "docs/insight.md": ("signals; nothing was stored",),
    "docs/proposals.md": ("0 new proposals", "No proposals."),
    "docs/deploying.md": (),
}
PARSED = [*PAGES, "ARCHITECTURE.md", "CHANGELOG.md"]
USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]
_INLINE = re.compile(r"`(orbit\s[^`]+)`")
_FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
_ID = r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}"
_COPIED = (
    (rf"(orbit trace) {_ID}", r"\1 $(field cycles cycleRunId)"),
    (rf"(orbit dlq requeue) {_ID}", r"\1 $(field 'dlq ls' jobId)"),
    (r"(orbit dlq (?:show|requeue|discard)) ID\b", r"\1 $(field 'dlq ls' jobId)"),
    (r"(orbit keys (?:rotate|revoke)) KEY_ID\b", r"\1 $(field 'keys list' keyId)"),
    (r"\bwait (\$\w+)", r"{ wait \1 || true; }"),
)
PRELUDE = """
set -euo pipefail
field() { orbit $1 --json | python3 -c 'import json, sys
print(json.load(sys.stdin)["items"][0][sys.argv[1]])' "$2"; }
ready() { for try in $(seq 3000); do
    if curl --silent --fail --output /dev/null "http://127.0.0.1:$1"; then return; fi; sleep 0.1
done; echo "nothing answers at $1"; exit 1; }
leave() { jobs -p | xargs -r kill 2>/dev/null; wait; }
trap leave EXIT
"""


@dataclass(frozen=True)
class Block:
    """A fenced block: where it is, its kind, its words, and what it says."""

    line: int
    kind: str
    words: str
    body: str

    @property
    def reason(self) -> str | None:
        """Why it is not run, if it says so."""
        _, found, reason = self.words.partition("not-run: ")
        return reason if found else None

    @property
    def file(self) -> str | None:
        """The file that it is, if it says so."""
        _, found, name = self.words.partition("file=")
        return name if found else None


def blocks(page: str) -> Iterator[Block]:
    """A page's fenced blocks, in order."""
    text = (ROOT / page).read_text("utf-8")
    for found in _FENCE.finditer(text):
        kind, _, words = found[1].partition(" ")
        yield Block(text[: found.start()].count("\n") + 1, kind, words, found[2])


def runs(page: str) -> bool:
    """Whether the page has a command that is run."""
    return any(one.kind == "sh" and one.reason is None for one in blocks(page))


def mentions(page: str) -> Iterator[str]:
    """The commands of orbit that no run shows: in sentences, and in blocks that are not run."""
    prose = _FENCE.sub("", (ROOT / page).read_text("utf-8"))
    yield from (" ".join(found.split()) for found in _INLINE.findall(prose))
    for block in blocks(page):
        if block.kind == "sh" and block.reason is not None:
            lines = block.body.replace("\\\n", " ").splitlines()
            yield from (line for line in lines if line.startswith("orbit "))


def parse(mention: str) -> None:
    """Has the program parse a command: `a|b` is a choice of verbs, what is missing is left out.

    Raises USAGE_ERROR for a verb, an option or a value that the program does not take.
    """
    words = shlex.split(mention.replace("\\|", "|"), comments=True)[1:]
    choice = next((one for one in words if re.fullmatch(r"[a-z]+(\|[a-z]+)+", one)), None)
    if choice is not None:
        for verb in choice.split("|"):
            parse(shlex.join(["orbit", *(verb if one == choice else one for one in words)]))
        return
    command, context = get_command(app), None
    while isinstance(command, TyperGroup) and words and not words[0].startswith("-"):
        context = command.make_context("orbit", words.copy(), parent=context)
        _, found, words = command.resolve_command(context, words)
        assert found is not None
        command = found
    for parameter in command.params:
        parameter.required, parameter.callback = False, None
    command.make_context("orbit", words, parent=context)


@pytest.mark.parametrize("page", PARSED)
def test_every_command_in_a_sentence_is_one_that_the_program_takes(page: str) -> None:
    """Its verb is there, and so are its options; words in capitals stand for the reader's own."""
    for mention in mentions(page):
        try:
            parse(mention)
        except USAGE_ERROR as error:
            pytest.fail(f"{page}: `{mention}`: {error}")


@pytest.mark.parametrize("wrong", ["orbit burn", "orbit dlq ls|bury", "orbit dlq ls --al",
                                   "orbit cycles --state odd", "orbit status a b"])  # fmt: skip
def test_a_command_that_the_program_does_not_take_is_found(wrong: str) -> None:
    """A verb, one of several, an option, a value, a word too many."""
    with pytest.raises(USAGE_ERROR):
        parse(wrong)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_has_a_kind_and_what_is_not_run_a_reason(page: str) -> None:
    """A fence without a kind could hide a command; a reason that nobody weighed is none."""
    for block in blocks(page):
        where = f"{page}:{block.line}"
        assert block.kind in KINDS, where
        assert block.reason is None or block.reason in NOT_RUN, where
        if block.kind in {"text", "sql", "mermaid"}:
            assert not re.match(r"(orbit|make|curl|pip|python3?) ", block.body), where


def test_every_page_with_commands_says_what_must_be_printed() -> None:
    """A page that is run, and of which nothing is asked, would show too little."""
    assert {page for page in PAGES if runs(page)} == set(PRINTED)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", [page for page in PAGES if runs(page)])
def test_the_commands_of_a_page_work_as_written(
    page: str, tmp_path: Path, missing: Missing
) -> None:
    """From the first block to the last, each ends well, and prints what the page says."""
    if page == "docs/howto.md" and shutil.which("node") is None:
        missing("Node.js is not there")
    ports = {str(port): str(free_port()) for port in PORTS}
    script = tmp_path / "page.sh"
    script.write_text(_ported(_script(page), ports).replace("/tmp/", f"{tmp_path}/"))
    _put_program(tmp_path / "bin", ports)
    work = tmp_path / "work"
    work.mkdir()
    environment = bare_environment(
        HOME=str(tmp_path), PORT=ports["3000"], NO_PROXY="*", **SETTINGS.get(page, {})
    )
    environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"
    told = tmp_path / "told"
    with told.open("wb") as output:
        shell = subprocess.Popen(
            ["bash", str(script)],
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            code = shell.wait(timeout=600)
        except subprocess.TimeoutExpired:
            code = -1
        finally:
            _end(shell)
    text = told.read_text("utf-8", "replace")
    assert code == 0, f"{page} ended with {code}:\n{text[-6000:]}"
    for expected in PRINTED.get(page, ()):
        assert expected in text, f"{page} does not print {expected!r}:\n{text[-6000:]}"


def _script(page: str) -> str:
    parts = [PRELUDE, _waiting(BEFORE.get(page, ""))]
    midst = MIDST.get(page)
    for block in blocks(page):
        if block.file is not None:
            parts.append(f"cat > {block.file} <<'END-OF-FILE'\n{block.body}END-OF-FILE\n")
        elif block.kind == "sh" and block.reason is None:
            body = block.body
            for pattern, instead in _COPIED:
                body = re.sub(pattern, instead, body)
            parts.append(f"echo {shlex.quote(f'=== {page}:{block.line}')}\n{_waiting(body)}")
            if midst is not None:
                parts.append(midst)
                midst = None
    return "\n".join(parts)


def _waiting(body: str) -> str:
    """The commands with a wait for what each begins in the background: a reader would look."""
    lines = []
    for line in body.splitlines():
        lines.append(line)
        if re.search(r"orbit receiver\b[^|]*& ", line):
            lines.append("ready 8787/health")
        if re.search(r"orbit up & ", line):
            other = re.search(r"PORT=(\d+) orbit up", line)
            lines.append(f"ready {other[1] if other else '3000'}/ready")
        if line.startswith("node "):
            lines.append("ready 9000/")
    return "\n".join(lines)


def _ported(text: str, ports: dict[str, str]) -> str:
    return re.sub(r"(?<![\w.])(3000|3001|8787|9000)\b", lambda found: ports[found[1]], text)


def _put_program(place: Path, ports: dict[str, str]) -> None:
    """`orbit` on PATH: the program of this environment, with the receiver on its other port.

    And `python` as many systems have it: not at all.
    """
    place.mkdir()
    (place / "python").write_text("#!/bin/sh\necho 'python: not found' >&2\nexit 127\n")
    (place / "python").chmod(0o755)
    program = place / "orbit"
    real = shlex.quote(str(Path(sys.executable).with_name("orbit")))
    program.write_text(
        f"""#!/bin/bash
case "$1" in
receiver) exec {real} "$@" --port {ports["8787"]} ;;
init) {real} "$@" && sed -i 's/:8787/:{ports["8787"]}/' "$2/.env" ;;
*) exec {real} "$@" ;;
esac
"""
    )
    program.chmod(0o755)


def _end(shell: subprocess.Popen[bytes]) -> None:
    """Ends whatever the page has left."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(shell.pid, number)
            shell.wait(timeout=60)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
