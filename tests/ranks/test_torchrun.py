"""What torchrun starts, ends and starts again."""

from __future__ import annotations

import functools
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from foreshock.guard import snapshot_file
from foreshock.records import read_telemetry
from tests.ranks.launch import finish

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


@pytest.mark.parametrize("when", ["at a step", "handing on"])
def test_after_kill_9_of_a_rank_the_other_ends_with_a_clear_error_and_files_are_whole(
    tmp_path: Path, when: str
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    named = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    named |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCHELASTIC_RESTART_COUNT": "0"}
    command = [sys.executable, "-m", "tests.ranks.killed_run", str(tmp_path), when]
    start = functools.partial(subprocess.Popen, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    ranks = [start(command, env={**os.environ, **named, "RANK": str(r)}) for r in range(2)]
    (_, error), _ = finish(ranks, timeout=100)
    assert [rank.returncode for rank in ranks] == [1, -9]
    assert "onnection closed by peer" in error or "onnection reset" in error
    assert read_telemetry(tmp_path / "run" / "telemetry.jsonl").records
    files = [*(tmp_path / "snapshots").glob("rank_*/**/step_*.safetensors")]
    folders = {file.parent.name for file in files} - {"of_rank_00000", "of_rank_00001"}
    assert folders == {"rank_00000", "rank_00001"}
    assert len({file.parent for file in files}) == (4 if when == "handing on" else 2)
    for file in files:
        snapshot_file.read(file)


def test_after_kill_9_of_a_rank_torchrun_resumes_bit_identically(tmp_path: Path) -> None:
    done = torchrun("-m", "tests.ranks.killed_run", tmp_path, restarts=1)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"found_{rank}.json").read_text()) for rank in range(2)]
    assert all(rank["is_same"] for rank in found)
    assert all(rank["begun"] is None for rank in found)
    (resumed,) = {rank["resumed"] for rank in found}
    assert 3 <= resumed <= 15
    for where in ("run", "whole"):
        events = read_telemetry(tmp_path / where / "telemetry.jsonl").records
        assert [e["step"] for e in events if e["event"] == "resumed"] == [resumed][: where == "run"]
    for file in (tmp_path / "snapshots").glob("rank_*/step_*.safetensors"):
        snapshot_file.read(file)


SHARDED = pytest.mark.xdist_group("sharded trainer")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks have found in the Trainer's runs under FSDP2."""
    pytest.importorskip("transformers", minversion="5")
    out = tmp_path_factory.mktemp("sharded")
    done = torchrun("-m", "tests.ranks.sharded_trainer", out)
    assert done.returncode == 0, done.stderr
    found = [json.loads((out / f"found_{rank}.json").read_text()) for rank in range(2)]
    assert all(run["is_split"] for of_rank in found for run in of_rank.values())
    return found


@SHARDED
def test_the_trainer_under_fsdp2_hears_the_same_verdict_on_all_ranks(
    sharded: list[dict[str, Any]],
) -> None:
    for name, run in sharded[0].items():
        other = sharded[1][name]
        for what in ("said", "norms", "scale"):
            assert run[what] == other[what], (name, what)
        assert run["bits"] != other["bits"]  # each has its own shards


@SHARDED
def test_the_trainer_under_fsdp2_learns_the_same_bits_while_it_is_observed(
    sharded: list[dict[str, Any]],
) -> None:
    for found in sharded:
        assert found["watched"]["bits"] == found["bare"]["bits"]
        assert found["observed"]["bits"][:7] == found["bare"]["bits"][:7]
        assert "NONFINITE_GRADIENT" in found["observed"]["said"][6]
        assert found["guarded"]["guard"]["integrity_status"] == "OK"


@SHARDED
def test_the_trainer_under_fsdp2_withholds_what_is_bad_in_one_ranks_shard(
    sharded: list[dict[str, Any]],
) -> None:
    for found in sharded:
        run = found["withheld"]
        assert run["bits"][7] == run["bits"][6]
        assert run["guard"]["skipped_steps"] == 1
        assert run["guard"]["total_rollbacks"] == 0
        assert "h.1.mlp.c_fc.weight" in run["said"][6]
        assert "ranks=(1,)" in run["said"][6]
        overflowed = found["overflowed"]
        assert overflowed["bits"][7] == overflowed["bits"][6]
        assert overflowed["scale"] == 128.0
        assert overflowed["guard"]["anomalies_seen"] == overflowed["guard"]["skipped_steps"] == 0


@SHARDED
def test_the_trainer_under_fsdp2_returns_to_a_snapshot_on_all_ranks(
    sharded: list[dict[str, Any]],
) -> None:
    for found in sharded:
        run = found["rolled back"]
        assert "NONFINITE_WEIGHTS" in run["said"][6]
        assert "ranks=(1,)" in run["said"][6]
        assert run["bits"][7] == run["bits"][4]
        assert run["guard"]["integrity_status"] == "RECOVERED"


@pytest.mark.parametrize("example", ["ddp.py", "fsdp2.py", "trainer.py"])
def test_the_example_recovers(example: str, tmp_path: Path) -> None:
    if example == "trainer.py":
        pytest.importorskip("transformers")
    done = torchrun(ROOT / "examples" / example, "--out-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert re.search(r"rolled back.*parameter .*weight on rank 1: 1 NaN of", said)
    assert json.loads((tmp_path / "summary.json").read_text())["guard"]["total_rollbacks"] == 1
