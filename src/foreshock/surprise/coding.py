"""Layers that code what they put out, and put out what they always did.

Shapes: N rows, O features of a layer's output, D of what is coded, K codes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, TypeAlias, TypeGuard, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreshock.ops import SoftAssigner, soft_assign
from foreshock.surprise.codebook import Codebook, Init
from foreshock.surprise.derived import Derived
from foreshock.surprise.traces import Call, Recording

Pooling = Literal["mean", "max", "positions"]


@dataclasses.dataclass(frozen=True)
class CodingSettings:
    """How a layer's output becomes codes; see `wrap`."""

    codes: int = 16
    coding_dim: int | None = None
    pooling: Pooling = "mean"
    temperature: float = 1.0
    beta_length: float = 1.0
    beta_entropy: float = 1.0
    beta_distance: float = 1.0
    init: Init = "normal"
    detach: bool = True

    def __post_init__(self) -> None:
        if self.coding_dim is not None and self.coding_dim < 1:
            raise ValueError(f"coding_dim is {self.coding_dim}; accepted: None, or from 1 up")
        if self.pooling not in get_args(Pooling):
            accepted = ", ".join(map(repr, get_args(Pooling)))
            raise ValueError(f"pooling is {self.pooling!r}; accepted: {accepted}")
        check_temperature(self.temperature)
        for name in ("beta_length", "beta_entropy", "beta_distance"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: a finite number")


def check_temperature(temperature: float) -> float:
    """The temperature, as a float.

    Raises:
        ValueError: it is not a finite number above 0.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; accepted: a finite number above 0")
    return float(temperature)


class Coder(nn.Module):
    """Codes a layer's output: pooling, a learned projection to D features, a codebook.

    r = P pool(y), or s pool(y) without a projection,
    S = beta_length L + beta_entropy H + beta_distance log(1 + d2),
    L, H and d2 of `soft_assign(r, centers, temperature)`.

    The temperature, the betas and s are plain numbers, kept in the state dict as one tensor.
    """

    projection: nn.Parameter | None

    def __init__(
        self,
        name: str,
        layer: nn.Linear | nn.Conv2d,
        settings: CodingSettings,
        recording: Recording,
        seed: int,
    ) -> None:
        super().__init__()
        self.name = name
        self.recording = recording
        self.is_detached = settings.detach
        self.temperature = settings.temperature
        self._scale = torch.ones((), dtype=torch.float64)  # of features without a projection
        self.beta_length = float(settings.beta_length)
        self.beta_entropy = float(settings.beta_entropy)
        self.beta_distance = float(settings.beta_distance)
        self.pooling = settings.pooling if isinstance(layer, nn.Conv2d) else "positions"
        self.is_channels_first = isinstance(layer, nn.Conv2d)
        width = layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
        self.projection = None
        if settings.coding_dim is not None:
            drawn = _orthogonal(settings.coding_dim, width, seed)
            self.projection = nn.Parameter(drawn.to(layer.weight.device, layer.weight.dtype))
        self.codebook = Codebook(
            settings.codes,
            settings.coding_dim or width,
            init=settings.init,
            seed=seed,
            device=layer.weight.device,
            dtype=layer.weight.dtype,
        )
        self._assigner = Derived(_bind)

    @property
    def temperature(self) -> float:
        """Of the softmax over codes, in squared distance."""
        return self._temperature.item()

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        # A tensor, or the compiler would start anew at each step of a schedule; no buffer, which
        # `.to(torch.bfloat16)` would round; and a new one, as traces hold the one that they had.
        self._temperature = torch.tensor(check_temperature(temperature), dtype=torch.float64)

    def listen(self, output: Tensor, layer_input: Tensor, layer: nn.Module) -> None:
        """Codes a layer's output and notes it, if the model that it belongs to is running."""
        if not self.recording.is_coding:
            return
        if self._is_coded_in_one(output, layer):
            coded = self._bound(self.projection)(output, return_mapped=True)
            assert coded.mapped is not None
            parts, reduced = coded[:4], coded.mapped
        else:
            reduced = self._reduced(output, layer_input, layer)
            parts = self._coded(reduced)
        if self.recording.is_open:
            betas = self.beta_length, self.beta_entropy, self.beta_distance
            shape = tuple(output.shape)
            call = Call(self.name, self._temperature, betas, shape, reduced, *parts)
            self.recording.calls.append(call)

    def _is_coded_in_one(self, output: Tensor, layer: nn.Module) -> bool:
        """Whether the output is best read once, for its projection and the codes of that."""
        return (
            self.projection is not None
            and not self.is_channels_first
            and self._is_bound_to_be(output)
            and not (
                self.is_detached
                and _is_plain_linear(layer)
                and _is_cheaper_from_input(output, layer.weight)
            )
        )

    def _is_bound_to_be(self, features: Tensor) -> bool:
        """Whether codes need no gradient, and are as exact with kernels bound to them."""
        centers, projection = self.codebook.centers, self.projection
        if torch.compiler.is_compiling() or torch.is_autocast_enabled(features.device.type):
            return False
        if torch.is_grad_enabled() and (
            centers.requires_grad
            or (projection is not None and projection.requires_grad)
            or (features.requires_grad and not self.is_detached)
        ):
            return False
        return features.dtype == centers.dtype and features.dtype.itemsize >= 4

    def _bound(self, *basis: Tensor | None) -> SoftAssigner:
        assigner = self._assigner.of(self._temperature, self.codebook.centers, *basis)
        assigner.refresh()  # what is written through `.data` leaves no trace
        return assigner

    def _reduced(self, output: Tensor, layer_input: Tensor, layer: nn.Module) -> Tensor:
        """(..., D), in memory of its own: an activation may be about to overwrite the output."""
        features = output.detach() if self.is_detached else output
        if self.is_channels_first and self.pooling == "mean":
            return self._projected(features.mean((-2, -1)))
        if self.is_channels_first and self.pooling == "max":
            # What amax may have to differentiate it keeps.
            kept = _copy(features) if features.requires_grad else features
            return self._projected(kept.amax((-2, -1)))
        if self.is_channels_first:
            features = features.movedim(-3, -1)
        if self.projection is None:
            return (features * self._scale).contiguous()
        is_kept = torch.is_grad_enabled() and self.projection.requires_grad
        if not (self.is_detached and _is_plain_linear(layer)):
            return self._projected(_copy(features) if is_kept else features)
        bias = None if layer.bias is None else layer.bias.detach()
        parts = features, self.projection, layer_input.detach(), layer.weight.detach(), bias
        if not is_kept:
            return _projected_linear(*parts)
        reduced: Tensor = _ProjectionOfLinear.apply(*parts)  # type: ignore[no-untyped-call]
        return reduced

    def _projected(self, features: Tensor) -> Tensor:
        if self.projection is None:
            return features * self._scale
        return F.linear(features, self.projection)

    def _coded(self, reduced: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The nearest code of each row, d2 to it, L and H."""
        centers = self.codebook.centers
        if self._is_bound_to_be(reduced):
            return self._bound()(reduced)[:4]
        if not torch.compiler.is_compiling():
            code = soft_assign(reduced, centers, temperature=self.temperature)
            return code.best_index, code.distance, code.length, code.entropy
        # The op takes a number: d2 / T = |x / sqrt(T) - c / sqrt(T)|^2.
        wide = torch.float64 if reduced.dtype == torch.float64 else torch.float32
        scale = self._temperature.rsqrt()
        code = soft_assign(reduced.to(wide) * scale, centers.to(wide) * scale)
        return code.best_index, code.distance * self._temperature, code.length, code.entropy

    @torch.no_grad()
    def start_at_means(self, reduced_ND: Tensor, seed: int) -> None:
        """Puts the codes on k-means of what was coded, and scales both until mean d2 = D T / 2.

        That is the mixture of round Gaussians to which softmax(-d2 / T) is the posterior.
        """
        self.codebook.move_to_means(reduced_ND, seed)
        centers = self.codebook.centers
        spread = soft_assign(reduced_ND.to(centers.device), centers).distance.mean().item()
        if spread == 0:
            return
        factor = math.sqrt(self.codebook.dim * self.temperature / (2 * spread))
        centers.mul_(factor)
        if self.projection is not None:
            self.projection.mul_(factor)
        else:
            self._scale = self._scale * factor

    def get_extra_state(self) -> Tensor:
        """float64 (5,): the temperature, the betas of length, entropy and distance, the scale."""
        betas = self.beta_length, self.beta_entropy, self.beta_distance
        numbers = self.temperature, *betas, self._scale.item()
        return torch.tensor(numbers, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Takes over what `get_extra_state` of another has given."""
        self.temperature, *betas, scale = state.tolist()
        self.beta_length, self.beta_entropy, self.beta_distance = betas
        self._scale = torch.tensor(scale, dtype=torch.float64)

    def extra_repr(self) -> str:
        """What print(module) shows."""
        return f"{self.name!r}, pooling={self.pooling!r}, temperature={self.temperature:g}"


def _bind(temperature: Tensor, centers: Tensor, *projection: Tensor) -> SoftAssigner:
    basis = projection[0].T if projection else None
    return SoftAssigner(centers, temperature=temperature.item(), basis=basis)


def _projected_linear(
    y: Tensor, projection: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """y P^T of y = a W^T + b, from whichever side is cheaper."""
    if _is_cheaper_from_input(y, weight):
        offset = None if bias is None else projection @ bias
        return F.linear(a, projection @ weight, offset)
    return F.linear(y, projection)


class _ProjectionOfLinear(torch.autograd.Function):
    """The same, differentiable in P alone, without keeping y.

    dP = g^T y = (g^T a) W^T + (sum g) b^T: a and W are what the layer has saved for itself.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, projection: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(a, weight, bias)
        ctx.dtype = projection.dtype
        return _projected_linear(y, projection, a, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, weight, bias = ctx.saved_tensors
        g_ND = grads[0].reshape(-1, grads[0].shape[-1]).to(weight.dtype)
        a_NI = a.reshape(-1, a.shape[-1]).to(weight.dtype)
        with torch.autocast(weight.device.type, enabled=False):
            grad_DO = (g_ND.T @ a_NI) @ weight.T
            if bias is not None:
                grad_DO.addr_(g_ND.sum(0), bias)
        return None, grad_DO.to(ctx.dtype), None, None, None


def _is_cheaper_from_input(y: Tensor, weight: Tensor) -> bool:
    """Whether a (P W)^T takes fewer multiply-adds than y P^T, and no more rounding."""
    if torch.compiler.is_compiling() or y.dtype != weight.dtype or y.dtype.itemsize < 4:
        return False
    (outputs, inputs), rows = weight.shape, y.numel() // max(1, weight.shape[0])
    return inputs * (rows + outputs) < outputs * rows


def _is_plain_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the layer is a product with its own weight and nothing else."""
    return plain_class(layer).forward is nn.Linear.forward and "weight" in layer._parameters


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _orthogonal(rows: int, columns: int, seed: int) -> Tensor:
    """Rows, or if there are more of them columns, of length 1 at right angles to each other."""
    drawn = torch.empty(rows, columns)
    return nn.init.orthogonal_(drawn, generator=torch.Generator().manual_seed(seed))


class _Coding:
    """What a coding layer has over the class that it is mixed into."""

    coding: Coder

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's own output."""
        output = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        self.coding.listen(output, x, self)  # type: ignore[arg-type]
        return output


class CodingLinear(_Coding, nn.Linear):  # type: ignore[misc]
    """An nn.Linear that codes its output (..., O), each position by itself.

    A layer becomes one in place by `wrap`, and stays what it was: the same object with the same
    weight, bias, hooks and name in the state dict, of a class derived from its own.
    """


class CodingConv2d(_Coding, nn.Conv2d):  # type: ignore[misc]
    """An nn.Conv2d that codes its output (N, O, H, W): its mean or maximum over H and W, or each
    position by itself. See `CodingLinear`."""


CodingLayer: TypeAlias = "CodingLinear | CodingConv2d"

_PLAIN_CLASSES: dict[type, type] = {CodingLinear: nn.Linear, CodingConv2d: nn.Conv2d}


def plain_class(layer: nn.Module) -> Any:
    """The class that a layer had before it was made to code."""
    return _PLAIN_CLASSES.get(type(layer), type(layer))


def _coding_class(plain: type) -> type:
    """The class derived from both; of a class like nn.Linear's children it is made here."""
    for coding, known in _PLAIN_CLASSES.items():
        if known is plain:
            return coding
    base = CodingLinear if issubclass(plain, nn.Linear) else CodingConv2d
    made = type(f"Coding{plain.__name__}", (base, plain), {"__module__": __name__})
    _PLAIN_CLASSES[made] = plain
    return made


def check_can_code(name: str, layer: nn.Module) -> None:
    """Raises ValueError if the layer codes already, or does not run its class's forward."""
    if isinstance(layer, _Coding):
        raise ValueError(f"layer {name!r} codes already; accepted: wrapping once")
    if "forward" in vars(layer):
        raise ValueError(
            f"layer {name!r} has its forward replaced on the object; accepted: a layer that runs "
            "its class's forward"
        )


def start_coding(layer: nn.Module, coder: Coder) -> CodingLayer:
    """Makes the layer code what it puts out."""
    layer.__class__ = _coding_class(type(layer))
    layer.coding = coder
    return layer  # type: ignore[return-value]


def stop_coding(layer: CodingLayer) -> None:
    """Makes the layer what it was."""
    plain = plain_class(layer)
    del layer.coding
    layer.__class__ = plain
