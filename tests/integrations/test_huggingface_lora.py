"""A monitor in a Trainer that trains adapters on a frozen model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.integrations.trainers import gpt2, monitor_callback, records, trainer

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("default")  # those of other people's code

FROZEN = "base_model.model.transformer.h.1.mlp.c_fc.base_layer.weight"
ADAPTER = "base_model.model.transformer.h.1.mlp.c_fc.lora_A.default.weight"


def with_lora() -> nn.Module:
    config = peft.LoraConfig(r=4, target_modules=["c_fc"], fan_in_fan_out=True)
    return peft.get_peft_model(gpt2(), config)  # type: ignore[no-any-return]


def strike(name: str) -> Any:
    def hit(model: nn.Module) -> None:
        model.get_parameter(name)[0, 0] = math.nan

    return hit


def bytes_of(model: nn.Module, *, is_trained: bool) -> int:
    return sum(p.nbytes for p in model.parameters() if p.requires_grad == is_trained)


def train(out_dir: Path, struck: str | None = None, **given: Any) -> tuple[Any, Any]:
    guard = {"persist_dir": out_dir / "snapshots", **given.pop("guard", {})}
    callback = monitor_callback(
        out_dir, guard_enabled=True, guard_snapshot_interval=4, guard=guard, **given
    )
    strikes = {} if struck is None else {12: strike(struck)}
    made = trainer(out_dir, callback, model=with_lora(), strikes=strikes, max_steps=25)
    made.train()
    return made, callback


def test_a_nan_in_an_adapter_is_named_and_undone(tmp_path: Path) -> None:
    base = gpt2().state_dict()
    made, callback = train(tmp_path, ADAPTER)
    (event,) = records(tmp_path, "rollback_success")
    assert event["step"] == 12
    assert event["offender"]["kind"] == "parameter"
    assert event["offender"]["name"] == ADAPTER
    assert callback.summary["guard"]["integrity_status"] == "RECOVERED"
    assert all(p.isfinite().all() for p in made.model.parameters())
    adapter_b = made.model.get_parameter(ADAPTER.replace("lora_A", "lora_B"))
    assert adapter_b.abs().max() > 0  # it began at 0: it was trained
    assert torch.equal(made.model.get_parameter(FROZEN), base["transformer.h.1.mlp.c_fc.weight"])


@pytest.mark.parametrize("parameters", ["trainable", "all"])
def test_what_is_frozen_is_in_snapshots_only_if_it_is_asked_for(
    tmp_path: Path, parameters: str
) -> None:
    made, _ = train(tmp_path, parameters=parameters)
    trained, frozen = (bytes_of(made.model, is_trained=is_trained) for is_trained in (True, False))
    saved = records(tmp_path, "snapshot_saved")[-1]
    on_disk = Path(saved["path"]).stat().st_size
    assert frozen > 10 * trained
    assert on_disk == saved["size_bytes"]
    # Parameters and two moments of what is trained; the header, random numbers and signals.
    others = 60_000
    expected = 3 * trained + (frozen if parameters == "all" else 0)
    assert expected < on_disk < expected + others < expected + frozen


def test_a_nan_in_what_is_frozen_is_undone_only_if_it_is_asked_for(tmp_path: Path) -> None:
    _, unguarded = train(tmp_path / "a", FROZEN)
    assert unguarded.summary["guard"]["integrity_status"] == "ABORTED"
    _, guarded = train(tmp_path / "b", FROZEN, parameters="all")
    assert guarded.summary["guard"]["integrity_status"] == "RECOVERED"
    (event,) = records(tmp_path / "b", "rollback_success")
    assert event["offender"]["name"] == FROZEN


def test_only_matrices_that_are_trained_have_their_spectra_followed(tmp_path: Path) -> None:
    _, callback = train(tmp_path)
    assert "lora_" in callback.summary["spectral"]["worst_layer"]
