"""A run on two ranks that keeps its snapshots on disk, of which one rank ends itself at a step.

Argument: a directory. Started by torchrun, which starts it again; it then takes itself up, and is
held against a run that nothing has happened to.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import foreshock as fs
from tests.ranks.training import Batches, How, Run, make_run, train_step

STEPS, STEP_OF_DEATH, RANK_OF_DEATH = 30, 17, 1
KIND = "fsdp2"


def run_on(out: Path, kept: Path, *, dies: bool) -> tuple[Run, int | None]:
    """From the newest snapshot, if there is one; and the step that this was at."""
    how = How(steps=STEPS)
    run = make_run(KIND, out, how)
    guard = fs.Guard(mode="recover", snapshot_interval=3, persist_dir=kept, lr_backoff=1.0)
    with fs.Monitor(run.model, run.optimizer, out, guard) as monitor:
        resumed = monitor.resume()
        for step, (x, y) in monitor.loop(Batches(dist.get_rank(), STEPS)):
            if dies and (step, dist.get_rank()) == (STEP_OF_DEATH, RANK_OF_DEATH):
                os.kill(os.getpid(), signal.SIGKILL)
            train_step(run, monitor, step, x, y, (), how)
            time.sleep(0.02)  # so that the disk has something to show
    return run, resumed


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
    is_first_life = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    again, resumed = run_on(out / "run", out / "snapshots", dies=is_first_life)
    whole, begun = run_on(out / "whole", out / "of whole", dies=False)
    found = {"resumed": resumed, "begun": begun, "is_same": again.bits() == whole.bits()}
    (out / f"found_{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
