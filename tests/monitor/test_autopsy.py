"""A step that has failed is run again under hooks: what that says, and that it leaves no trace."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foreshock as fs
from foreshock import monitor as monitor_module
from foreshock.guard import LaggingWatch, Watch, hash_batch
from foreshock.guard.examination import Examination
from foreshock.records import read_autopsy
from tests.monitor import training as t

BAD = 6
"""The batch that fails, and the step that it is of."""


class SquareRootOfZero(torch.autograd.Function):
    """x -> 0 with the gradient of sqrt at 0 times 0: NaN backward, finite forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 0 * torch.tensor(math.inf)


class Trap(nn.Module):
    """Does its worst with a batch whose first value is 99."""

    def __init__(self, worst: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.worst = worst

    def forward(self, x: Tensor) -> Tensor:
        return self.worst(x) if self.is_set else x

    is_set = False


class Net(nn.Module):
    """Two layers, and a trap between them that is called twice."""

    def __init__(self, worst: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.trap = Trap(worst)
        self.last = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.trap(torch.tanh(self.first(x)))
        self.trap.is_set = bool(x[0, 0] == 99)
        hidden = self.trap(hidden)
        self.trap.is_set = False
        return self.last(hidden)


def make_batches(bad: float = 0.0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    batches = [{"x": torch.randn(2, 3, generator=generator)} for _ in range(12)]
    if bad:
        batches[BAD]["x"][0, 0] = bad
    return batches


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["x"]).square().mean()


@pytest.fixture(params=["waits", "lags"])
def lags(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param == "lags":
        monkeypatch.setattr(monitor_module, "_LAGGING_DEVICE", "cpu")
    return bool(request.param == "lags")


def run_on(
    batches: list[Any],
    out_dir: Path,
    model: nn.Module,
    loss_of: Callable[[nn.Module, Any], Tensor] = loss_of,
    strike: Callable[[nn.Module, int, int], None] = lambda model, step, turn: None,
    **guard: Any,
) -> tuple[fs.Monitor, dict[str, Any], list[int]]:
    """Trains over the batches; monitor, summary, and the steps as they were run."""
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, fused=True)
    options = {"snapshot_interval": 4, "lr_backoff": 1.0, "max_consecutive_skips": 1, **guard}
    options = {"mode": "recover", "max_rollbacks": 2, "clean_steps": 1, **options}
    monitor = fs.Monitor(
        model, optimizer, out_dir, fs.Guard(**options), spectral_enabled=False, telemetry_interval=1
    )
    steps: list[int] = []
    for step, batch in monitor.loop(batches):
        steps.append(step)
        strike(model, step, len(steps))
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        monitor.clip_grad_norm_(1.0)
        goes_on = monitor.step(loss)
        optimizer.step()
        if not goes_on:
            break
    return monitor, monitor.finalize(), steps


def number_of_hooks(model: nn.Module) -> int:
    modules = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return modules + sum(len(p._backward_hooks or ()) for p in model.parameters())


# ---- transient


def test_a_fault_that_does_not_come_again_is_transient(tmp_path: Path, lags: bool) -> None:
    def strike(model: nn.Module, step: int, turn: int) -> None:
        if turn == BAD + 1:
            with torch.no_grad():
                model.last.weight[0, 2] = math.nan

    model = Net()
    monitor, summary, steps = run_on(make_batches(), tmp_path, model, strike=strike)
    assert isinstance(monitor._watch, LaggingWatch) == lags
    assert steps == [*range(BAD + 1 + lags), *range(4, 12)]
    assert summary["guard"]["autopsies"] == {
        "transient": 1, "deterministic": 0, "not_replayed": 0,
    }  # fmt: skip
    found = read_autopsy(tmp_path, BAD)
    assert found["cause"] == "transient"
    assert found["first"]["offender"]["name"] == "last.weight"
    assert found["first"]["reasons"][0] == "NONFINITE_WEIGHTS"
    assert math.isnan(found["first"]["loss"])
    assert found["again"] == {"reasons": [], "offender": None, "loss": pytest.approx(0.2, abs=0.3)}
    assert found["place"] is None
    assert (found["step"], found["to_step"], found["lr_factor"]) == (BAD, 4, 1.0)
    assert found["batch"]["index"] == BAD
    assert found["batch"]["hash"] == hash_batch(make_batches()[BAD])
    assert "transient: suspect the hardware" in found["sentence"]
    assert number_of_hooks(model) == 0


def test_with_another_learning_rate_the_hardware_is_not_suspected(tmp_path: Path) -> None:
    run = t.make_run(strikes=[t.Strike(6, t.nan_in_weight)])
    t.train_guarded(run, tmp_path, lr_backoff=0.5)
    found = read_autopsy(tmp_path, 6)
    assert found["cause"] == "transient"
    assert found["lr_factor"] == 0.5
    assert "hardware" not in found["sentence"]


# ---- deterministic: where


def log_of_zero(x: Tensor) -> Tensor:
    return torch.log(x * 0)


def nan(x: Tensor) -> Tensor:
    return x / 0 * 0


def too_large(x: Tensor) -> Tensor:
    return x.abs() * 3e38 * 1e3


@pytest.mark.parametrize("worst", [log_of_zero, nan, too_large])
def test_the_module_that_makes_it_is_named(
    tmp_path: Path, lags: bool, worst: Callable[[Tensor], Tensor]
) -> None:
    model = Net(worst)
    _, summary, steps = run_on(make_batches(99), tmp_path, model)
    assert steps.count(BAD) == 3  # it is examined once, and aborted at the third time
    assert summary["guard"]["autopsies"]["deterministic"] == 1
    (told,) = t.events(tmp_path, "autopsy")
    found = read_autopsy(tmp_path, BAD)
    value = "NaN" if worst is nan else "Inf"
    assert found["sentence"] == f"batch {BAD} makes {value} in trap (deterministic)"
    place = found["place"]
    assert (place["kind"], place["name"], place["type"]) == ("module", "trap", "Trap")
    assert place["call"] == 2
    assert place["had_finite_inputs"] is True
    (given,), (made,) = place["inputs"], place["outputs"]
    assert (given["path"], given["shape"], given["dtype"]) == ("0", [2, 4], "float32")
    assert -1 <= given["min"] < given["max"] <= 1
    assert given["min"] < given["mean"] < given["max"]
    assert given["rms"] >= abs(given["mean"])
    assert made["nan"] + made["inf"] == 8
    assert made["min"] is made["max"] is made["mean"] is made["rms"] is None
    assert told["sentence"] == found["sentence"]
    assert told["step"] == BAD
    assert (told["cause"], told["place"], told["name"]) == ("deterministic", "module", "trap")
    assert (told["batch"], told["batch_hash"]) == (BAD, found["batch"]["hash"])
    assert told["file"] == f"autopsy/step_{BAD}.json"
    assert number_of_hooks(model) == 0


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_batch_that_is_not_finite_is_said_to_be(tmp_path: Path, lags: bool, value: float) -> None:
    run_on(make_batches(value), tmp_path, Net())
    found = read_autopsy(tmp_path, BAD)
    name = "NaN" if math.isnan(value) else "Inf"
    assert found["sentence"] == (
        f"batch {BAD} holds {name}, and first is the first to be given it (deterministic)"
    )
    assert (found["place"]["kind"], found["place"]["name"]) == ("module", "first")
    assert found["place"]["had_finite_inputs"] is False
    (held,) = found["batch"]["tensors"]
    assert held["path"] == "x"
    assert held["nan"] + held["inf"] == 1
    assert held["min"] <= held["mean"] <= held["max"]


def test_a_loss_that_is_not_finite_by_itself_is_no_module_s(tmp_path: Path, lags: bool) -> None:
    def log_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        made = model(batch["x"])
        return -torch.log(made.clamp(max=0) * 0 if batch["x"][0, 0] == 99 else 1 + made**2).mean()

    run_on(make_batches(99), tmp_path, Net(), log_loss)
    found = read_autopsy(tmp_path, BAD)
    assert found["place"]["kind"] == "loss"
    assert found["again"]["loss"] == math.inf
    assert found["sentence"] == (
        f"batch {BAD} makes the loss Inf, though every module's output is finite (deterministic)"
    )


@pytest.mark.parametrize("trick", ["function", "where"])
def test_the_first_parameter_of_the_backward_pass_is_named(
    tmp_path: Path, lags: bool, trick: str
) -> None:
    """Everything is finite forward. Backward, `last` is passed before the NaN comes up."""

    def where(x: Tensor) -> Tensor:
        zero = x * 0
        return torch.where(zero > 0, zero.sqrt(), 0.0)

    run_on(
        make_batches(99), tmp_path, Net(SquareRootOfZero.apply if trick == "function" else where)
    )
    found = read_autopsy(tmp_path, BAD)
    assert found["again"]["reasons"][0] == "NONFINITE_GRADIENT"
    assert found["place"]["kind"] == "gradient"
    assert found["place"]["name"] in ("first.weight", "first.bias")
    assert found["place"]["gradient"]["nan"] > 0
    assert "in the gradient of first." in found["sentence"]


def test_a_weight_that_is_bad_before_the_step_is_told_from_what_the_step_does(
    tmp_path: Path, lags: bool
) -> None:
    """The update before made it so, both times."""
    run = t.make_run(
        optimizer=lambda ps: torch.optim.AdamW(ps, lr=1e-2, fused=True),
        strikes=[t.Strike(BAD - 1, t.nan_in_weight, "update", lives=9)],
    )
    t.train_guarded(run, tmp_path, max_rollbacks=2)
    found = read_autopsy(tmp_path, BAD)
    assert (found["place"]["kind"], found["place"]["name"]) == ("before", "head.weight")
    assert found["place"]["offender"]["nan"] == 1
    assert found["sentence"] == "head.weight holds NaN before it begins (deterministic)"


def test_a_weight_that_goes_bad_within_the_step_is_named_with_its_module(tmp_path: Path) -> None:
    run = t.make_run(strikes=[t.Strike(BAD, t.nan_in_weight, lives=9)])
    t.train_guarded(run, tmp_path, max_rollbacks=2)
    found = read_autopsy(tmp_path, BAD)
    assert found["place"]["name"] == "head"
    assert found["sentence"] == (
        f"weight of head holds NaN when batch {BAD} reaches it (deterministic)"
    )


def test_the_fault_of_the_last_update_is_examined_too(tmp_path: Path, lags: bool) -> None:
    for name, lives, cause in (("once", 1, "transient"), ("always", 9, "deterministic")):
        run = t.make_run(
            optimizer=lambda ps: torch.optim.AdamW(ps, lr=1e-2, fused=True),
            strikes=[t.Strike(11, t.nan_in_weight, "update", lives=lives)],
        )
        t.train_guarded(run, tmp_path / name, max_rollbacks=1)
        found = read_autopsy(tmp_path / name, 12)
        assert found["cause"] == cause
        assert found["batch"] is None
        if cause == "deterministic":
            assert found["place"]["kind"] == "before"
            assert found["place"]["name"] == "head.weight"


def test_a_loss_over_the_threshold_has_no_place(tmp_path: Path, lags: bool) -> None:
    def large(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return loss_of(model, batch) + 1e9 * (batch["x"][0, 0] == 99)

    run_on(make_batches(99), tmp_path, Net(), large)
    found = read_autopsy(tmp_path, BAD)
    assert found["cause"] == "deterministic"
    assert found["place"] is None
    assert found["sentence"] == f"batch {BAD} fails again: LOSS_OVER_THRESHOLD (deterministic)"


def test_a_loss_that_falls_under_the_threshold_but_still_spikes_has_not_passed(
    tmp_path: Path,
) -> None:
    turns: list[int] = []

    def large(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        is_bad = batch["x"][0, 0] == 99
        turns.extend([1] * bool(is_bad))
        return loss_of(model, batch) + (1e9 if len(turns) == 1 else 1e5) * is_bad

    _, summary, _ = run_on(make_batches(99), tmp_path, Net(), large)
    assert summary["guard"]["total_recoveries"] == 1
    found = read_autopsy(tmp_path, BAD)
    assert found["cause"] == "deterministic"
    assert found["again"]["reasons"] == ["LOSS_SPIKE"]


def test_the_example_of_the_documentation_is_what_comes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "autopsy.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (shown,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {"__name__": "example"})
    written = json.loads((tmp_path / "runs/autopsy/autopsy/step_17.json").read_text())
    assert_alike(json.loads(shown), written)
    assert written["sentence"] in page


def assert_alike(shown: Any, written: Any) -> None:
    """The same, but for the last digits of the numbers."""
    if isinstance(shown, dict):
        assert list(shown) == list(written)
        for key, value in shown.items():
            assert_alike(value, written[key])
    elif isinstance(shown, list):
        assert len(shown) == len(written)
        for one, other in zip(shown, written, strict=True):
            assert_alike(one, other)
    else:
        assert shown == (pytest.approx(written, rel=1e-3) if type(shown) is float else written)


def test_gradient_accumulation_names_the_micro_batch(tmp_path: Path) -> None:
    run = t.make_run(accumulation=3, epochs=4)
    inner = run.model.forward

    def forward(x: Tensor) -> Tensor:
        made = inner(x)
        if run.steps[-1] == 16:  # the middle one of 15, 16, 17
            made = made + torch.log(made.detach() * 0)
        return made

    run.model.forward = forward  # type: ignore[method-assign]
    summary = t.train_guarded(run, tmp_path, max_consecutive_skips=1, max_rollbacks=1)
    assert summary["guard"]["integrity_status"] == "ABORTED"
    found = read_autopsy(tmp_path, 16)
    assert found["sentence"] in [
        f"batch 16 makes {value} in the model (deterministic)" for value in ("NaN", "Inf")
    ]
    assert found["place"]["name"] == ""


def test_gradients_that_were_bad_when_an_accumulation_goes_on_are_told_of(tmp_path: Path) -> None:
    """The step that is judged is not the one that made them so."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = fs.Guard(mode="recover", snapshot_interval=4, max_consecutive_skips=1, max_rollbacks=1)
    monitor = fs.Monitor(model, optimizer, tmp_path, guard)
    for step, x in monitor.loop([torch.ones(1, 2)] * 12):
        if step % 2 == 0:
            optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        if step == 8:
            model.bias.grad.fill_(math.nan)
        if step % 2 == 1:
            if not monitor.step(loss):
                break
            optimizer.step()
    monitor.finalize()
    found = read_autopsy(tmp_path, 9)
    assert found["sentence"] == "the gradient of bias holds NaN before it begins (deterministic)"


def test_a_closure_that_is_called_many_times_is_followed(tmp_path: Path) -> None:
    """The state is bad once LBFGS has taken it in, and bad again."""
    torch.manual_seed(0)
    model = Net(nan)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    guard = fs.Guard(mode="recover", snapshot_interval=4, max_rollbacks=1, clean_steps=1)
    monitor = fs.Monitor(model, optimizer, tmp_path, guard)
    for _, batch in monitor.loop(make_batches(99)):

        def closure(batch: dict[str, Tensor] = batch) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        if not monitor.step(optimizer.step(closure)):
            break
    monitor.finalize()
    found = read_autopsy(tmp_path, BAD)
    assert found["place"]["name"] == "trap"
    assert found["place"]["call"] == 2
    assert number_of_hooks(model) == 0


def test_infinities_of_a_scaler_that_looks_for_its_scale_are_not_the_fault(tmp_path: Path) -> None:
    """Trap 7: the step that is run again overflows at the scale, and is a good one."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=1000)
    guard = fs.Guard(mode="recover", snapshot_interval=4, clean_steps=1)
    monitor = fs.Monitor(model, optimizer, tmp_path, guard, state={"scaler": scaler})
    has_struck, scales = False, []
    for step, batch in monitor.loop(make_batches()):
        if step == BAD and not has_struck:
            has_struck = True
            with torch.no_grad():
                model[0].weight[0, 0] = math.nan
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        scaler.scale(loss * (1e36 if step == BAD else 1)).backward()
        scaler.unscale_(optimizer)
        monitor.step(loss)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    monitor.finalize()
    assert scales[-1] < 2.0**16
    assert read_autopsy(tmp_path, BAD)["cause"] == "transient"


# ---- not run again


def not_replayed(out_dir: Path, step: int = BAD) -> str:
    found = read_autopsy(out_dir, step)
    assert found["cause"] == "not_replayed"
    assert found["again"] is found["place"] is None
    assert found["sentence"] == f"not examined: {found['why']}"
    return str(found["why"])


def test_batches_that_are_left_out_are_not_run_again(tmp_path: Path, lags: bool) -> None:
    run_on(make_batches(math.nan), tmp_path, Net(), skip_batches=1)
    assert not_replayed(tmp_path) == "its batch is left out (skip_batches=1)"


def test_outside_a_loop_nothing_is_run_again(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = fs.Guard(mode="recover", max_consecutive_skips=1, snapshot_interval=2)
    with fs.Monitor(model, optimizer, tmp_path, guard) as monitor:
        for step in range(8):
            optimizer.zero_grad()
            loss = model(torch.ones(1, 3)).sum() * (math.nan if step == BAD else 1)
            loss.backward()
            monitor.step(loss)
            optimizer.step()
    assert not_replayed(tmp_path) == "the batches do not come from monitor.loop"


@pytest.mark.parametrize("way", ["break", "finalize", "next loop"])
def test_a_loop_that_is_left_before_says_so(tmp_path: Path, way: str) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    guard = fs.Guard(mode="recover", snapshot_interval=4, clean_steps=1)
    monitor = fs.Monitor(model, optimizer, tmp_path, guard)
    for _, batch in monitor.loop(make_batches()):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        verdict = monitor.step(loss * 1e9 if monitor._watch.step == BAD else loss)
        optimizer.step()
        if verdict.action is fs.Action.ROLL_BACK:
            if way == "finalize":
                monitor.finalize()
            break
    if way == "next loop":
        list(monitor.loop([1]))
    summary = monitor.finalize()
    assert summary["guard"]["autopsies"]["not_replayed"] == 1
    assert not_replayed(tmp_path) == "the loop was left before"


def test_an_abort_writes_what_is_known_so_far(tmp_path: Path, lags: bool) -> None:
    """Step 6 fails, and on the way back to it step 5, for which no rollback is left."""
    turns: list[int] = []

    def strike(model: nn.Module, step: int, turn: int) -> None:
        turns.append(step)
        if (step, turns.count(step)) in ((BAD, 1), (BAD - 1, 2)):
            with torch.no_grad():
                model.last.weight[0, 2] = math.nan

    _, summary, _ = run_on(make_batches(), tmp_path, Net(), strike=strike, max_rollbacks=1)
    assert summary["guard"]["integrity_status"] == "ABORTED"
    assert summary["guard"]["autopsies"]["not_replayed"] == 2
    for step in (BAD - 1, BAD):
        was_begun = lags and step == BAD  # the verdict on step 5 comes in step 6
        assert not_replayed(tmp_path, step) == (
            "it was run again, but not judged" if was_begun else "training is told to stop"
        )
        assert read_autopsy(tmp_path, step)["first"]["offender"]["name"] == "last.weight"


def test_the_evidence_is_on_disk_before_the_run_is_finalized(tmp_path: Path) -> None:
    run = t.make_run(strikes=[t.Strike(1, t.nan_in_weight)])
    monitor = t.make_monitor(run, tmp_path)
    t.train(run, monitor)
    assert not_replayed(tmp_path, 1) == "training is told to stop"
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["guard"]["autopsies"]["not_replayed"] == 1
    monitor.finalize()


def test_the_spectra_ask_for_a_way_back_and_no_step_is_blamed(tmp_path: Path) -> None:
    run = t.make_run()
    monitor = t.make_monitor(run, tmp_path)
    watch = monitor._watch
    inner = watch.judge
    turns: list[int] = []

    def judge(loss: Any, *, is_unstable: bool = False) -> fs.Verdict:
        turns.append(watch.step)
        return inner(loss, is_unstable=watch.step == BAD and turns.count(BAD) == 1)

    watch.judge = judge  # type: ignore[method-assign]
    t.train(run, monitor)
    monitor.finalize()
    assert not_replayed(tmp_path).startswith("the spectra asked")


# ---- without a trace


@pytest.mark.parametrize("has_average", [True, False])
def test_the_run_ends_with_the_same_bits_with_and_without_hooks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lags: bool, has_average: bool
) -> None:
    """Dropout, noise and batch normalisation are in the model that is struck."""
    how = {
        "has_average": has_average,
        "optimizer": lambda ps: torch.optim.AdamW(ps, lr=1e-2, fused=True),
    }
    runs = []
    for name in ("with", "without", "never struck"):
        if name == "without":
            monkeypatch.setattr(Examination, "_install", lambda *_: None)
        run = t.make_run(**how)
        if name != "never struck":
            run.strikes = [t.Strike(BAD, t.nan_in_weight), t.Strike(9, t.nan_in_buffer)]
        summary = t.train_guarded(run, tmp_path / name)
        assert summary["guard"]["autopsies"]["transient"] == 2 * (name != "never struck")
        runs.append(run)
    t.assert_same_bits(runs[0], runs[1])
    t.assert_same_bits(runs[0], runs[2])


@pytest.mark.parametrize("watch", [Watch, LaggingWatch])
def test_a_clean_run_has_no_hooks_and_no_examination(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: type
) -> None:
    if watch is LaggingWatch:
        monkeypatch.setattr(monitor_module, "_LAGGING_DEVICE", "cpu")

    def refuse(*_: Any) -> None:
        raise AssertionError("an examination in a clean run")

    monkeypatch.setattr(Examination, "__init__", refuse)
    monkeypatch.setattr("foreshock.guard.autopsy.batch_seen", refuse)
    model = Net()
    hooks: list[int] = []
    monitor, summary, _ = run_on(
        make_batches(), tmp_path, model, strike=lambda m, *_: hooks.append(number_of_hooks(m))
    )
    assert type(monitor._watch) is watch
    assert hooks == [0] * 12
    assert monitor._watch.autopsies._cases == {}
    assert sum(summary["guard"]["autopsies"].values()) == 0
    assert not (tmp_path / "autopsy").exists()


def test_only_the_failing_step_is_under_hooks(tmp_path: Path, lags: bool) -> None:
    hooks: list[tuple[int, bool]] = []

    def strike(model: nn.Module, step: int, turn: int) -> None:
        hooks.append((step, number_of_hooks(model) > 0))
        if turn == BAD + 1:
            with torch.no_grad():
                model.last.weight[0, 2] = math.nan

    run_on(make_batches(), tmp_path, Net(), strike=strike)
    assert [i for i, (_, is_on) in enumerate(hooks) if is_on] == [len(hooks) - 6]
    assert hooks[-6] == (BAD, True)


def test_hooks_come_off_with_the_verdict_and_do_not_see_an_evaluation(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    guard = fs.Guard(mode="recover", snapshot_interval=4, clean_steps=1)
    monitor = fs.Monitor(model, optimizer, tmp_path, guard)
    seen: list[tuple[int, int]] = []
    for step, batch in monitor.loop(make_batches()):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        is_first = (BAD, 0) not in seen
        within = number_of_hooks(model)
        monitor.step(loss * 1e9 if step == BAD and is_first else loss)
        seen.append((step, number_of_hooks(model)))
        assert (within > 0) == (step == BAD and not is_first)
        optimizer.step()
    monitor.finalize()
    assert {n for _, n in seen} == {0}
    assert read_autopsy(tmp_path, BAD)["cause"] == "transient"


@pytest.mark.parametrize("where", ["forward", "loop"])
def test_no_hooks_are_left_when_the_training_loop_raises(tmp_path: Path, where: str) -> None:
    model = Net()

    def strike(model: nn.Module, step: int, turn: int) -> None:
        if number_of_hooks(model) and where == "loop":
            raise KeyboardInterrupt
        if turn == BAD + 1:
            with torch.no_grad():
                model.last.weight[0, 2] = math.nan

    def failing(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        if number_of_hooks(model) and where == "forward":
            model(batch["x"][:, :2])
        return loss_of(model, batch)

    with pytest.raises((KeyboardInterrupt, RuntimeError)) as raised:
        run_on(make_batches(), tmp_path, model, failing, strike)
    del raised  # its traceback holds the loop
    import gc

    gc.collect()
    assert number_of_hooks(model) == 0


def test_a_fault_of_the_examination_is_logged_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr("foreshock.guard.examination.look_at", refuse)
    with caplog.at_level(logging.ERROR, "foreshock"):
        _, summary, steps = run_on(make_batches(99), tmp_path, Net(nan))
    assert len(caplog.records) == 1
    assert "training goes on" in caplog.records[0].message
    assert steps.count(BAD) == 3
    found = read_autopsy(tmp_path, BAD)
    assert found["place"]["kind"] == "not_located"
    assert found["place"]["why"] == "a hook has failed"
    assert found["batch"] is None
    assert summary["guard"]["total_rollbacks"] == 2


def test_a_directory_that_cannot_be_written_to_does_not_stop_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "autopsy").write_text("a file where a directory should be")
    run = t.make_run(strikes=[t.Strike(BAD, t.nan_in_weight)])
    with caplog.at_level(logging.WARNING, "foreshock"):
        summary = t.train_guarded(run, tmp_path)
    t.assert_same_bits(run, t.train(t.make_run()))
    assert summary["guard"]["autopsies"]["transient"] == 1
    assert t.events(tmp_path, "autopsy")[0]["file"] is None
    assert sum("could not be written" in r.message for r in caplog.records) == 1


def test_the_file_is_strict_json_without_secrets_and_long_texts(tmp_path: Path) -> None:
    batches = [{**batch, "api_key": torch.zeros(1)} for batch in make_batches(math.nan)]
    long_name = "layer" * 60
    model = nn.ModuleDict({long_name: nn.Linear(3, 1)})

    def loss_of_it(model: nn.Module, batch: Any) -> Tensor:
        return model[long_name](batch["x"]).square().mean()

    run_on(batches, tmp_path, model, loss_of_it)
    text = (tmp_path / "autopsy" / f"step_{BAD}.json").read_text()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    found = json.loads(text, parse_constant=refuse)
    assert long_name not in text
    assert found["place"]["name"]["redacted"] is True
    assert found["again"]["loss"] == "NaN"


@pytest.mark.parametrize("loader", [t.make_loader, t.ResumableLoader])
def test_the_batch_that_is_run_again_is_the_one_that_was_run(tmp_path: Path, loader: Any) -> None:
    """Whether it was kept, or the loader was sent back."""
    run = t.make_run(loader=loader, strikes=[t.Strike(8, t.nan_in_weight)])
    hashes: list[str | None] = []
    with t.make_monitor(run, tmp_path) as monitor:
        for step, batch in monitor.loop(run.loader, epochs=run.epochs):
            if step == 8:
                hashes.append(hash_batch(batch))
            t.train_step(run, step, batch, monitor)
    found = read_autopsy(tmp_path, 8)
    assert found["batch"]["index"] == 8
    assert hashes == [found["batch"]["hash"]] * 2
