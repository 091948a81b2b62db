"""Learns from in-distribution data alone what the outputs of a model's layers are like."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from foreshock.ops import calibrated_scores
from foreshock.ops.calibrated_scores import Aggregation
from foreshock.surprise.aggregation import check_weights
from foreshock.surprise.calibration import EmpiricalPercentileCalibrator, samples_needed
from foreshock.surprise.clusters import fit_clusters
from foreshock.surprise.layer_codes import LayerCodes
from foreshock.surprise.layers import select
from foreshock.surprise.listener import Calls, Listener, Listening, Reading, joined
from foreshock.surprise.model_input import Batch, MaskSource, read_batches
from foreshock.surprise.outputs import Reduction, evaluating
from foreshock.surprise.probe import SurpriseProbe
from foreshock.surprise.row_sample import LayerRows
from foreshock.surprise.scores import Parts
from foreshock.surprise.splits import THREE_WAYS, TWO_WAYS, Role, roles


def fit(
    model: nn.Module,
    loader: Iterable[Any],
    layers: str | Sequence[str] = "all_linear",
    codes: int = 64,
    dim: int | None = None,
    whiten: bool = True,
    aggregation: Aggregation = "mean",
    weights: Mapping[str, float] | None = None,
    calibration: Iterable[Any] | None = None,
    mask: MaskSource = None,
    batch_dim: int = 0,
    reduce_positions: Reduction = "mean",
    alpha: float = 0.05,
    seed: int = 0,
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d),
    max_rows: int = 16384,
) -> SurpriseProbe:
    """Fits codes to the outputs of layers, so that other inputs can be told from those given.

    For each layer, on its own output x (before any activation function):
    [PCA to dim ->] k-means -> spread within clusters C -> z = (x - mean) C^(-1/2) -> k-means
    -> D = min_k |z - c_k|^2 -> s = (D - mean D) / std D, then score = mean_l s_l.
    Codes come from 70 % of the samples, mean D and std D from 15 %, and the scores that a
    percentile is taken among from the last 15 %; no sample is used twice.

    Args:
        model: not changed: run in evaluation mode, and put back as it was.
        loader: in-distribution data without augmentation, gone through once: inputs, (inputs, ...),
            or mappings with "inputs" or "input_ids" (and "attention_mask"); moved to the model.
        layers: as for `surprise.layers.select`.
        codes: per layer; each needs two rows at least.
        dim: principal components kept of each layer, at most; None: all features.
        whiten: whether distances are in units of the spread within clusters, direction by
            direction; false: in units of its mean.
        aggregation: over layers: "mean", "max", or "weighted" by weights.
        weights: by layer, from 0 up.
        calibration: more in-distribution data for the percentiles alone; the loader's samples then
            fit (14 of 17) and normalise (3 of 17).
        mask: which positions of tokens count, (N, T): a key of the loader's mappings, a place in
            its sequences, or a function of what it yields; default "attention_mask" if it is there.
        batch_dim: where the samples are in the inputs, and in outputs of more than 2 dimensions.
        reduce_positions: from the positions of a layer that has some to one number: "mean", "max",
            or k, for the mean of the k largest. Convolutions are averaged before.
        alpha: the share of in-distribution inputs that may be flagged.
        seed: of the splits, of k-means, and of the rows taken.
        kinds: the types of layers that can be selected.
        max_rows: rows (samples, or positions of samples) of a layer that codes are fitted to, at
            most; drawn from all alike.
    Returns:
        SurpriseProbe, with its buffers where the layers' outputs are.
    Raises:
        TypeError, ValueError: naming the argument or the layer, what was given and what is
            accepted; too few samples among them.
        ImportError: scikit-learn is missing.
    Cost:
        One forward per sample; k-means on one thread; memory for max_rows rows of every layer and
        for 30 % of the inputs.
    Source:
        Lee et al. (2018), Mahalanobis scores, with k-means in place of classes.
    """
    model = getattr(model, "_orig_mod", model)  # of a compiled model what can be listened to
    modules = select(model, layers, kinds)
    reading = Reading(aggregation, weights, batch_dim, reduce_positions, mask)
    _check_numbers(codes=codes, max_rows=max_rows, dim=1 if dim is None else dim)
    calibrator = EmpiricalPercentileCalibrator((_quantile(alpha),))
    with evaluating(model):
        rows = LayerRows(model, modules, batch_dim, max_rows, seed)
        shares = THREE_WAYS if calibration is None else TWO_WAYS
        batches = read_batches(loader, batch_dim, mask)
        parts = _run_and_hold_out(batches, roles(shares, seed), rows)
        if calibration is not None:
            parts.held_out[Role.CALIBRATE] = list(read_batches(calibration, batch_dim, mask))
        parts.check(calibrator.quantiles[0])
        if weights is not None:
            check_weights(weights, list(rows.names.values()))
        fitted = [_codes_of(rows, key, codes, dim, whiten, seed) for key in rows.names]
        heard = functools.partial(_parts, model, modules, Calls(fitted), reading)
        scale = _scale_of(fitted, heard(parts.held_out[Role.NORMALISE]))
        calibrating = heard(parts.held_out[Role.CALIBRATE])
    normal = calibrated_scores(
        calibrating[0],
        scale,
        aggregation=aggregation,
        weights=reading.layer_weights([one.name for one in fitted], calibrating[0].device),
    )
    calibrator.fit(normal.score)
    return SurpriseProbe(model, modules, fitted, scale, calibrator, reading, parts.counts())


@dataclasses.dataclass
class _Parts:
    """Who does what."""

    fitting: int
    """Samples whose rows were taken."""
    held_out: dict[Role, list[Batch]]
    """Samples that were not run yet."""

    def counts(self) -> dict[str, int]:
        held_out = {role.value: sum(map(len, batches)) for role, batches in self.held_out.items()}
        return {Role.FIT.value: self.fitting, **held_out}

    def check(self, q: float) -> None:
        """Refuses what cannot be normalised or calibrated with."""
        counts, needed = self.counts(), samples_needed(q)
        if min(counts.values()) < 2 or counts[Role.CALIBRATE.value] < needed:
            share = sum(THREE_WAYS.values()) / THREE_WAYS[Role.CALIBRATE]
            raise ValueError(
                f"loader: of its samples {counts} are used; accepted: at least 2 each, and "
                f"{needed} to calibrate, as alpha = {1 - q:.6g} needs: some "
                f"{math.ceil(needed * share)} samples, or calibration= with {needed}"
            )


def _run_and_hold_out(batches: Iterable[Batch], roles: Iterator[Role], rows: LayerRows) -> _Parts:
    """Runs the model on those samples of each batch that fit, and puts the others aside."""
    parts = _Parts(0, {Role.NORMALISE: [], Role.CALIBRATE: []})
    for batch in batches:
        drawn = list(itertools.islice(roles, len(batch)))
        for role in Role:
            places = [i for i, one in enumerate(drawn) if one is role]
            if not places:
                continue
            chosen = batch.take(torch.tensor(places, device=batch.inputs.device))
            if role is Role.FIT:
                rows.run(chosen)
                parts.fitting += len(chosen)
            else:
                parts.held_out[role].append(chosen)
    return parts


def _codes_of(
    rows: LayerRows, key: tuple[str, int], codes: int, dim: int | None, whiten: bool, seed: int
) -> LayerCodes:
    """The codes of one call of a layer; how far normal data is from them is not known yet."""
    layer, name = key[0], rows.names[key]
    sample = rows.samples[key].rows()
    if len(sample) < 2 * codes:
        raise ValueError(
            f"codes is {codes}, and layer {name!r} has {len(sample)} rows to fit; accepted: "
            f"at most {len(sample) // 2} codes for these, or more samples"
        )
    clusters = fit_clusters(sample, codes, dim, whiten, seed)
    if len(clusters.centers) < codes:
        warnings.warn(
            f"layer {name!r} has {len(clusters.centers)} codes in place of {codes}: its outputs "
            "take no more values",
            stacklevel=3,
        )
    arrays = (clusters.mean, clusters.projection, clusters.centers)
    tensors = (torch.from_numpy(array) for array in arrays)
    return LayerCodes(layer, name, *tensors).to(rows.devices[layer])


def _parts(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    calls: Calls,
    reading: Reading,
    batches: list[Batch],
) -> Parts:
    """What the codes make of samples that were held out."""
    forwards = []
    for batch in batches:
        listener = Listener(calls, reading, batch.mask)
        with Listening(model, modules, listener.hear, listener.begin_forward):
            batch.run(model)
        forwards.append(listener.parts())
    return joined(forwards)


def _scale_of(fitted: list[LayerCodes], parts: Parts) -> Tensor:
    """(2, L) float32: mean and standard deviation of the distances of normal data."""
    distance_LN = parts[0].double()
    for one, is_finite in zip(fitted, distance_LN.isfinite().all(1).tolist(), strict=True):
        if not is_finite:
            raise ValueError(
                f"layer {one.name!r} gives outputs that are not finite for in-distribution data; "
                "accepted: finite outputs"
            )
    spread = distance_LN.std(1, correction=0)
    return torch.stack([distance_LN.mean(1), torch.where(spread > 0, spread, 1.0)]).float()


def _check_numbers(**numbers: int) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(f"{name} is {number!r}; accepted: an integer from 1 up")


def _quantile(alpha: float) -> float:
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}; accepted: a number above 0 and below 1")
    return float(1 - Fraction(str(alpha)))  # 1 - 0.07 in binary is not what is meant by 0.93
