"""Two and four ranks on gloo, on loopback: one start for all checks of each number of ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from tests.ranks.launch import results
from tests.ranks.worker import all_checks

CHECKS = [
    pytest.param(size, name, marks=pytest.mark.xdist_group(f"{size} ranks"))
    for size in (2, 4)
    for name in all_checks(size)
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, list[Any]]]:
    """What every check comes to on each of so many ranks, which are started once."""
    return functools.cache(
        lambda size: results(size, tmp_path_factory.mktemp("ranks"), timeout=600)
    )


@pytest.mark.parametrize(("size", "name"), CHECKS)
def test_on_all_ranks(found: Callable[[int], dict[str, list[Any]]], size: int, name: str) -> None:
    for rank, error in enumerate(found(size).get(name, ["not run, since one before it failed"])):
        assert error is None, f"rank {rank}: {error}"
