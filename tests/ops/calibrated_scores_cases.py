"""What the tests of calibrated_scores share: implementations, and the definition, done directly."""

from __future__ import annotations

import bisect
import functools
import importlib
import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from foreshock.ops import CalibratedScores
from foreshock.ops._backend import Choice, supported_isas
from foreshock.ops.calibrated_scores import cpu, reference

IMPLEMENTATIONS: dict[str, Any] = {
    "reference": reference,
    **{
        f"cpu-{isa}": SimpleNamespace(score=functools.partial(cpu.score, isa=isa))
        for isa in supported_isas()
    },
}
COMPILED = [name for name in IMPLEMENTATIONS if name != "reference"]
AGGREGATIONS = ["mean", "max", "weighted"]


def use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = Choice(name, IMPLEMENTATIONS[name], {})
    module = importlib.import_module("foreshock.ops.calibrated_scores.register")
    monkeypatch.setattr(module, "choose", lambda *_: choice)


class Case(NamedTuple):
    distances: Tensor
    scale: Tensor
    weights: Tensor | None
    reference: Tensor
    threshold: float
    aggregation: str

    def scored_by(self, score: Any, device: str = "cpu") -> CalibratedScores:
        """On the device, and back."""
        tensors = [None if t is None else t.to(device) for t in self[:4]]
        found = score(*tensors, self.threshold, is_largest=self.aggregation == "max")
        return CalibratedScores(*(part.cpu() for part in found))


def case(layers: int, samples: int, known: int, aggregation: str) -> Case:
    """Distances of which some are huge, tiny, or not finite; ties in the reference."""
    made = torch.Generator().manual_seed(1000 * layers + samples)
    distances = torch.randn(layers, samples, generator=made).exp_() * 30
    for i, strange in enumerate((torch.nan, torch.inf, -torch.inf, 3e38, 1e-42, 0.0)):
        if i < distances.numel():
            distances.view(-1)[(7 * i) % distances.numel()] = strange
    scale = torch.rand(2, layers, generator=made) * 20 + 0.5
    weights = torch.rand(layers, generator=made, dtype=torch.float64)
    weights /= weights.sum()
    likely = direct_scores(distances, scale, weights if aggregation == "weighted" else None,
                           aggregation)  # fmt: skip
    ties = [x for x in likely if math.isfinite(x)][: known // 2]
    drawn = torch.randn(known - len(ties), generator=made, dtype=torch.float64)
    ranked = torch.cat([torch.tensor(ties, dtype=torch.float64), drawn]).sort().values
    given = weights if aggregation == "weighted" else None
    return Case(distances, scale, given, ranked, float(ranked[known // 2]), aggregation)


def direct_scores(
    distances: Tensor, scale: Tensor, weights: Tensor | None, aggregation: str
) -> list[float]:
    """The definition, a number at a time."""
    of_layers = []
    for row, location, spread in zip(distances, *scale, strict=True):
        z = (row - location) / spread
        of_layers.append(
            [float(x) if math.isfinite(d) else math.nan for x, d in zip(z, row, strict=True)]
        )
    scores = []
    for column in zip(*of_layers, strict=True):
        if any(map(math.isnan, column)):
            scores.append(math.nan)
        elif aggregation == "max":
            scores.append(max(column))
        elif weights is None:
            scores.append(_rounded(_sum(column) / len(column)))
        else:
            scores.append(
                _rounded(_sum([w * x for w, x in zip(weights.tolist(), column, strict=True)]))
            )
    return scores


def _sum(column: Any) -> float:
    try:
        return math.fsum(column)
    except (OverflowError, ValueError):
        return sum(column)


def _rounded(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).float())


def assert_agrees(found: CalibratedScores, given: Case) -> None:
    """With the definition; what stands in the reference is found there, to the last bit."""
    d = given.distances
    right = (d - given.scale[0, :, None]) / given.scale[1, :, None]
    torch.testing.assert_close(
        found.z, right.where(d.isfinite(), torch.nan), rtol=0, atol=0, equal_nan=True
    )
    expected = torch.tensor(direct_scores(d, given.scale, given.weights, given.aggregation))
    torch.testing.assert_close(found.score, expected, rtol=1.2e-7, atol=1e-38, equal_nan=True)
    assert found.percentile is not None
    assert found.is_above is not None
    ranked = given.reference.tolist()
    for score, share, is_above in zip(
        found.score.tolist(), found.percentile.tolist(), found.is_above.tolist(), strict=True
    ):
        rank = len(ranked) if math.isnan(score) else bisect.bisect_right(ranked, score)
        assert share == rank / len(ranked)
        assert is_above == (not score <= given.threshold)
