"""The examples run as they stand and show what they promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_example(name: str, out_dir: Path, *more: str) -> str:
    """What it prints; its files go to out_dir."""
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / name, "--out-dir", out_dir, *more],
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


def test_accelerate_loop_names_the_weight_that_was_struck_and_recovers(tmp_path: Path) -> None:
    printed = run_example("accelerate_loop.py", tmp_path)
    assert "parameter transformer.h.1.mlp.c_fc.weight: 1 NaN of 9216 values" in printed
    assert "integrity: RECOVERED" in printed
    losses = [float(loss) for loss in re.findall("loss:? +([0-9.]+)", printed)]
    assert losses[-1] < losses[0] - 1


def test_rotation_gates_open_as_planned_stay_rotations_and_fold(tmp_path: Path) -> None:
    printed = run_example("rotation_gates.py", tmp_path, "--steps", "30")
    assert float(re.findall(r"in 30 looks: (\S+)", printed)[0]) < 1e-6
    ((first, opened),) = re.findall(r"(0\.\d+) at first, (0\.\d+) after 20 steps", printed)
    assert (first, opened) == ("0.0067", "0.1000")
    folded = re.findall(r"(\d) gates are gone, (\d) are constant; outputs differ by (\S+)", printed)
    assert [(gone, constant) for gone, constant, _ in folded] == [("0", "4"), ("6", "0")]
    assert all(float(error) < 1e-5 for *_, error in folded)
    for name in ("rotation_gates.png", "monitoring/gates.png"):
        assert (tmp_path / name).stat().st_size > 5000
