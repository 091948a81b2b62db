"""When what is seen of gates is a risk."""

from __future__ import annotations

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from foreshock.settings import Settings


class GateSettings(Settings):
    """When `GateMonitor` tells of a gate; each is told of once, until it is well again."""

    orthogonality_threshold: PositiveFloat = 1e-5
    """Of |R^T R - I|_F of a gate's worst block, above which it has risen."""
    orthogonality_rise: PositiveFloat = 10.0
    """Times the median of looks before, above which it has risen too, if it is above
    `orthogonality_floor`."""
    orthogonality_floor: NonNegativeFloat = 1e-6
    """Below which it is the rounding of float32."""
    orthogonality_window: PositiveInt = 50
    """The last looks in which the gate was well, that the median is taken of."""
    orthogonality_min_count: PositiveInt = 8
    """Looks before there is a median."""
    alpha_tolerance: PositiveFloat = 0.01
    """Distance of sigmoid(alpha) from what is planned, above which it has left its schedule."""
