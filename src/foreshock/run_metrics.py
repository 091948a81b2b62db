"""The history of a run's loss, learning rate and gradient norm, step by step."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import PositiveInt

from foreshock.guard import Seen
from foreshock.host_read import read
from foreshock.records import MetricsRecorder
from foreshock.settings import Settings


class TrainingSettings(Settings):
    """What of the training is recorded; see `foreshock.records.MetricsRecorder`."""

    save_metrics: bool = True
    """Whether its metrics are."""
    save_metrics_steps: PositiveInt = 10
    """Records after which they are saved."""


class RunMetrics:
    """Feeds a `MetricsRecorder`, and has it draw the picture in the end.

    Args:
        out_dir: directory of the run.
        model_name: for the picture.
        save_interval: records after which they are saved.
        group: of an optimizer's parameters, whose learning rate is recorded.
    Cost:
        Two microseconds a step, and every save_interval steps some ten for each of them. A learning
        rate on a device is read as often as records are saved, since that waits for the device.
    """

    def __init__(
        self,
        out_dir: str | os.PathLike[str],
        model_name: str,
        save_interval: int,
        group: Mapping[str, Any],
    ) -> None:
        self._recorder = MetricsRecorder(out_dir, model_name, save_interval)
        self._save_interval = save_interval
        self._group = group
        self._num_rows = 0
        self._epoch = 0
        self._last: Seen | None = None
        self._rate = math.nan
        self._waiting: dict[int, tuple[int, float]] = {}

    def note_step(self, step: int, epoch: int | None, rate_factor: float) -> None:
        """A step is about to be judged; what its numbers are may come a step later.

        Args:
            step: of the training.
            epoch: from 0; None: the last one, 0 before any.
            rate_factor: on the learning rate that the optimizer has been given.
        """
        rate = self._group.get("lr", math.nan)
        is_here = not isinstance(rate, torch.Tensor) or rate.device.type == "cpu"
        if is_here or self._num_rows % self._save_interval == 0:
            self._rate = float(read(rate)) if isinstance(rate, torch.Tensor) else float(rate)
        self._epoch = self._epoch if epoch is None else epoch
        self._waiting[step] = self._epoch, self._rate * rate_factor

    def note_seen(self, seen: Seen | None) -> None:
        """Records the step that was judged last, unless it has been already.

        Args:
            seen: of it; the gradient norm is that before clipping.
        """
        if seen is None or seen is self._last:
            return
        self._last = seen
        self._num_rows += 1
        epoch, rate = self._waiting.get(seen.step, (self._epoch, self._rate))
        self._waiting = {step: of for step, of in self._waiting.items() if step > seen.step}
        self._recorder.record(seen.step, epoch, seen.loss, rate, grad_norm=seen.finding.norm)

    def close(self) -> None:
        """Saves all, and draws the picture if there is something to be drawn."""
        if self._num_rows:
            self._recorder.plot()
        self._recorder.close()
