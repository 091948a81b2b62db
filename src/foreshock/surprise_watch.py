"""How unlike what a probe was fitted to the batches of training are."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from foreshock.host_read import Later
from foreshock.ops import RollingZScore
from foreshock.surprise import SurpriseProbe

_WINDOW, _MIN_COUNT = 64, 8


class SurpriseWatch:
    """Has a probe listen to the forwards of a step now and then.

    From the end of one step to the verdict on the next: an evaluation in between counts too.

    Args:
        probe: of the model that is trained.
        interval: judged steps between looks; the first step is looked at.
    Cost:
        In a step that is looked at, that of `SurpriseProbe.watch`; in others no hook is left.
    """

    def __init__(self, probe: SurpriseProbe, interval: int) -> None:
        self._probe = probe
        self._interval = interval
        self._zscore = RollingZScore(1, _WINDOW, min_count=_MIN_COUNT)
        self._judged = 0
        self._listening = contextlib.ExitStack()
        self._seen: Any = None
        self._found: tuple[int, Later] | None = None
        self._told: dict[str, float | int | None] = {}
        self._listen_if_due()

    def note_step(self, step: int) -> None:
        """A step was judged."""
        self._take_in()
        self._look(step)
        self._judged += 1
        self._listen_if_due()

    def _listen_if_due(self) -> None:
        if self._judged % self._interval == 0 and self._seen is None:
            self._seen = self._listening.enter_context(self._probe.watch())

    def _look(self, step: int) -> None:
        seen, self._seen = self._seen, None
        if seen is None:
            return
        self._listening.close()
        if seen.is_empty:  # a compiled model is not heard
            return
        score = seen.surprise().score.float()
        self._found = step, Later(torch.stack([score.mean(), score.quantile(0.95)]))

    def _take_in(self) -> None:
        """Reads the last look, by now without waiting for a device."""
        found, self._found = self._found, None
        if found is None:
            return
        step, numbers = found
        mean, p95 = numbers.get().tolist()
        z = self._zscore.push_float(mean)
        self._told = {
            "surprise_step": step,
            "surprise_mean": mean,
            "surprise_p95": p95,
            "surprise_z": z,
        }

    def telemetry(self) -> dict[str, float | int | None]:
        """The last look that has been read; `surprise_step` says when that was."""
        return dict(self._told)

    def close(self) -> None:
        """Stops listening."""
        self._seen = None
        self._listening.close()

    def state_dict(self) -> dict[str, Any]:
        """What later scores depend on; what was seen last is taken in first."""
        self._take_in()
        return {"zscore": self._zscore.state_dict(), "judged": self._judged}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from a saved state; what was seen since is forgotten."""
        self._zscore.load_state_dict(state_dict["zscore"])
        self._judged = state_dict["judged"]
        self._found = None
        self.close()
        self._listen_if_due()
