"""Whether an input, or a hidden state, is like what a model was trained on."""

from foreshock.surprise.aggregation import max_surprise, mean_surprise, weighted_surprise
from foreshock.surprise.calibration import EmpiricalPercentileCalibrator
from foreshock.surprise.scores import LayerComponents, Surprise
from foreshock.surprise.wrapped_model import WrappedModel, wrap

__all__ = [
    "EmpiricalPercentileCalibrator",
    "LayerComponents",
    "Surprise",
    "WrappedModel",
    "max_surprise",
    "mean_surprise",
    "weighted_surprise",
    "wrap",
]
