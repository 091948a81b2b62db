"""A loop whose state only functions reach: what is seen in it, and what is put back."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import foreshock as fs
from foreshock.records import read_telemetry

FEATURES, STEPS = 5, 80


class Linear:
    """Linear regression by momentum, in NumPy, each batch drawn from its own generator."""

    def __init__(self, strikes: dict[int, Callable[[Linear], None]] | None = None) -> None:
        self.weights = np.zeros(FEATURES)
        self.momentum = np.zeros(FEATURES)
        self.bias = np.zeros((), np.float32)
        self.rate = 0.05
        self.random = np.random.default_rng(0)
        self.strikes = dict(strikes or {})
        self.steps: list[int] = []

    def save(self) -> dict[str, Any]:
        arrays = {"weights": self.weights, "momentum": self.momentum, "bias": self.bias}
        return {"arrays": arrays, "random": self.random.bit_generator.state}

    def load(self, state: dict[str, Any]) -> None:
        for name, array in state["arrays"].items():
            getattr(self, name)[...] = array
        self.random.bit_generator.state = state["random"]

    def set_rate(self, rate: float) -> None:
        self.rate = rate

    def train(self, step: int) -> float:
        self.steps.append(step)
        strike = self.strikes.pop(step, None)
        if strike is not None:
            strike(self)
        x = self.random.normal(size=(16, FEATURES))
        y = x @ np.arange(FEATURES) + 0.1 * self.random.normal(size=16) + 1
        error = x @ self.weights + self.bias - y
        self.momentum *= 0.9
        self.momentum += x.T @ error / 16
        self.weights -= self.rate * self.momentum
        self.bias -= np.float32(self.rate * error.mean())
        return float((error**2).mean())


def monitor_of(run: Linear, out_dir: Path, **given: Any) -> Any:
    guard = {
        "mode": "recover",
        "snapshot_interval": 10,
        "lr_backoff": 1.0,
        **given.pop("guard", {}),
    }
    options = {"telemetry_interval": 5, **given}
    functions = (run.save, run.load, lambda: run.rate, run.set_rate)
    return fs.Monitor.from_functions(*functions, out_dir, fs.Guard(**guard), **options)


def train(run: Linear, monitor: Any, steps: int = STEPS) -> list[fs.Verdict]:
    verdicts = []
    while monitor.next_step < steps:
        step = monitor.next_step
        loss = run.train(step)
        verdicts.append(monitor.step(step, loss, {"weights": run.weights, "bias": run.bias}))
        if not verdicts[-1]:
            break
    return verdicts


def records(out_dir: Path, event: str) -> list[dict[str, Any]]:
    found = read_telemetry(out_dir / "telemetry.jsonl").records
    return [r for r in found if r["event"] == event]


def poison(run: Linear) -> None:
    run.weights[2] = math.nan


def test_a_run_that_gets_a_nan_ends_with_the_bits_of_one_that_does_not(tmp_path: Path) -> None:
    clean = Linear()
    for step in range(STEPS):
        clean.train(step)
    struck = Linear({50: poison})
    monitor = monitor_of(struck, tmp_path)
    verdicts = train(struck, monitor)
    assert np.array_equal(clean.weights, struck.weights)
    assert np.array_equal(clean.momentum, struck.momentum)
    assert clean.bias == struck.bias
    assert struck.steps == [*range(51), *range(40, STEPS)]
    (bad,) = [v for v in verdicts if v.action is not fs.Action.CONTINUE]
    assert (bad.step, bad.action) == (50, fs.Action.ROLL_BACK)
    assert str(bad.offender) == "parameter weights: 5 NaN of 5 values"
    summary = monitor.finalize()
    assert summary["guard"]["integrity_status"] == "RECOVERED"
    assert summary["guard"]["total_recoveries"] == 1
    assert summary["total_steps"] == STEPS


def test_what_happened_is_in_the_files(tmp_path: Path) -> None:
    with monitor_of(run := Linear({50: poison}), tmp_path) as monitor:
        train(run, monitor)
    (event,) = records(tmp_path, "rollback_success")
    assert (event["step"], event["to_step"], event["reason"]) == (50, 40, "NONFINITE_WEIGHTS")
    told = records(tmp_path, "telemetry")
    assert [r["step"] for r in told] == [*range(0, 51, 5), *range(40, STEPS, 5)]
    assert told[3]["learning_rate"] == 0.05
    first, again = (r["loss_z"] for r in told if r["step"] == 45)
    assert first == again is not None
    assert told[-1]["parameter_norm"] == pytest.approx(math.sqrt(30), rel=0.2)
    assert monitor.latest["step"] == 75
    assert json.loads((tmp_path / "summary.json").read_text())["total_steps"] == STEPS
    assert "rollback_success" in (tmp_path / "ledger.jsonl").read_text()


def test_a_loop_that_does_not_go_back_goes_on_with_what_was_restored(tmp_path: Path) -> None:
    with monitor_of(run := Linear({50: poison}), tmp_path) as monitor:
        for step in range(STEPS):
            assert monitor.step(step, run.train(step), run.weights)
    assert run.steps == list(range(STEPS))
    assert np.isfinite(run.weights).all()
    assert monitor.finalize()["guard"]["total_recoveries"] == 1


def test_a_bad_loss_alone_is_borne_until_there_are_too_many_in_a_row(tmp_path: Path) -> None:
    monitor = monitor_of(run := Linear(), tmp_path)
    actions = []
    for step in range(20):
        loss = run.train(step)
        actions.append(monitor.step(step, math.inf if step >= 15 else loss, run.weights).action)
        if actions[-1] is fs.Action.ROLL_BACK:
            break
    assert actions[15:] == [fs.Action.SKIP, fs.Action.SKIP, fs.Action.ROLL_BACK]
    assert monitor.next_step == 10


def test_a_spike_is_recorded_or_counts_as_a_bad_loss(tmp_path: Path) -> None:
    for response, action in (("log", fs.Action.CONTINUE), ("skip", fs.Action.SKIP)):
        guard = {"spike_response": response, "spike_min_count": 8}
        monitor = monitor_of(run := Linear(), tmp_path / response, guard=guard)
        train(run, monitor, 40)
        verdict = monitor.step(40, 1e4, run.weights)
        assert verdict.action is action
        (seen,) = wait_for(monitor, tmp_path / response, "anomaly_seen")
        assert (seen["step"], seen["reason"]) == (40, "LOSS_SPIKE")


def test_the_model_is_looked_at_every_so_many_steps_and_when_the_loss_is_bad(
    tmp_path: Path,
) -> None:
    bad = np.array([math.nan])
    monitor = monitor_of(Linear(), tmp_path, guard={"mode": "observe", "check_interval": 3})
    offenders = [monitor.step(n, 1.0, bad).offender for n in range(4)]
    assert [o is not None for o in offenders] == [True, False, False, True]
    assert monitor.step(4, math.nan, bad).offender is not None


def test_a_loss_over_the_threshold_is_rolled_back(tmp_path: Path) -> None:
    monitor = monitor_of(run := Linear(), tmp_path, guard={"violation_threshold": 100.0})
    train(run, monitor, 15)
    verdict = monitor.step(15, 101.0)
    assert verdict.action is fs.Action.ROLL_BACK
    assert verdict.reasons[0].value == "LOSS_OVER_THRESHOLD"


def test_a_fault_that_comes_again_ends_the_run_and_nothing_is_retried_for_ever(
    tmp_path: Path,
) -> None:
    class Doomed(Linear):
        def train(self, step: int) -> float:
            if step == 30:
                poison(self)
            return super().train(step)

    monitor = monitor_of(run := Doomed(), tmp_path, guard={"max_rollbacks": 2})
    last = train(run, monitor)[-1]
    assert not last
    assert last.action is fs.Action.ABORT
    assert run.steps.count(30) == 3
    assert not monitor.step(31, 0.0)
    assert monitor.finalize()["guard"]["integrity_status"] == "ABORTED"


def test_faults_far_apart_are_each_recovered_from(tmp_path: Path) -> None:
    guard = {"max_rollbacks": 1, "rollback_window": 5}
    monitor = monitor_of(run := Linear({20: poison, 50: poison}), tmp_path, guard=guard)
    assert all(train(run, monitor))
    assert monitor.finalize()["guard"]["total_recoveries"] == 2


def test_generators_that_belong_to_nobody_are_put_back_too(tmp_path: Path) -> None:
    drawn: dict[int, list[Any]] = {}

    class Drawing(Linear):
        def train(self, step: int) -> float:
            numbers = (np.random.random(), torch.rand(()).item(), random.random())
            drawn.setdefault(step, []).append(numbers)
            return super().train(step)

    monitor = monitor_of(run := Drawing({50: poison}), tmp_path)
    train(run, monitor)
    first, again = drawn[45]
    assert first == again


def test_only_a_snapshot_that_still_has_its_bits_is_restored(tmp_path: Path) -> None:
    """The newest known-good one is damaged in memory: the one before is used."""
    monitor = monitor_of(run := Linear({50: poison}), tmp_path)
    train(run, monitor, 50)
    (newest,) = [kept for kept in monitor._ring.entries if kept.step == 40]
    newest.saved["state"]["arrays"][0].view(torch.uint8)[3] ^= 1
    monitor.step(50, run.train(50), run.weights)
    assert monitor.next_step == 30
    assert [r["step"] for r in wait_for(monitor, tmp_path, "snapshot_dropped")] == [40]


def wait_for(monitor: Any, out_dir: Path, event: str) -> list[dict[str, Any]]:
    monitor.finalize()
    return records(out_dir, event)


def test_the_state_is_copied_when_it_is_saved_and_again_when_it_is_loaded(tmp_path: Path) -> None:
    monitor = monitor_of(run := Linear({50: poison}), tmp_path)
    given: list[Any] = []
    run_load = run.load

    def load(state: dict[str, Any]) -> None:
        given.append(state)
        run_load(state)
        state["arrays"]["weights"].fill(7)  # its own to keep

    monitor._ring._parts["state"]._load = load
    train(run, monitor, 50)
    monitor.step(50, run.train(50), run.weights)
    poison(run)
    monitor.step(40, run.train(40), run.weights)
    first, again = given
    assert first["arrays"]["weights"].tolist() == [7] * FEATURES
    assert run.weights.tolist() != [7] * FEATURES
    assert again["random"] == first["random"]


def test_the_rate_backs_off_and_returns_to_what_the_schedule_says(tmp_path: Path) -> None:
    guard = {"lr_backoff": 0.5, "lr_recovery_steps": 4}
    monitor = monitor_of(run := Linear({50: poison}), tmp_path, guard=guard)
    rates = {}
    while monitor.next_step < 60:
        step = monitor.next_step
        if step == 42 and 50 in rates:
            run.rate = 0.02  # by a schedule
        monitor.step(step, run.train(step), run.weights)
        rates[step] = run.rate
    assert [rates[step] for step in range(40, 48)] == pytest.approx(
        [0.05 * 0.625, 0.05 * 0.75, 0.02 * 0.875, 0.02, 0.02, 0.02, 0.02, 0.02]
    )
    assert rates[39] == 0.05


def test_the_factor_is_in_no_snapshot_and_does_not_compound(tmp_path: Path) -> None:
    """The rate is part of the state, and a second rollback returns to a step with the factor."""

    class Whole(Linear):
        def save(self) -> dict[str, Any]:
            return {**super().save(), "rate": self.rate}

        def load(self, state: dict[str, Any]) -> None:
            super().load(state)
            self.rate = state["rate"]

    guard = {"lr_backoff": 0.5, "lr_recovery_steps": 1000}
    run = Whole({20: poison, 35: poison})
    monitor = monitor_of(run, tmp_path, guard=guard)
    train(run, monitor, 35)
    before = run.rate
    assert monitor._ring.entries[-1].saved["state"]["form"]["rate"] == 0.05
    train(run, monitor, 36)
    assert monitor.next_step == 36
    assert run.rate == pytest.approx(before / 2, rel=0.05)


def test_single_precision_behind_the_functions_does_not_compound_the_factor(tmp_path: Path) -> None:
    class Single(Linear):
        def set_rate(self, rate: float) -> None:
            self.rate = float(np.float32(rate))

    guard = {"lr_backoff": 0.3, "lr_recovery_steps": 7}
    run = Single({20: poison})
    monitor = monitor_of(run, tmp_path, guard=guard)
    train(run, monitor, 40)
    assert run.rate == pytest.approx(0.05, rel=1e-6)


def test_observing_calls_nothing_that_changes_the_run(tmp_path: Path) -> None:
    called: list[str] = []
    functions = [lambda *_, name=name: called.append(name) for name in ("save", "load", "set")]
    save, load, set_lr = functions
    with fs.Monitor.from_functions(save, load, lambda: 0.1, set_lr, tmp_path) as monitor:
        verdict = monitor.step(0, math.nan, np.full(3, math.nan))
    assert verdict
    assert verdict.action is fs.Action.ROLL_BACK  # what would have been done
    assert called == []
    assert monitor.finalize()["guard"]["anomalies_seen"] == 1


def test_a_fault_inside_does_not_reach_a_run_that_is_only_observed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = monitor_of(Linear(), tmp_path, guard={"mode": "observe"})
    monkeypatch.setattr(monitor._policy, "decide", lambda *_: 1 / 0)
    with caplog.at_level(logging.ERROR, "foreshock"):
        assert monitor.step(0, 1.0)
        assert monitor.step(1, 1.0)
    assert caplog.text.count("training goes on") == 1


@dataclasses.dataclass
class Net:
    """A model that is an object with arrays."""

    inner: Any
    name: str = "net"


class Foreign:
    """An array of another library: on the host, and read-only."""

    def __init__(self, values: np.ndarray[Any, Any]) -> None:
        self.values = values.copy()
        self.values.flags.writeable = False

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray[Any, Any]:
        return self.values

    def __dlpack__(self) -> Any:
        raise AssertionError("not needed")


@pytest.mark.parametrize(
    ("model", "offender"),
    [
        pytest.param(np.array([1.0, math.inf]), "model", id="array"),
        pytest.param(
            {"a": np.ones(2), "b": [np.ones(1), np.array([math.nan])]}, "b.1", id="nested"
        ),
        pytest.param(Net({"w": np.array([math.nan], np.float16)}), "inner.w", id="object"),
        pytest.param({"w": np.array([1, math.nan])[::-1]}, "w", id="reversed"),
        pytest.param({"w": np.array([1, math.nan], ">f4")}, "w", id="big-endian"),
        pytest.param({"w": np.array([1, 1j * math.inf])}, "w", id="complex"),
        pytest.param({"n": np.ones(3, int), "w": np.array(math.nan)}, "w", id="scalar"),
        pytest.param((Foreign(np.array([math.nan])),), "0", id="foreign"),
        pytest.param({"w": torch.tensor([math.nan])}, "w", id="tensor"),
    ],
)
def test_the_offender_is_named_wherever_it_is(tmp_path: Path, model: Any, offender: str) -> None:
    monitor = monitor_of(Linear(), tmp_path, guard={"mode": "observe"})
    verdict = monitor.step(0, 1.0, model)
    assert verdict.offender is not None
    assert verdict.offender.name == offender


def test_bfloat16_of_other_libraries_is_read(tmp_path: Path) -> None:
    bfloat16 = ml_dtypes.bfloat16
    values = np.array([1.0, math.nan, 3.0]).astype(bfloat16)
    monitor = monitor_of(Linear(), tmp_path, guard={"mode": "observe"})
    verdict = monitor.step(0, 1.0, {"w": values})
    assert str(verdict.offender) == "parameter w: 1 NaN of 3 values"


def test_a_module_of_torch_is_a_model_too(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 1)
    model.bias.data.fill_(math.nan)
    monitor = monitor_of(Linear(), tmp_path, guard={"mode": "observe"})
    assert monitor.step(0, 1.0, model).offender.name == "bias"


def test_arrays_are_scanned_where_they_are() -> None:
    from foreshock.guard import tensors_of

    weights = np.zeros((3, 4), np.float32)
    assert tensors_of({"w": weights})["w"].data_ptr() == weights.ctypes.data


def test_whatever_is_saved_comes_back_as_it_was() -> None:
    from foreshock.guard import FunctionState
    from foreshock.guard.containers import copy_out

    state = {
        "f": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "i": [np.arange(3), (np.bool_(True), np.array(True))],
        "empty": np.zeros((0, 2)),
        "c": np.array([1 + 2j]),
        "date": np.array(["2026-01-01"], "datetime64[D]"),
        "big": np.array([1.5], ">f8"),
        "texts": np.array(["ab", "c"]),
        "objects": np.array([None, "x"], object),
        "tensor": torch.tensor([1.0, 2.0]),
        "bytes": b"\x00\x01",
        "more": bytearray(b"z"),
        "random": np.random.default_rng(0).bit_generator.state,
        3: None,
    }
    loaded: list[Any] = []
    part = FunctionState(lambda: state, loaded.append)
    saved = copy_out(part.live())
    before = copy_out(state)
    state["f"].fill(9)
    part.restore(saved)
    (found,) = loaded
    assert found.keys() == before.keys()
    for name in ("f", "empty", "c", "date", "big", "texts", "objects"):
        np.testing.assert_array_equal(found[name], before[name])
        assert found[name].dtype == before[name].dtype
        assert found[name].flags.writeable
    assert found["i"][0].tolist() == [0, 1, 2]
    assert isinstance(found["i"][1], tuple)
    assert found["tensor"].tolist() == [1, 2]
    assert (found["bytes"], found["more"], found[3]) == (b"\x00\x01", bytearray(b"z"), None)
    assert found["random"] == before["random"]


def test_wrong_input_is_an_error_that_names_it(tmp_path: Path) -> None:
    run = Linear()
    with pytest.raises(TypeError, match="load_fn is a NoneType"):
        fs.Monitor.from_functions(run.save, None, lambda: 1, run.set_rate, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="did you mean 'telemetry_interval'"):
        monitor_of(run, tmp_path, telemetry_intervall=3)
    with pytest.raises(ValueError, match="mode is 'skip'"):
        monitor_of(run, tmp_path, guard={"mode": "skip"})
    for name, value in (("persist_dir", tmp_path), ("verify_state", True), ("skip_batches", 1)):
        with pytest.raises(ValueError, match=name):
            monitor_of(run, tmp_path, guard={name: value})
    monitor = monitor_of(run, tmp_path)
    with pytest.raises(TypeError, match="loss is a str"):
        monitor.step(0, "a")
    with pytest.raises(TypeError, match="step is a float"):
        monitor.step(0.5, 1.0)
    with pytest.raises(TypeError, match="model is a str"):
        monitor.step(0, 1.0, "weights")
    assert monitor.next_step == 0
    monitor.step(4, 1.0)
    with pytest.raises(ValueError, match="step is 4; accepted: 5, or a later one"):
        monitor.step(4, 1.0)


def test_a_run_may_begin_at_a_later_step(tmp_path: Path) -> None:
    run = Linear({105: poison})
    monitor = monitor_of(run, tmp_path, first_step=100)
    train(run, monitor, 110)
    assert run.steps == [*range(100, 106), *range(100, 110)]
