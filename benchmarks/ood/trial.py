"""One trained model, the inputs that scores are to tell apart, and how well each score does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import foreshock as fs
from benchmarks.ood import baselines
from benchmarks.ood.metrics import quality

OURS = "foreshock"


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What a model makes of N inputs."""

    features: dict[str, Tensor]
    """(N, D) by the layer's name; `HEAD_INPUT` is always among them."""
    logits: Tensor
    """(N, C)."""


HEAD_INPUT = "head input"


@dataclasses.dataclass(frozen=True)
class Trial:
    """A model in eval mode, what it was trained on, and inputs it never saw.

    Every method is fitted on all of `train` and sees nothing else before it scores.
    """

    seed: int
    model: nn.Module
    weight: Tensor
    """(C, D) of the head, whose input is `HEAD_INPUT`."""
    bias: Tensor
    """(C,) of the head."""
    look: Callable[[Tensor], Outputs]
    """Runs the model on inputs."""
    train: Tensor
    labels: Tensor
    normal: Tensor
    accuracy: float
    """On `normal`."""
    ood: dict[str, Tensor]
    """The inputs of each OOD set."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the CSV: one seed, method and OOD set. Figures of merit in [0, 1]."""

    seed: int
    method: str
    ood_set: str
    auroc: float
    aupr: float
    fpr95: float
    accuracy: float
    num_normal: int
    num_ood: int


@dataclasses.dataclass(frozen=True)
class ProbeOptions:
    """What `foreshock.surprise.fit` is asked for."""

    layers: str | tuple[str, ...] = "all_linear"
    codes: int = 64
    dim: int | None = None


def judge(trial: Trial, options: ProbeOptions) -> list[Row]:
    """The rows of every method on every set of the trial."""
    inputs = {"": trial.normal, **trial.ood}
    outputs = {name: trial.look(x) for name, x in inputs.items()}
    fitted_on = trial.look(trial.train)
    probe = fit_probe(trial, options)
    rows = rows_of(trial, OURS, {name: scores(probe, x) for name, x in inputs.items()})
    for method, (layer, baseline) in compared(trial, list(fitted_on.features)).items():
        baseline.fit(fitted_on.features[layer], fitted_on.logits, trial.labels)
        found = {name: baseline.score(o.features[layer], o.logits) for name, o in outputs.items()}
        rows += rows_of(trial, method, found)
    return rows


def compared(trial: Trial, layers: list[str]) -> dict[str, tuple[str, baselines.Baseline]]:
    """By the method's name: the layer whose features it takes, and the baseline.

    What takes any features is compared on each layer, what needs the head only on the head's input.
    """
    methods: dict[str, tuple[str, baselines.Baseline]] = {
        "MSP": (HEAD_INPUT, baselines.MaxSoftmax()),
        "MaxLogit": (HEAD_INPUT, baselines.MaxLogit()),
        "Energy": (HEAD_INPUT, baselines.Energy()),
        "ViM": (HEAD_INPUT, baselines.ViM(trial.weight, trial.bias)),
    }
    for layer in layers:
        of_layer: dict[str, baselines.Baseline] = {
            "Mahalanobis": baselines.Mahalanobis(),
            "Mahalanobis++": baselines.MahalanobisPlusPlus(),
            "RMD": baselines.RelativeMahalanobis(),
            "KNN": baselines.KNN(),
            "tied Gaussian mixture": baselines.TiedGaussianMixture(seed=trial.seed),
            "L + H": baselines.LengthPlusEntropy(seed=trial.seed),
            "combo_id_zscore_equal": baselines.EqualZScores(seed=trial.seed),
        }
        suffix = "" if layer == HEAD_INPUT else f", {layer}"
        methods |= {f"{name}{suffix}": (layer, baseline) for name, baseline in of_layer.items()}
    return methods


def rows_of(trial: Trial, method: str, scores_of: dict[str, Tensor]) -> list[Row]:
    """A method's rows, from its scores of each set; those of the normal inputs are under ""."""
    normal = scores_of[""]
    rows = []
    for name, ood in scores_of.items():
        if name:
            found = dataclasses.asdict(quality(normal, ood))
            about = (trial.seed, method, name)
            rows.append(Row(*about, **found, **_sizes(trial, normal, ood)))
    return rows


def _sizes(trial: Trial, normal: Tensor, ood: Tensor) -> dict[str, float]:
    return {"accuracy": trial.accuracy, "num_normal": len(normal), "num_ood": len(ood)}


def fit_probe(trial: Trial, options: ProbeOptions) -> nn.Module:
    """Ours, fitted on the trial's training data."""
    loader = DataLoader(TensorDataset(trial.train, trial.labels), batch_size=256)
    asked = dataclasses.asdict(options)
    return fs.surprise.fit(trial.model, loader, **asked, seed=trial.seed)


@torch.no_grad()
def scores(probe: nn.Module, inputs: Tensor) -> Tensor:
    """(N,) what a fitted probe says."""
    return torch.cat([probe(x).score for x in inputs.split(256)])


def standing(rows: list[Row], figure: str = "auroc") -> dict[str, dict[str, list[float]]]:
    """By method and OOD set: the figure of each seed, in the order of the rows."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        of_method = found.setdefault(row.method, {})
        of_method.setdefault(row.ood_set, []).append(getattr(row, figure))
    return found
