"""What torchrun starts, ends and starts again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from foreshock.guard import snapshot_file
from foreshock.records import read_telemetry

ROOT = Path(__file__).parents[2]


def torchrun(
    *args: str | Path, size: int = 2, restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    """On a port that is free."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command = [*launcher, str(size), "--max-restarts", str(restarts), *map(str, args)]
    # Without the last one gloo may look for the ranks of before the restart (docs/ranks.md).
    named = {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **named},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def found(out: Path, size: int = 2) -> list[dict[str, Any]]:
    return [json.loads((out / f"found_{rank}.json").read_text()) for rank in range(size)]


def test_after_kill_9_of_a_rank_torchrun_resumes_bit_identically(tmp_path: Path) -> None:
    module = ("-m", "tests.ranks.killed_run")
    done = torchrun(*module, tmp_path / "whole", "fsdp2", "-1", "-1")
    assert done.returncode == 0, done.stderr
    killed = torchrun(*module, tmp_path / "killed", "fsdp2", "17", "1", restarts=1)
    assert killed.returncode == 0, killed.stderr
    assert "gets no answer from the others" in killed.stderr or "SIGKILL" in killed.stderr
    whole, again = found(tmp_path / "whole"), found(tmp_path / "killed")
    assert [rank["digest"] for rank in again] == [rank["digest"] for rank in whole]
    (resumed,) = {rank["resumed"] for rank in again}
    assert resumed is not None
    assert 3 <= resumed <= 15
    assert all(rank["resumed"] is None for rank in whole)
    read_telemetry(tmp_path / "killed" / "run" / "telemetry.jsonl")
    for file in (tmp_path / "killed" / "snapshots").glob("rank_*/step_*.safetensors"):
        snapshot_file.read(file)


def test_the_others_say_clearly_that_a_rank_is_gone(tmp_path: Path) -> None:
    """Without a launcher that would end them first."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
    }
    arguments = [str(tmp_path), "ddp", "9", "1"]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks.killed_run", *arguments],
            cwd=ROOT,
            env={**environment, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[1].returncode == -9
    assert ranks[0].returncode == 1
    assert "onnection closed" in said[0] or "onnection reset" in said[0], said[0]


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.parametrize("example", ["ddp.py", "fsdp2.py"])
def test_the_example_recovers(example: str, tmp_path: Path) -> None:
    done = torchrun(ROOT / "examples" / example, "--out-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"rolled back: parameter .*weight on rank 1: 1 NaN of", done.stdout)
    assert json.loads((tmp_path / "summary.json").read_text())["guard"]["total_rollbacks"] == 1
