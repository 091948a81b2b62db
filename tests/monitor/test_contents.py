"""Everything that belongs to the state of a run comes back after a rollback, each for itself."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

import foreshock as fs
from tests.monitor import training as t


class Counter:
    """Something of the user's own."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


class Everything:
    """A run with one of each kind of state, and what each is at a step."""

    def __init__(self) -> None:
        self.run = t.make_run(has_average=True, optimizer=lambda ps: torch.optim.AdamW(ps, lr=0.01))
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.run.optimizer, [2, 5, 5, 8])
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        self.counter = Counter()
        self.second = nn.Linear(2, 2)
        self.second_optimizer = torch.optim.SGD(self.second.parameters(), lr=0.1, momentum=0.9)

    @property
    def state(self) -> dict[str, Any]:
        return {
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "average": self.run.average,
            "counter": self.counter,
            "second": self.second,
            "second_optimizer": self.second_optimizer,
        }

    def look(self, monitor: fs.Monitor) -> dict[str, Any]:
        run = self.run
        assert run.average is not None
        owners: dict[str, Any] = {
            "parameters": dict(run.model.named_parameters()),
            "buffers": dict(run.model.named_buffers()),
            "moments": list(run.optimizer.state.values()),
            "groups": [{k: v for k, v in g.items() if k != "params"}
                       for g in run.optimizer.param_groups],
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": dict(run.average.state_dict()),
            "counter": self.counter.count,
            "second": dict(self.second.state_dict()),
            "second moments": list(self.second_optimizer.state.values()),
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
            "spikes": monitor._watch._spikes.state_dict(),
            "spectral": monitor._watch.history._parts["spectral"].live(),
        }  # fmt: skip
        return dict(fs.guard.containers.leaves_in(fs.guard.containers.copy_out(owners)))

    def step(self, batch: Any, monitor: fs.Monitor) -> fs.Verdict:
        run = self.run
        run.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(run.model(batch[0]), batch[1])
        self.scaler.scale(loss).backward()
        verdict = monitor.step(loss)
        self.scaler.step(run.optimizer)
        self.scaler.update()
        self.scheduler.step()
        assert run.average is not None
        run.average.update_parameters(run.model)
        self.second_optimizer.zero_grad()
        self.second(torch.rand(2)).sum().backward()
        self.second_optimizer.step()
        self.counter.count += 1
        return verdict


def spoil(every: Everything) -> None:
    """Whatever can be changed is changed, between the verdict and the next step."""
    run = every.run
    assert run.average is not None
    with torch.no_grad():
        for tensor in [
            *run.model.parameters(), *run.average.parameters(), *every.second.parameters(),
        ]:  # fmt: skip
            tensor.fill_(torch.nan)
        for buffer in run.model.buffers():
            buffer.fill_(1)
    run.optimizer.state.clear()
    every.second_optimizer.state.clear()
    run.optimizer.param_groups[0].update(lr=9.0, betas=(0.5, 0.5), weight_decay=1.0)
    every.scheduler.last_epoch = 77
    every.scheduler.milestones.clear()
    every.scaler.load_state_dict({**every.scaler.state_dict(), "scale": 0.5})
    every.counter.count = -1
    random.seed(1), np.random.seed(1), torch.manual_seed(1)


def test_each_part_of_the_state_is_what_it_was_and_where_it_was(tmp_path: Path) -> None:
    every = Everything()
    guard = fs.Guard(mode="recover", snapshot_interval=4, lr_backoff=1.0)
    seen: dict[int, dict[str, Any]] = {}
    pointers: dict[int, list[int]] = {}
    has_struck = False
    with fs.Monitor(
        every.run.model, every.run.optimizer, tmp_path, guard, state=every.state,
        spectral_interval=1,
    ) as monitor:  # fmt: skip
        for step, batch in monitor.loop(every.run.loader, epochs=2):
            now = every.look(monitor)
            if step in seen:
                assert t.differing(now, seen[step]) == []
                assert [p.data_ptr() for p in every.run.model.parameters()] == pointers[step]
            seen[step] = now
            pointers[step] = [p.data_ptr() for p in every.run.model.parameters()]
            if step == 7 and not has_struck:
                has_struck = True
                with torch.no_grad():
                    t.nan_in_weight(every.run)
                assert every.step(batch, monitor).action is fs.Action.ROLL_BACK
                spoil(every)
                continue
            assert every.step(batch, monitor)
    assert monitor.finalize()["guard"]["total_recoveries"] == 1
    # Each kind has changed on the way: else this would have proved nothing.
    kinds = {path.split(".")[0] for path in t.differing(seen[4], seen[8])}
    assert kinds == {path.split(".")[0] for path in seen[4]}


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(("num_workers", "strikes_at"), [(0, 3), (0, 6), (0, 7), (0, 11), (2, 8)])
def test_a_loop_over_torchdatas_loader_is_rewound_by_the_loader_itself(
    tmp_path: Path, num_workers: int, strikes_at: int
) -> None:
    def loader() -> StatefulDataLoader[Any]:
        return StatefulDataLoader(
            t.make_dataset(), batch_size=t.BATCH, shuffle=True, num_workers=num_workers
        )

    clean = t.train(t.make_run(loader=loader))
    run = t.make_run(loader=loader, strikes=[t.Strike(strikes_at, t.nan_in_weight)])
    with t.make_monitor(run, tmp_path, snapshot_interval=3, clean_steps=1) as monitor:
        for step, batch in run.batches(monitor):
            run.steps.append(step)
            t.train_step(run, step, batch, monitor)
            assert not hasattr(monitor._watch.history.source, "_kept")
    back_to = (strikes_at - 1) // 3 * 3
    assert run.steps == [*range(strikes_at + 1), *range(back_to, 12)]
    t.assert_same_bits(run, clean)


def test_trap_18_every_update_is_held_back_until_the_copies_are_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    run = t.make_run()
    monkeypatch.setattr(
        fs.guard.SnapshotRing, "hold_back_update", lambda self: order.append("held back")
    )
    with t.make_monitor(run, tmp_path) as monitor:
        run.optimizer.register_step_pre_hook(lambda *_: order.append("update"))
        t.train(run, monitor)
    assert order == ["held back", "update"] * 12
