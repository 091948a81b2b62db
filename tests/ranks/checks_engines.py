"""Engines of accelerate that give each rank parameters of its own."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from foreshock.records import read_telemetry
from tests.ranks.training import gathered, ranks


@ranks(2)
def check_observing_under_an_engine_that_shards_is_done_by_each_rank_alone(out: Path) -> None:
    """Their parameters need not even have the same shapes (FSDP1, which needs a device)."""
    if importlib.util.find_spec("accelerate") is None:
        return
    accelerate = importlib.import_module("accelerate")
    integration = importlib.import_module("foreshock.integrations.accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = nn.Linear(2 + dist.get_rank(), 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator.state.distributed_type = accelerate.DistributedType.FSDP
    accelerator.state.process_index = dist.get_rank()
    accelerator.state.num_processes = dist.get_world_size()
    monitor = integration.watch(accelerator, model, optimizer, out, telemetry_interval=1)
    for step in range(3):
        assert monitor.step(float(dist.get_rank()))
        assert monitor.latest["step"] == step
    monitor.finalize()
    gathered(None)
    for rank, folder in enumerate((out, out / "rank_00001")):
        told = read_telemetry(folder / "telemetry.jsonl").records
        assert [r["train_loss"] for r in told if r["event"] == "telemetry"] == [rank] * 3
