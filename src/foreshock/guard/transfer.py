"""Copies out of a device that nobody waits for but the next update."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch


class Transfer:
    """Copies tensors of CUDA devices into pinned host memory.

    What only an update changes is copied on a stream of its own, while the next forward and
    backward run. All else is copied before the device does anything more.

    Args:
        targets: in pinned memory.
        sources: what is copied into each.
        is_steady: of each, whether only an update changes it.
    Cost:
        The host waits for nothing. Until `hold_back` has been called, no update may be made.
    """

    def __init__(
        self,
        targets: Sequence[torch.Tensor],
        sources: Sequence[torch.Tensor],
        is_steady: Sequence[bool],
    ) -> None:
        self._events: list[torch.cuda.Event] = []
        there: dict[tuple[torch.device, bool], list[int]] = defaultdict(list)
        for i, source in enumerate(sources):
            there[source.device, is_steady[i]].append(i)
        for (device, steady), places in there.items():
            pairs = [(targets[i], sources[i].detach()) for i in places]
            if device.type == "cuda":
                self._events.append(_send(pairs, device, steady))
            else:
                for target, source in pairs:
                    target.copy_(source)

    @property
    def has_arrived(self) -> bool:
        """Whether all copies are complete."""
        return all(event.query() for event in self._events)

    def hold_back(self) -> None:
        """Has the devices, not the host, wait for the copies before what they are given next."""
        for event in self._events:
            torch.cuda.current_stream(event.device).wait_event(event)

    def wait(self) -> None:
        """Has the host wait for the copies."""
        for event in self._events:
            event.synchronize()


_Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]

_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _send(pairs: _Pairs, device: torch.device, is_steady: bool) -> torch.cuda.Event:
    current = torch.cuda.current_stream(device)
    stream = current
    if is_steady:
        if device not in _STREAMS:
            _STREAMS[device] = torch.cuda.Stream(device)
        stream = _STREAMS[device]
        stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for target, source in pairs:
            target.copy_(source, non_blocking=True)
            source.record_stream(stream)
        event = torch.cuda.Event()
        event.record(stream)
    return event
