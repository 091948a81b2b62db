"""Loss, learning rate and gradient norm of every step, in files and a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import foreshock as fs
from foreshock import monitor as monitor_module
from foreshock.records import MetricsRecorder, read_metrics


def train(out_dir: Path, epochs: int = 2, lr: Any = 0.1, **options: Any) -> list[float]:
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
    losses = []
    with fs.Monitor(model, optimizer, out_dir, **options) as monitor:
        for step, x in monitor.loop(list(torch.randn(6, 5, 2)), epochs):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            monitor.clip_grad_norm_(0.01)
            monitor.step(loss)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            assert step == len(losses) - 1
    return losses


def records(out_dir: Path) -> list[dict[str, Any]]:
    return read_metrics(out_dir / "metrics" / "training_metrics.json").records


@pytest.mark.parametrize("lags", [False, True], ids=["in-step", "lagging"])
@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["number", "tensor"])
def test_every_step_is_recorded_and_drawn(
    tmp_path: Path, kind: Any, lags: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lags:
        monkeypatch.setattr(monitor_module, "_LAGGING_DEVICE", "cpu")
    losses = train(tmp_path, lr=kind(0.1), save_metrics=True)
    found = records(tmp_path)
    assert [r["step"] for r in found] == list(range(12))
    assert [r["epoch"] for r in found] == [0] * 6 + [1] * 6
    assert [r["loss"] for r in found] == losses
    rates = [0.1 * 0.5 ** (step // 3) for step in range(12)]
    assert [r["learning_rate"] for r in found] == pytest.approx(rates)
    assert all(r["grad_norm"] > 0.01 for r in found)  # before clipping
    png = tmp_path / "plots" / "training_curves.png"
    assert png.read_bytes().startswith(b"\x89PNG")


def test_they_are_off_by_default(tmp_path: Path) -> None:
    train(tmp_path)
    assert not (tmp_path / "metrics").exists()
    assert not (tmp_path / "plots").exists()


def test_interval_is_that_of_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    save = MetricsRecorder._save

    def note(self: MetricsRecorder) -> None:
        saved.append(len(self._waiting))
        save(self)

    monkeypatch.setattr(MetricsRecorder, "_save", note)
    monkeypatch.setattr(MetricsRecorder, "plot", lambda self: None)
    train(tmp_path, save_metrics=True, save_metrics_steps=5)
    assert saved == [5, 5, 2]


def test_a_loss_that_is_no_number_is_recorded_too(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with fs.Monitor(model, optimizer, tmp_path, save_metrics=True) as monitor:
        monitor.step(1.0)
        monitor.step(math.nan)
    assert math.isnan(records(tmp_path)[1]["loss"])


def test_settings_of_a_file_go_in_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "training: {save_metrics: true, save_metrics_steps: 4}\n"
        "foreshock: {monitor: {logit_interval: 7, activation_interval: 9}}\n"
    )
    settings = fs.load_settings(file)
    given = settings.foreshock
    train(tmp_path / "run", **dict(given.monitor), **dict(settings.training), guard=given.guard)
    assert len(records(tmp_path / "run")) == 12


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training: {save_metric: true}", "save_metric'; did you mean 'save_metrics'"),
        ("training: {save_metrics_step: 4}", "did you mean 'save_metrics_steps'"),
        ("training: {save_metrics_steps: 0}", "save_metrics_steps"),
        ("foreshock: {monitor: {logit_intervall: 7}}", "did you mean 'logit_interval'"),
        ("foreshock: {monitor: {activation_module: ['*']}}", "did you mean 'activation_modules'"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=said):
        fs.load_settings(file)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"save_metrics_steps": 0}, "save_metrics_steps"),
        ({"save_metrics": "perhaps"}, "save_metrics"),
        ({"save_metric": True}, "did you mean 'save_metrics'"),
    ],
)
def test_a_wrong_argument_is_an_error_that_names_it(
    tmp_path: Path, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        train(tmp_path, **given)
