"""Engines that shard are no place for a guard that sees its own process only, and it says so."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.integrations.trainers import (
    have_equal_bits,
    monitor_callback,
    trainer,
    transformers,
)

accelerate = pytest.importorskip("accelerate")
why_unguarded = pytest.importorskip("foreshock.integrations.accelerate").why_unguarded

pytestmark = pytest.mark.filterwarnings("default")  # those of other people's code

SHARDING = ["FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"]


class Pretend(transformers.TrainerCallback):  # type: ignore[misc]
    """Has the accelerator name another engine from now on; what it does stays as it was."""

    def __init__(self, engine: str) -> None:
        self.engine = accelerate.DistributedType(engine)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        accelerate.state.AcceleratorState().distributed_type = self.engine


@pytest.fixture
def process_group() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_every_engine_of_accelerate_is_either_guarded_or_said_not_to_be() -> None:
    model = nn.Linear(2, 2)
    unguarded = {
        engine.value
        for engine in accelerate.DistributedType
        if why_unguarded(engine.value, model) is not None
    }
    assert unguarded == set(SHARDING)


def test_distributed_parameters_are_guarded_if_fsdp_has_distributed_them(
    process_group: None,
) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    model = fully_shard(nn.Linear(2, 2), mesh=mesh)
    assert why_unguarded("FSDP", model) is None
    for engine in ("MULTI_GPU", "DEEPSPEED", "MEGATRON_LM"):
        why = why_unguarded(engine, model)
        assert why is not None
        assert "not by accelerate's FSDP" in why


@pytest.mark.parametrize("engine", SHARDING)
def test_a_guard_under_such_an_engine_is_an_error_before_the_first_step(
    tmp_path: Path, engine: str
) -> None:
    around = [Pretend(engine), monitor_callback(tmp_path, guard_enabled=True)]
    one = trainer(tmp_path, *around, max_steps=2)
    with pytest.raises(ValueError, match=f"mode='recover', but under {engine}"):
        one.train()
    assert one.state.global_step == 0
    assert not (tmp_path / "run").exists()


def test_observing_there_is_told_once_and_harms_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone = trainer(tmp_path / "alone", max_steps=4)
    alone.train()
    callback = monitor_callback(tmp_path)
    watched = trainer(tmp_path, Pretend("FSDP"), callback, Pretend("NO"), max_steps=4)
    with caplog.at_level(logging.WARNING, "foreshock"):
        watched.train()
    assert sum("under FSDP" in record.getMessage() for record in caplog.records) == 1
    assert have_equal_bits(alone.model, watched.model)
    assert callback.summary["total_steps"] == 4


def test_where_no_gradients_are_seen_the_loss_still_is(tmp_path: Path) -> None:
    """As under DeepSpeed, which keeps them to itself."""
    callback = monitor_callback(tmp_path)
    hidden = dict.fromkeys(range(4), nn.Module.zero_grad)
    trainer(tmp_path, callback, strikes_after=hidden, max_steps=4).train()
    assert callback.summary["total_steps"] == 4
    assert callback.summary["final_loss"] > 0
    assert callback.summary["guard"]["anomalies_seen"] == 0
