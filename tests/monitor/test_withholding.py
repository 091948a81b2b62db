"""What withholding an update means, and how it goes with the ways that people train."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau

import foreshock as fs
from tests.monitor import training as t
from tests.monitor.test_recovery import OPTIMIZERS


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("judges_first", [True, False])
def test_trap_3_a_withheld_update_leaves_every_bit(
    tmp_path: Path, name: str, judges_first: bool
) -> None:
    """Parameters, moments, step counts; with weight decay and momentum."""
    run = t.make_run(optimizer=OPTIMIZERS[name], judges_first=judges_first)
    kept: dict[str, Any] = {}

    def keep(run: t.Run) -> None:
        t.nan_in_gradient(run)
        kept.update(copy.deepcopy(t.state_of(run)))

    run.strikes = [t.Strike(5, keep, "backward")]

    def compare(run: t.Run) -> None:
        assert kept
        assert t.differing(t.state_of(run), kept) == []
        kept.clear()

    run.strikes.append(t.Strike(5, compare, "update"))
    summary = t.train_guarded(run, tmp_path)
    assert not kept
    assert summary["guard"]["skipped_steps"] == 1


def test_trap_4_the_first_step_is_protected_by_absolute_bounds(tmp_path: Path) -> None:
    run = t.make_run(strikes=[t.Strike(0, t.nan_in_gradient, "backward")])
    before = [p.detach().clone() for p in run.model.parameters()]
    monitor = t.make_monitor(run, tmp_path)
    step, batch = next(loop := monitor.loop(run.loader))
    t.train_step(run, step, batch, monitor)
    assert all(t.same(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
    assert run.verdicts[0].action is fs.Action.SKIP
    assert monitor.step(1e7).action is fs.Action.SKIP  # the first word on a step stands
    loop.close()


def test_trap_5_huge_but_finite_gradients_are_no_alarm(tmp_path: Path) -> None:
    """The square of 1e30 is beyond float32."""
    p = nn.Parameter(torch.zeros(3))
    optimizer = SGD([p], lr=1e-30)
    model = nn.ParameterList([p])
    with fs.Monitor(model, optimizer, tmp_path, fs.Guard(mode="skip")) as monitor:
        p.grad = torch.full((3,), 1e30)
        assert monitor.step(1.0).action is fs.Action.CONTINUE
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), -1.0))


def test_a_nan_in_one_micro_batch_withholds_its_update_and_counts_as_one_skip(
    tmp_path: Path,
) -> None:
    run = t.make_run(accumulation=4, epochs=4, zeroes_first=False)
    run.strikes = [t.Strike(8, t.nan_in_gradient, "backward")]
    summary = t.train_guarded(run, tmp_path)
    assert [v.step for v in run.verdicts if v.action is fs.Action.SKIP] == [8, 9, 10, 11]
    assert summary["guard"]["skipped_steps"] == 1
    assert summary["guard"]["total_rollbacks"] == 0
    assert [e["step"] for e in t.events(tmp_path, "update_skipped")] == [11]
    assert [e["step"] for e in t.events(tmp_path, "anomaly_seen")] == [8, 9, 10]


@pytest.mark.parametrize("has_loop", [True, False])
@pytest.mark.parametrize("bad_micro_step", [0, 1, 2])
def test_accumulated_gradients_are_looked_at_however_late_they_went_bad(
    tmp_path: Path, has_loop: bool, bad_micro_step: int
) -> None:
    """Update first, verdict after: the verdict at hand is on the micro-step before."""
    model = nn.Linear(2, 1)
    optimizer = SGD(model.parameters(), lr=0.1)
    monitor = fs.Monitor(model, optimizer, tmp_path, fs.Guard(mode="skip"))
    before = copy.deepcopy(model.weight)
    batches = [torch.ones(1, 2)] * 3
    for step, x in monitor.loop(batches) if has_loop else enumerate(batches):
        loss = model(x).sum()
        loss.backward()
        if step == bad_micro_step:
            model.weight.grad[0, 0] = math.nan
        if step == 2:
            optimizer.step()
        monitor.step(loss)
    assert t.same(model.weight, before)
    assert monitor.finalize()["guard"]["skipped_steps"] == 1


def test_gradients_spoilt_after_the_verdict_are_still_withheld(tmp_path: Path) -> None:
    run = t.make_run()
    with t.make_monitor(run, tmp_path, mode="skip") as monitor:
        for step, (x, y) in monitor.loop(run.loader):
            run.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(run.model(x), y)
            loss.backward()
            assert monitor.step(loss).action is fs.Action.CONTINUE
            if step == 3:
                for p in run.model.parameters():
                    p.grad.mul_(math.inf)
            run.optimizer.step()
            assert all(p.isfinite().all() for p in run.model.parameters())
    assert [e["step"] for e in t.events(tmp_path, "update_skipped")] == [3]


def test_two_updates_in_one_turn_of_the_loop_are_both_guarded(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    optimizer = SGD(model.parameters(), lr=0.1)
    with fs.Monitor(model, optimizer, tmp_path, fs.Guard(mode="skip")) as monitor:
        for step, x in monitor.loop([torch.ones(1, 2)] * 4):
            for part in range(2):
                optimizer.zero_grad()
                loss = model(x).sum()
                loss.backward()
                if (step, part) == (2, 1):
                    model.bias.grad.fill_(math.nan)
                if part == 0:
                    monitor.step(loss)
                before = model.weight.detach().clone()
                optimizer.step()
                assert t.same(before, model.weight) == ((step, part) == (2, 1))
    assert monitor.finalize()["guard"]["skipped_steps"] == 1


def test_an_update_withheld_without_a_verdict_being_asked_for_is_told_of(tmp_path: Path) -> None:
    for has_loop in (True, False):
        model = nn.Linear(2, 1)
        optimizer = SGD(model.parameters(), lr=0.1)
        out_dir = tmp_path / str(has_loop)
        with fs.Monitor(model, optimizer, out_dir, fs.Guard(mode="recover")) as monitor:
            batches = [torch.ones(1, 2)] * 5
            for step, x in monitor.loop(batches) if has_loop else enumerate(batches):
                optimizer.zero_grad()
                model(x).sum().backward()
                if step == 2:
                    model.bias.grad.fill_(math.nan)
                optimizer.step()
        assert [e["step"] for e in t.events(out_dir, "update_skipped")] == [2]
        assert monitor.finalize()["total_steps"] == 5
        assert model.weight.isfinite().all()


def test_clearing_the_gradients_before_the_verdict_hides_nothing(tmp_path: Path) -> None:
    for mode in ("observe", "skip"):
        run = t.make_run()
        with t.make_monitor(run, tmp_path / mode, mode=mode) as monitor:
            for step, (x, y) in monitor.loop(run.loader):
                loss = nn.functional.cross_entropy(run.model(x), y)
                loss.backward()
                if step == 3:
                    with torch.no_grad():
                        run.model.body[1].bias.grad[2] = math.inf
                run.optimizer.step()
                run.optimizer.zero_grad()
                verdict = monitor.step(loss.detach())
                if step == 3:
                    assert fs.guard.Reason.NONFINITE_GRADIENT in verdict.reasons
                    break


def test_lbfgs_runs_as_ever_and_is_said_once_not_to_be_guarded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def make() -> t.Run:
        return t.make_run(optimizer=lambda ps: LBFGS(ps, lr=0.1, max_iter=3, history_size=4))

    def go(run: t.Run, monitor: fs.Monitor | None) -> list[float]:
        returned = []
        for step, (x, y) in run.batches(monitor):

            def closure(x: Any = x, y: Any = y) -> torch.Tensor:
                run.optimizer.zero_grad()
                loss = nn.functional.cross_entropy(run.model(x), y)
                loss.backward()
                return loss

            t.strike(run, step, "start")
            loss = run.optimizer.step(closure)
            returned.append(loss.item())
            if monitor is not None:
                monitor.step(loss)
        return returned

    losses = go(clean := make(), None)
    struck = make()
    struck.strikes = [t.Strike(7, t.nan_in_weight)]
    with caplog.at_level(logging.WARNING, "foreshock"):
        again = go(struck, t.make_monitor(struck, tmp_path))
    assert again[:7] + again[8 + 3 :] == losses  # 7 failed, and 4 to 6 came again
    assert sum("not guarded" in r.message for r in caplog.records) == 1
    t.assert_same_bits(struck, clean)


class Embedder(nn.Module):
    """Sparse gradients, tied weights, and a parameter that gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4, sparse=True)
        self.inner = nn.Linear(4, 4)
        self.outer = nn.Linear(4, 4)
        self.outer.weight = self.inner.weight
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.inner(self.embed(x)).tanh()).sum(-1) * self.frozen.mean()


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("kind", ["sparse", "tied", "weight"])
def test_sparse_tied_frozen_and_unused_parameters_recover(tmp_path: Path, kind: str) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        t.seed_everything(0)
        model = Embedder()
        groups = [
            {"params": [model.embed.weight], "lr": 0.2},
            {"params": [p for n, p in model.named_parameters() if "embed" not in n]},
        ]
        return model, SGD(groups, lr=0.1, momentum=0.5)

    def go(model: Any, optimizer: Any, monitor: Any) -> None:
        data = torch.randint(10, (12, 3), generator=torch.Generator().manual_seed(1))
        struck = False
        for step, x in monitor.loop(list(data)) if monitor else enumerate(data):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            if monitor is None:
                fs.clip_grad_norm_(model.parameters(), 0.5)
            elif step == 6 and not struck:
                struck = True
                strike_embedder(model, kind)
                monitor.clip_grad_norm_(0.5)
            else:
                monitor.clip_grad_norm_(0.5)
            if monitor:
                verdicts.append(monitor.step(loss))
            optimizer.step()

    verdicts: list[fs.Verdict] = []
    clean, clean_optimizer = make()
    go(clean, clean_optimizer, None)
    model, optimizer = make()
    guard = fs.Guard(mode="recover", snapshot_interval=4, max_consecutive_skips=1, lr_backoff=1.0)
    with fs.Monitor(model, optimizer, tmp_path, guard) as monitor:
        go(model, optimizer, monitor)
    names = {"sparse": "embed.weight", "tied": "inner.weight", "weight": "frozen"}
    offender = verdicts[6].offender
    assert offender is not None
    assert (offender.name, offender.nan) == (names[kind], 1)
    assert all(t.same(a, b) for a, b in zip(model.parameters(), clean.parameters(), strict=True))
    assert model.unused.grad is None


def strike_embedder(model: Any, kind: str) -> None:
    if kind == "sparse":
        model.embed.weight.grad._values()[0, 0] = math.nan
    elif kind == "tied":
        model.outer.weight.grad[0, 0] = math.nan
    else:
        with torch.no_grad():
            model.frozen[2] = math.nan


def test_parameters_outside_of_the_model_are_guarded_and_restored(tmp_path: Path) -> None:
    """A loss with weights of its own, known to the optimizer only."""
    model, extra = nn.Linear(2, 2), nn.Parameter(torch.ones(2))
    optimizer = AdamW([{"params": model.parameters()}, {"params": [extra]}], lr=0.1)
    guard = fs.Guard(mode="recover", snapshot_interval=2, lr_backoff=1.0)
    with fs.Monitor(model, optimizer, tmp_path, guard) as monitor:
        verdicts = []
        struck = False
        for step, x in monitor.loop([torch.ones(1, 2)] * 8):
            if step == 5 and not struck:
                struck = True
                with torch.no_grad():
                    extra[1] = math.nan
            optimizer.zero_grad()
            loss = (model(x) * extra).sum().square()
            loss.backward()
            verdicts.append(monitor.step(loss))
            optimizer.step()
    offender = verdicts[5].offender
    assert offender is not None
    assert (offender.kind, offender.name) == ("parameter", "param_groups.1.0")
    assert extra.isfinite().all()


def test_reduce_lr_on_plateau_recovers_bit_identical(tmp_path: Path) -> None:
    """It steps on the loss, so it is told that of a step that fails too."""

    def go(run: t.Run, monitor: fs.Monitor | None) -> t.Run:
        for step, (x, y) in run.batches(monitor):
            t.strike(run, step, "start")
            run.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(run.model(x), y)
            loss.backward()
            if monitor:
                monitor.step(loss)
            run.optimizer.step()
            run.scheduler.step(loss.item())
        return run

    def make() -> t.Run:
        return t.make_run(scheduler=lambda o: ReduceLROnPlateau(o, patience=0, factor=0.5))

    clean, struck = go(make(), None), make()
    assert clean.optimizer.param_groups[0]["lr"] < 1e-2
    struck.strikes = [t.Strike(6, t.nan_in_weight)]
    go(struck, t.make_monitor(struck, tmp_path))
    t.assert_same_bits(struck, clean)


def test_trap_15_average_scheduler_generators_and_data_belong_to_the_state(
    tmp_path: Path,
) -> None:
    """An average updated with NaN weights stays NaN for ever, unless it is restored too."""
    how: dict[str, Any] = {"has_average": True, "scheduler": cosine, "judges_first": False}
    clean, struck = t.train(t.make_run(**how)), t.make_run(**how)
    struck.strikes = [t.Strike(6, t.nan_in_weight, "backward")]
    t.train_guarded(struck, tmp_path / "registered")
    t.assert_same_bits(struck, clean)
    forgotten = t.make_run(**how)
    forgotten.strikes = [t.Strike(6, t.nan_in_weight, "backward")]
    guard = fs.Guard(mode="recover", snapshot_interval=4, lr_backoff=1.0)
    with fs.Monitor(forgotten.model, forgotten.optimizer, tmp_path / "forgotten", guard) as monitor:
        t.train(forgotten, monitor)
    assert forgotten.average is not None
    assert any(p.isnan().any() for p in forgotten.average.parameters())


def cosine(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)


def test_trap_13_pointers_of_parameters_and_moments_survive_a_rollback(tmp_path: Path) -> None:
    run = t.make_run()
    pointers: list[list[int]] = []

    def look(run: t.Run) -> None:
        moments = [v for s in run.optimizer.state.values() for v in s.values()]
        pointers.append([x.data_ptr() for x in [*run.model.parameters(), *moments]])

    run.strikes = [t.Strike(step, hit) for step in (6, 9) for hit in (look, t.nan_in_weight)]
    summary = t.train_guarded(run, tmp_path)
    look(run)
    assert summary["guard"]["total_rollbacks"] == 2
    assert pointers[0] == pointers[1] == pointers[2]


def test_model_and_optimizer_can_be_copied_and_saved_while_watched(tmp_path: Path) -> None:
    """Nothing is hooked into the model, and the gate stays with the optimizer it was put on."""
    run = t.make_run()
    monitor = t.make_monitor(run, tmp_path)
    assert not any(m._forward_hooks or m._backward_hooks for m in run.model.modules())
    torch.save((run.model, run.optimizer), tmp_path / "run.pt")
    for model, optimizer in (
        copy.deepcopy((run.model, run.optimizer)),
        torch.load(tmp_path / "run.pt", weights_only=False),
    ):
        for p in model.parameters():
            p.grad = torch.full_like(p, math.nan)
        optimizer.step()
        assert all(p.isnan().all() for p in model.parameters())
    assert monitor.finalize()["guard"]["skipped_steps"] == 0


def test_trap_7_the_search_of_a_loss_scaler_for_its_scale_is_no_alarm(tmp_path: Path) -> None:
    """It starts where every gradient is infinite; until they fit it does not call the optimizer."""
    run = t.make_run(max_norm=None)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-10)
    guard = fs.Guard(mode="recover", snapshot_interval=4, lr_backoff=1.0)
    with fs.Monitor(run.model, run.optimizer, tmp_path, guard, state={"scaler": scaler}) as monitor:
        struck = False
        for step, (x, y) in monitor.loop(run.loader, epochs=4):
            if step == 20 and not struck:
                struck = True
                with torch.no_grad():
                    t.nan_in_weight(run)
            run.optimizer.zero_grad()
            loss = 1e12 * nn.functional.cross_entropy(run.model(x), y)
            scaler.scale(loss).backward()
            scaler.unscale_(run.optimizer)
            assert monitor.step(loss / 1e12)
            scaler.step(run.optimizer)
            scaler.update()
    summary = monitor.finalize()
    assert summary["guard"]["anomalies_seen"] == summary["guard"]["skipped_steps"] == 0
    assert summary["guard"]["total_rollbacks"] == summary["guard"]["total_recoveries"] == 1
    assert summary["total_steps"] == 24
