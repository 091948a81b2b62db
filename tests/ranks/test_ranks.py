"""Two and four ranks on gloo, on loopback: one start for all checks of each number of ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks.launch import results
from tests.ranks.worker import all_checks

CHECKS = [(size, name) for size in (2, 4) for name in all_checks(size)]


@pytest.fixture(scope="module", params=(2, 4))
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, dict[str, list[Any]]]:
    return request.param, results(request.param, tmp_path_factory.mktemp("ranks"), timeout=600)


@pytest.mark.parametrize("name", sorted({name for _, name in CHECKS}))
def test_on_all_ranks(found: tuple[int, dict[str, list[Any]]], name: str) -> None:
    size, of_checks = found
    if (size, name) not in CHECKS:
        pytest.skip(f"not of {size} ranks")
    went_wrong = of_checks.get(name, ["not run, since one before it failed"])
    for rank, error in enumerate(went_wrong):
        assert error is None, f"rank {rank}: {error}"
