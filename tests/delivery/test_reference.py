"""The reference is what the program says of itself, and the table of features names what exists."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest

from tests.delivery.conftest import ROOT

_ROW = re.compile(r"^\| ([^|]+) \| (`[^|]+`) \| `([^|`]+)` \|$", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)#:\s]+)(?:#([^)\s]+))?\)")
PAGES = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def test_the_reference_is_current() -> None:
    """Made anew it is the same; if this fails, `make docs` and look at what it changed."""
    made = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))["pages"]()
    folder = ROOT / "docs" / "reference"
    kept = {path.name: path.read_text("utf-8") for path in folder.iterdir()}
    assert sorted(kept) == sorted(made)
    for name, text in made.items():
        assert kept[name] == text, f"docs/reference/{name} is stale: run `make docs`"


def test_every_feature_has_its_code_and_its_test() -> None:
    """Every file and every test that the table names is there."""
    rows = _ROW.findall((ROOT / "docs" / "features.md").read_text("utf-8"))
    assert len(rows) > 50
    for feature, places, shown in rows:
        for place in re.findall(r"`([^`]+)`", places):
            assert (ROOT / "src/orbit" / place).exists() or (ROOT / place).exists(), feature
        file, _, name = shown.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text("utf-8"))
        named = {
            one.name
            for one in ast.walk(tree)
            if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        assert not name or name in named, f"{feature}: there is no {shown}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    """To a file of the repository, and to a heading of it where one is named."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target, anchor in _LINK.findall(text):
        found = page.parent / target
        assert found.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", found.read_text("utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings}
            assert anchor in slugs, f"{page}: {target}#{anchor}"
