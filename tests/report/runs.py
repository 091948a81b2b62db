"""Directories of runs, as the monitor leaves them, and worse."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from foreshock.records import Ledger, MetricsRecorder, TelemetryWriter, write_autopsy, write_summary

HOSTILE = "</script><img src=x onerror=alert(1)><b>'\"&"
OFFENDER = {"kind": "parameter", "name": "head.weight", "nan": 1, "inf": 0, "numel": 40}
STRUCK_STEP = 20


def loss_at(step: int) -> float:
    return 4 * math.exp(-step / 20) + 0.1


def write_run(path: Path, steps: int = 40, name: str = "head.weight") -> Path:
    """A run that is struck at step 20, goes back to step 15, and ends."""
    path.mkdir(parents=True, exist_ok=True)
    offender = OFFENDER | {"name": name}
    with (
        Ledger(path / "ledger.jsonl") as ledger,
        TelemetryWriter(path / "telemetry.jsonl") as writer,
    ):
        for step in range(steps):
            if step == STRUCK_STEP:
                strike(writer, ledger, offender)
            writer.write("telemetry", step, **measured(step, name))
        writer.flush(10)
        head = ledger.head
    write_summary(path / "summary.json", summary(steps, name, head))
    write_summary(
        path / "config.json",
        {
            "guard": {"mode": "recover", "persist_dir": None},
            "versions": {"torch": "2.13.0", name: name},
        },
        redact=False,
    )
    return path


def strike(writer: TelemetryWriter, ledger: Ledger, offender: dict[str, Any]) -> None:
    step, name = STRUCK_STEP, offender["name"]
    writer.write("telemetry", step, train_loss=math.nan, grad_norm=math.inf, risk_level="DANGER")
    said = {"reasons": ["NONFINITE_WEIGHTS", name], "offender": offender}
    change = {"level": "DANGER", "before": "STABLE", "kappa": 9.0, "worst_layer": name}
    writer.write("risk_level_changed", step, **change, slope=None, volatility=0.1)
    writer.write("rollback_success", step, to_step=15, lr_factor=0.5, **said)
    ledger.append("rollback_success", scope={"step": step}, evidence=said)
    writer.write("recovered", step)
    writer.write("autopsy", step, cause="transient", sentence=f"nothing is wrong with {name}")


def measured(step: int, name: str) -> dict[str, Any]:
    return {
        "train_loss": loss_at(step),
        "grad_norm": 1.0 + step % 3,
        "learning_rate": 1e-3,
        "largest_gradients": {name: 2.0 + step, "tail.bias": 1.0},
        "loss_z": None if step < 5 else 0.5,
        "spectral_step": step,
        "spectral_kappa": 10.0 + step,
        "risk_level": "DANGER" if STRUCK_STEP <= step < 30 else "STABLE",
        "worst_layer": name,
        "precursor_alert": False,
    }


def summary(steps: int, name: str, head: str) -> dict[str, Any]:
    return {
        "total_steps": steps,
        "final_loss": loss_at(steps - 1),
        "guard": {"total_rollbacks": 1, "integrity_status": "RECOVERED", "abort": None},
        "spectral": {"final_kappa": 49.0, "final_risk_level": "STABLE", "worst_layer": name},
        "overhead": {"mean_ms": 0.25, "percent": 1.5},
        "ledger_head": head,
        "dropped_records": 0,
        "lost_ledger_records": 0,
    }


class Found:
    """What an autopsy found, in short."""

    def __init__(self, step: int, name: str) -> None:
        self.step = step
        self.cause = "transient"
        self.first = {"offender": OFFENDER | {"name": name}}


def add_autopsy(path: Path, name: str = "head.weight") -> None:
    sentence = f"nothing is wrong with {name}"
    write_autopsy(path, STRUCK_STEP, sentence, Found(STRUCK_STEP, name), redact=False)


def add_other_series(path: Path) -> None:
    """Metrics, a watcher's lines, and pictures."""
    recorder = MetricsRecorder(path, "tiny")
    for step in range(10):
        recorder.record(step, 0, 2.0 - 0.1 * step, 1e-3, accuracy=0.1 * step)
    recorder.close()
    (path / "monitoring").mkdir()
    lines = [
        f'{{"step": {step}, "time": "2026-01-01T00:00:00.000Z", "rms": {{"mlp": {step}.5}}}}\n'
        for step in range(10)
    ]
    (path / "monitoring" / "activations.jsonl").write_text(
        "".join(lines) + '{"rms": 1}\n{"step": 10, "r'
    )
    (path / "plots").mkdir(exist_ok=True)
    (path / "plots" / "loss.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (path / "plots" / "loss.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (path / "plots" / "large.png").write_bytes(bytes(1_600_000))


def add_layerwise(path: Path, name: str = "blocks.0") -> None:
    """What `surprise.save_layerwise` saves: in the second layer one sample has no number."""
    (path / "surprise").mkdir(exist_ok=True)
    surprise_LN = np.array([[3.0, 1.0, 2.0, 9.0], [1.0, 1.0, np.nan, 2.0]], dtype=np.float32)
    groups = np.array(["normal", "normal", "normal", "far"])
    names = np.array([name, "blocks.1"])
    file = path / "surprise" / "layers.npz"
    np.savez_compressed(file, layers=names, surprise_LN=surprise_LN, groups=groups)


def rank_folder(run: Path, rank: int) -> Path:
    return run / f"rank_{rank:05d}" if rank else run


def write_ranks(run: Path, ranks: int, name: str = "head.weight", steps: int = 40) -> Path:
    """A run of many ranks that keep records: rank 1 was struck, what each alone knows differs."""
    offender = OFFENDER | {"name": name, "ranks": [1]}
    for rank in range(ranks):
        folder = rank_folder(run, rank)
        folder.mkdir(parents=True, exist_ok=True)
        with TelemetryWriter(folder / "telemetry.jsonl") as writer:
            for step in range(steps):
                if step == STRUCK_STEP:
                    said = {"reasons": ["NONFINITE_GRADIENT"], "offender": offender}
                    writer.write("update_skipped", step, **said)
                    writer.write("snapshot_saved", step, path=str(folder), size_bytes=rank)
                    if rank == 1:
                        writer.write("snapshot_dropped", step, why=f"{name} has changed")
                own = {
                    "alignment": 0.1 * (rank + 1 + (rank == ranks - 1)),
                    "largest_gradients": {name: 1.0 + rank},
                }
                writer.write("telemetry", step, train_loss=loss_at(step), **own)
        write_summary(folder / "summary.json", summary(steps, name, ""))
    return run
