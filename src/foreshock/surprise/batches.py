"""What of a loader's batch goes into a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def model_inputs(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments and keywords of the model's forward.

    Args:
        batch: inputs, (inputs, ...) of which the rest is left out, or a mapping with "inputs", or
            with "input_ids" and perhaps "attention_mask", which go in by name.
    Raises:
        TypeError, ValueError: it is none of these.
    """
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        if "inputs" in batch:
            return (batch["inputs"],), {}
        if "input_ids" in batch:
            return (), {k: batch[k] for k in ("input_ids", "attention_mask") if k in batch}
        raise ValueError(
            f"a batch of the loader has the keys {sorted(map(str, batch))}; accepted: 'inputs' or "
            "'input_ids'"
        )
    if isinstance(batch, Sequence) and len(batch) and isinstance(batch[0], Tensor):
        return (batch[0],), {}
    raise TypeError(
        f"a batch of the loader is a {type(batch).__name__}; accepted: a tensor, a sequence that "
        "starts with one, or a mapping with 'inputs' or 'input_ids'"
    )


def run_over(model: nn.Module, loader: Iterable[Any]) -> Iterator[Any]:
    """Runs the model on every batch, in eval mode and without a graph, and yields what it returns.

    Every module gets its own mode back at the end, also after an error.
    """
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for batch in loader:
            arguments, keywords = model_inputs(batch)
            with torch.no_grad():
                output = model(
                    *(a.to(place) for a in arguments),
                    **{name: value.to(place) for name, value in keywords.items()},
                )
            yield output
    finally:
        for module, mode in modes:
            module.training = mode
