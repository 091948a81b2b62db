"""Batches that can be had again after a rollback."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from foreshock.guard.containers import copy_out, tensors_in
from foreshock.guard.state import RandomState, Stateful

_log = logging.getLogger("foreshock")

_MUCH_MEMORY_BYTES = 1 << 30


def make_source(loader: Iterable[Any], epochs: int, *, keeps_batches: bool) -> BatchSource:
    """The source that suits a loader.

    Args:
        loader: iterated over once per epoch.
        epochs: number of passes.
        keeps_batches: whether to keep batches of a loader that cannot be sent back; without, such a
            source cannot be restored.
    """
    # The loaders of accelerate have the methods with nothing behind them, or with an iterator that
    # draws its random numbers when the first batch is asked for, too late to be undone.
    if isinstance(loader, Stateful) and not hasattr(loader, "base_dataloader"):
        return ResumableSource(loader, epochs)
    return BufferedSource(loader, epochs, keeps_batches=keeps_batches)


class BatchSource:
    """Batches of a number of epochs, numbered from 0 over all of them."""

    def __init__(self, loader: Iterable[Any], epochs: int) -> None:
        self._loader = loader
        self._epochs = epochs
        self._epoch = 0
        self._iterator: Iterator[Any] | None = None
        self._left_out: set[int] = set()
        self.index = 0
        """Number of the batch that comes next."""

    @property
    def epoch(self) -> int:
        """Of the last batch that was fetched."""
        return self._epoch

    def fetch(self) -> Any:
        """The next batch that is not left out.

        Raises:
            StopIteration: after the last epoch.
        """
        while True:
            batch = self._fetch()
            self.index += 1
            if self.index - 1 not in self._left_out:
                return batch

    def leave_out(self, first: int, count: int) -> None:
        """From now on batches first .. first + count - 1 are passed over."""
        self._left_out.update(range(first, first + count))

    def _fetch(self) -> Any:
        while True:
            if self._iterator is None:
                if self._epoch >= self._epochs:
                    raise StopIteration
                self._note_epoch_begin()
                self._iterator = iter(self._loader)
            try:
                return next(self._iterator)
            except StopIteration:
                self._iterator = None
                self._epoch += 1
                self._note_epoch_end()

    def _note_epoch_begin(self) -> None:
        """The loader is about to be iterated over."""

    def _note_epoch_end(self) -> None:
        """The loader has just said that an epoch is over."""

    def place_elsewhere(self) -> Any:
        """Where the source is, said so that another process finds it."""
        return {**self._place_of_batches(), "left_out": sorted(self._left_out)}

    def _place_of_batches(self) -> dict[str, Any]:
        raise NotImplementedError

    def resume(self, place: Any) -> None:
        """Goes to where a source of an earlier process was, before anything has been fetched.

        Raises:
            ValueError: the loader does not have as many batches.
        """
        self._left_out = set(place["left_out"])
        self._find(place)

    def _find(self, place: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def capture(self) -> Any:
        """Where the source is."""
        raise NotImplementedError

    def restore(self, saved: Any) -> None:
        """Sends the source back to where it was."""
        raise NotImplementedError

    def forget_before(self, index: int) -> None:
        """It will not be sent back to before this batch any more."""


class ResumableSource(BatchSource):
    """Of a loader that has state_dict and load_state_dict."""

    _loader: Any

    def __init__(self, loader: Iterable[Any], epochs: int) -> None:
        super().__init__(loader, epochs)
        self._last_captured: dict[str, Any] = {"index": -1}

    def _place_of_batches(self) -> dict[str, Any]:
        captured = self._last_captured
        return captured if captured["index"] == self.index else dict(self.capture())

    def place_elsewhere(self) -> Any:
        # The very dictionary, which is told if an epoch turns out to have been at its end.
        place = self._place_of_batches()
        place["left_out"] = sorted(self._left_out)
        return place

    def _find(self, place: Mapping[str, Any]) -> None:
        self.restore(place)
        self._last_captured = dict(place)

    def capture(self) -> Any:
        self._last_captured = {"index": self.index, "place": self._place(), "after_end": None}
        return self._last_captured

    def _place(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "is_within": self._iterator is not None,
            "loader": copy_out(self._loader.state_dict()),
        }

    def _note_epoch_end(self) -> None:
        if self._last_captured["index"] == self.index:
            self._last_captured["after_end"] = self._place()

    def restore(self, saved: Any) -> None:
        self.index = saved["index"]
        self._go_to(saved["place"])
        if saved["after_end"] is None:
            return
        # It was captured after the last batch of an epoch. From there some loaders resume with the
        # end of that epoch, and some with the next one, which would make one epoch too many.
        if self._is_at_end():
            self._iterator = None
            self._epoch += 1
        else:
            self._go_to(saved["after_end"])

    def _go_to(self, place: Mapping[str, Any]) -> None:
        self._epoch = place["epoch"]
        self._loader.load_state_dict(copy_out(place["loader"]))
        self._iterator = None
        if place["is_within"]:
            # Within an epoch no iterator was made in the first run, so none may draw a seed now.
            with _unmoved_generators():
                self._iterator = iter(self._loader)

    def _is_at_end(self) -> bool:
        end = object()
        with _unmoved_generators():
            return self._iterator is None or next(self._iterator, end) is end


@contextlib.contextmanager
def _unmoved_generators() -> Iterator[None]:
    """Puts the random generators back to where they were."""
    generators = RandomState()
    before = generators.capture()
    yield
    generators.restore(before)


class _Kept(NamedTuple):
    batch: Any
    versions: tuple[int, ...]
    """How often each tensor had been written to when it was handed out."""
    generators_after: Any
    """What drawing the batch left the random generators at."""


class _Epoch(NamedTuple):
    first_index: int
    number: int
    generators: Any
    """The random generators, and the loader's own, just before it began."""
    own_generators: list[torch.Tensor]


class BufferedSource(BatchSource):
    """Of any other loader: keeps the batches since the oldest snapshot.

    Another process goes through the epoch from its beginning, with the random generators of then,
    up to where this one was.

    Containers are handed out as shallow copies, so that a training loop may take entries out of
    them. Tensors are not copied until one is found to have been changed in place.
    """

    def __init__(self, loader: Iterable[Any], epochs: int, *, keeps_batches: bool) -> None:
        super().__init__(loader, epochs)
        self._keeps_batches = keeps_batches
        self._generators = RandomState()
        self._kept: deque[_Kept] = deque()
        self._first_kept = 0
        self._begun: list[_Epoch] = []
        self._must_clone = False
        self._kept_bytes = 0
        self._has_warned_of_memory = False

    def _fetch(self) -> Any:
        at = self.index - self._first_kept
        if at < len(self._kept):
            kept = self._kept[at]
            self._generators.restore(kept.generators_after)
            return self._handed_out(kept.batch)
        batch = super()._fetch()
        if not self._keeps_batches:
            self._first_kept = self.index + 1
            return batch
        self._keep(batch)
        return self._handed_out(batch)

    def _keep(self, batch: Any) -> None:
        self._look_for_changes()
        self._kept.append(_Kept(batch, _versions(batch), self._generators.capture()))
        self._kept_bytes += _size_bytes(batch)
        if self._kept_bytes > _MUCH_MEMORY_BYTES and not self._has_warned_of_memory:
            self._has_warned_of_memory = True
            _log.warning(
                "%d batches (%.1f GiB) are kept to be run again after a rollback; a shorter "
                "snapshot_interval keeps fewer, a loader with state_dict none",
                len(self._kept),
                self._kept_bytes / 2**30,
            )

    def _look_for_changes(self) -> None:
        if self._must_clone or not self._kept:
            return
        last = self._kept[-1]
        if _versions(last.batch) != last.versions:
            self._must_clone = True
            _log.warning(
                "batch %d was changed in place by the training loop and could not be run again as "
                "it was; batches are copied from now on",
                self.index - 1,
            )

    def _handed_out(self, batch: Any) -> Any:
        return _copy_containers(batch, self._must_clone)

    def _note_epoch_begin(self) -> None:
        if self._keeps_batches:
            own = [g.get_state() for g in _generators_of(self._loader)]
            begun = _Epoch(self.index, self._epoch, self._generators.capture(), own)
            self._begun.append(begun)

    def _place_of_batches(self) -> dict[str, Any]:
        """The epoch that the batch before is of: the next one may not have begun."""
        before = [epoch for epoch in self._begun if epoch.first_index < self.index]
        return {"index": self.index, "epoch": before[-1]._asdict() if before else None}

    def _find(self, place: Mapping[str, Any]) -> None:
        self.index = self._first_kept = place["index"]
        if place["epoch"] is None:
            return
        epoch = _Epoch(**place["epoch"])
        self._epoch, self._begun = epoch.number, [epoch]
        with _unmoved_generators():
            self._generators.restore(epoch.generators)
            for own, state in zip(_generators_of(self._loader), epoch.own_generators, strict=False):
                own.set_state(state.clone())
            self._iterator = iter(self._loader)
            for i in range(epoch.first_index, self.index):
                self._pass_over(i)

    def _pass_over(self, index: int) -> None:
        assert self._iterator is not None
        try:
            next(self._iterator)
        except StopIteration:
            raise ValueError(
                f"loader ends before batch {index}, where the run that is resumed had gone on; "
                "accepted: the same data"
            ) from None

    def forget_before(self, index: int) -> None:
        while len(self._begun) > 1 and self._begun[1].first_index < index:
            del self._begun[0]
        while self._kept and self._first_kept < index:
            self._kept_bytes -= _size_bytes(self._kept.popleft().batch)
            self._first_kept += 1

    def capture(self) -> Any:
        return {"index": self.index}

    def restore(self, saved: Any) -> None:
        self.index = saved["index"]


def _generators_of(loader: Any) -> list[torch.Generator]:
    """The generators of its own that a DataLoader draws its order from."""
    sampler, batch_sampler = (getattr(loader, name, None) for name in ("sampler", "batch_sampler"))
    owners = (loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    found = {id(g): g for g in (getattr(owner, "generator", None) for owner in owners)}
    return [g for g in found.values() if isinstance(g, torch.Generator)]


def _versions(batch: Any) -> tuple[int, ...]:
    return tuple(t._version for _, t in tensors_in(batch) if not t.is_inference())


def _size_bytes(batch: Any) -> int:
    return sum(t.nbytes for _, t in tensors_in(batch))


def _copy_containers(value: Any, has_clones: bool) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone() if has_clones else value
    if type(value) is dict:
        return {key: _copy_containers(item, has_clones) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copy_containers(item, has_clones) for item in value)
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(_copy_containers(item, has_clones) for item in value)
    if isinstance(value, Mapping):
        return copy.deepcopy(value) if has_clones else copy.copy(value)
    return value
