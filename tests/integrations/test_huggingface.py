"""A monitor in a Trainer: what it sees, what it withholds, and that it leaves the rest alone."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foreshock.drill.text import Vocabulary, load_corpus
from foreshock.records import read_telemetry

transformers = pytest.importorskip("transformers")
huggingface = pytest.importorskip("foreshock.integrations.huggingface")

pytestmark = pytest.mark.filterwarnings("default")  # those of other people's code

TOKENS, ROWS = 32, 512


class Text(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of real text, one character per token."""

    def __init__(self) -> None:
        tokens = Vocabulary().encode(load_corpus()[: TOKENS * ROWS])
        self.rows = tokens.view(ROWS, TOKENS)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


class Striking(transformers.Trainer):  # type: ignore[misc]
    """Has something happen to its model before a training step, once."""

    strikes: dict[int, Callable[[torch.nn.Module], None]]

    def training_step(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        strike = self.strikes.pop(self.state.global_step, None)
        if strike is not None:
            with torch.no_grad():
                strike(model)
        return super().training_step(model, *args, **kwargs)  # type: ignore[no-any-return]


def gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(Vocabulary()), n_positions=TOKENS, n_embd=32, n_layer=2, n_head=2
    )
    return transformers.GPT2LMHeadModel(config)  # type: ignore[no-any-return]


def trainer(
    out_dir: Path,
    callback: Any = None,
    strikes: dict[int, Callable[[torch.nn.Module], None]] | None = None,
    **given: Any,
) -> Any:
    arguments = {
        "max_steps": 80,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **given,
    }
    args = transformers.TrainingArguments(output_dir=str(out_dir / "trainer"), **arguments)
    callbacks = [] if callback is None else [callback]
    made = Striking(gpt2(), args, train_dataset=Text(), callbacks=callbacks)
    made.strikes = dict(strikes or {})
    return made


def monitor_callback(out_dir: Path, **given: Any) -> Any:
    options = {"guard_snapshot_interval": 10, "telemetry_interval": 5, **given}
    return huggingface.MonitorCallback(out_dir / "run", **options)


def records(out_dir: Path, event: str) -> list[dict[str, Any]]:
    found = read_telemetry(out_dir / "run" / "telemetry.jsonl").records
    return [r for r in found if r["event"] == event]


def strike_weight(model: torch.nn.Module) -> None:
    model.get_parameter("transformer.h.1.mlp.c_fc.weight")[3, 3] = math.nan


def test_a_healthy_training_ends_with_the_same_bits_as_without_it(tmp_path: Path) -> None:
    alone = trainer(tmp_path / "a")
    alone.train()
    watched = trainer(tmp_path / "b", callback := monitor_callback(tmp_path))
    watched.train()
    pairs = zip(alone.model.parameters(), watched.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert callback.summary["total_steps"] == 80
    assert callback.summary["guard"]["anomalies_seen"] == 0
    logged = [r for r in watched.state.log_history if "loss" in r]
    told = {r["step"]: r["train_loss"] for r in records(tmp_path, "telemetry")}
    assert sorted(told) == list(range(0, 80, 5))
    assert math.isclose(logged[0]["loss"], told[0], rel_tol=0.2)
    assert "foreshock/grad_norm" in logged[0]


@pytest.mark.parametrize("is_guarded", [False, True])
@pytest.mark.parametrize("max_norm", [0.0, 0.5])
def test_the_norm_is_that_from_before_the_clip(
    tmp_path: Path, is_guarded: bool, max_norm: float
) -> None:
    callback = monitor_callback(tmp_path, guard_enabled=is_guarded, telemetry_interval=1)
    given = {"max_grad_norm": max_norm, "logging_steps": 1, "max_steps": 5}
    (one := trainer(tmp_path, callback, **given)).train()
    logged = [r["grad_norm"] for r in one.state.log_history if "grad_norm" in r]
    told = [r["grad_norm"] for r in records(tmp_path, "telemetry")]
    assert min(logged) > 0.5
    assert told == pytest.approx(logged, rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_nan_in_a_weight_is_named_and_rolled_back_and_training_ends(
    tmp_path: Path, accumulation: int
) -> None:
    callback = monitor_callback(tmp_path, guard_enabled=True)
    struck = trainer(
        tmp_path,
        callback,
        {50: strike_weight},
        gradient_accumulation_steps=accumulation,
    )
    struck.train()
    assert struck.state.global_step == 80
    (event,) = records(tmp_path, "rollback_success")
    assert event["step"] == 50
    assert event["to_step"] <= 50
    assert event["offender"]["name"] == "transformer.h.1.mlp.c_fc.weight"
    assert all(p.isfinite().all() for p in struck.model.parameters())
    guard = callback.summary["guard"]
    assert (guard["total_rollbacks"], guard["total_recoveries"]) == (1, 1)
    assert guard["integrity_status"] == "RECOVERED"


def test_observing_only_tells(tmp_path: Path) -> None:
    callback = monitor_callback(tmp_path)
    struck = trainer(tmp_path, callback, {5: strike_weight}, max_steps=10)
    struck.train()
    assert callback.summary["guard"]["anomalies_seen"] > 0
    assert callback.summary["guard"]["total_rollbacks"] == 0
    assert not all(p.isfinite().all() for p in struck.model.parameters())


def test_the_trainer_stops_when_the_guard_gives_up(tmp_path: Path) -> None:
    callback = monitor_callback(tmp_path, guard_enabled=True, guard_max_rollbacks=1)
    strikes = dict.fromkeys(range(20, 40), strike_weight)
    struck = trainer(tmp_path, callback, strikes)
    struck.train()
    assert struck.state.global_step < 40
    assert callback.summary["guard"]["integrity_status"] == "ABORTED"


def test_the_filter_that_hides_nan_is_switched_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = trainer(tmp_path, monitor_callback(tmp_path), max_steps=1)
    assert one.args.logging_nan_inf_filter
    with caplog.at_level(logging.WARNING, "foreshock"):
        one.train()
    assert not one.args.logging_nan_inf_filter
    assert "logging_nan_inf_filter" in caplog.text


def test_the_trainer_is_left_as_it_was(tmp_path: Path) -> None:
    one = trainer(tmp_path, monitor_callback(tmp_path), max_steps=2)
    before = one.accelerator.clip_grad_norm_
    one.train()
    assert not {"training_step", "log"} & set(vars(one))
    assert one.accelerator.clip_grad_norm_ == before
    made = len(list((tmp_path / "run").iterdir()))
    one.optimizer.step()
    assert len(list((tmp_path / "run").iterdir())) == made


def test_trained_twice_it_watches_twice(tmp_path: Path) -> None:
    callback = monitor_callback(tmp_path)
    one = trainer(tmp_path, callback, max_steps=3)
    one.train()
    first = callback.summary
    one.train()
    assert callback.summary is not first
    assert callback.summary["total_steps"] == 3


def test_bf16_and_a_scaled_loss_are_guarded(tmp_path: Path) -> None:
    callback = monitor_callback(tmp_path, guard_enabled=True)
    struck = trainer(tmp_path, callback, {20: strike_weight}, bf16=True, max_steps=30)
    struck.train()
    assert callback.summary["guard"]["total_recoveries"] == 1


def test_only_what_lora_trains_is_moved(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    made = trainer(tmp_path, callback := monitor_callback(tmp_path, guard_enabled=True))
    config = peft.LoraConfig(r=4, target_modules=["c_fc"], fan_in_fan_out=True)
    made.model = made.model_wrapped = peft.get_peft_model(made.model, config)
    made.train()
    assert callback.summary["guard"]["anomalies_seen"] == 0
    assert callback.summary["total_steps"] == 80


def test_the_summary_on_disk_is_that_of_the_callback(tmp_path: Path) -> None:
    callback = monitor_callback(tmp_path)
    trainer(tmp_path, callback, max_steps=3).train()
    on_disk = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert on_disk["final_loss"] == callback.summary["final_loss"]


def test_a_wrong_setting_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match="spectral_interval"):
        trainer(tmp_path, monitor_callback(tmp_path, spectral_intervall=3), max_steps=1).train()
    with pytest.raises((TypeError, ValueError), match="snapshot_interval"):
        huggingface.MonitorCallback(tmp_path, guard_snapshot_interval=0)


def test_sinks_are_given_what_telemetry_is_given(tmp_path: Path) -> None:
    class Kept:
        def __init__(self) -> None:
            self.steps: list[int] = []

        def write(self, record: Any) -> None:
            self.steps.append(record["step"])

        def close(self) -> None:
            self.steps.append(-1)

    kept = Kept()
    callback = monitor_callback(tmp_path, sinks=[kept])
    trainer(tmp_path, callback, max_steps=6).train()
    assert kept.steps == [0, 5, -1]
    assert callback.summary["sinks"]["Kept"] == {"written": 2, "dropped": 0, "error": None}
