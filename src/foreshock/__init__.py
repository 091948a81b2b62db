"""foreshock watches a PyTorch training run from inside and keeps it alive."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foreshock import gates as gates
    from foreshock import guard as guard
    from foreshock import integrations as integrations
    from foreshock import ops as ops
    from foreshock import records as records
    from foreshock import signals as signals
    from foreshock import sinks as sinks
    from foreshock import surprise as surprise
    from foreshock.guard import Action as Action
    from foreshock.guard import Guard as Guard
    from foreshock.guard import clip_grad_norm_ as clip_grad_norm_
    from foreshock.monitor import Monitor as Monitor
    from foreshock.monitor import Verdict as Verdict
    from foreshock.settings_file import load_settings as load_settings
    from foreshock.signals import entropy_rate as entropy_rate
    from foreshock.signals import f_total as f_total
    from foreshock.signals import processivity as processivity
    from foreshock.signals import theta_consistency as theta_consistency
    from foreshock.signals import two_second_precursor as two_second_precursor

# Loaded when first used: importing foreshock stays cheap, and what needs no torch imports none.
_LAZY = {
    "Action": "foreshock.guard",
    "Guard": "foreshock.guard",
    "clip_grad_norm_": "foreshock.guard",
    "Monitor": "foreshock.monitor",
    "Verdict": "foreshock.monitor",
    "entropy_rate": "foreshock.signals",
    "f_total": "foreshock.signals",
    "gates": "",
    "guard": "",
    "integrations": "",
    "load_settings": "foreshock.settings_file",
    "ops": "",
    "processivity": "foreshock.signals",
    "records": "",
    "signals": "",
    "sinks": "",
    "surprise": "",
    "theta_consistency": "foreshock.signals",
    "two_second_precursor": "foreshock.signals",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("foreshock")
    if name not in _LAZY:
        raise AttributeError(f"module 'foreshock' has no attribute {name!r}")
    if not _LAZY[name]:
        return importlib.import_module(f"foreshock.{name}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, "__version__"})
