"""The rank that the others wait for is named."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

import foreshock as fs
from tests.ranks.training import KINDS, How, Run, counted, gathered, ranks, train


@ranks(2)
def check_a_rank_with_a_slow_module_or_loader_is_named_once(out: Path) -> None:
    for kind in KINDS:

        def slow_down(run: Run, step: int) -> None:
            if step == 0 and dist.get_rank() == 1:
                norm = next(m for n, m in run.model.named_modules() if n.endswith("norm"))
                inner = norm.forward

                def forward(x: Any) -> Any:
                    time.sleep(0.03)
                    return inner(x)

                norm.forward = forward

        with counted() as calls:
            train(kind, out / kind, at_step=slow_down, how=How(steps=44))
        (told,) = stragglers(out / kind)
        assert told["rank"] == 1
        assert told["step"] in (30, 40)  # where another had to wait for the machine, later
        assert told["ratio"] > 1.5
        after_the_first = [n for n, _ in calls][2:]
        assert after_the_first.count(8 * dist.get_world_size()) == 1


def stragglers(out: Path) -> list[dict[str, Any]]:
    gathered(None)
    told = fs.records.read_telemetry(out / "telemetry.jsonl").records
    return [record for record in told if record["event"] == "straggler_seen"]
