"""From the surprise of layers to a verdict on each sample: what calibrating a model leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from foreshock.surprise.aggregation import check_weights
from foreshock.surprise.calibration import EmpiricalPercentileCalibrator
from foreshock.surprise.listener import Reading
from foreshock.surprise.scores import LayerComponents, Surprise


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """How the surprise of each layer is scaled, brought together and ranked."""

    means: Mapping[str, float]
    deviations: Mapping[str, float]
    reading: Reading
    calibrator: EmpiricalPercentileCalibrator

    @classmethod
    def of(
        cls, per_layer: Mapping[str, Tensor], reading: Reading, quantile: float, seed: int
    ) -> Verdicts:
        """From in-distribution data: one half scales the layers, the other one is ranked.

        Args:
            per_layer: (N,) the surprise of each sample, by layer.
            reading: how the scaled layers become one score.
            quantile: of normal data, above which a sample is called strange.
            seed: of the split.
        Raises:
            ValueError: naming what is wrong with the data or the weights.
        """
        if reading.weights is not None:
            check_weights(reading.weights, list(per_layer))
        first = next(iter(per_layer.values()))
        order = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed))
        scaling, ranked = order.to(first.device).tensor_split(2)
        halves = {name: s[scaling].double() for name, s in per_layer.items()}
        for name, half in halves.items():
            if len(half) < 2 or not half.isfinite().all():
                raise ValueError(
                    f"the surprise of layer {name!r} on the loader's {len(first)} samples is not "
                    "finite, or of too few; accepted: finite, of 4 samples up"
                )
        uncalibrated = cls(
            {name: float(half.mean()) for name, half in halves.items()},
            # A layer that is always equally surprised says nothing, unless it is surprised once.
            {n: max(float(h.std()), 1e-6 * (1 + float(h.abs().max()))) for n, h in halves.items()},
            reading,
            EmpiricalPercentileCalibrator((quantile,)),
        )
        scaled = uncalibrated.scaled({name: s[ranked] for name, s in per_layer.items()})
        uncalibrated.calibrator.fit(reading.aggregate(scaled))
        return uncalibrated

    def scaled(self, per_layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By layer, how many standard deviations above the mean of normal data."""
        if set(per_layer) != set(self.means):
            raise ValueError(
                f"the layers that coded are {sorted(per_layer)}; accepted: those of the "
                f"calibration, {sorted(self.means)}"
            )
        return {n: (s - self.means[n]) / self.deviations[n] for n, s in per_layer.items()}

    def on(
        self, per_layer: Mapping[str, Tensor], components: Mapping[str, LayerComponents]
    ) -> Surprise:
        """What is said of a batch, by the surprise of each sample in each layer."""
        scaled = self.scaled(per_layer)
        score = self.reading.aggregate(scaled)
        rank = self.calibrator
        return Surprise(score, rank.percentile(score), scaled, rank.is_ood(score), components)

    def to_json_object(self) -> dict[str, Any]:
        """What `from_json_object` makes the same of."""
        return {
            **vars(self),
            "reading": self.reading.to_json_object(),
            "calibrator": self.calibrator.to_json_object(),
        }

    @classmethod
    def from_json_object(cls, saved: Mapping[str, Any]) -> Verdicts:
        """That of which this was made."""
        calibrator = EmpiricalPercentileCalibrator.from_json_object(saved["calibrator"])
        reading = Reading(**saved["reading"])
        return cls(**{**saved, "reading": reading, "calibrator": calibrator})
