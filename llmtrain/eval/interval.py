"""Gives shares their intervals."""

from __future__ import annotations

import math

Z_95 = 1.959964  # standard deviations of a normal distribution on each side that leave 5 % outside


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """Returns the ends of Wilson's 95 % interval of a share (Wilson 1927; Agresti and Coull 1998, equation 2).

    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n). A tie may count half. Without trials it is
    (0, 1). Example: wilson(8, 10) -> (0.490, 0.943)
    """
    if trials == 0:
        return 0.0, 1.0
    share, square = successes / trials, Z_95**2 / trials
    half = Z_95 * math.sqrt(share * (1 - share) / trials + square / (4 * trials))
    return tuple(max(0.0, min(1.0, (share + square / 2 + side) / (1 + square))) for side in (-half, half))
