"""soft_assign in Triton: distances in tiles of rows and codes, for CUDA devices.

A squared distance is a sum of squared differences, not |x|^2 + |c|^2 - 2 x c: it keeps its digits
where a row lies close to a code, and under any offset. Nothing is centred: a mean that one enormous
center has moved would take the digits of all others. Half types are read as they lie. Distances are
read from transposed copies, feature by feature.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from foreshock.ops._device import why_no_triton
from foreshock.ops.soft_assign.reference import Saved

_IS_INTERPRETED = bool(triton.knobs.runtime.interpret)


def why_unavailable(device_type: str) -> str | None:
    """What keeps this implementation from tensors of a device; None if nothing does."""
    return why_no_triton(device_type, _IS_INTERPRETED)


class Format(NamedTuple):
    """What numbers are computed in."""

    TYPE: tl.dtype
    MOST: float


FORMATS = {
    torch.float32: Format(tl.float32, torch.finfo(torch.float32).max),
    torch.float64: Format(tl.float64, torch.finfo(torch.float64).max),
}

# Fixed: a search for better ones at run time would stall a first step.
BLOCK = 64  # rows, and codes, of a tile of distances
STEP = 4  # features, codes or rows that are loaded together
# Features whose squares are summed up before they are added to the others: one sum of 1024 would
# cost p three times the error.
FEATURE_BLOCK = 64
GRADIENT_ROWS = 32  # rows or codes whose gradient a program sums,
GRADIENT_COLUMNS = 64  # and most of their features
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True, "enable_reflect_ftz": False}
GRADIENT_OPTIONS = OPTIONS | {"num_warps": 4}
SLAB = 1 << 23  # weights of pairs of row and code that backward holds at a time, twice
PROGRAMS = 1024  # that share the gradient of the centers, where there are rows enough

_BLOCK = tl.constexpr(BLOCK)
_STEP = tl.constexpr(STEP)
_FEATURE_BLOCK = tl.constexpr(FEATURE_BLOCK)
_GRADIENT_ROWS = tl.constexpr(GRADIENT_ROWS)


@triton.jit
def _squared_distances(x_ptr, centers_ptr, n, k, d, row, code, F: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of d2: at most the largest number, so that no difference is NaN; inf past the end."""
    d2 = tl.zeros([_BLOCK, _BLOCK], F.TYPE)
    for begin in range(0, d, _FEATURE_BLOCK):
        part = tl.zeros([_BLOCK, _BLOCK], F.TYPE)
        for first in range(begin, tl.minimum(begin + _FEATURE_BLOCK, d), _STEP):
            for i in tl.static_range(_STEP):
                x = tl.load(x_ptr + (first + i) * n + row, row < n, other=0).to(F.TYPE)
                c = tl.load(centers_ptr + (first + i) * k + code, code < k, other=0).to(F.TYPE)
                difference = x[:, None] - c[None, :]
                part += difference * difference
        d2 += part
    d2 = tl.where(d2 > F.MOST, F.MOST, d2)
    return tl.where((code < k)[None, :], d2, float("inf"))


@triton.jit
def _exponents(nearest, d2, inverse_temperature, F: tl.constexpr):  # type: ignore[no-untyped-def]
    """(nearest - d2) / T, where what overflowed is as near as what did, and never as near as what
    did not."""
    is_beyond = (d2 >= F.MOST) & (nearest < F.MOST)
    return tl.where(is_beyond, -float("inf"), (nearest - d2) * inverse_temperature)


@triton.jit
def _block(number):  # type: ignore[no-untyped-def]
    return number.to(tl.int64) * _BLOCK + tl.arange(0, _BLOCK)


# Not specialised: another number or alignment would be another kernel, compiled in mid-training.
@triton.jit(
    do_not_specialize=["n", "k", "d"],
    do_not_specialize_on_alignment=[
        "x_ptr", "centers_ptr", "numbers_ptr", "best_ptr", "distance_ptr", "length_ptr",
        "entropy_ptr", "log_normaliser_ptr", "p_best_ptr", "mean_slope_ptr",
    ],
)  # fmt: skip
def _soft_assign_rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr, centers_ptr, numbers_ptr, best_ptr, distance_ptr, length_ptr, entropy_ptr,
    log_normaliser_ptr, p_best_ptr, mean_slope_ptr, n, k, d,
    F: tl.constexpr, FEELS_EPS: tl.constexpr,
):  # fmt: skip
    """What a softmax over all codes comes to, for a block of rows, in one sweep or two.

    With a = (least d2 - d2) / T and Z = sum exp(a) the entropy is log Z - sum exp(a) a / Z, two
    terms of one sign; only an eps that is felt beside p needs the sweep that knows Z.
    """
    n = n.to(tl.int64)
    k = k.to(tl.int64)
    row = _block(tl.program_id(0))
    inverse_temperature = tl.load(numbers_ptr)
    eps = tl.load(numbers_ptr + 1)
    nearest = tl.full([_BLOCK], float("inf"), F.TYPE)
    best = tl.zeros([_BLOCK], tl.int64)
    z = tl.zeros([_BLOCK], F.TYPE)
    moment = tl.zeros([_BLOCK], F.TYPE)
    for first in range(0, k, _BLOCK):
        code = first + tl.arange(0, _BLOCK).to(tl.int64)
        d2 = _squared_distances(x_ptr, centers_ptr, n, k, d, row, code, F)
        near = tl.min(d2, 1)
        at = tl.min(tl.where(d2 == near[:, None], code[None, :], k), 1)
        best = tl.where(near < nearest, at, best)
        near = tl.where(near < nearest, near, nearest)
        shift = _exponents(near, nearest, inverse_temperature, F)
        kept = tl.exp(shift)
        moment = tl.where(kept > 0, kept * (moment + shift * z), 0)
        a = _exponents(near[:, None], d2, inverse_temperature, F)
        e = tl.exp(a)
        z = z * kept + tl.sum(e, 1)
        moment += tl.sum(tl.where(e > 0, e * a, 0), 1)
        nearest = near
    p_best = 1 / z
    log_z = tl.log(z)
    entropy = log_z - moment * p_best
    mean_slope = 1 - entropy
    if FEELS_EPS:
        entropy = tl.zeros([_BLOCK], F.TYPE)
        share = tl.zeros([_BLOCK], F.TYPE)
        for first in range(0, k, _BLOCK):
            code = first + tl.arange(0, _BLOCK).to(tl.int64)
            d2 = _squared_distances(x_ptr, centers_ptr, n, k, d, row, code, F)
            a = _exponents(nearest[:, None], d2, inverse_temperature, F)
            p = tl.exp(a) * p_best[:, None]
            entropy -= tl.sum(tl.where(p > 0, p * tl.log(p + eps), 0), 1)
            share += tl.sum(tl.where(p > 0, p * (p / (p + eps)), 0), 1)
        entropy = tl.where(z == z, entropy, z)
        mean_slope = share - entropy
    is_row = row < n
    tl.store(best_ptr + row, best, is_row)
    nearest = tl.where(nearest >= F.MOST, float("inf"), nearest)
    tl.store(distance_ptr + row, tl.where(z == z, nearest, z), is_row)
    tl.store(length_ptr + row, -tl.log(p_best + eps), is_row)
    tl.store(entropy_ptr + row, entropy, is_row)
    tl.store(log_normaliser_ptr + row, log_z - nearest * inverse_temperature, is_row)
    tl.store(p_best_ptr + row, p_best, is_row)
    tl.store(mean_slope_ptr + row, mean_slope, is_row)


@triton.jit
def _probabilities(  # type: ignore[no-untyped-def]
    d2, numbers_ptr, distance_ptr, p_best_ptr, row, is_row, F: tl.constexpr
):  # fmt: skip
    """p of a tile of distances."""
    nearest = tl.load(distance_ptr + row, is_row, other=0)
    nearest = tl.where(nearest > F.MOST, F.MOST, nearest)
    p_best = tl.load(p_best_ptr + row, is_row, other=0)
    a = _exponents(nearest[:, None], d2, tl.load(numbers_ptr), F)
    return tl.exp(a) * p_best[:, None]


@triton.jit(
    do_not_specialize=["n", "k", "d"],
    do_not_specialize_on_alignment=[
        "x_ptr", "centers_ptr", "numbers_ptr", "distance_ptr", "p_best_ptr", "probs_ptr"
    ],
)  # fmt: skip
def _soft_assign_probs_kernel(  # type: ignore[no-untyped-def]
    x_ptr, centers_ptr, numbers_ptr, distance_ptr, p_best_ptr, probs_ptr, n, k, d, F: tl.constexpr
):  # fmt: skip
    """Writes p of a block of rows and a block of codes."""
    n = n.to(tl.int64)
    k = k.to(tl.int64)
    row = _block(tl.program_id(0))
    code = _block(tl.program_id(1))
    d2 = _squared_distances(x_ptr, centers_ptr, n, k, d, row, code, F)
    p = _probabilities(d2, numbers_ptr, distance_ptr, p_best_ptr, row, row < n, F)
    mask = (row < n)[:, None] & (code < k)[None, :]
    tl.store(probs_ptr + row[:, None] * k + code[None, :], p, mask)


@triton.jit(
    do_not_specialize=["n", "k", "d", "first_row", "slab_rows", "slab_codes"],
    do_not_specialize_on_alignment=[
        "x_ptr", "centers_ptr", "numbers_ptr", "best_ptr", "distance_ptr", "p_best_ptr",
        "mean_slope_ptr", "grad_distance_ptr", "grad_length_ptr", "grad_entropy_ptr",
        "by_row_ptr", "by_code_ptr",
    ],
)  # fmt: skip
def _soft_assign_weights_kernel(  # type: ignore[no-untyped-def]
    x_ptr, centers_ptr, numbers_ptr, best_ptr, distance_ptr, p_best_ptr, mean_slope_ptr,
    grad_distance_ptr, grad_length_ptr, grad_entropy_ptr, by_row_ptr, by_code_ptr,
    n, k, d, first_row, slab_rows, slab_codes, F: tl.constexpr,
):  # fmt: skip
    """The gradient with respect to d2 of a block of rows and a block of codes; zero past the ends.

    With dp_j/dd2_k = -p_j (1[j = k] - p_k) / T, and b the best code:
    dL/dd2_k = p_b / (p_b + eps) (1[k = b] - p_k) / T and dH/dd2_k = p_k (s_k - sum p s) / T, where
    s = log(p + eps) + p / (p + eps).
    """
    n = n.to(tl.int64)
    k = k.to(tl.int64)
    in_slab = _block(tl.program_id(0))
    row = first_row + in_slab
    code = _block(tl.program_id(1))
    is_row = row < n
    inverse_temperature = tl.load(numbers_ptr)
    eps = tl.load(numbers_ptr + 1)
    d2 = _squared_distances(x_ptr, centers_ptr, n, k, d, row, code, F)
    p = _probabilities(d2, numbers_ptr, distance_ptr, p_best_ptr, row, is_row, F)
    p_best = tl.load(p_best_ptr + row, is_row, other=1)
    mean_slope = tl.load(mean_slope_ptr + row, is_row, other=0)
    grad_distance = tl.load(grad_distance_ptr + row, is_row, other=0)
    grad_length = tl.load(grad_length_ptr + row, is_row, other=0) * (p_best / (p_best + eps))
    grad_entropy = tl.load(grad_entropy_ptr + row, is_row, other=0)
    best = tl.load(best_ptr + row, is_row, other=0)
    is_best = (code[None, :] == best[:, None]).to(F.TYPE)
    slope = tl.where(p > 0, tl.log(p + eps) + p / (p + eps), 0)
    weight = grad_length[:, None] * (is_best - p)
    weight += grad_entropy[:, None] * (p * (slope - mean_slope[:, None]))
    weight = weight * inverse_temperature + grad_distance[:, None] * is_best
    # What overflowed stays what it is when x moves a little.
    weight = tl.where(d2 >= F.MOST, 0, weight)
    tl.store(by_row_ptr + in_slab[:, None] * slab_codes + code[None, :], weight)
    tl.store(by_code_ptr + code[None, :] * slab_rows + in_slab[:, None], weight)


@triton.jit(
    do_not_specialize=["n", "k", "d", "first_row", "slab_rows", "slab_codes"],
    do_not_specialize_on_alignment=["x_ptr", "centers_ptr", "by_code_ptr", "grad_x_ptr"],
)
def _soft_assign_grad_x_kernel(  # type: ignore[no-untyped-def]
    x_ptr, centers_ptr, by_code_ptr, grad_x_ptr, n, k, d, first_row, slab_rows, slab_codes,
    F: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """2 sum_k weight_k (x - c_k) of some rows and features."""
    d = d.to(tl.int64)
    slab_rows = slab_rows.to(tl.int64)
    in_slab = tl.program_id(0).to(tl.int64) * _GRADIENT_ROWS + tl.arange(0, _GRADIENT_ROWS)
    row = first_row + in_slab
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < d
    mask = (row < n)[:, None] & is_column[None, :]
    at = row[:, None] * d + column[None, :]
    x = tl.load(x_ptr + at, mask, other=0).to(F.TYPE)
    sum = tl.zeros([_GRADIENT_ROWS, COLUMNS], F.TYPE)
    for first in range(0, slab_codes, _STEP):
        for i in tl.static_range(_STEP):
            weight = tl.load(by_code_ptr + (first + i) * slab_rows + in_slab)
            # Past the end the weight is zero.
            c_ptr = centers_ptr + tl.minimum(first + i, k - 1) * d
            c = tl.load(c_ptr + column, is_column, other=0).to(F.TYPE)
            sum += weight[:, None] * (x - c[None, :])
    tl.store(grad_x_ptr + at, (2 * sum).to(grad_x_ptr.dtype.element_ty), mask)


@triton.jit(
    do_not_specialize=["n", "k", "d", "first_row", "slab_rows", "slab_codes", "cut_rows"],
    do_not_specialize_on_alignment=["x_ptr", "centers_ptr", "by_row_ptr", "partial_ptr"],
)
def _soft_assign_grad_centers_kernel(  # type: ignore[no-untyped-def]
    x_ptr, centers_ptr, by_row_ptr, partial_ptr, n, k, d, first_row, slab_rows, slab_codes,
    cut_rows, F: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds sum_n weight_n (c - x_n) over one cut of a slab's rows, for some codes and features."""
    d = d.to(tl.int64)
    slab_codes = slab_codes.to(tl.int64)
    code = tl.program_id(0).to(tl.int64) * _GRADIENT_ROWS + tl.arange(0, _GRADIENT_ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    cut = tl.program_id(2)
    is_column = column < d
    mask = (code < k)[:, None] & is_column[None, :]
    at = code[:, None] * d + column[None, :]
    c = tl.load(centers_ptr + at, mask, other=0).to(F.TYPE)
    partial = partial_ptr + cut.to(tl.int64) * k * d + at
    sum = tl.load(partial, mask, other=0)
    begin = cut * cut_rows
    for first in range(begin, tl.minimum(begin + cut_rows, slab_rows), _STEP):
        for i in tl.static_range(_STEP):
            weight = tl.load(by_row_ptr + (first + i) * slab_codes + code)
            row_ptr = x_ptr + tl.minimum(first_row + first + i, n - 1) * d
            x = tl.load(row_ptr + column, is_column, other=0).to(F.TYPE)
            sum += weight[:, None] * (c - x[None, :])
    tl.store(partial, sum, mask)


class Rows(NamedTuple):
    """Of every row: what forward returns, p of the best code and the mean slope of the entropy."""

    best_index: Tensor
    distance: Tensor
    length: Tensor
    entropy: Tensor
    log_normaliser: Tensor
    p_best: Tensor
    mean_slope: Tensor


class Inputs(NamedTuple):
    """What every kernel on distances reads."""

    x: Tensor  # (D up to a multiple of STEP, N)
    centers: Tensor  # (D up to a multiple of STEP, K)
    numbers: Tensor  # 1 / temperature, eps
    sizes: tuple[int, int, int]  # N, K, D up to a multiple of STEP

    @property
    def format(self) -> Format:
        return FORMATS[self.numbers.dtype]


def _number_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _feature_major(x: Tensor) -> Tensor:
    rows, features = x.shape
    transposed = x.new_zeros(triton.cdiv(features, STEP) * STEP, rows)
    transposed[:features].copy_(x.t())
    return transposed


def _inputs(x: Tensor, centers: Tensor, temperature: float, eps: float) -> Inputs:
    numbers = torch.empty(2, dtype=_number_type(x), device=x.device)
    # A copy from the host would be waited for.
    numbers[0].fill_(min(1 / temperature, torch.finfo(numbers.dtype).max))
    numbers[1].fill_(eps)
    by_feature = _feature_major(x)
    sizes = x.shape[0], centers.shape[0], by_feature.shape[0]
    return Inputs(by_feature, _feature_major(centers), numbers, sizes)


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _sweep(inputs: Inputs, eps: float) -> Rows:
    n, k, _ = inputs.sizes
    best = torch.empty(n, dtype=torch.int64, device=inputs.x.device)
    rows = Rows(best, *(inputs.numbers.new_empty(n) for _ in Rows._fields[1:]))
    if n:
        _soft_assign_rows_kernel[(triton.cdiv(n, BLOCK),)](
            inputs.x,
            inputs.centers,
            inputs.numbers,
            *rows,
            *inputs.sizes,
            F=inputs.format,
            # Otherwise eps moves the entropy by less than its rounding.
            FEELS_EPS=k * eps > torch.finfo(inputs.numbers.dtype).eps / 8,
            **OPTIONS,
        )
    return rows


def forward(
    x: Tensor, centers: Tensor, temperature: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns best_index, distance, length, entropy and logsumexp(-d2 / temperature) of every row.

    Args:
        x: (N, D), and centers: (K, D), contiguous; centers are float64 if x is, float32 otherwise.
        temperature, eps: as in `soft_assign`.

    Cost: a transposed copy of x and of the centers, and one kernel that sweeps the codes once, or
    twice where eps times K is not small beside the rounding of the results.
    """
    with _on(x.device):
        rows = _sweep(_inputs(x, centers, temperature, eps), eps)
    return rows[:5]


def probs(x: Tensor, centers: Tensor, temperature: float, log_normaliser: Tensor) -> Tensor:
    """p (N, K) of rows for which `forward` returned `log_normaliser`.

    The normaliser is found once more, relative to the nearest code: that of distances which are
    large beside the temperature has lost the digits that p needs.
    """
    with _on(x.device):
        inputs = _inputs(x, centers, temperature, 0.0)
        n, k, _ = inputs.sizes
        p = inputs.numbers.new_empty(n, k)
        if n:
            rows = _sweep(inputs, 0.0)
            _soft_assign_probs_kernel[(triton.cdiv(n, BLOCK), triton.cdiv(k, BLOCK))](
                inputs.x,
                inputs.centers,
                inputs.numbers,
                rows.distance,
                rows.p_best,
                p,
                *inputs.sizes,
                F=inputs.format,
                **OPTIONS,
            )
    return p


class Slab(NamedTuple):
    """Weights of the rows that are worked on together, zero past the ends, in either order."""

    by_row: Tensor
    by_code: Tensor

    @staticmethod
    def empty(n: int, k: int, like: Tensor) -> Slab:
        codes = triton.cdiv(k, BLOCK) * BLOCK
        rows = min(max(1, SLAB // codes // BLOCK), triton.cdiv(n, BLOCK)) * BLOCK
        return Slab(like.new_empty(rows, codes), like.new_empty(codes, rows))


def _backward_slab(
    inputs: Inputs,
    rows: Rows,
    grads: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    centers: Tensor,
    slab: Slab,
    first_row: int,
    grad_x: Tensor | None,
    partial: Tensor | None,
) -> None:
    """Writes the gradient of a slab's rows and adds to that of the centers, where there is one."""
    n, k, _ = inputs.sizes
    slab_rows, slab_codes = slab.by_row.shape
    features = x.shape[1]
    columns = _gradient_columns(features)
    column_blocks = triton.cdiv(features, columns)
    of_slab = first_row, slab_rows, slab_codes
    _soft_assign_weights_kernel[(slab_rows // BLOCK, slab_codes // BLOCK)](
        inputs.x,
        inputs.centers,
        inputs.numbers,
        rows.best_index,
        rows.distance,
        rows.p_best,
        rows.mean_slope,
        *grads,
        *slab,
        *inputs.sizes,
        *of_slab,
        F=inputs.format,
        **OPTIONS,
    )
    if grad_x is not None:
        _soft_assign_grad_x_kernel[(slab_rows // GRADIENT_ROWS, column_blocks)](
            x,
            centers,
            slab.by_code,
            grad_x,
            n,
            k,
            features,
            *of_slab,
            F=inputs.format,
            COLUMNS=columns,
            **GRADIENT_OPTIONS,
        )
    if partial is not None:
        cuts = len(partial)
        _soft_assign_grad_centers_kernel[(triton.cdiv(k, GRADIENT_ROWS), column_blocks, cuts)](
            x,
            centers,
            slab.by_row,
            partial,
            n,
            k,
            features,
            *of_slab,
            triton.cdiv(slab_rows, cuts * STEP) * STEP,
            F=inputs.format,
            COLUMNS=columns,
            **GRADIENT_OPTIONS,
        )


def _gradient_columns(features: int) -> int:
    power: int = triton.next_power_of_2(features)
    return min(max(8, power), GRADIENT_COLUMNS)


def _cuts(slab_rows: int, k: int, features: int) -> int:
    """Into how many parts the rows of a slab are cut for the gradient of the centers."""
    blocks: int = triton.cdiv(k, GRADIENT_ROWS) * triton.cdiv(features, _gradient_columns(features))
    return min(max(1, PROGRAMS // blocks), slab_rows // BLOCK)


def backward(
    grad_distance: Tensor | None,
    grad_length: Tensor | None,
    grad_entropy: Tensor | None,
    x: Tensor,
    centers: Tensor,
    temperature: float,
    eps: float,
    saved: Saved,
    *,
    needs: tuple[bool, bool] = (True, True),
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x and of the centers; what is not needed has no elements.

    Args:
        grad_distance, grad_length, grad_entropy: (N,), or None for zeros.
        x, centers, temperature, eps: as `forward` took them.
        saved: what `forward` has returned. The best code is read; the rest is found once more,
            together with the sums that only backward needs.

    Cost: the sweep of `forward`, another over distances, and two sums over the pairs of row and
    code, in slabs of rows of 2 * SLAB numbers. The sums have a fixed order.
    """
    with _on(x.device):
        inputs = _inputs(x, centers, temperature, eps)
        n, k, _ = inputs.sizes
        if n == 0 or not any(needs):
            return torch.zeros_like(x), torch.zeros_like(centers)
        rows = _sweep(inputs, eps)._replace(best_index=saved[0])
        dtype = inputs.numbers.dtype
        none = torch.zeros(n, dtype=dtype, device=x.device)
        grad_d, grad_l, grad_h = (
            none if grad is None else grad.to(dtype).contiguous()
            for grad in (grad_distance, grad_length, grad_entropy)
        )
        slab = Slab.empty(n, k, inputs.numbers)
        slab_rows = len(slab.by_row)
        grad_x, partial = None, None
        if needs[0]:
            grad_x = torch.empty_like(x)
        if needs[1]:
            partial = inputs.numbers.new_zeros(_cuts(slab_rows, k, x.shape[1]), *centers.shape)
        for first in range(0, n, slab_rows):
            _backward_slab(
                inputs, rows, (grad_d, grad_l, grad_h), x, centers, slab, first, grad_x, partial
            )
        none_needed = x.new_empty(0)
        return (
            none_needed if grad_x is None else grad_x,
            none_needed if partial is None else (2 * partial.sum(0)).to(centers.dtype),
        )
