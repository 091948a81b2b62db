"""A monitor in a loop of one's own that uses accelerate."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import foreshock as fs
from foreshock import integrations

accelerate = pytest.importorskip("accelerate")
integration = pytest.importorskip("foreshock.integrations.accelerate")

pytestmark = pytest.mark.filterwarnings("default")  # those of other people's code

FEATURES = 6
RECOVER = fs.Guard(mode="recover", snapshot_interval=6, lr_backoff=1.0)


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    """Its state is that of the whole process."""
    _reset()
    yield
    _reset()


def _reset() -> None:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def prepared(
    *, is_stateful: bool = False, ends_early: bool = False, **more: Any
) -> tuple[Any, Any, Any, Any, Any]:
    torch.manual_seed(0)
    configuration = accelerate.DataLoaderConfiguration(use_stateful_dataloader=is_stateful)
    accumulation = accelerate.utils.GradientAccumulationPlugin(2, sync_with_dataloader=ends_early)
    accelerator = accelerate.Accelerator(
        cpu=True,
        gradient_accumulation_plugin=accumulation,
        dataloader_config=configuration,
        **more,
    )
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 24)
    data = TensorDataset(torch.randn(92, FEATURES), torch.randn(92, 1))
    loader = DataLoader(data, batch_size=4, shuffle=True)
    return (accelerator, *accelerator.prepare(model, optimizer, loader, scheduler))


def train(out_dir: Path, strikes: set[int], guard: fs.Guard, is_stateful: bool) -> Any:
    accelerator, model, optimizer, loader, scheduler = prepared(is_stateful=is_stateful)
    state = {"scheduler": scheduler}
    monitor = integration.watch(accelerator, model, optimizer, out_dir, guard, state=state)
    for step, (x, y) in monitor.loop(loader, epochs=2):
        if step in strikes:
            strikes.remove(step)
            with torch.no_grad():
                model[0].weight[2, 3] = math.nan
        with accelerator.accumulate(model):
            loss = nn.functional.mse_loss(model(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.unscale_gradients()
                monitor.clip_grad_norm_(1.0)
            monitor.step(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return model, monitor.finalize()


@pytest.mark.parametrize("is_stateful", [False, True])
@pytest.mark.parametrize("strikes", [{17}, {22}, {25, 45}])
def test_a_run_that_is_struck_ends_with_the_bits_of_one_that_was_not(
    tmp_path: Path, strikes: set[int], is_stateful: bool
) -> None:
    hits = len(strikes)
    alone, _ = train(tmp_path / "a", set(), RECOVER, is_stateful)
    struck, summary = train(tmp_path / "b", set(strikes), RECOVER, is_stateful)
    assert summary["guard"]["total_rollbacks"] == hits
    assert summary["total_steps"] == 46
    pairs = zip(alone.parameters(), struck.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_steps_within_an_accumulation_are_no_updates(tmp_path: Path) -> None:
    accelerator, model, optimizer, loader, _ = prepared()
    monitor = integration.watch(accelerator, model, optimizer, tmp_path)
    updates = []
    monitor._note_call = lambda was_admitted: updates.append(was_admitted)
    monitor._gate._passed = monitor._note_call
    for _, (x, y) in monitor.loop(loader):
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
    assert updates == [True] * 11


def test_a_guard_that_cannot_act_under_an_engine_is_an_error(tmp_path: Path) -> None:
    accelerator, model, optimizer, _, _ = prepared()
    accelerator.state.distributed_type = accelerate.DistributedType.FSDP
    with pytest.raises(ValueError, match="mode='recover', but under FSDP"):
        integration.watch(accelerator, model, optimizer, tmp_path, RECOVER)
    integration.watch(accelerator, model, optimizer, tmp_path).finalize()


def test_a_rollback_where_accumulations_end_with_the_loader_is_an_error(tmp_path: Path) -> None:
    accelerator, model, optimizer, _, _ = prepared(ends_early=True)
    with pytest.raises(ValueError, match="sync_with_dataloader=False"):
        integration.watch(accelerator, model, optimizer, tmp_path, RECOVER)
    integration.watch(accelerator, model, optimizer, tmp_path).finalize()


def test_parameters_of_a_compiled_model_have_the_names_that_they_have_in_it(tmp_path: Path) -> None:
    accelerator, model, optimizer, _, _ = prepared(dynamo_backend="eager")
    monitor = integration.watch(accelerator, model, optimizer, tmp_path, RECOVER)
    accelerator.backward(model(torch.full((4, FEATURES), math.nan)).sum())
    verdict = monitor.step(1.0)
    assert verdict.offender is not None
    assert verdict.offender.name == "0.weight"


def test_without_accelerate_the_error_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "foreshock.integrations.accelerate")
    monkeypatch.delattr(integrations, "accelerate")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"pip install 'foreshock\[accelerate\]'"):
        integrations.accelerate  # noqa: B018
