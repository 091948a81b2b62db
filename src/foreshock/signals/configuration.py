"""What the signals look at, and where their levels begin."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from foreshock.settings import Settings

Scale = Literal["relative", "absolute"]
"""relative: ln kappa, its slope and the spread around the fitted line; neither depends on the
matrix's scale. absolute: kappa itself, its slope and its plain standard deviation."""


class RiskThresholds(Settings):
    """Above which value each level begins; the value itself belongs to the level below.

    `inf` switches a level off.
    """

    learning: PositiveFloat = 0.0005
    """|slope| per step above which the spectrum is no longer STABLE."""
    warning: PositiveFloat = 0.002
    """|slope| per step above which the level is WARNING."""
    danger: PositiveFloat = 0.004
    """|slope| per step above which the level is DANGER."""
    instability: PositiveFloat = 0.003
    """Volatility above which the level is INSTABILITY, whatever the slope."""

    @model_validator(mode="after")
    def _must_rise(self) -> RiskThresholds:
        if not self.learning <= self.warning <= self.danger:
            raise ValueError(
                f"learning={self.learning}, warning={self.warning}, danger={self.danger} do not "
                "rise; accepted: learning <= warning <= danger"
            )
        return self


class SpectralSettings(Settings):
    """How the spectral risk of a model is judged.

    >>> SpectralSettings(window=100, thresholds=RiskThresholds(instability=0.01))
    """

    window: int = Field(default=50, ge=3)
    """Observations that slope and volatility are taken over; older ones are forgotten."""
    span: PositiveInt | None = 50
    """Steps that they reach back, but for the last 3 observations, which always count; None: any.
    The thresholds are made for the unrest of some 50 steps: over 2500, as 50 observations at every
    50th step are, the curve that every healthy run draws would count as volatility."""
    patience: PositiveInt = 2
    """Observations in a row that must lie beyond a level before it changes, up or down."""
    scale: Scale = "relative"
    """Whether the logarithm of kappa is judged, or kappa itself."""
    aggregate: Literal["max", "mean", "median"] = "max"
    """What of all matrices the model's own level is read from."""
    thresholds: RiskThresholds = RiskThresholds()
    """Where the levels begin."""
    worst: PositiveInt = 3
    """How many matrices a reading names."""


class FingerprintSettings(Settings):
    """How the noise of a run is followed.

    >>> FingerprintSettings(window=256, reference_steps=256, precursor_series="grad_norm")
    """

    window: int = Field(default=128, ge=2)
    """Values of the noise that theta compares with the reference."""
    reference_steps: int = Field(default=128, ge=2)
    """Values of the noise that make up the healthy reference; best as many as in the window."""
    reference_start: NonNegativeInt = 0
    """Steps at the start of a run whose noise is not looked at, such as a warm-up's."""
    beta: float = Field(default=3.0, ge=0, allow_inf_nan=False)
    """How fast unlikeness of the spectra counts in theta."""
    median_of: int = Field(default=31, ge=8)
    """Values of which the running median is taken that noise is the distance from."""
    entropy_window: PositiveInt = 32
    """Values of the noise in each of the two windows of the entropy rate."""
    shared_range: bool = True
    """Whether the two windows' histograms span one range; if not, a change of spread is unseen."""
    processivity_window: PositiveInt = 64
    """Steps over which gradient norms and step norms are compared."""
    w_s: FiniteFloat = 1.0
    """Weight of the entropy rate in f_total."""
    w_p: FiniteFloat = 1.0
    """Weight of the processivity in f_total."""
    precursor_series: Literal["loss", "grad_norm"] = "loss"
    """What the precursor watches."""
    precursor_window_sec: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    """Seconds that count as the present."""
    precursor_baseline_sec: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """Seconds before them that the present is held against."""
    precursor_min_count: int = Field(default=32, ge=1, le=8191)
    """Values in that baseline without which nothing is judged; kept however old they are."""
    precursor_z: PositiveFloat = 2.5
    """Rise, in standard deviations of the baseline, above which there is an alert; `inf`: never,
    but for values that are not finite."""
