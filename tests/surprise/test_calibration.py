"""A score's place among those of normal data."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foreshock.surprise import EmpiricalPercentileCalibrator

SCORES = st.floats(-1e6, 1e6)
REFERENCES = st.lists(SCORES | st.sampled_from([0.0, 1.0]), min_size=20, max_size=60)


def calibrated(count: int = 100, *quantiles: float) -> EmpiricalPercentileCalibrator:
    scores = torch.randperm(count).float()
    return EmpiricalPercentileCalibrator(quantiles or (0.95,)).fit(scores)


@settings(deadline=None)
@given(REFERENCES, st.lists(SCORES, max_size=5), st.floats(0.01, 0.95))
def test_is_ood_threshold_and_p_value_agree_at_every_boundary(
    reference: list[float], others: list[float], q: float
) -> None:
    calibrator = EmpiricalPercentileCalibrator().fit(reference)
    steps = [np.nextafter(s, to) for s in reference for to in (-np.inf, np.inf)]
    x = torch.tensor([*reference, *steps, *others, math.inf, -math.inf], dtype=torch.float64)
    is_ood = calibrator.is_ood(x, q)
    assert is_ood.tolist() == [s > calibrator.threshold(q) for s in x.tolist()]
    ranks = [1 + sum(r >= s for r in reference) for s in x.tolist()]
    least = (1 - Fraction(str(q))) * (len(reference) + 1)
    assert is_ood.tolist() == [rank <= least for rank in ranks]
    assert calibrator.p_value(x).tolist() == [r / (len(reference) + 1) for r in ranks]
    shares = [sum(r <= s for r in reference) / len(reference) for s in x.tolist()]
    assert calibrator.percentile(x).tolist() == shares


def test_a_float32_score_on_the_threshold_is_normal() -> None:
    scores = torch.randn(200)
    calibrator = EmpiricalPercentileCalibrator().fit(scores)
    threshold = torch.tensor(calibrator.threshold(), dtype=torch.float64).float()
    assert not calibrator.is_ood(threshold)
    assert calibrator.is_ood(threshold.nextafter(torch.tensor(math.inf)))
    in_double = EmpiricalPercentileCalibrator().fit(scores.double() + 1e-12)
    assert in_double.is_ood(scores).equal(scores.double() > in_double.threshold())


@pytest.mark.parametrize(("count", "q"), [(20, 0.95), (39, 0.95), (1000, 0.9), (57, 0.5)])
def test_no_more_than_one_minus_q_of_what_is_like_the_reference_is_flagged(
    count: int, q: float
) -> None:
    """Exactly, over all ranks that one more score could have had."""
    scores = torch.arange(count + 1.0)
    flagged = sum(
        bool(EmpiricalPercentileCalibrator((q,)).fit(scores[scores != s]).is_ood(s)) for s in scores
    )
    assert flagged == math.floor((1 - Fraction(str(q))) * (count + 1))


def test_trap_26_a_verdict_does_not_depend_on_the_batch() -> None:
    calibrator, x = calibrated(200), torch.randn(64) * 200
    for judge in (calibrator.percentile, calibrator.p_value, calibrator.is_ood):
        whole = judge(x)
        for size in (1, 7):
            assert torch.cat([judge(part) for part in x.split(size)]).equal(whole)


def test_trap_27_nan_is_out_of_distribution_and_never_normal() -> None:
    calibrator = calibrated(99, 0.95, 0.5)
    for q in (None, 0.5, 0.95):
        assert calibrator.is_ood([1.0, math.nan, math.inf], q).tolist() == [False, True, True]
    assert calibrator.percentile(math.nan).item() == 1.0
    assert calibrator.p_value(math.nan).item() == 0.01


@pytest.mark.parametrize(
    ("q", "needed"), [(0.95, 20), (0.9, 10), (0.99, 100), (0.999, 1000), (0.5, 2), (0.7, 4)]
)
def test_too_few_scores_are_refused_with_the_number_needed(q: float, needed: int) -> None:
    calibrator = EmpiricalPercentileCalibrator((q,)).fit(range(needed))
    assert calibrator.threshold() == needed - 1
    with pytest.raises(ValueError, match=rf"{needed - 1} scores .* at least {needed}"):
        EmpiricalPercentileCalibrator((q,)).fit(range(needed - 1))
    assert calibrator.reference.tolist() == list(range(needed))
    with pytest.raises(ValueError, match="at least 10000"):
        calibrator.threshold(0.9999)


def test_json_brings_every_number_back(tmp_path: Path) -> None:
    calibrator = EmpiricalPercentileCalibrator((0.9, 0.5)).fit(torch.randn(37))
    calibrator.save(tmp_path / "calibrator.json")
    loaded = EmpiricalPercentileCalibrator.load(tmp_path / "calibrator.json")
    assert loaded.quantiles == calibrator.quantiles
    assert loaded.reference.equal(calibrator.reference)
    assert loaded.threshold() == calibrator.threshold()
    assert loaded.threshold(0.5) == calibrator.threshold(0.5)


@pytest.mark.parametrize(
    "damage",
    [
        {"format": "other"},
        {"version": 2},
        {"reference": [1.0]},
        {"reference": [[1.0], [2.0, 3.0]]},
        {"reference": None},
        {"quantiles": [1.5]},
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: dict[str, object]) -> None:
    path = tmp_path / "calibrator.json"
    path.write_text(json.dumps(calibrated().to_json_object() | damage))
    with pytest.raises(ValueError, match=r"accepted|damaged"):
        EmpiricalPercentileCalibrator.load(path)


def test_bad_input_is_answered() -> None:
    with pytest.raises(RuntimeError, match="fit"):
        EmpiricalPercentileCalibrator().percentile(1.0)
    with pytest.raises(ValueError, match="quantiles is empty"):
        EmpiricalPercentileCalibrator(())
    for q in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="above 0 and below 1"):
            EmpiricalPercentileCalibrator((q,))
        with pytest.raises(ValueError, match="above 0 and below 1"):
            calibrated().is_ood(1.0, q)
    with pytest.raises(ValueError, match="2 numbers of 41 that are not finite"):
        EmpiricalPercentileCalibrator().fit([math.nan, math.inf, *[0.0] * 39])
    with pytest.raises(TypeError, match="scores is a str"):
        EmpiricalPercentileCalibrator().fit("scores")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="real numbers"):
        calibrated().is_ood(torch.tensor([1j]))


def test_any_shape_is_kept_and_nothing_is_written_to() -> None:
    calibrator, x = calibrated(), torch.randn(3, 0, 2)
    assert calibrator.percentile(x).shape == calibrator.is_ood(x).shape == (3, 0, 2)
    strided = torch.randn(8, 6, requires_grad=True)[:, ::2]
    assert calibrator.p_value(strided).shape == (8, 3)
    assert not calibrator.percentile(strided).requires_grad
