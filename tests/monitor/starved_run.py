"""Trainings whose disk fills up, or turns read-only, in the middle: a process of its own, without
the rights of root. Argument: a directory. Prints what came of them as JSON."""

from __future__ import annotations

import ctypes
import json
import logging
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import foreshock as fs
from tests.monitor import training as t

_CAPABILITY_VERSION = 0x20080522


def give_up_privileges() -> None:
    """Root may write to what is read-only; without its capabilities it may not."""
    none_at_all = (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), none_at_all) != 0:
        raise RuntimeError("the capabilities could not be given up")


def fill_disk(folder: Path) -> None:
    """From now on no file of this process may grow, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))


def make_read_only(folder: Path) -> None:
    for directory in [folder, *(d for d in folder.rglob("*") if d.is_dir())]:
        directory.chmod(0o555)


def train(folder: Path, starve: Callable[[Path], None]) -> dict[str, Any]:
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("foreshock")
    log.addHandler(handler)
    run = t.make_run(epochs=3)
    run.strikes = [
        t.Strike(4, lambda _: starve(folder), "update"),
        t.Strike(7, t.nan_in_weight),
    ]
    recorder = fs.records.MetricsRecorder(folder, "m", save_interval=1)
    sinks = [fs.sinks.TensorBoard(folder / "tb"), fs.sinks.Prometheus(port=0)]
    guard = fs.Guard(
        mode="recover", snapshot_interval=4, lr_backoff=1.0, persist_dir=folder / "snapshots"
    )
    with fs.Monitor(
        run.model, run.optimizer, folder, guard, state=run.state, telemetry_interval=1, sinks=sinks
    ) as monitor:
        t.train(run, monitor)
        for step, loss in sorted(run.losses.items()):
            recorder.record(step, 0, loss, 1e-3)
        report = recorder.poc_report({}, {}, {})
    recorder.close()
    log.removeHandler(handler)
    return {
        "summary": monitor.finalize(),
        "differing": t.differing(t.state_of(run), t.state_of(t.train(t.make_run(epochs=3)))),
        "dropped_metrics": recorder.dropped_records,
        "has_report": report is not None,
        "has_summary": (folder / "summary.json").exists(),
        "warnings": warnings,
    }


def main(where: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    give_up_privileges()
    found: dict[str, Any] = {}
    for name, starve in (("full", fill_disk), ("read_only", make_read_only)):
        (where / name).mkdir()
        found[name] = train(where / name, starve)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1])), default=str))
