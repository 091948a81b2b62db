"""One number from those of several positions."""

from __future__ import annotations

import math

import pytest
import torch

from foreshock.surprise.outputs import Reduction, over_positions


def reduced(values: list[float], reduction: Reduction) -> float:
    """What is meant, in plain Python."""
    if not values or any(map(math.isnan, values)):
        return math.nan
    if reduction == "mean":
        return sum(values) / len(values)
    largest = sorted(values)[-(1 if reduction == "max" else int(reduction)) :]
    return sum(largest) / len(largest)


@pytest.mark.parametrize("reduction", ["mean", "max", 1, 3, 50])
def test_reductions_take_what_the_mask_leaves(reduction: Reduction) -> None:
    values, mask = torch.randn(40, 9), torch.rand(40, 9) < 0.5
    mask[3] = False
    values[5, 2], mask[5, 2] = math.nan, True
    values[6, 2], mask[6, 2] = math.nan, False
    values[7, 2], mask[7, 2] = math.inf, False
    expected = [reduced(v[m].tolist(), reduction) for v, m in zip(values, mask, strict=True)]
    found = over_positions(values, mask, reduction)
    torch.testing.assert_close(found, torch.tensor(expected), equal_nan=True)
    assert found.isnan().nonzero().flatten().tolist() == [3, 5]
    everything = over_positions(values.nan_to_num(), None, reduction)
    whole = torch.tensor([reduced(v.tolist(), reduction) for v in values.nan_to_num()])
    torch.testing.assert_close(everything, whole)


@pytest.mark.parametrize("reduction", ["mean", "max", 4])
@pytest.mark.parametrize("size", [1, 7])
def test_trap_26_a_reduction_does_not_depend_on_the_batch_or_its_padding(
    reduction: Reduction, size: int
) -> None:
    values, mask = torch.randn(50, 300), torch.ones(50, 300, dtype=torch.bool)
    whole = over_positions(values, mask, reduction)
    parts = [over_positions(v, None, reduction) for v in values.split(size)]
    assert torch.cat(parts).equal(whole)
    padded = torch.nn.functional.pad(values, (0, 77), value=math.nan)
    longer = torch.nn.functional.pad(mask, (0, 77), value=False)
    assert over_positions(padded, longer, reduction).equal(whole)
