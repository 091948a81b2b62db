"""Trains a wrapped model on two ranks; run by test_distributed_wrap.py, once a rank."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from foreshock.collectives import all_reduce
from foreshock.surprise import EmaCodebookUpdater, wrap
from tests.surprise.wrapped_models import mlp, rows


def train(find_unused: bool, has_loss: bool, updater_kind: str) -> list[torch.Tensor]:
    wrapped = wrap(mlp(), codes=4, coding_dim=3)
    updater = EmaCodebookUpdater(wrapped, assignment="hard") if updater_kind == "ema" else None
    parallel = DistributedDataParallel(wrapped, find_unused_parameters=find_unused)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
    for step in range(3):
        optimizer.zero_grad()
        loss = parallel(rows(16, seed=10 * step + dist.get_rank())).square().mean()
        if has_loss:
            loss = loss + wrapped.coding_loss()
        loss.backward()
        optimizer.step()
        if updater is not None:
            updater.update()
    return [p.detach() for p in wrapped.parameters()]


def main() -> None:
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", world_size=2,
                            rank=int(os.environ["RANK"]))  # fmt: skip
    for find_unused in (False, True):
        for has_loss in (True, False):
            for updater_kind in ("none", "ema"):
                for parameter in train(find_unused, has_loss, updater_kind):
                    largest = parameter.clone()
                    all_reduce(largest, "MAX")
                    assert torch.equal(largest, parameter), (find_unused, has_loss, updater_kind)
    dist.destroy_process_group()
    print("agreed")


if __name__ == "__main__":
    main()
