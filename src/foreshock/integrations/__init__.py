"""foreshock where people train: callbacks for the loops that others have written."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foreshock.integrations import accelerate as accelerate
    from foreshock.integrations import huggingface as huggingface
    from foreshock.integrations import lightning as lightning

_NEEDS = {"accelerate": "accelerate", "huggingface": "transformers", "lightning": "lightning"}


def __getattr__(name: str) -> Any:
    if name not in _NEEDS:
        raise AttributeError(f"module 'foreshock.integrations' has no attribute {name!r}")
    try:
        return importlib.import_module(f"foreshock.integrations.{name}")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"foreshock.integrations.{name} needs {_NEEDS[name]} ({error}): "
            f"pip install 'foreshock[{name}]'"
        ) from error
