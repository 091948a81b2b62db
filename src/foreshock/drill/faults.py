"""What goes wrong: each fault changes one thing of a training in the middle of a step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from foreshock.drill.trainee import Trainee

Bit = Literal["exponent", "mantissa"]
_BITS: dict[Bit, int] = {"exponent": 30, "mantissa": 22}
"""The highest bit of each part of a float32: a factor of 2^128, and one of up to 1.5."""

SCALED_BY = 100.0
_LOGIT_GROWTH = 1.05
_TOO_SMALL_EPSILON = 1e-20
_UNDERESTIMATE = 1e-6
_TOO_LARGE_SCALE = 2.0**24


def _place(tensor: Tensor, on: Trainee) -> int:
    """One element, drawn from those that are not 0: a flipped bit of 0 is a tiny number."""
    nonzero = tensor.detach().reshape(-1).nonzero()
    drawn = torch.randint(max(len(nonzero), 1), (), generator=on.random)
    return int(nonzero[int(drawn)]) if len(nonzero) else 0


def _set(tensor: Tensor, on: Trainee, value: float) -> None:
    with torch.no_grad():
        tensor.view(-1)[_place(tensor, on)] = value


def flip(tensor: Tensor, place: int, bit: Bit) -> None:
    """Flips one bit of one element of a contiguous float32 tensor, in place."""
    with torch.no_grad():
        tensor.detach().view(-1).view(torch.int32)[place] ^= 1 << _BITS[bit]


def _struck(on: Trainee) -> Tensor:
    return on.parameter(on.subject.struck_parameter)


def _struck_gradient(on: Trainee) -> Tensor:
    gradient = _struck(on).grad
    assert gradient is not None
    return gradient


def nan_weight(on: Trainee, age: int) -> None:
    _set(_struck(on), on, math.nan)


def inf_weight(on: Trainee, age: int) -> None:
    _set(_struck(on), on, math.inf)


def nan_gradient(on: Trainee, age: int) -> None:
    _set(_struck_gradient(on), on, math.nan)


def inf_gradient(on: Trainee, age: int) -> None:
    _set(_struck_gradient(on), on, math.inf)


def _with(value: float, on: Trainee) -> None:
    """One element of the struck module's output becomes that value."""

    def alter(output: Tensor) -> Tensor:
        altered = output.clone()
        _set(altered, on, value)
        return altered

    on.alter_output(on.subject.struck_module, alter)


def nan_activation(on: Trainee, age: int) -> None:
    _with(math.nan, on)


def inf_activation(on: Trainee, age: int) -> None:
    _with(math.inf, on)


def _strike_input(on: Trainee, value: float) -> None:
    def alter(x: Tensor) -> Tensor:
        altered = x.clone()
        _set(altered, on, value)
        return altered

    on.alter_input(alter)


def nan_input(on: Trainee, age: int) -> None:
    _strike_input(on, math.nan)


def inf_input(on: Trainee, age: int) -> None:
    _strike_input(on, math.inf)


def exponent_weight(on: Trainee, age: int) -> None:
    flip(_struck(on), _place(_struck(on), on), "exponent")


def mantissa_weight(on: Trainee, age: int) -> None:
    flip(_struck(on), _place(_struck(on), on), "mantissa")


def exponent_gradient(on: Trainee, age: int) -> None:
    flip(_struck_gradient(on), _place(_struck_gradient(on), on), "exponent")


def mantissa_gradient(on: Trainee, age: int) -> None:
    flip(_struck_gradient(on), _place(_struck_gradient(on), on), "mantissa")


def _flip_moment(on: Trainee, moment: str, bit: Bit) -> None:
    tensor = on.moment(on.subject.struck_parameter, moment)
    flip(tensor, _place(tensor, on), bit)


def exponent_first_moment(on: Trainee, age: int) -> None:
    _flip_moment(on, "exp_avg", "exponent")


def exponent_second_moment(on: Trainee, age: int) -> None:
    _flip_moment(on, "exp_avg_sq", "exponent")


def mantissa_first_moment(on: Trainee, age: int) -> None:
    _flip_moment(on, "exp_avg", "mantissa")


def shuffled_labels(on: Trainee, age: int) -> None:
    x, y = on.batch
    order = torch.randperm(y.numel(), generator=on.random)
    on.batch = x, y.reshape(-1)[order].view(y.shape)


def constant_input(on: Trainee, age: int) -> None:
    x, y = on.batch
    on.batch = x.reshape(-1)[0].expand(x.shape).contiguous(), y


def scaled_input(on: Trainee, age: int) -> None:
    on.alter_input(lambda x: x * SCALED_BY)


def _multiply_rate(on: Trainee, factor: float) -> None:
    for group in on.optimizer.param_groups:  # the scheduler sets it anew after each update
        group["lr"] *= factor


def rate_x10(on: Trainee, age: int) -> None:
    _multiply_rate(on, 10.0)


def rate_x100(on: Trainee, age: int) -> None:
    _multiply_rate(on, 100.0)


def no_warmup(on: Trainee, age: int) -> None:
    for group in on.optimizer.param_groups:
        group["lr"] = group["initial_lr"]


def loss_scale_overflow(on: Trainee, age: int) -> None:
    assert on.scaler is not None
    on.scaler.update(new_scale=_TOO_LARGE_SCALE)


def epsilon_too_small(on: Trainee, age: int) -> None:
    for group in on.optimizer.param_groups:
        group["eps"] = _TOO_SMALL_EPSILON
    on.moment(on.subject.struck_parameter, "exp_avg_sq").mul_(_UNDERESTIMATE)


def growing_logits(on: Trainee, age: int) -> None:
    with torch.no_grad():
        for name in on.subject.attention_modules:
            qkv = on.parameter(f"{name}.qkv.weight")
            qkv[: 2 * qkv.shape[1]].mul_(_LOGIT_GROWTH)


def lost_moments(on: Trainee, age: int) -> None:
    for name, _ in on.model.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            on.moment(name, moment).zero_()


def corrupt_rank(on: Trainee, age: int) -> None:
    weight = on.replicas[1].model.get_parameter(on.subject.struck_parameter)
    flip(weight, _place(weight, on), "mantissa")
