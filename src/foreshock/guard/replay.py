"""Batches that can be had again after a rollback."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from foreshock.guard.state import RandomState, Stateful, copy_out


def make_source(loader: Iterable[Any], epochs: int, *, keeps_batches: bool) -> BatchSource:
    """The source that suits a loader.

    Args:
        loader: iterated over once per epoch.
        epochs: number of passes.
        keeps_batches: whether to keep batches of a loader that cannot be sent back; without, such a
            source cannot be restored.
    """
    if isinstance(loader, Stateful):
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
                self._iterator = iter(self._loader)
            try:
                return next(self._iterator)
            except StopIteration:
                self._iterator = None
                self._epoch += 1

    def capture(self) -> Any:
        """Where the source is."""
        raise NotImplementedError

    def restore(self, saved: Any) -> None:
        """Sends the source back to where it was."""
        raise NotImplementedError


class ResumableSource(BatchSource):
    """Of a loader that has state_dict and load_state_dict."""

    _loader: Any

    def capture(self) -> Any:
        return {
            "index": self.index,
            "epoch": self._epoch,
            "is_within": self._iterator is not None,
            "loader": copy_out(self._loader.state_dict()),
        }

    def restore(self, saved: Any) -> None:
        self.index, self._epoch = saved["index"], saved["epoch"]
        self._loader.load_state_dict(copy_out(saved["loader"]))
        self._iterator = None
        if saved["is_within"]:
            # Within an epoch no iterator was made in the first run, so none may draw a seed now.
            generators = RandomState()
            before = generators.capture()
            self._iterator = iter(self._loader)
            generators.restore(before)


class BufferedSource(BatchSource):
    """Of any other loader: keeps the batches since the oldest snapshot, with what drawing each of
    them did to the random generators.
    """

    def __init__(self, loader: Iterable[Any], epochs: int, *, keeps_batches: bool) -> None:
        super().__init__(loader, epochs)
        self._keeps_batches = keeps_batches
        self._generators = RandomState()
        self._kept: deque[tuple[Any, Any]] = deque()
        self._first_kept = 0

    def _fetch(self) -> Any:
        at = self.index - self._first_kept
        if at < len(self._kept):
            batch, generators_after = self._kept[at]
            self._generators.restore(generators_after)
            return batch
        batch = super()._fetch()
        if self._keeps_batches:
            self._kept.append((batch, self._generators.capture()))
        else:
            self._first_kept = self.index + 1
        return batch

    def forget_before(self, index: int) -> None:
        """Lets go of the batches before this one."""
        while self._kept and self._first_kept < index:
            self._kept.popleft()
            self._first_kept += 1

    def capture(self) -> Any:
        return {"index": self.index}

    def restore(self, saved: Any) -> None:
        self.index = saved["index"]
