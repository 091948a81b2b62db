"""A short run with a rollback in it, told to sinks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from foreshock.guard import Offender, Reason, RiskLevelChanged, RolledBack
from foreshock.journal import Journal
from foreshock.signals import RiskLevel
from foreshock.sinks import Sink

NUM_RECORDS = 8
OFFENDER = Offender("gradient", "head.weight", 1, 0, 24)


def tell(out_dir: Path, *sinks: Sink) -> dict[str, Any]:
    """Steps 0 to 3, a rollback to step 2 in step 3, and steps 2 and 3 again. What was counted."""
    journal = Journal(out_dir, {}, sinks)
    for step, loss in enumerate((3.0, math.inf, 5.0, math.nan)):
        journal.record_telemetry(step, **measured(loss))
    journal.record(RiskLevelChanged(3, RiskLevel.WARNING, RiskLevel.STABLE, 9.0, None, None, "a"))
    journal.record(RolledBack(3, 2, (Reason.NONFINITE_LOSS,), OFFENDER, 0.5))
    for step, loss in ((2, 2.0), (3, 1.0)):
        journal.record_telemetry(step, **measured(loss))
    journal.close()
    return dict(journal.write_summary(4, 1.0, "recover", None)["sinks"])


def measured(loss: float) -> dict[str, object]:
    return {
        "train_loss": loss,
        "risk_level": "STABLE",
        "precursor_alert": True,
        "theta": None,
        "largest_gradients": {"head.weight": 0.5, "body.0 bias!": 0.25},
        "api_key": "hunter2-canary",
    }
