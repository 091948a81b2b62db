"""A training on several processes under DistributedDataParallel, struck by a fault on one of them.

torchrun --standalone --nproc-per-node 2 examples/ddp.py
"""

from __future__ import annotations

import argparse
import math

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import foreshock as fs

STEPS, STRUCK_AT = 60, 40


def batches() -> torch.utils.data.DataLoader[tuple[torch.Tensor, ...]]:
    """Other ones on each rank."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(STEPS * 16, 8, generator=generator)
    y = (x[:, :4].sum(1) > x[:, 4:].sum(1)).long()
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out-dir", default="runs/ddp")
    out_dir = parser.parse_args().out_dir
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    guard = fs.Guard(mode="recover", snapshot_interval=10)
    has_struck = False
    with fs.Monitor(model, optimizer, out_dir, guard) as monitor:
        for step, (x, y) in monitor.loop(batches()):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            if step == STRUCK_AT and dist.get_rank() == 1 and not has_struck:
                has_struck = True
                next(model.parameters()).data[3, 1] = math.nan  # a fault in the memory of one rank
            monitor.clip_grad_norm_(1.0, loss=loss)
            verdict = monitor.step(loss)  # the same on every rank
            optimizer.step()
            if verdict.action is fs.Action.ROLL_BACK and dist.get_rank() == 0:
                print(f"step {verdict.step}, rolled back: {verdict.offender}")
            if not verdict:
                break
    if dist.get_rank() == 0:
        print(f"final loss {monitor.finalize()['final_loss']:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
