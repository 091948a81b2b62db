"""Weight decay by parameter group, and the Muon ratio."""

from __future__ import annotations

import math

import pytest
import torch

from foreshock.signals import muon_ratio, weight_decays


def test_weight_decay_is_that_of_the_parameters_own_group() -> None:
    a, b, c, d = (torch.zeros(2, 2, requires_grad=True) for _ in range(4))
    optimizer = torch.optim.AdamW(
        [{"params": [a], "weight_decay": 0.0}, {"params": [b, c]}], weight_decay=0.2
    )
    assert weight_decays(optimizer, [c, a, b, d]) == (0.2, 0.0, 0.2, 0.0)
    optimizer.param_groups[1]["weight_decay"] = 0.5  # schedulers do
    assert weight_decays(optimizer, [b, a]) == (0.5, 0.0)


def test_a_group_that_names_no_weight_decay_is_not_taken_for_none() -> None:
    p = [torch.zeros(2, 2, requires_grad=True)]
    assert [math.isnan(x) for x in weight_decays(torch.optim.Rprop(p), p)] == [True]


def test_the_muon_ratio_is_weight_decay_times_sigma() -> None:
    sigma = torch.tensor([2.0, 3.0, 4.0])
    assert torch.equal(muon_ratio(sigma, (0.5, 0.0, 0.25)), torch.tensor([1.0, 0.0, 1.0]))
    assert muon_ratio([2.0, 3.0], (0.1, 0.2)).tolist() == [2.0 * 0.1, 3.0 * 0.2]
    assert muon_ratio(torch.zeros(0), ()).shape == (0,)


def test_under_muon_the_ratio_stays_below_one_and_rises_to_it() -> None:
    # The update orthogonalised exactly, in one direction all the time.
    weight = torch.zeros(8, 8, dtype=torch.float64)
    decay, lr, ratios = 0.5, 0.05, []
    for _ in range(200):
        weight = weight * (1 - lr * decay) + lr * torch.eye(8, dtype=torch.float64)
        sigma = torch.linalg.matrix_norm(weight, 2)[None]
        ratios.append(float(muon_ratio(sigma, (decay,))[0]))
    assert ratios == sorted(ratios)
    assert 0.99 < ratios[-1] <= 1


def test_a_weight_decay_too_few_is_named() -> None:
    with pytest.raises(ValueError, match=r"weight_decay holds 1 values; .* is \(2,\)"):
        muon_ratio(torch.ones(2), (0.1,))
