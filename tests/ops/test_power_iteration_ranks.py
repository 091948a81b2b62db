"""power_iteration of matrices of which every rank holds a part."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_find_together_what_one_process_finds(ranks: int, tmp_path: Path) -> None:
    """To 1e-5, the same bits on every rank, with one all_reduce a pass."""
    module = "tests.ops.distributed_power_iteration"
    env = {**os.environ, "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, str(tmp_path / "store")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [
        subprocess.Popen(command, cwd=ROOT, env={**env, "RANK": str(rank)}, **pipes)  # type: ignore[call-overload]
        for rank in range(ranks)
    ]
    try:
        ended = [rank.communicate(timeout=120) for rank in started]
    finally:
        for rank in started:
            rank.kill()
    for rank, (out, error) in zip(started, ended, strict=True):
        assert rank.returncode == 0, error
        assert "agreed" in out
