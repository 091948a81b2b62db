"""Times variants of one computation against each other, in turn, in one process.

Machines are shared and clocks change: what is compared must be measured at the same time. Each
round runs every variant once, in an order that rotates; medians and their ratios are the result.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of one call, round by round."""

    each_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.each_ms)

    def row(self) -> dict[str, float]:
        """What is stored of it."""
        ordered = sorted(self.each_ms)
        last = len(ordered) - 1
        return {
            "median_ms": self.median_ms,
            "p20_ms": ordered[round(0.2 * last)],
            "p80_ms": ordered[round(0.8 * last)],
            "rounds": len(ordered),
        }

    def over(self, base: Timing) -> float:
        """Median of the ratios to what `base` took in the same round: moods of the machine that
        last for a round cancel out."""
        return statistics.median(a / b for a, b in zip(self.each_ms, base.each_ms, strict=True))


def _seconds_on_host(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def _seconds_on_gpu(call: Callable[[], object]) -> float:
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    call()
    ended.record()
    ended.synchronize()
    return begun.elapsed_time(ended) / 1e3


def time_in_turn(
    benchmark: Any,
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    device: str = "cpu",
    slow: Mapping[str, int] | None = None,
) -> dict[str, Timing]:
    """Times every variant once a round.

    Args:
        benchmark: pytest-benchmark's fixture; it drives the rounds and keeps their total.
        variants: calls by name; what they compute has been checked before.
        rounds: how many.
        device: "cuda" times with events on the device.
        slow: variants that take part in their first so many rounds only.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    clock = _seconds_on_gpu if device == "cuda" else _seconds_on_host
    for call in variants.values():
        call()  # compilation, first-touch page faults, clocks going up

    def one_round() -> None:
        names.append(names.pop(0))
        for name in names:
            if slow is None or name not in slow or len(seconds[name]) < slow[name]:
                seconds[name].append(clock(variants[name]))

    benchmark.pedantic(one_round, rounds=rounds, iterations=1)
    timings = {name: Timing(tuple(1e3 * s for s in taken)) for name, taken in seconds.items()}
    benchmark.extra_info |= {name: timing.median_ms for name, timing in timings.items()}
    return timings


def microseconds_of_call(call: Callable[[], object], calls: int = 2000, rounds: int = 9) -> float:
    """Median processor time of one short call: a shared machine adds waiting, not work."""
    taken = []
    for _ in range(rounds):
        begun = time.process_time()
        for _ in range(calls):
            call()
        taken.append((time.process_time() - begun) / calls)
    return 1e6 * statistics.median(taken)
