"""The grid over the choices of `surprise.fit`."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import tables
from benchmarks.ood import ablate, digits
from benchmarks.ood.metrics import auroc
from benchmarks.ood.trial import ProbeOptions, Trial, fit_probe, scores
from typer.testing import CliRunner

from tests.benchmarks_ood.commands import command


@pytest.fixture(scope="module")
def points(trials: list[Trial]) -> list[ablate.Point]:
    grid = ([8, 64], [None, 4], [1.0, 10.0], ["all_linear", "0+2"])
    return list(ablate.explore(trials, *grid, rounds=3))


def test_there_is_a_point_for_every_combination(points: list[ablate.Point]) -> None:
    chosen = {(p.codes, p.dim, p.temperature, p.layers) for p in points}
    assert len(points) == len(chosen) == 16


def test_a_point_is_the_quality_of_its_choice(
    trials: list[Trial], points: list[ablate.Point]
) -> None:
    (found,) = (
        p for p in points if (p.codes, p.dim, p.temperature, p.layers) == (8, 4, 1.0, "0+2")
    )
    probe = fit_probe(trials[0], ProbeOptions(layers=("0", "2"), codes=8, dim=4))
    near = auroc(scores(probe, trials[0].normal), scores(probe, trials[0].ood[digits.NEAR]))
    assert found.near_auroc == near


def test_temperature_changes_length_plus_entropy_and_not_ours(points: list[ablate.Point]) -> None:
    cold, hot = ([p for p in points if p.temperature == t] for t in (1.0, 10.0))
    assert [p.near_auroc for p in cold] == [p.near_auroc for p in hot]
    assert [p.near_auroc_of_l_plus_h for p in cold] != [p.near_auroc_of_l_plus_h for p in hot]


def test_length_plus_entropy_at_the_probes_temperature_is_the_probes_own(
    trials: list[Trial],
) -> None:
    probe = fit_probe(trials[0], ProbeOptions(codes=8))
    seen = probe(trials[0].normal, components=True).components.values()
    expected = torch.stack([layer.length + layer.entropy for layer in seen]).mean(0)
    found = ablate.l_plus_h(probe, trials[0].model, trials[0].normal, temperature=2.0)
    torch.testing.assert_close(found, expected)


def test_more_codes_cost_more_multiply_adds(points: list[ablate.Point]) -> None:
    by_choice = {(p.codes, p.dim, p.layers): p for p in points}
    few, many = (by_choice[codes, None, "0+2"].estimated_overhead for codes in (8, 64))
    model = 64 * 128 + 128 * 128 + 128 * 5
    assert few == pytest.approx(2 * (128 * 128 + 8 * 128) / model)
    assert many == pytest.approx(2 * (128 * 128 + 64 * 128) / model)


def test_the_measured_overhead_is_of_a_watched_forward_over_a_plain_one(
    trials: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trials[0].model
    probe = fit_probe(trials[0], ProbeOptions(codes=8))
    hooks: list[int] = []
    model.register_forward_hook(
        lambda *_: hooks.append(sum(len(m._forward_hooks) for m in model.modules()))
    )

    def clock(call: Callable[[], object], **_: Any) -> float:
        call()
        return 10.0 + hooks[-1]

    monkeypatch.setattr(ablate, "microseconds_of_call", clock)
    watched = len(probe.codes)
    found = ablate.measured_overhead(probe, model, trials[0].normal, rounds=1)
    assert hooks == [1, 1 + watched]
    assert found == pytest.approx((11 + watched) / 11 - 1)


def test_what_is_stored_differs_from_the_defaults_in_one_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, points: list[ablate.Point]
) -> None:
    monkeypatch.setattr("benchmarks.rows.RESULTS", tmp_path)
    monkeypatch.setattr(ablate, "USUAL", ablate.Choice(temperature=1.0))
    ablate.store(points)
    lines = tables.TABLES["ood_ablation"]().splitlines()
    named = {line.split(" | ")[0].removeprefix("| ") for line in lines if "codes, " in line}
    assert named == {
        "all_linear, 64 codes, all features, T = 1",
        "all_linear, 64 codes, all features, T = 10",
        "all_linear, 64 codes, 4 dimensions, T = 1",
        "all_linear, 8 codes, all features, T = 1",
        "0+2, 64 codes, all features, T = 1",
    }


def test_the_command_writes_the_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, points: list[ablate.Point]
) -> None:
    monkeypatch.setattr(ablate, "explore", lambda trials: iter(points))
    monkeypatch.setattr(digits, "trials", lambda seed: [])
    done = CliRunner().invoke(command(ablate.main), ["--seeds", "1", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    with (tmp_path / "ablate.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [float(row["near_auroc"]) for row in read] == [p.near_auroc for p in points]
    assert {"estimated_overhead", "measured_overhead"} <= read[0].keys()
