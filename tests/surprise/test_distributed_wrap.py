"""A wrapped model trains under DistributedDataParallel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_two_ranks_agree_with_and_without_find_unused_and_the_coding_loss(tmp_path: Path) -> None:
    """With `find_unused_parameters`, codes that only the coding loss reaches are not unused."""
    command = [sys.executable, "-m", "tests.surprise.distributed_wrap", str(tmp_path / "store")]
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        ended = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (out, error) in zip(ranks, ended, strict=True):
        assert rank.returncode == 0, error
        assert "agreed" in out
