"""What the command line shows: tables, times, a cycle's story, and how errors end."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from orbit.cli import terminal
from orbit.cli.dead_letters import letter_lines
from orbit.cli.lanes import lane_lines
from orbit.cli.lineage import job_counts, lineage_lines, state_of, story_of
from orbit.cli.outcome import ApiProblem, ExitCode, NodeUnreachable, exit_code_of, report
from orbit.cli.requeues import progress
from orbit.cli.status import held_lines, last_slots, why_not_running
from orbit.cli.watching import changes, stages_table
from orbit.errors import (
    ConfigurationInvalid,
    CyclesActive,
    GlobalPause,
    OrbitError,
    Problem,
    RequestInvalid,
)

CYCLE_ID = "019e1f5e-7c00-7a00-8000-0000000000aa"
JOB_ID = "019e1f5e-7c00-7a00-8000-0000000000bb"
DIGEST = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
AT = "2026-05-01T06:00:00.123456Z"


def lineage(**given: Any) -> dict[str, Any]:
    """The JSON of a finished cycle with one job, as the API gives it."""
    output = {"digest": DIGEST, "contentType": "text/plain", "size": 5}
    cycle: dict[str, Any] = {
        "cycleRunId": CYCLE_ID,
        "namespace": "brand-a",
        "profileId": "nova",
        "runProfileId": "nova-daily",
        "trigger": "cli",
        "slotAt": None,
        "state": "finished",
        "stage": "cycle_finished",
        "createdAt": AT,
        "endedAt": AT,
        "deadLettered": 0,
        "isWaiting": False,
        "rerunOf": None,
        "reason": None,
        "reruns": [],
        "initiation": {"hash": DIGEST, "context": {}},
    }
    receipt = {
        "attempt": 1,
        "outcome": "failed",
        "status": 500,
        "error": "the receiver said\x1b[31m no",
        "latency": {"totalSeconds": 0.0031},
        "startedAt": AT,
    }
    job = {
        **output,
        "jobId": JOB_ID,
        "itemIndex": 0,
        "endpointKey": "default-endpoint",
        "url": "http://127.0.0.1:8787/posts",
        "method": "POST",
        "state": "delivered",
        "attempts": 2,
        "cause": None,
        "receipts": [receipt, {**receipt, "attempt": 2, "outcome": "delivered", "error": None}],
    }
    checkpoint = {**output, "stage": "cycle_started", "detail": {}, "createdAt": AT}
    return {
        "cycle": {**cycle, **given},
        "checkpoints": [checkpoint],
        "items": [{**output, "itemIndex": 0}],
        "jobs": [job],
        "records": [],
        "valueLedger": None,
        "slot": None,
        "isComplete": True,
    }


def test_a_story_has_every_id_and_digest_whole() -> None:
    """Each id and digest stands whole on one line, each attempt has its outcome and latency."""
    lines = list(lineage_lines(story_of(lineage())))
    assert lines[0] == f"cycle {CYCLE_ID}  finished"
    assert f"  initiation      sha256:{DIGEST}" in lines
    assert any(line.strip().startswith(JOB_ID) and "delivered" in line for line in lines)
    attempts = [line.strip() for line in lines if "attempt " in line]
    assert attempts[0].startswith("attempt 1  2026-05-01T06:00:00.123Z  failed  500  3 ms: ")
    assert attempts[1].endswith("delivered  500  3 ms")


def test_a_story_hides_no_escape_sequence() -> None:
    """Text of others never reaches the terminal as a control sequence."""
    text = "\n".join(lineage_lines(story_of(lineage())))
    assert "\x1b" not in text
    assert "\\x1b[31m" in text


def test_a_cut_story_says_so() -> None:
    """Where the API cut a list, the story's last line says that this isn't all."""
    cut = {**lineage(), "isComplete": False}
    assert "too much to show whole" in list(lineage_lines(story_of(cut)))[-1]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({}, "finished"),
        ({"deadLettered": 2}, "finished (dead letters: 2)"),
        ({"state": "failed", "reason": "tier1: no"}, "failed: tier1: no"),
        ({"state": "running", "isWaiting": True}, "running (waits for the one before it)"),
    ],
)
def test_a_state_says_what_else_is_to_be_known(given: dict[str, Any], shown: str) -> None:
    """Dead letters, a failure's reason and waiting stand beside the state."""
    assert state_of(story_of(lineage(**given))) == shown


def at_stages(*stages: str, state: str = "running") -> dict[str, Any]:
    """A cycle with checkpoints of these stages."""
    return {
        **story_of(lineage(state=state)),
        "checkpoints": [{"stage": stage} for stage in stages],
    }


def test_changes_are_told_once_and_in_order() -> None:
    """What is new gets a line; jobs come between their queueing and their end; else no line."""
    queued = at_stages("cycle_started", "dispatch_enqueued")
    ended = at_stages(
        "cycle_started",
        "dispatch_enqueued",
        "dispatch_complete",
        "cycle_finished",
        state="finished",
    )

    def told(before: Any, cycle: Any) -> list[str]:
        return [line.split("  ")[-1] for line in changes(before, cycle)]

    jobs = "delivered 1 of 1, attempts 2"
    assert told(None, at_stages("cycle_started")) == ["cycle_started"]
    assert told(at_stages("cycle_started"), queued) == ["dispatch_enqueued", jobs]
    assert told(queued, queued) == []
    assert told(queued, ended) == ["dispatch_complete", "cycle_finished", "finished"]
    every = ["cycle_started", "dispatch_enqueued", jobs]
    assert told(None, ended) == [*every, "dispatch_complete", "cycle_finished", "finished"]
    assert job_counts(ended) == {"total": 1, "attempts": 2, "delivered": 1}


def test_tables_fold_everything_but_ids(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """On a narrow terminal the id columns stay whole and no column disappears."""
    from rich.console import Console  # noqa: PLC0415 - as the code under test does

    narrow = Console(force_terminal=True, width=50, color_system=None)
    monkeypatch.setattr(terminal, "console", lambda: narrow)
    rows = [(CYCLE_ID, "a reason that is much longer than what a narrow terminal can take", None)]
    terminal.show(terminal.table(("CYCLE", "REASON", "LAST"), rows, ids=("CYCLE",)))
    text = capsys.readouterr().out
    assert CYCLE_ID in text
    assert re.search(r"^CYCLE +REASON +LAST$", text, re.MULTILINE)
    assert set(str(rows[0][1]).split()) <= set(text.split())


def test_tables_do_not_fold_in_a_pipe(capsys: Any) -> None:
    """Where stdout is no terminal every row is one line, however long."""
    terminal.console.cache_clear()
    terminal.show(terminal.table(("A", "B"), [("x" * 300, "y" * 300)]))
    terminal.console.cache_clear()
    assert capsys.readouterr().out.splitlines()[1] == f"{'x' * 300}  {'y' * 300}"


def test_the_live_table_has_a_row_for_each_cycle() -> None:
    """Cycles are shown side by side, with their jobs counted."""
    assert stages_table([story_of(lineage()), story_of(lineage(state="running"))]).row_count == 2


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "-"),
        (0.0031, "3 ms"),
        (1.26, "1.3 s"),
        (119.0, "119.0 s"),
        (600, "10 min"),
        (9000, "2.5 h"),
    ],
)
def test_durations_have_fitting_units(seconds: float | None, shown: str) -> None:
    """Milliseconds to hours, each in its own unit."""
    assert terminal.duration(seconds) == shown


def test_times_are_utc_with_z() -> None:
    """Whatever zone an instant comes in, it is shown in UTC with a Z; what is none, as it is."""
    assert terminal.when("2026-05-01T08:00:00+02:00") == "2026-05-01T06:00:00.000Z"
    assert terminal.when(None) == "-"
    assert terminal.when("soon") == "soon"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ApiProblem(409, {"code": "global_pause"}), ExitCode.HALTED),
        (ApiProblem(409, {"code": "namespace_halted"}), ExitCode.HALTED),
        (ApiProblem(409, {"code": "cycles_active"}), ExitCode.REFUSED),
        (ApiProblem(400, {"code": "request_invalid"}), ExitCode.USAGE),
        (ApiProblem(422, {"code": "configuration_invalid"}), ExitCode.FAILED),
        (ApiProblem(404, {"code": "not_found"}), ExitCode.FAILED),
        (ApiProblem(500, {}), ExitCode.FAILED),
        (GlobalPause("paused"), ExitCode.HALTED),
        (CyclesActive("busy"), ExitCode.REFUSED),
        (RequestInvalid("no"), ExitCode.USAGE),
        (NodeUnreachable("nobody"), ExitCode.FAILED),
    ],
)
def test_exit_codes_say_what_kind_of_end_it_was(error: OrbitError, code: ExitCode) -> None:
    """Halted, refused, badly asked and failed are four different codes."""
    assert exit_code_of(error) == code


def test_problems_are_indented_below_one_line(capsys: Any) -> None:
    """A configuration's problems stand below the error's line, and in the document."""
    error = ConfigurationInvalid([Problem("expected a key", "profiles.json", 3, "/profiles/0")])
    assert report(error, is_json=True) == ExitCode.FAILED
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "error: the configuration is invalid: 1 problem",
        "  profiles.json:3 /profiles/0: expected a key",
    ]
    document = json.loads(captured.out)
    assert document["problems"][0] == {
        "file": "profiles.json",
        "line": 3,
        "pointer": "/profiles/0",
        "message": "expected a key",
    }


def test_a_nodes_problems_look_like_ours(capsys: Any) -> None:
    """A problem document of a node is shown as the same error found here would be."""
    found = {"file": "profiles.json", "line": 3, "pointer": "/profiles/0", "message": "no"}
    document = {"code": "configuration_invalid", "detail": "it is invalid", "problems": [found]}
    report(ApiProblem(422, document), is_json=False)
    assert capsys.readouterr().err.splitlines()[1] == "  profiles.json:3 /profiles/0: no"
    busy = {"code": "cycles_active", "detail": "1 active", "activeCycles": [{"id": CYCLE_ID}]}
    report(ApiProblem(409, busy), is_json=True)
    captured = capsys.readouterr()
    assert captured.err == f"error: 1 active\n  {CYCLE_ID}\n"
    assert json.loads(captured.out) == busy


def node(**given: Any) -> dict[str, Any]:
    """A node as `GET /status` shows it."""
    roles = ["api", "scheduler", "worker"]
    return {"isAlive": True, "isDraining": False, "roles": roles, **given}


@pytest.mark.parametrize(
    ("run_profile", "nodes", "shown"),
    [
        ({"reason": "profile nova is disabled"}, [node()], "profile nova is disabled"),
        ({"nextDueAt": None}, [node()], "it has no schedule: only when triggered"),
        ({"nextDueAt": AT}, [], "no node that is up has the role scheduler"),
        ({"nextDueAt": AT}, [node(isAlive=False)], "no node that is up has the role scheduler"),
        ({"nextDueAt": AT}, [node(roles=["scheduler"])], "no node that is up has the role worker"),
        ({"nextDueAt": AT}, [node()], "its next slot is 2026-05-01T06:00:00.123Z"),
        (
            {
                "activeCycle": {
                    "state": "running",
                    "cycleRunId": CYCLE_ID,
                    "stage": "tier1_complete",
                }
            },
            [node()],
            f"it runs: {CYCLE_ID}, at tier1_complete",
        ),
    ],
)
def test_why_a_run_profile_is_not_running(
    run_profile: dict[str, Any], nodes: list[Any], shown: str
) -> None:
    """The most telling reason is shown: disabled, no schedule, no node, or not due yet."""
    assert why_not_running(run_profile, {"isPaused": False, "nodes": nodes}).startswith(shown)


def test_a_pause_is_a_reason() -> None:
    """While all is paused, that is why nothing runs."""
    now = {"isPaused": True, "nodes": [node()]}
    assert why_not_running({"nextDueAt": AT}, now) == "ORBIT_GLOBAL_PAUSE is set"


def test_last_slots_are_at_most_three_of_each_schedule() -> None:
    """Every schedule is shown, also the one whose last slot is older than the list."""
    slots = [{"namespace": "a", "runProfileId": "x", "slotAt": str(number)} for number in range(5)]
    old = {"namespace": "b", "runProfileId": "y", "slotAt": "old"}
    run_profiles = [{"namespace": "b", "runProfileId": "y", "lastSlot": old}]
    shown = [one["slotAt"] for one in last_slots(slots, run_profiles)]
    assert shown == ["0", "1", "2", "old"]


def lane(**given: Any) -> dict[str, Any]:
    """The JSON of a lane that is held, as the API gives it."""
    made = {
        "namespace": "brand-a",
        "endpointKey": "default-endpoint",
        "breaker": "open",
        "openedAt": AT,
        "probeAt": "2026-05-01T06:00:10Z",
        "failures": 12,
        "windowAttempts": 20,
        "windowFailures": 14,
        "waiting": 1000,
        "inFlight": 0,
        "dueAt": AT,
        "attempts": {"delivered": 3, "failed": 12, "notSent": 1, "unknown": 2},
    }
    return {**made, **given}


HELD = (
    "held since 2026-05-01T06:00:00.123Z, 12 failures in a row; "
    "next probe from 2026-05-01T06:00:10.000Z"
)


def test_a_lane_says_what_holds_it_up() -> None:
    """Breaker, queue, tallies and limits of a lane; a count that was cut says so."""
    limits = {"maxConcurrency": 16, "ratePerSecond": 2.5, "onUnknown": "retry", "breaker": None}
    text = "\n".join(lane_lines({"lane": lane(), "limits": limits, "changes": []}))
    assert f"  breaker         open: {HELD}" in text
    assert "  waiting         1,000 or more" in text
    assert "  attempts        delivered 3, failed 12, not sent 1, unknown 2" in text
    assert "  rate            2.5 a second over all nodes" in text
    assert "  opens after     never: the breaker is off" in text
    calm = lane(breaker="closed", openedAt=None, probeAt=None, waiting=0)
    foreign = "\n".join(lane_lines({"lane": calm, "limits": None, "changes": []}))
    assert "  breaker         closed" in foreign
    assert "this node does not know the endpoint" in foreign


def test_only_held_lanes_are_reasons() -> None:
    """`status --why` names the lanes that are held, and how many jobs wait for each."""
    calm = lane(endpointKey="other", breaker="closed", openedAt=None, probeAt=None)
    shown = list(held_lines({"lanes": [calm, lane(waiting=3)]}))
    assert shown == [f"brand-a/default-endpoint: {HELD}; jobs that wait for it: 3"]


def test_a_story_says_what_holds_a_job_up() -> None:
    """A job in a held lane says so; a probe and a kept connection are told of their attempt."""
    story = lineage()
    job = story["jobs"][0]
    hold = {name: lane()[name] for name in ("openedAt", "probeAt", "failures")}
    job |= {"state": "retrying", "dueAt": AT, "held": hold}
    job["receipts"] = [{**job["receipts"][0], "isProbe": True, "isReused": True}]
    lines = [line.strip() for line in lineage_lines(story_of(story))]
    assert f"not sent meanwhile: the lane is {HELD}" in lines
    (attempt,) = [line for line in lines if line.startswith("attempt 1")]
    assert "  500  3 ms  kept connection  probe: " in attempt


def test_a_dead_letter_shows_what_was_decided() -> None:
    """Cause, endpoint, attempts and decisions of a dead letter, each on its line."""
    job = lineage()["jobs"][0]
    letter = {**job, "cycleRunId": CYCLE_ID, "namespace": "brand-a", "createdAt": AT}
    letter["cause"] = "out of retries"
    decision = {"decision": "requeued", "newJobId": CYCLE_ID, "reason": "fixed", "decidedAt": AT}
    answer = {"deadLetter": letter, "receipts": job["receipts"], "decisions": [decision]}
    lines = letter_lines(answer)
    assert "  cause           out of retries" in lines
    assert lines[-1] == f"  requeued as {CYCLE_ID} at 2026-05-01T06:00:00.123Z: fixed"


def test_an_attempt_of_a_lost_worker_says_when_it_was_found() -> None:
    """Its beginning is not known: the time that is shown says that it is another one."""
    job = lineage()["jobs"][0]
    receipt = {**job["receipts"][0], "outcome": "unknown", "status": None, "latency": {}}
    receipt |= {"startedAt": None, "createdAt": AT, "error": None}
    letter = {**job, "cycleRunId": CYCLE_ID, "namespace": "brand-a", "createdAt": AT}
    answer = {"deadLetter": letter, "receipts": [receipt], "decisions": []}
    found = "attempt 1  found lost at 2026-05-01T06:00:00.123Z  unknown"
    assert letter_lines(answer)[-1].strip() == found


def test_a_limit_is_what_a_bulk_requeue_ends_at() -> None:
    """A batch that did all its limit allows has done all, however many matched."""
    batch = {"state": "finished", "matching": 25, "sizeLimit": 3, "requeued": 3}
    counts = {"delivered": 3, "failed": 0, "pending": 0}
    assert progress({**batch, **counts}).startswith("finished: requeued 3 of 3, delivered 3")
    assert "3 of 25" in progress({**batch, **counts, "sizeLimit": None})
