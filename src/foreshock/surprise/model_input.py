"""What a loader yields, as the model takes it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

MaskSource: TypeAlias = "str | int | Callable[[Any], Tensor] | None"

_ACCEPTED = (
    "accepted: a tensor, a sequence whose first element is what the model takes, or a mapping with "
    "'inputs' or 'input_ids'"
)
_HUGGING_FACE = ("input_ids", "attention_mask", "token_type_ids")


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """The inputs of some samples."""

    tensors: dict[str, Tensor]
    """What the model takes by name; under "inputs" alone, what it takes first."""
    mask: Tensor | None
    """(N, T) bool: which positions count."""
    batch_dim: int
    """Where the samples are in the inputs; attention masks have them first."""

    @property
    def inputs(self) -> Tensor:
        """What the samples are counted in."""
        return next(iter(self.tensors.values()))

    def __len__(self) -> int:
        return self.inputs.shape[self.batch_dim]

    def take(self, index: Tensor) -> Batch:
        """The batch of these samples alone."""
        tensors = {
            name: t.index_select(0 if name == "attention_mask" else self.batch_dim, index)
            for name, t in self.tensors.items()
        }
        mask = None if self.mask is None else self.mask.index_select(0, index)
        return Batch(tensors, mask, self.batch_dim)

    def run(self, model: nn.Module) -> None:
        """Runs the model on the batch, where the model is."""
        device = device_of(model)
        tensors = {name: t.to(device) for name, t in self.tensors.items()}
        if "inputs" in tensors:
            model(tensors["inputs"])
        else:
            model(**_known_to(model, tensors))


def read_batch(given: Any, batch_dim: int, mask: MaskSource = None) -> Batch:
    """A batch as a loader yields it.

    Args:
        given: inputs, (inputs, ...), or a mapping with "inputs", or with "input_ids" and perhaps
            "attention_mask" and "token_type_ids".
        batch_dim: where the samples are in the inputs.
        mask: a key of the mapping, a place in the sequence, or a function of what is given; None
            for the "attention_mask", if there is one.
    Raises:
        TypeError, ValueError: naming what was given and what is accepted.
    """
    tensors = _tensors_in(given)
    inputs = next(iter(tensors.values()))
    if not -inputs.dim() <= batch_dim < inputs.dim():
        raise ValueError(
            f"batch_dim is {batch_dim}, and the inputs have shape {tuple(inputs.shape)}; accepted: "
            "one of their dimensions"
        )
    found = _mask_in(given, mask)
    if found is None:
        return Batch(tensors, None, batch_dim)
    samples = inputs.shape[batch_dim]
    if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != samples:
        what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"mask is {what}; accepted: a tensor (N, T), for these {samples} samples")
    return Batch(tensors, found.bool(), batch_dim)


def read_batches(loader: Iterable[Any], batch_dim: int, mask: MaskSource) -> Iterator[Batch]:
    """The batches of a loader that hold samples.

    Raises:
        TypeError, ValueError: as `read_batch`.
    """
    if isinstance(loader, Tensor):  # of which the samples would be taken for batches
        raise TypeError("loader is a tensor; accepted: an iterable of batches, such as [tensor]")
    for given in loader:
        batch = read_batch(given, batch_dim, mask)
        if len(batch):
            yield batch


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first tensor lies; the host for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _tensors_in(given: Any) -> dict[str, Tensor]:
    if isinstance(given, Tensor):
        return {"inputs": given}
    if isinstance(given, Mapping):
        names = ("inputs",) if "inputs" in given else _HUGGING_FACE
        tensors = {name: given[name] for name in names if given.get(name) is not None}
        if names[0] in tensors and all(isinstance(t, Tensor) for t in tensors.values()):
            return tensors
        raise TypeError(f"the loader yields a mapping with {sorted(map(str, given))}; {_ACCEPTED}")
    if isinstance(given, Sequence) and not isinstance(given, str) and len(given):
        return _tensors_in(given[0])
    raise TypeError(f"the loader yields a {type(given).__name__}; {_ACCEPTED}")


def _mask_in(given: Any, source: MaskSource) -> Any:
    if source is None:
        inner = given[0] if isinstance(given, Sequence) else given
        return inner.get("attention_mask") if isinstance(inner, Mapping) else None
    if callable(source):
        return source(given)
    if not isinstance(source, str | int):
        raise TypeError(
            f"mask is a {type(source).__name__}; accepted: a key, a place, a function or None"
        )
    try:
        return given[source]
    except (LookupError, TypeError):
        raise ValueError(
            f"mask is {source!r}, which is nothing in the {type(given).__name__} that the loader "
            "yields; accepted: a key of a mapping, a place in a sequence, a function or None"
        ) from None


def _known_to(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those that the model's forward takes by name."""
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return tensors
    return {name: t for name, t in tensors.items() if name in parameters}
