"""What only these benchmarks need, imported when it is needed."""

from __future__ import annotations

import importlib
from typing import Any


def imported(module: str, extra: str) -> Any:
    """The module, or an error that names the extra of foreshock that brings it.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        wanted = f"pip install 'foreshock[{extra}]'"
        raise ImportError(f"{module} is missing ({error}); {wanted} brings it") from error
