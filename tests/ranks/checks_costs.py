"""What the ranks send is what the documentation says."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch.distributed as dist

import foreshock as fs
from tests.ranks.checks_recovery import flipped_bit, nan_in_weight
from tests.ranks.checks_scaler import FIT, overflow
from tests.ranks.checks_verdicts import nan_in_gradient
from tests.ranks.cost_model import COSTS
from tests.ranks.training import How, Run, Strike, counted, train


def check_what_is_sent_is_what_the_cost_model_says(out: Path) -> None:
    strikes = {
        "update withheld, its gradient named": Strike(6, 1, nan_in_gradient, "backward"),
        "rollback, the weight named": Strike(6, 1, nan_in_weight),
        "rollback, copies that differ named": Strike(6, 1, flipped_bit),
    }
    strikes["overflow that a GradScaler sees to"] = Strike(6, 1, overflow, "backward")
    size = dist.get_world_size()
    model = {cost.what: cost.sizes for cost in COSTS}
    for what, strike in strikes.items():
        begun: list[int] = []

        def note(run: Run, step: int, begun: list[int] = begun) -> None:
            begun.append(len(calls))

        with counted() as calls:
            how = How(scale=FIT if strike.hit is overflow else None)
            run = train("ddp", out / what, strike, how=how, at_step=note, replica_interval=1)
        number = len(list(run.model.parameters()))
        sent = [n for n, _ in calls]
        steps = [sent[a:b] for a, b in itertools.pairwise(begun)]
        assert sent[: begun[0]] == model["monitor made"](size, number)
        assert steps[6] == model[what](size, number), (what, steps[6])
        clean = [step for i, step in enumerate(steps) if i != 6]
        assert all(step == model["clean step"](size, number) for step in clean)
        # The last step, the end of the loop, and once more when the run is finalized.
        end = model["end of a loop"](size, number)
        assert sent[begun[-1] :] == model["clean step"](size, number) + end + end
        is_alarm = strike.hit is not overflow
        assert (run.verdicts[6].action is not fs.Action.CONTINUE) is is_alarm
