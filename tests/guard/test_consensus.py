"""What the ranks do when there is only one of them, or the others do not answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import foreshock as fs
from foreshock.guard import Consensus, RanksLost, Watch, find_ranks
from foreshock.guard.consensus import Share
from foreshock.guard.copies import _outvoted


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_rank_watches_for_itself_and_sends_nothing(alone: None, tmp_path: Path) -> None:
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert find_ranks(model, list(model.parameters()), None) is None
    with fs.Monitor(model, optimizer, tmp_path, process_group=dist.group.WORLD) as monitor:
        assert type(monitor._watch) is Watch


def test_a_group_without_torch_distributed_is_an_error(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"process_group is given, but .* is not"):
        fs.Monitor(model, optimizer, tmp_path, process_group=object())  # type: ignore[arg-type]


def test_a_rank_that_gets_no_answer_says_so_and_asks_no_more(
    alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Consensus(dist.group.WORLD, torch.device("cpu"))

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(dist, "all_reduce", fail)
    with pytest.raises(RanksLost, match=r"rank 0 of 1 gets no answer.*closed by peer.*resume"):
        ranks.share(Share(loss=1.0))
    assert ranks.share(Share(loss=2.0)) == Share(loss=2.0)


def test_a_rank_that_has_left_waits_for_nobody(
    alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Consensus(dist.group.WORLD, torch.device("cpu"))
    monkeypatch.setattr(dist, "all_reduce", pytest.fail)
    ranks.leave()
    assert ranks.bounds(3) == (3, 3)


@pytest.mark.parametrize(
    ("held", "outvoted"),
    [
        ([(0, 5), (0, 5), (0, 7), (0, 5)], (2,)),
        ([(0, 5), (0, 7)], (0, 1)),
        ([(0, 5), (1, 7), (0, 5), (1, 8), (1, 7)], (3,)),  # of two parts
        ([(0, 5), (0, 5), (1, 7), (1, 8)], (2, 3)),
        ([(0, 5), (0, 6), (0, 7), (0, 5)], (1, 2)),
    ],
)
def test_the_rank_that_differs_from_most_is_the_one_that_is_wrong(
    held: list[tuple[int, int]], outvoted: tuple[int, ...]
) -> None:
    assert _outvoted(held) == outvoted
