"""What each choice of `surprise.fit` is worth: `python -m benchmarks.ood.ablate [--out DIR]`.

Every combination of codes, dimensions, temperatures and layers, on the digits. See docs/ood.md.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import rows
from benchmarks.interleave import microseconds_of_call
from benchmarks.ood import digits, report
from benchmarks.ood.metrics import auroc
from benchmarks.ood.trial import ProbeOptions, Trial, fit_probe, scores
from foreshock.ops import soft_assign

CODES = (16, 32, 64, 128)
DIMS = (None, 16, 64)
TEMPERATURES = (0.2, 2.0, 20.0)
LAYERS = ("all_linear", "first_linear", "last_linear", "0+2", "2")


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is varied."""

    layers: str = "all_linear"
    codes: int = 64
    dim: int | None = None
    temperature: float = 2.0


USUAL = Choice()


@dataclasses.dataclass(frozen=True)
class Point:
    """A line of the CSV: one choice, in the mean over the seeds."""

    layers: str
    codes: int
    dim: int | None
    temperature: float
    near_auroc: float
    random_near_auroc: float
    slightly_blurred_auroc: float
    near_auroc_of_l_plus_h: float
    """Of L + H among the same codes: all that the temperature changes; ours does not use it."""
    estimated_overhead: float
    """Multiply-adds of projection and distances, over those of the model."""
    measured_overhead: float
    """Processor time of a watched forward over that of a plain one, less 1; 256 inputs."""
    seeds: int


def explore(
    trials: Sequence[Trial],
    codes: Sequence[int] = CODES,
    dims: Sequence[int | None] = DIMS,
    temperatures: Sequence[float] = TEMPERATURES,
    layers: Sequence[str] = LAYERS,
    rounds: int = 5,
) -> Iterator[Point]:
    """A point for every combination, each over all of the trials."""
    for names, count, dim in itertools.product(layers, codes, dims):
        asked = names if names.endswith("linear") else tuple(names.split("+"))
        options = ProbeOptions(layers=asked, codes=count, dim=dim)
        yield from points(trials, names, options, temperatures, rounds)


def points(
    trials: Sequence[Trial],
    layers: str,
    options: ProbeOptions,
    temperatures: Sequence[float],
    rounds: int,
) -> Iterator[Point]:
    """One fit on every trial, at every temperature."""
    aurocs: dict[str, list[float]] = {}
    of_l_plus_h: dict[float, list[float]] = {temperature: [] for temperature in temperatures}
    overheads = []
    for trial in trials:
        probe = fit_probe(trial, options)
        normal = scores(probe, trial.normal)
        for name in trial.ood:
            found = auroc(normal, scores(probe, trial.ood[name]))
            aurocs.setdefault(name, []).append(found)
        if digits.NEAR in trial.ood:
            for temperature, found_at in of_l_plus_h.items():
                known, unknown = (
                    l_plus_h(probe, trial.model, x, temperature)
                    for x in (trial.normal, trial.ood[digits.NEAR])
                )
                found_at.append(auroc(known, unknown))
        overheads.append(measured_overhead(probe, trial.model, trial.train[:256], rounds))
    for temperature in temperatures:
        yield Point(
            layers=layers,
            codes=options.codes,
            dim=options.dim,
            temperature=temperature,
            near_auroc=statistics.fmean(aurocs[digits.NEAR]),
            random_near_auroc=statistics.fmean(aurocs[digits.RANDOM_NEAR]),
            slightly_blurred_auroc=statistics.fmean(aurocs["slightly blurred"]),
            near_auroc_of_l_plus_h=statistics.fmean(of_l_plus_h[temperature]),
            estimated_overhead=estimated_overhead(probe, trials[-1].model),
            measured_overhead=statistics.median(overheads),
            seeds=len({trial.seed for trial in trials}),
        )


@torch.no_grad()
def l_plus_h(probe: Any, model: nn.Module, inputs: Tensor, temperature: float) -> Tensor:
    """(N,): code length plus entropy among the probe's codes, in the mean over its layers."""
    parts: list[Tensor] = []

    def listen(layer: Any) -> torch.utils.hooks.RemovableHandle:
        def hear(module: nn.Module, given: object, output: Tensor) -> None:
            z = (output - layer.mean) @ layer.projection
            parts.append(soft_assign(z, layer.centers, temperature=temperature).surprise)

        return model.get_submodule(layer.layer).register_forward_hook(hear)

    handles = [listen(layer) for layer in probe.codes]
    model(inputs)
    for handle in handles:
        handle.remove()
    return torch.stack(parts).mean(0)


def estimated_overhead(probe: Any, model: nn.Module) -> float:
    """Of a layer's D outputs E are kept; to K codes that is D E + K E multiply-adds an input."""
    of_model = sum(part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear))
    shapes = ((*layer.projection.shape, len(layer.centers)) for layer in probe.codes)
    return sum(d * e + k * e for d, e, k in shapes) / of_model


@torch.no_grad()
def measured_overhead(probe: Any, model: nn.Module, inputs: Tensor, rounds: int) -> float:
    """What a watched forward takes over a plain one."""

    def watched() -> None:
        with probe.watch():
            model(inputs)

    plain_us, watched_us = (
        microseconds_of_call(call, calls=20, rounds=rounds)
        for call in (lambda: model(inputs), watched)
    )
    return watched_us / plain_us - 1


def varied_alone(points: list[Point]) -> list[Point]:
    """Those that differ from the defaults in one choice at most."""
    usual = dataclasses.asdict(USUAL)
    return [
        point
        for point in points
        if sum(getattr(point, name) != value for name, value in usual.items()) <= 1
    ]


def store(points: list[Point]) -> None:
    """Stores what docs/ood.md shows."""
    variants = {}
    for point in varied_alone(points):
        features = "all features" if point.dim is None else f"{point.dim} dimensions"
        name = f"{point.layers}, {point.codes} codes, {features}, T = {point.temperature:g}"
        variants[name] = dataclasses.asdict(point)
    case = f"digits, mean AUROC over {points[0].seeds} seeds; OOD is the positive class"
    rows.store("ood_ablation", case, "cpu", variants)


def show(points: list[Point]) -> None:
    """What differs from the defaults in one choice, on the console."""
    console = Console()
    table = Table(title="AUROC and overhead in %; OOD is the positive class", title_justify="left")
    for title in (field.name for field in dataclasses.fields(Point)):
        table.add_column(title.replace("_", " "), justify="right")
    for each in varied_alone(points):
        table.add_row(*(_cell(name, value) for name, value in dataclasses.asdict(each).items()))
    console.print(table)


def _cell(name: str, value: object) -> str:
    return f"{100 * value:.2f}" if "auroc" in name or "overhead" in name else str(value)  # type: ignore[operator]


def main(
    seeds: Annotated[int, typer.Option(help="How many, from 0 on.", min=1)] = 3,
    out: Annotated[Path, typer.Option(help="Where the CSV goes.")] = Path("runs/ood-ablate"),
    store_rows: Annotated[
        bool, typer.Option("--store", help="Store the rows that docs/ood.md shows.")
    ] = False,
) -> None:
    """Fit and score every combination, and time what it adds to a forward."""
    trials = [trial for seed in range(seeds) for trial in digits.trials(seed)]
    found = list(explore(trials))
    out.mkdir(parents=True, exist_ok=True)
    report.write_csv(found, out / "ablate.csv")
    if store_rows:
        store(found)
    show(found)
    print(f"every combination is in {out / 'ablate.csv'}")


if __name__ == "__main__":
    typer.run(main)
