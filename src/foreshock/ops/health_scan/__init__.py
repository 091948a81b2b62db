"""health_scan: NaN, infinities and norms of every tensor in one read of its memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from foreshock.ops._backend import choose
from foreshock.ops._table import make_table
from foreshock.ops._tensors import as_list, device_of, is_plain, local_tensors
from foreshock.ops.health_scan import register as register

__all__ = ["HealthScanner", "HealthStats", "health_scan"]


@dataclasses.dataclass(frozen=True, eq=False)
class HealthStats:
    """What one read of T tensors found; every field is a (T,) tensor on the tensors' device.

    `absmax`, `sum` and `sumsq` run over the finite elements only, and are 0 where there are none.
    """

    numel: torch.Tensor
    """int64: elements."""
    nan: torch.Tensor
    """int64: elements that are NaN."""
    inf: torch.Tensor
    """int64: elements that are infinite, of either sign."""
    absmax: torch.Tensor
    """float64: largest |x|."""
    sum: torch.Tensor
    """float64: sum of x."""
    sumsq: torch.Tensor
    """float64: sum of x^2. It can be infinite for finite float64 tensors: no test of finiteness."""
    packed: torch.Tensor = dataclasses.field(repr=False)
    """(T, 6) buffer of which the other fields are columns: three of int64 bits, three float64."""

    @classmethod
    def from_packed(cls, packed: torch.Tensor) -> HealthStats:
        """Reads the columns of a packed result; nothing is copied."""
        counts = packed.view(torch.int64)
        numel, nan, inf = counts.unbind(1)[:3]
        absmax, total, sumsq = packed.unbind(1)[3:]
        return cls(numel, nan, inf, absmax, total, sumsq, packed)

    def clone(self) -> HealthStats:
        """A copy that a bound scanner's next scan does not overwrite."""
        return HealthStats.from_packed(self.packed.clone())

    @property
    def nonfinite(self) -> torch.Tensor:
        """int64 (T,): nan + inf."""
        return self.nan + self.inf

    @property
    def norm(self) -> torch.Tensor:
        """float64 (T,): sqrt(sumsq), the L2 norm of the finite elements."""
        return self.sumsq.sqrt()

    @property
    def mean(self) -> torch.Tensor:
        """float64 (T,): sum over the number of finite elements; 0 where there are none."""
        return self.sum / (self.numel - self.nonfinite).clamp(min=1)

    @property
    def rms(self) -> torch.Tensor:
        """float64 (T,): sqrt(sumsq over the number of finite elements); 0 where there are none."""
        return (self.sumsq / (self.numel - self.nonfinite).clamp(min=1)).sqrt()

    @property
    def total_norm(self) -> torch.Tensor:
        """float64 (): L2 norm of the finite elements of all tensors together."""
        return self.sumsq.sum().sqrt()

    @property
    def first_nonfinite(self) -> torch.Tensor:
        """int64 (): index of the first tensor with a NaN or infinity; -1 if there is none."""
        if not len(self.numel):
            return self.numel.new_full((), -1)
        is_bad = self.nonfinite > 0
        return torch.where(is_bad.any(), is_bad.int().argmax(), -1)


def health_scan(tensors: Iterable[torch.Tensor | None] | torch.Tensor) -> HealthStats:
    """Counts NaN and infinities of every tensor and sums up its finite elements, in one read.

    nan = #{x != x},  inf = #{|x| = inf},  absmax = max |x|,  sum = sum x,  sumsq = sum x^2,
    the last three over finite x.

    Args:
        tensors: floating-point tensors of any shape and stride on one device (float64, float32,
            bfloat16, float16, float8_e4m3fn, float8_e5m2), or one such tensor; of a DTensor the
            local shard is read; None counts as a tensor without elements.
    Returns:
        HealthStats of (T,) tensors on that device. Counts are exact; sums are float64, with an
        error under 2e-7 of the sum of the magnitudes whatever the number and scale of elements.
    Raises:
        TypeError, ValueError: naming the place in `tensors`, what stands there and what may.
    Cost:
        One pass over the memory, a fixed number of kernel launches however many tensors there are,
        no synchronisation. To scan the same tensors every step, bind a `HealthScanner`.
    Source:
        The formulas above; csrc/health_scan for how one read is enough.
    """
    if torch.compiler.is_compiling():
        present = [torch.empty(0) if t is None else t for t in as_list(tensors)]
        return HealthStats.from_packed(torch.ops.foreshock.health_scan(present))
    local = local_tensors(tensors)
    return HealthStats.from_packed(register.scan(local))


class HealthScanner:
    """`health_scan` bound to a list of tensors, to be called every step.

    >>> scanner = HealthScanner(list(model.parameters()))
    >>> stats = scanner()                                  # the parameters as they are now
    >>> stats = grads([p.grad for p in parameters])        # other tensors in the same places

    A call looks first whether the tensors still lie where they lay: an assignment to `.data`, a
    gradient that was set to None and made anew, or a new shard rebuilds the table. Results go to
    one buffer that the next call overwrites; `HealthStats.clone` keeps them.

    Args:
        tensors: as for `health_scan`.
        recheck: False leaves out that look: the memory that the tensors have now is scanned at each
            call, and kept alive for it.
    Raises:
        TypeError, ValueError: as for `health_scan`, here and at a call.
    Cost:
        Beyond the scan itself, about 0.3 us a call, and about 10 ns a tensor for the look.
        Tensors of the same shapes elsewhere in host memory: some 0.1 us each. Others, or elsewhere
        on a device: a new table.
    """

    def __init__(
        self, tensors: Iterable[torch.Tensor | None] | torch.Tensor, *, recheck: bool = True
    ) -> None:
        self._recheck = recheck
        self._bind(as_list(tensors))

    def _bind(self, tensors: list[torch.Tensor | None]) -> None:
        local = local_tensors(tensors)
        device = device_of(local)
        self._tensors = tensors
        self._are_plain = local is tensors or all(map(is_plain, tensors))
        if not self._recheck:  # not even `tensor.data = ...` may free what will be read
            self._memory = [None if t is None else t.untyped_storage() for t in local]
        packed = torch.empty(len(local), 6, dtype=torch.float64, device=device)
        self._scan = choose("health_scan", device.type).module.bind(local, packed)
        self._movable: Any = getattr(self._scan, "table", None) if self._recheck else None
        self._table = self._movable or make_table(local)
        self.stats = HealthStats.from_packed(packed)

    def __call__(self, tensors: list[torch.Tensor | None] | None = None) -> HealthStats:
        """Scans the bound tensors, or others that take their places from now on.

        Args:
            tensors: a list; None for those already bound.
        Returns:
            `self.stats`, valid until the next call.
        """
        if tensors is None:
            tensors = self._tensors
        if self._recheck or tensors is not self._tensors:
            local = tensors if self._are_plain else local_tensors(tensors)
            if not self._table.matches(local):
                self._follow(list(tensors), local)
        self._scan()
        return self.stats

    def _follow(self, tensors: list[torch.Tensor | None], local: list[torch.Tensor | None]) -> None:
        """To tensors that have moved, or to others."""
        if self._movable is not None and self._movable.follow(local):
            self._tensors = tensors
        else:
            self._bind(tensors)
