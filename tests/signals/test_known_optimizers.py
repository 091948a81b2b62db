"""Which optimizers are known, and what is said of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from foreshock.signals import second_moment_rms, why_no_second_moments
from tests.signals.optimizers import KNOWN, Make, make_parameters


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (torch.optim.SGD, "SGD is not known: not an Adam of torch; accepted: Adam, AdamW, NAdam"),
        (torch.optim.Adamax, r"Adamax is not known: it keeps a maximum of \|g\|"),
        (torch.optim.Adafactor, "Adafactor is not known: its second moment is factored"),
        (torch.optim.Adagrad, "Adagrad is not known: it keeps a sum"),
        (torch.optim.RMSprop, "RMSprop is not known: its mean of g.2 is not corrected"),
        (torch.optim.SparseAdam, "SparseAdam is not known: its moments"),
    ],
)
def test_an_optimizer_that_is_not_known_says_so(make: Any, words: str) -> None:
    parameters = make_parameters()
    optimizer = make(parameters, lr=1e-2)
    with pytest.raises(TypeError, match=words):
        second_moment_rms(optimizer, parameters, is_stepped=True)
    why = why_no_second_moments(optimizer)
    assert why is not None
    assert words.split(":")[0] in why


@pytest.mark.parametrize("make", KNOWN.values(), ids=KNOWN)
def test_nothing_is_held_against_a_known_optimizer(make: Make) -> None:
    assert why_no_second_moments(make(make_parameters())) is None


def test_a_subclass_of_a_known_optimizer_is_known() -> None:
    class Mine(torch.optim.AdamW):
        pass

    assert why_no_second_moments(Mine(make_parameters())) is None


def test_a_beta_that_is_a_tensor_is_not_waited_for() -> None:
    parameters = make_parameters()
    optimizer = torch.optim.AdamW(parameters)
    optimizer.param_groups[0]["betas"] = (0.9, torch.tensor(0.99))
    with pytest.raises(TypeError, match="AdamW has a tensor as beta2; accepted: a float"):
        second_moment_rms(optimizer, parameters, is_stepped=True)
