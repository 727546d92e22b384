"""Overlays and autonomy from the command line, beside real nodes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orbit.audit.verification import verify
from orbit.cli.scaffold import write_project
from tests.scenario.conftest import SECRET_KEY, Configure, Facts, MakeNode, run
from tests.scenario.piloting import ON, fleet, intensity, look, proposed, seen, tell
from tests.scenario.test_cli import Project, answers, free_port, wait_for


@pytest.fixture
def here(tmp_path: Path, dsn: str, config_dir: Path) -> Project:
    """A folder whose settings name the test's database; no node answers at its address."""
    return Project(
        tmp_path,
        {
            "PORT": str(free_port()),
            "DATABASE_URL": dsn,
            "ORBIT_SECRET_KEYS": SECRET_KEY,
            "ORBIT_CONFIG_DIR": str(config_dir),
            "ORBIT_PHASE4_ENABLED": "true",
            "ORBIT_PHASE4_ALLOW_MUTATION": "true",
        },
    )


async def test_from_a_proposal_to_a_rollback_by_the_command_line(
    make_node: MakeNode, configure: Configure, facts: Facts, dsn: str, here: Project
) -> None:
    """Approve, arm, look, and look again: what an operator sees of a change that did harm."""
    node = await fleet(make_node, configure, facts, **ON)
    seen.clear()
    proposal_id = await proposed(node)

    async def ok(*arguments: str) -> str:
        return await asyncio.to_thread(here.ok, *arguments)

    async def told(*arguments: str) -> Any:
        return await asyncio.to_thread(here.json, *arguments)

    assert "nova     disarmed" in await ok("autonomy", "status")
    assert "approved" in await ok("proposals", "approve", proposal_id)
    assert await ok("autonomy", "arm", "nova", "--reason", "calm") == "profile nova is armed\n"
    assert "already armed" in await ok("autonomy", "arm", "nova", "--reason", "calm")
    await look(node)
    await run(node)
    status = await ok("autonomy", "status", "nova")
    assert "/execution_rules/intensity 5 -> 4 until" in status
    assert "sea, delivered: 0 cycles, evidence 1.00 of 20, 5 peers" in status
    listed = await ok("profiles")
    assert "profile nova: /execution_rules/intensity 5 -> 4, by orbit" in listed
    await tell(node, facts, rounds=20, nova=2)
    await look(node)
    await run(node)
    assert seen == [4, 5]
    status = await ok("autonomy", "status", "nova")
    assert "disarmed (rollback)" in status
    assert "breached" in status
    assert "rolled_back" in status
    detail = await told("autonomy", "status", "nova")
    assert detail["changes"][0]["ending"] == "rolled_back"
    assert (await told("autonomy", "disarm", "nova"))["outcome"] == "unchanged"
    assert "in shadow mode" in await ok("autonomy", "shadow", "nova")
    assert "0 changes taken back" in await ok("autonomy", "revert", "nova")
    await ok("audit", "verify")
    assert verify(dsn).findings == []


async def test_what_is_skipped_ends_with_refused_by_policy(
    make_node: MakeNode, configure: Configure, facts: Facts, here: Project
) -> None:
    """Code 3, and the reason in words; the second time of a day leaves no second record."""
    node = await fleet(make_node, configure, facts)
    here.environment["ORBIT_PHASE4_ALLOW_MUTATION"] = "false"
    for _ in range(2):
        result = await asyncio.to_thread(here.run, "autonomy", "arm", "nova", "--reason", "x")
        assert result.returncode == 3
        assert "skipped: ORBIT_PHASE4_ALLOW_MUTATION is not true" in result.stdout
    found = await asyncio.to_thread(here.json, "autonomy", "status")
    assert found["switches"] == {"enabled": True, "mutationAllowed": False, "paused": False}
    assert facts("SELECT function, why FROM autonomy_skip") == [
        {"function": "arm", "why": "mutation_not_allowed"}
    ]
    assert intensity(node) == 5


def test_a_profile_is_turned_off_and_files_are_held_against_it(tmp_path: Path) -> None:
    """`profiles disable`, `validate`, `up`: an overlay is never lost without a word."""
    write_project(tmp_path)
    port = free_port()
    here = Project(tmp_path, {"PORT": str(port), "ORBIT_CRON_SCHEDULE": ""})

    def ready() -> bool:
        return answers(f"http://127.0.0.1:{port}/ready")

    with here.running("up"):
        wait_for(ready, "the node")
        said = here.ok("profiles", "disable", "nova", "--reason", "nonsense")
        assert said == "nova is disabled (its file says enabled)\n"
        assert "already disabled" in here.ok("profiles", "disable", "nova")
        assert "/state enabled -> disabled" in here.ok("profiles")
        assert "profile nova is disabled" in here.ok("status", "--why")
        assert "profile nova is disabled" in here.ok("plan")
        change(tmp_path, lambda nova: nova.update(label="Another"))
        here.ok("validate")
        change(tmp_path, lambda nova: nova.update(profile_id="terra"))
        refused = here.run("validate")
        assert refused.returncode == 3
        assert "1 overlay does not fit the files: profile nova" in refused.stderr
        assert here.json("validate", code=3)["code"] == "overlays_broken"
        assert "would be dropped: profile nova" in here.run("validate", "--drop-overlays").stderr
    refused = here.run("up")
    assert refused.returncode == 3
    assert "overlay does not fit" in refused.stdout + refused.stderr
    with here.running("up", "--drop-overlays"):
        wait_for(ready, "the node")
        assert here.json("profiles")["profiles"][0]["overlays"] == []
        assert here.ok("profiles", "disable", "nova-daily", "--run-profile").startswith(
            "nova-daily is disabled"
        )
        assert here.json("profiles", "enable", "nova-daily", "--run-profile")["isChanged"]


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edits nova in the profiles' file, and what its run profiles call it."""
    path = folder / "config" / "profiles.json"
    content = json.loads(path.read_text())
    edit(content["profiles"][0])
    path.write_text(json.dumps(content))
    runs = folder / "config" / "runProfiles.json"
    content_of_runs = json.loads(runs.read_text())
    for one in content_of_runs["run_profiles"]:
        one["profile_id"] = content["profiles"][0]["profile_id"]
    runs.write_text(json.dumps(content_of_runs))
