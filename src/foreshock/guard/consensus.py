"""What the ranks of a process group have to agree on, in as few and as small words as they can."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from foreshock.collectives import all_reduce
from foreshock.distributed_part import is_distributed
from foreshock.guard.events import Offender
from foreshock.host_read import read

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_log = logging.getLogger("foreshock")

_MESSAGE_BYTES = 1024
_LARGEST_KEY = float(1 << 52)
"""float64 counts up to here without a gap."""


AT_WORK, STOPPED = float(1 << 17), float(1 << 34)
"""More than there are ranks, and than these of all ranks together."""


class RanksLost(RuntimeError):
    """The other ranks do not answer."""


class RankFailed(RuntimeError):
    """The monitor of a rank has failed, and with it that of all."""


class Share(NamedTuple):
    """What one rank has found; added up over the ranks, what all of them have.

    18 numbers, 144 bytes.
    """

    gradient_nan: float = 0.0
    gradient_inf: float = 0.0
    gradient_sumsq: float = 0.0
    """Of what this rank holds, each part of a tensor counted once over all ranks."""
    bad_weights: float = 0.0
    """Elements of parameters and buffers that are not finite."""
    loss: float = 0.0
    losses: float = 0.0
    """Ranks that have a loss."""
    changed_state: float = 0.0
    """Ranks in whose state a bit has flipped."""
    unstable: float = 0.0
    """Ranks whose spectra ask for a rollback."""
    lost_spectra: float = 0.0
    """Ranks that can no longer follow the spectra, and so will not answer in another look."""
    wants_snapshot: float = 0.0
    wants_lower_rate: float = 0.0
    lost_snapshots: float = 0.0
    """Ranks that have lost their part of a snapshot."""
    failed: float = 0.0
    """Ranks whose monitor has failed."""
    unsaved: float = 0.0
    """Ranks whose part of the last snapshot is not on disk; `AT_WORK` more for each that still has
    to hand its part on to the next one, and `STOPPED` for each that no longer will."""
    seconds: float = 0.0
    """That the ranks were at work by themselves."""
    slow: float = 0.0
    """Ranks that have turned out to be slow."""
    low_words: float = 0.0
    high_words: float = 0.0
    """Weighted checksums of what several ranks hold, 0 over all ranks if they hold the same."""

    @property
    def is_one_at_work(self) -> bool:
        """Whether a rank is still handing its part of a snapshot on."""
        return self.unsaved % STOPPED >= AT_WORK

    @property
    def has_one_stopped(self) -> bool:
        """Whether a rank no longer hands its parts of snapshots on."""
        return self.unsaved >= STOPPED

    @property
    def have_copies_differed(self) -> bool:
        """Whether what several ranks hold is not the same on all of them."""
        return bool(self.low_words or self.high_words)


class Consensus:
    """The ranks of a process group, of which every one does the same at the same place.

    Args:
        group: all ranks that train one model.
        device: of the parameters; what is sent is there if the group has no other way.
    """

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        import torch.distributed as dist

        self._dist: Any = dist
        self.group = group
        """Of the ranks."""
        self.rank: int = dist.get_rank(group)
        """Of this process, in the group."""
        self.size: int = dist.get_world_size(group)
        """Ranks in the group."""
        self._device = device if dist.get_backend(group) == "nccl" else torch.device("cpu")
        self.has_left = False
        """Whether this rank speaks for itself only, and waits for nobody."""

    def share(self, found: Share) -> Share:
        """Adds up what the ranks have found.

        Cost: one all_reduce of 144 bytes.
        """
        return Share(*self._reduced(found, "SUM").tolist())

    def largest(self, values: Sequence[float]) -> list[float]:
        """The largest of each number over the ranks.

        Cost: one all_reduce.
        """
        return [float(x) for x in self._reduced(values, "MAX")]

    def bounds(self, value: int) -> tuple[int, int]:
        """The smallest and the largest of the ranks' numbers.

        Cost: one all_reduce.
        """
        low, high = self.largest([-value, value])
        return -int(low), int(high)

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Adds up tensors of any size and number type.

        Cost: one all_reduce of the size of `values`.
        """
        return self._all_reduced(values.to(self._device), "SUM").cpu()

    def first_offender(
        self, mine: tuple[int, Offender] | None, *, is_loss_bad: bool
    ) -> Offender | None:
        """The first of what the ranks have found, by its place among the names, then by the rank.

        Of ranks with the same offender one whose loss was not finite either comes first: gradients
        that were averaged over the ranks are bad on all of them.

        Args:
            mine: place and offender; None: this rank has found nothing.
            is_loss_bad: this rank's loss was not finite.
        Cost:
            One all_reduce and, if there is one, a broadcast of 1 KiB.
        """
        key = _LARGEST_KEY
        if mine is not None:
            key = float((2 * mine[0] + (not is_loss_bad)) * self.size + self.rank)
        first = -self.largest([-key])[0]
        if first >= _LARGEST_KEY:
            return None
        owner = int(first) % self.size
        said = None if mine is None else dataclasses.asdict(mine[1])
        heard = self._heard_from(owner, said)
        return Offender(**{**heard, "ranks": (owner,)})

    def require_same(self, argument: str, given: object) -> None:
        """Sees to it that all ranks were given the same.

        Raises:
            ValueError: naming the argument.
        """
        digest = hashlib.sha256(json.dumps(given, sort_keys=True, default=str).encode()).digest()
        low, high = self.bounds(int.from_bytes(digest[:6], "big"))
        if low != high:
            raise ValueError(f"{argument} is not the same on all ranks; accepted: the same")

    def leave(self) -> None:
        """From now on this rank speaks for itself only, and waits for nobody."""
        self.has_left = True

    # ---- what is sent

    def _heard_from(self, owner: int, said: dict[str, Any] | None) -> dict[str, Any]:
        message = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8)
        if owner == self.rank and said is not None:
            said = {**said, "name": said["name"][: _MESSAGE_BYTES // 8]}
            text = json.dumps(said).encode()
            message[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        # A sum of one message and of zeros: a broadcast, in the words that are spoken already.
        text = bytes(read(self.sums(message))).rstrip(b"\0")
        heard: dict[str, Any] = json.loads(text)
        return heard

    def _reduced(self, values: Sequence[float], op: str) -> Any:
        sent = torch.tensor(values, dtype=torch.float64, device=self._device)
        return read(self._all_reduced(sent, op))

    def _all_reduced(self, tensor: torch.Tensor, op: str) -> torch.Tensor:
        dist = self._dist
        if self.has_left or not dist.is_initialized():
            return tensor
        try:
            all_reduce(tensor, op, self.group)
        except RuntimeError as error:
            self.has_left = True
            raise RanksLost(
                f"rank {self.rank} of {self.size} gets no answer from the others, of which one has "
                f"ended or hangs ({error}); start them again, Monitor.resume takes up the run"
            ) from error
        return tensor


def find_ranks(
    model: torch.nn.Module, parameters: Sequence[torch.Tensor], group: ProcessGroup | None
) -> Consensus | None:
    """The ranks that train a model together; None if there is only this one.

    Args:
        model: wrapped in DistributedDataParallel, or with DTensor parameters, it is trained by the
            ranks of the default group.
        parameters: of the model and the optimizer.
        group: these ranks, whatever the model is.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        if group is not None:
            raise ValueError("process_group is given, but torch.distributed is not initialized")
        return None
    world = torch.distributed.group.WORLD if group is None else group
    assert world is not None
    if torch.distributed.get_world_size(world) == 1:
        return None
    if group is None and not _is_trained_together(model, parameters):
        _log.warning(
            "torch.distributed is initialized, but the model is neither wrapped in "
            "DistributedDataParallel nor of DTensors: every rank watches for itself; "
            "process_group=torch.distributed.group.WORLD has them decide together"
        )
        return None
    device = parameters[0].device if parameters else torch.device("cpu")
    return Consensus(world, device)


def _is_trained_together(model: torch.nn.Module, parameters: Sequence[torch.Tensor]) -> bool:
    parallel: Any = sys.modules.get("torch.nn.parallel")
    if any(isinstance(m, parallel.DistributedDataParallel) for m in model.modules()):
        return True
    return any(map(is_distributed, parameters))
