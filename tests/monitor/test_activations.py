"""What the outputs of chosen modules look like, in telemetry and as a series."""

from __future__ import annotations

import copy
import io
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import foreshock as fs
from foreshock import activation_watch
from foreshock.records import read_series, read_telemetry, series_file

PREFIX = "activation_"


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which cost more than all else here."""
    monkeypatch.setattr(series_file, "draw_series", lambda *_: None)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))


def batch(step: int) -> Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(step))


def train(
    model: nn.Module,
    out_dir: Path,
    steps: int = 6,
    note: Callable[[int], object] = lambda step: None,
    forward: Callable[[Tensor], Any] | None = None,
    **options: Any,
) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=options.pop("lr", 0.1))
    settings = {"telemetry_interval": 1, "activation_modules": ("*",), **options}
    with fs.Monitor(model, optimizer, out_dir, **settings) as monitor:
        for step in range(steps):
            note(step)
            optimizer.zero_grad()
            loss = (forward or model)(batch(step)).square().mean()
            loss.backward()
            monitor.step(loss)
            optimizer.step()
    return model


def told(out_dir: Path) -> list[dict[str, Any]]:
    records = read_telemetry(out_dir / "telemetry.jsonl").records
    found = [r for r in records if r["event"] == "telemetry"]
    return [{k: v for k, v in r.items() if k.startswith(PREFIX)} for r in found]


def rows(out_dir: Path) -> list[dict[str, Any]]:
    return read_series(out_dir / "monitoring" / "activations.jsonl").rows


def test_numbers_are_those_of_the_outputs(tmp_path: Path) -> None:
    model = network()
    outputs: dict[str, Tensor] = {}
    x = batch(1)
    for name, module in model.named_children():
        x = outputs[name] = module(x).detach()
    train(model, tmp_path, steps=3, lr=0.0)
    row = rows(tmp_path)[0]
    assert [row["step"], *row["rms"]] == [1, "0", "1", "2"]
    for name, output in outputs.items():
        values = output.double().numpy()
        assert row["rms"][name] == pytest.approx(np.sqrt((values**2).mean()), rel=1e-6)
        assert row["absmax"][name] == np.abs(values).max()
        assert row["zeros"][name] == (values == 0).mean()
        assert row["nonfinite"][name] == 0
    assert row["zeros"]["1"] > 0.3
    first, second, third = told(tmp_path)
    assert first == second == {}  # read one step later, so as to wait for no device
    assert third == {
        "activation_step": 1,
        "activation_rms_max": max(row["rms"].values()),
        "activation_rms_max_module": max(row["rms"], key=row["rms"].__getitem__),
        "activation_absmax": max(row["absmax"].values()),
        "activation_absmax_module": max(row["absmax"], key=row["absmax"].__getitem__),
        "activation_zeros_max": row["zeros"]["1"],
        "activation_zeros_max_module": "1",
        "activation_nonfinite": 0,
        "activation_nonfinite_module": None,
    }


def test_the_first_module_that_made_no_number_is_named(tmp_path: Path) -> None:
    model = network()
    with torch.no_grad():
        model.get_parameter("0.weight")[5, 0] = math.inf
    train(model, tmp_path, steps=3, lr=0.0)
    record = told(tmp_path)[2]
    assert record["activation_nonfinite_module"] == "0"
    assert record["activation_nonfinite"] == sum(rows(tmp_path)[0]["nonfinite"].values()) > 16
    assert math.isfinite(record["activation_rms_max"])


def test_between_looks_no_hook_is_left(tmp_path: Path) -> None:
    model = network()
    hooked: list[int] = []

    def note(step: int) -> None:
        hooked.extend([step] if any(m._forward_hooks for m in model.modules()) else [])

    train(model, tmp_path, 12, note, activation_interval=5)
    assert hooked == [1, 6, 11]
    assert not any(m._forward_hooks for m in model.modules())
    assert [r["step"] for r in rows(tmp_path)] == [1, 6, 11]


def test_it_is_off_by_default_and_changes_no_bit(tmp_path: Path) -> None:
    alone = train(network(), tmp_path / "alone", activation_modules=())
    watched = train(network(), tmp_path / "watched", activation_interval=1)
    assert not any(told(tmp_path / "alone"))
    assert not (tmp_path / "alone" / "monitoring").exists()
    pairs = zip(alone.parameters(), watched.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


class Nested(nn.Module):
    """Puts out tensors in containers, some of which hold no activations, and calls a part twice."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        first = self.part(x)
        second = self.part(first)
        ids = torch.arange(3)
        return {"both": (first, [second]), "ids": ids, "none": None, "empty": torch.empty(0)}


def test_outputs_may_be_nested_and_calls_of_a_module_count_together(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"nested": Nested()})
    nested = model["nested"]
    first, (second,) = nested(batch(1))["both"]
    both = torch.cat([first, second]).detach().double()
    train(model, tmp_path, steps=2, lr=0.0, forward=lambda x: nested(x)["both"][0])
    (row,) = rows(tmp_path)
    assert list(row["rms"]) == ["nested.part", "nested"]
    for name in row["rms"]:
        assert row["rms"][name] == pytest.approx(float(both.square().mean().sqrt()), rel=1e-6)
        assert row["absmax"][name] == float(both.abs().max())


def test_patterns_choose(tmp_path: Path) -> None:
    train(network(), tmp_path, steps=2, activation_modules=["0", "[2-9]"])
    assert list(rows(tmp_path)[0]["rms"]) == ["0", "2"]


def test_an_unknown_pattern_is_an_error_with_the_candidates(tmp_path: Path) -> None:
    model = nn.ModuleDict({"encoder": network(), "head": nn.Linear(1, 1)})
    with pytest.raises(ValueError, match=r"'heads'.* accepted: .*'head', 'encoder', 'encoder\.0'"):
        train(model, tmp_path / "run", activation_modules=("encoder.*", "heads"))
    assert not (tmp_path / "run").exists()


def test_too_many_modules_are_an_error_that_says_how_many(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Identity() for _ in range(257)))
    with pytest.raises(ValueError, match="257 modules; accepted: patterns for up to 256"):
        activation_watch.chosen_modules(model, ["*"])


def test_a_fault_in_a_hook_ends_the_listening_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(activation_watch, "health_scan", fail)
    model = network()
    with caplog.at_level(logging.ERROR, "foreshock"):
        train(model, tmp_path, activation_interval=1)
    assert len([r for r in caplog.records if "no longer follows activations" in r.message]) == 1
    assert len(told(tmp_path)) == 6
    assert not any(m._forward_hooks for m in model.modules())


def test_a_compiled_model_is_not_heard_which_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    counter = CompileCounter()
    model = network()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with caplog.at_level(logging.INFO, "foreshock"):
        train(model, tmp_path, forward=compiled, activation_interval=2)
    assert counter.frame_count == 1  # hooks that come and go compile nothing anew
    assert len([r for r in caplog.records if "compiled" in r.message]) == 1
    assert not any(told(tmp_path))
    torch.compiler.reset()


def test_a_model_that_is_compiled_in_a_look_is_one_graph_and_not_heard(tmp_path: Path) -> None:
    torch.compiler.reset()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with fs.Monitor(model, optimizer, tmp_path, activation_modules=("*",)) as monitor:
        monitor.step(1.0)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(batch(0)), network()(batch(0)))
        monitor.step(1.0)
    assert not (tmp_path / "monitoring").exists()
    torch.compiler.reset()


def test_a_model_that_is_copied_or_saved_in_a_look_takes_no_hook_along(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = fs.Monitor(model, optimizer, tmp_path, activation_modules=("*",))
    monitor.step(1.0)
    copied = copy.deepcopy(model)
    saved = io.BytesIO()
    torch.save(model, saved)
    copied(batch(0))
    model(batch(0))
    monitor.step(1.0)
    monitor.finalize()
    saved.seek(0)
    torch.load(saved, weights_only=False)(batch(0))
    (row,) = rows(tmp_path)
    assert row["zeros"]["1"] == (model[:2](batch(0)) == 0).double().mean()


def test_activations_of_half_precision_are_read_as_they_are(tmp_path: Path) -> None:
    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x).float()

    model = network()
    train(model, tmp_path, steps=2, lr=0.0, forward=forward)
    (row,) = rows(tmp_path)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = network()[0](batch(1))
    assert row["absmax"]["0"] == float(output.abs().max())
