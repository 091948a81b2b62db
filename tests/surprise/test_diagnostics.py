"""What is said of codes, written down and drawn; and what coding costs, counted."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from foreshock.surprise import (
    append_jsonl,
    diagnose,
    plot_layerwise,
    save_layerwise,
    wrap,
    write_csv,
)
from foreshock.surprise.overhead import EXP_COST, estimate
from tests.surprise.wrapped_models import Twice, cnn, images, mlp, rows


def test_diagnostics_are_those_of_all_batches_together() -> None:
    wrapped = wrap(mlp(), codes=8, coding_dim=3)
    parts = [rows(30, seed=1), (rows(10, seed=2), None)]
    found = diagnose(wrapped, parts)
    assert [d.layer for d in found] == ["0", "2"]
    wrapped.eval()(torch.cat([rows(30, seed=1), rows(10, seed=2)]))
    for diagnostics, trace in zip(found, wrapped.traces, strict=True):
        code = trace.soft_code
        usage = torch.bincount(code.best_index, minlength=8)
        assert (diagnostics.rows, diagnostics.codes) == (40, 8)
        assert diagnostics.dead_codes == int((usage == 0).sum())
        assert diagnostics.utilisation == 1 - diagnostics.dead_codes / 8
        share = usage[usage > 0] / 40
        assert diagnostics.perplexity == pytest.approx(math.exp(-(share * share.log()).sum()))
        assert diagnostics.mean_entropy == pytest.approx(code.entropy.mean().item(), rel=1e-5)
        assert diagnostics.mean_length == pytest.approx(code.length.mean().item(), rel=1e-5)
        assert diagnostics.commitment == pytest.approx(code.distance.mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match="loader yields nothing"):
        diagnose(wrapped, [])


def test_diagnostics_come_back_from_csv_and_jsonl(tmp_path: Path) -> None:
    found = diagnose(wrap(Twice()), [rows()])
    assert found[0].rows == 80  # two calls
    write_csv(tmp_path / "codes.csv", found)
    with (tmp_path / "codes.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert float(line["commitment"]) == found[0].commitment
    assert list(line) == [field.name for field in dataclasses.fields(found[0])]
    for step in (1, 2):
        append_jsonl(tmp_path / "codes.jsonl", found, step=step)
    lines = [json.loads(s) for s in (tmp_path / "codes.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, **dataclasses.asdict(found[0])} for step in (1, 2)]
    with pytest.raises(ValueError, match="more has"):
        append_jsonl(tmp_path / "codes.jsonl", found, layer="x")


def test_the_picture_is_drawn_from_the_file_alone(tmp_path: Path) -> None:
    wrapped = wrap(mlp())
    wrapped(rows())
    per_layer = wrapped.layer_surprise()
    per_layer["0"][3] = float("nan")
    save_layerwise(tmp_path / "a.npz", per_layer, ["near"] * 25 + ["far"] * 15)
    save_layerwise(tmp_path / "b.npz", per_layer)
    del wrapped
    for name in ("a", "b"):
        plot_layerwise(tmp_path / f"{name}.npz", tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_saved_or_drawn_is_refused(tmp_path: Path) -> None:
    one = torch.zeros(3)
    for per_layer, groups, message in (
        ({}, None, "per_layer is empty"),
        ({"a": one, "b": torch.zeros(4)}, None, "per_layer has shapes"),
        ({"a": one[None]}, None, "per_layer has shapes"),
        ({"a": one}, ["x"], "groups has 1 names"),
    ):
        with pytest.raises(ValueError, match=message):
            save_layerwise(tmp_path / "a.npz", per_layer, groups)
    with pytest.raises(ValueError, match=r"ends in \.npz"):
        save_layerwise(tmp_path / "a.txt", {"a": one})
    import numpy as np

    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="accepted: what save_layerwise has written"):
        plot_layerwise(tmp_path / "other.npz", tmp_path / "a.png")


def test_the_estimate_counts_multiply_adds() -> None:
    wrapped = wrap(nn.Sequential(nn.Linear(512, 256)), codes=64, coding_dim=32)
    wrapped(torch.randn(10, 512))
    (found,) = estimate(wrapped)
    assert found.own == 10 * 512 * 256
    assert found.pooling == 0
    assert found.projection == 10 * 256 * 32
    assert found.distances == 2 * 10 * 64 * 32
    assert found.softmax == 10 * 64 * (EXP_COST + 2)
    assert found.ratio == found.coding / found.own


def test_the_estimate_knows_convolutions_and_adds_up_calls() -> None:
    wrapped = wrap(cnn(), "all_conv", codes=4, coding_dim=None)
    wrapped(images())
    first, second = estimate(wrapped)
    assert first.own == 10 * 8 * 8 * 6 * (2 * 3 * 3)
    assert first.pooling == 10 * 8 * 8 * 6
    assert first.projection == 0
    assert second.own == 10 * 3 * 3 * 4 * (6 * 3 * 3)
    assert second.distances == 2 * 10 * 4 * 4
    twice = wrap(Twice(), codes=4)
    twice(rows())
    (found,) = estimate(twice)
    assert found.own == 2 * 40 * 6 * 6
    twice.release()
    with pytest.raises(RuntimeError, match="no layer has coded"):
        estimate(twice)
