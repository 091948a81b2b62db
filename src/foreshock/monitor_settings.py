"""What a monitor can be told, but for what it is given to watch."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import NonNegativeInt, PositiveInt

from foreshock.gates import GateSettings
from foreshock.settings import Settings
from foreshock.signals import FingerprintSettings, SpectralSettings


class MonitorSettings(Settings):
    """Cadence of the monitor; what may be done about a bad step is `Guard`'s."""

    accepted_beside: ClassVar[tuple[str, ...]] = (
        "model", "optimizer", "out_dir", "guard", "state", "surprise", "gate_schedule", "sinks",
        "sync", "process_group",
        "save_metrics", "save_metrics_steps",
    )  # fmt: skip

    parameters: Literal["all", "trainable"] = "all"
    """all: every parameter of model and optimizer is scanned, and belongs to snapshots. trainable:
    only those that require a gradient; what is frozen, as below an adapter, is not even read."""
    first_step: NonNegativeInt = 0
    """Number of the first step, where somebody else has taken the run up in its middle."""
    telemetry_interval: PositiveInt = 10
    """Steps between telemetry records; events are recorded as they happen."""
    telemetry_top_k: NonNegativeInt = 3
    """Largest gradient norms in each telemetry record, with the parameters whose they are."""
    spectral_enabled: bool = True
    """Whether the spectra of the weight matrices are followed."""
    spectral_interval: PositiveInt = 50
    """Steps between looks at them. While their risk is WARNING or more, every step is looked at,
    and has a telemetry record."""
    spectral_include: tuple[str, ...] = ("*",)
    """Shell patterns for the names of the parameters that are followed."""
    spectral_exclude: tuple[str, ...] = ()
    """Shell patterns for those that are not, though `spectral_include` names them."""
    spectral_warmup: NonNegativeInt = 300
    """First steps in which no level is answered: a model that begins to learn is restless. Nor is
    one in the `spectral.span` steps after a rollback, and until `spectral.patience` more have been
    seen. A level that then still holds is answered."""
    spectral_response: Literal["log", "act"] = "log"
    """log: record what a level calls for. act: do it, unless the guard only observes. WARNING: a
    snapshot after the next clean step. DANGER: that, and a lower learning rate. INSTABILITY:
    rollback, or the end of training where the guard has no way back."""
    spectral: SpectralSettings = SpectralSettings()
    """How their risk is judged."""
    fingerprint_enabled: bool = True
    """Whether the noise of loss and gradients is followed."""
    fingerprint: FingerprintSettings = FingerprintSettings(processivity_window=16)
    """How."""
    fingerprint_reference: Path | None = None
    """Directory of an earlier, healthy run whose noise this run's is compared with; None: the
    first steps of this run."""
    alignment_interval: PositiveInt = 100
    """Steps between looks at whether an update goes where its gradient points."""
    surprise_interval: PositiveInt = 50
    """Steps between looks at how surprising a batch is, if there is a probe."""
    logit_interval: PositiveInt = 50
    """Steps between looks at the logits, if `step` is given any."""
    activation_modules: tuple[str, ...] = ()
    """Shell patterns for the names of the modules whose outputs are looked at."""
    activation_interval: PositiveInt = 50
    """Steps between looks at them, of which the second step is the first."""
    gate_interval: PositiveInt = 10
    """Steps between looks at the rotation gates, if the model has some."""
    gates: GateSettings = GateSettings()
    """When what is seen of them is a risk."""
    rank_records: bool = False
    """Whether every rank but the first keeps records too, in `rank_00001` and so on in out_dir."""
