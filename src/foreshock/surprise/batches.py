"""Runs a model over all that a loader yields."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from foreshock.surprise.model_input import Batch, read_batches
from foreshock.surprise.outputs import in_evaluation_mode


def run_over(model: nn.Module, loader: Iterable[Any]) -> Iterator[Batch]:
    """Runs the model on every batch, in eval mode and without a graph, and yields the batch.

    Every module gets its own mode back at the end, also after an error.

    Raises:
        TypeError, ValueError: as `read_batches`.
    """
    with in_evaluation_mode(model):
        for batch in read_batches(loader, 0, None):
            with torch.no_grad():
                batch.run(model)
            yield batch
