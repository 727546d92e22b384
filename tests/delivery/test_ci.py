"""What `.ci/run` does when a program of the outside cannot be had; nothing is installed here.

The script runs as it is, in a copy of the tree, with programs that say what they are asked and do
nothing else.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.delivery.conftest import ROOT

SILENT = "#!/bin/sh\nexit 0\n"
SAYS = '#!/bin/sh\necho "make $* with delivery ${ORBIT_TEST_DELIVERY:-unsaid}"\n'
REFUSES = "#!/bin/sh\nexit 1\n"
PROGRAMS = {
    "make": SAYS,
    "npm": REFUSES,
    **dict.fromkeys(("apt-get", "id", ".venv/bin/python"), SILENT),
    **dict.fromkeys(("python3.12", "python3.13", "python3.14"), REFUSES),
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with the script, and the programs that it finds first."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    for name, text in PROGRAMS.items():
        place = tmp_path / (name if "/" in name else f"bin/{name}")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        place.chmod(0o755)
    return tmp_path


def ci(tree: Path, **given: str) -> tuple[int, str]:
    """Runs the script to its end: its code, and what it said."""
    path = f"{tree / 'bin'}:{os.environ['PATH']}"
    told = subprocess.run(
        [tree / ".ci" / "run"],
        cwd=tree,
        env={"PATH": path, "HOME": str(tree), **given},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
        check=False,
    )
    return told.returncode, told.stdout


def test_ci_fails_without_the_programs_that_delivery_is_tested_with(tree: Path) -> None:
    """Three tries, then it ends: no green run in which PM2 was not tried for real."""
    code, said = ci(tree)
    assert code == 1
    assert "try 3 of 3" in said
    assert "make test" not in said


def test_ci_leaves_them_out_where_it_is_told_to(tree: Path) -> None:
    """ORBIT_TEST_DELIVERY=optional says so, and the tests are told the same."""
    code, said = ci(tree, ORBIT_TEST_DELIVERY="optional")
    assert code == 0
    assert "make test JOBS=4 with delivery optional" in said


def test_ci_asks_for_all_of_them_where_they_are_there(tree: Path) -> None:
    """Everything could be had: a test that misses its program fails."""
    (tree / "bin" / "npm").write_text(SILENT)
    code, said = ci(tree)
    assert code == 0
    assert "make test JOBS=4 with delivery required" in said
