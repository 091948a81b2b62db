"""Whether an input, or a hidden state, is like what a model was trained on."""

from foreshock.surprise.aggregation import max_surprise, mean_surprise, weighted_surprise
from foreshock.surprise.calibration import EmpiricalPercentileCalibrator
from foreshock.surprise.fit import fit
from foreshock.surprise.layers import select
from foreshock.surprise.probe import SurpriseProbe, Watch
from foreshock.surprise.scores import LayerComponents, Surprise

__all__ = [
    "EmpiricalPercentileCalibrator",
    "LayerComponents",
    "Surprise",
    "SurpriseProbe",
    "Watch",
    "fit",
    "max_surprise",
    "mean_surprise",
    "select",
    "weighted_surprise",
]
