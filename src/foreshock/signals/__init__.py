"""Streaming statistics that turn what the ops read into early warnings."""

from foreshock.signals.configuration import RiskThresholds, SpectralSettings
from foreshock.signals.optimizer_state import (
    SecondMomentRms,
    muon_ratio,
    second_moment_rms,
    weight_decays,
    why_no_second_moments,
)
from foreshock.signals.risk import RiskLevel, risk_level, slope, volatility
from foreshock.signals.spectral_tracker import MatrixReading, SpectralReading, SpectralTracker
from foreshock.signals.spectral_watch import SpectralObservation, SpectralWatch

__all__ = [
    "MatrixReading",
    "RiskLevel",
    "RiskThresholds",
    "SecondMomentRms",
    "SpectralObservation",
    "SpectralReading",
    "SpectralSettings",
    "SpectralTracker",
    "SpectralWatch",
    "muon_ratio",
    "risk_level",
    "second_moment_rms",
    "slope",
    "volatility",
    "weight_decays",
    "why_no_second_moments",
]
