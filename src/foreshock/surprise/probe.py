"""Listens to a fitted model and says how unlike its training data an input is."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from foreshock.ops import calibrated_scores
from foreshock.surprise import probe_file
from foreshock.surprise.calibration import EmpiricalPercentileCalibrator
from foreshock.surprise.float32_buffers import Float32Buffers
from foreshock.surprise.layer_codes import LayerCodes
from foreshock.surprise.listener import Calls, Listener, Listening, Reading
from foreshock.surprise.model_input import device_of, read_batch
from foreshock.surprise.outputs import evaluating
from foreshock.surprise.scores import ByLayer, LayerComponents, Parts, Surprise


class SurpriseProbe(Float32Buffers):
    """What `surprise.fit` makes: the codes of layers, beside the model that has them.

    score = aggregate over layers of (D - location) / spread, with D the squared distance of a
    layer's output to the nearest code (`LayerCodes`), location and spread those of D in held-out
    normal data; percentile and is_ood from the scores of more held-out normal data.

    The model is no part of the probe: nothing is added to it, `probe.parameters()` is empty, and
    `probe.to(device)` moves the codes alone, which stay float32. Hooks are registered while
    `probe(x)` or `watch()` runs and removed after; outputs are the same, bit for bit, and nothing
    is kept for a backward pass.

    >>> probe = foreshock.surprise.fit(model, loader)
    >>> probe(x).is_ood
    >>> with probe.watch() as seen:
    ...     logits = model(x)
    >>> seen.surprise().percentile

    Attributes:
        model: the model listened to.
        codes: `LayerCodes` of every layer; of every call, if a forward calls a layer repeatedly.
        scale: (2, L) mean and standard deviation of D of each in held-out normal data.
        calibrator: has the scores of held-out normal data.
        reading: how outputs are read.
        samples: how many samples fitted, normalised and calibrated.
    """

    scale: Tensor

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        codes: list[LayerCodes],
        scale: Tensor,
        calibrator: EmpiricalPercentileCalibrator,
        reading: Reading,
        samples: Mapping[str, int],
    ) -> None:
        super().__init__()
        # In a tuple, where nn.Module does not look for parts of itself.
        self._watched = (model, dict(modules))
        self._codes = nn.ModuleList(codes)
        self._calls = Calls(codes)
        self.register_buffer("scale", scale)
        self.calibrator = calibrator
        self.reading = reading
        self.samples = dict(samples)

    @property
    def model(self) -> nn.Module:
        """The model listened to."""
        return self._watched[0]

    @property
    def codes(self) -> list[LayerCodes]:
        """Those of every layer, in the order of the model."""
        return list(self._calls.codes)

    def forward(self, x: Any, mask: Tensor | None = None, components: bool = False) -> Surprise:
        """Runs the model on x, in evaluation mode without gradients, and says what was seen.

        Args:
            x: a batch of inputs, or what else `fit` takes from a loader; moved to the model.
            mask: (N, T), which positions count; default what `fit` was told to take for it, or the
                "attention_mask" of a mapping. A key or a place is nothing in a tensor x, which then
                has no mask; a function is asked whatever x is.
            components: whether L and H of each layer are wanted beside D.
        Raises:
            TypeError, ValueError: naming what was given and what is accepted.
        Cost:
            A forward and what `watch` costs.
        """
        source = (lambda _: mask) if mask is not None else self.reading.mask
        if isinstance(x, Tensor) and not callable(source):
            source = None
        batch = read_batch(x, self.reading.batch_dim, source)
        with evaluating(self.model), self.watch(batch.mask, components) as seen:
            batch.run(self.model)
        return seen.surprise()

    def watch(self, mask: Tensor | None = None, components: bool = False) -> Watch:
        """Listens to forwards that are run meanwhile, however they are run.

        Every call of the model itself brings further samples; calls of its parts without it count
        as one forward. What cannot be judged is raised by `surprise()`, not in the forward.

        Args:
            mask: (N, T), which positions count, in each forward.
            components: whether L and H of each layer are wanted beside D, of which the score is
                made.
        Returns:
            A context whose value has `surprise()`. The model should be in evaluation mode, as it
            was when fitted. What runs in a compiled graph is not heard. The fused path of
            nn.TransformerEncoderLayer calls no layers: torch takes the ordinary one while watched.
        Cost:
            For each layer one read of its output, N D E + N K E multiply-adds, and with
            `components` N K exponentials; nothing waits for a device. Without a watch nothing: no
            hook is left.
        """
        mask = None if mask is None else mask.bool()
        listener = Listener(self._calls, self.reading, mask, components)
        listening = Listening(*self._watched, listener.hear, listener.begin_forward)
        return Watch(self, listener, listening)

    def judge(self, parts: Parts) -> Surprise:
        """The surprise of samples from what the layers' codes make of them.

        Args:
            parts: D, or D, L and H, (L, N) each.
        """
        calibrator, names = self.calibrator, self._calls.names
        z_LN, score, percentile, is_ood = calibrated_scores(
            parts[0],
            self.scale,
            calibrator.reference_on(parts[0].device),
            calibrator.threshold(),
            aggregation=self.reading.aggregation,
            weights=self.reading.layer_weights(names, parts[0].device),
        )
        assert percentile is not None
        assert is_ood is not None
        components = ByLayer(names, functools.partial(_components_of, parts))
        per_layer = ByLayer(names, z_LN.__getitem__)
        return Surprise(score, percentile, per_layer, is_ood, components)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one file in one step: safetensors, with the settings as JSON in its header.

        Args:
            path: the file; the model's weights are not in it, nor a `mask` that is a function.
        Raises:
            OSError: it cannot be written; what was there is untouched.
        """
        settings = {
            "layers": [{"layer": one.layer, "name": one.name} for one in self.codes],
            "calibrator": self.calibrator.to_json_object(),
            "reading": self.reading.to_json_object(),
            "samples": self.samples,
        }
        scales = ({"location": at, "spread": width} for at, width in self.scale.T.clone())
        tensors = [one.tensors() | scale for one, scale in zip(self.codes, scales, strict=True)]
        probe_file.write(path, tensors, settings)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module) -> SurpriseProbe:
        """Reads what `save` wrote; scores are the same, bit for bit.

        Args:
            path: the file.
            model: with the weights that the probe was fitted to; the codes go where it is.
        Raises:
            OSError, ValueError: the file cannot be read, holds no probe or one of a version to
                come, or the model lacks layers of the probe, which are named.
        """
        tensors, settings = probe_file.read(path)
        try:
            scales = [[parts.pop(name) for parts in tensors] for name in ("location", "spread")]
            scale = torch.stack([torch.stack(row) for row in scales])
            codes = [
                LayerCodes(names["layer"], names["name"], **parts)
                for names, parts in zip(settings["layers"], tensors, strict=True)
            ]
            calibrator = EmpiricalPercentileCalibrator.from_json_object(settings["calibrator"])
            reading = Reading(**settings["reading"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)} holds no probe that is whole: {error}") from error
        modules = _modules_of(model, codes)
        probe = cls(model, modules, codes, scale, calibrator, reading, settings["samples"])
        return probe.to(device_of(model))


class Watch:
    """A context in which a probe listens, and what it has seen so far."""

    def __init__(self, probe: SurpriseProbe, listener: Listener, listening: Listening) -> None:
        self._probe = probe
        self._listener = listener
        self._listening = listening

    def __enter__(self) -> Watch:
        self._listening.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self._listening.__exit__(*raised)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was seen, as of a compiled graph."""
        return not self._listener.has_heard

    def surprise(self) -> Surprise:
        """How unlike the data that was fitted the samples are, in the order they were run.

        Raises:
            TypeError, ValueError: what was seen cannot be judged; naming the layer.
            RuntimeError: nothing was seen.
        """
        return self._probe.judge(self._listener.parts())


def _components_of(parts: Parts, layer: int) -> LayerComponents:
    return LayerComponents(*(part[layer] for part in parts))


def _modules_of(model: nn.Module, codes: list[LayerCodes]) -> dict[str, nn.Module]:
    modules = dict(model.named_modules(remove_duplicate=False))
    wanted = list(dict.fromkeys(one.layer for one in codes))
    missing = [name for name in wanted if name not in modules]
    if missing:
        raise ValueError(
            f"the model has no layers {missing}; accepted: a model with the layers {wanted}"
        )
    for one in codes:
        module = modules[one.layer]
        made = getattr(module, "out_features", getattr(module, "out_channels", None))
        if made not in (None, len(one.mean)):
            raise ValueError(
                f"layer {one.layer!r} of the model gives {made} features; accepted: "
                f"{len(one.mean)}, as fitted"
            )
    return {name: modules[name] for name in wanted}
