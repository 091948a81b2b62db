"""The comparison on digits: its sets, its tables, and that ours sees what others see."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest
import torch
from benchmarks import tables
from benchmarks.ood import baselines, digit_sets, digits, report
from benchmarks.ood.metrics import auroc
from benchmarks.ood.trial import HEAD_INPUT, OURS, ProbeOptions, Row, Trial, compared, judge
from typer.testing import CliRunner

import foreshock as fs
from tests.benchmarks_ood.commands import command


@pytest.fixture(scope="module")
def rows(trials: list[Trial]) -> list[Row]:
    return [row for trial in trials for row in judge(trial, ProbeOptions())]


def auroc_of(rows: list[Row], method: str, ood_set: str) -> float:
    (found,) = (row.auroc for row in rows if (row.method, row.ood_set) == (method, ood_set))
    return found


def test_nothing_that_is_scored_was_trained_on(trials: list[Trial]) -> None:
    for trial in trials:
        seen = {tuple(x) for x in trial.train.tolist()}
        assert not seen & {tuple(x) for x in trial.normal.tolist()}
        assert len(trial.train) == 7 * (len(trial.train) + len(trial.normal)) // 10


def test_the_unknown_digits_are_all_that_the_model_does_not_know(trials: list[Trial]) -> None:
    images, digit = digit_sets.digits()
    near = {tuple(x) for x in trials[0].ood[digits.NEAR].tolist()}
    assert near == {tuple(x) for x in images[digit > 4].tolist()}
    second = trials[1]
    assert len(second.ood[digits.RANDOM_NEAR]) + len(second.train) + len(second.normal) == 1797


def test_the_models_have_learned(trials: list[Trial]) -> None:
    assert min(trial.accuracy for trial in trials) > 0.95


def test_a_seed_is_the_same_again() -> None:
    first, again = (digits.trials(seed=3, epochs=1) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.train, other.train)
        assert all(torch.equal(one.ood[name], other.ood[name]) for name in one.ood)
        assert torch.equal(one.weight, other.weight)


def test_images_stay_images(trials: list[Trial]) -> None:
    for name, images in trials[0].ood.items():
        assert images.dtype == torch.float32, name
        assert images.shape[1] == 64, name
        assert float(images.min()) >= 0, name
        assert 0.3 < float(images.max()) <= 1, name


def test_a_blurred_image_has_less_contrast_and_a_rotated_one_as_much_ink() -> None:
    images = digit_sets.digits()[0][:50]
    assert digit_sets.blurred(images, 1.5).std() < digit_sets.blurred(images, 1.0).std()
    assert digit_sets.blurred(images, 1.0).std() < images.std()
    ink = digit_sets.rotated(images, seed=0).sum() / images.sum()
    assert 0.8 < float(ink) < 1.2


def test_ours_beats_the_logits_and_the_published_codes_near_and_far(rows: list[Row]) -> None:
    for name in digits.SETS:
        ours = auroc_of(rows, OURS, name)
        assert ours > 0.9
        for other in ("MSP", "Energy", "MaxLogit", "L + H"):
            assert ours > auroc_of(rows, other, name), (other, name)


def test_the_published_codes_are_near_chance_on_digits(rows: list[Row]) -> None:
    assert auroc_of(rows, "L + H, pre-activation", digits.NEAR) < 0.6


def test_every_method_is_scored_on_every_set(rows: list[Row]) -> None:
    per_set = {name: [row.method for row in rows if row.ood_set == name] for name in digits.SETS}
    assert len({tuple(methods) for methods in per_set.values()}) == 1
    assert len(per_set[digits.NEAR]) == len(set(per_set[digits.NEAR])) == 19


def test_a_baseline_in_the_rows_is_that_baseline(trials: list[Trial], rows: list[Row]) -> None:
    trial = trials[0]
    inside, normal, near = map(trial.look, (trial.train, trial.normal, trial.ood[digits.NEAR]))
    fitted = baselines.KNN().fit(inside.features[HEAD_INPUT], inside.logits, trial.labels)
    found = auroc(
        fitted.score(normal.features[HEAD_INPUT], normal.logits),
        fitted.score(near.features[HEAD_INPUT], near.logits),
    )
    assert auroc_of(rows, "KNN", digits.NEAR) == found


def test_vim_takes_the_head_that_made_the_logits(trials: list[Trial]) -> None:
    trial = trials[0]
    seen = trial.look(trial.normal)
    again = seen.features[HEAD_INPUT] @ trial.weight.T + trial.bias
    torch.testing.assert_close(again, seen.logits)
    methods = compared(trial, list(seen.features))
    assert methods["ViM"][0] == HEAD_INPUT
    assert "ViM, pre-activation" not in methods


def test_the_model_is_looked_at_as_it_runs(trials: list[Trial]) -> None:
    trial = trials[0]
    with torch.no_grad():
        torch.testing.assert_close(trial.look(trial.normal).logits, trial.model(trial.normal))


def row_of(method: str, seed: int, ood_set: str, value: float) -> Row:
    return Row(seed, method, ood_set, value, value, value, 1.0, 10, 10)


def made_rows(ours: float = 0.995, rival: float = 0.9, seeds: int = 10) -> list[Row]:
    values = {OURS: ours, "KNN": rival, "KNN, pre-activation": rival, "ViM": rival}
    values["Mahalanobis++"] = rival
    return [
        row_of(method, seed, name, value)
        for seed in range(seeds)
        for method, value in values.items()
        for name in digits.SETS
    ]


def missed(rows: list[Row]) -> list[str]:
    return [goal.what for goal in digits.goals(rows) if not goal.is_met]


def test_a_goal_is_missed_where_ours_is_too_low_and_only_there() -> None:
    assert missed(made_rows()) == []
    rows = made_rows()
    rows[0] = dataclasses.replace(rows[0], auroc=0.85)
    assert (rows[0].method, rows[0].ood_set) == (OURS, digits.NEAR)
    assert missed(rows) == ["lowest AUROC of any seed and set, at least 90"]


def test_ours_must_win_nine_of_ten_seeds_against_a_rivals_better_layer() -> None:
    rows = made_rows()
    better = [i for i, row in enumerate(rows) if row.method == "KNN, pre-activation"]
    near = [i for i in better if rows[i].ood_set == digits.NEAR]
    rows[near[0]] = dataclasses.replace(rows[near[0]], auroc=0.999)
    assert missed(rows) == []
    rows[near[1]] = dataclasses.replace(rows[near[1]], auroc=0.999)
    assert len(missed(rows)) == 1
    assert "KNN on near" in missed(rows)[0]


def test_a_table_states_its_convention_and_has_mean_and_deviation() -> None:
    rows = [row_of(OURS, 0, "near", 0.9), row_of(OURS, 1, "near", 0.98)]
    table = report.table(rows, "auroc", ["near"])
    assert "OOD is the positive class" in table.splitlines()[0]
    assert "2 seeds" in table.splitlines()[0]
    assert table.splitlines()[2] == f"| {OURS} | 94.00 ± 4.00 |"
    assert "95 % of the normal ones are kept" in report.table(rows, "fpr95", ["near"])


def test_stored_rows_make_the_same_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.rows.RESULTS", tmp_path)
    rows = made_rows()
    report.store(rows, "ood_digits", digits.SETS)
    stored = tables.TABLES["ood_digits"]()
    for figure in ("auroc", "fpr95"):
        assert report.table(rows, figure, digits.SETS) in stored


def test_the_command_writes_rows_table_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trials: list[Trial], rows: list[Row]
) -> None:
    monkeypatch.setattr(digits, "trials", lambda seed: trials)
    monkeypatch.setattr(digits, "judge", lambda trial, options: rows if trial is trials[0] else [])
    done = CliRunner().invoke(
        command(digits.main), ["--seeds", "1", "--out", str(tmp_path / "out")], terminal_width=200
    )
    assert done.exit_code in (0, 1), done.output
    assert ("missed" in done.output) == (done.exit_code == 1)
    assert "OOD is the positive class" in " ".join(done.output.split())
    with (tmp_path / "out" / "digits.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [row["ood_set"] for row in read] == [row.ood_set for row in rows]
    assert [float(row["auroc"]) for row in read] == [row.auroc for row in rows]
    assert (tmp_path / "out" / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert report.table(rows, "auroc", digits.SETS) in (tmp_path / "out" / "digits.md").read_text()


def test_ours_is_the_probe_of_the_library(trials: list[Trial], rows: list[Row]) -> None:
    trial = trials[0]
    pairs = list(zip(trial.train.split(100), trial.labels.split(100), strict=True))
    probe = fs.surprise.fit(trial.model, pairs)
    found = auroc(probe(trial.normal).score, probe(trial.ood[digits.NEAR]).score)
    assert found == pytest.approx(auroc_of(rows, OURS, digits.NEAR), abs=0.005)
