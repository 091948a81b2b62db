"""kill -9 while snapshots are being written: the newest complete one always loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_killed_at_50_random_moments_a_run_still_ends_with_the_same_bits(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.monitor.killed_run", str(tmp_path), "50", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] == 50
    assert found["ends"] >= 1
    assert found["wrong_ends"] == found["unreadable"] == found["went_back"] == 0
    assert found["resumed"] >= 25
    assert found["leftovers"] >= 1  # or no kill has come while a file was being written
