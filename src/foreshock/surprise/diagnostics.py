"""Whether codes are in use, layer by layer, and how surprised each layer was by each sample."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foreshock.records.atomic_file import write_atomically
from foreshock.records.strict_json import dump_json
from foreshock.surprise.batches import run_over
from foreshock.surprise.traces import CodingTrace
from foreshock.surprise.wrapped_model import WrappedModel

PathLike = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class LayerDiagnostics:
    """How one layer's codes were used by the rows that it coded."""

    layer: str
    rows: int
    """Positions coded: samples times positions times calls."""
    codes: int
    """K."""
    utilisation: float
    """Share of codes that are some row's nearest, 0 to 1."""
    dead_codes: int
    """Codes that are nobody's nearest."""
    perplexity: float
    """exp of the entropy of the usage of codes: 1 (one code) to K (all alike)."""
    mean_entropy: float
    """Mean H in nats."""
    mean_length: float
    """Mean L in nats."""
    commitment: float
    """Mean squared distance to the nearest code."""


def diagnose(model: WrappedModel, loader: Iterable[Any]) -> tuple[LayerDiagnostics, ...]:
    """Runs the model on a loader, in eval mode, and says how each layer's codes are used.

    Args:
        model: the wrapped model, with coding enabled.
        loader: yields inputs, (inputs, ...), or mappings with "inputs" or "input_ids".
    Raises:
        ValueError: the loader is empty, or no layer codes.
    """
    sums: dict[str, _Sums] = {}
    for _ in run_over(model, loader):
        for trace in model.traces:
            name = trace.meta.layer
            if name not in sums:
                sums[name] = _Sums(model.coders[name].codebook.codes)
            sums[name].add(trace)
    model.release()
    if not sums:
        raise ValueError("loader yields nothing that a layer codes; accepted: at least one batch")
    return tuple(found.diagnostics(name) for name, found in sums.items())


class _Sums:
    """Of one layer, over batches, on the host."""

    def __init__(self, codes: int) -> None:
        self._usage = torch.zeros(codes, dtype=torch.int64)
        self._scalars = torch.zeros(3, dtype=torch.float64)

    def add(self, trace: CodingTrace) -> None:
        code = trace.soft_code
        best = code.best_index.flatten()
        self._usage += torch.bincount(best, minlength=len(self._usage)).cpu()
        parts = (code.entropy, code.length, code.distance)
        self._scalars += torch.stack([part.double().sum() for part in parts]).cpu()

    def diagnostics(self, layer: str) -> LayerDiagnostics:
        rows, codes = int(self._usage.sum()), len(self._usage)
        share = self._usage / rows
        used = int((self._usage > 0).sum())
        entropy, length, distance = (self._scalars / rows).tolist()
        return LayerDiagnostics(
            layer=layer,
            rows=rows,
            codes=codes,
            utilisation=used / codes,
            dead_codes=codes - used,
            perplexity=float(torch.special.entr(share).sum().exp()),
            mean_entropy=entropy,
            mean_length=length,
            commitment=distance,
        )


def write_csv(path: PathLike, diagnostics: Sequence[LayerDiagnostics]) -> None:
    """Writes a line for each layer, in one step; the first line has the names of the fields."""
    text = io.StringIO(newline="")
    names = [field.name for field in dataclasses.fields(LayerDiagnostics)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in diagnostics)
    write_atomically(path, text.getvalue())


def append_jsonl(
    path: PathLike, diagnostics: Sequence[LayerDiagnostics], **more: float | str
) -> None:
    """Appends a JSON object for each layer.

    Args:
        path: of the file, which may not exist yet.
        diagnostics: what to append.
        more: fields that each object gets as well, as the step.
    Raises:
        ValueError: a field of that name there is already.
    """
    taken = set(more) & {field.name for field in dataclasses.fields(LayerDiagnostics)}
    if taken:
        raise ValueError(f"more has {sorted(taken)}; accepted: names that diagnostics do not have")
    lines = [dump_json({**more, **dataclasses.asdict(row)}) + "\n" for row in diagnostics]
    with Path(path).open("a", encoding="utf-8") as file:
        file.write("".join(lines))


def save_layerwise(
    path: PathLike, per_layer: Mapping[str, Tensor], groups: Sequence[str] | None = None
) -> None:
    """Saves how surprised each layer was by each sample, for `plot_layerwise`.

    Args:
        path: ends in .npz.
        per_layer: (N,) by layer: `Surprise.per_layer`, or `WrappedModel.layer_surprise()`.
        groups: N names, as "normal" and "far", or None.
    Raises:
        ValueError: naming what does not fit.
    """
    _check_npz(path)
    if not per_layer:
        raise ValueError("per_layer is empty; accepted: at least one layer")
    lengths = {name: tuple(surprise.shape) for name, surprise in per_layer.items()}
    if len(set(lengths.values())) != 1 or any(len(shape) != 1 for shape in lengths.values()):
        raise ValueError(f"per_layer has shapes {lengths}; accepted: (N,), the same for all")
    rows = [surprise.detach().cpu().float().numpy() for surprise in per_layer.values()]
    samples = len(rows[0])
    if groups is not None and len(groups) != samples:
        raise ValueError(f"groups has {len(groups)} names; accepted: {samples}, one per sample")
    file = io.BytesIO()
    np.savez_compressed(
        file,
        layers=np.array(list(per_layer)),
        surprise_LN=np.stack(rows),
        groups=np.array(groups if groups is not None else [""] * samples),
    )
    Path(path).write_bytes(file.getvalue())


def plot_layerwise(path: PathLike, image: PathLike) -> None:
    """Draws what `save_layerwise` saved: a row for each layer, a column for each sample.

    The colours of a layer go from its own 2nd to its 98th percentile; NaN is left white. Samples of
    a group stand together, ordered by their mean over layers.

    Args:
        path: of the .npz; no model runs.
        image: what is written, of a kind that matplotlib knows by its ending.
    Raises:
        ImportError: matplotlib is missing; install foreshock[plots].
        ValueError: the file is another one.
    """
    _check_npz(path)
    with np.load(path, allow_pickle=False) as saved:
        if not {"layers", "surprise_LN", "groups"} <= set(saved.files):
            raise ValueError(
                f"{os.fspath(path)} holds {saved.files}; accepted: what save_layerwise has written"
            )
        layers, surprise_LN, groups = (saved[k] for k in ("layers", "surprise_LN", "groups"))
    low, high = np.nanpercentile(surprise_LN, (2, 98), axis=1, keepdims=True)
    shade_LN = (surprise_LN - low) / np.maximum(high - low, 1e-12)
    names = list(dict.fromkeys(groups.tolist()))
    rank = np.array([names.index(group) for group in groups])
    order = np.lexsort((shade_LN.mean(0), rank))
    _draw(image, shade_LN[:, order], layers.tolist(), names, np.bincount(rank))


def _draw(
    image: PathLike,
    shade_LN: np.ndarray[Any, Any],
    layers: list[str],
    groups: list[str],
    sizes: np.ndarray[Any, Any],
) -> None:
    figure_module = _figure_module()
    figure = figure_module.Figure(figsize=(8, 1.2 + 0.3 * len(layers)), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(
        shade_LN, aspect="auto", interpolation="nearest", vmin=0, vmax=1, cmap="viridis"
    )
    axes.set_yticks(range(len(layers)), layers)
    ends = np.cumsum(sizes)
    axes.set_xticks(ends - sizes / 2 - 0.5, groups)
    for end in ends[:-1]:
        axes.axvline(end - 0.5, color="white")
    axes.set_xlabel("samples" if groups == [""] else "samples, by group")
    figure.colorbar(drawn, label="surprise, within the layer's own range")
    figure.savefig(image)


def _check_npz(path: PathLike) -> None:
    if not os.fspath(path).endswith(".npz"):
        raise ValueError(f"path is {os.fspath(path)!r}; accepted: one that ends in .npz")


def _figure_module() -> Any:
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib; install foreshock[plots]", name="matplotlib"
        ) from error
