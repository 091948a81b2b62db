"""What the spectral signals look at, and where their levels begin."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

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
