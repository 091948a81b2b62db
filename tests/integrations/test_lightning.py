"""A monitor in Lightning's Trainer: what it sees, withholds and puts back, and what it leaves."""

from __future__ import annotations

import copy
import csv
import importlib
import json
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import foreshock
from foreshock.drill.gpt import GPT, GPTConfig, next_token_loss
from foreshock.drill.text import TextBatches, Vocabulary, load_corpus
from foreshock.guard import LaggingWatch
from foreshock.records import read_series, read_telemetry

pl = pytest.importorskip("lightning.pytorch")
integration = pytest.importorskip("foreshock.integrations.lightning")

pytestmark = pytest.mark.filterwarnings("default")  # those of other people's code

TOKENS, STEPS = 24, 30
WEIGHT = "gpt.blocks.1.mlp.up.weight"
Strike = Callable[[torch.nn.Module], None]


class Text(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Rows of real text, one character per token."""

    def __init__(self) -> None:
        tokens = Vocabulary().encode(load_corpus()[:20_000])
        self.batches = TextBatches(tokens, batch_size=1, context=TOKENS)

    def __len__(self) -> int:
        return 256

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = self.batches.batch_at(i)
        return x[0], y[0]


def module_of(package: Any) -> Any:
    """A small GPT as a module of `lightning.pytorch` or of `pytorch_lightning`."""

    class Module(package.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self, strikes: dict[int, Strike] | None = None, **optimizer: Any) -> None:
            super().__init__()
            torch.manual_seed(0)
            config = GPTConfig(context=TOKENS, width=32, num_blocks=2, num_heads=2, dropout=0.1)
            self.gpt = GPT(config)
            self.strikes = dict(strikes or {})
            self.made = optimizer.pop("made", torch.optim.AdamW)
            self.given = {"lr": 1e-3, **optimizer}
            self.losses: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            strike = self.strikes.pop(self.trainer.fit_loop.total_batch_idx, None)
            if strike is not None:
                with torch.no_grad():
                    strike(self)
            x, y = batch
            loss = next_token_loss(self.gpt(x), y)
            self.losses.append(float(loss.detach()))
            return {"loss": loss}

        def configure_optimizers(self) -> Any:
            optimizer = self.made(self.parameters(), **self.given)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.99**n)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    return Module


Module = module_of(pl)


def fit(out_dir: Path, module: Any, callback: Any = None, **given: Any) -> Any:
    """Trains to the end."""
    package = given.pop("package", pl)
    callbacks = [*given.pop("callbacks", []), *([] if callback is None else [callback])]
    ckpt_path = given.pop("ckpt_path", None)
    options = {
        "max_steps": STEPS,
        "max_epochs": -1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "gradient_clip_val": 1.0,
        **given,
    }
    trainer = package.Trainer(default_root_dir=out_dir, callbacks=callbacks, **options)
    torch.manual_seed(1)
    loader = torch.utils.data.DataLoader(Text(), batch_size=4, shuffle=True)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


def monitor_callback(out_dir: Path, **given: Any) -> Any:
    options = {"guard_snapshot_interval": 10, "telemetry_interval": 5, **given}
    return integration.MonitorCallback(out_dir / "run", **options)


def records(out_dir: Path, event: str) -> list[dict[str, Any]]:
    found = read_telemetry(out_dir / "run" / "telemetry.jsonl").records
    return [r for r in found if r["event"] == event]


def strike_weight(module: torch.nn.Module) -> None:
    module.get_parameter(WEIGHT)[3, 3] = math.nan


def have_same_bits(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def is_finite(module: torch.nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in module.parameters())


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({}, id="adamw"),
        pytest.param({"fused": True}, id="fused"),
        pytest.param({"made": torch.optim.SGD, "momentum": 0.9}, id="sgd"),
        pytest.param({"made": torch.optim.LBFGS, "max_iter": 3}, id="lbfgs"),
    ],
)
def test_a_healthy_training_ends_with_the_same_bits_as_without_it(
    tmp_path: Path, given: dict[str, Any]
) -> None:
    options = {"accumulate_grad_batches": 2, "max_steps": 20}
    if given.get("made") is torch.optim.LBFGS:
        options = {"gradient_clip_val": None, "max_steps": 10}
    fit(tmp_path, alone := Module(**given), **options)
    callback = monitor_callback(tmp_path)
    fit(tmp_path, watched := Module(**given), callback, **options)
    assert alone.losses == watched.losses
    assert have_same_bits(alone, watched)
    assert callback.summary["total_steps"] == options["max_steps"]
    assert callback.summary["guard"]["anomalies_seen"] == 0


def test_a_guard_that_has_nothing_to_do_changes_no_bit(tmp_path: Path) -> None:
    fit(tmp_path, alone := Module())
    callback = monitor_callback(tmp_path, guard_enabled=True)
    fit(tmp_path, watched := Module(), callback)
    assert have_same_bits(alone, watched)


def test_the_loss_is_that_of_the_step_and_the_norm_that_from_before_the_clip(
    tmp_path: Path,
) -> None:
    norms: list[float] = []

    class Norms(pl.Callback):  # type: ignore[misc,name-defined]
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            norms.append(
                float(torch.nn.utils.get_total_norm([p.grad for p in module.parameters()]))
            )

    callback = monitor_callback(tmp_path, telemetry_interval=1)
    given = {"max_steps": 6, "gradient_clip_val": 0.1, "accumulate_grad_batches": 2}
    fit(tmp_path, module := Module(), callback, callbacks=[Norms()], **given)
    told = records(tmp_path, "telemetry")
    means = [(a + b) / 2 for a, b in zip(module.losses[::2], module.losses[1::2], strict=True)]
    assert [r["step"] for r in told] == list(range(6))
    assert [r["train_loss"] for r in told] == pytest.approx(means, rel=1e-6)
    assert [r["grad_norm"] for r in told] == pytest.approx(norms, rel=1e-5)
    assert min(norms) > 0.1


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_nan_in_a_weight_is_named_and_rolled_back_and_training_ends(
    tmp_path: Path, package: str, accumulation: int
) -> None:
    found = importlib.import_module(package)
    callback = monitor_callback(tmp_path, guard_enabled=True)
    module = module_of(found)({24 * accumulation: strike_weight})
    given = {"package": found, "accumulate_grad_batches": accumulation}
    trainer = fit(tmp_path, module, callback, **given)
    assert trainer.global_step == STEPS
    (event,) = records(tmp_path, "rollback_success")
    assert (event["step"], event["to_step"]) == (24, 20)
    assert event["offender"]["name"] == WEIGHT
    assert is_finite(module)
    guard = callback.summary["guard"]
    assert (guard["total_rollbacks"], guard["total_recoveries"]) == (1, 1)
    assert guard["integrity_status"] == "RECOVERED"


def test_a_rollback_puts_back_model_optimizer_scheduler_averages_and_random_numbers(
    tmp_path: Path,
) -> None:
    """As they were after step 19, and with what the Trainer does after an update done."""
    seen: dict[int, Any] = {}

    class Looking(pl.Callback):  # type: ignore[misc,name-defined]
        def __init__(self, average: Any) -> None:
            self.average = average

        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            state = {
                "model": module.state_dict(),
                "optimizer": trainer.optimizers[0].state_dict(),
                "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
                "average": self.average._average_model.state_dict(),
                "random": torch.get_rng_state(),
            }
            seen[trainer.global_step - 1] = copy.deepcopy(state)

    average = pl.callbacks.EMAWeightAveraging(decay=0.9)
    callback = monitor_callback(tmp_path, guard_enabled=True)
    # The last of the callbacks, so that the average is up to date.
    fit(tmp_path, Module({24: strike_weight}), callback, callbacks=[average, Looking(average)])
    before, after = seen[19], seen[24]
    for part in ("model", "optimizer"):
        torch.testing.assert_close(after[part], before[part], rtol=0, atol=0)
    assert after["scheduler"]["last_epoch"] == before["scheduler"]["last_epoch"]
    assert torch.equal(after["random"], before["random"])
    assert all(bool(v.isfinite().all()) for v in after["average"].values())


def test_averaged_weights_are_rolled_back(tmp_path: Path) -> None:
    average = pl.callbacks.EMAWeightAveraging(decay=0.9)

    class Poisoning(pl.Callback):  # type: ignore[misc,name-defined]
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            if trainer.global_step == 24:
                with torch.no_grad():
                    strike_weight(module)

    callback = monitor_callback(tmp_path, guard_enabled=True)
    fit(tmp_path, Module(), callback, callbacks=[Poisoning(), average])
    assert len(records(tmp_path, "rollback_success")) == 1
    assert is_finite(average._average_model)


def test_a_scheduler_that_was_put_in_the_place_of_another_is_rolled_back(tmp_path: Path) -> None:
    averaging = pl.callbacks.StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=2)
    steps: dict[int, tuple[str, int]] = {}

    class Looking(pl.Callback):  # type: ignore[misc,name-defined]
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            scheduler = trainer.lr_scheduler_configs[0].scheduler
            steps[trainer.global_step - 1] = (type(scheduler).__name__, scheduler.last_epoch)

    callback = monitor_callback(tmp_path, guard_enabled=True)
    given = {"max_steps": -1, "max_epochs": 3, "limit_train_batches": 10}
    # Batches are counted over all epochs.
    module = Module({17: strike_weight, 28: strike_weight})
    fit(tmp_path, module, callback, callbacks=[averaging, Looking()], **given)
    told = [(r["step"], r["to_step"]) for r in records(tmp_path, "rollback_success")]
    assert told == [(17, 10), (28, 20)]
    assert steps[9][0] == "LambdaLR"
    assert {steps[n][0] for n in (16, 17, 19, 28)} == {"SWALR"}
    assert is_finite(module)


def test_a_bad_gradient_does_not_reach_the_optimizer(tmp_path: Path) -> None:
    def strike_gradient(module: Any) -> None:
        weight = module.get_parameter(WEIGHT)
        handle = weight.register_hook(lambda g: handle.remove() or g.fill_(math.inf))

    before: list[Any] = []

    class Looking(pl.Callback):  # type: ignore[misc,name-defined]
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            if trainer.global_step in (10, 11):
                before.append(copy.deepcopy([module.state_dict(), trainer.optimizers[0].state]))

    callback = monitor_callback(tmp_path, guard_enabled=True)
    module = Module({10: strike_gradient})
    fit(tmp_path, module, callback, callbacks=[Looking()], max_steps=14)
    (event,) = records(tmp_path, "update_skipped")
    assert (event["step"], event["offender"]["name"]) == (10, WEIGHT)
    (weights, moments), (weights_after, moments_after) = before
    torch.testing.assert_close(weights_after, weights, rtol=0, atol=0)
    pairs = zip(moments.values(), moments_after.values(), strict=True)
    assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in pairs)
    assert callback.summary["guard"]["skipped_steps"] == 1


def test_gradients_that_a_later_callback_spoils_are_withheld_too(tmp_path: Path) -> None:
    class Spoiling(pl.Callback):  # type: ignore[misc,name-defined]
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            if trainer.global_step == 7:
                module.get_parameter(WEIGHT).grad.fill_(math.nan)
                # One gradient stands for all when it is asked whether they have changed.
                module.gpt.token_embedding.weight.grad.mul_(1)

    callback = monitor_callback(tmp_path, guard_enabled=True)
    fit(tmp_path, module := Module(), None, callbacks=[callback, Spoiling()], max_steps=12)
    assert [r["step"] for r in records(tmp_path, "update_skipped")] == [7]
    assert is_finite(module)


class RunsAhead(pl.Callback):  # type: ignore[misc,name-defined]
    """Sees to it that the host does not wait for the device, which here is the CPU."""

    def __init__(self, callback: Any) -> None:
        self.callback = callback

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        assert isinstance(self.callback.monitor._watch, LaggingWatch)


@pytest.mark.parametrize("is_guarded", [False, True])
def test_a_host_that_runs_ahead_changes_no_bit(
    tmp_path: Path, is_guarded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foreshock.monitor._LAGGING_DEVICE", "cpu")
    fit(tmp_path, alone := Module(fused=True))
    callback = monitor_callback(tmp_path, guard_enabled=is_guarded)
    fit(tmp_path, watched := Module(fused=True), callback, callbacks=[RunsAhead(callback)])
    assert have_same_bits(alone, watched)
    assert callback.summary["total_steps"] == STEPS


def test_a_host_that_runs_ahead_rolls_back_a_step_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foreshock.monitor._LAGGING_DEVICE", "cpu")
    callback = monitor_callback(tmp_path, guard_enabled=True)
    module = Module({24: strike_weight}, fused=True)
    fit(tmp_path, module, callback, callbacks=[RunsAhead(callback)])
    (event,) = records(tmp_path, "rollback_success")
    assert (event["step"], event["to_step"]) == (24, 20)
    assert event["offender"]["name"] == WEIGHT
    assert is_finite(module)
    assert callback.summary["guard"]["total_recoveries"] == 1


def test_observing_only_tells(tmp_path: Path) -> None:
    callback = monitor_callback(tmp_path)
    fit(tmp_path, module := Module({5: strike_weight}), callback, max_steps=10)
    guard = callback.summary["guard"]
    assert guard["anomalies_seen"] > 0
    assert guard["total_rollbacks"] == 0
    assert not is_finite(module)


@pytest.mark.parametrize(("parameters", "kind"), [("trainable", "gradient"), ("all", "parameter")])
def test_frozen_parameters_are_looked_at_if_they_are_asked_for(
    tmp_path: Path, parameters: str, kind: str
) -> None:
    def strike(module: Any) -> None:
        module.gpt.position_embedding.weight[0, 0] = math.nan

    module = Module({3: strike})
    module.gpt.position_embedding.requires_grad_(False)
    fit(tmp_path, module, monitor_callback(tmp_path, parameters=parameters), max_steps=4)
    assert records(tmp_path, "anomaly_seen")[0]["offender"]["kind"] == kind


def test_the_trainer_stops_when_the_guard_gives_up(tmp_path: Path) -> None:
    callback = monitor_callback(tmp_path, guard_enabled=True, guard_max_rollbacks=1)
    strikes: dict[int, Strike] = dict.fromkeys(range(15, 30), strike_weight)
    trainer = fit(tmp_path, Module(strikes), callback)
    assert trainer.should_stop
    assert trainer.global_step < STEPS
    assert callback.summary["guard"]["integrity_status"] == "ABORTED"


def test_bf16_mixed_is_guarded(tmp_path: Path) -> None:
    callback = monitor_callback(tmp_path, guard_enabled=True)
    fit(tmp_path, Module({15: strike_weight}), callback, precision="bf16-mixed", max_steps=20)
    assert callback.summary["guard"]["total_recoveries"] == 1


def scaled_precision(init_scale: float) -> Any:
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=3)
    return pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)


def test_a_scale_that_is_looked_for_is_no_alarm_and_the_loss_is_told_without_it(
    tmp_path: Path,
) -> None:
    callback = monitor_callback(tmp_path, guard_enabled=True, telemetry_interval=1)
    plugin = scaled_precision(2.0**24)
    fit(tmp_path, module := Module(), callback, plugins=plugin, max_steps=20)
    assert plugin.scaler.get_scale() < 2.0**24
    told = records(tmp_path, "telemetry")
    assert [r["step"] for r in told] == list(range(20))
    assert [r["train_loss"] for r in told] == pytest.approx(module.losses, rel=1e-5)
    guard = callback.summary["guard"]
    assert (guard["total_rollbacks"], guard["skipped_steps"]) == (0, 0)


def test_the_scale_is_rolled_back(tmp_path: Path) -> None:
    plugin = scaled_precision(16.0)
    scales: dict[int, float] = {}

    class Looking(pl.Callback):  # type: ignore[misc,name-defined]
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            scales[trainer.global_step - 1] = plugin.scaler.get_scale()

    callback = monitor_callback(tmp_path, guard_enabled=True)
    module = Module({28: strike_weight})
    fit(tmp_path, module, callback, callbacks=[Looking()], plugins=plugin, max_steps=30)
    (event,) = records(tmp_path, "rollback_success")
    restored = scales[event["to_step"] - 1]
    assert scales[27] not in (restored, restored / 2)
    assert scales[28] == restored / 2  # GradScaler's own answer to what it has found


def test_resumed_from_a_checkpoint_steps_have_the_trainers_numbers(tmp_path: Path) -> None:
    trainer = fit(tmp_path, Module(), monitor_callback(tmp_path / "a"), max_steps=10)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    callback = monitor_callback(tmp_path / "b", guard_enabled=True)
    # Batches are counted anew after a checkpoint from within an epoch.
    given = {"ckpt_path": tmp_path / "last.ckpt", "max_steps": 20}
    fit(tmp_path, Module({18: strike_weight}), callback, **given)
    (event,) = records(tmp_path / "b", "rollback_success")
    assert (event["step"], event["to_step"]) == (18, 10)
    assert [r["step"] for r in records(tmp_path / "b", "telemetry")] == [10, 15]
    assert callback.summary["total_steps"] == 20


def test_a_training_step_that_returns_none_is_no_step_and_no_alarm(tmp_path: Path) -> None:
    class Passing(Module):  # type: ignore[misc,valid-type]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)

    fit(tmp_path, alone := Passing(), max_steps=12)
    callback = monitor_callback(tmp_path, guard_enabled=True)
    fit(tmp_path, watched := Passing(), callback, max_steps=12)
    assert have_same_bits(alone, watched)
    assert callback.summary["total_steps"] == 8
    assert callback.summary["guard"]["integrity_status"] == "OK"


def test_the_loggers_are_told(tmp_path: Path) -> None:
    logger = pl.loggers.CSVLogger(tmp_path, "told", flush_logs_every_n_steps=1)
    callback = monitor_callback(tmp_path)
    fit(tmp_path, Module(), callback, logger=logger, max_steps=12)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["foreshock/grad_norm"]]
    told = {r["step"]: r["grad_norm"] for r in records(tmp_path, "telemetry")}
    assert {int(r["step"]): float(r["foreshock/grad_norm"]) for r in rows} == pytest.approx(told)
    assert sorted(told) == [0, 5, 10]
    assert rows[-1]["foreshock/total_rollbacks"] == "0.0"


def test_manual_optimization_is_refused_with_what_to_do_instead(tmp_path: Path) -> None:
    module = Module()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match=r"automatic_optimization is False.*foreshock\.Monitor"):
        fit(tmp_path, module, monitor_callback(tmp_path), gradient_clip_val=None)


def test_without_an_optimizer_there_is_nothing_to_watch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Idle(Module):  # type: ignore[misc,valid-type]
        def configure_optimizers(self) -> Any:
            return None

    callback = monitor_callback(tmp_path)
    with caplog.at_level(logging.WARNING, "foreshock"):
        fit(tmp_path, Idle(), callback, max_steps=3)
    assert "nothing to watch" in caplog.text
    assert callback.summary is None


def test_the_trainer_is_left_as_it_was(tmp_path: Path) -> None:
    steps: list[Any] = []

    class Looking(pl.Callback):  # type: ignore[misc,name-defined]
        def on_train_start(self, trainer: Any, module: Any) -> None:
            steps.append(trainer.optimizers[0].step)

        def on_train_end(self, trainer: Any, module: Any) -> None:
            steps.append(trainer.optimizers[0].step)

    # Looks before the callback begins, and after it has ended.
    first, last = Looking(), Looking()
    callback = monitor_callback(tmp_path)
    trainer = fit(tmp_path, Module(), None, callbacks=[first, callback, last], max_steps=2)
    before, during, _, after = steps
    assert during != before
    assert after == before
    assert "clip_gradients" not in vars(trainer.precision_plugin)
    assert callback.monitor is None


def test_what_others_have_wrapped_meanwhile_stays_wrapped(tmp_path: Path) -> None:
    counted: list[int] = []

    class Counting(pl.Callback):  # type: ignore[misc,name-defined]
        def on_train_start(self, trainer: Any, module: Any) -> None:
            optimizer = trainer.optimizers[0]
            inner = optimizer.step

            def step(*args: Any, **kwargs: Any) -> Any:
                counted.append(trainer.global_step)
                return inner(*args, **kwargs)

            optimizer.step = step

    callback = monitor_callback(tmp_path, guard_enabled=True)
    trainer = fit(tmp_path, Module(), None, callbacks=[callback, Counting()], max_steps=3)
    assert counted == [0, 1, 2]
    trainer.optimizers[0].step()
    assert len(counted) == 4
    assert callback.summary["total_steps"] == 3


def test_an_exception_ends_the_watching_and_leaves_a_summary(tmp_path: Path) -> None:
    def fail(module: torch.nn.Module) -> None:
        raise RuntimeError("no more")

    callback = monitor_callback(tmp_path)
    with pytest.raises(RuntimeError, match="no more"):
        fit(tmp_path, Module({3: fail}), callback)
    on_disk = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert on_disk["total_steps"] == callback.summary["total_steps"] == 3


def test_trained_twice_it_watches_twice(tmp_path: Path) -> None:
    callback = monitor_callback(tmp_path)
    fit(tmp_path, module := Module(), callback, max_steps=3)
    first = callback.summary
    fit(tmp_path, module, callback, max_steps=4)
    assert callback.summary is not first
    assert callback.summary["total_steps"] == 4


def test_a_wrong_setting_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match="spectral_interval"):
        fit(tmp_path, Module(), monitor_callback(tmp_path, spectral_intervall=3), max_steps=1)
    with pytest.raises((TypeError, ValueError), match="snapshot_interval"):
        integration.MonitorCallback(tmp_path, guard_snapshot_interval=0)


def test_the_older_package_will_do_and_without_any_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    older = pytest.importorskip("pytorch_lightning")
    name = "foreshock.integrations.lightning"
    for gone in ("lightning", "lightning.pytorch"):
        monkeypatch.setitem(sys.modules, gone, None)
    monkeypatch.delitem(sys.modules, name)
    assert issubclass(importlib.import_module(name).MonitorCallback, older.Callback)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(foreshock.integrations, "lightning")
    with pytest.raises(ImportError, match=r"foreshock\[lightning\]"):
        _ = foreshock.integrations.lightning


def test_rotation_gates_of_its_module_are_found_and_followed(tmp_path: Path) -> None:
    module = Module()
    foreshock.gates.attach(module, "all", theta_std=0.3)
    schedule = foreshock.gates.AlphaSchedule(module, 4)

    class Opening(pl.Callback):  # type: ignore[misc,name-defined]
        def on_train_batch_end(self, *_: Any, **__: Any) -> None:
            schedule.step()

    callback = monitor_callback(tmp_path, gate_interval=1, gate_schedule=schedule)
    fit(tmp_path, module, callback, callbacks=[Opening()], max_steps=6)
    seen = read_series(tmp_path / "run" / "monitoring" / "gates.jsonl").rows
    assert [row["step"] for row in seen] == list(range(6))
    assert seen[0]["mix"]["gpt.blocks.1"] == pytest.approx(0.0067, abs=1e-3)
    assert seen[4]["mix"]["gpt.blocks.1"] == pytest.approx(0.1, abs=1e-3)
    assert records(tmp_path, "gate_at_risk") == []
