"""What the logits of training look like, of the model and of its attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from foreshock.host_read import Later
from foreshock.signals import LogitDrift, logit_histogram, logit_statistics

RecordRow = Callable[..., None]
"""`SeriesRecorder.record`, or something like it."""

_STATISTICS = ("mean", "std", "max", "min", "nonfinite")


class LogitWatch:
    """Looks now and then at the logits that are offered to it.

    Args:
        interval: judged steps between looks; the first step is looked at. One that is due without
            logits waits for the next that are offered.
        record: told of each look, as the series "logits".
    Cost:
        In a step that is looked at, that of `logit_statistics` and `logit_histogram`; they are read
        at the next step, so as not to wait for a device. In others nothing.
    """

    def __init__(self, interval: int, record: RecordRow) -> None:
        self._interval = interval
        self._record = record
        self._drift = LogitDrift()
        self._wait = 0
        self._found: tuple[int, Later] | None = None
        self._told: dict[str, float | int | None] = {}
        self._offered: torch.Tensor | None = None

    def offer(self, logits: torch.Tensor | None) -> None:
        """Those of the step that is judged next, if it has given any.

        Raises:
            TypeError: they are something else.
        """
        is_right = logits is None or isinstance(logits, torch.Tensor)
        if not is_right:
            kind = type(logits).__name__
            raise TypeError(f"logits is a {kind}; accepted: a tensor or None")
        self._offered = logits

    def note_step(self, step: int) -> None:
        """A step was judged."""
        self._take_in()
        if self._wait <= 0 and self._offered is not None:
            numbers = torch.stack([*logit_statistics(self._offered)])
            histogram = logit_histogram(self._offered)
            self._found = step, Later(torch.cat([numbers, histogram.double()]))
            self._wait = self._interval
        self._wait -= 1

    def _take_in(self) -> None:
        """Reads the last look, by now without waiting for a device."""
        found, self._found = self._found, None
        if found is None:
            return
        step, later = found
        numbers = later.get()
        num = len(_STATISTICS)
        seen: dict[str, float | None] = dict(
            zip(_STATISTICS, numbers[:num].tolist(), strict=True),
        )
        seen["drift"] = self._drift.update(numbers[num:])
        self._told = {"logit_step": step, **{f"logit_{k}": v for k, v in seen.items()}}
        self._record("logits", step, **{k: v for k, v in seen.items() if v is not None})

    def telemetry(self) -> dict[str, float | int | None]:
        """The last look that has been read; `logit_step` says when that was."""
        return dict(self._told)

    def close(self) -> None:
        """Reads the last look, and stops."""
        self._offered = None
        self._take_in()

    def state_dict(self) -> dict[str, Any]:
        """What later looks depend on; what was seen last is taken in first."""
        self._take_in()
        return {"drift": self._drift.state_dict(), "wait": self._wait}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from a saved state; what was seen since is forgotten."""
        self._drift.load_state_dict(state_dict["drift"])
        self._wait = state_dict["wait"]
        self._found = None


class AttentionWatch:
    """Looks now and then at the largest attention logit of each layer.

    Args:
        interval: as for `LogitWatch`.
        record: told of each look, as the series "attention".
    Cost:
        In a step that is looked at, one read of what is offered; in others nothing.
    """

    def __init__(self, interval: int, record: RecordRow) -> None:
        self._interval = interval
        self._record = record
        self._wait = 0
        self._found: tuple[int, list[str], Later] | None = None
        self._told: dict[str, float | int | str] = {}
        self._offered: Mapping[str, torch.Tensor] = {}

    def offer(self, logits: torch.Tensor | Mapping[str, torch.Tensor] | None) -> None:
        """Those of the step that is judged next, or the largest of them; by layer, if of several.

        Raises:
            TypeError: they are something else.
        """
        of_layers = {"attention": logits} if isinstance(logits, torch.Tensor) else logits
        if of_layers is None:
            of_layers = {}
        is_mapping = isinstance(of_layers, Mapping)
        if not is_mapping or not all(isinstance(t, torch.Tensor) for t in of_layers.values()):
            raise TypeError(
                f"attention_logits is a {type(logits).__name__}; accepted: a tensor, a mapping "
                "from layers to tensors, or None"
            )
        self._offered = of_layers

    def note_step(self, step: int) -> None:
        """A step was judged."""
        self._take_in()
        if self._wait <= 0 and self._offered:
            largest = [logits.detach().amax().float() for logits in self._offered.values()]
            on_one = torch.stack([one.to(largest[0].device) for one in largest])
            self._found = step, [*self._offered], Later(on_one)
            self._wait = self._interval
        self._wait -= 1

    def _take_in(self) -> None:
        found, self._found = self._found, None
        if found is None:
            return
        step, layers, later = found
        largest = dict(zip(layers, later.get().tolist(), strict=True))
        worst = max(largest, key=lambda layer: _nan_first(largest[layer]))
        self._told = {
            "attention_step": step,
            "attention_logit_max": largest[worst],
            "attention_logit_max_layer": worst,
        }
        self._record("attention", step, logit_max=largest)

    def telemetry(self) -> dict[str, float | int | str]:
        """The last look that has been read; `attention_step` says when that was."""
        return dict(self._told)

    def close(self) -> None:
        """Reads the last look, and stops."""
        self._offered = {}
        self._take_in()


def _nan_first(number: float) -> tuple[bool, float]:
    """For the largest of some numbers to be NaN if one is."""
    return number != number, number
