"""The outputs of layers as rows of features, and one number from those of their positions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn

Reduction: TypeAlias = "Literal['mean', 'max'] | int"

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@contextlib.contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts the model into evaluation mode, and every module back as it was, also after an error."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The same without gradients."""
    with in_evaluation_mode(model), torch.no_grad():
        yield


def are_rows(output: object, module: nn.Module, has_positions: bool) -> TypeGuard[Tensor]:
    """Whether an output is (N, D), or with positions (N, P, D), as it lies: `rows_of` in short."""
    if type(output) is not Tensor or isinstance(module, _CONVOLUTIONS) or output.is_nested:
        return False
    dims = output.dim()
    return dims == 2 or (dims == 3 and has_positions)


def rows_of(
    name: str, module: nn.Module, output: Any, batch_dim: int, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A layer's output by samples: (N, D), or (N, P, D) of a layer with positions.

    That of a convolution is averaged over all positions, in float32. Others are as they lie, in
    their own type and with their graph.

    Args:
        name: the layer's, for messages.
        module: the layer.
        output: of its forward; also a nested tensor, of samples with positions.
        batch_dim: where the samples are, if the output has more than two dimensions.
        mask: (N, T) bool, which positions count, for layers that have T.
    Returns:
        The rows, and (N, P) bool: which positions count; None if all do, or there are none.
    Raises:
        TypeError, ValueError: naming the layer, what it gave and what is accepted.
    """
    if not isinstance(output, Tensor) or not output.is_floating_point():
        given = output.dtype if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(f"layer {name!r} gives {given}; accepted: a floating-point tensor")
    if output.dtype.itemsize == 1:
        output = output.float()
    if output.is_nested:
        return _padded(output.detach(), mask)
    least = len(module.kernel_size) + 2 if isinstance(module, _CONVOLUTIONS) else 2
    if output.dim() < least:
        raise ValueError(
            f"layer {name!r} gives shape {tuple(output.shape)}; accepted: at least {least} "
            "dimensions, of which one counts the samples"
        )
    if isinstance(module, _CONVOLUTIONS):
        return output.detach().flatten(2).mean(2, dtype=torch.float32), None
    if output.dim() == 2:
        return output, None
    rows = output
    if batch_dim != 0 or rows.dim() > 3:
        rows = rows.movedim(batch_dim, 0).flatten(1, -2)
    if mask is None:
        return rows, None
    if mask.shape != rows.shape[:2]:
        raise ValueError(
            f"layer {name!r} gives {rows.shape[1]} positions for {len(rows)} samples, and mask has "
            f"shape {tuple(mask.shape)}; accepted: the same of both"
        )
    return rows, mask.to(rows.device)


def _padded(nested: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(N, P, D) and (N, P): as nn.TransformerEncoder nests what its padding mask leaves."""
    lengths = torch.tensor([len(sample) for sample in nested.unbind()], device=nested.device)
    rows = nested.to_padded_tensor(0.0)
    is_there = torch.arange(rows.shape[1], device=rows.device) < lengths[:, None]
    if mask is None:
        return rows, is_there
    return rows, is_there & mask[:, : rows.shape[1]].to(rows.device)


def check_reduction(reduction: Any) -> None:
    """Refuses what `over_positions` does not know.

    Raises:
        ValueError: naming what was given and what is accepted.
    """
    is_count = isinstance(reduction, int) and not isinstance(reduction, bool) and reduction > 0
    if not is_count and reduction not in ("mean", "max"):
        raise ValueError(
            f"reduce_positions is {reduction!r}; accepted: 'mean', 'max' or a number k from 1 up, "
            "for the mean of the k largest"
        )


def over_positions(values: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
    """(..., N) of values (..., N, P): their mean, their largest, or the mean of the k largest.

    Args:
        values: one for each position.
        mask: (N, P) bool, which of them count; what does not may be anything.
        reduction: "mean", "max" or k.
    Returns:
        NaN for a sample with a NaN among what counts, or with nothing that counts.
    """
    # In double precision the order, which padding and batch may change, is not seen.
    if mask is None and reduction == "mean":
        return values.mean(-1, dtype=torch.float64).to(values.dtype)
    if mask is None:
        mask = torch.ones(values.shape[-2:], dtype=torch.bool, device=values.device)
    count = mask.sum(1)
    if reduction == "mean":
        total = values.double().where(mask, 0.0).sum(-1)
        return (total / count).to(values.dtype)
    k = 1 if reduction == "max" else min(int(reduction), values.shape[-1])
    largest = values.where(mask, -torch.inf).topk(k, dim=-1).values.double()
    taken = count.clamp(max=k)
    is_taken = torch.arange(k, device=values.device) < taken[:, None]
    return (largest.where(is_taken, 0.0).sum(-1) / taken).to(values.dtype)
