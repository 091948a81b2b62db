"""What every test can rely on."""

from __future__ import annotations

import os

import pytest
import torch

GPU_IS_REQUIRED = os.environ.get("FORESHOCK_REQUIRE_GPU") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A GPU test is skipped, in sight, where there is no GPU; where one is required it fails."""
    if torch.cuda.is_available() or GPU_IS_REQUIRED:
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
