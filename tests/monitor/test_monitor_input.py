"""Bad input is answered with the argument's name, what was given and what is accepted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import foreshock as fs


@pytest.fixture
def model() -> torch.nn.Module:
    return torch.nn.Linear(2, 1)


@pytest.fixture
def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.fixture
def monitor(model: Any, optimizer: Any, tmp_path: Path) -> Any:
    with fs.Monitor(model, optimizer, tmp_path) as monitor:
        yield monitor


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("model", "resnet", r"model is a str; accepted: a torch\.nn\.Module"),
        ("optimizer", 3, r"optimizer is a int; accepted: a torch\.optim\.Optimizer"),
        ("guard", {"mode": "skip"}, r"guard is a dict; accepted: a foreshock\.Guard"),
        ("out_dir", 7, "out_dir is 7; accepted: the path of a directory"),
        ("out_dir", "", "out_dir is ''; accepted: the path of a directory"),
        ("state", [1], "state is a list; accepted: a mapping from names"),
        ("state", {"ema": object()}, r"state\['ema'\] is a object; accepted: state_dict and load"),
    ],
)
def test_an_argument_of_the_wrong_type_is_named(
    model: Any, optimizer: Any, tmp_path: Path, name: str, bad: object, message: str
) -> None:
    given: dict[str, Any] = {"model": model, "optimizer": optimizer, "out_dir": tmp_path, name: bad}
    with pytest.raises(TypeError, match=message):
        fs.Monitor(**given)
    assert "step" not in vars(optimizer)  # nothing was left behind


@pytest.mark.parametrize("name", ["parameters", "buffers", "gradients", "optimizer", "random"])
def test_a_name_of_ours_cannot_be_registered(
    model: Any, optimizer: Any, tmp_path: Path, name: str
) -> None:
    with pytest.raises(ValueError, match=f"state has the key '{name}', which is taken"):
        fs.Monitor(model, optimizer, tmp_path, state={name: model})


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("telemetry_intervall", "telemetry_interval"),
        ("gaurd", "guard"),
        ("outdir", "out_dir"),
        ("states", "state"),
    ],
)
def test_an_unknown_keyword_is_answered_with_the_nearest_known(
    model: Any, optimizer: Any, tmp_path: Path, given: str, nearest: str
) -> None:
    with pytest.raises(ValueError, match=f"unknown key '{given}'; did you mean '{nearest}'"):
        fs.Monitor(model, optimizer, tmp_path, **{given: 1})
    assert "step" not in vars(optimizer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [0, -10, "often", 1.5])
def test_an_interval_that_is_none_is_named(
    model: Any, optimizer: Any, tmp_path: Path, bad: object
) -> None:
    with pytest.raises(ValidationError, match="telemetry_interval") as caught:
        fs.Monitor(model, optimizer, tmp_path, telemetry_interval=bad)
    assert str(bad) in str(caught.value)


def test_an_out_dir_that_is_a_file_is_named(model: Any, optimizer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="out_dir cannot be written to") as caught:
            fs.Monitor(model, optimizer, out_dir)
        assert str(out_dir) in str(caught.value)
    assert "step" not in vars(optimizer)


def test_an_out_dir_that_may_not_be_written_to_is_named(
    model: Any, optimizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write everywhere, so the refusal is made."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PermissionError, match=r"out_dir cannot be written to \(Permission denied"):
        fs.Monitor(model, optimizer, tmp_path / "run")


@pytest.mark.parametrize("bad", [0, -1, 1.5, "two", None, True])
def test_epochs_must_be_a_positive_integer(monitor: Any, bad: object) -> None:
    with pytest.raises(ValueError, match=f"epochs is {bad!r}; accepted: a positive integer"):
        monitor.loop([1], epochs=bad)  # at once, not when the first batch is asked for


def test_a_loader_must_be_iterable(monitor: Any) -> None:
    with pytest.raises(TypeError, match="loader is a int; accepted: an iterable of batches"):
        monitor.loop(5)


@pytest.mark.parametrize("bad", [-1.0, math.nan])
def test_max_norm_must_be_a_number_from_0_up(monitor: Any, bad: float) -> None:
    with pytest.raises(ValueError, match="max_norm is"):
        monitor.clip_grad_norm_(bad)


def test_max_norm_must_be_a_number(monitor: Any) -> None:
    with pytest.raises(TypeError, match="max_norm is a str; accepted: a number"):
        monitor.clip_grad_norm_("one")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (None, "NoneType"),
        ("1.0x", "str"),
        (torch.zeros(2), r"tensor of shape \(2,\) and torch.float32"),
        (torch.zeros(0), r"tensor of shape \(0,\)"),
        ([1.0], "list"),
    ],
)
def test_a_loss_must_be_one_number(monitor: Any, bad: object, said: str) -> None:
    with pytest.raises(TypeError, match=rf"loss is a {said}.*; accepted: a number, or a tensor"):
        monitor.step(bad)


@pytest.mark.parametrize(
    "loss",
    [1, 1.0, torch.tensor(1.0), torch.tensor([[1.0]], requires_grad=True), torch.tensor(1).half()],
)
def test_any_one_number_is_a_loss(monitor: Any, loss: Any) -> None:
    assert monitor.step(loss).action is fs.Action.CONTINUE


def test_a_threshold_that_is_never_reached_is_written_to_the_configuration(
    model: Any, optimizer: Any, tmp_path: Path
) -> None:
    fs.Monitor(model, optimizer, tmp_path, fs.Guard(spike_z=math.inf)).finalize()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["guard"]["spike_z"] == "Infinity"
