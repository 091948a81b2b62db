"""Two and four ranks on gloo, on loopback: one start for all checks of each number of ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks.launch import results
from tests.ranks.worker import all_checks

CHECKS = [(size, name) for size in (2, 4) for name in all_checks(size)]


@pytest.fixture(scope="module")
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Any]]:
    """What every check came to on each of so many ranks."""
    return results(request.param, tmp_path_factory.mktemp("ranks"), timeout=600)


@pytest.mark.parametrize(("found", "name"), CHECKS, indirect=["found"])
def test_on_all_ranks(found: dict[str, list[Any]], name: str) -> None:
    for rank, error in enumerate(found.get(name, ["not run, since one before it failed"])):
        assert error is None, f"rank {rank}: {error}"
