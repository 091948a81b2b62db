"""Every example in the README and the documentation runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import tables

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = [
    pytest.param(code, id=f"{page.name}-{i}")
    for page in PAGES
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]
NOT_OURS = [
    "ignore:`isinstance(treespec, LeafSpec)` is deprecated:FutureWarning",
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:torch.distributed is disabled",
]
"""Warnings of Lightning's own code, and of its taste; of torch when it is told no_dist=True."""


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 5


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs(code: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", *(f"-W{w}" for w in NOT_OURS), "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for expected in re.findall(r"print\(.*\)  # ([^.\n].*)", code):
        assert expected in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(((?!http)[^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_say_what_the_stored_rows_say(page: Path) -> None:
    text = page.read_text()
    assert tables.with_tables(text) == text
