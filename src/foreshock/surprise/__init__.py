"""Whether an input, or a hidden state, is like what a model was trained on."""

from foreshock.surprise.aggregation import max_surprise, mean_surprise, weighted_surprise
from foreshock.surprise.calibration import EmpiricalPercentileCalibrator
from foreshock.surprise.codebook import Codebook
from foreshock.surprise.coding import CodingConv2d, CodingLinear
from foreshock.surprise.diagnostics import (
    LayerDiagnostics,
    append_jsonl,
    diagnose,
    plot_layerwise,
    save_layerwise,
    write_csv,
)
from foreshock.surprise.ema import CodesReseeded, EmaCodebookUpdater
from foreshock.surprise.fit import fit
from foreshock.surprise.layers import select
from foreshock.surprise.probe import SurpriseProbe, Watch
from foreshock.surprise.scores import LayerComponents, Surprise
from foreshock.surprise.temperature import CosineTemperature, FixedTemperature
from foreshock.surprise.traces import CodingTrace
from foreshock.surprise.wrapped_model import WrappedModel, wrap

__all__ = [
    "Codebook",
    "CodesReseeded",
    "CodingConv2d",
    "CodingLinear",
    "CodingTrace",
    "CosineTemperature",
    "EmaCodebookUpdater",
    "EmpiricalPercentileCalibrator",
    "FixedTemperature",
    "LayerComponents",
    "LayerDiagnostics",
    "Surprise",
    "SurpriseProbe",
    "Watch",
    "WrappedModel",
    "append_jsonl",
    "diagnose",
    "fit",
    "max_surprise",
    "mean_surprise",
    "plot_layerwise",
    "save_layerwise",
    "select",
    "weighted_surprise",
    "wrap",
    "write_csv",
]
