"""What goes wrong: each fault changes one thing of a training in the middle of a step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from foreshock.drill.rehearsal import Rehearsal

Bit = Literal["exponent", "mantissa"]
_BITS: dict[Bit, int] = {"exponent": 30, "mantissa": 22}
"""The highest bit of each part of a float32: a factor of 2^128, and one of up to 1.5."""

SCALED_BY = 100.0
_LOGIT_GROWTH = 1.05
_TOO_SMALL_EPSILON = 1e-20
_UNDERESTIMATE = 1e-6
_TOO_LARGE_SCALE = 2.0**24


def _place(tensor: Tensor, run: Rehearsal) -> int:
    """One element, drawn from those that are not 0: a flipped bit of 0 is a tiny number."""
    nonzero = tensor.detach().reshape(-1).nonzero()
    drawn = torch.randint(max(len(nonzero), 1), (), generator=run.random)
    return int(nonzero[int(drawn)]) if len(nonzero) else 0


def _set(tensor: Tensor, run: Rehearsal, value: float) -> None:
    with torch.no_grad():
        tensor.view(-1)[_place(tensor, run)] = value


def flip(tensor: Tensor, place: int, bit: Bit) -> None:
    """Flips one bit of one element of a contiguous float32 tensor, in place."""
    with torch.no_grad():
        tensor.detach().view(-1).view(torch.int32)[place] ^= 1 << _BITS[bit]


def _struck(run: Rehearsal) -> Tensor:
    return run.parameter(run.subject.struck_parameter)


def _struck_gradient(run: Rehearsal) -> Tensor:
    gradient = _struck(run).grad
    assert gradient is not None
    return gradient


def nan_weight(run: Rehearsal, age: int) -> None:
    _set(_struck(run), run, math.nan)


def inf_weight(run: Rehearsal, age: int) -> None:
    _set(_struck(run), run, math.inf)


def nan_gradient(run: Rehearsal, age: int) -> None:
    _set(_struck_gradient(run), run, math.nan)


def inf_gradient(run: Rehearsal, age: int) -> None:
    _set(_struck_gradient(run), run, math.inf)


def _with(value: float, run: Rehearsal) -> None:
    """One element of the struck module's output becomes that value."""

    def alter(output: Tensor) -> Tensor:
        altered = output.clone()
        _set(altered, run, value)
        return altered

    run.alter_output(run.subject.struck_module, alter)


def nan_activation(run: Rehearsal, age: int) -> None:
    _with(math.nan, run)


def inf_activation(run: Rehearsal, age: int) -> None:
    _with(math.inf, run)


def _strike_input(run: Rehearsal, value: float) -> None:
    def alter(x: Tensor) -> Tensor:
        altered = x.clone()
        _set(altered, run, value)
        return altered

    run.alter_input(alter)


def nan_input(run: Rehearsal, age: int) -> None:
    _strike_input(run, math.nan)


def inf_input(run: Rehearsal, age: int) -> None:
    _strike_input(run, math.inf)


def exponent_weight(run: Rehearsal, age: int) -> None:
    flip(_struck(run), _place(_struck(run), run), "exponent")


def mantissa_weight(run: Rehearsal, age: int) -> None:
    flip(_struck(run), _place(_struck(run), run), "mantissa")


def exponent_gradient(run: Rehearsal, age: int) -> None:
    flip(_struck_gradient(run), _place(_struck_gradient(run), run), "exponent")


def mantissa_gradient(run: Rehearsal, age: int) -> None:
    flip(_struck_gradient(run), _place(_struck_gradient(run), run), "mantissa")


def _flip_moment(run: Rehearsal, moment: str, bit: Bit) -> None:
    tensor = run.moment(run.subject.struck_parameter, moment)
    flip(tensor, _place(tensor, run), bit)


def exponent_first_moment(run: Rehearsal, age: int) -> None:
    _flip_moment(run, "exp_avg", "exponent")


def exponent_second_moment(run: Rehearsal, age: int) -> None:
    _flip_moment(run, "exp_avg_sq", "exponent")


def mantissa_first_moment(run: Rehearsal, age: int) -> None:
    _flip_moment(run, "exp_avg", "mantissa")


def shuffled_labels(run: Rehearsal, age: int) -> None:
    x, y = run.batch
    order = torch.randperm(y.numel(), generator=run.random)
    run.batch = x, y.reshape(-1)[order].view(y.shape)


def constant_input(run: Rehearsal, age: int) -> None:
    x, y = run.batch
    run.batch = x.reshape(-1)[0].expand(x.shape).contiguous(), y


def scaled_input(run: Rehearsal, age: int) -> None:
    run.alter_input(lambda x: x * SCALED_BY)


def _multiply_rate(run: Rehearsal, factor: float) -> None:
    for group in run.optimizer.param_groups:  # the scheduler sets it anew after each update
        group["lr"] *= factor


def rate_x10(run: Rehearsal, age: int) -> None:
    _multiply_rate(run, 10.0)


def rate_x100(run: Rehearsal, age: int) -> None:
    _multiply_rate(run, 100.0)


def no_warmup(run: Rehearsal, age: int) -> None:
    for group in run.optimizer.param_groups:
        group["lr"] = group["initial_lr"]


def loss_scale_overflow(run: Rehearsal, age: int) -> None:
    assert run.scaler is not None
    run.scaler.update(new_scale=_TOO_LARGE_SCALE)


def epsilon_too_small(run: Rehearsal, age: int) -> None:
    for group in run.optimizer.param_groups:
        group["eps"] = _TOO_SMALL_EPSILON
    run.moment(run.subject.struck_parameter, "exp_avg_sq").mul_(_UNDERESTIMATE)


def growing_logits(run: Rehearsal, age: int) -> None:
    with torch.no_grad():
        for name in run.subject.attention_modules:
            qkv = run.parameter(f"{name}.qkv.weight")
            qkv[: 2 * qkv.shape[1]].mul_(_LOGIT_GROWTH)


def lost_moments(run: Rehearsal, age: int) -> None:
    for name, _ in run.model.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            run.moment(name, moment).zero_()


def corrupt_rank(run: Rehearsal, age: int) -> None:
    weight = run.replicas[1].model.get_parameter(run.subject.struck_parameter)
    flip(weight, _place(weight, run), "mantissa")
