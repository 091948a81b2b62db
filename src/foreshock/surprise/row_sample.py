"""What codes are fitted to: a bounded number of rows of each layer, out of any number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from foreshock.surprise.listener import Listening
from foreshock.surprise.model_input import Batch
from foreshock.surprise.outputs import rows_of


class RowSample:
    """At most `most` of all the rows added; every row has the same chance to be among them.

    Args:
        most: rows kept; up to twice as many are held.
        seed: of which are kept.
    """

    def __init__(self, most: int, seed: int) -> None:
        self._most = most
        self._random = np.random.default_rng(seed)
        self._rows: list[NDArray[np.float32]] = []
        self._ranks: list[NDArray[np.float64]] = []
        self._held = 0

    def add(self, rows: NDArray[np.float32]) -> None:
        """Takes in rows (n, D)."""
        self._rows.append(rows)
        self._ranks.append(self._random.random(len(rows)))
        self._held += len(rows)
        if self._held > 2 * self._most:
            self._rows = [self.rows()]

    def rows(self) -> NDArray[np.float32]:
        """(R, D): those that are kept."""
        rows, ranks = np.concatenate(self._rows), np.concatenate(self._ranks)
        if len(rows) > self._most:
            kept = np.sort(np.argpartition(ranks, self._most)[: self._most])
            rows, ranks = rows[kept], ranks[kept]
        self._rows, self._ranks, self._held = [rows], [ranks], len(rows)
        return rows


class LayerRows:
    """Rows of the outputs of layers, call by call.

    Args:
        model: in evaluation mode.
        modules: its layers that are listened to, by name.
        batch_dim: where the samples are.
        most: rows kept of each call of a layer.
        seed: of which are kept.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        batch_dim: int,
        most: int,
        seed: int,
    ) -> None:
        self._model = model
        self._modules = modules
        self._batch_dim = batch_dim
        self._most = most
        self._seed = seed
        self._calls: Counter[str] = Counter()
        self.samples: dict[tuple[str, int], RowSample] = {}
        """By layer, and number of the call in a forward."""
        self.devices: dict[str, torch.device] = {}
        """Where the layers' outputs are."""

    def run(self, batch: Batch) -> None:
        """Runs the model on a batch and takes in what its layers give.

        Raises:
            TypeError, ValueError: naming a layer that gives something else than rows of finite
                numbers for each sample, or is called now more often and now less.
        """
        calls: Counter[str] = Counter()

        def hear(layer: str, module: nn.Module, _inputs: object, output: object) -> None:
            rows, mask = rows_of(layer, module, output, self._batch_dim, batch.mask)
            self._check_samples(layer, rows, batch)
            self._add((layer, calls[layer]), rows.detach().float(), mask)
            calls[layer] += 1

        with Listening(self._model, self._modules, hear, lambda: None):
            batch.run(self._model)
        for layer in self._modules:
            before = self._calls.setdefault(layer, calls[layer])
            if calls[layer] != before or not before:
                raise ValueError(
                    f"layer {layer!r} was called {calls[layer]} times in a forward, and {before} "
                    "times in the one before; accepted: the same number from 1 up"
                )

    @property
    def names(self) -> dict[tuple[str, int], str]:
        """What each call of each layer, in the order of the model, is called."""
        return {
            (layer, call): layer if self._calls[layer] == 1 else f"{layer}[{call}]"
            for layer in self._modules
            for call in range(self._calls[layer])
        }

    def _add(self, key: tuple[str, int], rows: Tensor, mask: Tensor | None) -> None:
        self.devices[key[0]] = rows.device
        rows = rows.flatten(0, -2) if mask is None else rows[mask]
        strange = int((~rows.isfinite().all(1)).sum())
        if strange:
            raise ValueError(
                f"layer {key[0]!r} gives {strange} rows of {len(rows)} that are not finite for "
                "in-distribution data; accepted: finite outputs"
            )
        sample = self.samples.setdefault(key, RowSample(self._most, self._seed))
        sample.add(rows.cpu().numpy())

    def _check_samples(self, layer: str, rows: Tensor, batch: Batch) -> None:
        if len(rows) != len(batch):
            raise ValueError(
                f"layer {layer!r} gives {len(rows)} rows for {len(batch)} samples (batch_dim is "
                f"{self._batch_dim}); accepted: layers that keep samples apart"
            )
