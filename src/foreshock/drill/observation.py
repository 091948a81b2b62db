"""What is seen of one step of a drill, and what the rules judge by."""

from __future__ import annotations

import dataclasses

from foreshock.guard import Reason
from foreshock.signals import RiskLevel

STEPS_PER_S = 10.0
"""Of the drill's own clock: the same for every machine."""


@dataclasses.dataclass(frozen=True, slots=True)
class Observation:
    """One step, as it is before its update. M matrices, in the order of the model's parameters.

    The defaults are those of a step on which nothing is wrong, for series made by hand.
    """

    step: int
    loss: float = 1.0
    grad_norm: float = 1.0
    """L2 norm of all gradients before clipping; NaN or infinite if an element is."""
    reasons: tuple[Reason, ...] = ()
    """What the guard, in observe mode, finds wrong with the step."""
    offender: str | None = None
    """The tensor that the guard names."""
    module: str | None = None
    """The first module in the forward pass whose output is not finite; `input`: the batch."""
    kappa: tuple[float, ...] = ()
    sigma_max: tuple[float, ...] = ()
    stable_rank: tuple[float, ...] = ()
    level: RiskLevel = RiskLevel.STABLE
    """Of a `SpectralTracker` that sees every step."""
    sigma_growth: float | None = None
    stable_rank_fall: float | None = None
    muon_ratio: float = 0.0
    """The largest weight_decay * sigma_max of any matrix."""
    rms: float = 1.0
    """RMS_t over all parameters, of the gradients that the optimizer takes in."""
    rms_worst: float = 1.0
    """The largest RMS_t of any parameter."""
    max_attention_logit: float | None = None
    restarted_kappa: float = 1.0
    """kappa-tilde of the first matrix: 10 power iterations from a random vector at each step."""
    do_ranks_agree: bool = True

    @property
    def time_s(self) -> float:
        """On the drill's clock."""
        return self.step / STEPS_PER_S
