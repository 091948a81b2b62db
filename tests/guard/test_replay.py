"""Batches that can be had again."""

from __future__ import annotations

import gc
import logging
import random
import weakref
from collections import UserDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from foreshock.guard import BatchSource, BufferedSource, RandomState, make_source
from foreshock.guard.replay import ResumableSource
from tests.monitor.training import (
    STEPS_PER_EPOCH,
    DrawingLoader,
    ResumableLoader,
    make_dataset,
    seed_everything,
)


def drain(source: BatchSource) -> list[Any]:
    end = object()

    def fetch_or_end() -> Any:
        try:
            return source.fetch()
        except StopIteration:
            return end

    return list(iter(fetch_or_end, end))


def fetch(source: BatchSource, count: int) -> list[Any]:
    return [source.fetch() for _ in range(count)]


def same(ones: list[Any], others: list[Any]) -> bool:
    return len(ones) == len(others) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        for a, b in zip(ones, others, strict=True)
    )


def shuffled() -> DataLoader[Any]:
    return DataLoader(make_dataset(), batch_size=8, shuffle=True)


SOURCES = {
    "buffered": lambda: make_source(shuffled(), 3, keeps_batches=True),
    "resumes-with-the-end": lambda: make_source(ResumableLoader(), 3, keeps_batches=True),
    "resumes-with-the-next-epoch": lambda: make_source(
        ResumableLoader(resumes_with_next_epoch=True), 3, keeps_batches=True
    ),
    "draws": lambda: make_source(DrawingLoader(), 3, keeps_batches=True),
}


def make(name: str) -> BatchSource:
    seed_everything(0)
    return SOURCES[name]()


def test_a_loader_that_saves_itself_is_sent_back_itself() -> None:
    assert isinstance(make("resumes-with-the-end"), ResumableSource)
    assert isinstance(make("buffered"), BufferedSource)


class Place:
    """Where a source and the random generators are, together, as in a snapshot."""

    def __init__(self, source: BatchSource) -> None:
        self._source = source
        self._generators = RandomState()
        self._saved = self._generators.capture(), source.capture()

    def go_back(self) -> None:
        self._generators.restore(self._saved[0])
        self._source.restore(self._saved[1])


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("back_to", range(2 * STEPS_PER_EPOCH + 1))
@pytest.mark.parametrize("ahead", [1, 2, STEPS_PER_EPOCH])
def test_after_going_back_the_same_batches_come_in_all_epochs(
    name: str, back_to: int, ahead: int
) -> None:
    expected = drain(make(name))
    assert len(expected) == 3 * STEPS_PER_EPOCH
    source = make(name)
    fetch(source, back_to)
    place = Place(source)
    fetch(source, ahead)
    for _ in range(2):
        place.go_back()
        assert source.index == back_to
        assert same(fetch(source, ahead), expected[back_to : back_to + ahead])
    assert same(drain(source), expected[back_to + ahead :])


@pytest.mark.parametrize("name", SOURCES)
def test_batches_left_out_stay_out_and_no_others(name: str) -> None:
    expected = drain(make(name))
    source = make(name)
    place = Place(source)
    fetch(source, 8)
    source.leave_out(7, 2)
    place.go_back()
    assert same(drain(source), [b for i, b in enumerate(expected) if i not in (7, 8)])


class Drawing:
    """Draws from all generators for each batch and when an epoch begins."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        random.random()
        for _ in range(3):
            x = torch.rand(2) + random.random() + float(np.random.random())
            yield x, x


def test_a_batch_from_memory_leaves_the_generators_where_drawing_it_did() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), torch.rand(1).item()

    seed_everything(0)
    source = make_source(Drawing(), 2, keeps_batches=True)
    saved = source.capture()
    first = [(source.fetch()[0].tolist(), draw()) for _ in range(5)]
    source.restore(saved)
    again = [(source.fetch()[0].tolist(), draw()) for _ in range(5)]
    assert again == first


def test_buffer_holds_no_more_than_what_may_be_asked_for_again() -> None:
    source = BufferedSource(range(1000), 1, keeps_batches=True)
    for index in range(0, 1000, 10):
        fetch(source, 10)
        source.forget_before(index)
        assert len(source._kept) <= 20
    source.forget_before(1000)
    assert not source._kept
    assert source._kept_bytes == 0


def test_without_replay_nothing_is_kept() -> None:
    class Thing:
        pass

    source = make_source((Thing() for _ in range(3)), 1, keeps_batches=False)
    gone = weakref.ref(source.fetch())
    source.fetch()
    gc.collect()
    assert gone() is None
    assert not source._kept  # type: ignore[attr-defined]


class Point(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Encoding(UserDict[str, Any]):
    """As tokenizers return."""


@pytest.mark.parametrize(
    "batch",
    [
        {"input": torch.ones(2), "labels": {"a": torch.ones(1)}},
        Encoding({"input": torch.ones(2), "labels": {"a": torch.ones(1)}}),
    ],
)
def test_entries_may_be_taken_out_of_a_batch(batch: Any) -> None:
    source = BufferedSource([batch], 1, keeps_batches=True)
    saved = source.capture()
    for _ in range(2):
        fetched = source.fetch()
        assert type(fetched) is type(batch)
        assert fetched.pop("labels")["a"] == 1
        source.restore(saved)


@pytest.mark.parametrize(
    "make_batch",
    [
        lambda: [torch.ones(2), torch.ones(2)],
        lambda: (torch.ones(2), [torch.ones(2)]),
        lambda: Point(torch.ones(2), torch.ones(2)),
        lambda: {"x": torch.ones(2)},
        lambda: Encoding({"x": torch.ones(2)}),
        lambda: torch.ones(2),
    ],
    ids=["list", "tuple", "namedtuple", "dict", "mapping", "tensor"],
)
def test_a_change_in_place_is_found_told_of_and_from_then_on_harmless(
    make_batch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def spoil(batch: Any) -> float:
        first = batch
        while not isinstance(first, torch.Tensor):
            first = first["x"] if hasattr(first, "keys") else first[0]
        before = first.sum().item()
        first.add_(5)
        return before

    source = BufferedSource([make_batch() for _ in range(6)], 1, keeps_batches=True)
    with caplog.at_level(logging.WARNING, "foreshock"):
        assert spoil(source.fetch()) == 2.0
        second = source.fetch()
    assert "batch 0 was changed in place" in caplog.text
    assert spoil(second) == 2.0
    saved = source.capture()
    for _ in range(2):
        source.restore(saved)
        assert [spoil(source.fetch()) for _ in range(3)] == [2.0] * 3
    assert len(caplog.records) == 1


def test_a_batch_given_twice_by_the_loader_is_no_change() -> None:
    with torch.inference_mode():
        batch = torch.ones(2)
    source = BufferedSource([batch] * 3, 1, keeps_batches=True)
    assert len(drain(source)) == 3


def test_much_memory_is_told_of_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foreshock.guard.replay._MUCH_MEMORY_BYTES", 10_000)
    source = BufferedSource([torch.zeros(1000) for _ in range(9)], 1, keeps_batches=True)
    drain(source)
    assert [r.message for r in caplog.records if "are kept to be run again" in r.message] == [
        "3 batches (0.0 GiB) are kept to be run again after a rollback; a shorter "
        "snapshot_interval keeps fewer, a loader with state_dict none"
    ]


def test_an_empty_or_exhausted_loader_ends_the_run() -> None:
    assert drain(make_source([], 3, keeps_batches=True)) == []
    assert drain(make_source(iter([1, 2]), 3, keeps_batches=True)) == [1, 2]
