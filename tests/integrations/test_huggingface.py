"""A monitor in a Trainer: what it sees, what it withholds, and that it leaves the rest alone."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from foreshock.records import verify
from tests.integrations.trainers import (
    WEIGHT,
    have_equal_bits,
    huggingface,
    monitor_callback,
    records,
    strike_gradient,
    strike_weight,
    trainer,
    transformers,
)

pytestmark = pytest.mark.filterwarnings("default")  # those of other people's code


def test_a_healthy_training_ends_with_the_same_bits_as_without_it(tmp_path: Path) -> None:
    alone = trainer(tmp_path / "a")
    alone.train()
    watched = trainer(tmp_path / "b", callback := monitor_callback(tmp_path))
    watched.train()
    assert have_equal_bits(alone.model, watched.model)
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
    assert min(told) > 0.5
    if max_norm or transformers.__version__ >= "5":  # before, what is not clipped has no norm
        assert told == pytest.approx(logged, rel=1e-5)


def test_a_nan_in_a_weight_at_step_50_is_named_and_undone_and_the_files_say_so(
    tmp_path: Path,
) -> None:
    callback = monitor_callback(tmp_path, guard_enabled=True)
    struck = trainer(tmp_path, callback, strikes={50: strike_weight})
    struck.train()
    assert struck.state.global_step == 80
    assert all(p.isfinite().all() for p in struck.model.parameters())

    (event,) = records(tmp_path, "rollback_success")
    assert (event["step"], event["to_step"]) == (50, 40)  # that of 50 was not proven yet
    assert event["reason"] == "NONFINITE_WEIGHTS"
    assert event["offender"]["name"] == WEIGHT
    told = {r["step"]: r["train_loss"] for r in records(tmp_path, "telemetry")}
    assert sorted(told) == list(range(0, 80, 5))
    assert [step for step, loss in told.items() if not math.isfinite(loss)] == [50]

    ledger = tmp_path / "run" / "ledger.jsonl"
    kept = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert [(r["event"], r["scope"]["step"]) for r in kept] == [
        ("rollback_success", 50),
        ("lr_changed", 50),
    ]
    assert kept[0]["evidence"]["offender"]["name"] == WEIGHT

    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert verify(ledger, head=summary["ledger_head"]).is_intact
    assert summary["total_steps"] == 80
    assert summary["final_loss"] == callback.summary["final_loss"] < told[0]
    guard = summary["guard"]
    assert (guard["total_rollbacks"], guard["total_recoveries"]) == (1, 1)
    assert (guard["skipped_steps"], guard["integrity_status"]) == (0, "RECOVERED")
    assert set(summary) >= {"spectral", "overhead", "dropped_records"}


def test_a_nan_in_a_gradient_at_step_50_is_named_and_its_update_withheld(tmp_path: Path) -> None:
    callback = monitor_callback(tmp_path, guard_enabled=True)
    struck = trainer(tmp_path, callback, strikes_after={50: strike_gradient})
    struck.train()
    assert struck.state.global_step == 80
    assert all(p.isfinite().all() for p in struck.model.parameters())
    (event,) = records(tmp_path, "update_skipped")
    assert (event["step"], event["reason"]) == (50, "NONFINITE_GRADIENT")
    assert event["offender"]["name"] == WEIGHT
    guard = callback.summary["guard"]
    assert (guard["skipped_steps"], guard["total_rollbacks"]) == (1, 0)
    assert struck.optimizer.state_dict()["state"][0]["step"] == 79


@pytest.mark.parametrize(
    "given",
    [
        {"gradient_accumulation_steps": 3},
        {"bf16": True},
        {"max_grad_norm": 0.0},
        {"optim": "adamw_torch"},
    ],
    ids=lambda given: next(iter(given)),
)
def test_whatever_the_trainer_is_told_the_offender_is_named_and_stays_out(
    tmp_path: Path, given: dict[str, object]
) -> None:
    callback = monitor_callback(tmp_path, guard_enabled=True, guard_snapshot_interval=4)
    strikes = {"strikes": {12: strike_weight}, "strikes_after": {14: strike_gradient}}
    struck = trainer(tmp_path, callback, max_steps=16, **strikes, **given)
    struck.train()
    assert struck.state.global_step == 16
    assert all(p.isfinite().all() for p in struck.model.parameters())
    for event, step in (("rollback_success", 12), ("update_skipped", 14)):
        (told,) = records(tmp_path, event)
        assert (told["step"], told["offender"]["name"]) == (step, WEIGHT)


def test_observing_only_tells(tmp_path: Path) -> None:
    callback = monitor_callback(tmp_path)
    struck = trainer(tmp_path, callback, strikes={5: strike_weight}, max_steps=10)
    struck.train()
    assert callback.summary["guard"]["anomalies_seen"] > 0
    assert callback.summary["guard"]["total_rollbacks"] == 0
    assert not all(p.isfinite().all() for p in struck.model.parameters())


def test_the_trainer_stops_when_the_guard_gives_up(tmp_path: Path) -> None:
    callback = monitor_callback(tmp_path, guard_enabled=True, guard_max_rollbacks=1)
    strikes = dict.fromkeys(range(20, 40), strike_weight)
    struck = trainer(tmp_path, callback, strikes=strikes)
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


class _Ticks:
    """Counts; and what the rollback has put back."""

    def __init__(self) -> None:
        self.loaded: list[int] = []

    def state_dict(self) -> dict[str, int]:
        return {"ticks": 7}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.loaded.append(state["ticks"])


def test_state_of_the_users_own_goes_back_with_the_rest(tmp_path: Path) -> None:
    ticks = _Ticks()
    callback = monitor_callback(tmp_path, guard_enabled=True, state={"ticks": ticks})
    trainer(tmp_path, callback, strikes={50: strike_weight}).train()
    assert ticks.loaded
    assert set(ticks.loaded) == {7}
