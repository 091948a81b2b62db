"""A run on two ranks that keeps its snapshots on disk, of which one rank ends itself at a step.

Arguments: a directory, and "handing on" for the rank to end itself while it hands its part of a
snapshot to the other. Started by torchrun, which starts it again; it then takes itself up, and is
held against a run that nothing has happened to.
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import foreshock as fs
from foreshock.guard.neighbor import Neighbor
from tests.ranks.training import Batches, How, Run, make_run, train_step

STEPS, STEP_OF_DEATH, RANK_OF_DEATH = 30, 17, 1
KIND, HANDS_ON = "fsdp2", "handing on"


def run_on(out: Path, kept: Path, *, dies: bool) -> tuple[Run, int | None]:
    """From the newest snapshot, if there is one; and the step that this was at."""
    how = How(steps=STEPS)
    run = make_run(KIND, out, how)
    given = {"mode": "recover", "snapshot_interval": 3, "lr_backoff": 1.0}
    is_copied = HANDS_ON in sys.argv
    guard = fs.Guard(**given, persist_dir=kept, neighbor_copies=is_copied)
    if is_copied and dies:
        end_while_handing_on()
        dies = False
    with fs.Monitor(run.model, run.optimizer, out, guard) as monitor:
        resumed = monitor.resume()
        for step, (x, y) in monitor.loop(Batches(dist.get_rank(), STEPS)):
            if dies and (step, dist.get_rank()) == (STEP_OF_DEATH, RANK_OF_DEATH):
                os.kill(os.getpid(), signal.SIGKILL)
            train_step(run, monitor, step, x, y, (), how)
            time.sleep(0.02)  # so that the disk has something to show
    return run, resumed


def end_while_handing_on() -> None:
    """In the middle of the fourth snapshot."""
    inner, calls = Neighbor._pass, itertools.count(1)

    def _pass(self: Neighbor, *given: Any) -> None:
        if dist.get_rank() == RANK_OF_DEATH and next(calls) == 8:  # each has a head and a body
            os.kill(os.getpid(), signal.SIGKILL)
        inner(self, *given)

    Neighbor._pass = _pass  # type: ignore[method-assign]


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
