"""The examples run as they stand and show what they promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_example(name: str, out_dir: Path) -> str:
    """What it prints; its files go to out_dir."""
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / name, "--out-dir", out_dir],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_fabric_loop_recovers_from_a_nan_in_a_weight(tmp_path: Path) -> None:
    printed = run_example("fabric_loop.py", tmp_path)
    assert "step 70: roll_back, parameter blocks.1.mlp.up.weight: 1 NaN" in printed
    assert "RECOVERED after 120 steps" in printed
    first, last = float(printed.split("loss ")[1][:4]), float(printed.split("loss ")[-1])
    assert first > 4
    assert last < 3
    assert (tmp_path / "summary.json").exists()


def test_surprise_mlp_flags_digits_that_were_never_learned(tmp_path: Path) -> None:
    printed = run_example("surprise_mlp.py", tmp_path)
    rows = re.findall(r"flagged +([\d.]+)%  AUROC ([\d.]+)", printed)
    flagged, auroc = zip(*((float(f), float(a)) for f, a in rows), strict=True)
    assert flagged[0] < 10
    assert flagged[1] > 75
    assert flagged[2] == 100
    assert auroc[1] > 0.96
    assert auroc[2] > 0.99
    assert (tmp_path / "scores.png").stat().st_size > 5000
    assert (tmp_path / "probe.safetensors").exists()
