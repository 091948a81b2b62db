"""A run on many ranks that keeps its snapshots on disk; one rank of it may end itself at a step.

Arguments: directory, kind of model, step and rank to be killed at (or -1 -1); started by torchrun.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import foreshock as fs
from tests.ranks.training import Batches, How, make_run, train_step

STEPS = 30


def main() -> None:
    out, kind, step_of_death, rank_of_death = (
        Path(sys.argv[1]),
        sys.argv[2],
        *map(int, sys.argv[3:]),
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
    is_first_life = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0
    how = How(steps=STEPS)
    run = make_run(kind, out, how)
    guard = fs.Guard(
        mode="recover", snapshot_interval=3, persist_dir=out / "snapshots", lr_backoff=1.0
    )
    with fs.Monitor(run.model, run.optimizer, out / "run", guard) as monitor:
        resumed = monitor.resume()
        batches = Batches(dist.get_rank() if kind != "tp" else 0, STEPS)
        for step, (x, y) in monitor.loop(batches):
            if is_first_life and (step, dist.get_rank()) == (step_of_death, rank_of_death):
                os.kill(os.getpid(), signal.SIGKILL)
            train_step(run, monitor, step, x, y, (), how)
            time.sleep(0.02)  # so that the disk has something to show
    digest = hashlib.sha256(repr(sorted(run.bits().items())).encode()).hexdigest()
    found = {"resumed": resumed, "digest": digest, "steps": len(run.verdicts)}
    (out / f"found_{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
