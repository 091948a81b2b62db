"""A model some of whose layers code what they put out."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from foreshock.ops.calibrated_scores import Aggregation
from foreshock.surprise.aggregation import mean_surprise
from foreshock.surprise.batches import run_over
from foreshock.surprise.codebook import Init
from foreshock.surprise.coding import (
    Coder,
    CodingConv2d,
    CodingLayer,
    CodingLinear,
    CodingSettings,
    Pooling,
    check_can_code,
    check_temperature,
    start_coding,
    stop_coding,
)
from foreshock.surprise.layers import select
from foreshock.surprise.listener import Reading
from foreshock.surprise.losses import CodedRows, coding_loss
from foreshock.surprise.scores import LayerComponents, Surprise
from foreshock.surprise.traces import CodingTrace, Recording
from foreshock.surprise.verdicts import Verdicts


def wrap(
    model: nn.Module,
    layers: str | Sequence[str] = "all_linear",
    codes: int = 16,
    coding_dim: int | None = None,
    *,
    pooling: Pooling = "mean",
    temperature: float = 1.0,
    beta_length: float = 1.0,
    beta_entropy: float = 1.0,
    beta_distance: float = 1.0,
    init: Init = "normal",
    detach: bool = True,
    batch_dim: int = 0,
    seed: int = 0,
) -> WrappedModel:
    """Gives layers of the model codebooks that can be trained with it.

    r = P pool(y),  d2_k = |r - c_k|^2,  p = softmax(-d2 / temperature),
    S = beta_length L + beta_entropy H + beta_distance log(1 + d2), as in `ops.soft_assign`.

    The model is changed in place: its layers stay the objects they are, with all their attributes,
    and become `CodingLinear` and `CodingConv2d`. What they put out does not change by a bit. In
    eval mode nn.TransformerEncoderLayer runs its layers one by one instead of as one kernel, which
    would pass them by; its numbers then differ by rounding.

    Args:
        model: with initialised layers.
        layers: as for `layers.select`.
        codes: K of every layer.
        coding_dim: D, by a learned projection that starts orthogonal; None: the layer's own width.
        pooling: of a convolution's output over height and width: "mean", "max", or "positions",
            which codes each one. A linear layer codes each position.
        temperature: of the softmax, in squared distance.
        beta_length: weight of L in S.
        beta_entropy: weight of H.
        beta_distance: weight of D. L and H fall to 0 far from every center; without D strange
            inputs look normal.
        init: of the centers, "normal" or "uniform"; see `Codebook`.
        detach: whether the coding loss leaves the model's own parameters alone.
        batch_dim: where samples lie in outputs with more than two dimensions; 1 for
            nn.TransformerEncoder without batch_first.
        seed: of all that is drawn, from a stream of its own.
    Returns:
        The wrapped model.
    Raises:
        TypeError, ValueError: naming the argument, what it is and what is accepted; nothing was
            changed.
    """
    if isinstance(model, WrappedModel) or any(isinstance(m, Coder) for m in model.modules()):
        raise ValueError("model is wrapped already; accepted: one that is not, or its unwrap()")
    settings = CodingSettings(
        codes,
        coding_dim,
        pooling,
        temperature,
        beta_length,
        beta_entropy,
        beta_distance,
        init,
        detach,
    )
    recording = Recording()
    selected = select(model, layers)
    for name, layer in selected.items():
        check_can_code(name, layer)
    coders = {
        name: Coder(name, layer, settings, recording, seed + i)  # type: ignore[arg-type]
        for i, (name, layer) in enumerate(selected.items())
    }
    return WrappedModel(model, coders, recording, batch_dim)


class WrappedModel(nn.Module):
    """A model whose layers code what they put out; see `wrap`, which makes one.

    Called like the model, it returns what the model returns. What its layers were coded as in the
    last call can be had from `traces`, `layer_surprise`, `surprise` and `coding_loss` until the
    next call. While it trains, and a codebook needs a gradient, these notes hold their graph until
    `coding_loss` has been taken. The state dict has all of it: weights, codes, temperatures, betas
    and the calibration.

    >>> wrapped = surprise.wrap(model, "all_linear", codes=64, coding_dim=32)
    >>> loss = task_loss(wrapped(x), y) + wrapped.coding_loss()
    """

    def __init__(
        self, model: nn.Module, coders: dict[str, Coder], recording: Recording, batch_dim: int
    ) -> None:
        super().__init__()
        self.module = model
        self._recording = recording
        self._batch_dim = batch_dim
        self._names = tuple(coders)
        self._verdicts: Verdicts | None = None
        layers = {name: model.get_submodule(name) for name in coders}
        for name, layer in layers.items():
            start_coding(layer, coders[name])
        self._nested = _pass_no_layer_by(model)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """What the model returns, while its layers note how they code it."""
        self._recording.calls = []
        self._recording.is_open = True
        try:
            output = self.module(*arguments, **keywords)
        finally:
            self._recording.is_open = False
        return self._tied(output)

    @property
    def layers(self) -> dict[str, CodingLayer]:
        """The layers that code, by their name in the model."""
        return {name: self.module.get_submodule(name) for name in self._names}  # type: ignore[misc]

    @property
    def coders(self) -> dict[str, Coder]:
        """What each of them codes by."""
        return {name: layer.coding for name, layer in self.layers.items()}

    def coding_parameters(self) -> Iterator[nn.Parameter]:
        """Centers and projections: what wrapping has added."""
        for coder in self.coders.values():
            yield from coder.parameters()

    @property
    def traces(self) -> tuple[CodingTrace, ...]:
        """What each call of a layer was coded as in the last forward pass, without the graph."""
        return tuple(self._traces(is_attached=False))

    def forward_with_trace(
        self, *arguments: Any, attached: bool = False, **keywords: Any
    ) -> tuple[Any, tuple[CodingTrace, ...]]:
        """What the model returns, and the traces, which the model itself no longer holds.

        Args:
            arguments: of the model.
            keywords: likewise.
            attached: whether the traces keep their graph.
        Raises:
            RuntimeError: coding is disabled or bypassed.
        """
        if not self._recording.is_coding:
            raise RuntimeError("coding is disabled or bypassed; call enable_coding() first")
        output = self(*arguments, **keywords)
        traces = tuple(self._traces(is_attached=attached))
        self.release()
        return output, traces

    def release(self) -> None:
        """Lets go of what was noted in the last forward pass."""
        self._recording.calls = []

    def coding_loss(
        self, assign_weight: float = 1.0, commit_weight: float = 0.25, balance_weight: float = 0.1
    ) -> Tensor:
        """The loss of the last forward pass that trains codes and projections; see `losses`.

        Its graph is the loss's alone afterwards. Backward comes before the optimizer's step: the
        gradient of a projection reads the layer's weight as it was.

        Raises:
            RuntimeError: no layer has coded anything.
            ValueError: a weight is out of bounds.
        """
        coders = self.coders
        rows = [CodedRows(call, coders[call.layer].codebook.centers) for call in self._calls()]
        loss = coding_loss(rows, assign_weight, commit_weight, balance_weight)
        self._recording.calls = [call.detached() for call in self._recording.calls]
        return loss

    def layer_surprise(self) -> dict[str, Tensor]:
        """(N,) the mean S of each sample over positions, by layer, of the last forward pass.

        A layer's second call is "name#2".

        Raises:
            RuntimeError: no layer has coded anything.
        """
        self._calls()
        return {t.meta.key: self._by_sample(t.soft_code.surprise) for t in self.traces}

    def surprise(self) -> Surprise:
        """The verdict on each sample of the last forward pass.

        Raises:
            RuntimeError: no layer has coded anything, or `calibrate` has not been called.
        """
        self._calls()
        if self._verdicts is None:
            raise RuntimeError("the model is not calibrated; call calibrate(loader) first")
        components = {
            trace.meta.key: LayerComponents(
                *map(
                    self._by_sample,
                    (trace.soft_code.distance, trace.soft_code.length, trace.soft_code.entropy),
                )
            )
            for trace in self.traces
        }
        return self._verdicts.on(self.layer_surprise(), components)

    def calibrate(
        self,
        loader: Iterable[Any],
        aggregation: Aggregation = "mean",
        weights: Mapping[str, float] | None = None,
        quantile: float = 0.95,
        seed: int = 0,
    ) -> WrappedModel:
        """Learns how surprised each layer is by in-distribution data, which no code was trained on.

        Of a random half each layer's mean and standard deviation are taken; the scores of the other
        half, the layers' (S - mean) / deviation aggregated, are what scores are ranked among.

        Args:
            loader: yields inputs, (inputs, ...), or mappings with "inputs" or "input_ids"; it is
                run in eval mode.
            aggregation: over layers, "mean", "max" or "weighted".
            weights: by layer, with "weighted".
            quantile: of in-distribution scores, above which `is_ood` is true.
            seed: of the split.
        Returns:
            The wrapped model.
        Raises:
            TypeError, ValueError: naming the argument or what of the data is not accepted.
        """
        reading = Reading(aggregation, weights)
        batches: dict[str, list[Tensor]] = {}
        for _ in run_over(self, loader):
            for name, surprise in self.layer_surprise().items():
                batches.setdefault(name, []).append(surprise)
        self.release()
        if not batches:
            raise ValueError("loader is empty; accepted: one that yields batches")
        per_layer = {name: torch.cat(parts) for name, parts in batches.items()}
        self._verdicts = Verdicts.of(per_layer, reading, quantile, seed)
        return self

    def initialise_codes(
        self, loader: Iterable[Any], rows: int = 4096, seed: int = 0
    ) -> WrappedModel:
        """Puts every codebook on k-means of its layer's features as they are now.

        Projections and centers are scaled until the mean d2 of a layer is D T / 2, as of a mixture
        of round Gaussians: a temperature then means the same in every layer. Codes that start
        elsewhere than features of another scale may all but one lose their rows. In a distributed
        run each rank must see the same batches.

        Args:
            loader: as for `calibrate`.
            rows: how many rows of each batch are kept for each layer, drawn at random.
            seed: of all that is drawn.
        Returns:
            The wrapped model.
        Raises:
            ImportError: scikit-learn is missing; install foreshock[surprise].
            ValueError: fewer rows than codes, or such as are not finite.
        """
        kept: dict[str, list[Tensor]] = {name: [] for name in self._names}
        random = torch.Generator().manual_seed(seed)
        for _ in run_over(self, loader):
            for call in self._calls():
                flat = call.reduced.flatten(0, -2).cpu()
                kept[call.layer].append(flat[torch.randperm(len(flat), generator=random)[:rows]])
        self.release()
        for name, coder in self.coders.items():
            if not kept[name]:
                raise ValueError(f"layer {name!r} never ran on the loader; accepted: one that runs")
            coder.start_at_means(torch.cat(kept[name]), seed)
        return self

    def set_temperature(self, temperature: float) -> None:
        """Sets the softmax temperature of every layer.

        Raises:
            ValueError: it is not a finite number above 0.
        """
        check_temperature(temperature)
        for coder in self.coders.values():
            coder.temperature = temperature

    def enable_coding(self) -> None:
        """Lets layers code again."""
        self._recording.is_enabled = True

    def disable_coding(self) -> None:
        """The model runs as if it had not been wrapped, until `enable_coding`."""
        self._recording.is_enabled = False
        self.release()

    @contextlib.contextmanager
    def bypass(self) -> Iterator[None]:
        """No layer codes inside; can be nested."""
        self._recording.bypasses += 1
        try:
            yield
        finally:
            self._recording.bypasses -= 1

    def unwrap(self) -> nn.Module:
        """The model as it was, without codes; this wrapper is of no use afterwards."""
        for layer in self.layers.values():
            stop_coding(layer)
        _pass_layers_by_again(self.module, self._nested)
        self._names = ()
        self.release()
        return self.module

    def get_extra_state(self) -> Tensor:
        """The calibration, as JSON in uint8."""
        saved = None if self._verdicts is None else self._verdicts.to_json_object()
        return torch.frombuffer(bytearray(json.dumps(saved).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Takes over what `get_extra_state` of another has given."""
        saved = json.loads(bytes(state.tolist()))
        self._verdicts = None if saved is None else Verdicts.from_json_object(saved)

    def _calls(self) -> list[Any]:
        if not self._recording.calls:
            raise RuntimeError(
                "no layer has coded anything since the last forward pass began; call the wrapped "
                "model, with coding enabled, first"
            )
        return self._recording.calls

    def _traces(self, is_attached: bool) -> list[CodingTrace]:
        if is_attached:
            return self._recording.traces()
        detached = Recording()
        detached.calls = [call.detached() for call in self._recording.calls]
        return detached.traces()

    def _by_sample(self, numbers: Tensor) -> Tensor:
        samples_first = numbers.movedim(self._batch_dim, 0) if numbers.dim() > 1 else numbers
        return mean_surprise({"": samples_first})

    def _tied(self, output: Any) -> Any:
        """The output, from which DistributedDataParallel can tell that codes are in use.

        It looks for parameters in the graph of what forward returns, and would take those for
        unused that only the coding loss reaches.
        """
        is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not (is_distributed and torch.is_grad_enabled() and self._recording.is_coding):
            return output
        leaves, form = pytree.tree_flatten(output)
        ours = [p for p in self.coding_parameters() if p.requires_grad]
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.requires_grad and ours:
                leaves[i] = _Tie.apply(leaf, *ours)  # type: ignore[no-untyped-call]
                return pytree.tree_unflatten(leaves, form)
        return output


class _Tie(torch.autograd.Function):
    """The first tensor as it is; the others are in its graph and get nothing from it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *others: Tensor) -> Tensor:
        ctx.others = len(others)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], *(None,) * ctx.others


def _pass_no_layer_by(model: nn.Module) -> dict[str, bool]:
    """In eval mode PyTorch's encoder reads the weights of its layers and runs none of them.

    It does run them where a hook is registered, and cannot take nested tensors then: returns by
    name which encoders did.
    """
    nested = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _has_coding(module):
            module.register_forward_pre_hook(_do_nothing)
        elif isinstance(module, nn.TransformerEncoder) and _has_coding(module):
            nested[name] = module.use_nested_tensor
            module.use_nested_tensor = False
    return nested


def _pass_layers_by_again(model: nn.Module, nested: dict[str, bool]) -> None:
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            hooks = module._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if hook is _do_nothing]:
                del hooks[key]
    for name, was_used in nested.items():
        setattr(model.get_submodule(name), "use_nested_tensor", was_used)  # noqa: B010


def _do_nothing(*_: Any) -> None:
    """Its being there is what it is for."""


def _has_coding(module: nn.Module) -> bool:
    return any(isinstance(m, CodingLinear | CodingConv2d) for m in module.modules())
