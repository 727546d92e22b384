"""deploy/orbit.service, judged by systemd's own tools; no service is started here.

What it allows is held against a node in test_package.py, which has one that everybody may run.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from orbit.settings import Settings
from tests.delivery.conftest import ROOT, Missing, program
from tests.scenario.test_cli import PROGRAM

UNIT = ROOT / "deploy" / "orbit.service"
WORST_EXPOSURE = 2.0  # of 10; what systemd calls OK ends at 4


@pytest.fixture
def analyze(missing: Missing) -> Path:
    """systemd-analyze."""
    found = program("systemd-analyze")
    if found is None:
        missing("systemd-analyze is not here: install systemd")
        raise AssertionError
    return found


def test_systemd_finds_nothing_wrong(analyze: Path, tmp_path: Path) -> None:
    """`systemd-analyze verify` is silent about the unit, its program being where this one is."""
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/orbit/bin/orbit", str(PROGRAM)))
    told = subprocess.run(
        [analyze, "--man=no", "verify", unit], capture_output=True, text=True, check=False
    )
    assert (told.returncode, told.stdout + told.stderr) == (0, "")


def test_the_service_is_little_exposed(analyze: Path) -> None:
    """`systemd-analyze security` rates it, and fails above a small exposure."""
    threshold = f"--threshold={WORST_EXPOSURE * 10:.0f}"
    judged = subprocess.run(
        [analyze, "security", "--offline=true", threshold, "--json=short", UNIT],
        capture_output=True,
        text=True,
        check=False,
    )
    assert judged.returncode == 0, judged.stdout + judged.stderr
    open_to = [one["name"] for one in json.loads(judged.stdout) if not one["set"]]
    assert "NoNewPrivileges=" not in open_to


def test_systemd_waits_longer_than_a_node_drains() -> None:
    """SIGKILL comes after the default drain time, with a margin."""
    stop = next(one for one in UNIT.read_text().splitlines() if one.startswith("TimeoutStopSec="))
    drain_seconds = Settings.model_fields["drain_timeout_seconds"].default
    assert float(stop.partition("=")[2]) >= drain_seconds + 10
