"""For tests and benchmarks: a GPU test is skipped, in sight, where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """FORESHOCK_REQUIRE_GPU=1 lets them fail instead of being skipped."""
    if torch.cuda.is_available() or os.environ.get("FORESHOCK_REQUIRE_GPU") == "1":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
