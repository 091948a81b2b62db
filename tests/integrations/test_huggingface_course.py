"""A monitor in a Trainer that resumes, saves, evaluates, trains again, and has other callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.integrations.trainers import (
    Text,
    have_equal_bits,
    huggingface,
    monitor_callback,
    records,
    strike_weight,
    trainer,
    transformers,
)

pytestmark = pytest.mark.filterwarnings("default")  # those of other people's code


class Counting(transformers.TrainerCallback):  # type: ignore[misc]
    """Keeps what global_step is at each update, and everything that is logged."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.logs: list[dict[str, Any]] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
        self.logs.append({"at": state.global_step, **logs})


def telemetry_steps(out_dir: Path) -> list[int]:
    return [record["step"] for record in records(out_dir, "telemetry")]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_are_numbered_as_the_trainer_numbers_them_also_when_it_resumes(
    tmp_path: Path, accumulation: int
) -> None:
    given = {"save_strategy": "steps", "save_steps": 8, "max_steps": 12}
    given["gradient_accumulation_steps"] = accumulation
    counting = Counting()
    watched = {"telemetry_interval": 1, "guard_enabled": True, "guard_snapshot_interval": 4}
    trainer(tmp_path, monitor_callback(tmp_path, **watched), counting, **given).train()
    assert telemetry_steps(tmp_path) == counting.steps == list(range(12))

    counting, callback = Counting(), monitor_callback(tmp_path, **watched)
    given["max_steps"] = 20
    resumed = trainer(tmp_path, callback, counting, strikes={17: strike_weight}, **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-8"))
    assert telemetry_steps(tmp_path)[12:] == counting.steps == list(range(8, 20))
    (event,) = records(tmp_path, "rollback_success")
    assert (event["step"], event["to_step"]) == (17, 12)
    assert callback.summary["total_steps"] == resumed.state.global_step == 20


def test_after_a_rollback_both_count_on_and_the_undone_updates_are_missing(tmp_path: Path) -> None:
    counting = Counting()
    callback = monitor_callback(
        tmp_path, guard_enabled=True, guard_snapshot_interval=4, telemetry_interval=1
    )
    struck = trainer(tmp_path, callback, counting, strikes={10: strike_weight}, max_steps=16)
    struck.train()
    (event,) = records(tmp_path, "rollback_success")
    assert (event["step"], event["to_step"]) == (10, 8)
    assert telemetry_steps(tmp_path) == counting.steps == list(range(16))
    # The updates of steps 8 and 9 are undone, that of 10 was never made: 0 to 7, 11 to 15.
    assert struck.optimizer.state_dict()["state"][0]["step"] == 8 + 5
    assert struck.lr_scheduler.last_epoch == 8 + 5


def test_checkpoints_and_evaluations_in_between_change_nothing(tmp_path: Path) -> None:
    given = {
        "max_steps": 12,
        "save_strategy": "steps",
        "save_steps": 3,
        "save_total_limit": 1,
        "eval_strategy": "steps",
        "eval_steps": 4,
    }
    data = torch.utils.data.Subset(Text(), range(8))
    alone = trainer(tmp_path / "a", **given, eval_dataset=data)
    alone.train()
    callback = monitor_callback(tmp_path, guard_enabled=True, telemetry_interval=1)
    watched = trainer(tmp_path / "b", callback, **given, eval_dataset=data)
    watched.train()
    assert telemetry_steps(tmp_path) == list(range(12))
    assert callback.summary["guard"]["anomalies_seen"] == 0
    assert [p.name for p in (tmp_path / "b" / "trainer").glob("checkpoint-*")] == ["checkpoint-12"]
    evaluated = [[r["eval_loss"] for r in t.state.log_history if "eval_loss" in r]
                 for t in (alone, watched)]  # fmt: skip
    assert len(evaluated[1]) == 3
    assert evaluated[1] == pytest.approx(evaluated[0], rel=1e-3)


def test_no_checkpoint_holds_what_was_rolled_back(tmp_path: Path) -> None:
    callback = monitor_callback(tmp_path, guard_enabled=True, guard_snapshot_interval=2)
    struck = trainer(
        tmp_path,
        callback,
        strikes={6: strike_weight},
        max_steps=9,
        save_strategy="steps",
        save_steps=1,
    )
    struck.train()
    assert callback.summary["guard"]["total_rollbacks"] == 1
    saved = sorted((tmp_path / "trainer").glob("checkpoint-*/model.safetensors"))
    assert len(saved) == 9
    for path in saved:
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path


def test_trackers_are_given_numbers_and_among_them_what_has_happened(tmp_path: Path) -> None:
    before, after = Counting(), Counting()
    callback = monitor_callback(
        tmp_path, guard_enabled=True, guard_snapshot_interval=2, telemetry_interval=1
    )
    struck = trainer(
        tmp_path,
        before,
        callback,
        after,
        strikes={6: strike_weight},
        max_steps=9,
        logging_steps=1,
    )
    struck.train()
    for tracker in (before, after):
        told = [log for log in tracker.logs if "loss" in log]
        ours = [{k: v for k, v in log.items() if k.startswith("foreshock/")} for log in told]
        assert all(type(v) is float for log in ours for v in log.values())
        assert [log["foreshock/total_rollbacks"] for log in ours] == [0.0] * 6 + [1.0] * 3
        assert [log["foreshock/total_recoveries"] for log in ours] == [0.0] * 7 + [1.0] * 2
        assert [log["foreshock/step"] for log in ours] == [log["at"] - 1 for log in told]
        assert {"foreshock/skipped_steps", "foreshock/grad_norm"} <= set(ours[0])


def test_two_monitors_watch_one_training_and_both_let_go(tmp_path: Path) -> None:
    alone = trainer(tmp_path / "alone", max_steps=6)
    alone.train()
    two = [huggingface.MonitorCallback(tmp_path / name / "run") for name in ("a", "b")]
    watched = trainer(tmp_path / "both", *two, max_steps=6)
    watched.train()
    assert have_equal_bits(alone.model, watched.model)
    assert [one.summary["total_steps"] for one in two] == [6, 6]
    for one in two:
        watched.remove_callback(one)
    watched.train()
    assert not any("foreshock/" in key for log in watched.state.log_history for key in log)


def test_what_others_have_wrapped_meanwhile_stays_wrapped(tmp_path: Path) -> None:
    class Wrapping(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            inner = watched.log
            watched.log = lambda *given: seen.append(given) or inner(*given)

    seen: list[Any] = []
    watched = trainer(tmp_path, monitor_callback(tmp_path), Wrapping(), max_steps=3)
    watched.train()
    before = len(seen)
    watched.log({"loss": 1.0})
    assert len(seen) == before + 1
    assert "foreshock/step" not in watched.state.log_history[-1]


def test_trained_twice_it_watches_twice(tmp_path: Path) -> None:
    callback = monitor_callback(tmp_path, guard_enabled=True, guard_snapshot_interval=2)
    one = trainer(tmp_path, callback, max_steps=9)
    one.train()
    first = callback.summary
    one.strikes = {6: strike_weight}
    one.train()
    assert (first["guard"]["total_rollbacks"], first["total_steps"]) == (0, 9)
    second = callback.summary
    assert (second["guard"]["total_rollbacks"], second["total_steps"]) == (1, 9)


def test_after_a_training_that_broke_off_the_next_one_is_watched(tmp_path: Path) -> None:
    def break_off(model: torch.nn.Module) -> None:
        raise KeyboardInterrupt

    callback = monitor_callback(tmp_path)
    one = trainer(tmp_path, callback, strikes={3: break_off}, max_steps=6)
    with pytest.raises(KeyboardInterrupt):
        one.train()
    one.train()
    assert callback.summary["total_steps"] == 6
    assert not {"training_step", "log"} & set(vars(one))


def with_grad_scaler(one: Any) -> Any:
    """As with fp16=True, for which transformers wants a GPU."""
    one.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    one.accelerator.native_amp = True
    one.accelerator.state._mixed_precision = "fp16"
    return one


@pytest.mark.parametrize("is_guarded", [False, True])
@pytest.mark.parametrize("max_norm", [0.0, 1e9])
def test_under_a_grad_scaler_norms_are_those_of_the_unscaled_gradients(
    tmp_path: Path, is_guarded: bool, max_norm: float
) -> None:
    given = {"max_steps": 4, "max_grad_norm": max_norm}
    watched = {"telemetry_interval": 1, "guard_enabled": is_guarded}
    trainer(tmp_path / "a", monitor_callback(tmp_path / "a", **watched), **given).train()
    scaled = trainer(tmp_path / "b", monitor_callback(tmp_path / "b", **watched), **given)
    with_grad_scaler(scaled).train()
    plain, norms = ([r["grad_norm"] for r in records(tmp_path / x, "telemetry")] for x in "ab")
    assert norms == pytest.approx(plain, rel=0.05)
    assert scaled.optimizer.state_dict()["state"][0]["step"] == 4


def test_under_a_grad_scaler_an_update_is_withheld_that_the_scaler_has_nothing_against(
    tmp_path: Path,
) -> None:
    def strike(model: torch.nn.Module) -> None:
        model.get_parameter("transformer.wte.weight").mul_(1e3)

    callback = monitor_callback(
        tmp_path, guard_enabled=True, guard_snapshot_interval=4, guard_violation_threshold=20.0
    )
    struck = with_grad_scaler(trainer(tmp_path, callback, strikes={10: strike}, max_steps=16))
    struck.train()
    (event,) = records(tmp_path, "rollback_success")
    assert (event["step"], event["reason"]) == (10, "LOSS_OVER_THRESHOLD")
    assert struck.optimizer.state_dict()["state"][0]["step"] == 8 + 5
