"""The examples run, and find what they say they find."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def flagged(printed: str, name: str) -> int:
    """Percent of a group that was called strange."""
    found = re.search(rf"^{name}: (\d+)% flagged", printed, re.MULTILINE)
    assert found, printed
    return int(found[1])


@pytest.mark.parametrize(
    ("example", "own", "strange"),
    [
        ("surprise_cnn.py", "0 to 4", "noise"),
        ("surprise_transformer.py", "its own chain", "one token"),
    ],
)
def test_the_example_flags_what_is_strange(
    example: str, own: str, strange: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / example, tmp_path],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert flagged(done.stdout, own) <= 15
    assert flagged(done.stdout, strange) >= 50
    assert (tmp_path / "surprise.png").stat().st_size > 1000
