"""Streaming statistics that turn what the ops read into early warnings."""

from foreshock.signals.alignment import UpdateAlignment, update_alignment
from foreshock.signals.configuration import FingerprintSettings, RiskThresholds, SpectralSettings
from foreshock.signals.logits import (
    LogitDrift,
    LogitStatistics,
    logit_drift,
    logit_histogram,
    logit_statistics,
)
from foreshock.signals.noise_fingerprint import NoiseFingerprint, NoiseReading
from foreshock.signals.noise_statistics import (
    NoiseSnapshot,
    Precursor,
    entropy_rate,
    f_total,
    processivity,
    snapshot,
    theta_consistency,
    two_second_precursor,
)
from foreshock.signals.noise_streams import (
    EntropyRateStream,
    NoiseReference,
    NoiseSeries,
    ProcessivityStream,
    ThetaStream,
)
from foreshock.signals.optimizer_state import (
    SecondMomentRms,
    muon_ratio,
    second_moment_rms,
    weight_decays,
    why_no_second_moments,
)
from foreshock.signals.precursor import TwoSecondPrecursor
from foreshock.signals.risk import RiskLevel, risk_level, slope, volatility
from foreshock.signals.spectral_tracker import MatrixReading, SpectralReading, SpectralTracker
from foreshock.signals.spectral_watch import SpectralObservation, SpectralWatch

__all__ = [
    "EntropyRateStream",
    "FingerprintSettings",
    "LogitDrift",
    "LogitStatistics",
    "MatrixReading",
    "NoiseFingerprint",
    "NoiseReading",
    "NoiseReference",
    "NoiseSeries",
    "NoiseSnapshot",
    "Precursor",
    "ProcessivityStream",
    "RiskLevel",
    "RiskThresholds",
    "SecondMomentRms",
    "SpectralObservation",
    "SpectralReading",
    "SpectralSettings",
    "SpectralTracker",
    "SpectralWatch",
    "ThetaStream",
    "TwoSecondPrecursor",
    "UpdateAlignment",
    "entropy_rate",
    "f_total",
    "logit_drift",
    "logit_histogram",
    "logit_statistics",
    "muon_ratio",
    "processivity",
    "risk_level",
    "second_moment_rms",
    "slope",
    "snapshot",
    "theta_consistency",
    "two_second_precursor",
    "update_alignment",
    "volatility",
    "weight_decays",
    "why_no_second_moments",
]
