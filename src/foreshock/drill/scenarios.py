"""The scenarios of the drill: what is done to a training, when and for how long."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from foreshock.drill import faults
from foreshock.drill.subjects import Subject, SubjectName

if TYPE_CHECKING:
    from foreshock.drill.trainee import Trainee

Variant = Literal["plain", "scaled", "replicated"]
"""scaled: gradients as float16 holds them, under a GradScaler. replicated: two simulated ranks."""
Group = Literal["non-finite", "flipped bit", "bad batch", "learning rate", "optimizer", "model"]
Struck = Literal["parameter", "gradient", "module", "input"]

WINDOW = 100
"""Steps after a fault in which an alarm counts as its detection."""
LASTING = WINDOW


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A fault, and how it is put into a training.

    `inject` is called in each of `duration` steps from the fault on, with the trainee and the
    number of steps since: before the forward pass, when the batch is there, or after the backward
    pass, before anybody looks at the gradients.
    """

    name: str
    group: Group
    what: str
    inject: Callable[[Trainee, int], None]
    when: Literal["before_forward", "after_backward"] = "before_forward"
    duration: int = 1
    is_from_start: bool = False
    """At step 0; otherwise at the step that the drill chooses."""
    struck: Struck | None = None
    """Of a non-finite fault: what is to be named."""
    variant: Variant = "plain"
    subjects: tuple[SubjectName, ...] = ("gpt", "mlp")
    is_harmless: bool = False
    """Handled by others: an alarm is a false one."""

    def culprits(self, subject: Subject) -> tuple[str, ...]:
        """What a rule that names culprits may rightly name; empty: the fault has no name.

        Of a bad weight also the module that owns it.
        """
        weight, module = subject.struck_parameter, subject.struck_parameter.rpartition(".")[0]
        names: dict[Struck, tuple[str, ...]] = {
            "parameter": (weight, module),
            "gradient": (weight,),
            "module": (subject.struck_module,),
            "input": (subject.input_module or "input",),
        }
        return () if self.struck is None else names[self.struck]


def _nonfinite(
    name: str, what: str, inject: Callable[[Trainee, int], None], struck: Struck
) -> Scenario:
    when: Literal["before_forward", "after_backward"] = (
        "after_backward" if struck == "gradient" else "before_forward"
    )
    return Scenario(name, "non-finite", what, inject, when, struck=struck)


_NONFINITE = [
    _nonfinite("nan-weight", "one weight becomes NaN", faults.nan_weight, "parameter"),
    _nonfinite("inf-weight", "one weight becomes Inf", faults.inf_weight, "parameter"),
    _nonfinite(
        "nan-gradient", "one element of a gradient becomes NaN", faults.nan_gradient, "gradient"
    ),
    _nonfinite(
        "inf-gradient", "one element of a gradient becomes Inf", faults.inf_gradient, "gradient"
    ),
    _nonfinite(
        "nan-activation",
        "one element of a module's output becomes NaN",
        faults.nan_activation,
        "module",
    ),
    _nonfinite(
        "inf-activation",
        "one element of a module's output becomes Inf",
        faults.inf_activation,
        "module",
    ),
    _nonfinite(
        "nan-input",
        "one element of a batch becomes NaN (of the GPT: of its embedding)",
        faults.nan_input,
        "input",
    ),
    _nonfinite(
        "inf-input",
        "one element of a batch becomes Inf (of the GPT: of its embedding)",
        faults.inf_input,
        "input",
    ),
]

_FLIPS = [
    Scenario(
        "exponent-weight",
        "flipped bit",
        "the highest exponent bit of one weight flips: x 2^128 or so",
        faults.exponent_weight,
    ),
    Scenario(
        "mantissa-weight",
        "flipped bit",
        "the highest mantissa bit of one weight flips",
        faults.mantissa_weight,
    ),
    Scenario(
        "exponent-gradient",
        "flipped bit",
        "the highest exponent bit of one element of a gradient flips",
        faults.exponent_gradient,
        "after_backward",
    ),
    Scenario(
        "mantissa-gradient",
        "flipped bit",
        "the highest mantissa bit of one element of a gradient flips",
        faults.mantissa_gradient,
        "after_backward",
    ),
    Scenario(
        "exponent-first-moment",
        "flipped bit",
        "the highest exponent bit of one element of Adam's first moment flips",
        faults.exponent_first_moment,
    ),
    Scenario(
        "exponent-second-moment",
        "flipped bit",
        "the highest exponent bit of one element of Adam's second moment flips",
        faults.exponent_second_moment,
    ),
    Scenario(
        "mantissa-first-moment",
        "flipped bit",
        "the highest mantissa bit of one element of Adam's first moment flips",
        faults.mantissa_first_moment,
    ),
]

_BATCHES = [
    Scenario(
        "shuffled-labels",
        "bad batch",
        "the labels of 5 batches are shuffled",
        faults.shuffled_labels,
        duration=5,
    ),
    Scenario(
        "constant-input",
        "bad batch",
        "5 batches consist of one token, or of one shade",
        faults.constant_input,
        duration=5,
    ),
    Scenario(
        "scaled-input",
        "bad batch",
        "the input of 5 batches is 100 times too large (of the GPT: its embedding)",
        faults.scaled_input,
        duration=5,
    ),
]

_RATES = [
    Scenario(
        "rate-x10",
        "learning rate",
        "the learning rate is 10 times too high from then on",
        faults.rate_x10,
        duration=LASTING,
    ),
    Scenario(
        "rate-x100",
        "learning rate",
        "the learning rate is 100 times too high from then on",
        faults.rate_x100,
        duration=LASTING,
    ),
    Scenario(
        "no-warmup",
        "learning rate",
        "the learning rate has no warm-up: 20 steps at full height",
        faults.no_warmup,
        duration=20,
        is_from_start=True,
    ),
]

_OTHERS = [
    Scenario(
        "epsilon-too-small",
        "optimizer",
        "Adam's second moment of one weight is 1e-6 of what it should be, as after a long time "
        "without a signal, and epsilon is 1e-20",
        faults.epsilon_too_small,
    ),
    Scenario(
        "lost-moments",
        "optimizer",
        "Adam's moments become 0 and its step counts stay, as after a bad resumption",
        faults.lost_moments,
    ),
    Scenario(
        "loss-scale-overflow",
        "optimizer",
        "the loss scale becomes 2^24, too large for float16; the scaler withholds and halves",
        faults.loss_scale_overflow,
        variant="scaled",
        is_harmless=True,
    ),
    Scenario(
        "growing-logits",
        "model",
        "the weights of queries and keys grow by 5 % a step from then on",
        faults.growing_logits,
        duration=LASTING,
        subjects=("gpt",),
    ),
    Scenario(
        "corrupt-rank",
        "model",
        "the highest mantissa bit of one weight flips on one of two simulated ranks",
        faults.corrupt_rank,
        variant="replicated",
    ),
]

SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario for scenario in [*_NONFINITE, *_FLIPS, *_BATCHES, *_RATES, *_OTHERS]
}
"""All of them, by name."""
